"""One page out of memory: who used it, where it goes, and what keeps it.

::

    young, in the page table or to a secondary MMU (clear_flush_young)? then it stays, this time
    → anonymous: slot, swap cache → every entry becomes a swap entry, or an empty one for a page of a file
      (unmap.py: S, clear, flush, E for each)
    → anybody else with a reference? then it stays where it is → written if dirty → out of the cache, freed

The secondary MMU has to be asked *before* the page is unmapped: the announcement makes it drop what it knows. What it
wrote counts: an entry that it maps writable makes the frame dirty (PG_DIRTY), so a page that came back from swap and
was changed only by a guest is written again.

A page that somebody holds, beyond what its entries and its cache do, cannot go: it is pinned, and not even unmapped.
A page that was given away (MADV_FREE) and not written since is dropped without a slot. Pages that KSM merged go as
others do; what comes back is not merged any more (swapin.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_DIRTY, PG_SWAPBACKED, PG_SWAPCACHE, HostMemory
from xipvm.mmu.huge_page import drop_lazyfree, split_huge_page, split_huge_pages
from xipvm.mmu.huge_pmd import pmdp_clear_flush_young_notify
from xipvm.mmu.pte import ANON, EXCLUSIVE, HUGE, MAPPED, PFN_SHIFT, SOFT_DIRTY, SPECIAL, SWAP, UFFD_WP, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT, ReverseMap, reverse_map
from xipvm.mmu.unmap import unmap_all
from xipvm.mmu.vma import PROT_EXEC, VM_LOCKED

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.swap import Swap
    from xipvm.mmu.vma import Vma


class Used(IntEnum):
    """Who used a page since the last time that somebody asked."""

    NOBODY = 0
    ONE = 1
    SEVERAL = 2
    """More than one entry has seen an access."""
    CODE = 3
    """A page of a file that may be executed."""
    LOCKED = 4
    """It counts as in use always."""


_COUNTED: Final = (Used.NOBODY, Used.ONE, Used.SEVERAL)


def referenced(host: HostMemory, pfn: int) -> Used:
    """Who used the page since the last time; all forget it."""
    young, code = 0, False
    rmap = reverse_map(host)
    with rmap.walk_lock(host, pfn):
        for area, hva in list(rmap.walk(host, pfn)):
            mm, page = area.mm, hva >> PAGE_SHIFT
            if area.flags & VM_LOCKED:
                return Used.LOCKED
            with mm.ptl(hva >> PMD_SHIFT):
                entry = mm.pgd.pte(page)
                if not entry & MAPPED or pte_pfn(entry) != pfn:
                    continue
                if entry & HUGE:
                    young += pmdp_clear_flush_young_notify(mm, hva)
                elif mm.ptep_clear_flush_young_notify(hva):
                    young += 1
                    code |= bool(area.prot & PROT_EXEC) and area.file is not None
    if young and code and not host.flags(pfn) & PG_SWAPBACKED:
        return Used.CODE
    return _COUNTED[min(young, 2)]


def is_pinned(host: HostMemory, pfn: int, held: int = 0) -> bool:
    """Somebody has a reference beside entries, caches and ``held`` of the caller's."""
    flags = host.flags(pfn)
    cached = bool(flags & PG_SWAPCACHE) if flags & PG_ANON else host.mapping(pfn) != 0
    return host.refcount(pfn) > host.mapcount(pfn) + cached + held


def reclaim_page(mm: Mm, pfn: int, *, ignore_references: bool = False) -> bool:
    """Takes a mapped page out of memory; whether it could be. ``mm`` is whose trace tells of it."""
    host = mm.host
    if not host.mapcount(pfn):
        return False
    host.get(pfn)
    try:
        if not ignore_references and referenced(host, pfn):
            return False
        return take_out(mm.rmap, host, pfn)
    finally:
        mm.put_frame(pfn)


def take_out(rmap: ReverseMap, host: HostMemory, pfn: int) -> bool:
    """Takes a page out of memory, to which the caller has a reference; whether it could be. A locked one cannot."""
    page_lock = rmap.page_lock.attempt(pfn)
    if page_lock is None:
        return False
    try:
        return _take_out(rmap, host, pfn)
    finally:
        page_lock.drop()


def _take_out(rmap: ReverseMap, host: HostMemory, pfn: int) -> bool:
    lazyfree = host.flags(pfn) & (PG_ANON | PG_SWAPBACKED) == PG_ANON
    if lazyfree and host.is_compound(pfn) and host.entire_mapcount(pfn) == host.total_mapcount(pfn):
        return drop_lazyfree(host, pfn)
    if not split_huge_page(host, pfn) or is_pinned(host, pfn, 1):
        return False
    flags = host.flags(pfn)
    if not flags & PG_ANON:
        return _take_out_of_file(rmap, host, pfn)
    if flags & (PG_SWAPBACKED | PG_SWAPCACHE):
        return _swap_out(rmap, host, pfn)
    return _drop_lazyfree(host, pfn)


def _swap_entry(swap: Swap, slot: int, entry: int) -> int:
    swap.duplicate(slot)
    return SWAP | slot << PFN_SHIFT | entry & (EXCLUSIVE | SOFT_DIRTY | UFFD_WP)


