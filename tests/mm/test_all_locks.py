"""mm_take_all_locks: which locks, in which order, each once; a pending signal."""

from __future__ import annotations

import errno

import pytest

from xipvm.errors import InternalError, MmError
from xipvm.mmu.all_locks import AllLocks
from xipvm.mmu.file import AddressSpace
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
HUGE = 2 << 20
RW = PROT_READ | PROT_WRITE


class HugeFile(AddressSpace):
    kind = "hugetlb"
    hugetlb = True


def no_signal() -> bool:
    return False


@pytest.fixture
def mm(host: HostMemory, trace: Trace) -> Mm:
    return Mm(host, trace)


def populate(mm: Mm) -> tuple[AddressSpace, AddressSpace, list[int]]:
    """Two files, each mapped twice, and anonymous memory, mixed by address."""
    file = AddressSpace(mm.host, mm.trace, "file", writable=True)
    huge = HugeFile(mm.host, mm.trace, "huge", writable=True)
    hvas = [2 * HUGE * n for n in range(1, 7)]
    mm.mmap(PAGE, RW, addr=hvas[0])
    mm.mmap(PAGE, RW, MAP_SHARED, addr=hvas[1], file=file)
    mm.mmap(HUGE, RW, MAP_SHARED, addr=hvas[2], file=huge)
    mm.mmap(PAGE, RW, MAP_PRIVATE, addr=hvas[3], file=file, pgoff=4)
    mm.mmap(PAGE, RW, addr=hvas[4])
    mm.mmap(HUGE, RW, MAP_SHARED, addr=hvas[5], file=huge, pgoff=HUGE // PAGE)
    for hva in (hvas[0], hvas[4]):
        mm.write(hva, b"x")
    return file, huge, hvas


def test_order(mm: Mm) -> None:
    file, huge, hvas = populate(mm)
    assert [area.start for area in mm.vmas] == hvas
    anon = [mm.find_vma(hva).anon_vma for hva in (hvas[0], hvas[4])]  # type: ignore[union-attr]
    with mm.take_all_locks(no_signal) as held:
        assert held.taken == (*mm.vmas, huge, file, *anon)
    assert held.taken == ()


def test_an_anon_vma_of_several_areas_is_taken_once(mm: Mm) -> None:
    hva = mm.mmap(3 * PAGE, RW)
    mm.write(hva, b"x")
    mm.mprotect(hva + PAGE, PAGE, PROT_READ)
    assert len(mm.vmas) == 3
    with mm.take_all_locks(no_signal) as held:
        assert held.taken == (*mm.vmas, mm.vmas[0].anon_vma)


def test_those_of_the_parent_are_taken_too(mm: Mm) -> None:
    """A child's pages may be the parent's still: who reclaims them comes through the parent's anon_vma."""
    hva = mm.mmap(PAGE, RW)
    mm.write(hva, b"x")
    child = mm.fork("child")
    with child.take_all_locks(no_signal) as held:
        assert mm.vmas[0].anon_vma in held.taken
        assert child.vmas[0].anon_vma in held.taken
    child.exit()


def test_not_twice(mm: Mm) -> None:
    mm.mmap(PAGE, RW)
    locks = mm.take_all_locks(no_signal)
    with locks, pytest.raises(InternalError, match="held already"):
        locks.__enter__()


@pytest.mark.parametrize("looks", [0, 1, 6, 7, 12, 18, 23])
def test_a_signal_drops_everything(mm: Mm, looks: int) -> None:
    """It is looked for before each of the six areas, in each of the four passes."""
    populate(mm)
    signals = iter([False] * looks + [True])
    locks = AllLocks(mm, lambda: next(signals))
    with pytest.raises(MmError) as caught:
        locks.__enter__()
    assert caught.value.errno == errno.EINTR
    assert locks.taken == ()


def test_without_a_signal_it_is_looked_for_so_often(mm: Mm) -> None:
    populate(mm)
    looks: list[int] = []
    with AllLocks(mm, lambda: bool(looks.append(1))):
        assert len(looks) == 24


class TestJoining:
    @pytest.fixture(autouse=True)
    def _held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was held each time that all locks were dropped."""
        self.held: list[tuple[object, ...]] = []
        drop = AllLocks._drop

        def note(locks: AllLocks) -> None:
            self.held.append(locks.taken)
            drop(locks)

        monkeypatch.setattr(AllLocks, "_drop", note)

    def test_registering_takes_them(self, mm: Mm) -> None:
        populate(mm)
        mm.notifiers.register(MmuNotifier())
        assert len(self.held) == 1
        assert len(self.held[0]) == 6 + 2 + 2

    def test_a_signal_while_registering(self, mm: Mm) -> None:
        populate(mm)
        signals = iter([False] * 13 + [True])
        mm.notifiers.signal_pending = lambda: next(signals)
        late = MmuNotifier()
        with pytest.raises(MmError) as caught:
            mm.notifiers.register(late)
        assert caught.value.errno == errno.EINTR
        assert (list(mm.notifiers), late.subscribed_to, mm.notifiers.has_notifiers) == ([], None, False)
        assert not mm.mmap_lock.writer

    def test_not_under_mmap_lock(self, mm: Mm) -> None:
        with mm.mmap_lock.read, pytest.raises(MmError) as caught:
            mm.notifiers.register(MmuNotifier())
        assert caught.value.errno == errno.EDEADLK
        assert self.held == []


class Iommu(MmuNotifier):
    """A TLB that follows the host's."""

    def __init__(self) -> None:
        self.flushed: list[tuple[int, int]] = []

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        self.flushed.append((start, end))


def test_secondary_tlbs_are_flushed_with_the_hosts(mm: Mm) -> None:
    """Whenever the host's TLB is, hence before the frames are freed, and not when nothing was mapped."""
    iommu = Iommu()
    mm.notifiers.register(iommu)
    hva = mm.mmap(4 * PAGE, RW)
    mm.write(hva, b"x")
    pfn = mm.get_user_pages(hva, write=False).pfn
    seen: list[int] = []
    mm.trace.attach(lambda event: seen.append(len(iommu.flushed)) if event.kind == "page_free" else None)
    mm.munmap(hva, 4 * PAGE)
    assert iommu.flushed == [(hva, hva + 4 * PAGE)]
    assert seen == [1]
    assert mm.host.refcount(pfn) == 0
    hva = mm.mmap(PAGE, RW)
    mm.munmap(hva, PAGE)
    assert len(iommu.flushed) == 1
