"""Huge pages of the pool: reservations, faults, what every operation announces, and what it refuses."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.frames import PG_HUGETLB, PG_LRU, HostMemory
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.madvise import (
    MADV_COLD,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MADV_REMOVE,
    MADV_WILLNEED,
)
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ANON, EXCLUSIVE, HUGE, WRITE, pte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGE_2MB,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    VM_LOCKED,
)
from xipvm.trace.funnel import Trace

RW = PROT_READ | PROT_WRITE
ANONYMOUS = MAP_ANONYMOUS | MAP_HUGETLB
PRIVATE = MAP_PRIVATE | ANONYMOUS
SHARED = MAP_SHARED | ANONYMOUS
H = HPAGE_SIZE
PLACE = 16 << 30
Steps = Callable[[], list[str]]


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(10 * H, poison="head")
    host.reserve_huge_pages(6)
    yield host
    verify(host)


def counts(host: HostMemory) -> tuple[int, int]:
    """(free, reserved)"""
    return host.free_huge_pages, host.reserved_huge_pages


def mapped(mm: Mm, pages: int = 2, flags: int = PRIVATE, addr: int = PLACE) -> int:
    """An area of huge pages that have been written to."""
    start = mm.mmap(pages * H, RW, flags | MAP_FIXED, addr=addr)
    for page in range(pages):
        mm.write(start + page * H, bytes([page + 1]))
    return start


def fails(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(MmError) as caught:
        call()
    assert caught.value.errno == number, caught.value


# ---- the pool


def test_the_pool_takes_frames_and_gives_them_back() -> None:
    host = HostMemory(4 * H)
    free = host.free_frames
    host.reserve_huge_pages(2)
    assert (host.huge_pages, *counts(host), host.free_frames) == (2, 2, 0, free - 1024)
    with pytest.raises(OutOfFrames):
        host.reserve_huge_pages(2)
    assert (host.huge_pages, *counts(host), host.free_frames) == (2, 2, 0, free - 1024)
    verify(host)
    host.unreserve_huge_pages(2)
    assert (host.huge_pages, host.free_frames) == (0, free)
    fails(errno.EBUSY, lambda: host.unreserve_huge_pages(1))


def test_a_page_of_the_pool_goes_back_to_it(host: HostMemory) -> None:
    free = host.free_frames
    pfn = host.alloc_huge_page()
    assert pfn % 512 == 0
    assert host.flags(pfn) & PG_HUGETLB
    host.set_rmap(pfn, 1, 0)
    assert not host.flags(pfn) & PG_LRU
    host.get(pfn + 7)
    assert host.put_page(pfn + 3) == []
    assert host.put_page(pfn) == [(pfn, 512)]
    assert (counts(host), host.free_frames) == ((6, 0), free)
    assert host.alloc_huge_page() == pfn
    assert host.read(pfn + 9, 0, 4096) == bytes(4096)
    host.put(pfn)


def test_small_pages_are_never_taken_out_of_the_pool(host: HostMemory) -> None:
    taken = [host.alloc(False) for _ in range(host.free_frames)]
    with pytest.raises(OutOfFrames):
        host.alloc(False)
    assert counts(host) == (6, 0)
    for pfn in taken:
        host.put(pfn)


def test_what_is_promised_cannot_leave_the_pool(host: HostMemory, mm: Mm) -> None:
    mm.mmap(4 * H, RW, PRIVATE)
    fails(errno.EBUSY, lambda: host.unreserve_huge_pages(3))
    assert host.huge_pages == 6
    host.unreserve_huge_pages(2)
    assert counts(host) == (4, 4)


# ---- mmap


def test_mmap_sets_pages_aside_and_munmap_gives_them_back(host: HostMemory, mm: Mm) -> None:
    start = mm.mmap(2 * H + 1, RW, PRIVATE)  # rounded up
    assert start % H == 0
    assert mm.vmas[0].end - start == 3 * H
    assert counts(host) == (6, 3)
    mm.write(start + H, b"x")
    assert counts(host) == (5, 2)
    mm.munmap(start, 3 * H)
    assert counts(host) == (6, 0)


def test_mmap_fails_when_the_pool_has_not_enough(host: HostMemory, mm: Mm) -> None:
    start = mapped(mm, 4)
    fails(errno.ENOMEM, lambda: mm.mmap(3 * H, RW, PRIVATE))
    fails(errno.ENOMEM, lambda: mm.mmap(3 * H, RW, SHARED))
    # What is mapped there and would be replaced does not help, and stays.
    fails(errno.ENOMEM, lambda: mm.mmap(4 * H, RW, PRIVATE | MAP_FIXED, addr=start))
    assert mm.read(start + 3 * H, 1) == b"\x04"
    assert counts(host) == (2, 0)
    for flags in (PRIVATE, SHARED):
        fails(errno.ENOMEM, lambda flags=flags: mm.mmap(1 << 46, RW, flags))
    assert counts(host) == (2, 0)
    mm.mmap(9 * H, RW, PRIVATE | MAP_NORESERVE)
    mm.mmap(1 << 45, RW, SHARED | MAP_NORESERVE)
    assert counts(host) == (2, 0)


def test_mmap_refuses_what_has_no_huge_pages(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge", 4 * H)
    small = ShmemFile(host, trace, "small", 4 * H)
    for call in (
        lambda: mm.mmap(H, RW, PRIVATE | MAP_FIXED, addr=PLACE + 4096),
        lambda: mm.mmap(H, RW, MAP_SHARED | MAP_FIXED, addr=PLACE + 4096, file=file),
        lambda: mm.mmap(H, RW, MAP_SHARED, file=file, pgoff=1),
        lambda: mm.mmap(H, RW, MAP_SHARED | MAP_HUGETLB, file=small),
        lambda: mm.mmap(0, RW, PRIVATE),
        lambda: mm.mmap(-H, RW, PRIVATE),
        lambda: mm.mmap(H, RW, PRIVATE | 30 << 26),  # MAP_HUGE_1GB
        lambda: HugetlbFile(host, trace, "odd", 4096),
    ):
        fails(errno.EINVAL, call)
    fails(errno.EBADF, lambda: mm.mmap(H, RW, MAP_PRIVATE | MAP_HUGETLB))
    assert not mm.vmas
    assert counts(host) == (6, 0)
    assert mm.mmap(H, RW, MAP_SHARED, file=file, addr=PLACE + 4096) == PLACE + H
    mm.munmap(mm.mmap(H, RW, PRIVATE | MAP_HUGE_2MB), H)
    small.close()


def test_areas_of_huge_pages_are_never_merged(mm: Mm) -> None:
    start = mapped(mm, 3)
    mm.mprotect(start + H, H, PROT_READ)
    mm.mprotect(start + H, H, RW)
    assert len(mm.vmas) == 3
    mm.mmap(H, RW, PRIVATE | MAP_FIXED, addr=start + 3 * H)
    assert len(mm.vmas) == 4


# ---- faults


def test_a_read_takes_a_page_and_a_write_reuses_it(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mm.mmap(2 * H, RW, PRIVATE)
    assert mm.read(start + H - 8, 16) == bytes(16)
    entry = mm.pgd.get(start >> 12)
    assert entry & HUGE
    assert entry & ANON
    assert not entry & WRITE
    assert counts(host) == (4, 0)
    steps()
    mm.write(start + 4096, b"abc")
    assert steps() == ["set"]
    assert mm.pgd.get(start >> 12) & (WRITE | EXCLUSIVE) == WRITE | EXCLUSIVE
    assert pte_pfn(mm.pgd.get(start >> 12)) == pte_pfn(entry)
    assert mm.get_user_pages(start + 4096, write=True).pfn == pte_pfn(entry) + 1
    assert mm.read(start + 4095, 5) == b"\0abc\0"
    assert mm.pgd.present == 2


def test_without_a_reservation_an_empty_pool_is_sigbus(host: HostMemory, mm: Mm) -> None:
    start = mm.mmap(4 * H, RW, PRIVATE | MAP_NORESERVE)
    mm.mmap(5 * H, RW, PRIVATE)
    thread = HostThread(mm)
    thread.store(start, b"x")
    with pytest.raises(HostAccessError) as caught:
        thread.store(start + H, b"x")  # five pages are free, all of them promised
    assert caught.value.signal == "SIGBUS"
    fails(errno.EFAULT, lambda: mm.get_user_pages(start + H, write=False))
    assert counts(host) == (5, 5)


def test_a_forced_write_does_not_work_on_huge_pages(mm: Mm) -> None:
    start = mapped(mm)
    mm.mprotect(start, H, PROT_READ)
    fails(errno.EIO, lambda: mm.access_remote_vm(start, b"x"))
    assert mm.access_remote_vm(start + H, b"x") == 1


def test_clear_refs_leaves_huge_pages_alone(mm: Mm, steps: Steps) -> None:
    start = mapped(mm)
    before = mm.pgd.get(start >> 12)
    mm.clear_refs(1)
    mm.clear_refs(4)
    assert mm.pgd.get(start >> 12) == before
    assert mm.soft_dirty(start, start + 2 * H) == []


# ---- what is announced


def test_munmap_announces_what_is_asked_for(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 3)
    steps()
    mm.munmap(start, H)
    assert steps() == ["S UNMAP -512-0", "clear 512", "E", "tlb", "free 512"]
    assert counts(host) == (4, 0)


def test_dontneed_rounds_its_end_down(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 3)
    steps()
    mm.madvise(start + H, 2 * H - 4096, MADV_DONTNEED)
    assert steps() == ["S CLEAR 512-1024", "clear 512", "E", "tlb", "free 512"]
    assert counts(host) == (4, 1)  # set aside again
    assert mm.read(start + H, 1) == b"\0"
    assert mm.read(start + 2 * H, 1) == b"\x03"
    steps()
    mm.madvise(start, H - 1, MADV_DONTNEED)
    mm.madvise(start, 4096, MADV_DONTNEED)
    assert steps() == ["S CLEAR 0-512", "clear 512", "E", "tlb", "free 512"]


def test_mprotect_announces_also_what_is_not_mapped_and_flushes_inside(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(2 * H, RW, PRIVATE)
    steps()
    mm.mprotect(start, 2 * H, PROT_READ)
    assert steps() == ["S PROTECTION_VMA 0-1024", "tlb", "E"]
    mm.mprotect(start, 2 * H, RW | PROT_EXEC)
    mm.write(start, b"x")
    mm.mprotect(start, H, PROT_NONE)
    steps()
    mm.mprotect(start, H, RW)
    assert steps() == ["S PROTECTION_VMA 0-512", "protect", "tlb", "E"]
    assert not mm.pgd.get(start >> 12) & WRITE  # the next write raises it
    mm.write(start, b"y")
    assert steps() == ["set"]


def test_fork_announces_clear_and_a_write_copies_the_whole_page(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm)
    steps()
    child = mm.fork("child")
    assert steps() == ["S CLEAR 0-1024", "protect", "copy", "E", "tlb"]
    mm.write(start + 8192, b"parent")
    assert steps() == ["alloc", "S CLEAR 0-512", "clear 512", "tlb", "set", "E"]
    assert child.read(start + 8192, 6) == bytes(6)
    assert child.read(start, 1) == mm.read(start, 1) == b"\x01"
    assert counts(host) == (3, 0)
    child.exit()
    steps()
    mm.write(start + H, b"q")  # nobody has it but us
    assert steps() == ["set"]


def test_shared_memory_is_not_copied_by_fork(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 2, SHARED)
    steps()
    child = mm.fork("child")
    assert steps() == ["tlb"]
    child.write(start + 1, b"!")
    assert mm.read(start, 2) == b"\x01!"
    child.exit()
    assert counts(host) == (4, 0)
    mm.exit()
    assert counts(host) == (6, 0)


def test_mremap_moves_pages_and_what_is_set_aside(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mm.mmap(4 * H, RW, PRIVATE | MAP_FIXED, addr=PLACE)
    mm.write(start + H, b"moved")
    steps()
    assert mm.mremap(start + H, 2 * H, 2 * H, MREMAP_MAYMOVE | MREMAP_FIXED, PLACE + 8 * H) == PLACE + 8 * H
    assert steps() == ["S CLEAR 512-1536", "move", "tlb", "E", "S UNMAP 512-1536", "E"]
    assert counts(host) == (5, 3)
    assert mm.read(PLACE + 8 * H, 5) == b"moved"
    mm.write(PLACE + 9 * H, b"x")
    mm.write(start, b"x")
    assert counts(host) == (3, 1)
    mm.munmap(PLACE + 8 * H, 2 * H)
    assert counts(host) == (5, 1)
    assert mm.mremap(start, H, H - 4096) == start  # rounded up: nothing to do
    mm.munmap(start, 4 * H)
    assert counts(host) == (6, 0)


def test_mremap_shrinks_but_does_not_grow(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 3)
    steps()
    for call in (
        lambda: mm.mremap(start, 3 * H, 4 * H, MREMAP_MAYMOVE),
        lambda: mm.mremap(start + 4096, H, H, MREMAP_MAYMOVE),
        lambda: mm.mremap(start, H, H, MREMAP_MAYMOVE | MREMAP_FIXED, PLACE + 8 * H + 4096),
        lambda: mm.mremap(start, H, H, MREMAP_MAYMOVE | MREMAP_DONTUNMAP),
    ):
        fails(errno.EINVAL, call)
    assert steps() == []
    assert len(mm.vmas) == 1
    mm.mremap(start, 3 * H, H + 1)
    assert steps() == ["S UNMAP 1024-1536", "clear 512", "E", "tlb", "free 512"]


# ---- the owner of a private mapping is served


def test_the_owner_takes_its_page_from_a_child_when_the_pool_is_empty(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 6)
    child = mm.fork("child")
    assert child.read(start + H, 1) == b"\x02"
    steps()
    mm.write(start + H, b"m")
    assert steps() == ["clear 512", "tlb", "set"]  # the child has no notifier
    assert mm.read(start + H, 1) == b"m"
    assert counts(host) == (0, 0)
    fails(errno.EFAULT, lambda: child.read(start + H, 1))
    assert child.read(start, 1) == b"\x01"
    mm.madvise(start + H, H, MADV_DONTNEED)
    fails(errno.EFAULT, lambda: child.read(start + H, 1))  # though a page is free: it would read zeros
    child.exit()
    assert counts(host) == (1, 1)
    mm.write(start + H, b"n")


def test_a_child_that_cannot_copy_gets_sigbus(host: HostMemory, mm: Mm) -> None:
    start = mapped(mm, 6)
    child = mm.fork("child")
    with pytest.raises(HostAccessError) as caught:
        HostThread(child).store(start, b"x")
    assert caught.value.signal == "SIGBUS"
    assert child.read(start, 1) == b"\x01"


def test_a_page_that_a_child_still_has_is_not_set_aside_again(host: HostMemory, mm: Mm) -> None:
    start = mapped(mm, 2)
    child = mm.fork("child")
    mm.madvise(start, H, MADV_DONTNEED)
    assert counts(host) == (4, 0)
    child.exit()
    assert counts(host) == (5, 0)
    assert mm.read(start, 1) == b"\0"
    mm.munmap(start, 2 * H)
    assert counts(host) == (6, 0)


def test_a_fault_waits_for_a_page_that_is_being_freed(host: HostMemory, mm: Mm) -> None:
    start = mapped(mm, 6)
    other = start + H
    seen = []

    def hook(label: str) -> None:
        if label == "mm.gather.unflushed" and not seen:
            seen.append(counts(host))
            with on_point(lambda inner: None):
                fails(errno.EFAULT, lambda: mm.read(start, 1))  # nobody can go on: it does not hang

    with on_point(hook):
        mm.madvise(start, H, MADV_DONTNEED)
    assert seen == [(0, 1)]
    assert mm.read(start, 1) == b"\0"
    assert mm.read(other, 1) == b"\x02"


def test_fallocate_waits_for_a_page_that_is_being_freed(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge", H)
    mm.mmap(H, RW, MAP_SHARED, file=file)
    start = mapped(mm, 5)
    seen = []

    def hook(label: str) -> None:
        if label == "mm.gather.unflushed" and not seen:
            assert mm.read(start, 1) == b"\0"  # takes the page that is there for the file
            seen.append(counts(host))
            with on_point(lambda inner: None):
                fails(errno.ENOSPC, lambda: file.fallocate(0, H))

    with on_point(hook):
        mm.madvise(start, H, MADV_DONTNEED)
    assert seen == [(0, 1)]
    file.fallocate(0, H)
    assert counts(host) == (0, 0)
    file.close()


# ---- files


def test_a_file_sets_a_page_aside_once(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge", 4 * H)
    one = mm.mmap(3 * H, RW, MAP_SHARED, file=file)
    two = mm.mmap(3 * H, RW, MAP_SHARED, file=file, pgoff=512)
    assert counts(host) == (6, 4)
    mm.write(one + H, b"both")
    assert mm.read(two, 4) == b"both"
    assert counts(host) == (5, 3)
    mm.munmap(one, 3 * H)
    mm.munmap(two, 3 * H)
    assert counts(host) == (5, 3)  # they are the file's
    assert file.pread(H, 4) == b"both"
    assert file.pread(2 * H - 2, 4) == bytes(4)
    file.truncate(2 * H)
    assert counts(host) == (5, 1)
    file.close()
    assert counts(host) == (6, 0)


def test_a_writable_mapping_grows_the_file(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge")
    readonly = mm.mmap(H, PROT_READ, MAP_SHARED, file=file)
    fails(errno.EFAULT, lambda: mm.read(readonly, 1))
    mm.mmap(2 * H, RW, MAP_SHARED, file=file)
    assert file.size == 2 * H
    assert mm.read(readonly, 1) == b"\0"
    file.close()


def test_private_copies_of_a_file(host: HostMemory, trace: Trace, mm: Mm, steps: Steps) -> None:
    file = HugetlbFile(host, trace, "huge", 2 * H)
    file.fallocate(0, H)
    shared = mm.mmap(H, RW, MAP_SHARED, file=file)
    mm.write(shared, b"file")
    private = mm.mmap(2 * H, RW, MAP_PRIVATE, file=file)
    assert mm.read(private, 4) == b"file"
    steps()
    mm.write(private, b"mine")
    assert [word.split()[0] for word in steps()] == ["alloc", "S", "clear", "tlb", "set", "E"]
    mm.madvise(private, H, MADV_DONTNEED)
    mm.write(private, b"MINE")  # nothing is mapped: the page is mapped first, then copied
    assert mm.read(shared, 4) == b"file"
    mm.write(private + H, b"q")  # a hole: a page that the file never gets
    assert file.pread(H, 1) == b"\0"
    assert counts(host) == (3, 0)
    mm.munmap(private, 2 * H)
    file.close()


def test_truncation_is_announced_once_to_every_area(host: HostMemory, trace: Trace, mm: Mm, steps: Steps) -> None:
    file = HugetlbFile(host, trace, "huge", 3 * H)
    mm.mmap(3 * H, RW, MAP_SHARED | MAP_FIXED, file=file, addr=PLACE)
    mm.mmap(3 * H, RW, MAP_PRIVATE | MAP_FIXED, file=file, addr=PLACE + 3 * H)
    for page in range(6):
        mm.write(PLACE + page * H, b"x")
    steps()
    file.truncate(H)
    assert steps() == [
        *["S CLEAR 512-1536", "clear 1024", "E", "tlb"],
        *["S CLEAR 2048-3072", "clear 1024", "E", "tlb", "free 1024"],  # private copies go, too
        *["free 512", "free 512"],
    ]
    fails(errno.EFAULT, lambda: mm.read(PLACE + H, 1))
    fails(errno.EFAULT, lambda: mm.read(PLACE + 4 * H, 1))
    fails(errno.EINVAL, lambda: file.truncate(H + 4096))
    assert file.size == H
    file.truncate(2 * H)  # growing announces what is behind the new end, too
    assert steps() == ["S CLEAR 1024-1536", "E", "S CLEAR 2560-3072", "E"]
    file.close()


def test_a_hole_frees_whole_pages_and_zeroes_parts(host: HostMemory, trace: Trace, mm: Mm, steps: Steps) -> None:
    file = HugetlbFile(host, trace, "huge", 4 * H)
    start = mm.mmap(4 * H, RW, MAP_SHARED, file=file)
    for page in range(0, 2048, 256):
        mm.write(start + page * 4096, b"x")
    steps()
    mm.madvise(start + 256 * 4096, 3 * H, MADV_REMOVE)
    assert steps() == ["S CLEAR 512-1536", "clear 1024", "E", "tlb", "free 512", "free 512"]
    assert [mm.read(start + page * 4096, 1) for page in (0, 256, 512, 1024, 1536, 1792)] == [
        *[b"x", b"\0", b"\0", b"\0", b"\0", b"x"]
    ]
    # The pages that were punched out are not set aside any more; reading has taken them from what is free.
    assert counts(host) == (2, 0)
    mm.madvise(start + 1792 * 4096, 4096, MADV_REMOVE)
    assert mm.read(start + 1792 * 4096, 1) == b"\0"
    file.close()


def test_a_hole_takes_its_pages_out_of_the_reserve(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge", 6 * H)
    start = mm.mmap(3 * H, RW, MAP_SHARED, file=file)
    mm.write(start, b"x")
    file.punch_hole(0, 1024)
    assert counts(host) == (6, 2)  # what was not there stays set aside
    mm.mmap(4 * H, RW, PRIVATE)
    fails(errno.EFAULT, lambda: mm.write(start, b"y"))
    mm.write(start + H, b"y")
    file.close()


def test_fallocate(host: HostMemory, trace: Trace, mm: Mm) -> None:
    file = HugetlbFile(host, trace, "huge", H)
    file.fallocate(H // 2, H)
    assert (file.size, counts(host)) == (H // 2 + H, (4, 0))
    start = mm.mmap(2 * H, PROT_READ, MAP_SHARED, file=file)
    assert mm.read(start, 1) == b"\0"
    fails(errno.EFAULT, lambda: mm.read(start + H, 1))  # the file ends inside this page
    file.fallocate(0, 4 * H, keep_size=True)
    assert file.size == H // 2 + H
    fails(errno.ENOSPC, lambda: file.fallocate(0, 9 * H))
    fails(errno.EINVAL, lambda: file.fallocate(0, 0))
    fails(errno.EINVAL, lambda: file.pwrite(0, b"x"))
    assert counts(host) == (0, 0)
    assert file.size == H // 2 + H
    file.close()


# ---- migration


def test_a_page_moves_within_the_pool(host: HostMemory, trace: Trace, mm: Mm, steps: Steps) -> None:
    start = mapped(mm)
    child = mm.fork("child")
    mm.write(start + H, b"own")
    old = pte_pfn(mm.pgd.get(start >> 12))
    steps()
    new = migrate_page(host, trace, old + 3) - 3
    assert steps() == [
        *["alloc", "S CLEAR 0-512", "clear 512", "tlb", "nonpresent", "E"],
        *["clear 512", "tlb", "nonpresent"],  # the child has no notifier
        *["set", "set", "free 512"],
    ]
    assert new != old
    assert host.flags(new) & PG_HUGETLB
    assert mm.read(start, 1) == child.read(start, 1) == b"\x01"
    assert counts(host) == (3, 0)
    verify(host)


def test_a_cached_page_moves_too(host: HostMemory, trace: Trace, mm: Mm) -> None:
    start = mapped(mm, 2, SHARED)
    old = pte_pfn(mm.pgd.get(start >> 12))
    assert migrate_page(host, trace, old) != old
    assert mm.read(start, 1) == b"\x01"
    assert counts(host) == (4, 0)


def test_a_page_that_is_held_or_has_no_place_to_go_stays(host: HostMemory, trace: Trace, mm: Mm) -> None:
    start = mapped(mm)
    pfn = mm.get_user_pages(start, write=True).pfn
    host.get(pfn + 1)
    fails(errno.EAGAIN, lambda: migrate_page(host, trace, pfn))
    host.put(pfn + 1)
    mm.mmap(4 * H, RW, PRIVATE)  # all that is free is promised
    with pytest.raises(OutOfFrames):
        migrate_page(host, trace, pfn)
    assert mm.get_user_pages(start, write=True).pfn == pfn
    assert compact_memory(host, trace) == 0


def test_a_fault_waits_for_a_page_that_is_being_moved(host: HostMemory, trace: Trace, mm: Mm) -> None:
    start = mapped(mm)
    old = pte_pfn(mm.pgd.get(start >> 12))
    seen = []

    def hook(label: str) -> None:
        if label == "mm.migrate.unmapped" and not seen:
            seen.append(label)
            with on_point(lambda inner: None):
                fails(errno.EDEADLK, lambda: mm.read(start, 1))
            mm.madvise(start, H, MADV_DONTNEED)  # goes through: nothing is mapped afterwards

    with on_point(hook):
        migrate_page(host, trace, old)
    assert mm.pgd.get(start >> 12) == 0
    assert counts(host) == (5, 1)
    assert mm.read(start, 1) == b"\0"


# ---- page tables that could be shared


GIB = 1 << 30


def test_ranges_of_shared_areas_are_widened_to_a_gibibyte(host: HostMemory, trace: Trace, mm: Mm, steps: Steps) -> None:
    file = HugetlbFile(host, trace, "huge", 3 * GIB)
    start = mm.mmap(3 * GIB, RW, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, file=file, addr=PLACE)
    mm.write(start + GIB + H, b"x")
    steps()
    mm.madvise(start + GIB + H, H, MADV_DONTNEED)
    assert steps()[0] == "S CLEAR 262144-524288"
    file.punch_hole(262144, 512)
    assert steps()[0] == "S CLEAR 262144-524288"
    mm.mprotect(start + GIB + H, 2 * H, PROT_READ)
    assert steps() == [
        *["S CLEAR 262144-524288", "tlb", "E"],  # cut at its start, then what is left of the gibibyte is none
        *["S PROTECTION_VMA 262656-263680", "tlb", "E"],
    ]
    mm.munmap(start, H)
    assert steps() == ["S CLEAR -512-261632", "tlb", "E", "S UNMAP -512-0", "E"]  # counted from what is left
    file.close()


def test_private_areas_are_not_widened(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(3 * GIB, RW, PRIVATE | MAP_NORESERVE | MAP_FIXED, addr=PLACE)
    mm.write(start + GIB + H, b"x")
    steps()
    mm.madvise(start + GIB + H, H, MADV_DONTNEED)
    assert steps()[0] == "S CLEAR 262656-263168"


# ---- what is refused


def test_nothing_cuts_a_huge_page(host: HostMemory, mm: Mm, steps: Steps) -> None:
    start = mapped(mm, 3)
    steps()
    inside = start + 4096
    for call in (
        lambda: mm.munmap(inside, H - 4096),
        lambda: mm.munmap(start, 4096),
        lambda: mm.munmap(start - 4096, 8192),
        lambda: mm.mmap(4096, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=inside),
        lambda: mm.mprotect(start, 4096, PROT_READ),
        lambda: mm.mprotect(inside, H - 4096, PROT_READ),
        lambda: mm.madvise(inside, H, MADV_DONTNEED),
        lambda: mm.madvise(start, 4096, MADV_DONTFORK),
        lambda: mm.madvise(start, H, MADV_FREE),
        lambda: mm.madvise(start, H, MADV_COLD),
        lambda: mm.madvise(start, H, MADV_PAGEOUT),
        lambda: mm.madvise(start, H, MADV_GUARD_INSTALL),
        lambda: mm.madvise(start, H, MADV_GUARD_REMOVE),
    ):
        fails(errno.EINVAL, call)
    assert steps() == []
    assert len(mm.vmas) == 1
    assert [mm.read(start + page * H, 1) for page in range(3)] == [b"\x01", b"\x02", b"\x03"]
    assert counts(host) == (3, 0)


def test_dontneed_refuses_before_it_does_anything(mm: Mm, steps: Steps) -> None:
    start = mapped(mm)
    small = mm.mmap(4096, RW, addr=start - 4096)
    assert small == start - 4096
    mm.write(small, b"s")
    mm.madvise(start + H, H, MADV_DONTFORK)
    steps()
    fails(errno.EINVAL, lambda: mm.madvise(start + 4096, H, MADV_DONTNEED))
    assert steps() == []
    mm.madvise(small, 4096 + H, MADV_DONTNEED)
    assert [step for step in steps() if step.startswith("S")] == ["S CLEAR 0-1", "S CLEAR 1-513"]


def test_advice_that_means_nothing_here(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(2 * H, RW, PRIVATE)
    mm.madvise(start, 2 * H, MADV_POPULATE_WRITE)
    steps()
    mm.madvise(start, 2 * H, MADV_WILLNEED)
    mm.madvise(start, 2 * H, MADV_MERGEABLE)
    mm.mlock(start + 4096, 4096)
    mm.msync(start, 2 * H)
    assert steps() == []
    assert not mm.vmas[0].flags & VM_LOCKED
    fails(errno.EACCES, lambda: mm.madvise(start, H, MADV_REMOVE))
    mm.mprotect(start, H, PROT_READ)
    fails(errno.EINVAL, lambda: mm.madvise(start, H, MADV_POPULATE_WRITE))
