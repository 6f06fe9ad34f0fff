"""Transparent huge pages: where they are made, what splits them, what is announced, what is freed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError, ProtocolUnsupported
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.huge_page import deferred_split_scan, split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import (
    MADV_COLD,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MADV_UNMERGEABLE,
)
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.pte import ACCESSED, EXCLUSIVE, SPECIAL, WRITE, pte_pfn
from xipvm.mmu.reclaim import watch_memory
from xipvm.mmu.verify import verify
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
Steps = Callable[[], list[str]]
ABOVE = 0x7FFF_F800_0000
"""Where nothing is mapped, above everything."""
HUGE = f"0-{HUGE_PAGES}"


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(12 * HPAGE_SIZE, poison="frame")
    yield host
    verify(host)


def new_area(mm: Mm, pages: int = 1, prot: int = RW) -> int:
    """``pages`` huge pages' worth of private memory that wants to be huge."""
    start = mm.mmap(pages * HPAGE_SIZE, prot)
    assert start % HPAGE_SIZE == 0
    mm.madvise(start, pages * HPAGE_SIZE, MADV_HUGEPAGE)
    return start


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """Two huge pages: page n begins with n in two bytes."""
    start = new_area(mm, 2)
    fill(mm, start, 2 * HUGE_PAGES)
    steps()
    return start


def fill(mm: Mm, start: int, pages: int) -> None:
    for page in range(pages):
        mm.write(start + page * PAGE, page.to_bytes(2, "little"))


def intact(mm: Mm, start: int, pages: range) -> bool:
    return all(mm.read(start + page * PAGE, 2) == page.to_bytes(2, "little") for page in pages)


def is_huge(mm: Mm, hva: int) -> bool:
    return mm.pgd.huge(hva >> 12) != 0


def ranges(words: list[str]) -> list[str]:
    return [word.removeprefix("S ") for word in words if word.startswith("S ")]


# ---- faults


def test_a_write_gets_a_huge_page_and_tells_nobody(mm: Mm, host: HostMemory, steps: Steps) -> None:
    start = new_area(mm)
    mm.write(start + 5 * PAGE, b"five")
    entry = mm.pgd.huge(start >> 12)
    assert entry & WRITE
    assert entry & EXCLUSIVE
    head = pte_pfn(entry)
    assert head % HUGE_PAGES == 0
    assert (host.refcount(head), host.entire_mapcount(head), host.mapcount(head + 9)) == (1, 1, 1)
    assert mm.read(start + 5 * PAGE, 4) == b"five"
    assert mm.read(start + 6 * PAGE, 4) == bytes(4)
    assert steps() == ["alloc", "set"]


def test_nobody_asked(mm: Mm) -> None:
    start = mm.mmap(HPAGE_SIZE, RW)
    mm.write(start, b"x")
    assert not is_huge(mm, start)


@pytest.mark.parametrize(
    ("enabled", "advice", "huge"),
    [
        ("always", None, True),
        ("always", MADV_NOHUGEPAGE, False),
        ("madvise", MADV_HUGEPAGE, True),
        ("never", MADV_HUGEPAGE, False),
    ],
)
def test_the_setting(mm: Mm, enabled: str, advice: int | None, huge: bool) -> None:
    mm.thp.enabled = enabled
    start = mm.mmap(HPAGE_SIZE, RW)
    if advice is not None:
        mm.madvise(start, HPAGE_SIZE, advice)
    mm.write(start, b"x")
    assert is_huge(mm, start) == huge


def test_a_setting_that_there_is_not(mm: Mm) -> None:
    with pytest.raises(ValueError, match="sometimes"):
        mm.thp.enabled = "sometimes"
    assert mm.thp.enabled == "madvise"


def test_advice_changes_the_mind(mm: Mm) -> None:
    start = new_area(mm, 2)
    mm.write(start, b"x")
    mm.madvise(start, 2 * HPAGE_SIZE, MADV_NOHUGEPAGE)
    assert len(mm.vmas) == 1
    mm.write(start + HPAGE_SIZE, b"x")
    assert is_huge(mm, start)  # what there is stays
    assert not is_huge(mm, start + HPAGE_SIZE)


