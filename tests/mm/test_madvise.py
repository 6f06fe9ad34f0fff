"""madvise beside DONTNEED: what each advice does and announces, and what refuses it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import PG_DIRTY, PG_SWAPBACKED, HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MADV_REMOVE,
    MADV_WILLNEED,
)
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ACCESSED, DIRTY, GUARD
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, TASK_SIZE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
NONE, R, RW = 0, 1, 3
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
def shmem(mm: Mm, host: HostMemory, trace: Trace) -> ShmemFile:
    return ShmemFile(host, trace, "file", 16 * PAGE)


def entry(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva >> 12)


def refused(mm: Mm, start: int, length: int, advice: int) -> int:
    """The errno; nothing may have changed."""
    before = mm.pgd.entries(0, 1 << 36)
    with pytest.raises(MmError) as raised:
        mm.madvise(start, length, advice)
    assert mm.pgd.entries(0, 1 << 36) == before
    return raised.value.errno


# ---- FREE and COLD


def test_free_keeps_pages_and_takes_their_dirt(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    host.set_flags(5, PG_DIRTY)  # page 4, by a secondary MMU
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_FREE)
    assert steps() == ["S CLEAR 4-8", "E", "tlb"]
    for page in range(16):
        lazy = page in range(4, 8)
        assert bool(entry(mm, area + page * PAGE) & (ACCESSED | DIRTY)) != lazy
        assert bool(host.flags(page + 1) & PG_SWAPBACKED) != lazy
    assert not host.flags(5) & PG_DIRTY
    assert mm.read(area + 4 * PAGE, 1) == b"\4"


def test_a_store_after_free_makes_the_page_dirty_again(mm: Mm, area: int) -> None:
    thread = HostThread(mm)
    thread.store(area, b"old")
    mm.madvise(area, PAGE, MADV_FREE)
    assert thread.tlb == {}
    thread.store(area, b"new")
    assert entry(mm, area) & DIRTY


def test_free_leaves_pages_alone_that_are_dirty_elsewhere(mm: Mm, host: HostMemory, area: int) -> None:
    mm.fork("child")
    host.set_flags(1, PG_DIRTY)
    mm.madvise(area, 2 * PAGE, MADV_FREE)
    assert (host.flags(1) & PG_SWAPBACKED, host.flags(2) & PG_SWAPBACKED) == (PG_SWAPBACKED, 0)
    assert entry(mm, area) & DIRTY


def test_free_of_several_areas_flushes_once(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    mm.madvise(area + 4 * PAGE, 8 * PAGE, MADV_FREE)
    assert steps() == ["S CLEAR 4-8", "E", "S CLEAR 8-12", "E", "tlb"]
    mm.madvise(area + 4 * PAGE, 8 * PAGE, MADV_FREE)
    assert steps() == ["S CLEAR 4-8", "E", "S CLEAR 8-12", "E"]


def test_free_is_for_anonymous_memory(mm: Mm, shmem: ShmemFile) -> None:
    start = mm.mmap(PAGE, RW, MAP_PRIVATE, file=shmem)
    assert refused(mm, start, PAGE, MADV_FREE) == errno.EINVAL
    start = mm.mmap(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    assert refused(mm, start, PAGE, MADV_FREE) == errno.EINVAL


def test_cold_tells_no_notifier(mm: Mm, area: int, steps: Steps) -> None:
    mm.mmap(PAGE, RW, addr=area + 16 * PAGE)
    mm.read(area + 16 * PAGE, 1)  # the zero page
    steps()
    mm.madvise(area + 4 * PAGE, 13 * PAGE, MADV_COLD)
    assert steps() == ["tlb"]
    assert [bool(entry(mm, area + page * PAGE) & ACCESSED) for page in range(17)] == [*[True] * 4, *[False] * 12, True]
    assert entry(mm, area + 4 * PAGE) & DIRTY
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_COLD)
    assert steps() == []


# ---- POPULATE and WILLNEED


def test_populate_write_copies_zero_pages(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(8 * PAGE, RW)
    mm.read(start, 4 * PAGE)
    steps()
    mm.madvise(start + 2 * PAGE, 4 * PAGE, MADV_POPULATE_WRITE)
    copies = [word for page in (2, 3) for word in ("alloc", f"S CLEAR {page}-{page + 1}", "clear 1", "tlb", "set", "E")]
    assert steps() == [*copies, "alloc", "set", "alloc", "set"]
    mm.madvise(start, 8 * PAGE, MADV_POPULATE_READ)
    assert steps() == ["set", "set"]


def test_populate_write_makes_file_pages_writable(mm: Mm, host: HostMemory, trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    disk = HostFile(host, trace, str(path), writable=True)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=disk)
    mm.madvise(start, 4 * PAGE, MADV_POPULATE_READ)
    assert not mm.get_user_pages(start, write=False).writable
    mm.madvise(start, 4 * PAGE, MADV_POPULATE_WRITE)
    assert mm.get_user_pages(start, write=False).writable
    assert disk.fsync() == 4


@pytest.mark.parametrize(("prot", "advice"), [(NONE, MADV_POPULATE_READ), (R, MADV_POPULATE_WRITE)])
def test_populate_needs_the_right(mm: Mm, area: int, steps: Steps, prot: int, advice: int) -> None:
    mm.mmap(PAGE, prot, addr=area + 16 * PAGE)
    assert refused(mm, area + 8 * PAGE, 9 * PAGE, advice) == errno.EINVAL


def test_populate_behind_the_end_of_a_file(mm: Mm, shmem: ShmemFile) -> None:
    start = mm.mmap(32 * PAGE, RW, MAP_SHARED, file=shmem)
    with pytest.raises(MmError) as raised:
        mm.madvise(start, 32 * PAGE, MADV_POPULATE_READ)
    assert raised.value.errno == errno.EFAULT
    assert len(mm.pgd.entries(0, 1 << 36)) == 16


def test_populate_without_frames() -> None:
    host = HostMemory(4 * PAGE)
    mm = Mm(host, Trace())
    start = mm.mmap(8 * PAGE, RW)
    with pytest.raises(MmError) as raised:
        mm.madvise(start, 8 * PAGE, MADV_POPULATE_WRITE)
    assert raised.value.errno == errno.ENOMEM
    verify(host)


def test_willneed_reads_ahead(mm: Mm, host: HostMemory, trace: Trace, tmp_path: Path, steps: Steps) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    disk = HostFile(host, trace, str(path))
    start = mm.mmap(8 * PAGE, R, MAP_SHARED, file=disk)
    mm.mmap(PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=start + 7 * PAGE)
    steps()
    mm.madvise(start + PAGE, 7 * PAGE, MADV_WILLNEED)
    assert steps() == ["alloc"] * 3
    assert sorted(disk.pages) == [1, 2, 3]


# ---- REMOVE


def test_remove_is_a_hole_for_everybody(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem)
    mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem, addr=start + 64 * PAGE)
    for base in (start, start + 64 * PAGE):
        mm.write(base, b"x" * 16 * PAGE)
    steps()
    mm.madvise(start + 4 * PAGE, 4 * PAGE, MADV_REMOVE)
    assert steps() == ["S CLEAR 4-8", "clear 4", "E", "tlb", "S CLEAR 68-72", "clear 4", "E", "tlb", *["free 1"] * 4]
    assert mm.read(start + 64 * PAGE, 8 * PAGE) == b"x" * 4 * PAGE + bytes(4 * PAGE)


def test_what_cannot_be_removed(mm: Mm, shmem: ShmemFile, host: HostMemory, trace: Trace, tmp_path: Path) -> None:
    assert refused(mm, mm.mmap(PAGE, RW), PAGE, MADV_REMOVE) == errno.EINVAL
    assert refused(mm, mm.mmap(PAGE, RW, MAP_PRIVATE, file=shmem), PAGE, MADV_REMOVE) == errno.EACCES
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    read_only = HostFile(host, trace, str(path))
    assert refused(mm, mm.mmap(PAGE, R, MAP_SHARED, file=read_only), PAGE, MADV_REMOVE) == errno.EACCES


# ---- GUARD


def test_guards(mm: Mm, area: int, steps: Steps, events: list[Event]) -> None:
    thread = HostThread(mm)
    thread.load(area + 4 * PAGE, 1)
    steps()
    mm.madvise(area + 4 * PAGE, 4 * PAGE, MADV_GUARD_INSTALL)
    assert [event.fields for event in events if event.kind == "pte_guard"] == [
        {"mm": "mm0", "start": area + 4 * PAGE, "end": area + 8 * PAGE, "on": True}
    ]
    assert steps() == ["S CLEAR 4-8", "clear 4", "E", "guard", "tlb", "free 4"]
    for access in (lambda: thread.load(area + 4 * PAGE, 1), lambda: thread.store(area + 7 * PAGE, b"x")):
        with pytest.raises(HostAccessError) as raised:
            access()
        assert raised.value.signal == "SIGSEGV"
    assert refused(mm, area, 16 * PAGE, MADV_POPULATE_READ) == errno.EFAULT
    verify(mm.host)
    steps()
    mm.madvise(area, 16 * PAGE, MADV_GUARD_REMOVE)
    assert steps() == ["guard"]
    assert mm.read(area + 3 * PAGE, 2 * PAGE) == b"\3" * 8 + bytes(2 * PAGE - 8)


def test_guards_where_nothing_is_mapped_tell_nobody(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, RW)
    mm.madvise(start, 4 * PAGE, MADV_GUARD_INSTALL)
    mm.madvise(start, 4 * PAGE, MADV_GUARD_INSTALL)
    assert steps() == ["guard", "guard"]


def test_a_page_that_comes_back_before_the_guard_goes_again(mm: Mm, area: int, steps: Steps) -> None:
    done: list[str] = []

    def at(label: str) -> None:
        if label == "notifier.range_end.done" and not done:
            done.append(label)
            mm.write(area, b"again")

    with on_point(at):
        mm.madvise(area, 2 * PAGE, MADV_GUARD_INSTALL)
    assert steps() == [
        *("S CLEAR 0-2", "clear 2", "E", "alloc", "set"),
        *("S CLEAR 0-2", "clear 1", "E", "guard", "tlb", "free 3"),
    ]
    verify(mm.host)


def test_guards_stay_until_they_are_unmapped(mm: Mm, area: int, shmem: ShmemFile, steps: Steps) -> None:
    mm.madvise(area, PAGE, MADV_GUARD_INSTALL)
    mm.madvise(area, 16 * PAGE, MADV_DONTNEED)
    mm.mprotect(area, 16 * PAGE, R)
    mm.mprotect(area, 16 * PAGE, RW)
    child = mm.fork()
    grandchild = child.fork()
    assert entry(mm, area) == entry(child, area) == entry(grandchild, area) == GUARD
    mm.mremap(area, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, area + 64 * PAGE)
    assert (entry(mm, area), entry(mm, area + 64 * PAGE)) == (0, GUARD)
    verify(mm.host)
    steps()
    mm.munmap(area + 64 * PAGE, PAGE)
    assert mm.pgd.present == 0
    assert "tlb" not in steps()
    child.exit()
    grandchild.exit()


def test_guards_over_a_file_outlive_its_truncation(mm: Mm, shmem: ShmemFile) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem)
    mm.write(start, b"x" * 2 * PAGE)
    mm.madvise(start, PAGE, MADV_GUARD_INSTALL)
    shmem.truncate(0)
    shmem.truncate(16 * PAGE)
    assert entry(mm, start) == GUARD
    assert mm.read(start + PAGE, 1) == b"\0"
    verify(mm.host)


# ---- errors


@pytest.mark.parametrize(
    "advice",
    [
        *(MADV_COLD, MADV_FREE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE),
        *(MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_WILLNEED),
    ],
)
def test_a_hole(mm: Mm, area: int, steps: Steps, advice: int) -> None:
    assert refused(mm, area, 17 * PAGE, advice) == errno.ENOMEM
    assert refused(mm, area + 1, PAGE, advice) == errno.EINVAL
    assert steps() == []
    mm.madvise(area, 0, advice)
    assert steps() == []
    assert refused(mm, TASK_SIZE, PAGE, advice) == errno.ENOMEM
