"""mremap: sizes, places, what is announced, and what becomes of the pages."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, TASK_SIZE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
MOVE = MREMAP_MAYMOVE | MREMAP_FIXED
Steps = Callable[[], list[str]]


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """16 pages of private anonymous memory, all written: page n begins with the byte n."""
    start = mm.mmap(16 * PAGE, RW)
    for page in range(16):
        mm.write(start + page * PAGE, bytes([page]) * 8)
    steps()
    return start


@pytest.fixture
def far(area: int) -> int:
    """A free place above ``area``."""
    return area + 1024 * PAGE


def extents(mm: Mm, base: int) -> list[tuple[int, int]]:
    return [((area.start - base) // PAGE, (area.end - base) // PAGE) for area in mm.vmas]


def test_shrinking_unmaps_the_tail(mm: Mm, area: int, steps: Steps) -> None:
    assert mm.mremap(area, 16 * PAGE, 8 * PAGE - 100) == area
    assert steps() == ["S UNMAP 8-16", "clear 8", "E", "tlb", "free 8"]
    assert extents(mm, area) == [(0, 8)]


def test_growing_in_place_tells_nobody(mm: Mm, area: int, steps: Steps) -> None:
    assert mm.mremap(area, 16 * PAGE, 24 * PAGE) == area
    assert steps() == []
    assert extents(mm, area) == [(0, 24)]
    assert mm.read(area + 20 * PAGE, 1) == b"\0"


def test_growing_up_to_a_neighbour_of_its_kind_makes_one_area(mm: Mm, area: int) -> None:
    mm.munmap(area + 8 * PAGE, 4 * PAGE)
    mm.mremap(area, 8 * PAGE, 12 * PAGE)
    assert extents(mm, area) == [(0, 16)]
    verify(mm.host)


def test_growing_where_something_is_in_the_way(mm: Mm, area: int) -> None:
    mm.mprotect(area + 8 * PAGE, PAGE, R)
    for length, flags in ((8, 0), (4, 0)):
        with pytest.raises(MmError) as raised:
            mm.mremap(area, length * PAGE, 9 * PAGE, flags)
        assert raised.value.errno == errno.ENOMEM
    new = mm.mremap(area, 8 * PAGE, 9 * PAGE, MREMAP_MAYMOVE)
    assert new != area
    assert [mm.read(new + page * PAGE, 1)[0] for page in range(9)] == [*range(8), 0]
    verify(mm.host)


def test_a_move_announces_the_source_twice_and_flushes_inside(mm: Mm, area: int, far: int, steps: Steps) -> None:
    assert mm.mremap(area + 4 * PAGE, 4 * PAGE, 4 * PAGE, MOVE, far) == far
    assert steps() == ["S UNMAP 4-8", "move", "tlb", "E", "S UNMAP 4-8", "E"]
    assert [mm.read(far + page * PAGE, 1)[0] for page in range(4)] == [4, 5, 6, 7]
    assert extents(mm, area) == [(0, 4), (8, 16), (1024, 1028)]
    with pytest.raises(MmError):
        mm.read(area + 4 * PAGE, 1)
    verify(mm.host)


def test_a_move_keeps_frames_and_rights(mm: Mm, area: int, far: int, events: list[Event]) -> None:
    before = mm.pgd.entries(area >> 12, (area >> 12) + 16)
    mm.mremap(area, 16 * PAGE, 16 * PAGE, MOVE, far)
    assert [entry for _, entry in mm.pgd.entries(far >> 12, (far >> 12) + 16)] == [entry for _, entry in before]
    moves = [event.fields for event in events if event.kind == "pte_move"]
    end = area + 16 * PAGE
    assert moves == [{"mm": "mm0", "start": area, "end": end, "to": far, "length": 16, "pages": [(1, 16)]}]


def test_a_move_of_nothing_populated_is_announced_and_not_flushed(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, RW)
    mm.mremap(start, 4 * PAGE, 4 * PAGE, MOVE, start + 64 * PAGE)
    assert [word.split()[0] for word in steps()] == ["S", "E", "S", "E"]


def test_the_destination_goes_first(mm: Mm, area: int, steps: Steps) -> None:
    mm.mremap(area + 12 * PAGE, 4 * PAGE, 4 * PAGE, MOVE, area + 4 * PAGE)
    assert steps() == [
        *("S UNMAP 4-8", "clear 4", "E", "tlb", "free 4"),
        *("S UNMAP 12-16", "move", "tlb", "E", "S UNMAP 12-16", "E"),
    ]
    assert [mm.read(area + page * PAGE, 1)[0] for page in range(12)] == [0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11]
    verify(mm.host)


def test_a_move_that_shrinks_cuts_off_first(mm: Mm, area: int, far: int, steps: Steps) -> None:
    mm.mmap(PAGE, RW, addr=area - 1024 * PAGE)  # pages are counted from here
    mm.mremap(area, 16 * PAGE, 4 * PAGE, MOVE, far)
    assert steps() == [
        *("S UNMAP 1028-1040", "clear 12", "E", "tlb", "free 12"),
        *("S UNMAP 1024-1028", "move", "tlb", "E", "S UNMAP 1024-1028", "E"),
    ]
    assert extents(mm, far) == [(-2048, -2047), (0, 4)]


def test_dontunmap_keeps_an_empty_area(mm: Mm, area: int, far: int, steps: Steps) -> None:
    mm.mremap(area, 16 * PAGE, 16 * PAGE, MOVE | MREMAP_DONTUNMAP, far)
    assert steps() == ["S UNMAP 0-16", "move", "tlb", "E"]
    assert mm.pgd.entries(area >> 12, (area >> 12) + 16) == []
    assert mm.vmas[0].anon_vma is None
    mm.write(area + PAGE, b"new")
    assert (mm.read(far + PAGE, 1), mm.read(area + 2 * PAGE, 1)) == (b"\1", b"\0")
    verify(mm.host)


def test_dontunmap_of_a_part(mm: Mm, area: int, far: int) -> None:
    mm.mremap(area + 4 * PAGE, 4 * PAGE, 4 * PAGE, MOVE | MREMAP_DONTUNMAP, far)
    mm.write(area + 4 * PAGE, b"new")
    assert [mm.read(far, 1), mm.read(area + 3 * PAGE, 1), mm.read(area + 8 * PAGE, 1)] == [b"\4", b"\3", b"\x08"]
    assert extents(mm, area) == [(0, 16), (1024, 1028)]
    verify(mm.host)


def test_dontunmap_finds_a_place_by_itself(mm: Mm, area: int, far: int) -> None:
    assert mm.mremap(area, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, far) == far
    assert mm.mremap(area + PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP) not in (area, far)
    verify(mm.host)


def test_after_the_way_there_and_back_it_is_one_area(mm: Mm, area: int, far: int) -> None:
    mm.mremap(area + 4 * PAGE, 4 * PAGE, 4 * PAGE, MOVE, far)
    mm.mremap(far, 4 * PAGE, 4 * PAGE, MOVE, area + 4 * PAGE)
    assert extents(mm, area) == [(0, 16)]


def test_moved_pages_are_shared_with_a_child_and_copied(mm: Mm, area: int, far: int, host: HostMemory) -> None:
    child = mm.fork()
    mm.mremap(area, 16 * PAGE, 16 * PAGE, MOVE, far)
    verify(host)
    mm.write(far, b"parent's")
    assert child.read(area, 8) == bytes(8)
    child.mremap(area, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
    verify(host)
    child.exit()
    mm.madvise(far, 16 * PAGE, MADV_DONTNEED)
    assert host.free_frames == host.nr_frames - 1


def test_file_mappings_move_too(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", 16 * PAGE)
    start = mm.mmap(8 * PAGE, RW, MAP_PRIVATE, file=file, pgoff=2)
    mm.read(start, 1)
    mm.write(start + PAGE, b"mine")
    new = mm.mremap(start, 8 * PAGE, 8 * PAGE, MOVE, start + 64 * PAGE)
    assert mm.read(new + PAGE, 4) == b"mine"
    verify(host)
    file.punch_hole(2, 8)
    assert [page - (new >> 12) for page, _ in mm.pgd.entries(0, 1 << 36)] == [1]


def test_shared_memory_is_mapped_twice_by_a_length_of_nothing(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", 16 * PAGE)
    start = mm.mmap(8 * PAGE, RW, MAP_SHARED, file=file)
    second = mm.mremap(start + PAGE, 0, 2 * PAGE, MREMAP_MAYMOVE)
    mm.write(start + PAGE, b"seen")
    assert mm.read(second, 4) == b"seen"
    verify(host)


def test_a_thread_that_has_seen_the_old_place_faults_there(mm: Mm, area: int, far: int) -> None:
    thread = HostThread(mm)
    thread.load(area, 1)
    mm.mremap(area, PAGE, PAGE, MOVE, far)
    assert thread.tlb == {}
    thread.store(far, b"new")
    with pytest.raises(MmError):
        thread.load(area, 1)


@pytest.mark.parametrize(
    ("at", "old", "new", "flags", "to", "error"),
    [
        (0, 16, 8, 8, None, errno.EINVAL),
        (0, 16, 8, MREMAP_FIXED, 1024, errno.EINVAL),
        (0, 16, 16, MREMAP_DONTUNMAP, None, errno.EINVAL),
        (0, 16, 8, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, None, errno.EINVAL),
        (0.5, 8, 8, 0, None, errno.EINVAL),
        (0, 16, 0, 0, None, errno.EINVAL),
        (0, 0, 4, MREMAP_MAYMOVE, None, errno.EINVAL),
        (0, 16, 16, MOVE, None, errno.EINVAL),
        (0, 16, 16, MOVE, 1024.5, errno.EINVAL),
        (0, 16, 16, MOVE, 8, errno.EINVAL),
        (0, 16, 16, MOVE, -8, errno.EINVAL),
        (0, 16, 16, MOVE, TASK_SIZE // PAGE, errno.EINVAL),
        (20, 1, 1, 0, None, errno.EFAULT),
        (8, 16, 24, MREMAP_MAYMOVE, None, errno.EFAULT),
        (8, 16, 16, MOVE, 1024, errno.EFAULT),
        (0, 8, 12, 0, None, errno.ENOMEM),
        (0, 16, TASK_SIZE // PAGE, MREMAP_MAYMOVE, None, errno.ENOMEM),
    ],
)
def test_errors_change_nothing(
    mm: Mm, area: int, steps: Steps, at: float, old: int, new: int, flags: int, to: float | None, error: int
) -> None:
    before = mm.pgd.entries(0, 1 << 36), extents(mm, area)
    with pytest.raises(MmError) as raised:
        mm.mremap(area + int(at * PAGE), old * PAGE, new * PAGE, flags, None if to is None else area + int(to * PAGE))
    assert raised.value.errno == error
    assert (mm.pgd.entries(0, 1 << 36), extents(mm, area)) == before
    assert steps() == []
    mm.exit()
    with pytest.raises(MmError) as raised:
        mm.mremap(area, PAGE, PAGE)
    assert raised.value.errno == errno.ESRCH
