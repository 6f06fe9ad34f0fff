"""Write protection by userfaultfd: what is announced, who is told of writes, and where the protection goes."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import (
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_UNMERGEABLE,
)
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import GUARD, HUGE, SWAP, UFFD_WP, WRITE
from xipvm.mmu.uffd_message import UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, UffdMsg
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_UNPOPULATED
from xipvm.mmu.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
    UFFDIO_WRITEPROTECT_MODE_WP,
    Userfaultfd,
)
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
HUGE_SIZE = 512 * PAGE
R, RW = 1, 3
MISSING, WP = UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
Steps = Callable[[], list[str]]
WP_WRITE = UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_WRITE


class Guard:
    """Notes the writes it is told of, and lets them through."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.told: list[int] = []

    def __call__(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        assert message.flags == WP_WRITE
        self.told.append((message.address - self.base) // PAGE)
        uffd.writeprotect(message.address, PAGE, 0)


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """16 pages, of which the first 8 are written."""
    start = mm.mmap(16 * PAGE, RW)
    mm.write(start, b"x" * 8 * PAGE)
    steps()
    return start


@pytest.fixture
def guard(area: int) -> Guard:
    return Guard(area)


def protected(mm: Mm, start: int, pages: int = 16) -> list[int]:
    return [page for page in range(pages) if mm.pgd.get((start >> 12) + page) & UFFD_WP]


def markers(mm: Mm, start: int, pages: int = 16) -> list[int]:
    return [page for page in range(pages) if mm.pgd.get((start >> 12) + page) == UFFD_WP]


def errno_of(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(MmError) as caught:
        call(*arguments)
    return caught.value.errno


# ---- what is announced


def test_the_order(mm: Mm, area: int, guard: Guard, steps: Steps) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    assert steps() == []
    uffd.writeprotect(area + 2 * PAGE, 4 * PAGE)
    assert steps() == ["S PROTECTION_VMA 2-6", "protect", "E", "tlb"]
    uffd.writeprotect(area + 2 * PAGE, 4 * PAGE)
    assert steps() == ["S PROTECTION_VMA 2-6", "E"]  # nothing has changed
    mm.write(area + 3 * PAGE, b"y")
    assert steps() == ["S PROTECTION_VMA 3-4", "protect", "E", "tlb"]  # the monitor's; the write needs nothing more
    uffd.writeprotect(area + 2 * PAGE, PAGE, 0)
    assert steps() == ["S PROTECTION_VMA 2-3", "protect", "E", "tlb"]
    uffd.unregister(area, 16 * PAGE)
    assert steps() == ["S PROTECTION_VMA 0-16", "protect", "E", "tlb"]
    assert guard.told == [3]
    assert protected(mm, area) == []
    mm.write(area + 4 * PAGE, b"y")
    assert steps() == []


def test_where_nothing_is_mapped_nobody_is_told(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    uffd = mm.userfaultfd()
    uffd.register(start, 16 * PAGE, WP)
    uffd.writeprotect(start, 16 * PAGE)
    uffd.unregister(start, 16 * PAGE)
    assert steps() == []
    marking = mm.userfaultfd(None, UFFD_FEATURE_WP_UNPOPULATED)
    marking.register(start, 16 * PAGE, WP)
    marking.writeprotect(start + 4 * PAGE, 4 * PAGE)
    assert steps() == ["S PROTECTION_VMA 4-8", "E"]
    assert markers(mm, start) == [4, 5, 6, 7]
    marking.close()
    assert steps() == ["S PROTECTION_VMA 0-16", "E"]
    assert mm.pgd.present == 0


def test_one_range_for_each_area(mm: Mm, area: int, steps: Steps) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 16 * PAGE, WP)
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, R)
    steps()
    uffd.writeprotect(area, 8 * PAGE)
    assert [word for word in steps() if word[0] in "SE"] == ["S PROTECTION_VMA 0-4", "E", "S PROTECTION_VMA 4-8", "E"]


def test_bad_use(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area + 8 * PAGE, 4 * PAGE, WP)
    uffd.register(area + 12 * PAGE, 4 * PAGE, MISSING)
    assert errno_of(uffd.writeprotect, area, PAGE) == errno.ENOENT
    assert errno_of(uffd.writeprotect, area + 11 * PAGE, 2 * PAGE) == errno.ENOENT
    assert errno_of(uffd.writeprotect, area + 64 * PAGE, PAGE) == errno.ENOENT
    both = UFFDIO_WRITEPROTECT_MODE_WP | UFFDIO_WRITEPROTECT_MODE_DONTWAKE
    assert errno_of(uffd.writeprotect, area + 8 * PAGE, PAGE, both) == errno.EINVAL
    assert errno_of(uffd.writeprotect, area + 8 * PAGE, PAGE, 4) == errno.EINVAL
    assert errno_of(uffd.writeprotect, area + 8 * PAGE, 0) == errno.EINVAL
    assert errno_of(uffd.writeprotect, area + 8 * PAGE + 1, PAGE) == errno.EINVAL
    assert protected(mm, area) == []


# ---- who is told


def test_every_write_is_told_once(mm: Mm, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 16 * PAGE)
    thread = HostThread(mm)
    assert thread.load(area, 1) == b"x"
    thread.store(area, b"a")
    mm.write(area + PAGE, b"b")
    assert mm.access_remote_vm(area + 2 * PAGE, b"c") == 1
    assert mm.get_user_pages(area + 3 * PAGE, write=True).writable
    assert not mm.get_user_pages(area + 4 * PAGE, write=False).writable
    thread.store(area, b"d")
    mm.write(area + 9 * PAGE, b"e")  # was empty, and there are no markers
    assert guard.told == [0, 1, 2, 3]
    assert protected(mm, area) == [4, 5, 6, 7]


def test_a_forced_write_is_told_as_well(mm: Mm, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 8 * PAGE)
    mm.mprotect(area, 16 * PAGE, R)
    assert mm.access_remote_vm(area, b"c") == 1
    assert guard.told == [0]
    assert mm.read(area, 2) == b"cx"


def test_a_change_of_protection_keeps_it(mm: Mm, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 4 * PAGE)
    mm.mprotect(area, 16 * PAGE, 0)
    mm.mprotect(area, 16 * PAGE, RW)
    assert protected(mm, area) == [0, 1, 2, 3]
    assert [bool(mm.pgd.get((area >> 12) + page) & WRITE) for page in (0, 3, 4, 7)] == [False, False, True, True]
    mm.write(area, b"y")
    assert guard.told == [0]


def test_writes_that_are_only_remembered(mm: Mm, area: int, steps: Steps) -> None:
    uffd = mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 16 * PAGE)
    assert len(protected(mm, area)) == 16
    steps()
    mm.write(area + 2 * PAGE, b"y")
    HostThread(mm).store(area + 9 * PAGE, b"y")
    mm.read(area + 10 * PAGE, 1)
    mm.write(area + 11 * PAGE, b"y")
    assert "S" not in "".join(steps())
    assert [page for page in range(16) if page not in protected(mm, area)] == [2, 9, 11]


def test_a_copy_comes_behind_the_word(mm: Mm, host: HostMemory, area: int, guard: Guard, steps: Steps) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 8 * PAGE)
    child = mm.fork()
    steps()
    mm.write(area, b"y")
    assert [word for word in steps() if word[0] == "S"] == ["S PROTECTION_VMA 0-1", "S CLEAR 0-1"]
    assert child.read(area, 1) == b"x"
    assert guard.told == [0]
    assert 0 not in protected(mm, area)
    child.exit()
    verify(host)


