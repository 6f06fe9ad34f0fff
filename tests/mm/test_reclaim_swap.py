"""Swap under pressure: full, broken, taken away; pages that KSM merged; nothing is ever lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mm.pressure import PAGE, RW, anonymous, check, fill, swap_of
from xipvm.errors import MmError, SwapFileError
from xipvm.mmu.frames import PG_DIRTY, PG_KSM, PG_SWAPCACHE, HostMemory
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_MERGEABLE, MADV_PAGEOUT, MADV_UNMERGEABLE
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import EXCLUSIVE, MAPPED, SWAP, pte_pfn
from xipvm.mmu.reclaim import Reclaim, watch_memory
from xipvm.mmu.swap import SwapArea, temporary_file
from xipvm.mmu.swap_file import SwapOption, open_swap, parse_swap
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace


@pytest.fixture
def reclaim(host: HostMemory, trace: Trace) -> Iterator[Reclaim]:
    yield watch_memory(host, trace)
    verify(host)


def entry(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva >> 12)


class Broken:
    """Makes reads or writes of swap fail with ``error`` while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, error: int) -> None:
        self.on = True
        self.tried = 0
        real = getattr(os, call)

        def fails(*arguments: object) -> object:
            self.tried += 1
            if self.on:
                raise OSError(error, os.strerror(error))
            return real(*arguments)

        monkeypatch.setattr(f"xipvm.mmu.swap.os.{call}", fails)


# ---- full


