"""File mappings: memory files, host files with dirty tracking, device frames."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import BadInput, MmError
from xipvm.mmu.device_file import DeviceFile
from xipvm.mmu.frames import DEVICE_PFN, PG_DIRTY, HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.tables import GupPage
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.scheduler import Scheduler
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

R, RW, RX = 1, 3, 5
PAGE = 4096
Steps = Callable[[], list[str]]


def mapped(mm: Mm, start: int, pages: int) -> list[int]:
    """Which of the pages have an entry."""
    return [page for page in range(pages) if mm.pgd.get((start >> 12) + page)]


@pytest.fixture
def shmem(host: HostMemory, trace: Trace) -> ShmemFile:
    return ShmemFile(host, trace, "shmem", 16 * PAGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(16)))
    return path


@pytest.fixture
def disk(host: HostMemory, trace: Trace, path: Path) -> HostFile:
    return HostFile(host, trace, str(path), writable=True)


# ---- memory files


def test_shared_pages_are_one_frame(mm: Mm, host: HostMemory, trace: Trace, shmem: ShmemFile) -> None:
    other = Mm(host, trace, name="other")
    one, two = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=shmem), other.mmap(4 * PAGE, R, MAP_SHARED, file=shmem, pgoff=1)
    mm.write(one + PAGE, b"here")
    assert other.read(two, 4) == b"here"
    pfn = mm.get_user_pages(one + PAGE, write=True).pfn
    assert other.get_user_pages(two, write=False) == GupPage(pfn, False)
    assert (host.refcount(pfn), host.mapcount(pfn)) == (3, 2)
    assert shmem.pread(PAGE, 4) == b"here"
    shmem.pwrite(PAGE, b"there")
    assert mm.read(one + PAGE, 5) == b"there"


def test_a_read_of_a_hole_maps_it_writable(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem)
    assert mm.get_user_pages(start + 4 * PAGE, write=False).writable
    mm.write(start + 4 * PAGE, b"x")
    assert steps() == ["alloc", "set"]
    assert mapped(mm, start, 16) == [4]


def test_a_read_maps_the_cached_neighbours_along(mm: Mm, shmem: ShmemFile, host: HostMemory, trace: Trace) -> None:
    shmem.pwrite(0, b"x" * 16 * PAGE)
    start = mm.mmap(10 * PAGE, RW, MAP_SHARED, file=shmem, pgoff=2)
    start_page = start >> 12
    mm.read(start + 5 * PAGE, 1)
    group = [page for page in range(10) if (start_page + page) // 16 == (start_page + 5) // 16]
    assert mapped(mm, start, 10) == group
    assert len(group) > 1
    lone = Mm(host, trace, name="writer")
    start = lone.mmap(10 * PAGE, RW, MAP_SHARED, file=shmem)
    lone.write(start + 5 * PAGE, b"y")
    assert mapped(lone, start, 10) == [5]


def test_private_write_before_read_is_no_news(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    shmem.pwrite(0, b"file")
    start = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=shmem)
    steps()
    mm.write(start + 4, b"!")
    assert steps() == ["alloc", "set"]
    assert mm.read(start, 5) == b"file!"
    assert shmem.pread(0, 5) == b"file\0"


def test_private_write_after_read_is_a_copy(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    shmem.pwrite(0, b"file")
    start = mm.mmap(PAGE, RW, MAP_PRIVATE, file=shmem)
    assert not mm.get_user_pages(start, write=False).writable
    steps()
    mm.write(start, b"mine")
    assert steps() == ["alloc", "S CLEAR 0-1", "clear 1", "tlb", "set", "E"]
    assert shmem.pread(0, 4) == b"file"


def test_dontneed_of_shared_pages_keeps_the_data(mm: Mm, shmem: ShmemFile, host: HostMemory, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=shmem)
    HostThread(mm).store(start, b"data")
    assert not host.flags(shmem.pages[0]) & PG_DIRTY
    steps()
    mm.madvise(start, 4 * PAGE, MADV_DONTNEED)
    assert steps() == ["S CLEAR 0-4", "clear 1", "E", "tlb"]
    assert host.flags(shmem.pages[0]) & PG_DIRTY
    assert mm.read(start, 4) == b"data"


def test_dontneed_of_private_copies_shows_the_file_again(mm: Mm, shmem: ShmemFile) -> None:
    shmem.pwrite(0, b"file")
    start = mm.mmap(PAGE, RW, MAP_PRIVATE, file=shmem)
    mm.write(start, b"mine")
    mm.madvise(start, PAGE, MADV_DONTNEED)
    assert mm.read(start, 4) == b"file"


def test_truncation_unmaps_twice_and_drops_private_copies(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    shmem.pwrite(0, b"x" * 16 * PAGE)
    shared = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem)
    private = mm.mmap(16 * PAGE, RW, MAP_PRIVATE, file=shmem, addr=shared + 100 * PAGE)
    mm.write(shared, b"y" * 16 * PAGE)
    mm.write(private + 8 * PAGE, b"mine")
    steps()
    shmem.truncate(7 * PAGE + 100)
    assert steps() == [
        "S CLEAR 8-16",
        "clear 8",
        "E",
        "tlb",
        "S CLEAR 108-116",
        "clear 1",
        "E",
        "tlb",
        "free 1",
        *["free 1"] * 8,
        "S CLEAR 8-16",
        "E",
        "S CLEAR 108-116",
        "E",
    ]
    for hva in (shared + 8 * PAGE, private + 8 * PAGE):
        with pytest.raises(MmError) as raised:
            mm.read(hva, 1)
        assert raised.value.errno == errno.EFAULT
        with pytest.raises(HostAccessError) as signal:
            HostThread(mm).load(hva, 1)
        assert signal.value.signal == "SIGBUS"
    assert mm.read(shared + 7 * PAGE, 101) == b"y" * 100 + b"\0"
    steps()
    shmem.truncate(16 * PAGE)
    assert steps() == []
    assert mm.read(shared + 8 * PAGE, 8) == bytes(8)


def test_a_punched_hole_keeps_private_copies(mm: Mm, shmem: ShmemFile, steps: Steps) -> None:
    shmem.pwrite(0, b"x" * 16 * PAGE)
    shared = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=shmem)
    private = mm.mmap(16 * PAGE, RW, MAP_PRIVATE, file=shmem, addr=shared + 100 * PAGE)
    mm.write(shared, b"y" * 16 * PAGE)
    mm.write(private + 4 * PAGE, b"mine")
    steps()
    shmem.punch_hole(4, 2)
    assert steps() == ["S CLEAR 4-6", "clear 2", "E", "tlb", "S CLEAR 104-106", "E", "free 1", "free 1"]
    assert mm.read(shared + 4 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert mm.read(private + 4 * PAGE, 4) == b"mine"


def test_every_mapping_in_every_mm_is_unmapped(
    mm: Mm, host: HostMemory, trace: Trace, shmem: ShmemFile, events: list[Event]
) -> None:
    other = Mm(host, trace, name="other")
    mm.read(mm.mmap(4 * PAGE, R, MAP_SHARED, file=shmem), PAGE)
    other.read(other.mmap(4 * PAGE, R, MAP_SHARED, file=shmem), 2 * PAGE)
    child = other.fork("child")
    child.read(child.vmas[0].start, PAGE)
    events.clear()
    unmap_mapping_range(shmem, 0, 1)
    cleared = [(event.fields["mm"], event.fields["pages"]) for event in events if event.kind == "pte_clear"]
    assert cleared == [(name, [(shmem.pages[0], 1)]) for name in ("mm0", "other", "child")]
    assert host.mapcount(shmem.pages[0]) == 0
    assert host.mapcount(shmem.pages[1]) == 2


def test_pages_of_a_closed_file_go_with_the_last_mapping(mm: Mm, shmem: ShmemFile, host: HostMemory) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=shmem)
    mm.write(start, b"x" * 4 * PAGE)
    shmem.close()
    assert mm.read(start, 1) == b"x"
    mm.munmap(start, 2 * PAGE)
    assert len(shmem.pages) == 4
    mm.munmap(start, 4 * PAGE)
    assert shmem.pages == {}
    assert host.free_frames == host.nr_frames - 1


def test_pread_and_pwrite_around_the_end(shmem: ShmemFile) -> None:
    shmem.truncate(10)
    shmem.pwrite(PAGE - 2, b"four")
    assert shmem.size == PAGE + 2
    assert shmem.pread(PAGE - 4, 100) == b"\0\0four"
    assert shmem.pread(2 * PAGE, 1) == b""


# ---- host files


def test_a_host_file_is_read_on_demand(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(16 * PAGE, R, MAP_SHARED, file=disk)
    assert mm.read(start + 3 * PAGE, 2) == b"\3\3"
    assert list(disk.pages) == [3]
    disk.readahead(14, 10)
    assert list(disk.pages) == [3, 14, 15]
    with pytest.raises(MmError):
        mm.read(mm.mmap(PAGE, R, MAP_SHARED, file=disk, pgoff=16), 1)


def test_clean_pages_are_read_only_until_the_first_write(mm: Mm, disk: HostFile, host: HostMemory) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    page = mm.get_user_pages(start, write=False)
    assert not page.writable
    assert not host.flags(page.pfn) & PG_DIRTY
    assert mm.get_user_pages(start, write=True) == GupPage(page.pfn, True)
    assert host.flags(page.pfn) & PG_DIRTY


def test_write_back(mm: Mm, disk: HostFile, path: Path, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    thread = HostThread(mm)
    for page in (4, 6):
        thread.store(start + page * PAGE, b"new")
    mm.read(start + 8 * PAGE, 1)
    steps()
    assert path.read_bytes()[4 * PAGE] == 4
    assert disk.fsync() == 2
    once = ["clear 1", "tlb", "set", "E"]
    assert steps() == ["S PROTECTION_PAGE 4-5", *once, "S PROTECTION_PAGE 6-7", *once]
    assert path.read_bytes()[4 * PAGE : 4 * PAGE + 4] == b"new\4"
    assert disk.fsync() == 0
    assert steps() == []
    assert not mm.get_user_pages(start + 4 * PAGE, write=False).writable
    thread.store(start + 4 * PAGE, b"again")
    assert disk.fsync() == 1


def test_write_back_of_a_part(mm: Mm, disk: HostFile, path: Path) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    mm.write(start, b"x" * 16 * PAGE)
    mm.msync(start + 4 * PAGE, 2 * PAGE)
    assert [path.read_bytes()[page * PAGE] == ord("x") for page in range(16)] == [page in (4, 5) for page in range(16)]
    with pytest.raises(MmError) as raised:
        mm.msync(start, 17 * PAGE)
    assert raised.value.errno == errno.ENOMEM


def test_a_store_during_write_back_is_not_lost(mm: Mm, disk: HostFile, path: Path) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    thread = HostThread(mm)
    thread.store(start, b"first")
    with on_point(lambda label: thread.store(start, b"later") if label == "notifier.range_start.done" else None):
        disk.fsync()
    disk.fsync()
    assert path.read_bytes()[:5] == b"later"


def test_private_pages_are_not_written_back(mm: Mm, disk: HostFile, path: Path) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_PRIVATE, file=disk)
    mm.read(start, 1)
    mm.write(start, b"mine")
    assert disk.fsync() == 0
    assert path.read_bytes()[0] == 0


def test_mprotect_gives_dirty_pages_their_right_back(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    mm.write(start, b"x")
    mm.read(start + PAGE, 1)
    mm.mprotect(start, 16 * PAGE, R)
    mm.mprotect(start, 16 * PAGE, RW)
    assert mm.get_user_pages(start, write=False).writable
    assert not mm.get_user_pages(start + PAGE, write=False).writable


def test_truncating_a_host_file(mm: Mm, disk: HostFile, path: Path) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    mm.write(start, b"x" * 16 * PAGE)
    disk.truncate(PAGE + 10)
    disk.fsync()
    assert path.read_bytes() == b"x" * (PAGE + 10)
    disk.truncate(2 * PAGE)
    assert mm.read(start + PAGE, PAGE) == b"x" * 10 + bytes(PAGE - 10)


def test_a_host_file_that_cannot_be_truncated_stays_as_it_is(
    mm: Mm, disk: HostFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = mm.mmap(16 * PAGE, R, MAP_SHARED, file=disk)
    mm.read(start, 16 * PAGE)

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(MmError) as raised:
        disk.truncate(1 << 70)
    assert raised.value.errno == errno.EFBIG
    monkeypatch.setattr("os.ftruncate", full)
    with pytest.raises(MmError) as raised:
        disk.truncate(PAGE)
    assert raised.value.errno == errno.ENOSPC
    assert (disk.size, path.stat().st_size) == (16 * PAGE, 16 * PAGE)
    assert len(mapped(mm, start, 16)) == 16


def test_a_truncation_waits_for_who_writes_the_file(disk: HostFile, path: Path, trace: Trace) -> None:
    scheduler = Scheduler(lambda n, label: int(label == "mm.file.direct_write"), trace=trace)
    scheduler.spawn("write", lambda: disk.direct_write(0, bytes(PAGE)))
    scheduler.spawn("truncate", lambda: disk.truncate(0))
    scheduler.run()
    assert (disk.size, path.stat().st_size) == (0, 0)


def test_a_hole_in_a_host_file(disk: HostFile, path: Path) -> None:
    disk.punch_hole(15, 4)
    assert path.read_bytes()[14 * PAGE :] == b"\x0e" * PAGE + bytes(PAGE)


def test_closing_writes_what_is_dirty(mm: Mm, disk: HostFile, path: Path, host: HostMemory) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)
    HostThread(mm).store(start, b"new")
    disk.close()
    mm.exit()
    assert path.read_bytes()[:3] == b"new"
    assert host.free_frames == host.nr_frames - 1


def test_a_page_that_is_truncated_while_it_is_read_in(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(16 * PAGE, R, MAP_SHARED, file=disk)

    def at(label: str) -> None:
        if label == "mm.file.read" and disk.size:
            disk.truncate(0)

    with on_point(at), pytest.raises(MmError):
        mm.read(start + 4 * PAGE, 1)
    assert disk.pages == {}


def test_a_page_that_is_truncated_before_its_first_write(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(16 * PAGE, RW, MAP_SHARED, file=disk)

    def at(label: str) -> None:
        if label == "mm.file.page_mkwrite" and disk.size:
            disk.truncate(0)

    for cached in (False, True):
        if cached:
            disk.truncate(16 * PAGE)
            mm.read(start, 1)
        with on_point(at), pytest.raises(MmError):
            mm.write(start, b"x")
        assert mapped(mm, start, 16) == []


def test_an_area_that_goes_while_its_page_is_read_in(mm: Mm, disk: HostFile, host: HostMemory) -> None:
    for flags, write in ((MAP_SHARED, False), (MAP_SHARED, True), (MAP_PRIVATE, True)):
        start = mm.mmap(16 * PAGE, RW, flags, file=disk)

        def at(label: str, start: int = start) -> None:
            if label == "mm.file.read" and mm.vmas:
                mm.munmap(start, 16 * PAGE)

        with on_point(at), pytest.raises(MmError):
            mm.get_user_pages(start, write=write)
        disk.truncate(0)
        disk.truncate(16 * PAGE)
        assert host.free_frames == host.nr_frames - 1


def test_a_file_that_cannot_be_opened(host: HostMemory, trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        HostFile(host, trace, str(tmp_path / "none"))


# ---- device frames


class Flash:
    """Two pages of somebody's memory as device frames."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self.array = ctypes.create_string_buffer(3 * PAGE)
        address = (ctypes.addressof(self.array) + PAGE - 1) & -PAGE
        self.readable = True
        first = host.add_device(address, 2 * PAGE, self.array)
        self.file = DeviceFile(host, trace, "flash", first, 2, ready=lambda: self.readable)