def test_only_where_all_of_it_fits(mm: Mm) -> None:
    start = new_area(mm, 2)
    mm.munmap(start, PAGE)
    for hva in (start + PAGE, start + HPAGE_SIZE):
        mm.write(hva, b"x")
    assert not is_huge(mm, start + PAGE)
    assert is_huge(mm, start + HPAGE_SIZE)


def test_only_where_nothing_is_mapped(mm: Mm) -> None:
    start = mm.mmap(HPAGE_SIZE, RW)
    mm.write(start, b"x")
    mm.madvise(start, HPAGE_SIZE, MADV_HUGEPAGE)
    mm.write(start + PAGE, b"x")
    assert not is_huge(mm, start)


def test_small_pages_where_there_is_no_block(mm: Mm, host: HostMemory) -> None:
    held = [host.alloc_huge() for _ in range(11)]
    start = new_area(mm)
    mm.write(start, b"small")
    assert not is_huge(mm, start)
    assert mm.read(start, 5) == b"small"
    for head in held:
        host.put(head)


def test_a_read_gets_the_huge_zero_page(mm: Mm, host: HostMemory, steps: Steps) -> None:
    start = new_area(mm, 2)
    assert mm.read(start + 7 * PAGE, 4) == bytes(4)
    entry = mm.pgd.huge(start >> 12)
    assert entry & SPECIAL
    assert not entry & WRITE
    assert mm.read(start + HPAGE_SIZE, 1) == b"\0"
    assert pte_pfn(mm.pgd.huge((start + HPAGE_SIZE) >> 12)) == pte_pfn(entry) == mm.thp.zero_pfn
    assert ranges(steps()) == []


def test_the_huge_zero_page_goes_with_its_last_user(mm: Mm, host: HostMemory) -> None:
    start = new_area(mm)
    before = host.free_frames
    mm.read(start, 1)
    assert host.free_frames == before - HUGE_PAGES
    child = mm.fork()
    child.read(start, 1)
    mm.exit()
    assert child.read(start, 1) == b"\0"
    assert mm.thp.zero_pfn
    child.exit()
    assert not mm.thp.zero_pfn
    assert host.free_frames == host.nr_frames - 1


def test_without_the_huge_zero_page(mm: Mm) -> None:
    mm.thp.use_zero_page = False
    start = new_area(mm)
    assert mm.read(start, 1) == b"\0"
    assert not is_huge(mm, start)


def test_a_write_to_the_huge_zero_page(mm: Mm, steps: Steps) -> None:
    start = new_area(mm)
    mm.read(start, 1)
    steps()
    mm.write(start + 9 * PAGE, b"nine")
    assert is_huge(mm, start)
    assert mm.read(start, 4) + mm.read(start + 9 * PAGE, 4) == b"\0\0\0\0nine"
    assert steps() == ["alloc", f"S CLEAR {HUGE}", f"clear {HUGE_PAGES}", "tlb", "set", "E"]


def test_a_write_to_the_huge_zero_page_without_room(mm: Mm, host: HostMemory, steps: Steps) -> None:
    start = new_area(mm)
    mm.read(start, 1)
    held = [host.alloc_huge() for _ in range(10)]
    steps()
    mm.write(start + 9 * PAGE, b"nine")
    assert not is_huge(mm, start)
    assert mm.read(start, 4) + mm.read(start + 9 * PAGE, 4) == b"\0\0\0\0nine"
    assert ranges(steps()) == [f"CLEAR {HUGE}", "CLEAR 9-10"]
    for head in held:
        host.put(head)


# ---- what splits the entry


