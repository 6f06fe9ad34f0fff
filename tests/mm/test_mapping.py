"""mmap, munmap and the list of areas: placement, splitting, merging, errors that change nothing."""

from __future__ import annotations

import errno
import gc
import weakref

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mapping import MMAP_TOP
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    TASK_SIZE,
)
from xipvm.trace.funnel import Trace

R, RW, RWX, NONE = 1, 3, 7, 0
PAGE = 4096
ANON = MAP_PRIVATE | MAP_ANONYMOUS
AT = 0x10_0000_0000


def layout(mm: Mm, base: int = AT) -> list[tuple[int, int, int]]:
    """(first page, end page, prot) of every area, pages counted from ``base``."""
    return [((area.start - base) // PAGE, (area.end - base) // PAGE, area.prot) for area in mm.vmas]


def fixed(mm: Mm, page: int, pages: int, prot: int = RW) -> None:
    mm.mmap(pages * PAGE, prot, ANON | MAP_FIXED, addr=AT + page * PAGE)


def test_areas_are_placed_downwards_and_merge(mm: Mm) -> None:
    first = mm.mmap(4 * PAGE, RW)
    second = mm.mmap(100, RW)
    assert (first, second) == (MMAP_TOP - 4 * PAGE, MMAP_TOP - 5 * PAGE)
    assert layout(mm, second) == [(0, 5, RW)]


def test_large_areas_begin_on_a_huge_page(mm: Mm) -> None:
    start = mm.mmap((2 << 20) + PAGE, RW)
    assert start % (2 << 20) == 0
    assert start + (2 << 20) + PAGE <= MMAP_TOP


def test_a_gap_is_filled(mm: Mm) -> None:
    start = mm.mmap(8 * PAGE, R)
    mm.munmap(start + 2 * PAGE, 3 * PAGE)
    assert mm.mmap(4 * PAGE, RW) == start - 4 * PAGE
    assert mm.mmap(3 * PAGE, RW) == start + 2 * PAGE


def test_a_wish_is_granted_when_free(mm: Mm) -> None:
    assert mm.mmap(PAGE, RW, addr=AT) == AT
    assert mm.mmap(PAGE, RW, addr=AT) == MMAP_TOP - PAGE
    assert mm.mmap(PAGE, RW, addr=AT + PAGE + 1) == AT + 2 * PAGE


def test_munmap_splits(mm: Mm) -> None:
    fixed(mm, 0, 16)
    mm.munmap(AT + 4 * PAGE, 2 * PAGE)
    assert layout(mm) == [(0, 4, RW), (6, 16, RW)]
    mm.munmap(AT, 5 * PAGE)
    assert layout(mm) == [(6, 16, RW)]
    mm.munmap(AT - PAGE, 100 * PAGE)
    assert layout(mm) == []


def test_contents_beside_the_hole_stay(mm: Mm) -> None:
    fixed(mm, 0, 16)
    for page in range(16):
        mm.write(AT + page * PAGE, bytes([page]))
    mm.munmap(AT + 4 * PAGE, 4 * PAGE)
    for page in range(16):
        if 4 <= page < 8:
            with pytest.raises(MmError):
                mm.read(AT + page * PAGE, 1)
        else:
            assert mm.read(AT + page * PAGE, 1) == bytes([page])
    fixed(mm, 4, 4)
    assert layout(mm) == [(0, 16, RW)]
    assert mm.read(AT + 4 * PAGE, 1) == b"\0"


def test_mprotect_splits_and_merges_back(mm: Mm) -> None:
    fixed(mm, 0, 16)
    mm.mprotect(AT + 4 * PAGE, 4 * PAGE, R)
    assert layout(mm) == [(0, 4, RW), (4, 8, R), (8, 16, RW)]
    mm.mprotect(AT + 6 * PAGE, 4 * PAGE, NONE)
    assert layout(mm) == [(0, 4, RW), (4, 6, R), (6, 10, NONE), (10, 16, RW)]
    mm.mprotect(AT, 16 * PAGE, RW)
    assert layout(mm) == [(0, 16, RW)]


def test_merging_with_pages_on_one_side_or_both(mm: Mm) -> None:
    fixed(mm, 0, 2)
    mm.write(AT, b"x")
    fixed(mm, 2, 2)
    assert layout(mm) == [(0, 4, RW)]
    fixed(mm, 8, 2)
    mm.write(AT + 8 * PAGE, b"x")
    fixed(mm, 4, 4)
    # Two roots cannot become one: pages of both sides are there already.
    assert layout(mm) == [(0, 8, RW), (8, 10, RW)]


def test_neighbours_share_a_root_so_that_they_can_merge(mm: Mm) -> None:
    fixed(mm, 0, 4)
    mm.mprotect(AT + 2 * PAGE, 2 * PAGE, R)
    mm.write(AT, b"x")
    mm.read(AT + 2 * PAGE, 1)
    mm.mprotect(AT + 2 * PAGE, PAGE, RWX)
    mm.write(AT + 2 * PAGE, b"x")
    assert len({area.anon_vma for area in mm.vmas if area.anon_vma}) == 1
    mm.mprotect(AT, 4 * PAGE, RW)
    assert layout(mm) == [(0, 4, RW)]


def test_forked_areas_do_not_merge_with_fresh_ones(mm: Mm) -> None:
    fixed(mm, 0, 2)
    mm.write(AT, b"x")
    child = mm.fork()
    fixed(child, 2, 2)
    assert layout(child) == [(0, 2, RW), (2, 4, RW)]
    fixed(mm, 2, 2)
    assert layout(mm) == [(0, 4, RW)]


def test_file_areas_merge_when_their_offsets_continue(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", 16 * PAGE)
    for page, pgoff in ((0, 0), (2, 2), (4, 5), (6, 7)):
        mm.mmap(2 * PAGE, RW, MAP_SHARED | MAP_FIXED, addr=AT + page * PAGE, file=file, pgoff=pgoff)
    assert layout(mm) == [(0, 4, RW), (4, 8, RW)]
    assert set(file.areas) == set(mm.vmas)
    mm.munmap(AT + PAGE, 6 * PAGE)
    assert [area.pgoff for area in mm.vmas] == [0, 8]
    mm.exit()
    assert not file.areas


def test_find_vma(mm: Mm) -> None:
    fixed(mm, 0, 2)
    fixed(mm, 4, 2)
    found = [mm.find_vma(AT + page * PAGE) for page in range(-1, 7)]
    assert [area.start if area else None for area in found] == [
        None, AT, AT, None, None, AT + 4 * PAGE, AT + 4 * PAGE, None,
    ]  # fmt: skip
    assert mm.find_vma(AT + 2 * PAGE - 1) is mm.vmas[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"length": 0}, errno.EINVAL),
        ({"length": -PAGE}, errno.EINVAL),
        ({"prot": 8}, errno.EINVAL),
        ({"flags": 0}, errno.EINVAL),
        ({"flags": MAP_PRIVATE | MAP_SHARED | MAP_ANONYMOUS}, errno.EINVAL),
        ({"flags": ANON | 0x40}, errno.EINVAL),
        ({"flags": MAP_PRIVATE}, errno.EBADF),
        ({"flags": ANON | MAP_FIXED}, errno.EINVAL),
        ({"flags": ANON | MAP_FIXED, "addr": AT + 1}, errno.EINVAL),
        ({"flags": ANON | MAP_FIXED, "addr": -PAGE}, errno.EINVAL),
        ({"flags": ANON | MAP_FIXED, "addr": TASK_SIZE}, errno.ENOMEM),
        ({"flags": ANON | MAP_FIXED_NOREPLACE, "addr": AT - PAGE}, errno.EEXIST),
        ({"length": TASK_SIZE}, errno.ENOMEM),
        ({"pgoff": -1}, errno.EINVAL),
        ({"pgoff": 1 << 51}, errno.EOVERFLOW),
    ],
)
def test_mmap_errors(mm: Mm, arguments: dict[str, int], error: int) -> None:
    fixed(mm, 0, 4)
    before = layout(mm)
    with pytest.raises(MmError) as raised:
        mm.mmap(**{"length": 2 * PAGE, "prot": RW, **arguments})  # type: ignore[arg-type]
    assert raised.value.errno == error
    assert layout(mm) == before


