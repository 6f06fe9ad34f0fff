"""A write to a page whose entry is read-only: reuse it, or copy it.

A private anonymous page is reused when this entry is the only one that maps it and nobody else holds a reference:
the right is raised, nobody is told, and a secondary MMU finds out when it faults. Otherwise it is copied::

    frame allocated, data copied → range start → entry unchanged? cleared → TLB flush → new entry → range end → old put

Cleared and flushed before the new entry is there: once anybody can write the copy, nobody reads the old page at this
address. The old page keeps a reference until behind the range end. (2008: no range; the notifiers are told of the page
behind the TLB flush.)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import PG_ANON, PG_KSM, PG_SWAPBACKED, ZERO_PFN
from xipvm.mmu.huge_pmd import split_huge_pmd
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DIRTY,
    EXCLUSIVE,
    HUGE,
    PFN_SHIFT,
    SOFT_DIRTY,
    SPECIAL,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.uffd_message import UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, Userfault
from xipvm.mmu.uffd_wp import is_async
from xipvm.mmu.vma import VM_UFFD_WP, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


_WRITTEN: Final = WRITE | DIRTY | SOFT_DIRTY


def do_wp_page(mm: Mm, area: Vma, hva: int, entry: int) -> tuple[VmFault, str]:
    """``entry`` maps ``hva`` without WRITE; the area allows writing, or it is forced.

    Raises OutOfFrames, having changed nothing, and Userfault.
    """
    if entry & UFFD_WP:
        if area.flags & VM_UFFD_WP and not is_async(area):
            raise Userfault(area, hva, UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)
        if entry & HUGE:
            with mm.mmap_lock.read:
                split_huge_pmd(mm, hva)
            return VmFault.OK, "retry"
        entry &= ~UFFD_WP
        mm.set_pte(hva, entry)
    if area.shared:
        return _wp_page_shared(mm, area, hva, entry)
    if entry & ANON and (entry & EXCLUSIVE or _ours_alone(mm, pte_pfn(entry))):
        _reuse(mm, area, hva, entry)
        return VmFault.OK, "reuse"
    return VmFault.OK, "cow" if wp_page_copy(mm, area, hva, entry) else "retry"


def _ours_alone(mm: Mm, pfn: int) -> bool:
    """Nobody but the entry in question has a reference. What KSM shares stays as it is even so.

    The swap cache gives its reference up if it can.
    """
    host, swap = mm.host, mm.rmap.swap
    if host.is_compound(pfn):
        only = host.mapcount(pfn) == 1 and host.refcount(pfn) == host.total_mapcount(pfn)
        return only and all(area.mm is mm for area in mm.rmap.areas(host.mapping(pfn)))
    if swap is not None and host.refcount(pfn) == 2:
        swap.give_up_slot(pfn)
    return host.refcount(pfn) == 1 and not host.flags(pfn) & PG_KSM


def _wp_page_shared(mm: Mm, area: Vma, hva: int, entry: int) -> tuple[VmFault, str]:
    """The file hears of the first write to a clean page."""
    assert area.file is not None
    with mm.mmap_lock.read:
        fault = area.file.page_mkwrite(area.page_offset(hva), pte_pfn(entry))
    if fault not in (VmFault.OK, VmFault.NOPAGE):
        return fault, fault.name.lower()
    if fault or mm.pgd.get(hva >> PAGE_SHIFT) != entry:
        return VmFault.OK, "retry"
    mm.set_pte(hva, entry | WRITE | DIRTY | SOFT_DIRTY | ACCESSED)
    return VmFault.OK, "mkwrite"


def _reuse(mm: Mm, area: Vma, hva: int, entry: int) -> None:
    """The page is ours alone from now on, also in the reverse map: the mms it was shared with need not be searched."""
    if not mm.host.is_compound(pte_pfn(entry)):  # the rest of a compound one may be shared
        mm.host.set_rmap(pte_pfn(entry), anon_vma_prepare(area).id, area.page_offset(hva))
    mm.set_pte(hva, entry | area.new_anon | EXCLUSIVE)


def wp_page_copy(mm: Mm, area: Vma, hva: int, entry: int, *, unshare: bool = False, locked: bool = False) -> bool:
    """Replaces the page of ``entry`` by a writable copy; False when the entry changed meanwhile.

    ``unshare``: the copy is exclusive, but read-only until somebody writes, and as soft-dirty as the page was.
    ``locked``: mmap_lock is held.
    """
    host, page = mm.host, hva >> PAGE_SHIFT
    old = pte_pfn(entry)
    anon_vma_prepare(area)  # which is too late under the page table lock
    new = mm.alloc_frame(old == ZERO_PFN)
    if old != ZERO_PFN:
        host.copy(old, new)
    counted = not entry & SPECIAL
    if counted:
        host.get(old)
    spare: int = new  # what is left over in the end
    try:
        start = hva & PAGE_MASK
        with nullcontext() if locked else mm.mmap_lock.read:
            point("mm.cow.copied")
            with mm.notifiers.around_entry(start, start + PAGE_SIZE, RangeEvent.CLEAR), mm.ptl(start >> PMD_SHIFT):
                if mm.pgd.get(page) == entry:
                    mm.ptep_clear_flush_notify(start)
                    without = _WRITTEN & ~(entry & SOFT_DIRTY) if unshare else 0
                    map_new_anon(mm, area, start, new, without, entry & UFFD_WP)
                    spare = old
                    if counted:
                        host.add_mapcount(old, -1)
                    if mm.trace.on:
                        mm.trace.emit("mm_cow", mm=mm.name, hva=start, old=old, new=new)
        return spare == old
    finally:
        if counted:
            mm.put_frame(old)
        if spare == new or counted:
            mm.put_frame(spare)
        if mm.rmap.swap is not None:
            mm.rmap.swap.forget((old,))


def map_new_anon(mm: Mm, area: Vma, hva: int, pfn: int, without: int = 0, wp: int = 0) -> None:
    """Fills the empty entry of ``hva`` with ``pfn``, a private page that nobody else knows yet; takes its reference.

    The entry lacks the flags ``without``; with ``wp``, UFFD_WP, it is protected.
    """
    host = mm.host
    host.set_flags(pfn, PG_ANON | PG_SWAPBACKED)
    host.set_rmap(pfn, anon_vma_prepare(area).id, area.page_offset(hva))
    host.add_mapcount(pfn, 1)
    if wp:
        without |= WRITE
    mm.set_pte(hva, pfn << PFN_SHIFT | area.new_anon & ~without | ANON | EXCLUSIVE | wp)
