"""PAGEMAP_SCAN: categories, masks, limits, and the tracking of writes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_GUARD_INSTALL, MADV_HUGEPAGE, MADV_PAGEOUT
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_HUGE,
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SOFT_DIRTY,
    PAGE_IS_SWAPPED,
    PAGE_IS_WPALLOWED,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
)
from xipvm.mmu.pte import HUGE, UFFD_WP
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_WP
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
WP, STRICT = PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC
Steps = Callable[[], list[str]]

VMA_DIRTY = PAGE_IS_SOFT_DIRTY
"""New areas count as written altogether."""


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """16 pages: 0 to 7 written, 8 and 9 read."""
    start = mm.mmap(16 * PAGE, RW, addr=0x4000_0000)
    mm.write(start, b"x" * 8 * PAGE)
    mm.read(start + 8 * PAGE, 2 * PAGE)
    steps()
    return start


def track(mm: Mm, start: int, pages: int) -> None:
    mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC).register(start, pages * PAGE, UFFDIO_REGISTER_MODE_WP)


def scan(mm: Mm, start: int, pages: int = 16, **limits: Any) -> list[tuple[int, int, int]]:
    """(first page, end, categories)"""
    regions = mm.pagemap_scan(start, start + pages * PAGE, **limits).regions
    return [((lo - start) // PAGE, (hi - start) // PAGE, categories) for lo, hi, categories in regions]


def written(mm: Mm, start: int, pages: int = 16, flags: int = WP | STRICT) -> list[int]:
    found = scan(mm, start, pages, flags=flags, category_mask=PAGE_IS_WRITTEN, return_mask=PAGE_IS_WRITTEN)
    return [page for lo, hi, _ in found for page in range(lo, hi)]


def test_categories(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    mm.swapon(16)
    mm.madvise(area, PAGE, MADV_PAGEOUT)
    mm.madvise(area + 15 * PAGE, PAGE, MADV_GUARD_INSTALL)
    mm.clear_refs(4)
    mm.write(area + 3 * PAGE, b"y")
    here, dirty = PAGE_IS_PRESENT | PAGE_IS_WRITTEN, PAGE_IS_SOFT_DIRTY
    assert scan(mm, area, category_mask=PAGE_IS_WRITTEN) == [
        (0, 1, PAGE_IS_SWAPPED | PAGE_IS_WRITTEN),
        (1, 3, here),
        (3, 4, here | dirty),
        (4, 8, here),
        (8, 10, here | PAGE_IS_PFNZERO),
        (15, 16, PAGE_IS_SWAPPED | PAGE_IS_WRITTEN | PAGE_IS_GUARD),
    ]
    assert scan(mm, area, category_mask=dirty) == [(3, 4, here | dirty)]
    file = ShmemFile(host, trace, "shmem", 4 * PAGE)
    shared = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(shared + PAGE, b"f")
    assert scan(mm, shared, 4, category_mask=PAGE_IS_FILE) == [(1, 2, here | VMA_DIRTY | PAGE_IS_FILE)]
    file.close()
    mm.exit()


def test_masks(mm: Mm, area: int) -> None:
    every = PAGE_IS_PRESENT | PAGE_IS_PFNZERO
    assert scan(mm, area, category_mask=every, return_mask=PAGE_IS_PFNZERO) == [(8, 10, PAGE_IS_PFNZERO)]
    # present, but not the zero page
    found = scan(mm, area, category_mask=every, category_inverted=PAGE_IS_PFNZERO, return_mask=PAGE_IS_PRESENT)
    assert found == [(0, 8, PAGE_IS_PRESENT)]
    anyof = scan(mm, area, category_anyof_mask=PAGE_IS_PFNZERO | PAGE_IS_SWAPPED, return_mask=0)
    assert anyof == [(8, 10, 0)]
    # what is not there at all
    assert scan(mm, area, category_mask=PAGE_IS_PRESENT, category_inverted=PAGE_IS_PRESENT, return_mask=0) == [
        (10, 16, 0)
    ]


def test_what_was_never_filled(mm: Mm, area: int) -> None:
    """It is not written, unless nothing but that is asked and its neighbours have a page table."""
    far = mm.mmap(4 * PAGE, RW, addr=area + (1 << 30))
    assert written(mm, area, flags=0) == list(range(16))
    assert written(mm, far, 4, flags=0) == []
    only = scan(mm, area, category_mask=PAGE_IS_WRITTEN)
    assert [(lo, hi) for lo, hi, _ in only] == [(0, 8), (8, 10)]


def test_limits(mm: Mm, area: int) -> None:
    wanted = {"category_mask": PAGE_IS_PRESENT, "return_mask": PAGE_IS_PRESENT | PAGE_IS_PFNZERO}
    end = area + 16 * PAGE
    found = mm.pagemap_scan(area, end, max_pages=3, **wanted)
    assert ([(lo - area) // PAGE for lo, _, _ in found.regions], found.walk_end) == ([0], area + 3 * PAGE)
    found = mm.pagemap_scan(area, end, vec_len=1, **wanted)
    assert (len(found.regions), found.walk_end) == (1, area + 8 * PAGE)
    rest = mm.pagemap_scan(found.walk_end, end, vec_len=1, **wanted)
    assert [(lo - area) // PAGE for lo, _, _ in rest.regions] == [8]
    assert rest.walk_end == end
    assert mm.pagemap_scan(area, end, vec_len=0, **wanted) == ([], end)


def test_many_regions_are_many_ranges(mm: Mm, steps: Steps) -> None:
    host = HostMemory(4096 * PAGE)
    big = Mm(host, Trace())
    starts: list[int] = []

    class Listener(MmuNotifier):
        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            starts.append(range.start)
            return 0

    area = big.mmap(2048 * PAGE, RW)
    track(big, area, 2048)
    assert written(big, area, 2048) == []
    for page in range(0, 2048, 2):
        big.write(area + page * PAGE, b"x")
    mask = {"category_mask": PAGE_IS_WRITTEN | PAGE_IS_PRESENT, "return_mask": PAGE_IS_WRITTEN}
    big.notifiers.register(Listener())
    found = scan(big, area, 2048, flags=WP, **mask)
    assert [lo for lo, _, _ in found] == list(range(0, 2048, 2))
    assert starts == [area, area + 1024 * PAGE]
    assert scan(big, area, 2048, flags=WP, **mask) == []
    verify(host)
    big.exit()


# ---- tracking


def test_the_order(mm: Mm, area: int, steps: Steps) -> None:
    track(mm, area, 16)
    assert written(mm, area) == list(range(16))
    words = ["S PROTECTION_VMA 0-16", "protect", "protect", "tlb", "E"]  # pages, and the zero page
    assert steps() == words
    assert written(mm, area) == []
    assert steps() == ["S PROTECTION_VMA 0-16", "E"]
    mm.write(area + 4 * PAGE, b"y")
    mm.write(area + 9 * PAGE, b"y")
    mm.read(area + 11 * PAGE, 1)
    mm.write(area + 12 * PAGE, b"y")
    steps()
    assert written(mm, area, flags=0) == [4, 9, 12]
    assert steps() == []  # only looks
    assert written(mm, area) == [4, 9, 12]
    assert written(mm, area) == []


def test_only_what_matches_is_protected(mm: Mm, area: int) -> None:
    track(mm, area, 16)
    assert scan(mm, area, flags=WP, category_mask=PAGE_IS_PFNZERO, return_mask=0) == [(8, 10, 0)]
    assert [page for page, entry in mm.pgd.entries(area >> 12, (area >> 12) + 16) if entry & UFFD_WP] == [
        (area >> 12) + 8,
        (area >> 12) + 9,
    ]
    assert scan(mm, area, flags=WP, max_pages=2, category_mask=PAGE_IS_WRITTEN, return_mask=0) == [(0, 2, 0)]
    assert scan(mm, area, category_mask=PAGE_IS_WRITTEN, return_mask=0) == [(2, 8, 0)]


def test_protecting_without_a_report(mm: Mm, area: int) -> None:
    track(mm, area, 16)
    assert scan(mm, area, flags=WP, vec_len=0) == []
    assert all(mm.pgd.get((area >> 12) + page) & UFFD_WP for page in range(16))
    mm.write(area + 13 * PAGE, b"y")
    assert written(mm, area) == [13]


def test_holes_that_are_asked_for_are_protected(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    track(mm, start, 16)
    steps()
    found = scan(mm, start, flags=WP, category_mask=PAGE_IS_WPALLOWED, return_mask=PAGE_IS_WPALLOWED)
    assert found == [(0, 16, PAGE_IS_WPALLOWED)]
    assert [word for word in steps() if word[0] == "S"] == ["S PROTECTION_VMA 0-16", "S PROTECTION_VMA 0-16"]
    mm.write(start + 5 * PAGE, b"y")
    assert written(mm, start) == [5]


def test_areas_that_do_not_track(mm: Mm, area: int, steps: Steps) -> None:
    track(mm, area + 8 * PAGE, 4)
    mm.userfaultfd().register(area + 12 * PAGE, 4 * PAGE, UFFDIO_REGISTER_MODE_WP)  # tells somebody
    steps()
    with pytest.raises(MmError) as caught:
        written(mm, area)
    assert caught.value.errno == errno.EPERM
    assert not any(entry & UFFD_WP for _, entry in mm.pgd.entries(area >> 12, (area >> 12) + 16))
    assert written(mm, area, flags=WP) == [8, 9, 10, 11]
    assert scan(mm, area, category_mask=PAGE_IS_WPALLOWED | PAGE_IS_PRESENT, return_mask=0) == [(8, 10, 0)]


def test_bad_use(mm: Mm, area: int, steps: Steps) -> None:
    end = area + PAGE
    bad: list[tuple[int, int, dict[str, Any], int]] = [
        (area + 1, end, {}, errno.EINVAL),
        (area, end, {"flags": 4}, errno.EINVAL),
        (area, end, {"category_mask": 1 << 9}, errno.EINVAL),
        (area, end, {"return_mask": 1 << 9}, errno.EINVAL),
        (area, end, {"category_anyof_mask": 1 << 12}, errno.EINVAL),
        (area, end, {"category_inverted": 1 << 12}, errno.EINVAL),
        (area, end, {"max_pages": -1}, errno.EINVAL),
        (area, end, {"vec_len": -1}, errno.EINVAL),
        (area, area - PAGE, {}, errno.EFAULT),
        (area, 1 << 60, {}, errno.EFAULT),
    ]
    for start, stop, limits, error in bad:
        with pytest.raises(MmError) as caught:
            mm.pagemap_scan(start, stop, **limits)
        assert caught.value.errno == error
    assert steps() == []
    assert mm.pagemap_scan(area, area) == ([], area)
    mm.exit()
    with pytest.raises(MmError) as caught:
        mm.pagemap_scan(area, end)
    assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize("pages", [512, 500])
def test_huge_pages(pages: int) -> None:
    host = HostMemory(4096 * PAGE, poison="frame")
    mm = Mm(host, Trace())
    mm.notifiers.register(MmuNotifier())
    start = mm.mmap(512 * PAGE, RW)
    mm.madvise(start, 512 * PAGE, MADV_HUGEPAGE)
    mm.write(start, b"x")
    huge = PAGE_IS_HUGE | PAGE_IS_PRESENT | PAGE_IS_WRITTEN | VMA_DIRTY
    assert scan(mm, start, 512, category_mask=PAGE_IS_PRESENT) == [(0, 512, huge)]
    track(mm, start, 512)
    mask = {"category_mask": PAGE_IS_WRITTEN | PAGE_IS_PRESENT, "return_mask": PAGE_IS_WRITTEN}
    assert scan(mm, start, pages, flags=WP, **mask) == [(0, pages, PAGE_IS_WRITTEN)]
    assert bool(mm.pgd.get(start >> 12) & HUGE) == (pages == 512)
    mm.write(start + 7 * PAGE, b"y")
    assert scan(mm, start, pages, flags=WP, **mask) == [(7, 8, PAGE_IS_WRITTEN)]
    assert scan(mm, start, pages, flags=WP, max_pages=1, **mask) == []
    verify(host)
    mm.exit()
    verify(host)


def test_a_limit_splits_a_huge_page() -> None:
    host = HostMemory(4096 * PAGE, poison="frame")
    mm = Mm(host, Trace())
    start = mm.mmap(512 * PAGE, RW)
    mm.madvise(start, 512 * PAGE, MADV_HUGEPAGE)
    mm.write(start, b"x")
    track(mm, start, 512)
    found = scan(mm, start, 512, flags=WP, max_pages=3, category_mask=PAGE_IS_WRITTEN, return_mask=0)
    assert found == [(0, 3, 0)]
    assert written(mm, start, 512) == list(range(3, 512))
    verify(host)
    mm.exit()
