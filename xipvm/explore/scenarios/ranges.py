"""Several ranges at once: nested, overlapping, declined; two VMs on one mm, and two names for one page."""

from __future__ import annotations

import errno
from contextlib import suppress

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, furnish
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.vma import PROT_READ
from xipvm.notifier import MmuNotifier, MmuNotifierRange, RangeEvent


@scenario
def two_ranges_at_once(scene: Scene) -> None:
    """Two threads of the host give up two pages, one beside the other, while the guest uses both."""
    mm, hva, _ = furnish(scene)
    scene.actor("host0", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
    scene.actor("host1", mm.madvise, hva, 2 * PAGE_SIZE, MADV_DONTNEED)


@scenario
def a_range_beside_another(scene: Scene) -> None:
    """Two threads of the host give up a page each, and the guest faults on the one whose range began first."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    vcpu = scene.vcpu(kvm)
    vcpu.store(GFN, OLD)
    vcpu.store(GFN + 1, OLD)
    scene.actor("host0", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
    scene.actor("host1", mm.madvise, hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    scene.actor("vcpu0", vcpu.store, GFN, NEW)


@scenario
def a_cold_fault_against_dontneed(scene: Scene) -> None:
    """The guest's first touch of a page that the host gives up just then."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))
    thread = scene.thread(mm)
    thread.store(hva, OLD)
    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@scenario
def two_vms_on_one_mm(scene: Scene) -> None:
    """Two VMs show the same memory, at different guest frames; the host takes rights away, then the pages."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    first = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))
    second = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=2 * GFN))
    first.store(GFN, OLD)
    second.load(2 * GFN)

    def host() -> None:
        mm.mprotect(hva, 2 * PAGE_SIZE, PROT_READ)
        mm.munmap(hva, 2 * PAGE_SIZE)

    scene.actor("vcpu0", first.store, GFN, NEW)
    scene.actor("vcpu1", second.load, 2 * GFN)
    scene.actor("host", host)


@scenario
def two_slots_on_one_page(scene: Scene) -> None:
    """Two memslots show the same memory; one has moved since the guest has used it."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    kvm.set_memslot(1, 2 * GFN, 2, hva)
    kvm.set_memslot(0, 3 * GFN, 2, hva)
    first, second = scene.vcpu(kvm), scene.vcpu(kvm)
    first.store(3 * GFN, OLD)
    second.load(2 * GFN)
    scene.actor("vcpu0", first.store, 3 * GFN, NEW)
    scene.actor("vcpu1", second.load, 2 * GFN)
    scene.actor("host", mm.munmap, hva, 2 * PAGE_SIZE)


class Busy(MmuNotifier):
    """Cannot take a range that may not block while it is at work."""

    name = "busy"

    def __init__(self) -> None:
        self.at_work = True

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """-EAGAIN while it is at work."""
        return 0 if range.blockable or not self.at_work else -errno.EAGAIN


@scenario(protocols=("modern",))
def a_range_that_is_declined(scene: Scene) -> None:
    """Somebody must not wait, as the OOM reaper; one of three notifiers declines, and the range does not happen."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    busy = Busy()
    mm.notifiers.register(busy)
    scene.undo(lambda: mm.notifiers.unregister(busy))
    scene.kvm(mm, hva, pages=2, gfn=2 * GFN)
    scene.vcpu(kvm).store(GFN, OLD)

    def reaper() -> None:
        with suppress(MmError):
            range = mm.notifiers.invalidate_range_start(hva, hva + 2 * PAGE_SIZE, RangeEvent.UNMAP, blockable=False)
            mm.notifiers.invalidate_range_end(range)
        busy.at_work = False

    scene.actor("oom_reaper", reaper)
    scene.actor("host", mm.mprotect, hva, PAGE_SIZE, PROT_READ)
