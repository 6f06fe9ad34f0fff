"""Write protection by userfaultfd: the UFFD_WP bit, where it goes, and the markers that stand in for it.

An entry with UFFD_WP never has WRITE, whatever its area allows; every change of the bit keeps that. A write to it is
told to the monitor, or with WP_ASYNC only lifts the bit, which is how writes are tracked (pagemap.py).

Protecting and lifting are changes of protection::

    range start (PROTECTION_VMA) → bits set, WRITE cleared; or bits cleared, WRITE back where no fault is needed
    → range end → TLB flush

Where nothing is mapped there is no bit to set. A *marker*, UFFD_WP alone in an entry, keeps the protection of an empty
place: pages of files are taken out of page tables at any time and come back by themselves, so there it is always used;
for anonymous memory only with WP_UNPOPULATED. A fault turns a marker into a protected entry. Without markers there is
no range, either, where nothing is mapped at all. Huge entries that lie in the range in part, and all of files, are
split inside it, with a range of their own.

Zapping keeps the protection of file mappings, unless the area itself goes, and forgets that of anonymous memory, whose
page is lost. Swap, migration and KSM take the bit along; a copy on write comes behind the monitor's word and has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import split_huge_edges, split_huge_pmd
from xipvm.mmu.pte import ANON, HUGE, MAPPED, MIGRATION, POISON, PRESENT, PROTNONE, SWAP, UFFD_WP, WRITE
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import VM_HUGETLB, VM_UFFD_WP, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15

_PUD_PAGES: Final = 1 << 18


def uses_markers(area: Vma) -> bool:
    """Empty entries of ``area`` can be protected."""
    if not area.flags & VM_UFFD_WP or area.uffd is None:
        return False
    return area.file is not None or bool(area.uffd.features & UFFD_FEATURE_WP_UNPOPULATED)


def is_async(area: Vma) -> bool:
    """Writes to protected pages of ``area`` are let through, and only remembered."""
    return bool(area.flags & VM_UFFD_WP) and area.uffd is not None and bool(area.uffd.features & UFFD_FEATURE_WP_ASYNC)


def change(mm: Mm, area: Vma, start: int, end: int, on: bool) -> None:
    """Protects ``[start, end)`` of ``area``, or lifts the protection. See the module."""
    first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    if not (on and uses_markers(area)):
        populated = mm.pgd.next_present(first, last)
        if populated < 0:
            return
        start = max(first, populated & ~(_PUD_PAGES - 1)) << PAGE_SHIFT
    with mm.notifiers.invalidate_range(start, end, RangeEvent.PROTECTION_VMA):
        split_huge_edges(mm, start, end)
        if on and area.file is not None:  # a marker stands for one page
            for page, entry in mm.pgd.entries(first, last):
                if entry & HUGE:
                    split_huge_pmd(mm, page << PAGE_SHIFT)
        mm.ptl.wait_range(start >> PMD_SHIFT, (end - 1 >> PMD_SHIFT) + 1)
        flush = protect(mm, area, first, last) if on else _lift(mm, area, first, last)
    if flush:
        point("mm.uffd_wp.unflushed")
        mm.flush_tlb_range(start, end)


def protect(mm: Mm, area: Vma, first: int, last: int) -> bool:
    """Protects the pages ``[first, last)``, which a range covers; whether TLBs must be flushed behind it."""
    pgd, trace = mm.pgd, mm.trace
    for kind in (PRESENT, PROTNONE):
        pgd.set_bits(first, last, UFFD_WP, kind)
    for kind in (SWAP, MIGRATION):
        pgd.change_bits(first, last, WRITE, UFFD_WP, kind)
    flushes, changed = pgd.protect(first, last, area.rights, 0, trace.on)
    for lo, hi, flags in changed:
        trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
    if uses_markers(area):
        at = first
        for page, entry in [*pgd.entries(first, last), (last, 0)]:
            for empty in range(at, page):
                pgd.set(empty, UFFD_WP)
            at = page + (HUGE_PAGES if entry & HUGE else 1)
    return flushes > 0


def _lift(mm: Mm, area: Vma, first: int, last: int) -> bool:
    pgd, trace = mm.pgd, mm.trace
    for page, entry in pgd.entries(first, last):
        if entry == UFFD_WP:
            pgd.set(page, 0)
    pgd.clear_bits(first, last, UFFD_WP)
    flushes, changed = pgd.protect(first, last, area.page_prot, area.upgrade, trace.on)
    for lo, hi, flags in changed:
        trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
    return flushes > 0


def before_zap(mm: Mm, start: int, end: int, keep_anon: bool) -> list[int]:
    """Before the entries of areas that stay are zapped: the pages that are protected afterwards, too (:func:`mark`).

    Markers that do not outlive it are taken away.
    """
    pages: list[int] = []
    for area in mm.areas_in(start, end):
        if area.flags & VM_HUGETLB:  # whose markers are of its own (hugetlb_uffd.py)
            continue
        lo, hi = max(area.start, start) >> PAGE_SHIFT, min(area.end, end) >> PAGE_SHIFT
        for page, entry in mm.pgd.entries(lo, hi):
            if entry == POISON:
                if not keep_anon:
                    mm.pgd.set(page, 0)
            elif not entry & UFFD_WP:
                continue
            elif area.file is None or not area.flags & VM_UFFD_WP:
                if entry == UFFD_WP:
                    mm.pgd.set(page, 0)
            elif entry != UFFD_WP and not (keep_anon and entry & (ANON | SWAP)):
                pages.append(page)
    return pages


def mark(mm: Mm, pages: Iterable[int]) -> None:
    """Puts markers into entries that have just been cleared."""
    for page in pages:
        mm.pgd.set(page, UFFD_WP)


def forget(mm: Mm, first: int, last: int) -> None:
    """No entry of the pages ``[first, last)`` is protected any more; writes fault all the same and find that out."""
    for page, entry in mm.pgd.entries(first, last):
        if entry & UFFD_WP:
            mm.pgd.set(page, entry & ~UFFD_WP if entry != UFFD_WP | HUGE else 0)


def protected(entry: int, flags: int) -> int:
    """The flags of a new entry in the place of ``entry``: protected if that was a marker."""
    return flags & ~WRITE | UFFD_WP if entry == UFFD_WP and not entry & MAPPED else flags
