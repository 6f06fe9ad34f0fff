"""Page faults of the primary MMU: what happens when an entry is missing or does not allow the access.

A fault never notifies when it fills an empty entry; only a copy made on write does (cow.py). It is atomic except where
a file may sleep, and behind that everything is looked at again: when the world has changed, the fault reports OK
without having done anything, and whoever needs the page faults again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.errors import OutOfFrames
from xipvm.locks import check
from xipvm.mmu.cow import do_wp_page, map_new_anon
from xipvm.mmu.device_private import do_device_entry
from xipvm.mmu.file import FaultResult, VmFault
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.huge_fault import do_huge_pmd_anonymous_page, do_huge_pmd_wp_page, map_huge_file_page
from xipvm.mmu.hugetlb_fault import hugetlb_fault
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import (
    ACCESSED,
    DEVICE,
    DIRTY,
    GUARD,
    HUGE,
    MAPPED,
    PFN_SHIFT,
    POISON,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    UFFD_WP,
    WRITE,
)
from xipvm.mmu.reclaim import make_room
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.swapin import do_swap_page
from xipvm.mmu.uffd_message import (
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WRITE,
    Userfault,
    handle_userfault,
)
from xipvm.mmu.uffd_wp import protected
from xipvm.mmu.unmap import migration_entry_wait
from xipvm.mmu.vma import (
    PROT_WRITE,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_SHARED,
    VM_UFFD,
    VM_UFFD_MINOR,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    Vma,
)

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm

FAULT_AROUND_PAGES: Final = 16
_UNFORCED: Final = VM_SHARED | VM_HUGETLB
"""Nobody is given a page to write to in such an area if it cannot be written."""
_VACANT: Final = (0, UFFD_WP)
"""Entries that can be filled."""
_OK: Final = VmFault.OK  # attributes of enumerations are slow
_NOPAGE: Final = VmFault.NOPAGE
_WORDS: Final = {fault: fault.name.lower() for fault in VmFault}
"""For traces."""


def handle_mm_fault(mm: Mm, hva: int, write: bool, force: bool = False) -> VmFault:
    """Makes the entry of ``hva`` allow the access, as far as the areas do.

    ``force``, for writes: a private area gets a page of its own to write to whatever its protection says (FOLL_FORCE),
    but no entry that allows it.
    """
    point("mm.fault")
    if mm.mmap_lock.writer or check.checker is not None:
        mm.mmap_lock.wait_for_writer()
    if mm.ptl.held:
        mm.ptl.not_others(hva >> PMD_SHIFT)
    area = mm.cached_vma
    if area is None or not area.start <= hva < area.end:
        area = mm.find_vma(hva)
    if area is None or (
        (not area.prot or (write and not area.prot & PROT_WRITE)) and (not force or area.flags & _UNFORCED)
    ):
        result, how = VmFault.SIGSEGV, "sigsegv"
    else:
        try:
            result, how = _fault(mm, area, hva, write)
            if result and result == _NOPAGE:
                result, how = _OK, "retry"
        except OutOfFrames:
            result, how = (_OK, "reclaim") if make_room(mm.host, mm) else (VmFault.OOM, "oom")
        except Userfault as fault:
            result, how = handle_userfault(mm, fault)
    if mm.trace.on:
        mm.trace.emit("mm_fault", mm=mm.name, hva=hva & PAGE_MASK, access="write" if write else "read", result=how)
    return result


def why(mm: Mm, hva: int, fault: VmFault) -> str:
    """What is to be added to the name of ``fault``, which the access to ``hva`` just got, by the file mapped there."""
    area = mm.find_vma(hva) if fault == VmFault.SIGBUS else None
    known = "" if area is None or area.file is None else area.file.why_not(area.page_offset(hva))
    return f" ({known})" if known else ""


def _fault(mm: Mm, area: Vma, hva: int, write: bool) -> tuple[VmFault, str]:
    """By what is there: how it went, and the word for it in the trace. Raises OutOfFrames, having changed nothing."""
    if area.flags & VM_HUGETLB:
        return hugetlb_fault(mm, area, hva, write)
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    if entry & HUGE and entry & MAPPED and write and not entry & (WRITE | UFFD_WP):
        outcome = do_huge_pmd_wp_page(mm, area, hva, entry)
        if outcome is not None:
            return outcome
        if mm.find_vma(hva) is not area:
            return _OK, "retry"
        entry = mm.pgd.get(hva >> PAGE_SHIFT)  # a small one now
    if entry and entry != UFFD_WP:
        if not entry & MAPPED:
            return _do_nonpresent(mm, area, hva, entry, write)
        if write and not entry & WRITE:
            if entry & HUGE and not entry & UFFD_WP:
                return _OK, "retry"
            return do_wp_page(mm, area, hva, entry)
        return _OK, "spurious"
    if entry and not area.flags & VM_UFFD_WP:  # a marker that was left over
        mm.pgd.set(hva >> PAGE_SHIFT, 0)
        entry = 0
    if area.flags & VM_UFFD:
        _ask_monitor(area, hva, write)
    if area.file is None:
        if not entry and (area.flags & VM_HUGEPAGE or mm.rmap.thp_always):
            outcome = do_huge_pmd_anonymous_page(mm, area, hva, write)
            if outcome is not None:
                return outcome
        return _do_anonymous_page(mm, area, hva, write, entry)
    if not write:
        return _do_read_fault(mm, area, area.file, hva)
    if area.flags & VM_SHARED:
        return _do_shared_fault(mm, area, area.file, hva)
    return _do_cow_fault(mm, area, area.file, hva)


def _do_nonpresent(mm: Mm, area: Vma, hva: int, entry: int, write: bool) -> tuple[VmFault, str]:
    """``entry`` maps nothing and says why. Raises OutOfFrames."""
    if entry & GUARD:
        return VmFault.SIGSEGV, "guard"
    if entry == POISON:
        return VmFault.SIGBUS, "poison"
    if entry & SWAP and entry & DEVICE:
        return do_device_entry(mm, area, hva, entry)
    if entry & SWAP:
        try:
            return _OK, "swapin" if do_swap_page(mm, area, hva & PAGE_MASK, entry, write=write) else "retry"
        except OSError:
            return VmFault.SIGBUS, "swap error"
    migration_entry_wait(mm, hva, entry)
    return _OK, "migration"


def _ask_monitor(area: Vma, hva: int, write: bool) -> None:
    """Raises Userfault when the missing entry is to be told to the userfaultfd of ``area``."""
    access = UFFD_PAGEFAULT_FLAG_WRITE if write else 0
    has_page = False if area.file is None else area.file.has_page(area.page_offset(hva))
    if has_page and area.flags & VM_UFFD_MINOR:
        raise Userfault(area, hva, access | UFFD_PAGEFAULT_FLAG_MINOR)
    if has_page is False and area.flags & VM_UFFD_MISSING:
        raise Userfault(area, hva, access)


def _do_anonymous_page(mm: Mm, area: Vma, hva: int, write: bool, marker: int) -> tuple[VmFault, str]:
    """A new zeroed frame for a write, the zero page for a read; in the place of ``marker``."""
    page = hva >> PAGE_SHIFT
    if write and marker:
        map_new_anon(mm, area, hva, mm.alloc_frame(True), 0, UFFD_WP)
        return _OK, "anon"
    if write:
        root = area.anon_vma or anon_vma_prepare(area)
        pfn = mm.pgd.map_anon(page, area.new_anon, mm.host, root.id, area.pgoff + page - (area.start >> PAGE_SHIFT))
        if mm.trace.on:
            mm.trace.emit("page_alloc", pfn=pfn)
            mm.emit_pte_set(hva, mm.pgd.get(page))
        return _OK, "anon"
    mm.set_pte(hva, ZERO_PFN << PFN_SHIFT | area.rights | SPECIAL | ACCESSED | marker)
    return _OK, "zero"


def _do_read_fault(mm: Mm, area: Vma, file: AddressSpace, hva: int) -> tuple[VmFault, str]:
    """The file's page, read-only where writes have to be noticed; with it its neighbours that are cached."""
    page = hva >> PAGE_SHIFT
    if map_huge_file_page(mm, area, file, hva, False):
        return _OK, "thp"
    if not file.mixed and not area.flags & (VM_UFFD_WP | VM_UFFD_MINOR):
        _map_around(mm, area, file, page)
        if mm.pgd.get(page):
            return _OK, "file"
    pfn, fault = _ask(mm, area, file, hva, False)
    if fault:
        return fault, _WORDS[fault]
    if mm.find_vma(hva) is not area or mm.pgd.get(page) not in _VACANT:
        mm.put_frame(pfn)
        return _OK, "retry"
    _map_file_page(mm, area, page, pfn, area.page_prot | ACCESSED)
    return _OK, "file"