def test_a_full_swap_is_no_loss(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    """What fits neither in memory nor in swap is refused; all that was written is there."""
    mm.oom_score_adj = -1000
    mm.swapon(100)
    start = mm.mmap(600 * PAGE, RW)
    written = 0
    error = 0
    for written in range(600):
        try:
            mm.write(start + written * PAGE, written.to_bytes(4, "little"))
        except MmError as failed:
            error = failed.errno
            break
    assert error == errno.ENOMEM
    assert swap_of(mm).used == 100
    assert written == 100 + host.nr_frames - 1 - reclaim.marks.min
    verify(host)
    mm.swapon(100)
    for page in range(written):
        assert mm.read(start + page * PAGE, 4) == page.to_bytes(4, "little")
    mm.munmap(start, 600 * PAGE)
    anonymous(mm, 300)


def test_pages_in_memory_give_their_slots_up_when_swap_is_nearly_full(
    mm: Mm, host: HostMemory, reclaim: Reclaim
) -> None:
    """So all of swap is for pages that are not in memory: 200 and 120 pages hold 310."""
    mm.swapon(120)
    start = anonymous(mm, 310)
    for _ in range(3):
        check(mm, start, 310)
    assert reclaim.kills == 0


# ---- broken


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_pages_that_cannot_be_written_stay(
    mm: Mm, host: HostMemory, reclaim: Reclaim, events: list[Event], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    mm.swapon(512)
    start = anonymous(mm, 200)
    broken = Broken(monkeypatch, "pwrite", error)
    reclaim.lru.shrink_inactive(200, False)
    reclaim.lru.shrink_inactive(50, False)
    assert broken.tried == swap_of(mm).errors == 50
    assert {event.fields["errno"] for event in events if event.kind == "swap_error"} == {error}
    verify(host)
    held = [pfn for pfn in swap_of(mm).slots if host.flags(pfn) & PG_DIRTY and not host.mapcount(pfn)]
    assert len(held) == 50  # unmapped, in the swap cache, and dirty
    check(mm, start, 30)  # comes from there
    verify(host)
    broken.on = False
    assert reclaim.lru.shrink_inactive(200, False) > 0  # and the others are written now
    check(mm, start, 200)


def test_nothing_but_broken_swap_is_out_of_memory(
    mm: Mm, host: HostMemory, reclaim: Reclaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    mm.oom_score_adj = -1000
    mm.swapon(512)
    broken = Broken(monkeypatch, "pwrite", errno.EIO)
    start = mm.mmap(400 * PAGE, RW)
    with pytest.raises(MmError) as error:
        fill(mm, start, 400)
    assert error.value.errno == errno.ENOMEM
    verify(host)
    broken.on = False
    fill(mm, start, 400)
    check(mm, start, 400)


def test_a_page_that_cannot_be_read_is_a_sigbus(
    mm: Mm, host: HostMemory, reclaim: Reclaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who needs it, as often as it is tried; no frame is lost, and the page is there when the disk is."""
    mm.swapon(512)
    start = anonymous(mm, 4)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    free = host.free_frames
    broken = Broken(monkeypatch, "pread", errno.EIO)
    with pytest.raises(MmError) as error:
        mm.read(start, 1)
    assert error.value.errno == errno.EFAULT
    with pytest.raises(HostAccessError, match="SIGBUS"):
        HostThread(mm).load(start, 1)
    assert host.free_frames == free
    assert entry(mm, start) & SWAP
    broken.on = False
    check(mm, start, 4)


def test_a_swap_file_that_was_cut_short(mm: Mm, reclaim: Reclaim) -> None:
    mm.swapon(8)
    start = anonymous(mm, 4)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    os.ftruncate(swap_of(mm).areas[0].fd, 3 * PAGE + 100)
    check(mm, start, 3)
    with pytest.raises(MmError) as error:
        mm.read(start + 3 * PAGE, 1)
    assert error.value.errno == errno.EFAULT


def test_memory_files_survive_a_broken_swap(
    mm: Mm, host: HostMemory, trace: Trace, reclaim: Reclaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    mm.swapon(64)
    file = ShmemFile(host, trace, "shmem", 8 * PAGE)
    start = mm.mmap(8 * PAGE, RW, MAP_SHARED, file=file)
    fill(mm, start, 8)
    with monkeypatch.context() as patch:
        Broken(patch, "pwrite", errno.ENOSPC)
        mm.madvise(start, 8 * PAGE, MADV_PAGEOUT)
        assert not file.swapped
        assert not swap_of(mm).counts
    assert reclaim.lru.shrink_inactive(8, False) == 8
    assert len(file.swapped) == 8
    verify(host)
    with monkeypatch.context() as patch:
        Broken(patch, "pread", errno.EIO)
        with pytest.raises(MmError) as error:
            mm.read(start, 1)
        assert error.value.errno == errno.EFAULT
        verify(host)
    check(mm, start, 8)


# ---- swapoff


def test_swapoff_when_not_all_fits(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    mm.swapon(512)
    start = anonymous(mm, 400)
    with pytest.raises(MmError) as error:
        mm.swapoff()
    assert error.value.errno == errno.ENOMEM
    assert reclaim.kills == 0  # who wants swap to end is told no; nobody is killed for it
    verify(host)
    check(mm, start, 400)
    mm.munmap(start + 200 * PAGE, 200 * PAGE)
    mm.swapoff()
    assert not swap_of(mm).areas
    check(mm, start, 200)


def test_swapoff_may_use_other_swap(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    mm.swapon(512)
    start = anonymous(mm, 400)
    mm.swapon(512)
    anonymous(mm, 300, salt=1)
    mm.swapoff()
    assert len(swap_of(mm).areas) == 1
    verify(host)
    check(mm, start, 400)


def test_swapoff_that_cannot_read(mm: Mm, host: HostMemory, reclaim: Reclaim, monkeypatch: pytest.MonkeyPatch) -> None:
    mm.swapon(64)
    start = anonymous(mm, 4)
    mm.madvise(start, 4 * PAGE, MADV_PAGEOUT)
    with monkeypatch.context() as patch:
        Broken(patch, "pread", errno.EIO)
        with pytest.raises(MmError) as error:
            mm.swapoff()
        assert error.value.errno == errno.EIO
    check(mm, start, 4)
    mm.swapoff()
    check(mm, start, 4)


# ---- pages that KSM merged


@pytest.fixture
def merged(mm: Mm, host: HostMemory, reclaim: Reclaim) -> int:
    """8 pages of two contents, each merged into one page."""
    mm.swapon(64)
    start = mm.mmap(8 * PAGE, RW)
    for page in range(8):
        mm.write(start + page * PAGE, bytes([1 + page % 2]) * 64)
    mm.madvise(start, 8 * PAGE, MADV_MERGEABLE)
    assert mm.ksm_scan() == 6
    return start


def content(mm: Mm, start: int, pages: int = 8) -> list[int]:
    return [mm.read(start + page * PAGE, 1)[0] for page in range(pages)]


def test_merged_pages_go_to_swap_and_come_back_as_copies(
    mm: Mm, host: HostMemory, reclaim: Reclaim, merged: int
) -> None:
    reclaim.lru.shrink_inactive(2, False)  # several entries were used: they are active
    reclaim.lru.shrink_active(2, False)
    assert reclaim.lru.shrink_inactive(2, False) == 2
    assert all(entry(mm, merged + page * PAGE) & SWAP for page in range(8))
    assert swap_of(mm).used == 2  # one slot for all places of a page
    verify(host)
    assert content(mm, merged) == [1, 2] * 4
    assert len({pte_pfn(entry(mm, merged + page * PAGE)) for page in range(8)}) == 8
    verify(host)
    mm.write(merged, b"\x07")
    assert content(mm, merged) == [7, 2, 1, 2, 1, 2, 1, 2]
    assert mm.ksm_scan() == 4  # merges them again, but the one that has a slot


def test_a_merged_page_that_is_still_in_the_cache_is_mapped_again(
    mm: Mm, host: HostMemory, reclaim: Reclaim, merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pfn = pte_pfn(entry(mm, merged))
    with monkeypatch.context() as patch:
        Broken(patch, "pwrite", errno.EIO)
        for _ in range(3):
            reclaim.lru.shrink_active(2, False)
            reclaim.lru.shrink_inactive(2, False)
        assert entry(mm, merged) & SWAP
        assert host.flags(pfn) & PG_KSM
        assert host.flags(pfn) & PG_SWAPCACHE
    assert content(mm, merged) == [1, 2] * 4
    assert pte_pfn(entry(mm, merged)) == pte_pfn(entry(mm, merged + 2 * PAGE)) == pfn
    verify(host)
    mm.write(merged, b"\x07")
    assert content(mm, merged) == [7, 2, 1, 2, 1, 2, 1, 2]
    mm.madvise(merged, 8 * PAGE, MADV_UNMERGEABLE)
    verify(host)
    assert content(mm, merged) == [7, 2, 1, 2, 1, 2, 1, 2]


def test_a_merged_page_after_fork(mm: Mm, host: HostMemory, reclaim: Reclaim, merged: int) -> None:
    child = mm.fork()
    for _ in range(3):
        reclaim.lru.shrink_active(2, False)
        reclaim.lru.shrink_inactive(2, False)
    assert entry(child, merged) & SWAP
    child.write(merged, b"\x09")
    mm.write(merged, b"\x08")
    verify(host)
    assert content(child, merged) == [9, 2, 1, 2, 1, 2, 1, 2]
    assert content(mm, merged) == [8, 2, 1, 2, 1, 2, 1, 2]
    assert entry(child, merged) & MAPPED
    assert entry(child, merged) & EXCLUSIVE
    child.exit()


# ---- what a person can name


def test_options() -> None:
    assert parse_swap("128M") == SwapOption(None, 128 << 20)
    assert parse_swap("swap.img") == SwapOption("swap.img", None)
    assert parse_swap("a,,b,size=8K") == SwapOption("a,b", 8192)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no swap is named"),
        (",size=1M", "no swap is named"),
        ("0", "give 8 KiB to 1 TiB"),
        ("4K", "give 8 KiB to 1 TiB"),
        ("8193", "whole pages"),
        ("2T", "give 8 KiB to 1 TiB"),
        ("f,size=x", "'x' is not a size"),
        ("f,size=", "'' is not a size"),
        ("f,size=0", "give 8 KiB"),
        ("f,bank=1", "'bank=1' is no setting of a swap file"),
        ("128M,size=1K", "give 8 KiB"),
    ],
)
def test_bad_options(text: str, what: str) -> None:
    with pytest.raises(SwapFileError, match=what):
        parse_swap(text)


def test_a_swap_file_is_one_for_others_too(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    area = open_swap(SwapOption(str(path), 64 << 10))
    assert (area.pages, area.start) == (15, PAGE)
    assert path.stat().st_blocks * 512 >= 64 << 10  # no holes
    assert path.stat().st_mode & 0o777 == 0o600
    header = path.read_bytes()[:PAGE]
    assert header[-10:] == b"SWAPSPACE2"
    assert header[1024:1036] == (1).to_bytes(4, "little") + (15).to_bytes(4, "little") + bytes(4)
    with pytest.raises(SwapFileError, match="in use by another run"):
        open_swap(SwapOption(str(path), None))
    area.close()
    again = open_swap(SwapOption(str(path), None))
    assert again.pages == 15
    again.close()
    grown = open_swap(SwapOption(str(path), 128 << 10))
    assert grown.pages == 31
    grown.close()


def test_files_that_are_no_swap_files_are_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_bytes(b"dear" * 5000)
    for size in (None, 1 << 20):
        with pytest.raises(SwapFileError, match="is not a swap file, and has content"):
            open_swap(SwapOption(str(letter), size))
    assert letter.read_bytes() == b"dear" * 5000
    with pytest.raises(SwapFileError, match="there is no such swap file"):
        open_swap(SwapOption(str(tmp_path / "none"), None))
    assert not (tmp_path / "none").exists()
    with pytest.raises(SwapFileError):
        open_swap(SwapOption(str(tmp_path), None))
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(SwapFileError, match="give 8 KiB"):
        open_swap(SwapOption(str(empty), None))


def test_a_swap_file_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    open_swap(SwapOption(str(old), 64 << 10)).close()
    before = old.read_bytes()
    empty, new = tmp_path / "empty", tmp_path / "new"
    empty.touch()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for path in (old, empty, new):
            with pytest.raises(SwapFileError, match="No space left on device"):
                open_swap(SwapOption(str(path), 1 << 20))
    assert (old.read_bytes(), empty.read_bytes(), new.exists()) == (before, b"", False)
    for path in (old, empty, new):  # with room they are
        area = open_swap(SwapOption(str(path), 1 << 20))
        assert area.pages == 255
        area.close()


def test_pages_lie_behind_the_header(mm: Mm, reclaim: Reclaim, tmp_path: Path) -> None:
    path = tmp_path / "swap"
    swap_of_host = open_swap(SwapOption(str(path), 16 * PAGE))
    mm.swapon(8)
    swap_of(mm).areas[0].closing = True
    swap_of(mm).add_area(swap_of_host)
    start = anonymous(mm, 2)
    mm.madvise(start, 2 * PAGE, MADV_PAGEOUT)
    content = path.read_bytes()
    assert content[PAGE - 10 : PAGE] == b"SWAPSPACE2"
    assert content[2 * PAGE : 2 * PAGE + 8] == mm.read(start + PAGE, 8)


def test_a_temporary_file_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    areas = [SwapArea(temporary_file(), 1)]
    monkeypatch.setattr("xipvm.mmu.swap.os.O_TMPFILE", os.O_DIRECTORY)  # a file system that does not know it
    areas.append(SwapArea(temporary_file(), 1))
    assert not list(tmp_path.iterdir())
    for area in areas:
        assert os.pwrite(area.fd, b"x", 0) == 1
        area.close()
