"""Faults in areas of huge pages.

An empty entry is filled with the file's page, or with a private one that is zero: there is no shared zero page here, so
a read takes a page out of the pool as a write does. Nobody is told. A write to a private area whose entry is read-only
reuses the page when this entry is its only one, and copies it otherwise, all of it::

    huge page allocated, data copied → range start (CLEAR, 2 MiB) → entry unchanged? cleared → TLB flush → new entry
    → range end → old put

**Who pays for the copy.** The page that a parent shares with its child has consumed what the parent's mapping had set
aside, so the parent's copy must come out of what is free beyond that. If there is none, the mapping's owner is served
all the same: the page is taken out of the children (unmap_ref_private), whose later faults are SIGBUS, rather than
reads of zeros where they left data, and is then the owner's alone. A child that cannot copy gets SIGBUS at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, Pfn
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, pmdp_clear_flush
from xipvm.mmu.hugetlb import LOST, WP_MARKER, HugeReserve, own_reserve, unmap_hugepage_range
from xipvm.mmu.hugetlb_pool import HugePagesInFlightError, alloc_hugetlb_page, wait_for_huge_page
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, EXCLUSIVE, HUGE, MAPPED, PFN_SHIFT, SOFT_DIRTY, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.uffd_message import (
    UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    Userfault,
)
from xipvm.mmu.unmap import migration_entry_wait
from xipvm.mmu.vma import PROT_WRITE, VM_UFFD, VM_UFFD_MINOR, VM_UFFD_MISSING, VM_UFFD_WP, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.hugetlb_file import HugetlbFile
    from xipvm.mmu.mm import Mm

Outcome = tuple[VmFault, str]
_NO_PAGE: Final = (VmFault.SIGBUS, "sigbus")
_WRITTEN: Final = WRITE | DIRTY | SOFT_DIRTY | ACCESSED


def hugetlb_fault(mm: Mm, area: Vma, address: int, write: bool) -> Outcome:
    """How the fault went, and the word for it in the trace. Raises Userfault."""
    hva = address & HPAGE_MASK
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    try:
        if not entry or entry == WP_MARKER:
            if area.flags & VM_UFFD:
                _ask_monitor(area, address, write)
            return _no_page(mm, area, hva, write)
        if not entry & MAPPED:
            migration_entry_wait(mm, hva, entry)
            return VmFault.OK, "migration"
        if write and not entry & WRITE:
            if entry & UFFD_WP:
                _ask_for_write(area, address)
                entry &= ~UFFD_WP
                mm.set_pte(hva, entry)
            return _wp(mm, area, hva, entry)
    except HugePagesInFlightError:

        def outdated() -> bool:
            return mm.pgd.get(hva >> PAGE_SHIFT) != entry or not _promised(area, hva)

        return (VmFault.OK, "retry") if wait_for_huge_page(mm.host, outdated) else _NO_PAGE
    return VmFault.OK, "spurious"


def _ask_monitor(area: Vma, address: int, write: bool) -> None:
    """Raises Userfault when the empty entry is to be told to the userfaultfd of ``area``."""
    assert area.file is not None
    assert area.uffd is not None
    has_page = area.file.has_page(area.page_offset(address))
    flags = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
    if area.huge_reserve is LOST or has_page is None:  # SIGBUS, whatever the monitor says
        return
    if has_page and area.flags & VM_UFFD_MINOR:
        raise Userfault(area, _told(area, address), flags | UFFD_PAGEFAULT_FLAG_MINOR)
    if not has_page and area.flags & VM_UFFD_MISSING:
        raise Userfault(area, _told(area, address), flags)


def _ask_for_write(area: Vma, address: int) -> None:
    """Raises Userfault for a write to a protected page, if it is protected still."""
    if area.flags & VM_UFFD_WP:
        raise Userfault(area, _told(area, address), UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)


def _told(area: Vma, address: int) -> int:
    assert area.uffd is not None
    return address if area.uffd.features & UFFD_FEATURE_EXACT_ADDRESS else address & HPAGE_MASK


def _promised(area: Vma, hva: int) -> bool:
    """Whether a page is set aside for ``hva`` that nobody has taken yet. Changes nothing."""
    file: HugetlbFile = area.file  # type: ignore[assignment]
    pgoff, reserve = area.page_offset(hva), own_reserve(area)
    if area.shared:
        return area in file.areas and pgoff in file.reserved and pgoff not in file.pages
    return reserve is not None and pgoff not in reserve.consumed


def _no_page(mm: Mm, area: Vma, hva: int, write: bool) -> Outcome:
    """Fills an empty entry."""
    file: HugetlbFile = area.file  # type: ignore[assignment]
    pgoff = area.page_offset(hva)
    if area.huge_reserve is LOST or pgoff + HUGE_PAGES > file.size >> PAGE_SHIFT:
        return _NO_PAGE
    if area.shared:
        pfn = file.grab(pgoff)
        if pfn is None:
            return _NO_PAGE
        map_cached(mm, area, hva, pfn)
        return VmFault.OK, "file"
    pfn = file.pages.get(pgoff)
    if pfn is not None:
        map_cached(mm, area, hva, pfn)
        entry = mm.pgd.get(hva >> PAGE_SHIFT)
        return _wp(mm, area, hva, entry) if write and not entry & UFFD_WP else (VmFault.OK, "file")
    pfn, _ = alloc_private(mm, own_reserve(area), pgoff)
    if pfn is None:
        return _NO_PAGE
    map_new_anon(mm, area, hva, pfn, write)
    return VmFault.OK, "anon"


def map_cached(mm: Mm, area: Vma, hva: int, pfn: int, wp: bool = False) -> None:
    """Fills the empty entry with a page of the file; where the area is shared it may be written at once.

    Protected with ``wp``, and where the marker is.
    """
    flags = WRITE | DIRTY if area.shared and area.prot & PROT_WRITE else 0
    mm.host.get(pfn)
    mm.host.add_entire_mapcount(pfn, 1)
    _set(mm, hva, pfn << PFN_SHIFT | area.rights | HUGE | ACCESSED | flags, wp)


def _set(mm: Mm, hva: int, entry: int, wp: bool) -> None:
    if wp or mm.pgd.get(hva >> PAGE_SHIFT) == WP_MARKER:
        entry = entry & ~WRITE | UFFD_WP
    mm.set_pte(hva, entry)


def map_new_anon(mm: Mm, area: Vma, hva: int, pfn: int, write: bool, wp: bool = False) -> None:
    """Fills the empty entry with a page that nobody else knows, takes its reference; read-only unless ``write``.

    Protected with ``wp``, and where the marker is.
    """
    mm.host.set_flags(pfn, PG_ANON)
    mm.host.set_rmap(pfn, anon_vma_prepare(area).id, area.page_offset(hva))
    mm.host.add_entire_mapcount(pfn, 1)
    flags = area.new_anon if write else area.rights | ACCESSED
    _set(mm, hva, pfn << PFN_SHIFT | flags | HUGE | ANON | EXCLUSIVE, wp)


def _wp(mm: Mm, area: Vma, hva: int, entry: int) -> Outcome:
    """``entry``, which is mapped without WRITE, is written to; the area allows it."""
    host, old = mm.host, pte_pfn(entry)
    if area.shared:
        mm.set_pte(hva, entry | _WRITTEN)
        return VmFault.OK, "mkwrite"
    while not (entry & ANON and host.mapcount(old) == 1):
        reserve = own_reserve(area)
        owner = bool(entry & ANON) and reserve is not None
        new, promised = alloc_private(mm, None if owner else reserve, area.page_offset(hva))
        if new is not None:
            return VmFault.OK, "cow" if _copy(mm, area, hva, entry, new, promised) else "retry"
        if not owner:
            return _NO_PAGE
        with mm.mmap_lock.read:
            _unmap_ref_private(area, area.page_offset(hva), old)
        if mm.pgd.get(hva >> PAGE_SHIFT) != entry or not mm.still_writable(area, hva):
            return VmFault.OK, "retry"
    if not entry & EXCLUSIVE:
        host.set_rmap(old, anon_vma_prepare(area).id, area.page_offset(hva))
    mm.set_pte(hva, entry | _WRITTEN | EXCLUSIVE)
    return VmFault.OK, "reuse"


def _copy(mm: Mm, area: Vma, hva: int, entry: int, new: Pfn, reserve: HugeReserve | None) -> bool:
    """Replaces the page of ``entry`` by its copy ``new``; False when the entry changed.

    ``reserve`` is what ``new`` came from, and gets it back if it is not used.
    """
    host, old = mm.host, pte_pfn(entry)
    anon_vma_prepare(area)  # which is too late under the page table lock
    for offset in range(HUGE_PAGES):
        host.copy(old + offset, new + offset)
    host.get(old)
    spare: int = new
    try:
        with mm.mmap_lock.read:
            point("mm.cow.copied")
            # In 2008 nobody was told: around_entry says nothing then, and no pte is cleared that would.
            with mm.notifiers.around_entry(hva, hva + HPAGE_SIZE, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
                if mm.pgd.get(hva >> PAGE_SHIFT) == entry:
                    pmdp_clear_flush(mm, hva)
                    map_new_anon(mm, area, hva, new, True)
                    spare = old
                    host.add_entire_mapcount(old, -1)
                    if mm.trace.on:
                        mm.trace.emit("mm_cow", mm=mm.name, hva=hva, old=old, new=new)
        return spare == old
    finally:
        mm.put_frame(old)
        mm.put_frame(spare)
        now = mm.find_vma(hva)
        if spare == new and reserve is not None and now is not None and now.huge_reserve is reserve:
            reserve.consumed.discard(now.page_offset(hva))
            host.reserved_huge_pages += 1


def alloc_private(mm: Mm, reserve: HugeReserve | None, pgoff: int) -> tuple[Pfn | None, HugeReserve | None]:
    """A page for ``pgoff`` of a private mapping, None without one; and ``reserve`` if that had it set aside."""
    promised = reserve is not None and pgoff not in reserve.consumed
    pfn = alloc_hugetlb_page(mm.host, mm.trace, reserved=promised)
    if pfn is not None and reserve is not None:
        reserve.consumed.add(pgoff)
    return pfn, reserve if promised else None


def _unmap_ref_private(area: Vma, pgoff: int, pfn: int) -> None:
    """Takes the page ``pfn`` out of the areas that share it with ``area`` and have nothing set aside."""
    assert area.file is not None
    with area.file.i_mmap.write:
        for other in tuple(area.file.areas):
            hva = other.address_of(pgoff)
            if other is area or hva is None or other.shared or other not in area.file.areas:
                continue
            if own_reserve(other) is not None:
                continue
            entry = other.mm.pgd.get(hva >> PAGE_SHIFT)
            if entry & MAPPED and pte_pfn(entry) == pfn:
                other.huge_reserve = LOST
                unmap_hugepage_range(other, hva, hva + HPAGE_SIZE)
