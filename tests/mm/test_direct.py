"""Between page cache and disk: writing past the cache, giving cached pages back, msync's flags."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.mm import MS_ASYNC, MS_INVALIDATE, MS_SYNC, Mm
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.trace.funnel import Trace

R, RW = 1, 3
PAGE = 4096
Steps = Callable[[], list[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(16)))
    return path


@pytest.fixture
def disk(host: HostMemory, trace: Trace, path: Path) -> HostFile:
    return HostFile(host, trace, str(path), writable=True)


def test_mappings_read_what_was_written_directly(mm: Mm, disk: HostFile, path: Path, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, R, MAP_SHARED, file=disk)
    thread = HostThread(mm)
    assert thread.load(start + PAGE, 1) == b"\1"
    steps()
    disk.direct_write(PAGE, b"new!" * 1024)
    assert steps() == ["S CLEAR 1-2", "clear 1", "E", "tlb", "free 1"]
    assert thread.load(start + PAGE, 4) == b"new!"
    assert path.read_bytes()[PAGE - 1 : PAGE + 4] == b"\0new!"
    assert path.stat().st_size == 16 * PAGE


def test_a_page_that_nobody_maps_is_told_nobody(mm: Mm, disk: HostFile, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, R, MAP_SHARED, file=disk)
    disk.readahead(0, 4)
    steps()
    disk.direct_write(PAGE, bytes(PAGE))
    assert steps() == ["free 1"]
    assert mm.read(start + PAGE, 2) == b"\0\0"


def test_what_was_dirty_around_a_block_is_kept(mm: Mm, disk: HostFile, path: Path) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=disk)
    mm.write(start + PAGE, b"dirty")
    disk.direct_write(PAGE + 512, b"block..." * 64)
    assert mm.read(start + PAGE, 5) == b"dirty"
    assert mm.read(start + PAGE + 512, 8) == b"block..."
    assert path.read_bytes()[PAGE : PAGE + 5] == b"dirty"


def test_private_copies_stay(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=disk)
    mm.write(start + PAGE, b"mine")
    disk.direct_write(PAGE, bytes(PAGE))
    assert mm.read(start + PAGE, 4) == b"mine"


def test_a_fault_in_between_does_not_keep_the_old_data(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(4 * PAGE, R, MAP_SHARED, file=disk)
    seen: list[bytes] = []

    def hook(label: str) -> None:
        if label == "mm.file.direct_write":
            seen.append(mm.read(start + PAGE, 1))

    with on_point(hook):
        disk.direct_write(PAGE, b"\7" * PAGE)
    assert seen == [b"\1"]
    assert mm.read(start + PAGE, 1) == b"\7"


def test_a_store_in_between_goes_before_the_write(mm: Mm, disk: HostFile, path: Path) -> None:
    """It hits the page while it is being unmapped; its block is not the one that is written."""
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=disk)
    thread = HostThread(mm)
    thread.store(start + PAGE, b"a")
    stored: list[str] = []

    def hook(label: str) -> None:
        if label == "mm.gather.flushed" and not stored:
            stored.append(label)
            thread.store(start + PAGE, b"late")

    with on_point(hook):
        disk.direct_write(PAGE + 512, bytes(512))
    assert stored
    assert mm.read(start + PAGE, 4) == b"late"
    assert path.read_bytes()[PAGE : PAGE + 4] == b"late"


def test_the_file_grows(mm: Mm, disk: HostFile, path: Path) -> None:
    disk.direct_write(16 * PAGE, b"\7" * 512)
    assert disk.size == path.stat().st_size == 16 * PAGE + 512
    assert disk.pread(16 * PAGE, 1024) == b"\7" * 512


@pytest.mark.parametrize(("offset", "size"), [(1, 512), (512, 511), (-512, 512)])
def test_blocks_are_whole(disk: HostFile, offset: int, size: int) -> None:
    with pytest.raises(MmError) as caught:
        disk.direct_write(offset, bytes(size))
    assert caught.value.errno == errno.EINVAL


def test_dontneed_drops_what_nobody_maps(mm: Mm, disk: HostFile, path: Path, steps: Steps) -> None:
    start = mm.mmap(PAGE, R, MAP_SHARED, file=disk)
    disk.readahead(0, 4)
    assert mm.read(start, 1) == b"\0"
    disk.pwrite(3 * PAGE, b"dirty")
    steps()
    disk.fadvise_dontneed()
    assert steps() == ["free 1"] * 3
    assert list(disk.pages) == [0]
    assert path.read_bytes()[3 * PAGE : 3 * PAGE + 5] == b"dirty"


@pytest.mark.parametrize(("flags", "written"), [(MS_SYNC, True), (MS_ASYNC, False), (MS_INVALIDATE, False), (0, False)])
def test_only_a_synchronous_msync_writes(mm: Mm, disk: HostFile, path: Path, flags: int, written: bool) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=disk)
    mm.write(start, b"dirty")
    mm.msync(start, PAGE, flags)
    assert (path.read_bytes()[:5] == b"dirty") == written


def test_errors_of_msync(mm: Mm, disk: HostFile) -> None:
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=disk)
    mm.mlock(start, PAGE)
    for flags, pages, error in (
        (MS_SYNC | MS_ASYNC, 1, errno.EINVAL),
        (8, 1, errno.EINVAL),
        (MS_INVALIDATE, 1, errno.EBUSY),
        (MS_ASYNC, 5, errno.ENOMEM),
    ):
        with pytest.raises(MmError) as caught:
            mm.msync(start, pages * PAGE, flags)
        assert caught.value.errno == error
