"""PAGEMAP_SCAN: which pages of a range are of which category, and in the same step protecting those that were written.

Writes are tracked by a userfaultfd with WP_ASYNC: a protected page is not written, a write lifts the protection and
nobody has to answer. A scan with PM_SCAN_WP_MATCHING reports what was written, and protects it again, with no gap::

    range start (PROTECTION_VMA, all that is left to scan) → entries looked at and protected → TLB flush → range end

One range covers everything, whether or not it changes anything; another one begins for each 512 regions that are
found.

An entry that was never filled is neither written nor anything else, with one exception that Linux makes: a scan for
nothing but PAGE_IS_WRITTEN calls it written where a page table is there for its neighbours. Page tables exist here as
long as they have an entry; Linux keeps them until the memory is unmapped.
"""

from __future__ import annotations

import errno
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, page_up
from xipvm.errors import MmError
from xipvm.mmu import uffd_wp
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.huge_pmd import split_huge_pmd
from xipvm.mmu.pte import ANON, GUARD, MAPPED, MIGRATION, SOFT_DIRTY, SPECIAL, UFFD_WP, pte_pfn
from xipvm.mmu.vma import TASK_SIZE, VM_SOFTDIRTY, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_GUARD: Final = 1 << 8
PM_SCAN_CATEGORIES: Final = (1 << 9) - 1

PM_SCAN_WP_MATCHING: Final = 1
PM_SCAN_CHECK_WPASYNC: Final = 2

_TABLE_PAGES: Final = 512
_BUFFER: Final = 512
"""Regions after which a scan gives up the lock, and begins another range."""


class PageRegion(NamedTuple):
    """Pages of ``[start, end)``, in bytes, that have the same categories of those that were asked for."""

    start: int
    end: int
    categories: int


class PagemapScan(NamedTuple):
    """What a scan found, and how far it came."""

    regions: list[PageRegion]
    walk_end: int
    """Where the scan stopped: behind the range, unless a limit was reached."""


class PagemapLimits(TypedDict, total=False):
    """What :func:`pagemap_scan` can be asked for, beside a range."""

    flags: int
    category_mask: int
    category_anyof_mask: int
    category_inverted: int
    return_mask: int
    max_pages: int
    vec_len: int | None


class _FullError(Exception):
    """There is no room for what was found. ``walk_end`` of the scan says where."""


