"""Faults that make or change a huge entry: the first touch of a huge page, a write to one that is read-only.

* First touch: a compound page for a write, the huge zero page for a read. Nobody is told, nothing was there.
* Write to the huge zero page: a compound page takes its place, ``range start (CLEAR, 2 MiB) → entry cleared → flush
  → new entry → range end``.
* Write to a shared huge page: reused when nobody else has it; otherwise the entry is split (huge_pmd.py, with a range
  of its own), and the fault goes on with the small entry, which copies one page.
* A page of a memory file that is part of a compound one is mapped by a huge entry where it can be.
* 2 MiB of a file that is used in place are mapped by a huge entry if the file has them so, or if they are a hole to be
  read. A write to a read-only one makes it writable, when the file has been told; or the entry goes.

Where no compound page is to be had, small pages do. Those functions return None then, and the caller goes on without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_SWAPBACKED
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, pmdp_clear_flush, split_huge_pmd
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DIRTY,
    EXCLUSIVE,
    HUGE,
    PFN_SHIFT,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.thp import alloc_huge_or_none, forbidden, suitable, thp_of
from xipvm.mmu.vma import VM_NOHUGEPAGE, VM_UFFD
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma

_WRITTEN: Final = WRITE | DIRTY | SOFT_DIRTY

Outcome = tuple[VmFault, str] | None
"""How the fault went, and the word for it in the trace; None: not with a huge page."""


def do_huge_pmd_anonymous_page(mm: Mm, area: Vma, hva: int, write: bool) -> Outcome:
    """Maps a new huge page around ``hva``, where nothing is mapped, if one is wanted and fits."""
    start = hva & HPAGE_MASK
    thp = thp_of(mm.host)
    if not suitable(area, start) or not thp.wanted(area) or not mm.pgd.pmd_none(hva >> PAGE_SHIFT):
        return None
    if write:
        head = alloc_huge_or_none(mm)
        if head is None:
            return None
        map_huge_anon(mm, area, start, head)
        return VmFault.OK, "thp"
    zero = thp.get_zero(mm) if thp.use_zero_page else None
    if zero is None:
        return None
    anon_vma_prepare(area)  # as Linux does, so that fork copies the entry
    mm.set_pte(start, zero << PFN_SHIFT | area.rights | SPECIAL | HUGE | ACCESSED)
    return VmFault.OK, "hugezero"


def do_huge_pmd_wp_page(mm: Mm, area: Vma, hva: int, entry: int) -> Outcome:
    """``entry`` is huge, maps ``hva`` and does not allow writing; ``area`` does. None: it is split, or was changed."""
    start = hva & HPAGE_MASK
    if area.file is not None and area.file.devmap:
        if area.shared and _map_device_pmd(mm, area, area.file, start, True):
            return VmFault.OK, "mkwrite"
    elif entry & SPECIAL:
        if _replace_zero(mm, area, start, entry):
            return VmFault.OK, "cow"
    elif entry & ANON and (entry & EXCLUSIVE or mm.host.refcount(pte_pfn(entry)) == 1):
        mm.host.set_rmap(pte_pfn(entry), anon_vma_prepare(area).id, area.page_offset(start))
        mm.set_pte(start, entry | area.new_anon | EXCLUSIVE)
        return VmFault.OK, "reuse"
    if mm.pgd.huge(hva >> PAGE_SHIFT) == entry:
        with mm.mmap_lock.read:
            split_huge_pmd(mm, hva)
    return None


def _replace_zero(mm: Mm, area: Vma, start: int, entry: int) -> bool:
    """A compound page in place of the huge zero page; False when there is none, or ``entry`` is not there any more."""
    head = alloc_huge_or_none(mm)
    if head is None:
        return False
    done = False
    try:
        with mm.mmap_lock.read:
            point("mm.cow.copied")
            changing = mm.notifiers.invalidate_range(start, start + HPAGE_SIZE, RangeEvent.CLEAR)
            with changing, mm.ptl(start >> PMD_SHIFT):
                if mm.pgd.huge(start >> PAGE_SHIFT) == entry:
                    pmdp_clear_flush(mm, start)
                    map_huge_anon(mm, area, start, head)
                    done = True
                    if mm.trace.on:
                        mm.trace.emit("mm_cow", mm=mm.name, hva=start, old=pte_pfn(entry), new=head)
        return done
    finally:
        if not done:
            mm.put_frame(head)


def map_huge_anon(mm: Mm, area: Vma, start: int, head: int) -> None:
    """Fills the empty huge entry at ``start`` with ``head``, which nobody else knows yet; takes its reference."""
    host = mm.host
    host.set_flags(head, PG_ANON | PG_SWAPBACKED)
    host.set_rmap(head, anon_vma_prepare(area).id, area.page_offset(start))
    host.add_entire_mapcount(head, 1)
    mm.set_pte(start, head << PFN_SHIFT | area.new_anon | ANON | EXCLUSIVE | HUGE)


def _map_device_pmd(mm: Mm, area: Vma, file: AddressSpace, start: int, write: bool) -> bool:
    """Maps the 2 MiB at ``start`` by one entry, or lets the one that is there be written; False where that cannot be.

    What ``file.huge_fault`` says stays true until its context ends (vmf_insert_pfn_pmd).
    """
    if not _may_be_huge(mm, area, start, write):
        return False
    with mm.mmap_lock.read, file.huge_fault(mm, area.page_offset(start), write) as pfn, mm.ptl(start >> PMD_SHIFT):
        if pfn is None or not _may_be_huge(mm, area, start, write):
            return False
        page = start >> PAGE_SHIFT
        entry = mm.pgd.huge(page)
        if not entry and mm.pgd.pmd_none(page):
            entry = pfn << PFN_SHIFT | area.rights | SPECIAL | HUGE
        elif not entry & PRESENT or pte_pfn(entry) != pfn:
            return False
        mm.set_pte(start, entry | ACCESSED | (_WRITTEN if write else 0))
        return True


def _may_be_huge(mm: Mm, area: Vma, start: int, write: bool) -> bool:
    """Whether ``area`` is still there, and such that the 2 MiB of a device at ``start`` may be one entry."""
    if area.flags & (VM_UFFD | VM_NOHUGEPAGE) or not suitable(area, start) or not mm.notifiers.huge_entries:
        return False
    return mm.still_writable(area, start) if write else mm.find_vma(start) is area


def map_huge_file_page(mm: Mm, area: Vma, file: AddressSpace, hva: int, write: bool) -> bool:
    """Maps the compound page that ``file`` has cached around ``hva`` by a huge entry; False where that cannot be."""
    start = hva & HPAGE_MASK
    if file.devmap:
        return mm.pgd.pmd_none(start >> PAGE_SHIFT) and _map_device_pmd(mm, area, file, start, write)
    pfn = file.cached(area.page_offset(hva))
    host = mm.host
    if pfn is None or not host.is_compound(pfn) or area.flags & VM_UFFD or (write and file.tracks_writes):
        return False
    if forbidden(area) or not suitable(area, start) or not mm.pgd.pmd_none(hva >> PAGE_SHIFT):
        return False
    head = host.compound_head(pfn)
    if host.index(head) % HUGE_PAGES:
        return False
    host.get(head)
    host.add_entire_mapcount(head, 1)
    flags = area.rights | _WRITTEN if write else area.page_prot
    mm.set_pte(start, head << PFN_SHIFT | flags | ACCESSED | HUGE)
    return True