def _swap_out(rmap: ReverseMap, host: HostMemory, pfn: int) -> bool:
    """Unmaps, writes and uncaches ``pfn``."""
    swap = rmap.swap
    if swap is None:
        return False
    slot = swap.slots.get(pfn)
    if slot is None:
        slot = swap.alloc()
        if slot is None:
            return False
        host.get(pfn)
        swap.add(pfn, slot)
        host.set_flags(pfn, PG_DIRTY)
    elif swap.is_closing(slot):
        return False
    place: int = slot
    gone = unmap_all(host, pfn, lambda area, entry: _swap_entry(swap, place, entry), skip=VM_LOCKED)
    point("mm.swap.unmapped")
    if not gone or host.mapcount(pfn) or swap.slots.get(pfn) != slot or host.refcount(pfn) != 2:
        return False
    if host.flags(pfn) & PG_DIRTY and swap.counts[slot]:
        host.clear_flags(pfn, PG_DIRTY)
        try:
            swap.write(pfn, slot)
        except OSError:
            host.set_flags(pfn, PG_DIRTY)
            return False
    if rmap.reclaim is not None and swap.counts[slot]:
        swap.shadows[slot] = rmap.reclaim.workingset.evicted(pfn)
    swap.delete(pfn)
    return True


def _take_out_of_file(rmap: ReverseMap, host: HostMemory, pfn: int) -> bool:
    """Unmaps a page of a file and lets the file write it where it belongs."""
    file = rmap.file(host.mapping(pfn))
    if file is None or not file.can_reclaim():
        return False
    gone = unmap_all(host, pfn, lambda area, entry: 0, skip=VM_LOCKED)
    point("mm.swap.unmapped")
    if not gone or host.mapcount(pfn) or host.refcount(pfn) != 2:
        return False
    try:
        return file.reclaim(host.index(pfn), pfn)
    except OSError:
        return False


def _drop_lazyfree(host: HostMemory, pfn: int) -> bool:
    """Drops a page that was given away, unless somebody has written to it since or holds it."""

    def replacement(area: Vma, entry: int) -> int | None:
        if host.flags(pfn) & PG_DIRTY or host.refcount(pfn) != host.mapcount(pfn) + 1:
            host.set_flags(pfn, PG_SWAPBACKED)
            return None
        return 0

    return unmap_all(host, pfn, replacement, skip=VM_LOCKED)


# ---- on demand


def pageout(mm: Mm, start: int, end: int) -> int:
    """MADV_PAGEOUT: takes the pages of ``[start, end)`` that nobody else maps out of memory; how many went.

    One page table after the other; a huge page that lies in it only in part is split first.
    """
    at, last, gone = start >> PAGE_SHIFT, end >> PAGE_SHIFT, 0
    while (found := mm.pgd.next_present(at, last)) >= 0:
        first, at = found, min((found | (HUGE_PAGES - 1)) + 1, last)
        entry = mm.pgd.huge(first)
        if entry & MAPPED and first % HUGE_PAGES == 0 and at - first == HUGE_PAGES and not entry & SPECIAL:
            if mm.host.total_mapcount(pte_pfn(entry)) == 1:
                gone += _reclaim_whole(mm, pte_pfn(entry), ignore_references=True)
            continue
        split_huge_pages(mm, first << PAGE_SHIFT, at << PAGE_SHIFT)
        for pfn in _pages(mm, first, at, files=True):
            if mm.host.mapcount(pfn) == 1 and not (entry and mm.host.is_compound(pfn)):
                gone += reclaim_page(mm, pfn, ignore_references=True)
    return gone


def _reclaim_whole(mm: Mm, pfn: int, *, ignore_references: bool = False) -> int:
    """Reclaims a page, and if that was compound and has been split for it, the others, from the end; how many went."""
    host = mm.host
    compound = host.is_compound(pfn)
    gone = int(reclaim_page(mm, pfn, ignore_references=ignore_references))
    if compound and not host.is_compound(pfn):
        gone += sum(
            reclaim_page(mm, tail, ignore_references=ignore_references) for tail in range(pfn + HUGE_PAGES - 1, pfn, -1)
        )
    return gone


def _pages(mm: Mm, first: int, end: int, *, files: bool = False) -> list[int]:
    kinds = 0 if files else ANON
    entries = mm.pgd.entries(first, end)
    return [pte_pfn(entry) for _, entry in entries if entry & MAPPED and not entry & SPECIAL and entry & kinds == kinds]


def memcg_reclaim(mm: Mm, passes: int) -> int:
    """See :meth:`Mm.memcg_reclaim`."""
    gone = 0
    for _ in range(passes):
        pages = dict.fromkeys(pfn for each in mm.rmap.mms if each.memcg == mm.memcg for pfn in _pages(each, 0, 1 << 36))
        if not pages:
            break
        for pfn in pages:
            if mm.host.compound_head(pfn) == pfn:
                gone += _reclaim_whole(mm, pfn)
            else:
                gone += reclaim_page(mm, pfn)
    return gone
