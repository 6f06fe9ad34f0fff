"""Swap: what is announced on the way out, silence on the way in, what is written, shared pages, swapoff, ageing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import PG_DIRTY, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_COLD, MADV_DONTNEED, MADV_FREE, MADV_GUARD_INSTALL, MADV_PAGEOUT
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import EXCLUSIVE, MAPPED, SWAP, WRITE, pte_pfn
from xipvm.mmu.swap import Swap
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
Steps = Callable[[], list[str]]


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """4 pages of private anonymous memory, all written: page n begins with the byte n. There is swap."""
    mm.swapon(64)
    start = mm.mmap(4 * PAGE, RW)
    for page in range(4):
        mm.write(start + page * PAGE, bytes([page]) * 8)
    steps()
    return start


def entry(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva >> 12)


def swap_of(mm: Mm) -> Swap:
    assert mm.rmap.swap is not None
    return mm.rmap.swap


def content(mm: Mm, hva: int, count: int = 4) -> list[int]:
    return [mm.read(hva + page * PAGE, 1)[0] for page in range(count)]


def test_the_way_out_and_back(mm: Mm, host: HostMemory, area: int, steps: Steps, events: list[Event]) -> None:
    free = host.free_frames
    mm.madvise(area + PAGE, 2 * PAGE, MADV_PAGEOUT)
    kinds = [event.kind for event in events]
    assert kinds.count("swap_out") == 2
    assert kinds.index("primary_tlb_flush") < kinds.index("swap_out") < kinds.index("page_free")
    each = ["clear 1", "tlb", "nonpresent", "E", "free 1"]
    assert steps() == ["S CLEAR 1-2", *each, "S CLEAR 2-3", *each]
    assert host.free_frames == free + 2
    assert entry(mm, area + PAGE) & SWAP
    verify(host)
    assert content(mm, area) == [0, 1, 2, 3]
    assert steps() == ["alloc", "set"] * 2
    assert entry(mm, area + PAGE) & WRITE
    verify(host)


def test_without_swap_nothing_happens(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    steps()
    mm.madvise(start, PAGE, MADV_PAGEOUT)
    assert steps() == []


def test_a_full_swap(mm: Mm, host: HostMemory, tmp_path: Path) -> None:
    mm.swapon(2, str(tmp_path / "swap"))
    start = mm.mmap(4 * PAGE, RW)
    for page in range(4):
        mm.write(start + page * PAGE, bytes([page]))
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    assert [bool(entry(mm, start + page * PAGE) & SWAP) for page in range(4)] == [True, True, False, False]
    assert (tmp_path / "swap").read_bytes()[PAGE] == 1
    mm.swapon(2)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    assert all(entry(mm, start + page * PAGE) & SWAP for page in range(4))
    assert content(mm, start) == [0, 1, 2, 3]
    mm.munmap(start, 4 * PAGE)
    assert not swap_of(mm).counts
    verify(host)


def test_a_write_gives_the_slot_up_a_read_does_not(mm: Mm, area: int, events: list[Event]) -> None:
    mm.madvise(area, 2 * PAGE, MADV_PAGEOUT)
    mm.read(area, 1)
    mm.write(area + PAGE, b"\x07")
    assert len(swap_of(mm).counts) == 1
    events.clear()
    mm.madvise(area, 2 * PAGE, MADV_PAGEOUT)
    assert [event.kind for event in events].count("swap_out") == 1  # the clean page has its content there
    assert content(mm, area) == [0, 7, 2, 3]


@pytest.mark.parametrize("how", ["thread", "kernel", "secondary"])
def test_a_page_written_after_it_was_read_is_written_again(mm: Mm, host: HostMemory, area: int, how: str) -> None:
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    mm.read(area, 1)
    assert swap_of(mm).cache
    if how == "thread":
        HostThread(mm).store(area, b"new")
    elif how == "kernel":
        mm.write(area, b"new")
    else:  # as kvm does when it makes an entry writable
        page = mm.get_user_pages(area, write=False)
        assert page.writable
        host.set_flags(page.pfn, PG_DIRTY)
        host.write(page.pfn, 0, b"new")
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    assert entry(mm, area) & SWAP
    assert mm.read(area, 3) == b"new"


def test_fork_shares_slots(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, 2 * PAGE, MADV_PAGEOUT)
    child = mm.fork()
    verify(host)
    assert mm.read(area, 1) == b"\0"
    verify(host)
    child.write(area, b"c")
    verify(host)
    assert (content(mm, area), content(child, area)) == ([0, 1, 2, 3], [ord("c"), 1, 2, 3])
    assert pte_pfn(entry(mm, area + PAGE)) == pte_pfn(entry(child, area + PAGE))
    verify(host)
    child.exit()
    verify(host)
    mm.write(area + PAGE, b"m")
    assert content(mm, area) == [0, ord("m"), 2, 3]
    verify(host)


def test_a_page_of_several_processes(mm: Mm, host: HostMemory, area: int) -> None:
    child = mm.fork()
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    assert entry(mm, area) & MAPPED  # not ours alone
    assert mm.memcg_reclaim(3) == 4
    verify(host)
    child.write(area, b"c")
    mm.exit()
    verify(host)
    assert content(child, area) == [ord("c"), 1, 2, 3]
    verify(host)


@pytest.mark.parametrize(
    "change",
    [
        lambda mm, area: mm.munmap(area, 2 * PAGE),
        lambda mm, area: mm.madvise(area, 2 * PAGE, MADV_DONTNEED),
        lambda mm, area: mm.madvise(area, 2 * PAGE, MADV_GUARD_INSTALL),
        lambda mm, area: mm.exit(),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_slots_go_with_their_entries(
    mm: Mm, host: HostMemory, area: int, change: Callable[[Mm, int], None], cached: bool
) -> None:
    mm.madvise(area, 2 * PAGE, MADV_PAGEOUT)
    if cached:
        mm.read(area, 1)
    change(mm, area)
    assert not swap_of(mm).counts
    verify(host)


def test_mremap_and_mprotect_take_swapped_pages_along(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    far = area + 512 * PAGE
    mm.mremap(area, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, far)
    mm.mprotect(far, PAGE, R)
    assert content(mm, far, 2) == [0, 1]
    assert not entry(mm, far) & WRITE
    assert content(mm, area + 2 * PAGE, 2) == [2, 3]
    verify(host)


def test_swapoff_maps_read_only_and_tells_nobody(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    mm.read(area, 1)
    child = mm.fork()
    steps()
    mm.swapoff()
    assert not {"S", "E"} & {step.split()[0] for step in steps()}
    assert not swap_of(mm).counts
    assert not entry(mm, area + PAGE) & WRITE
    verify(host)
    assert content(mm, area) == content(child, area) == [0, 1, 2, 3]
    child.exit()
    mm.write(area + PAGE, b"x")
    with pytest.raises(MmError) as error:
        mm.swapoff()
    assert error.value.errno == errno.EINVAL


def test_after_swapoff_the_first_write_needs_no_copy(mm: Mm, area: int, steps: Steps) -> None:
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    mm.swapoff()
    assert entry(mm, area) & EXCLUSIVE
    steps()
    mm.write(area, b"x")
    assert steps() == ["set"]


def test_swapoff_without_frames(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    taken = [host.alloc() for _ in range(host.free_frames - 1)]
    with pytest.raises(MmError) as error:
        mm.swapoff()
    assert error.value.errno == errno.ENOMEM
    for pfn in taken:
        host.put(pfn)
    verify(host)
    assert content(mm, area) == [0, 1, 2, 3]


def test_a_fault_without_frames_changes_nothing(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    taken = [host.alloc() for _ in range(host.free_frames)]
    with pytest.raises(MmError) as error:
        mm.read(area, 1)
    assert error.value.errno == errno.ENOMEM
    for pfn in taken:
        host.put(pfn)
    assert mm.read(area, 1) == b"\0"


class Young(MmuNotifier):
    """Used everything once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def clear_flush_young(self, start: int, end: int) -> bool:
        self.asked.append(start)
        return self.asked.count(start) == 1


