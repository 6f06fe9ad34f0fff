"""MADV_COLLAPSE and khugepaged: what becomes a huge page, what is announced, and what keeps pages small."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import (
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_REMOVE,
)
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import EXCLUSIVE, MAPPED, WRITE, pte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
Steps = Callable[[], list[str]]
HUGE = f"S CLEAR 0-{HUGE_PAGES}"


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(12 * HPAGE_SIZE, poison="frame")
    yield host
    verify(host)


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """512 small pages, and one that a huge page begins with; page n begins with n in two bytes."""
    start = mm.mmap(HPAGE_SIZE + PAGE, RW)
    assert start % HPAGE_SIZE == 0
    fill(mm, start)
    steps()
    return start


@pytest.fixture
def file(host: HostMemory, trace: Trace) -> Iterator[ShmemFile]:
    """512 pages: page n begins with n in two bytes."""
    file = ShmemFile(host, trace, "memfd", HPAGE_SIZE)
    for page in range(HUGE_PAGES):
        file.pwrite(page * PAGE, page.to_bytes(2, "little"))
    yield file
    file.close()


def fill(mm: Mm, start: int) -> None:
    for page in range(HUGE_PAGES):
        mm.write(start + page * PAGE, page.to_bytes(2, "little"))


def intact(mm: Mm, start: int, pages: range = range(HUGE_PAGES)) -> bool:
    return all(mm.read(start + page * PAGE, 2) == page.to_bytes(2, "little") for page in pages)


def collapse(mm: Mm, start: int, length: int = HPAGE_SIZE) -> int:
    """0, or the errno."""
    try:
        mm.madvise(start, length, MADV_COLLAPSE)
    except MmError as error:
        return error.errno
    return 0


# ---- anonymous memory


def test_the_order(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    before = host.free_frames
    assert collapse(mm, area) == 0
    words = steps()
    assert words == ["alloc", HUGE, f"clear {HUGE_PAGES}", "tlb", "E", f"free {HUGE_PAGES}", "set"]
    assert host.free_frames == before
    entry = mm.pgd.huge(area >> 12)
    assert entry & WRITE
    assert entry & EXCLUSIVE
    assert intact(mm, area)


def test_again_there_is_nothing_to_do(mm: Mm, area: int, steps: Steps) -> None:
    collapse(mm, area)
    steps()
    assert collapse(mm, area) == 0
    assert steps() == []


def test_holes_become_zeros(mm: Mm, area: int) -> None:
    mm.madvise(area + 5 * PAGE, PAGE, MADV_DONTNEED)
    mm.madvise(area + 6 * PAGE, PAGE, MADV_DONTNEED)
    mm.read(area + 6 * PAGE, 1)
    assert collapse(mm, area) == 0
    assert mm.read(area + 5 * PAGE, 2) + mm.read(area + 6 * PAGE, 2) == bytes(4)
    assert intact(mm, area, range(7, HUGE_PAGES))


def test_what_is_in_swap_comes_back_first(mm: Mm, host: HostMemory, area: int) -> None:
    mm.swapon(64)
    mm.madvise(area, 9 * PAGE, MADV_PAGEOUT)
    assert collapse(mm, area) == 0
    assert mm.pgd.huge(area >> 12)
    assert intact(mm, area)


def test_what_a_child_shares_is_copied(mm: Mm, host: HostMemory, area: int) -> None:
    child = mm.fork()
    assert collapse(mm, area) == 0
    assert mm.pgd.huge(area >> 12) & EXCLUSIVE
    mm.write(area, b"mine")
    assert intact(child, area)
    verify(host)


def test_merged_pages_are_copied(mm: Mm, host: HostMemory, area: int) -> None:
    for page in (3, 4):
        mm.write(area + page * PAGE, b"same")
    mm.madvise(area, HPAGE_SIZE, MADV_MERGEABLE)
    mm.ksm_scan()
    assert collapse(mm, area) == 0
    assert mm.read(area + 4 * PAGE, 4) == b"same"
    verify(host)


def test_a_split_page_becomes_one_again(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(HPAGE_SIZE, RW)
    mm.madvise(start, HPAGE_SIZE, MADV_HUGEPAGE)
    fill(mm, start)
    mm.madvise(start, 3 * PAGE, MADV_DONTNEED)
    before = host.free_frames
    assert collapse(mm, start) == 0
    assert host.free_frames == before
    assert intact(mm, start, range(3, HUGE_PAGES))
    assert split_if_compound(host, pte_pfn(mm.pgd.huge(start >> 12)))
    assert collapse(mm, start) == 0
    assert intact(mm, start, range(3, HUGE_PAGES))


def test_a_page_that_somebody_holds(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    pfn = pte_pfn(mm.pgd.get((area >> 12) + 5))
    host.get(pfn)
    assert collapse(mm, area) == errno.EAGAIN
    assert steps() == []
    host.put(pfn)


def test_a_page_that_somebody_takes_meanwhile(mm: Mm, host: HostMemory, area: int) -> None:
    pfn = pte_pfn(mm.pgd.get((area >> 12) + 5))

    def hook(label: str) -> None:
        if label == "mm.collapse.detached":
            host.get(pfn)

    before = mm.pgd.entries(0, 1 << 36)
    with on_point(hook):
        assert collapse(mm, area) == errno.EAGAIN
    assert mm.pgd.entries(0, 1 << 36) == before
    assert intact(mm, area)
    host.put(pfn)


def test_a_fault_waits_for_the_end(mm: Mm, area: int) -> None:
    seen = []

    def hook(label: str) -> None:
        if label == "mm.collapse.detached":
            with pytest.raises(MmError) as caught:
                mm.read(area, 1)
            seen.append(caught.value.errno)

    with on_point(hook):
        assert collapse(mm, area) == 0
    assert seen == [errno.EDEADLK]


def test_no_room(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    held = []
    while host.free_frames >= 2 * HUGE_PAGES:
        held.append(host.alloc_huge())
    held += [host.alloc() for _ in range(HUGE_PAGES)]
    assert collapse(mm, area) == errno.ENOMEM
    assert steps() == []
    for pfn in held:
        host.put(pfn)


@pytest.mark.parametrize(
    "make",
    [
        lambda mm, area: mm.madvise(area, HPAGE_SIZE, MADV_DONTNEED),
        lambda mm, area: mm.madvise(area, HPAGE_SIZE, MADV_NOHUGEPAGE),
        lambda mm, area: mm.madvise(area + PAGE, PAGE, MADV_GUARD_INSTALL),
    ],
    ids=["nothing there", "forbidden", "guard"],
)
def test_what_cannot_be_one(mm: Mm, area: int, make: Callable[[Mm, int], None]) -> None:
    make(mm, area)
    assert collapse(mm, area) == errno.EINVAL
    assert not mm.pgd.huge(area >> 12)


def test_a_range_without_an_aligned_2_mib(mm: Mm, area: int) -> None:
    assert collapse(mm, area + PAGE, 3 * PAGE) == errno.EINVAL
    assert collapse(mm, area, HPAGE_SIZE - PAGE) == 0  # nothing to do is no error
    assert collapse(mm, area, HPAGE_SIZE + PAGE) == 0
    assert mm.pgd.huge(area >> 12)


def test_one_of_two_fails(mm: Mm) -> None:
    start = mm.mmap(2 * HPAGE_SIZE, RW)
    mm.write(start + HPAGE_SIZE, b"x")
    assert collapse(mm, start, 2 * HPAGE_SIZE) == errno.EINVAL
    assert mm.pgd.huge((start + HPAGE_SIZE) >> 12)


# ---- khugepaged


@pytest.fixture
def wanted(mm: Mm) -> int:
    """512 small pages in an area that wants huge ones."""
    start = mm.mmap(HPAGE_SIZE, RW)
    fill(mm, start)
    mm.madvise(start, HPAGE_SIZE, MADV_HUGEPAGE)
    return start


def test_khugepaged_does_what_is_wanted(mm: Mm, area: int, wanted: int) -> None:
    assert mm.khugepaged_scan() == 1
    assert mm.pgd.huge(wanted >> 12)
    assert not mm.pgd.huge(area >> 12)
    assert intact(mm, wanted)
    assert mm.khugepaged_scan() == 0
    mm.thp.enabled = "always"
    assert mm.khugepaged_scan() == 1
    assert intact(mm, area)


def test_khugepaged_does_nothing_where_never_is_set(mm: Mm, wanted: int) -> None:
    mm.thp.enabled = "never"
    assert mm.khugepaged_scan() == 0


def test_khugepaged_leaves_what_nobody_uses(mm: Mm, wanted: int) -> None:
    mm.clear_refs(1)
    assert mm.khugepaged_scan() == 0
    mm.read(wanted, 1)
    assert mm.khugepaged_scan() == 1


def test_khugepaged_asks_secondary_mmus(mm: Mm, wanted: int) -> None:
    class Young(MmuNotifier):
        asked: list[int] = []

        def test_young(self, address: int) -> bool:
            self.asked.append((address - wanted) // PAGE)
            return address == wanted + 2 * PAGE

    mm.clear_refs(1)
    mm.notifiers.register(Young())
    assert mm.khugepaged_scan() == 1
    assert Young.asked[:3] == [0, 1, 2]


@pytest.mark.parametrize("knob", ["max_ptes_none", "max_ptes_shared", "max_ptes_swap"])
def test_what_khugepaged_puts_up_with(mm: Mm, host: HostMemory, wanted: int, knob: str) -> None:
    mm.swapon(64)
    mm.madvise(wanted, 3 * PAGE, MADV_DONTNEED)
    mm.madvise(wanted + 4 * PAGE, 3 * PAGE, MADV_PAGEOUT)
    child = mm.fork()
    child.munmap(wanted + 9 * PAGE, HPAGE_SIZE - 9 * PAGE)  # which leaves it 3 that are mapped
    setattr(mm.thp, knob, 2)
    assert mm.khugepaged_scan() == 0
    setattr(mm.thp, knob, 3)
    assert mm.khugepaged_scan() == 1
    assert intact(mm, wanted, range(4, HUGE_PAGES))
    verify(host)


def test_khugepaged_of_an_mm_that_ends_meanwhile(mm: Mm, host: HostMemory, wanted: int) -> None:
    with on_point(lambda label: mm.exit() if label == "khugepaged.scan" else None):
        assert mm.khugepaged_scan() == 0
    assert host.free_frames == host.nr_frames - 1


# ---- memory files


def test_a_file_page_by_page_and_then_as_a_whole(mm: Mm, host: HostMemory, file: ShmemFile, steps: Steps) -> None:
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    for page in (3, 5):
        mm.write(start + page * PAGE, page.to_bytes(2, "little"))
    before = host.free_frames
    steps()
    assert collapse(mm, start) == 0
    pages = [f"S CLEAR {page}-{page + 1}" for page in (3, 5)]
    words = steps()
    assert [word for word in words if word.startswith("S")] == [*pages, HUGE]
    assert words[-5:] == [HUGE, "tlb", "E", f"free {HUGE_PAGES}", "set"]
    assert host.free_frames == before
    entry = mm.pgd.huge(start >> 12)
    assert entry & WRITE
    assert pte_pfn(entry) == file.pages[0]
    assert intact(mm, start)
    assert file.pread(7 * PAGE, 2) == b"\7\0"
    mm.write(start + 8 * PAGE, b"there")
    assert file.pread(8 * PAGE, 5) == b"there"


@pytest.fixture
def mapped(mm: Mm, file: ShmemFile, steps: Steps) -> int:
    """The file, collapsed."""
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(start, 1)
    collapse(mm, start)
    steps()
    return start


def test_others_who_map_it_lose_their_tables(mm: Mm, host: HostMemory, trace: Trace, file: ShmemFile) -> None:
    other = Mm(host, trace, name="other")
    calls = []

    class Listener(MmuNotifier):
        def invalidate_range_start(self, range: object) -> int:
            calls.append(range)
            return 0

    there = other.mmap(HPAGE_SIZE, R, MAP_SHARED, file=file)
    elsewhere = other.mmap(HPAGE_SIZE, R, MAP_SHARED, file=file)
    assert intact(other, there, range(1))
    other.notifiers.register(Listener())
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(start, 1)
    assert collapse(mm, start) == 0
    assert len(calls) == 16 + 1  # those mapped around the one that was read, and the table; none elsewhere
    assert not other.pgd.huge(there >> 12)
    assert intact(other, there, range(2))
    assert pte_pfn(other.pgd.huge(there >> 12)) == pte_pfn(mm.pgd.huge(start >> 12))
    assert not other.pgd.huge(elsewhere >> 12)
    verify(host)
    other.exit()


def test_a_private_mapping_reads_it_huge_and_copies_small(
    mm: Mm, host: HostMemory, file: ShmemFile, mapped: int
) -> None:
    start = mm.mmap(HPAGE_SIZE, RW, MAP_PRIVATE, file=file)
    assert intact(mm, start, range(3))
    entry = mm.pgd.huge(start >> 12)
    assert entry
    assert not entry & WRITE
    mm.write(start + 2 * PAGE, b"mine")
    assert not mm.pgd.huge(start >> 12)
    assert file.pread(2 * PAGE, 2) == b"\2\0"
    assert mm.read(start + 2 * PAGE, 4) == b"mine"
    verify(host)


def test_a_mapping_that_is_not_aligned_has_small_entries(
    mm: Mm, host: HostMemory, file: ShmemFile, mapped: int
) -> None:
    start = mm.mmap(HPAGE_SIZE - PAGE, R, MAP_SHARED, file=file, pgoff=1)
    assert mm.read(start, 2) == b"\1\0"
    assert not mm.pgd.huge(start >> 12)
    verify(host)


def test_unmapping_a_part_takes_the_entry_away(mm: Mm, host: HostMemory, mapped: int, steps: Steps) -> None:
    mm.madvise(mapped + 4 * PAGE, PAGE, MADV_DONTNEED)
    assert [word for word in steps() if word.startswith("S")] == ["S CLEAR 4-5", HUGE]
    assert mm.pgd.pmd_none(mapped >> 12)
    assert intact(mm, mapped)
    assert mm.pgd.huge(mapped >> 12)  # the fault mapped it again


def test_small_entries_of_a_huge_page_become_one(mm: Mm, file: ShmemFile, mapped: int, steps: Steps) -> None:
    mm.mprotect(mapped + 4 * PAGE, PAGE, R)
    mm.read(mapped, 1)
    mm.mprotect(mapped, HPAGE_SIZE, RW)
    assert not mm.pgd.huge(mapped >> 12)
    steps()
    assert collapse(mm, mapped) == 0
    assert [word for word in steps() if word.startswith("S")] == [HUGE]
    assert mm.pgd.huge(mapped >> 12)
    assert intact(mm, mapped)


def test_a_hole_in_a_huge_page(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int, steps: Steps) -> None:
    before = host.free_frames
    mm.madvise(mapped + 4 * PAGE, 3 * PAGE, MADV_REMOVE)
    assert [word for word in steps() if word.startswith("S")] == ["S CLEAR 4-7", HUGE]
    assert host.free_frames == before + 3
    assert mm.read(mapped + 4 * PAGE, 2) == bytes(2)
    assert intact(mm, mapped, range(7, HUGE_PAGES))
    verify(host)


def test_truncation_of_a_part(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int) -> None:
    before = host.free_frames
    file.truncate(100 * PAGE)
    assert host.free_frames == before + HUGE_PAGES - 100
    file.truncate(HPAGE_SIZE)
    assert mm.read(mapped + 100 * PAGE, 2) == bytes(2)
    assert intact(mm, mapped, range(100))


def test_truncation_of_all_of_it(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int) -> None:
    before = host.free_frames
    file.truncate(0)
    assert host.free_frames == before + HUGE_PAGES


def test_a_hole_in_a_page_that_somebody_holds(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int) -> None:
    head = pte_pfn(mm.pgd.huge(mapped >> 12))
    host.get(head + 200)
    file.punch_hole(4, 3)
    assert host.is_compound(head)
    file.truncate(100 * PAGE)
    assert mm.read(mapped + 5 * PAGE, 2) == bytes(2)
    assert intact(mm, mapped, range(7, 100))
    file.truncate(HPAGE_SIZE)
    assert mm.read(mapped + 300 * PAGE, 2) == bytes(2)
    host.put(head)


def test_swap_out_splits_it(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int) -> None:
    mm.swapon(1024)
    mm.madvise(mapped, HPAGE_SIZE, MADV_PAGEOUT)
    assert not mm.pgd.get(mapped >> 12) & MAPPED
    assert intact(mm, mapped)
    verify(host)


def test_migration_takes_the_cache_along(mm: Mm, host: HostMemory, file: ShmemFile, mapped: int) -> None:
    old = file.pages[0]
    new = migrate_page(host, mm.trace, old)
    assert file.pages[9] == new + 9
    assert intact(mm, mapped)


def test_fork_leaves_it_to_faults(mm: Mm, host: HostMemory, mapped: int) -> None:
    child = mm.fork()
    assert child.pgd.present == 0
    assert intact(child, mapped, range(2))
    child.exit()


def test_holes_of_the_file_stay_zero(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "sparse", HPAGE_SIZE)
    file.pwrite(7 * PAGE, b"seven")
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    assert mm.read(start + 7 * PAGE, 5) == b"seven"
    assert collapse(mm, start) == 0
    assert mm.read(start + 8 * PAGE, 5) == bytes(5)
    assert file.pread(7 * PAGE, 5) == b"seven"
    file.close()


def test_beyond_the_end_of_the_file(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "short", HPAGE_SIZE - PAGE)
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(start, 1)
    assert collapse(mm, start) == errno.EAGAIN
    file.close()


def test_a_page_of_the_file_that_somebody_holds(mm: Mm, host: HostMemory, file: ShmemFile) -> None:
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(start, 1)
    pfn = file.pages[9]
    host.get(pfn)
    assert collapse(mm, start) == errno.EAGAIN
    assert file.pages[9] == pfn
    assert intact(mm, start)
    host.put(pfn)


def test_a_page_that_is_mapped_again_meanwhile(mm: Mm, host: HostMemory, file: ShmemFile) -> None:
    start = mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(start, 1)
    pages = set(file.pages.values())
    seen: list[str] = []

    def hook(label: str) -> None:
        if len(seen) < 100 and not any(host.mapcount(pfn) for pfn in pages):
            seen.append(label)
            mm.read(start, 1)

    with on_point(hook):
        result = collapse(mm, start)
    assert seen
    assert result in (0, errno.EAGAIN)
    assert intact(mm, start)
    verify(host)