def test_pages_that_come_protected(mm: Mm, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP | MISSING)
    uffd.copy(area + 8 * PAGE, b"z" * PAGE, UFFDIO_COPY_MODE_WP)
    mm.write(area + 8 * PAGE, b"y")
    assert guard.told == [8]


# ---- markers


def test_a_marker_becomes_a_protected_entry(mm: Mm, area: int) -> None:
    guard = Guard(area)
    uffd = mm.userfaultfd(guard, UFFD_FEATURE_WP_UNPOPULATED)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 16 * PAGE)
    assert markers(mm, area) == list(range(8, 16))
    assert mm.read(area + 8 * PAGE, 1) == b"\0"
    mm.write(area + 9 * PAGE, b"y")
    mm.write(area + 8 * PAGE, b"y")
    assert guard.told == [9, 8]
    uffd.unregister(area, 16 * PAGE)
    assert markers(mm, area) == []


def test_zapping_forgets_anonymous_memory_and_remembers_files(
    mm: Mm, host: HostMemory, trace: Trace, area: int
) -> None:
    file = ShmemFile(host, trace, "shmem", 8 * PAGE)
    file.pwrite(0, b"f" * 4 * PAGE)
    shared = mm.mmap(8 * PAGE, RW, MAP_SHARED, file=file)
    guard = Guard(shared)
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.register(shared, 8 * PAGE, WP)
    mm.read(shared, 4 * PAGE)
    for start in (area, shared):
        uffd.writeprotect(start, 6 * PAGE)
    assert markers(mm, shared, 8) == [4, 5]
    for start in (area, shared):
        mm.madvise(start, 4 * PAGE, MADV_DONTNEED)
    assert protected(mm, area) == [4, 5]
    assert markers(mm, shared, 8) == [0, 1, 2, 3, 4, 5]
    verify(host)
    mm.write(shared + PAGE, b"g")
    mm.write(shared + 5 * PAGE, b"g")
    mm.write(shared + 7 * PAGE, b"g")
    assert guard.told == [1, 5]
    file.punch_hole(0, 8)
    assert markers(mm, shared, 8) == [0, 2, 3, 4]  # the others are not protected any more
    verify(host)
    file.close()
    mm.exit()


