"""The way back from swap: a fault finds a swap entry, and makes it one that maps a page again.

::

    in the cache? else frame allocated, read, cached → entry still that one? → entry of the page → slot has one less

Nobody is told: there was nothing to lose. A write gets the page to itself if nobody else has it; otherwise it is
mapped read-only and the next fault copies, as ever. swapoff comes this way for every entry, and maps read-only.

A page that KSM had merged has places that nothing but its own root leads to, and that went when the page left memory.
Whoever comes back to it from another anon_vma than the first one, or from another place in it, gets a copy of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import PG_ANON, PG_KSM, PG_SWAPBACKED
from xipvm.mmu.pte import ACCESSED, ANON, EXCLUSIVE, PFN_SHIFT, SOFT_DIRTY, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.vma import PROT_WRITE

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.swap import Swap
    from xipvm.mmu.vma import Vma


def do_swap_page(mm: Mm, area: Vma, hva: int, entry: int, *, write: bool, unuse: bool = False) -> bool:
    """Maps the page of the swap entry ``entry``; False when somebody else changed the entry.

    Raises OutOfFrames and OSError (the slot could not be read), and has changed nothing then.
    """
    host, page, slot = mm.host, hva >> PAGE_SHIFT, pte_pfn(entry)
    swap = mm.rmap.swap
    assert swap is not None
    pfn = swap.cache.get(slot)
    if pfn is not None and not mm.rmap.page_lock.free(pfn) and mm.rmap.page_lock.wait(pfn):
        return False
    if pfn is None:
        pfn = _read(mm, area, hva, entry, swap)
        if pfn is None:
            return False
    elif mm.pgd.get(page) != entry:
        return False
    alone = not host.mapcount(pfn) and swap.counts[slot] == 1 and host.refcount(pfn) == 1
    exclusive = bool(entry & EXCLUSIVE) or (write and alone)
    assert area.anon_vma is not None
    if not host.mapping(pfn) or (exclusive and not host.flags(pfn) & PG_KSM):
        root = area.anon_vma if exclusive else area.anon_chain[0]  # the oldest one leads to all who share the page
        _set_rmap(mm, pfn, slot, root.id, area.page_offset(hva))
    elif not _leads_to(mm, pfn, area, hva):
        new = mm.alloc_frame(False)
        host.copy(pfn, new)
        host.set_flags(new, PG_ANON | PG_SWAPBACKED)
        host.set_rmap(new, area.anon_vma.id, area.page_offset(hva))
        _map(mm, area, hva, entry, new, True, write, unuse)
        swap.free((slot,))
        return True
    host.get(pfn)
    _map(mm, area, hva, entry, pfn, exclusive and not host.flags(pfn) & PG_KSM, write, unuse)
    swap.free((slot,))
    if unuse or (exclusive and (write or swap.nearly_full)):
        swap.give_up_slot(pfn)
    return True


def _read(mm: Mm, area: Vma, hva: int, entry: int, swap: Swap) -> int | None:
    """A new page of the cache with what the slot holds; None when somebody was faster."""
    host, slot = mm.host, pte_pfn(entry)
    pfn = mm.alloc_frame(False)
    try:
        swap.read(pfn, slot)
        point("mm.swap.read")
    except BaseException:
        mm.put_frame(pfn)
        raise
    if mm.pgd.get(hva >> PAGE_SHIFT) != entry or mm.find_vma(hva) is not area or slot in swap.cache:
        mm.put_frame(pfn)
        return None
    host.set_flags(pfn, PG_ANON | PG_SWAPBACKED)
    swap.add(pfn, slot)
    return pfn


def _set_rmap(mm: Mm, pfn: int, slot: int, root: int, index: int) -> None:
    """Gives a page of the cache a root; the first one makes it a page, which may belong to the working set."""
    host, swap = mm.host, mm.rmap.swap
    fresh = not host.mapping(pfn)
    host.set_rmap(pfn, root, index)
    assert swap is not None
    shadow = swap.shadows.pop(slot, None)
    if fresh and shadow is not None and mm.rmap.reclaim is not None:
        mm.rmap.reclaim.workingset.refault(pfn, shadow, swap=True)


def _leads_to(mm: Mm, pfn: int, area: Vma, hva: int) -> bool:
    """Whether the root of ``pfn`` leads to ``hva``."""
    return any(place == (area, hva) for place in mm.rmap.places(mm.host, pfn))


def _map(mm: Mm, area: Vma, hva: int, entry: int, pfn: int, exclusive: bool, write: bool, unuse: bool) -> None:
    """Puts an entry of ``pfn``, to which it takes over a reference, in the place of ``entry``."""
    mm.host.add_mapcount(pfn, 1)
    new = pfn << PFN_SHIFT | area.rights | ANON | entry & (SOFT_DIRTY | UFFD_WP)
    if exclusive:
        new |= EXCLUSIVE
    if not unuse:
        new |= ACCESSED
        if exclusive and write:
            new |= area.new_anon
        elif exclusive and area.prot & PROT_WRITE and new & area.upgrade == area.upgrade:
            new |= WRITE
    if entry & UFFD_WP:
        new &= ~WRITE
    mm.set_pte(hva, new)
