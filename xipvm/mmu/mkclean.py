"""Write-back looks at pages while nobody can write them without being noticed (page_mkclean, pfn_mkclean_range).

For every shared area that maps some of them::

    range start (PROTECTION_PAGE) → entries cleared → TLB flush → same pages, clean and read-only → range end

so that a write during or after the write-back faults, and makes the page dirty again for the next one. A huge entry is
dealt with as one; its pages are written back together, so no huge entry maps more than the pages in question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, pmdp_clear_flush
from xipvm.mmu.pte import DIRTY, HUGE, MAPPED, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.vma import Vma


def page_mkclean(file: AddressSpace, pgoff: int, pfn: int) -> None:
    """No shared entry that maps ``pfn`` as page ``pgoff`` of ``file`` is writable or dirty any more."""
    pfn_mkclean_range(file, pgoff, pfn, 1)


def pfn_mkclean_range(file: AddressSpace, pgoff: int, pfn: int, count: int) -> None:
    """As :func:`page_mkclean`, for the ``count`` pages from ``pgoff`` on, which are the frames from ``pfn`` on."""
    with file.i_mmap.read:
        for area in tuple(file.areas):
            if not area.shared:
                continue
            at = area.start + ((pgoff - area.pgoff) << PAGE_SHIFT)
            start, end = max(at, area.start), min(at + (count << PAGE_SHIFT), area.end)
            if start < end:
                _mkclean_one(area, start, end, pfn + ((start - at) >> PAGE_SHIFT))


def _mkclean_one(area: Vma, start: int, end: int, pfn: int) -> None:
    mm = area.mm
    with mm.notifiers.around_entry(start, end, RangeEvent.PROTECTION_PAGE):
        for lo in range(start & HPAGE_MASK, end, HPAGE_SIZE):  # a page table each
            with mm.ptl(lo >> PMD_SHIFT):
                first, last = max(start, lo) >> PAGE_SHIFT, min(end, lo + HPAGE_SIZE) >> PAGE_SHIFT
                for page, entry in mm.pgd.entries(first, last):
                    mine = pte_pfn(entry) == pfn + page - (start >> PAGE_SHIFT)
                    if entry & MAPPED and entry & (WRITE | DIRTY) and mine:
                        _clean(area, page << PAGE_SHIFT, entry)


def _clean(area: Vma, hva: int, entry: int) -> None:
    mm = area.mm
    if entry & HUGE:
        pmdp_clear_flush(mm, hva)
    else:
        mm.ptep_clear_flush_notify(hva)
    mm.set_pte(hva, entry & ~(WRITE | DIRTY))
