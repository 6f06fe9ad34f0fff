"""Huge entries of the primary page table: taking one away, and making 512 small ones of it.

Whoever changes a part of what a huge entry maps splits it first::

    range start (CLEAR, the 2 MiB) → 512 entries of the same pages in place of the huge one → TLB flush → range end

No page moves and none is freed; a secondary MMU has to hear of it because it may have mapped the 2 MiB by one entry of
its own. Huge entries of the huge zero page become entries of the zero page. Those of a file (its page, a device's, or
a hole) are just taken away: the next fault maps what is needed. The compound page remains one (huge_page.py splits it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY, PG_REFERENCED, ZERO_PFN
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, FLAGS, HUGE, MIGRATION, PFN_SHIFT, SPECIAL, UFFD_WP, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import VM_HUGETLB
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma

HPAGE_SIZE: Final = HUGE_PAGES << PAGE_SHIFT
HPAGE_MASK: Final = -HPAGE_SIZE
_PUD_PAGES: Final = HUGE_PAGES * HUGE_PAGES


def huge_up(hva: int) -> int:
    """``hva`` rounded up to a huge page."""
    return (hva + HPAGE_SIZE - 1) & HPAGE_MASK


def split_huge_pmd(mm: Mm, hva: int) -> None:
    """Lets small entries map what a huge one maps around ``hva``. Announced, whether there is (still) one or not."""
    start = hva & HPAGE_MASK
    with mm.notifiers.invalidate_range(start, start + HPAGE_SIZE, RangeEvent.CLEAR), mm.ptl(start >> PMD_SHIFT):
        split_huge_pmd_locked(mm, start)


def split_huge_pmd_locked(mm: Mm, start: int) -> None:
    """As :func:`split_huge_pmd`, inside a range that the caller has announced. Passes no point."""
    page, host = start >> PAGE_SHIFT, mm.host
    entry = mm.pgd.huge(page)
    if not entry:
        return
    flags = entry & FLAGS & ~HUGE
    if entry & MIGRATION:
        mm.pgd.split_huge(page, entry & ~HUGE)
        return
    if entry & SPECIAL and _of_file(mm, start):
        pmdp_clear_flush(mm, start)
        return
    if entry & SPECIAL:
        mm.pgd.split_huge(page, ZERO_PFN << PFN_SHIFT | flags | entry & UFFD_WP, 0)
    elif entry & ANON:
        mm.pgd.split_huge(page, entry & ~HUGE)
        host.split_mapping(pte_pfn(entry))
    else:
        pmdp_clear_flush(mm, start)
        page_remove_rmap(mm, entry)
        mm.put_frame(pte_pfn(entry))
        return
    if mm.trace.on:
        first = ZERO_PFN if entry & SPECIAL else pte_pfn(entry)
        mm.trace.emit("pmd_split", mm=mm.name, start=start, end=start + HPAGE_SIZE, pfn=first, flags=flags)
    mm.flush_tlb_range(start, start + HPAGE_SIZE)


def _of_file(mm: Mm, start: int) -> bool:
    """Whether the huge entry at ``start`` belongs to an area of a file, a part of which may be gone already."""
    area = mm.find_vma(start) or mm.find_vma(start + HPAGE_SIZE - PAGE_SIZE)
    return area is None or area.file is not None


def split_huge_edges(mm: Mm, start: int, end: int) -> None:
    """Splits the huge entries that lie only in part in ``[start, end)``; when it returns there is none."""
    edges = [hva for hva in (start, end) if hva & ~HPAGE_MASK]
    while edges:
        cut = next((hva for hva in edges if mm.pgd.huge(hva >> PAGE_SHIFT)), None)
        if cut is None:
            return
        split_huge_pmd(mm, cut)  # at whose end a fault may make a new one


def whole_entries(mm: Mm, start: int, end: int) -> list[tuple[int, int]]:
    """(page, entry) of the entries in ``[start, end)`` but huge ones that lie in it only in part."""
    first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    return [
        (page, entry)
        for page, entry in mm.pgd.entries(first, last)
        if not entry & HUGE or (first <= page and page + HUGE_PAGES <= last)
    ]


def vma_adjust_trans_huge(area: Vma, hva: int) -> None:
    """``area`` is about to be cut at ``hva``.

    As in Linux nobody looks whether there is a huge entry before it is announced, only whether there could be one.
    """
    start = hva & HPAGE_MASK
    if area.mm.notifiers.protocol != "modern":
        return  # there were none
    if hva == start or area.flags & VM_HUGETLB or start < area.start or start + HPAGE_SIZE > area.end:
        return
    first = (start >> PAGE_SHIFT) & -_PUD_PAGES
    if area.mm.pgd.next_present(first, first + _PUD_PAGES) >= 0:  # there is a table of huge entries
        split_huge_pmd(area.mm, hva)


def pmdp_clear_flush(mm: Mm, start: int) -> None:
    """Clears the huge entry at ``start``, which maps a page, and makes every CPU forget it."""
    old = mm.pgd.set(start >> PAGE_SHIFT, 0)
    end = start + HPAGE_SIZE
    if mm.trace.on:
        mm.trace.emit("pte_clear", mm=mm.name, start=start, end=end, pages=[(pte_pfn(old), HUGE_PAGES)])
    mm.flush_tlb_range(start, end)


def pmdp_clear_flush_young_notify(mm: Mm, hva: int) -> bool:
    """Whether the page of the huge entry around ``hva`` was used by the host or by a secondary MMU; all forget it."""
    start = hva & HPAGE_MASK
    page, end = start >> PAGE_SHIFT, start + HPAGE_SIZE
    young = mm.pgd.clear_bits(page, page + 1, ACCESSED) > 0
    if young:
        mm.flush_tlb_range(start, end)
    return mm.notifiers.clear_flush_young(start, end) or young


def page_remove_rmap(mm: Mm, entry: int) -> None:
    """The huge entry ``entry`` is gone: what it knew of the page goes to the page. The reference is left."""
    host, pfn = mm.host, pte_pfn(entry)
    if entry & DIRTY:
        host.set_flags(pfn, PG_DIRTY)
    if entry & ACCESSED:
        host.set_flags(pfn, PG_REFERENCED)
    host.add_entire_mapcount(pfn, -1)