def _map_around(mm: Mm, area: Vma, file: AddressSpace, page: int) -> None:
    """Maps the pages of the aligned group of 16 that are in the page cache and not mapped yet."""
    first = max(page & -FAULT_AROUND_PAGES, area.start >> PAGE_SHIFT)
    end = min((page & -FAULT_AROUND_PAGES) + FAULT_AROUND_PAGES, area.end >> PAGE_SHIFT)
    offset = area.page_offset(first << PAGE_SHIFT) - first
    for near in range(first, end):
        pfn = file.cached(near + offset)
        if pfn is not None and not mm.pgd.get(near):
            mm.host.get(pfn)
            _map_file_page(mm, area, near, pfn, area.page_prot | (ACCESSED if near == page else 0))


def _do_shared_fault(mm: Mm, area: Vma, file: AddressSpace, hva: int) -> tuple[VmFault, str]:
    """The file's page, writable; the file hears of the write first."""
    page, pgoff = hva >> PAGE_SHIFT, area.page_offset(hva)
    if map_huge_file_page(mm, area, file, hva, True):
        return _OK, "thp"
    pfn, fault = _ask(mm, area, file, hva, True)
    if fault:
        return fault, _WORDS[fault]
    with mm.mmap_lock.read:
        fault = file.page_mkwrite(pgoff, pfn)
    if not fault and mm.still_writable(area, hva) and mm.pgd.get(page) in _VACANT:
        _map_file_page(mm, area, page, pfn, area.rights | WRITE | DIRTY | SOFT_DIRTY | ACCESSED)
        return _OK, "file"
    mm.put_frame(pfn)
    if fault in (_OK, VmFault.NOPAGE):
        return _OK, "retry"
    return fault, _WORDS[fault]


