"""Live migration by every kind of dirty log: in the end the copy is the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xipvm.actors import point
from xipvm.address import PAGE_SIZE
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW
from xipvm.explore.scenarios.huge import BASE, HOST, transparent
from xipvm.explore.scenarios.huge import GFN as HUGE_GFN
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.kvm_dirty import MANUAL_PROTECT_ENABLE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES
from xipvm.notifier import MmuNotifiers

PAGES: Final = 2
_MANY: Final = 5
LATER: Final = b"and then"


class Copy:
    """The other side of a migration: a copy of the first bytes of some pages at ``hva``."""

    def __init__(self, mm: Mm, hva: int, pages: int = PAGES) -> None:
        self.mm = mm
        self.hva = hva
        self.pages = range(pages)
        self.data = {page: self._now(page) for page in self.pages}

    def _now(self, page: int) -> bytes:
        return self.mm.read(self.hva + page * PAGE_SIZE, 8)

    def take(self, dirty: bytes) -> None:
        """Copy the pages that a log names."""
        for page in self.pages:
            if dirty[page >> 3] >> (page & 7) & 1:
                self.data[page] = self._now(page)

    def check(self) -> None:
        """Raises AssertionError when a page was written, and no log said so."""
        for page in self.pages:
            if self.data[page] != self._now(page):
                raise AssertionError(f"page {page} was written after it was copied, and no dirty log says so")


def furnish(
    scene: Scene, *, pages: int = PAGES, rings: int = 0, manual: bool = False
) -> tuple[Mm, int, KvmBase, ScriptedVcpu]:
    """An mm, the hva of pages that a guest has written and that are logged and clean now, its VM, and a vCPU."""
    mm = scene.mm()
    hva = mm.mmap(pages * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=pages, gfn=GFN)
    if rings:
        kvm.enable_dirty_ring(rings)
    if manual:
        kvm.enable_manual_dirty_log_protect(MANUAL_PROTECT_ENABLE)
    vcpu = scene.vcpu(kvm)
    for page in range(pages):
        vcpu.store(GFN + page, OLD)
    kvm.set_memslot(0, GFN, pages, hva, MEM_LOG_DIRTY_PAGES)
    return mm, hva, kvm, vcpu


def writing(vcpu: ScriptedVcpu, gfn: int = GFN) -> Callable[[], None]:
    """What the guest does: it writes both pages, and the first one again."""

    def guest() -> None:
        vcpu.store(gfn, NEW)
        vcpu.store(gfn + 1, NEW)
        vcpu.store(gfn, LATER)

    return guest


@scenario
def the_dirty_log_is_read_of_protected_pages(scene: Scene) -> None:
    """Every page is write-protected: what the guest writes, it may write again without mmu_lock."""
    mm, hva, kvm, vcpu = furnish(scene)
    copy = Copy(mm, hva)

    def round() -> None:
        copy.take(kvm.get_dirty_log(0))

    scene.actor("vcpu0", writing(vcpu))
    scene.actor("migration", round)
    scene.afterwards(round)
    scene.afterwards(copy.check)


@scenario
def protected_pages_are_written_once(scene: Scene) -> None:
    """One write to each of some pages that are write-protected, while the log is read again and again."""
    mm, hva, kvm, vcpu = furnish(scene, pages=_MANY)
    copy = Copy(mm, hva, _MANY)

    def round() -> None:
        copy.take(kvm.get_dirty_log(0))

    def guest() -> None:
        for page in range(_MANY):
            vcpu.store(GFN + page, NEW)

    def migration() -> None:
        for _ in range(_MANY):
            round()

    scene.actor("vcpu0", guest)
    scene.actor("migration", migration)
    scene.afterwards(round)
    scene.afterwards(copy.check)


@scenario
def the_dirty_log_is_cleared_by_hand(scene: Scene) -> None:
    """The log is read, cleared as it was read, and copied then."""
    mm, hva, kvm, vcpu = furnish(scene, manual=True)
    copy = Copy(mm, hva)

    def round() -> None:
        dirty = kvm.get_dirty_log(0)
        kvm.clear_dirty_log(0, 0, PAGES, dirty)
        copy.take(dirty)

    scene.actor("vcpu0", writing(vcpu))
    scene.actor("migration", round)
    scene.afterwards(round)
    scene.afterwards(copy.check)


@scenario
def the_dirty_rings_are_reset(scene: Scene) -> None:
    """What the rings of two vCPUs have is harvested, reset, and copied then."""
    mm, hva, kvm, first = furnish(scene, rings=128)
    second = scene.vcpu(kvm)
    copy = Copy(mm, hva)

    def round() -> None:
        dirty = bytearray(1)
        for vcpu in kvm.vcpus:
            for _, page in kvm.dirty_ring(vcpu).harvest():
                dirty[0] |= 1 << page
        point("migration.harvested")
        kvm.reset_dirty_rings()
        copy.take(bytes(dirty))

    scene.actor("vcpu0", writing(first))
    scene.actor("vcpu1", second.store, GFN, b"second's")
    scene.actor("migration", round)
    scene.afterwards(round)
    scene.afterwards(copy.check)


@scenario
def logging_begins_while_the_guest_writes(scene: Scene) -> None:
    """Dirty logging is turned on, then everything is copied once; what comes behind that is in the log."""
    mm = scene.mm()
    hva = mm.mmap(_MANY * PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, pages=_MANY, gfn=GFN)
    vcpu = scene.vcpu(kvm)
    copies: list[Copy] = []

    def begin() -> None:
        kvm.set_memslot(0, GFN, _MANY, hva, MEM_LOG_DIRTY_PAGES)
        copies.append(Copy(mm, hva, _MANY))

    def finish() -> None:
        copies[0].take(kvm.get_dirty_log(0))
        copies[0].check()

    def guest() -> None:
        for page in range(_MANY):
            vcpu.store(GFN + page, NEW)

    scene.actor("vcpu0", guest)
    scene.actor("migration", begin)
    scene.afterwards(finish)


@scenario(protocols=("modern",), host_memory=HOST)
def a_huge_page_is_logged(scene: Scene) -> None:
    """Dirty logging is turned on over a huge entry: its pages are logged one by one."""
    mm, vcpu = transparent(scene)
    vcpu.store(HUGE_GFN, OLD)
    kvm = vcpu.mmu
    assert isinstance(kvm, KvmBase)
    kvm.set_memslot(0, HUGE_GFN, HUGE_PAGES, BASE, MEM_LOG_DIRTY_PAGES)
    copy = Copy(mm, BASE)

    def round() -> None:
        copy.take(kvm.get_dirty_log(0))

    scene.actor("vcpu0", writing(vcpu, HUGE_GFN))
    scene.actor("migration", round)
    scene.afterwards(round)
    scene.afterwards(copy.check)


@scenario(protocols=("modern",))
def a_logged_page_gets_old(scene: Scene) -> None:
    """Reclaim asks who uses the pages, which takes rights, while the guest reads and writes and the log is read."""
    mm, hva, kvm, vcpu = furnish(scene)
    vcpu.store(GFN, NEW)
    copy = Copy(mm, hva)
    notifiers = mm.notifiers
    assert isinstance(notifiers, MmuNotifiers)

    def guest() -> None:
        vcpu.load(GFN)
        vcpu.store(GFN, LATER)

    def migration() -> None:
        notifiers.clear_young(hva, hva + PAGES * PAGE_SIZE)
        copy.take(kvm.get_dirty_log(0))

    scene.actor("vcpu0", guest)
    scene.actor("migration", migration)
    scene.afterwards(lambda: copy.take(kvm.get_dirty_log(0)))
    scene.afterwards(copy.check)
