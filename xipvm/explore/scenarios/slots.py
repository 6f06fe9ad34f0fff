"""Memslots that come, go and move while ranges are open, and their dirty logs."""

from __future__ import annotations

from contextlib import suppress

from xipvm.actors import point
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, furnish
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES


@scenario
def a_slot_moves_while_a_range_is_open(scene: Scene) -> None:
    """The memslot moves to another guest frame while the host gives its pages up."""
    mm, hva, kvm = furnish(scene)

    def vmm() -> None:
        with suppress(MmError):
            kvm.set_memslot(0, GFN + 0x10, 2, hva)

    scene.actor("vmm", vmm)
    scene.actor("host", mm.madvise, hva, 2 * PAGE_SIZE, MADV_DONTNEED)


@scenario
def a_slot_goes_while_a_range_is_open(scene: Scene) -> None:
    """The memslot is deleted, and made anew, while the host gives its pages up."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    vcpu = scene.vcpu(kvm)
    vcpu.store(GFN, OLD)

    def vmm() -> None:
        with suppress(MmError):
            kvm.delete_memslot(0)
            point("vmm.between")
            kvm.set_memslot(0, GFN, 2, hva)

    scene.actor("vmm", vmm)
    scene.actor("host", mm.madvise, hva, 2 * PAGE_SIZE, MADV_DONTNEED)


@scenario
def the_dirty_log_is_read(scene: Scene) -> None:
    """Live migration: the log is read, the pages that it names are copied; in the end the copy is the memory."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    kvm = scene.kvm(mm)
    kvm.set_memslot(0, GFN, 2, hva, MEM_LOG_DIRTY_PAGES)
    vcpu = scene.vcpu(kvm)
    vcpu.store(GFN, OLD)
    copy = [b"", b""]

    def copied() -> None:
        dirty = kvm.get_dirty_log(0)[0]
        for page in range(2):
            if dirty >> page & 1:
                copy[page] = mm.read(hva + page * PAGE_SIZE, 8)

    def guest() -> None:
        vcpu.store(GFN, NEW)
        vcpu.store(GFN + 1, NEW)

    def finished() -> None:
        copied()
        for page in range(2):
            if copy[page] != mm.read(hva + page * PAGE_SIZE, 8):
                raise AssertionError(f"page {page} was written after it was copied, and the dirty log does not say so")

    scene.actor("vcpu0", guest)
    scene.actor("migration", copied)
    scene.afterwards(finished)