@pytest.mark.parametrize(
    ("operation", "announced"),
    [
        (lambda mm, hva: mm.munmap(hva, 4 * PAGE), [f"CLEAR {HUGE}", "UNMAP 4-8"]),
        (lambda mm, hva: mm.madvise(hva, 4 * PAGE, MADV_DONTNEED), ["CLEAR 4-8", f"CLEAR {HUGE}"]),
        (lambda mm, hva: mm.mprotect(hva, 4 * PAGE, R), [f"CLEAR {HUGE}", "PROTECTION_VMA 4-8"]),
        (
            lambda mm, hva: mm.mremap(hva, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, ABOVE),
            ["UNMAP 4-8", f"CLEAR {HUGE}", f"CLEAR {HUGE}", "UNMAP 4-8"],
        ),
        (
            lambda mm, hva: mm.mremap(hva, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, ABOVE),
            ["UNMAP 4-8", f"CLEAR {HUGE}"],
        ),
        (lambda mm, hva: mm.madvise(hva, 4 * PAGE, MADV_GUARD_INSTALL), ["CLEAR 4-8", f"CLEAR {HUGE}"]),
        (lambda mm, hva: mm.madvise(hva, 4 * PAGE, MADV_DONTFORK), [f"CLEAR {HUGE}"]),
        (lambda mm, hva: mm.mlock(hva, 4 * PAGE), [f"CLEAR {HUGE}"]),
    ],
    ids=["munmap", "dontneed", "mprotect", "mremap", "dontunmap", "guard", "dontfork", "mlock"],
)
def test_a_part_splits_the_entry(
    mm: Mm, host: HostMemory, area: int, steps: Steps, operation: Callable[[Mm, int], None], announced: list[str]
) -> None:
    head = pte_pfn(mm.pgd.huge(area >> 12))
    operation(mm, area + 4 * PAGE)
    assert ranges(steps()) == announced
    assert not is_huge(mm, area)
    assert is_huge(mm, area + HPAGE_SIZE)
    assert host.is_compound(head)  # the page stays one
    assert pte_pfn(mm.pgd.get((area >> 12) + 3)) == head + 3
    assert intact(mm, area, range(4))
    assert intact(mm, area, range(8, 2 * HUGE_PAGES))
    verify(host)


def test_the_order_of_a_split(mm: Mm, area: int, steps: Steps) -> None:
    mm.munmap(area + 4 * PAGE, 4 * PAGE)
    assert steps() == [f"S CLEAR {HUGE}", "tlb", "E", "S UNMAP 4-8", "clear 4", "E", "tlb"]


@pytest.mark.parametrize(
    ("operation", "announced"),
    [
        (lambda mm, hva: mm.munmap(hva, HPAGE_SIZE), ["UNMAP"]),
        (lambda mm, hva: mm.madvise(hva, HPAGE_SIZE, MADV_DONTNEED), ["CLEAR"]),
        (lambda mm, hva: mm.mprotect(hva, HPAGE_SIZE, R), ["PROTECTION_VMA"]),
        (lambda mm, hva: mm.madvise(hva, HPAGE_SIZE, MADV_FREE), ["CLEAR"]),
        (lambda mm, hva: mm.madvise(hva, HPAGE_SIZE, MADV_COLD), []),
        (
            lambda mm, hva: mm.mremap(hva, HPAGE_SIZE, HPAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ABOVE),
            ["UNMAP", "UNMAP"],
        ),
        (lambda mm, hva: mm.fork().exit(), ["PROTECTION_PAGE"]),
    ],
    ids=["munmap", "dontneed", "mprotect", "free", "cold", "mremap", "fork"],
)
def test_all_of_it_splits_nothing(
    mm: Mm, host: HostMemory, steps: Steps, operation: Callable[[Mm, int], None], announced: list[str]
) -> None:
    start = new_area(mm, 2) + HPAGE_SIZE
    fill(mm, start, HUGE_PAGES)
    frame = pte_pfn(mm.pgd.huge(start >> 12))
    steps()
    operation(mm, start)
    assert ranges(steps()) == [f"{event} {'0' if event == 'PROTECTION_PAGE' else '512'}-1024" for event in announced]
    assert all(pte_pfn(entry) == frame for _, entry in mm.pgd.entries(0, 1 << 36))
    verify(host)


