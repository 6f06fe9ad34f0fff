"""The order of notification, change, flush and free in every operation, as Linux has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DOFORK, MADV_DONTFORK, MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

R, RW, RX, RWX, NONE = 1, 3, 5, 7, 0
PAGE = 4096
Steps = Callable[[], list[str]]


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """16 pages of private anonymous memory, all written."""
    start = mm.mmap(16 * PAGE, RW)
    for page in range(16):
        mm.write(start + page * PAGE, bytes([page]) * 8)
    steps()
    return start


def test_munmap(mm: Mm, area: int, steps: Steps) -> None:
    mm.munmap(area + 4 * PAGE, 4 * PAGE)
    assert steps() == ["S UNMAP 4-8", "clear 4", "E", "tlb", "free 4"]


def test_munmap_of_two_areas_is_one_range(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    mm.munmap(area + 4 * PAGE, 8 * PAGE)
    assert steps() == ["S UNMAP 4-12", "clear 4", "clear 4", "E", "tlb", "free 8"]


def test_munmap_announces_what_was_asked_for(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, RW)
    mm.mmap(4 * PAGE, RW, addr=start + 16 * PAGE)
    steps()
    mm.munmap(start + 2 * PAGE, 30 * PAGE)
    assert steps() == ["S UNMAP 2-32", "E"]
    mm.munmap(start + 2 * PAGE, 30 * PAGE)
    assert steps() == []


def test_mmap_over(mm: Mm, area: int, steps: Steps) -> None:
    mm.mmap(4 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=area + 4 * PAGE)
    assert steps() == ["S UNMAP 4-8", "clear 4", "E", "tlb", "free 4"]
    mm.munmap(area + 8 * PAGE, PAGE)
    steps()
    mm.mmap(PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=area + 8 * PAGE)
    assert steps() == []


def test_dontneed(mm: Mm, area: int, steps: Steps) -> None:
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_DONTNEED)
    assert steps() == ["S CLEAR 4-8", "clear 4", "E", "tlb", "free 4"]
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_DONTNEED)
    assert steps() == ["S CLEAR 4-8", "E"]


def test_dontneed_of_two_areas_is_two_ranges_and_one_flush(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    mm.madvise(area + 4 * PAGE, 8 * PAGE, MADV_DONTNEED)
    assert steps() == ["S CLEAR 4-8", "clear 4", "E", "S CLEAR 8-12", "clear 4", "E", "tlb", "free 8"]


@pytest.mark.parametrize("prot", [R, NONE, RX, RWX])
def test_mprotect(mm: Mm, area: int, steps: Steps, prot: int) -> None:
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, prot)
    assert steps() == ["S PROTECTION_VMA 4-8", "protect", "E", "tlb"]
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, prot)
    assert steps() == []


def test_mprotect_from_none_needs_no_flush(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area, 16 * PAGE, NONE)
    steps()
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, RW)
    assert steps() == ["S PROTECTION_VMA 4-8", "protect", "E"]


def test_mprotect_of_nothing_populated(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    mm.mprotect(start + 4 * PAGE, 4 * PAGE, R)
    assert steps() == []


def test_mprotect_of_one_populated_page_announces_all(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    mm.write(start + 6 * PAGE, b"x")
    steps()
    mm.mprotect(start + 4 * PAGE, 8 * PAGE, R)
    assert steps() == ["S PROTECTION_VMA 4-12", "protect", "E", "tlb"]


def test_mprotect_of_several_areas_flushes_once(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, R)
    steps()
    mm.mprotect(area, 16 * PAGE, NONE)
    ranges = ["S PROTECTION_VMA 0-4", "S PROTECTION_VMA 4-8", "S PROTECTION_VMA 8-16"]
    assert steps() == [word for range in ranges for word in (range, "protect", "E")] + ["tlb"]


def test_mprotect_begins_at_the_first_gigabyte_with_pages(mm: Mm, steps: Steps) -> None:
    gib = 1 << 30
    start = mm.mmap(3 * gib, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=16 * gib + gib // 2)
    mm.write(start + 2 * gib, b"x")
    steps()
    mm.mprotect(start, 3 * gib, R)
    assert steps() == [f"S PROTECTION_VMA {(gib + gib // 2) // PAGE}-{3 * gib // PAGE}", "protect", "E", "tlb"]


def test_copy_on_write(mm: Mm, area: int, steps: Steps) -> None:
    child = mm.fork()
    steps()
    mm.write(area + 4 * PAGE, b"new")
    assert steps() == ["alloc", "S CLEAR 4-5", "clear 1", "tlb", "set", "E"]
    child.exit()


def test_the_last_sharer_frees_the_old_page_behind_the_end(
    mm: Mm, host: HostMemory, trace: Trace, steps: Steps
) -> None:
    file = ShmemFile(host, trace, "file", 16 * PAGE)
    start = mm.mmap(16 * PAGE, RW, MAP_PRIVATE, file=file)
    mm.read(start + 4 * PAGE, 1)
    pfn = file.pages.pop(4)  # as after a truncation that raced: only the entry holds the page
    host.put(pfn)
    steps()
    mm.write(start + 4 * PAGE, b"new")
    assert steps() == ["alloc", "S CLEAR 4-5", "clear 1", "tlb", "set", "E", "free 1"]


def test_zero_page_is_copied_like_any_other(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(PAGE, RW)
    mm.read(start, 1)
    assert steps() == ["set"]
    mm.write(start, b"x")
    assert steps() == ["alloc", "S CLEAR 0-1", "clear 1", "tlb", "set", "E"]


def test_reuse_tells_nobody(mm: Mm, area: int, steps: Steps) -> None:
    child = mm.fork()
    child.write(area + 4 * PAGE, b"child's")
    steps()
    mm.write(area + 4 * PAGE, b"mine")
    assert steps() == ["set"]
    child.exit()
    steps()
    mm.write(area + 5 * PAGE, b"mine")
    assert steps() == ["set"]


def test_first_touch_tells_nobody(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"x")
    assert steps() == ["alloc", "set"]


def test_fork(mm: Mm, area: int, steps: Steps) -> None:
    child = mm.fork()
    assert steps() == ["S PROTECTION_PAGE 0-16", "protect", "copy", "E", "tlb"]
    child.write(area, b"child's")
    assert not [word for word in steps() if word.startswith("S")]


def test_fork_announces_each_private_area_that_has_pages(mm: Mm, area: int, steps: Steps) -> None:
    mm.mmap(4 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, addr=area + 100 * PAGE)
    mm.mmap(4 * PAGE, RW, addr=area + 200 * PAGE)
    mm.write(area + 100 * PAGE, b"shared")
    mm.read(area + 200 * PAGE, 1)
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    mm.fork()
    ranges = ["S PROTECTION_PAGE 0-8", "S PROTECTION_PAGE 8-16"]
    assert steps() == [word for range in ranges for word in (range, "protect", "copy", "E")] + ["tlb"]


def test_dontfork(mm: Mm, area: int, steps: Steps) -> None:
    mm.madvise(area, 16 * PAGE, MADV_DONTFORK)
    child = mm.fork()
    assert steps() == ["tlb"]
    assert child.vmas == []
    mm.madvise(area, 8 * PAGE, MADV_DOFORK)
    assert len(mm.fork().vmas) == 1
    assert "S PROTECTION_PAGE 0-8" in steps()


def test_exit_releases_first_and_announces_nothing(mm: Mm, area: int, events: list[Event]) -> None:
    mm.exit()
    kinds = [event.kind for event in events]
    assert kinds == [
        "mm_exit",
        "mmu_notifier_release",
        "vma_unmap",
        "pte_clear",
        "primary_tlb_flush",
        "page_free",
    ]
    events.clear()
    mm.exit()
    assert events == []


def test_events_name_their_cause(mm: Mm, area: int, events: list[Event]) -> None:
    events.clear()
    mm.madvise(area, PAGE, MADV_DONTNEED)
    first = events[0]
    assert (first.kind, first.cause) == ("mm_madvise", 0)
    assert first.fields == {"mm": "mm0", "start": area, "end": area + PAGE, "advice": "DONTNEED"}
    assert {event.cause for event in events[1:]} == {first.seq}


def test_a_run_without_a_listener_is_the_same() -> None:
    def run(listen: bool) -> list[tuple[int, int]]:
        trace = Trace()
        if listen:
            trace.attach(lambda event: None)
        mm = Mm(HostMemory(256 * PAGE), trace)
        start = mm.mmap(16 * PAGE, RW)
        for page in range(0, 16, 3):
            mm.write(start + page * PAGE, b"x")
        mm.read(start + PAGE, 1)
        mm.fork().exit()
        mm.write(start, b"y")
        mm.mprotect(start + 4 * PAGE, 4 * PAGE, R)
        mm.madvise(start + 8 * PAGE, PAGE * 3, MADV_DONTNEED)
        mm.write(start + 9 * PAGE, b"z")
        return mm.pgd.entries(0, 1 << 36)

    assert run(False) == run(True)
