"""clear_refs: young bits, and the tracking of writes with soft-dirty bits."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ACCESSED, WRITE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
Steps = Callable[[], list[str]]


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    start = mm.mmap(16 * PAGE, RW)
    mm.write(start, b"x" * 8 * PAGE)
    mm.read(start + 8 * PAGE, 1)
    steps()
    return start


def dirty(mm: Mm, start: int, pages: int = 16) -> list[int]:
    runs = mm.soft_dirty(start, start + pages * PAGE)
    return [(hva - start) // PAGE for lo, hi in runs for hva in range(lo, hi, PAGE)]


def test_young_bits_go_quietly(mm: Mm, host: HostMemory, trace: Trace, area: int, steps: Steps) -> None:
    file = ShmemFile(host, trace, "file", PAGE)
    other = mm.mmap(PAGE, R, MAP_SHARED, file=file, addr=area + 64 * PAGE)
    mm.read(other, 1)
    steps()
    for mode, left in ((3, (True, False)), (2, (False, True)), (1, (False, False))):
        mm.read(area, 1), mm.read(other, 1)
        mm.clear_refs(mode)
        assert tuple(bool(mm.pgd.get(hva >> 12) & ACCESSED) for hva in (area, other)) == left
    assert steps() == []


def test_soft_dirty_is_one_range_over_everything(mm: Mm, area: int, events: list[Event], steps: Steps) -> None:
    mm.clear_refs(4)
    start = next(event for event in events if event.kind == "mmu_notifier_invalidate_range_start")
    assert (start.fields["start"], start.fields["end"]) == (0, (1 << 64) - PAGE)
    assert steps()[1:] == ["protect", "protect", "E", "tlb"]  # written pages, and the zero page
    mm.write(area, b"y")
    assert steps() == ["set"]


def test_what_was_written_since(mm: Mm, area: int) -> None:
    assert dirty(mm, area) == list(range(16))
    mm.clear_refs(4)
    assert dirty(mm, area) == []
    thread = HostThread(mm)
    thread.store(area + 2 * PAGE, b"y")
    mm.write(area + 3 * PAGE, b"y")
    mm.write(area + 8 * PAGE, b"y")  # a copy of the zero page
    mm.write(area + 12 * PAGE, b"y")
    mm.read(area + 13 * PAGE, 1)
    assert dirty(mm, area) == [2, 3, 8, 12]
    mm.clear_refs(4)
    thread.store(area + 2 * PAGE, b"z")
    assert dirty(mm, area) == [2]


def test_mprotect_does_not_give_the_right_back_unseen(mm: Mm, area: int) -> None:
    mm.clear_refs(4)
    mm.write(area, b"y")
    mm.mprotect(area, 16 * PAGE, R)
    mm.mprotect(area, 16 * PAGE, RW)
    assert [bool(mm.pgd.get((area >> 12) + page) & WRITE) for page in range(3)] == [True, False, False]
    mm.write(area + PAGE, b"y")
    assert dirty(mm, area) == [0, 1]


def test_shared_mappings_are_tracked(mm: Mm, host: HostMemory, trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    disk = HostFile(host, trace, str(path), writable=True)
    for file in (ShmemFile(host, trace, "file", 4 * PAGE), disk):
        start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
        mm.read(start, 1)
        mm.clear_refs(4)
        assert dirty(mm, start, 4) == []
        mm.read(start + PAGE, 1)
        assert dirty(mm, start, 4) == []
        mm.write(start + PAGE, b"y")
        mm.write(start + 2 * PAGE, b"y")
        assert dirty(mm, start, 4) == [1, 2]
        verify(host)


def test_a_new_area_counts_as_written_also_when_it_is_merged(mm: Mm, area: int) -> None:
    mm.clear_refs(4)
    mm.mmap(PAGE, RW, addr=area + 16 * PAGE)
    assert len(mm.vmas) == 1
    assert dirty(mm, area, 17) == list(range(17))
    mm.clear_refs(4)
    assert dirty(mm, area, 17) == []


def test_moved_pages_count_as_written(mm: Mm, area: int) -> None:
    mm.clear_refs(4)
    assert dirty(mm, mm.mremap(area, 9 * PAGE, 9 * PAGE, 1 | 4), 9) == list(range(9))


def test_a_forced_write_is_seen(mm: Mm, area: int) -> None:
    mm.mprotect(area, 16 * PAGE, R)
    mm.clear_refs(4)
    assert mm.access_remote_vm(area, b"y") == 1
    assert dirty(mm, area) == [0]


def test_private_file_pages(mm: Mm, host: HostMemory, trace: Trace) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=ShmemFile(host, trace, "file", 4 * PAGE))
    mm.clear_refs(4)
    mm.read(start, 1)
    mm.write(start + PAGE, b"y")
    assert dirty(mm, start, 4) == [1]


def test_other_modes(mm: Mm) -> None:
    for mode in (0, 6, -1):
        with pytest.raises(MmError) as raised:
            mm.clear_refs(mode)
        assert raised.value.errno == errno.EINVAL