def test_all_of_it_is_freed_at_once(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    before = host.free_frames
    mm.madvise(area, HPAGE_SIZE, MADV_DONTNEED)
    assert steps() == [f"S CLEAR {HUGE}", f"clear {HUGE_PAGES}", "E", "tlb", f"free {HUGE_PAGES}"]
    assert host.free_frames == before + HUGE_PAGES


def test_an_aligned_move_takes_the_entry_along(mm: Mm, area: int) -> None:
    entry = mm.pgd.huge(area >> 12)
    place = mm.mremap(area, HPAGE_SIZE, HPAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ABOVE)
    assert pte_pfn(mm.pgd.huge(place >> 12)) == pte_pfn(entry)
    assert intact(mm, place, range(HUGE_PAGES))


def test_a_move_to_another_alignment_splits(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    second = area + HPAGE_SIZE
    place = mm.mremap(second, HPAGE_SIZE, HPAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ABOVE + PAGE)
    assert ranges(steps()) == ["UNMAP 512-1024", "CLEAR 512-1024", "UNMAP 512-1024"]
    assert not is_huge(mm, place)
    assert intact(mm, place - HPAGE_SIZE, range(HUGE_PAGES, 2 * HUGE_PAGES))
    verify(host)


def test_a_huge_zero_entry_splits_into_zero_pages(mm: Mm, host: HostMemory) -> None:
    start = new_area(mm)
    mm.read(start, 1)
    mm.madvise(start, PAGE, MADV_DONTNEED)
    entry = mm.pgd.get((start >> 12) + 1)
    assert entry & SPECIAL
    assert pte_pfn(entry) == 0
    mm.write(start + PAGE, b"x")
    verify(host)


def test_threads_forget_what_a_split_maps(mm: Mm, host: HostMemory, area: int) -> None:
    thread = HostThread(mm)
    thread.store(area + 5 * PAGE, b"here")
    assert thread.tlb
    mm.madvise(area + 5 * PAGE, PAGE, MADV_DONTNEED)
    assert thread.load(area + 5 * PAGE, 4) == bytes(4)
    thread.exit()


# ---- a page of which a part is left


def test_the_rest_keeps_all_frames_until_somebody_splits_the_page(mm: Mm, host: HostMemory, area: int) -> None:
    before = host.free_frames
    mm.munmap(area, 100 * PAGE)
    assert host.free_frames == before
    assert deferred_split_scan(host) == 100
    assert host.free_frames == before + 100
    assert not host.is_compound(pte_pfn(mm.pgd.get((area >> 12) + 100)))
    assert intact(mm, area, range(100, 2 * HUGE_PAGES))
    assert deferred_split_scan(host) == 0


def test_the_last_part_frees_it(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.munmap(area, 100 * PAGE)
    steps()
    mm.munmap(area + 100 * PAGE, HPAGE_SIZE - 100 * PAGE)
    assert steps()[-1] == f"free {HUGE_PAGES}"


def test_the_order_of_splitting_a_page(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    head = pte_pfn(mm.pgd.huge(area >> 12))
    assert split_if_compound(host, head)
    words = steps()
    assert words[:3] == [f"S CLEAR {HUGE}", f"clear {HUGE_PAGES}", "tlb"]
    assert words.count("set") == HUGE_PAGES
    assert words.index("E") < words.index("set")
    assert intact(mm, area, range(HUGE_PAGES))
    assert mm.pgd.get(area >> 12) & EXCLUSIVE


def test_a_page_that_somebody_holds_is_not_split(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    head = pte_pfn(mm.pgd.huge(area >> 12))
    host.get(head + 3)
    assert not split_if_compound(host, head)
    assert steps() == []
    assert is_huge(mm, area)
    host.put(head)


def test_a_page_that_somebody_takes_meanwhile_is_not_split(mm: Mm, host: HostMemory, area: int) -> None:
    head = pte_pfn(mm.pgd.huge(area >> 12))

    def hook(label: str) -> None:
        if label == "mm.split.unmapped":
            host.get(head + 3)

    with on_point(hook):
        assert not split_if_compound(host, head)
    assert host.is_compound(head)
    assert intact(mm, area, range(HUGE_PAGES))
    host.put(head)
    verify(host)


# ---- copy on write


def test_fork_shares_the_entry(mm: Mm, host: HostMemory, area: int) -> None:
    child = mm.fork()
    head = pte_pfn(child.pgd.huge(area >> 12))
    assert head == pte_pfn(mm.pgd.huge(area >> 12))
    assert not mm.pgd.huge(area >> 12) & (WRITE | EXCLUSIVE)
    assert (host.refcount(head), host.entire_mapcount(head)) == (2, 2)
    verify(host)


def test_a_write_to_a_shared_page_copies_one_small_page(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    child = mm.fork()
    steps()
    mm.write(area + 5 * PAGE, b"mine")
    assert ranges(steps()) == [f"CLEAR {HUGE}", "CLEAR 5-6"]
    assert child.read(area + 5 * PAGE, 2) == b"\5\0"
    assert is_huge(child, area)
    verify(host)
    child.write(area + 6 * PAGE, b"its")
    assert mm.read(area + 6 * PAGE, 2) == b"\6\0"
    verify(host)


def test_the_only_owner_left_gets_all_of_it_back(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.fork().exit()
    steps()
    mm.write(area + 5 * PAGE, b"mine")
    assert is_huge(mm, area)
    assert mm.pgd.huge(area >> 12) & WRITE
    assert steps() == ["set"]


def test_the_only_owner_left_of_a_split_entry(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    child = mm.fork()
    mm.madvise(area, PAGE, MADV_DONTNEED)
    child.exit()
    steps()
    mm.write(area + 5 * PAGE, b"mine")
    assert ranges(steps()) == []
    verify(host)


def test_somebody_holds_the_page(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.fork().exit()
    head = pte_pfn(mm.pgd.huge(area >> 12))
    host.get(head + 5)
    steps()
    mm.write(area + 5 * PAGE, b"mine")
    assert ranges(steps()) == [f"CLEAR {HUGE}", "CLEAR 5-6"]
    assert host.read(head + 5, 0, 2) == b"\5\0"
    host.put(head)


# ---- the rest of the mm


def test_pageout_of_a_part_splits_the_page(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.swapon(1024)
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_PAGEOUT)
    assert ranges(steps()) == [f"CLEAR {HUGE}", *(f"CLEAR {page}-{page + 1}" for page in range(4, 8))]
    assert intact(mm, area, range(HUGE_PAGES))
    verify(host)


def test_pageout_of_all_of_it(mm: Mm, host: HostMemory, steps: Steps) -> None:
    start = new_area(mm)
    fill(mm, start, HUGE_PAGES)
    mm.swapon(1024)
    steps()
    before = host.free_frames
    mm.madvise(start, HPAGE_SIZE, MADV_PAGEOUT)
    assert ranges(steps()) == [
        f"CLEAR {HUGE}",
        *(f"CLEAR {page}-{page + 1}" for page in (0, *range(HUGE_PAGES - 1, 0, -1))),
    ]
    assert host.free_frames == before + HUGE_PAGES
    assert intact(mm, start, range(HUGE_PAGES))


def test_reclaim_asks_once_whether_the_huge_page_is_used(mm: Mm, host: HostMemory) -> None:
    class Young(MmuNotifier):
        asked: list[tuple[int, int]] = []

        def clear_flush_young(self, start: int, end: int) -> bool:
            self.asked.append((start, end))
            return False

    start = new_area(mm)
    fill(mm, start, HUGE_PAGES)
    mm.swapon(1024)
    mm.notifiers.register(Young())
    assert mm.memcg_reclaim() == 0  # the thread has used it
    assert Young.asked == [(start, start + HPAGE_SIZE)]
    assert not mm.pgd.huge(start >> 12) & ACCESSED
    assert mm.memcg_reclaim() == HUGE_PAGES
    assert intact(mm, start, range(HUGE_PAGES))


def test_free_of_a_part_splits_the_page_inside_the_range(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_FREE)
    assert ranges(steps()) == ["CLEAR 4-8", f"CLEAR {HUGE}"]
    assert not host.is_compound(pte_pfn(mm.pgd.get(area >> 12)))
    assert intact(mm, area, range(HUGE_PAGES))


def test_a_page_that_was_given_away_goes_as_a_whole(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.madvise(area, HPAGE_SIZE, MADV_FREE)
    steps()
    assert mm.memcg_reclaim() == 1  # without swap the other one stays
    words = steps()
    assert ranges(words) == [f"CLEAR {HUGE}"]
    assert f"free {HUGE_PAGES}" in words
    assert mm.read(area + PAGE, 2) == b"\0\0"
    assert intact(mm, area, range(HUGE_PAGES, 2 * HUGE_PAGES))


def test_a_page_that_was_given_away_and_written_stays(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.madvise(area, HPAGE_SIZE, MADV_FREE)
    mm.write(area + 5 * PAGE, b"kept")
    mm.clear_refs(1)
    assert mm.memcg_reclaim() == 0
    assert mm.read(area + 5 * PAGE, 4) == b"kept"
    assert intact(mm, area, range(6, 2 * HUGE_PAGES))
    verify(host)


def test_memory_pressure_splits_what_is_left_of_pages(mm: Mm, host: HostMemory, area: int) -> None:
    reclaim = watch_memory(host, mm.trace)
    mm.munmap(area, 100 * PAGE)
    held = []
    while host.free_frames > reclaim.marks.low:
        held.append(host.alloc())
    more = mm.mmap(8 * PAGE, RW)
    mm.write(more, bytes(8 * PAGE))
    assert host.free_frames >= reclaim.marks.high
    assert not host.is_compound(pte_pfn(mm.pgd.get((area >> 12) + 100)))
    assert is_huge(mm, area + HPAGE_SIZE)
    for pfn in held:
        host.put(pfn)


def test_migration_keeps_it_huge(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    old = pte_pfn(mm.pgd.huge(area >> 12))
    new = migrate_page(host, mm.trace, old + 7)
    words = steps()
    assert ranges(words) == [f"CLEAR {HUGE}"]
    assert words[-1] == f"free {HUGE_PAGES}"
    assert pte_pfn(mm.pgd.huge(area >> 12)) == new - 7 != old
    assert intact(mm, area, range(HUGE_PAGES))


def test_migration_of_one_that_is_mapped_in_parts_and_shared(mm: Mm, host: HostMemory, area: int) -> None:
    child = mm.fork()
    mm.madvise(area, 4 * PAGE, MADV_DONTNEED)
    old = pte_pfn(child.pgd.huge(area >> 12))
    new = migrate_page(host, mm.trace, old)
    assert pte_pfn(child.pgd.huge(area >> 12)) == new
    assert pte_pfn(mm.pgd.get((area >> 12) + 4)) == new + 4
    assert intact(mm, area, range(4, HUGE_PAGES))
    assert intact(child, area, range(HUGE_PAGES))
    verify(host)


def test_migration_without_room_for_a_huge_page_splits(mm: Mm, host: HostMemory, area: int) -> None:
    held = []
    while host.free_frames >= 2 * HUGE_PAGES:
        held.append(host.alloc_huge())
    held += [host.alloc() for _ in range(8)]
    old = pte_pfn(mm.pgd.huge(area >> 12))
    if host.free_frames >= HUGE_PAGES:
        held.append(host.alloc_huge())
    new = migrate_page(host, mm.trace, old + 7)
    assert pte_pfn(mm.pgd.get((area >> 12) + 7)) == new
    assert pte_pfn(mm.pgd.get((area >> 12) + 8)) == old + 8
    assert intact(mm, area, range(HUGE_PAGES))
    for pfn in held:
        host.put(pfn)


def test_one_that_is_held_does_not_migrate(mm: Mm, host: HostMemory, area: int) -> None:
    old = pte_pfn(mm.pgd.huge(area >> 12))
    host.get(old)
    with pytest.raises(MmError) as caught:
        migrate_page(host, mm.trace, old)
    assert caught.value.errno == errno.EAGAIN
    assert is_huge(mm, area)
    host.put(old)


def test_a_fault_waits_for_a_huge_page_that_moves(mm: Mm, host: HostMemory, area: int) -> None:
    seen = []

    def hook(label: str) -> None:
        if label == "mm.migrate.unmapped":
            with pytest.raises(MmError) as caught:
                mm.read(area + PAGE, 1)
            seen.append(caught.value.errno)

    with on_point(hook):
        migrate_page(host, mm.trace, pte_pfn(mm.pgd.huge(area >> 12)))
    assert seen == [errno.EDEADLK]


def test_compaction_moves_every_huge_page_once(mm: Mm, host: HostMemory, area: int) -> None:
    assert compact_memory(host, mm.trace) == 2
    assert is_huge(mm, area)
    assert intact(mm, area, range(2 * HUGE_PAGES))


def test_ksm_splits_what_it_merges(mm: Mm, host: HostMemory, steps: Steps) -> None:
    start = new_area(mm)
    fill(mm, start, HUGE_PAGES)
    for page in (3, 9):
        mm.write(start + page * PAGE, b"same")
    mm.madvise(start, HPAGE_SIZE, MADV_MERGEABLE)
    steps()
    assert mm.ksm_scan() == 1
    assert ranges(steps())[0] == f"CLEAR {HUGE}"
    assert pte_pfn(mm.pgd.get((start >> 12) + 3)) == pte_pfn(mm.pgd.get((start >> 12) + 9))
    verify(host)
    mm.madvise(start, HPAGE_SIZE, MADV_UNMERGEABLE)
    assert mm.read(start + 9 * PAGE, 4) == b"same"


def test_soft_dirty_is_a_matter_of_the_whole(mm: Mm, area: int) -> None:
    mm.clear_refs(4)
    assert mm.soft_dirty(area, area + 2 * HPAGE_SIZE) == []
    mm.write(area + 5 * PAGE, b"x")
    assert is_huge(mm, area)
    assert mm.soft_dirty(area + PAGE, area + 2 * HPAGE_SIZE) == [(area + PAGE, area + HPAGE_SIZE)]


def test_mprotect_and_back(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area, 2 * HPAGE_SIZE, R)
    assert not mm.pgd.huge(area >> 12) & WRITE
    with pytest.raises(MmError):
        mm.write(area, b"x")
    mm.mprotect(area, 2 * HPAGE_SIZE, RW)
    assert mm.pgd.huge(area >> 12) & WRITE
    assert is_huge(mm, area)


def test_forced_writes(mm: Mm, host: HostMemory, area: int) -> None:
    mm.mprotect(area, 2 * HPAGE_SIZE, R)
    assert mm.access_remote_vm(area + 5 * PAGE, b"forced") == 6
    assert mm.read(area + 5 * PAGE, 6) == b"forced"
    assert is_huge(mm, area)
    assert mm.fork().read(area + 5 * PAGE, 6) == b"forced"
    assert mm.access_remote_vm(area + 5 * PAGE, b"copied") == 6
    verify(host)


def test_populate_makes_huge_pages(mm: Mm, steps: Steps) -> None:
    start = new_area(mm, 2)
    steps()
    mm.madvise(start, 2 * HPAGE_SIZE, MADV_POPULATE_WRITE)
    assert is_huge(mm, start)
    assert steps() == ["alloc", "set", "alloc", "set"]


def test_no_work_for_nobody(host: HostMemory, trace: Trace) -> None:
    mm = Mm(host, trace)
    start = new_area(mm)
    fill(mm, start, 8)
    kinds = []
    trace.attach(lambda event: kinds.append(event.kind))
    mm.madvise(start, PAGE, MADV_DONTNEED)
    mm.munmap(start, 5 * PAGE)
    assert not [kind for kind in kinds if kind.startswith("mmu_notifier")]


def test_in_2008_there_were_none(host: HostMemory, trace: Trace) -> None:
    mm = Mm(host, trace, protocol="2008")
    start = mm.mmap(HPAGE_SIZE, RW)
    for advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE, 25):
        with pytest.raises(ProtocolUnsupported):
            mm.madvise(start, HPAGE_SIZE, advice)
    with pytest.raises(ProtocolUnsupported):
        mm.khugepaged_scan()