def _do_cow_fault(mm: Mm, area: Vma, file: AddressSpace, hva: int) -> tuple[VmFault, str]:
    """A private copy of a page that is not mapped yet: nobody can have a translation, so nobody is told."""
    page = hva >> PAGE_SHIFT
    new = mm.alloc_frame(False)
    try:
        pfn, fault = _ask(mm, area, file, hva, False)
    except BaseException:
        mm.put_frame(new)
        raise
    if not fault:
        mm.host.copy(pfn, new)
        mm.put_frame(pfn)
        if mm.find_vma(hva) is area and mm.pgd.get(page) in _VACANT:
            map_new_anon(mm, area, hva, new, 0, mm.pgd.get(page))
            return _OK, "cow"
    mm.put_frame(new)
    return fault, _WORDS[fault] if fault else "retry"


def _ask(mm: Mm, area: Vma, file: AddressSpace, hva: int, write: bool) -> FaultResult:
    """The file's page, which may take a while, without mmap_lock: the area can be another one, or none, afterwards."""
    found = file.fault(area, area.page_offset(hva), write)
    if not mm.mmap_lock.writer:
        return found
    if not found[1]:
        mm.put_frame(found[0])
    mm.mmap_lock.wait_for_writer()
    return 0, _NOPAGE  # the file may have lost the page, too, meanwhile


def _map_file_page(mm: Mm, area: Vma, page: int, pfn: int, flags: int) -> None:
    """Fills the vacant entry of ``page``; the reference to ``pfn`` becomes the entry's."""
    assert area.file is not None
    flags = protected(mm.pgd.get(page), flags)
    if area.file.mixed:
        flags |= SPECIAL
    else:
        mm.host.add_mapcount(pfn, 1)
    mm.set_pte(page << PAGE_SHIFT, pfn << PFN_SHIFT | flags)