class _Scan:
    def __init__(
        self, mm: Mm, flags: int, mask: int, anyof: int, inverted: int, returned: int, max_pages: int, vec_len: int
    ) -> None:
        self.mm = mm
        self.wp = bool(flags & PM_SCAN_WP_MATCHING)
        self.strict = bool(flags & PM_SCAN_CHECK_WPASYNC)
        self.mask, self.anyof, self.inverted, self.returned = mask, anyof, inverted, returned
        self.only_written = not anyof and not inverted and mask == returned == PAGE_IS_WRITTEN
        self.max_pages = max_pages
        self.room = vec_len
        self.silent = vec_len == 0
        """Nothing is reported: whatever is not protected will be."""
        self.regions: list[PageRegion] = []
        self.buffer: list[PageRegion] = []
        self.found = 0
        self.walk_end = 0

    def run(self, start: int, end: int) -> PagemapScan:
        at = start
        while at < end:
            full = self._walk(at, end)
            self.regions += self.buffer
            self.room -= len(self.buffer)
            self.buffer = []
            if not full or not self.room or self.found == self.max_pages:
                break
            at = self.walk_end
        return PagemapScan(self.regions, self.walk_end or end)

    def _walk(self, start: int, end: int) -> bool:
        """One stretch under the lock; whether it had to stop."""
        mm = self.mm
        change = mm.notifiers.invalidate_range(start, end, RangeEvent.PROTECTION_VMA) if self.wp else nullcontext()
        with mm.mmap_lock.read, change:
            areas = mm.areas_in(start, end)
            if self.strict and not all(_wp_allowed(area) for area in areas):
                raise MmError(errno.EPERM, f"PAGEMAP_SCAN: part of [{start:#x}, {end:#x}) does not track writes")
            try:
                for area in areas:
                    self._area(area, max(area.start, start), min(area.end, end))
            except _FullError:
                return True
        return False

    def _area(self, area: Vma, start: int, end: int) -> None:
        allowed = _wp_allowed(area)
        if self.wp and not allowed:
            return
        common = (PAGE_IS_WPALLOWED if allowed else 0) | (PAGE_IS_SOFT_DIRTY if area.flags & VM_SOFTDIRTY else 0)
        if self.mask & PAGE_IS_WPALLOWED & ~(common ^ self.inverted):
            return
        holes = self._interesting(common)
        at, last, pgd = start >> PAGE_SHIFT, end >> PAGE_SHIFT, self.mm.pgd
        while at < last:
            populated = pgd.next_present(at & -_TABLE_PAGES, -(-last // _TABLE_PAGES) * _TABLE_PAGES)
            table = last if populated < 0 else max(at, min(populated & -_TABLE_PAGES, last))
            if at < table and holes:
                self._hole(area, common, at << PAGE_SHIFT, table << PAGE_SHIFT)
            if table < last:
                self._table(area, common, table, min((table & -_TABLE_PAGES) + _TABLE_PAGES, last))
            at = (table & -_TABLE_PAGES) + _TABLE_PAGES if table < last else last

    def _hole(self, area: Vma, common: int, start: int, end: int) -> None:
        """No page table is there."""
        reached = self._output(common, start, end)
        if self.wp and start < reached:
            uffd_wp.change(self.mm, area, start, reached, True)
        self._stop_before(reached, end)

    def _table(self, area: Vma, common: int, first: int, last: int) -> None:
        """The pages of one page table, which is there."""
        huge = self.mm.pgd.huge(first)
        if huge and not self._huge(area, common | _huge_categories(huge), first, last):
            return
        entries = dict(self.mm.pgd.entries(first, last))
        todo: list[int] = []
        try:
            for page in range(first, last):
                categories = self._categories(area, common, entries.get(page, 0))
                if categories < 0:
                    continue
                hva = page << PAGE_SHIFT
                reached = self._output(categories, hva, hva + PAGE_SIZE)
                if self.wp and categories & PAGE_IS_WRITTEN and hva < reached:
                    todo.append(page)
                self._stop_before(reached, hva + PAGE_SIZE)
        finally:
            self._protect(area, todo)

    def _huge(self, area: Vma, categories: int, first: int, last: int) -> bool:
        """The pages of a huge entry; whether it had to be split, as a part of it can only be protected then."""
        if not self._interesting(categories):
            return False
        start, end = first << PAGE_SHIFT, last << PAGE_SHIFT
        protects = self.wp and bool(categories & PAGE_IS_WRITTEN)
        if protects and (last - first < _TABLE_PAGES or 0 < self.max_pages < self.found + _TABLE_PAGES):
            split_huge_pmd(self.mm, start)
            return True
        reached = self._output(categories, start, end)
        if protects and reached == end:
            self._protect(area, list(range(first, last)))
        self._stop_before(reached, end)
        return False

    def _categories(self, area: Vma, common: int, entry: int) -> int:
        """Those of one entry, -1 if it does not count."""
        if self.only_written or (self.silent and self.wp):
            return -1 if entry & UFFD_WP else common | PAGE_IS_WRITTEN
        categories = common | _categories(area, entry)
        return categories if self._interesting(categories) else -1

    def _interesting(self, categories: int) -> bool:
        categories ^= self.inverted
        return categories & self.mask == self.mask and (not self.anyof or bool(categories & self.anyof))

    def _output(self, categories: int, start: int, end: int) -> int:
        """Reports pages; up to where there was room."""
        if self.silent:
            return end
        categories &= self.returned
        reached = end
        if self.max_pages:
            reached = min(end, start + (self.max_pages - self.found << PAGE_SHIFT))
        buffer = self.buffer
        if buffer and buffer[-1].end == start and buffer[-1].categories == categories:
            buffer[-1] = PageRegion(buffer[-1].start, reached, categories)
        elif len(buffer) < min(_BUFFER, self.room):
            if start < reached:
                buffer.append(PageRegion(start, reached, categories))
        else:
            reached = start
        self.found += reached - start >> PAGE_SHIFT
        return reached

    def _stop_before(self, reached: int, end: int) -> None:
        if reached < end:
            self.walk_end = reached
            raise _FullError

    def _protect(self, area: Vma, pages: list[int]) -> None:
        """Protects ``pages`` and flushes what was known of them."""
        if not pages:
            return
        first = at = pages[0]
        for page in [*pages[1:], -1]:
            if page != at + 1:
                uffd_wp.protect(self.mm, area, first, at + 1)
                first = page
            at = page
        self.mm.flush_tlb_range(pages[0] << PAGE_SHIFT, (pages[-1] + 1) << PAGE_SHIFT)


def _wp_allowed(area: Vma) -> bool:
    return uffd_wp.is_async(area) and uffd_wp.uses_markers(area)


def _categories(area: Vma, entry: int) -> int:
    if not entry:
        return 0
    written = 0 if entry & UFFD_WP else PAGE_IS_WRITTEN
    found = written | (PAGE_IS_SOFT_DIRTY if entry & SOFT_DIRTY else 0)
    if entry & MAPPED:
        found |= PAGE_IS_PRESENT
        if entry & SPECIAL:
            return found | (PAGE_IS_PFNZERO if pte_pfn(entry) == ZERO_PFN else 0)
        return found | (0 if entry & ANON else PAGE_IS_FILE)
    found |= PAGE_IS_SWAPPED
    if entry & GUARD:
        return found | PAGE_IS_GUARD
    return found | (PAGE_IS_FILE if entry & MIGRATION and not entry & ANON else 0)


def _huge_categories(entry: int) -> int:
    found = PAGE_IS_HUGE | (0 if entry & UFFD_WP else PAGE_IS_WRITTEN)
    found |= PAGE_IS_SOFT_DIRTY if entry & SOFT_DIRTY else 0
    if not entry & MAPPED:
        return found | PAGE_IS_SWAPPED | (0 if entry & ANON else PAGE_IS_FILE)
    return found | PAGE_IS_PRESENT | (PAGE_IS_PFNZERO if entry & SPECIAL else 0 if entry & ANON else PAGE_IS_FILE)


def pagemap_scan(
    mm: Mm,
    start: int,
    end: int,
    *,
    flags: int = 0,
    category_mask: int = 0,
    category_anyof_mask: int = 0,
    category_inverted: int = 0,
    return_mask: int = PM_SCAN_CATEGORIES,
    max_pages: int = 0,
    vec_len: int | None = None,
) -> PagemapScan:
    """The pages of ``[start, end)``, in bytes, that have all categories of ``category_mask`` and one of the other mask.

    ``category_inverted``: of these, not to have one counts as having it. ``flags``: PM_SCAN_WP_MATCHING protects the
    written pages that are found, where that is possible, and leaves out areas where it is not; PM_SCAN_CHECK_WPASYNC
    makes those an error. ``max_pages``: the scan ends behind so many, 0 is no limit; ``vec_len``: or behind so many
    regions, None is no limit, 0 reports none and with WP_MATCHING protects everything. Errors: EINVAL (an unaligned
    start, unknown bits), EFAULT (no range of the address space), EPERM (see above), and nothing has changed then.
    """
    mm.check_alive("PAGEMAP_SCAN")
    known = category_mask | category_anyof_mask | category_inverted | return_mask
    if (
        flags & ~(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC)
        or known & ~PM_SCAN_CATEGORIES
        or start & ~PAGE_MASK
        or max_pages < 0
        or (vec_len is not None and vec_len < 0)
    ):
        raise MmError(errno.EINVAL, f"PAGEMAP_SCAN({start:#x}, {end:#x})")
    if not 0 <= start <= end <= TASK_SIZE:
        raise MmError(errno.EFAULT, f"PAGEMAP_SCAN({start:#x}, {end:#x})")
    room = TASK_SIZE if vec_len is None else vec_len
    scan = _Scan(mm, flags, category_mask, category_anyof_mask, category_inverted, return_mask, max_pages, room)
    with mm.because("pagemap_scan", start=start, end=page_up(end), wp=scan.wp):
        return scan.run(start, page_up(end))