def test_a_file_that_is_not_writable(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", PAGE, writable=False)
    with pytest.raises(MmError) as raised:
        mm.mmap(PAGE, RW, MAP_SHARED, file=file)
    assert raised.value.errno == errno.EACCES
    with pytest.raises(MmError) as raised:
        mm.mmap(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, file=file)
    assert raised.value.errno == errno.EINVAL
    shared = mm.mmap(PAGE, R, MAP_SHARED, file=file)
    mm.mmap(PAGE, RW, MAP_PRIVATE, file=file)
    with pytest.raises(MmError) as raised:
        mm.mprotect(shared, PAGE, RW)
    assert raised.value.errno == errno.EACCES
    assert mm.find_vma(shared).prot == R  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda mm: mm.munmap(AT + 1, PAGE), errno.EINVAL),
        (lambda mm: mm.munmap(AT, 0), errno.EINVAL),
        (lambda mm: mm.munmap(AT, -1), errno.EINVAL),
        (lambda mm: mm.munmap(TASK_SIZE, PAGE), errno.EINVAL),
        (lambda mm: mm.mprotect(AT + 1, PAGE, R), errno.EINVAL),
        (lambda mm: mm.mprotect(AT, PAGE, 8), errno.EINVAL),
        (lambda mm: mm.mprotect(AT, 5 * PAGE, R), errno.ENOMEM),
        (lambda mm: mm.mprotect(AT - PAGE, 5 * PAGE, R), errno.ENOMEM),
        (lambda mm: mm.mprotect(AT, 7 * PAGE, R), errno.ENOMEM),
        (lambda mm: mm.madvise(AT + 1, PAGE, MADV_DONTNEED), errno.EINVAL),
        (lambda mm: mm.madvise(AT, PAGE, 99), errno.EINVAL),
        (lambda mm: mm.madvise(AT, 7 * PAGE, MADV_DONTNEED), errno.ENOMEM),
        (lambda mm: mm.get_user_pages(AT + 4 * PAGE, write=False), errno.EFAULT),
        (lambda mm: mm.write(AT + 4 * PAGE - 2, b"four"), errno.EFAULT),
        (lambda mm: mm.read(-8, 16), errno.EFAULT),
        (lambda mm: mm.read(1 << 60, 16), errno.EFAULT),
    ],
)
def test_errors_change_nothing(mm: Mm, call, error: int) -> None:  # type: ignore[no-untyped-def]
    fixed(mm, 0, 4)
    fixed(mm, 6, 4)
    mm.write(AT, b"x" * 4 * PAGE)
    before = layout(mm), mm.pgd.entries(0, 1 << 36), mm.read(AT, 4 * PAGE)
    with pytest.raises(MmError) as raised:
        call(mm)
    assert raised.value.errno == error
    assert (layout(mm), mm.pgd.entries(0, 1 << 36), mm.read(AT, 4 * PAGE)) == before