@pytest.fixture
def flash(host: HostMemory, trace: Trace) -> Flash:
    return Flash(host, trace)


def test_device_frames_are_mapped_themselves(mm: Mm, host: HostMemory, flash: Flash) -> None:
    start = mm.mmap(2 * PAGE, RX, MAP_SHARED, file=flash.file)
    host.write(DEVICE_PFN + 1, 0, b"cells")
    assert mm.get_user_pages(start + PAGE, write=False) == GupPage(DEVICE_PFN + 1, False)
    assert mm.read(start + PAGE, 5) == b"cells"
    with pytest.raises(MmError):
        mm.get_user_pages(start, write=True)
    with pytest.raises(MmError):
        mm.mmap(PAGE, RW, MAP_SHARED, file=flash.file)
    with pytest.raises(MmError):
        mm.read(mm.mmap(PAGE, R, MAP_SHARED, file=flash.file, pgoff=2), 1)


def test_a_device_that_is_not_ready(mm: Mm, flash: Flash, steps: Steps) -> None:
    start = mm.mmap(2 * PAGE, RX, MAP_SHARED, file=flash.file)
    mm.read(start, 2 * PAGE)
    steps()
    flash.readable = False
    flash.file.unmap()
    assert steps() == ["S CLEAR 0-2", "clear 2", "E", "tlb"]
    with pytest.raises(MmError) as raised:
        mm.get_user_pages(start, write=False)
    assert raised.value.errno == errno.EFAULT
    with pytest.raises(HostAccessError) as signal:
        HostThread(mm).load(start, 1)
    assert signal.value.signal == "SIGBUS"
    flash.readable = True
    assert mm.read(start, 1) == b"\0"
    flash.file.unmap(1, 1)
    assert mapped(mm, start, 2) == [0]


def test_a_private_copy_of_device_frames(mm: Mm, host: HostMemory, flash: Flash, steps: Steps) -> None:
    host.write(DEVICE_PFN, 0, b"cells")
    start = mm.mmap(2 * PAGE, RW, MAP_PRIVATE, file=flash.file)
    mm.read(start, 1)
    steps()
    mm.write(start + 5, b"!")
    assert steps() == ["alloc", "S CLEAR 0-1", "clear 1", "tlb", "set", "E"]
    assert (mm.read(start, 6), host.read(DEVICE_PFN, 0, 6)) == (b"cells!", b"cells\0")
    flash.readable = False
    flash.file.unmap()
    assert mm.read(start, 6) == b"cells!"


def test_fork_copies_entries_of_device_frames(mm: Mm, flash: Flash, steps: Steps) -> None:
    shared = mm.mmap(2 * PAGE, R, MAP_SHARED, file=flash.file)
    mm.read(shared, 1)
    steps()
    child = mm.fork()
    assert steps() == ["copy", "tlb"]
    assert mapped(child, shared, 2) == [0]