def test_reclaim_asks_before_it_unmaps(mm: Mm, area: int, steps: Steps) -> None:
    mm.notifiers.register(young := Young())
    mm.madvise(area, 4 * PAGE, MADV_COLD)
    steps()
    assert mm.memcg_reclaim(1) == 0
    assert young.asked == [area + page * PAGE for page in range(4)]
    assert steps() == []
    assert mm.memcg_reclaim(6) == 4
    assert len(young.asked) == 8
    assert content(mm, area) == [0, 1, 2, 3]


def test_the_hosts_own_accesses_count(mm: Mm, area: int) -> None:
    mm.madvise(area, 4 * PAGE, MADV_COLD)
    mm.read(area + PAGE, 1)
    assert mm.memcg_reclaim(1) == 3
    assert entry(mm, area + PAGE) & MAPPED


def test_a_group_of_its_own(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    other = Mm(host, trace, name="other")
    start = other.mmap(PAGE, RW)
    other.write(start, b"o")
    other.memcg_enter()
    child = other.fork()
    assert child.memcg is other
    assert other.memcg_reclaim(3) == 1
    assert entry(mm, area) & MAPPED
    assert other.read(start, 1) == child.read(start, 1) == b"o"


def test_locked_pages_stay(mm: Mm, area: int) -> None:
    mm.mlock(area, PAGE)
    assert mm.memcg_reclaim(4) == 3
    assert entry(mm, area) & MAPPED


def test_a_held_page_stays_in_memory(mm: Mm, host: HostMemory, area: int) -> None:
    pfn = pte_pfn(entry(mm, area))
    host.get(pfn)
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    verify(host, held={pfn: 1})
    host.write(pfn, 0, b"held")
    assert mm.read(area, 4) == b"held"
    assert pte_pfn(entry(mm, area)) == pfn
    host.put(pfn)


def test_a_fault_between_unmapping_and_writing(mm: Mm, host: HostMemory, area: int) -> None:
    pfn = pte_pfn(entry(mm, area))

    def hook(label: str) -> None:
        if label == "mm.swap.unmapped":
            mm.write(area, b"late")

    with on_point(hook):
        mm.madvise(area, PAGE, MADV_PAGEOUT)
    assert pte_pfn(entry(mm, area)) == pfn
    assert mm.read(area, 4) == b"late"
    verify(host)


def test_the_area_goes_while_the_page_is_read(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, PAGE, MADV_PAGEOUT)

    def hook(label: str) -> None:
        if label == "mm.swap.read":
            mm.munmap(area, 4 * PAGE)

    with on_point(hook), pytest.raises(MmError) as error:
        mm.read(area, 1)
    assert error.value.errno == errno.EFAULT
    assert not swap_of(mm).counts


def test_what_was_given_away_is_dropped_unless_written(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, 3 * PAGE, MADV_FREE)
    mm.write(area + PAGE, b"again")
    host.set_flags(mm.get_user_pages(area + 2 * PAGE, write=False).pfn, PG_DIRTY)  # a secondary MMU may write
    mm.memcg_reclaim(3)
    verify(host)
    assert mm.read(area, 5) == bytes(5)
    assert mm.read(area + PAGE, 5) == b"again"
    assert content(mm, area) == [0, ord("a"), 2, 3]


@pytest.mark.parametrize("loaded", [False, True])
def test_what_was_given_away_does_not_come_back_older(mm: Mm, host: HostMemory, area: int, loaded: bool) -> None:
    """A page that a read brought back still has its slot, which holds what the page was before it was written again."""
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    if loaded:
        content(mm, area)
        mm.write(area + PAGE, b"newer")
    mm.madvise(area, 4 * PAGE, MADV_FREE)
    verify(host)
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    assert content(mm, area) == [0, 0, 0, 0]
    assert not swap_of(mm).counts


def test_given_away_by_one_of_two(mm: Mm, host: HostMemory, area: int) -> None:
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    child = mm.fork("child")
    child.madvise(area, 2 * PAGE, MADV_FREE)
    verify(host)
    assert content(mm, area) == [0, 1, 2, 3]
    assert content(child, area) == [0, 0, 2, 3]


def test_pages_of_a_memory_file(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    file = ShmemFile(host, trace, "file", 6 * PAGE)
    start = mm.mmap(6 * PAGE, RW, MAP_SHARED, file=file)
    for page in range(6):
        mm.write(start + page * PAGE, bytes([page]) * PAGE)
    free = host.free_frames
    mm.madvise(start, 6 * PAGE, MADV_PAGEOUT)
    assert host.free_frames == free + 6
    assert not file.pages
    verify(host)
    mm.write(start, b"x")
    assert file.pread(PAGE, 1) == b"\1"
    file.punch_hole(2, 1)
    verify(host)
    file.truncate(4 * PAGE + 8)
    file.truncate(6 * PAGE)
    assert content(mm, start, 6) == [ord("x"), 1, 0, 3, 4, 0]
    assert mm.read(start + 4 * PAGE + 7, 2) == b"\4\0"
    verify(host)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    mm.swapoff()
    assert content(mm, start, 4) == [ord("x"), 1, 0, 3]
    mm.exit()
    file.close()
    verify(host)


@pytest.mark.parametrize("why", [errno.EPERM, errno.EFBIG])
def test_a_swapon_that_fails_leaves_its_file_alone(
    mm: Mm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: int
) -> None:
    """There is one area too many, or the file cannot be so large."""

    def too_large(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, "too large")

    if why == errno.EPERM:
        for _ in range(128):
            mm.swapon(1)
    else:
        monkeypatch.setattr("os.ftruncate", too_large)
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_bytes(b"something")
    for path in (kept, new):
        with pytest.raises(MmError) as raised:
            mm.swapon(1, str(path))
        assert raised.value.errno == why
    assert kept.read_bytes() == b"something"
    assert not new.exists()


def test_errors(mm: Mm) -> None:
    def swapon(pages: int, path: str | None, error: int) -> None:
        with pytest.raises(MmError) as raised:
            mm.swapon(pages, path)
        assert raised.value.errno == error

    swapon(0, None, errno.EINVAL)
    swapon(1, "/nowhere/swap", errno.ENOENT)