def test_a_file_page_stays_read_only_until_it_is_written(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    file = ShmemFile(host, trace, "shmem", 2 * PAGE)
    start = mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x" * 2 * PAGE)
    uffd = mm.userfaultfd()
    uffd.register(start, 2 * PAGE, WP)
    uffd.writeprotect(start, PAGE)
    steps()
    uffd.unregister(start, 2 * PAGE)
    assert [word for word in steps() if word[0] == "S"] == ["S PROTECTION_VMA 0-2"]
    assert not mm.pgd.get(start >> 12) & (UFFD_WP | WRITE)
    mm.write(start, b"y")
    assert [word for word in steps() if word[0] == "S"] == []
    assert mm.pgd.get(start >> 12) & WRITE
    file.close()
    mm.exit()


def test_private_copies_of_a_file(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "shmem", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=file)
    mm.write(start, b"c" * 2 * PAGE)
    guard = Guard(start)
    uffd = mm.userfaultfd(guard)
    uffd.register(start, 4 * PAGE, WP)
    uffd.writeprotect(start, 4 * PAGE)
    mm.write(start + 3 * PAGE, b"d")  # a marker, and a copy at once
    assert guard.told == [3]
    file.punch_hole(0, 4)  # leaves copies alone
    assert mm.read(start, 1) == b"c"
    mm.madvise(start, 2 * PAGE, MADV_DONTNEED)
    assert markers(mm, start, 4) == [0, 1, 2]
    file.close()
    mm.exit()


def test_guards_take_the_place_of_markers(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "shmem", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x")
    uffd = mm.userfaultfd()
    uffd.register(start, 4 * PAGE, WP)
    uffd.writeprotect(start, 4 * PAGE)
    mm.madvise(start, 4 * PAGE, MADV_GUARD_INSTALL)
    assert [entry for _, entry in mm.pgd.entries(start >> 12, (start >> 12) + 4)] == [GUARD] * 4
    mm.madvise(start, 4 * PAGE, MADV_GUARD_REMOVE)
    assert mm.read(start, 1) == b"x"
    file.close()
    mm.exit()


# ---- swap, migration, KSM, huge pages


def test_swap_takes_it_along(mm: Mm, host: HostMemory, area: int, guard: Guard) -> None:
    mm.swapon(64)
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 2 * PAGE)
    mm.madvise(area, 4 * PAGE, MADV_PAGEOUT)
    assert mm.pgd.get(area >> 12) & SWAP
    uffd.writeprotect(area + 2 * PAGE, PAGE)  # in swap already
    uffd.writeprotect(area + PAGE, PAGE, 0)
    verify(host)
    assert protected(mm, area) == [0, 2]
    mm.write(area + PAGE, b"y")
    mm.write(area + 3 * PAGE, b"y")
    mm.write(area, b"y")
    assert mm.read(area + 2 * PAGE, 1) == b"x"
    mm.write(area + 2 * PAGE, b"y")
    assert guard.told == [0, 2]
    verify(host)
    mm.swapoff()


def test_files_leave_markers_in_swap(mm: Mm, host: HostMemory, trace: Trace) -> None:
    mm.swapon(64)
    file = ShmemFile(host, trace, "shmem", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x" * 4 * PAGE)
    guard = Guard(start)
    uffd = mm.userfaultfd(guard)
    uffd.register(start, 4 * PAGE, WP)
    uffd.writeprotect(start, 2 * PAGE)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    assert markers(mm, start, 4) == [0, 1]
    assert mm.read(start, 1) == b"x"
    mm.write(start, b"y")
    mm.write(start + 2 * PAGE, b"y")
    assert guard.told == [0]
    verify(host)
    file.close()
    mm.exit()


def test_migration_takes_it_along(mm: Mm, host: HostMemory, trace: Trace, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 4 * PAGE)
    compact_memory(host, trace)
    assert protected(mm, area) == [0, 1, 2, 3]
    verify(host)
    mm.write(area + PAGE, b"y")
    assert guard.told == [1]


def test_ksm_takes_it_along(mm: Mm, host: HostMemory, area: int, guard: Guard) -> None:
    uffd = mm.userfaultfd(guard)
    uffd.register(area, 16 * PAGE, WP)
    uffd.writeprotect(area, 4 * PAGE)
    mm.madvise(area, 8 * PAGE, MADV_MERGEABLE)
    assert mm.ksm_scan() == 7
    assert protected(mm, area) == [0, 1, 2, 3]
    mm.write(area, b"y")
    mm.madvise(area, 8 * PAGE, MADV_UNMERGEABLE)
    assert protected(mm, area) == [1, 2, 3]
    mm.write(area + PAGE, b"y")
    mm.write(area + 5 * PAGE, b"y")
    assert guard.told == [0, 1]
    verify(host)


@pytest.fixture
def large() -> HostMemory:
    return HostMemory(4096 * PAGE, poison="frame")


def huge_area(host: HostMemory) -> tuple[Mm, int]:
    """An mm with one huge page."""
    mm = Mm(host, Trace())
    mm.notifiers.register(MmuNotifier())
    start = mm.mmap(HUGE_SIZE, RW)
    mm.madvise(start, HUGE_SIZE, MADV_HUGEPAGE)
    mm.write(start, b"x")
    assert mm.pgd.get(start >> 12) & HUGE
    return mm, start


@pytest.mark.parametrize("features", [0, UFFD_FEATURE_WP_ASYNC])
@pytest.mark.parametrize("pages", [512, 8])
def test_huge_pages(large: HostMemory, features: int, pages: int) -> None:
    mm, start = huge_area(large)
    guard = Guard(start)
    uffd = mm.userfaultfd(guard, features)
    uffd.register(start, HUGE_SIZE, WP)
    uffd.writeprotect(start, pages * PAGE)
    assert bool(mm.pgd.get(start >> 12) & HUGE) == (pages == 512)
    assert protected(mm, start, 512) == list(range(pages))
    mm.write(start + 5 * PAGE, b"y")
    assert guard.told == ([] if features else [5])
    assert mm.read(start, 1) == b"x"
    verify(large)
    uffd.close()
    assert protected(mm, start, 512) == []
    verify(large)
    mm.exit()
    verify(large)


def test_collapsing_respects_it(large: HostMemory) -> None:
    mm = Mm(large, Trace())
    start = mm.mmap(2 * HUGE_SIZE, RW)
    start = -(-start // HUGE_SIZE) * HUGE_SIZE
    for page in range(512):
        mm.write(start + page * PAGE, b"x")
    guard = Guard(start)
    uffd = mm.userfaultfd(guard)
    uffd.register(start, HUGE_SIZE, WP)
    uffd.writeprotect(start, 4 * PAGE)
    assert errno_of(mm.madvise, start, HUGE_SIZE, MADV_COLLAPSE) == errno.EINVAL
    mm.write(start + PAGE, b"y")
    assert guard.told == [1]
    uffd.writeprotect(start, HUGE_SIZE, 0)
    mm.madvise(start, PAGE, MADV_DONTNEED)
    assert errno_of(mm.madvise, start, HUGE_SIZE, MADV_COLLAPSE) == errno.EINVAL  # would fill what is missing
    mm.write(start, b"x")
    mm.madvise(start, HUGE_SIZE, MADV_COLLAPSE)
    assert mm.pgd.get(start >> 12) & HUGE
    verify(large)
    mm.exit()