@pytest.mark.parametrize("call", [lambda mm: mm.mprotect(AT, 0, R), lambda mm: mm.madvise(AT, 0, MADV_DONTNEED)])
def test_nothing_to_do(mm: Mm, call) -> None:  # type: ignore[no-untyped-def]
    fixed(mm, 0, 4)
    call(mm)
    assert layout(mm) == [(0, 4, RW)]


@pytest.mark.parametrize(
    "call",
    [
        lambda mm: mm.mmap(PAGE, RW),
        lambda mm: mm.mmap(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS),
        lambda mm: mm.munmap(AT, PAGE),
        lambda mm: mm.mprotect(AT, PAGE, R),
        lambda mm: mm.madvise(AT, PAGE, MADV_DONTNEED),
        lambda mm: mm.get_user_pages(AT, write=False),
        lambda mm: mm.read(AT, 1),
        lambda mm: mm.fork(),
    ],
)
def test_an_mm_that_has_exited(mm: Mm, host: HostMemory, call) -> None:  # type: ignore[no-untyped-def]
    fixed(mm, 0, 4)
    mm.write(AT, b"x")
    mm.exit()
    assert host.free_frames == host.nr_frames - 1
    with pytest.raises(MmError) as raised:
        call(mm)
    assert raised.value.errno == errno.ESRCH


def test_an_mm_that_is_forgotten_takes_its_memory_along(trace: Trace) -> None:
    host = HostMemory(64 * PAGE)
    mm = Mm(host, trace)
    mm.write(mm.mmap(PAGE, RW), b"x")
    mm.write(mm.mmap(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS), b"x")
    mm.fork()
    gone = weakref.ref(host)
    del host, mm
    gc.collect()
    assert gone() is None
