"""madvise: pages that are not needed any more, or will be soon, and areas that fork leaves out.

What each advice announces:

* DONTNEED: one range per area (CLEAR), then one flush and the free for all of them.
* FREE: one range per area (CLEAR). The entries stay and lose their young and dirty bits, the pages become lazyfree:
  reclaim may drop what nobody has written since. The secondary MMU has to drop its entries all the same: what it writes
  through an old one would make nothing dirty. What is in swap goes: reclaim may not bring an older content back.
* GUARD_INSTALL: as DONTNEED where anything is mapped, then a marker in every entry that makes each access a SIGSEGV.
* REMOVE: a hole in the file, announced to everybody who maps it.
* POPULATE_READ and _WRITE fault the pages in; a copy on write announces itself.
* PAGEOUT: one range (CLEAR) per anonymous page that goes to swap; without swap nothing happens (swap.py).
* UNMERGEABLE: one range (CLEAR) per page that KSM had merged. MERGEABLE tells nobody, merging does (ksm.py).
* HUGEPAGE and NOHUGEPAGE say where huge pages are to be made (huge_fault.py); nobody is told. COLLAPSE makes them now:
  one range (CLEAR) per 2 MiB, and for memory files one per mapped page before (collapse.py).
* Of a huge page that lies in the range only in part DONTNEED splits the entry; FREE, COLD and PAGEOUT split the page.
  Both announce the 2 MiB, inside the range if there is one.
* COLD clears young bits and flushes, GUARD_REMOVE takes the markers away, WILLNEED reads ahead, DONTFORK and DOFORK say
  what fork copies: nobody is told.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.collapse import madvise_collapse
from xipvm.mmu.fault import handle_mm_fault, why
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import (
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    PG_ACTIVE,
    PG_DIRTY,
    PG_FILE,
    PG_REFERENCED,
    PG_SWAPBACKED,
    PG_SWAPCACHE,
)
from xipvm.mmu.huge_page import split_huge_pages
from xipvm.mmu.huge_pmd import whole_entries
from xipvm.mmu.hugetlb import check_split
from xipvm.mmu.hugetlb import dontneed as hugetlb_dontneed
from xipvm.mmu.ksm import UNFIT, unmerge
from xipvm.mmu.mapping import anon_vma_prepare, merge, split
from xipvm.mmu.pageout import pageout
from xipvm.mmu.pte import ACCESSED, DEVICE, DIRTY, GUARD, PRESENT, SPECIAL, SWAP, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.reclaim import retry
from xipvm.mmu.uffd_reach import removing
from xipvm.mmu.vma import (
    PROT_WRITE,
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_NOHUGEPAGE,
    Vma,
)
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

MADV_WILLNEED: Final = 3
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_REMOVE: Final = 9
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_COLD: Final = 20
MADV_PAGEOUT: Final = 21
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103

_AFTER_2008: Final = frozenset((MADV_FREE, *range(MADV_MERGEABLE, 26), MADV_GUARD_INSTALL, MADV_GUARD_REMOVE))
"""What nobody had thought of when notifiers began."""

Piece = tuple[Vma, int, int]
"""An area and the part of it that the advice is about, in bytes."""


def madvise(mm: Mm, addr: int, length: int, advice: int) -> None:
    """See :meth:`Mm.madvise`."""
    if advice in _AFTER_2008:
        mm.notifiers.needs_modern(f"madvise: advice {advice}")
    if advice in _PAGES:
        name, refused, work = _PAGES[advice]
        if mm.uffd_used and advice in (MADV_DONTNEED, MADV_FREE):
            with mm.mmap_lock.read:
                removed = _pieces(mm, addr, length, refused, name)
            removing(removed)
        with mm.mmap_lock.read:
            pieces = _pieces(mm, addr, length, refused, name)
            if pieces:
                with mm.because("mm_madvise", start=addr, end=pieces[-1][2], advice=name):
                    for group in [[piece] for piece in pieces] if mm.notifiers.gather_per_area else [pieces]:
                        with MmuGather(mm) as gather:
                            for area, start, end in group:
                                work(mm, gather, area, start, end)
    elif advice in (MADV_POPULATE_READ, MADV_POPULATE_WRITE):
        _populate(mm, addr, length, advice == MADV_POPULATE_WRITE)
    elif advice in (MADV_REMOVE, MADV_WILLNEED):
        _advise_files(mm, addr, length, advice)
    elif advice in (MADV_DONTFORK, MADV_DOFORK):
        with mm.mmap_lock.write:
            _set_dontfork(mm, addr, length, advice == MADV_DONTFORK)
    elif advice in (MADV_MERGEABLE, MADV_UNMERGEABLE):
        _set_mergeable(mm, addr, length, advice == MADV_MERGEABLE)
    elif advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
        with mm.mmap_lock.write:
            _set_hugepage(mm, addr, length, advice == MADV_HUGEPAGE)
    elif advice == MADV_COLLAPSE:
        with mm.mmap_lock.read:
            pieces = _pieces(mm, addr, length, 0, "COLLAPSE")
        if pieces:
            with mm.because("mm_madvise", start=addr, end=pieces[-1][2], advice="COLLAPSE"):
                for _, start, end in pieces:
                    madvise_collapse(mm, start, end)
    else:
        raise MmError(errno.EINVAL, f"madvise: advice {advice}")


def _pieces(mm: Mm, addr: int, length: int, refused: int, name: str) -> list[Piece]:
    """What the range covers. Raises EINVAL when an area has a flag of ``refused``, ENOMEM for a hole."""
    start, end = mm.check_range("madvise", addr, length)
    only = mm.find_vma(start)
    if only is not None and start < end <= only.end and not only.flags & (refused | VM_HUGETLB) and name != "FREE":
        return [(only, start, end)]  # nearly always
    areas = mm.areas_in(start, end)
    for area in areas:
        if area.flags & refused or (name == "FREE" and area.file is not None):
            raise MmError(errno.EINVAL, f"madvise: MADV_{name} of {area!r}")
        if name == "DONTNEED" and area.start <= start:
            check_split(mm, "madvise", start)  # the end may cut a page: it is rounded down
        if name == "DONTNEED" and area.flags & VM_HUGETLB:
            mm.notifiers.needs_modern("MADV_DONTNEED of huge pages")
    mm.covered("madvise", start, end)
    return [(area, max(area.start, start), min(area.end, end)) for area in areas]


# ---- advice that works on the entries of one area


def _dontneed(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    if area.flags & VM_HUGETLB:
        hugetlb_dontneed(mm, gather, area, start, end)
        return
    with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
        gather.zap(start, end, keep_markers=True)


def _free(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    host, pgd, swap = mm.host, mm.pgd, mm.rmap.swap
    with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
        split_huge_pages(mm, start, end, partial=True)
        for page, entry in whole_entries(mm, start, end):
            if entry & SWAP and not entry & DEVICE:
                assert swap is not None
                pgd.set(page, 0)
                swap.free((pte_pfn(entry),))
            if entry & SPECIAL or not entry & PRESENT:
                continue
            pfn = pte_pfn(entry)
            if host.flags(pfn) & (PG_DIRTY | PG_SWAPCACHE):
                if host.mapcount(pfn) != 1:  # somebody else's data
                    continue
                if swap is not None and host.flags(pfn) & PG_SWAPCACHE and not swap.give_up_slot(pfn):
                    continue  # what is in the slot may be older than the page: it has to be written again
                host.clear_flags(pfn, PG_DIRTY)
            if entry & (ACCESSED | DIRTY):
                pgd.set(page, entry & ~(ACCESSED | DIRTY))
                gather.flush_later(page << PAGE_SHIFT, entry)
            host.clear_flags(pfn, PG_SWAPBACKED | PG_REFERENCED)
            host.lru_move(pfn, LRU_INACTIVE_FILE)


def _cold(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    host, pgd = mm.host, mm.pgd
    split_huge_pages(mm, start, end, partial=True)
    for page, entry in whole_entries(mm, start, end):
        if entry & SPECIAL or not entry & PRESENT or host.mapcount(pte_pfn(entry)) != 1:
            continue
        pfn = pte_pfn(entry)
        host.clear_flags(pfn, PG_REFERENCED)
        if host.flags(pfn) & PG_ACTIVE:
            host.lru_move(pfn, LRU_INACTIVE_FILE if host.flags(pfn) & PG_FILE else LRU_INACTIVE_ANON)
        if entry & ACCESSED:
            pgd.set(page, entry & ~ACCESSED)
            gather.flush_later(page << PAGE_SHIFT, entry)


def _pageout(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    pageout(mm, start, end)


def _guard_install(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    pgd, first, last = mm.pgd, start >> PAGE_SHIFT, end >> PAGE_SHIFT
    anon_vma_prepare(area)  # so that fork copies the markers
    while any(entry not in (GUARD, UFFD_WP) for _, entry in pgd.entries(first, last)):
        with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
            gather.zap(start, end, keep_markers=True)
    for page in range(first, last):
        pgd.set(page, GUARD)
    if mm.trace.on:
        mm.trace.emit("pte_guard", mm=mm.name, start=start, end=end, on=True)


def _guard_remove(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    for page, entry in mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if entry & GUARD:
            mm.pgd.set(page, 0)
    if mm.trace.on:
        mm.trace.emit("pte_guard", mm=mm.name, start=start, end=end, on=False)


_PAGES: Final[dict[int, tuple[str, int, Callable[[Mm, MmuGather, Vma, int, int], None]]]] = {
    MADV_DONTNEED: ("DONTNEED", VM_LOCKED, _dontneed),
    MADV_FREE: ("FREE", VM_LOCKED, _free),
    MADV_COLD: ("COLD", VM_LOCKED | VM_HUGETLB, _cold),
    MADV_PAGEOUT: ("PAGEOUT", VM_LOCKED | VM_HUGETLB, _pageout),
    MADV_GUARD_INSTALL: ("GUARD_INSTALL", VM_LOCKED | VM_HUGETLB | VM_MIXEDMAP, _guard_install),
    MADV_GUARD_REMOVE: ("GUARD_REMOVE", VM_HUGETLB | VM_MIXEDMAP, _guard_remove),
}
"""Advice by number: its name, the flags of areas that refuse it, and what to do."""


# ---- the rest


def _set_dontfork(mm: Mm, addr: int, length: int, on: bool) -> None:
    name = "DONTFORK" if on else "DOFORK"
    pieces = _pieces(mm, addr, length, 0, name)
    if not pieces:
        return
    start, end = addr, pieces[-1][2]
    with mm.because("mm_madvise", start=start, end=end, advice=name):
        change_flags(mm, start, end, VM_DONTCOPY, on)


def _set_hugepage(mm: Mm, addr: int, length: int, on: bool) -> None:
    """What there is stays as it is; faults and khugepaged go by it from now on."""
    name = "HUGEPAGE" if on else "NOHUGEPAGE"
    pieces = _pieces(mm, addr, length, 0, name)
    if pieces:
        start, end = addr, pieces[-1][2]
        with mm.because("mm_madvise", start=start, end=end, advice=name):
            flag, other = (VM_HUGEPAGE, VM_NOHUGEPAGE) if on else (VM_NOHUGEPAGE, VM_HUGEPAGE)
            change_flags(mm, start, end, flag, True, without=other)


def _set_mergeable(mm: Mm, addr: int, length: int, on: bool) -> None:
    """Areas that KSM cannot use are left out without a word. Pages are given back as a reader of mmap_lock."""
    name = "MERGEABLE" if on else "UNMERGEABLE"
    with mm.mmap_lock.write:
        pieces = [piece for piece in _pieces(mm, addr, length, 0, name) if not piece[0].flags & UNFIT]
        for _, start, end in pieces:
            change_flags(mm, start, end, VM_MERGEABLE, on)
    if not on and pieces:
        with mm.mmap_lock.read, mm.because("mm_madvise", start=addr, end=pieces[-1][2], advice=name):
            for _, start, end in pieces:
                try:
                    retry(mm.host, partial(unmerge, mm, start, end))
                except OutOfFrames:
                    raise MmError(errno.ENOMEM, f"madvise: MADV_UNMERGEABLE at {start:#x} in {mm.name}") from None


def change_flags(mm: Mm, start: int, end: int, flag: int, on: bool, *, without: int = 0) -> None:
    """Sets or clears ``flag`` of the areas in ``[start, end)``, splitting and merging them. mmap_lock is held.

    They lose the flags ``without``. Raises EINVAL where that would cut a huge page.
    """
    check_split(mm, "madvise", start, end)
    split(mm, start)
    split(mm, end)
    for area in mm.areas_in(start, end):
        area.flags = (area.flags | flag if on else area.flags & ~flag) & ~without
    merge(mm, start, end)


def _populate(mm: Mm, addr: int, length: int, write: bool) -> None:
    """Faults in what is not there. Pages that were populated before an error stay."""
    name = "POPULATE_WRITE" if write else "POPULATE_READ"
    with mm.mmap_lock.read:
        pieces = _pieces(mm, addr, length, 0, name)
        for area, _, _ in pieces:
            if not area.prot or (write and not area.prot & PROT_WRITE):
                raise MmError(errno.EINVAL, f"madvise: MADV_{name} of {area!r}")
    if pieces:
        with mm.because("mm_madvise", start=addr, end=pieces[-1][2], advice=name):
            fault_in(mm, addr, pieces[-1][2], write)


def fault_in(mm: Mm, start: int, end: int, write: bool) -> None:
    """Makes every page of ``[start, end)`` accessible. Raises EFAULT (SIGBUS, SIGSEGV) and ENOMEM. No lock is held."""
    wanted = PRESENT | WRITE if write else PRESENT
    for hva in range(start, end, PAGE_SIZE):
        while mm.pgd.get(hva >> PAGE_SHIFT) & wanted != wanted:
            fault = handle_mm_fault(mm, hva, write)
            if fault:
                error = errno.ENOMEM if fault == VmFault.OOM else errno.EFAULT
                raise MmError(error, f"populating {hva:#x} in {mm.name}: {fault.name}{why(mm, hva, fault)}")


def _advise_files(mm: Mm, addr: int, length: int, advice: int) -> None:
    """REMOVE and WILLNEED, which are the files' business and done without mmap_lock."""
    remove = advice == MADV_REMOVE
    name = "REMOVE" if remove else "WILLNEED"
    with mm.mmap_lock.read:
        pieces = _pieces(mm, addr, length, VM_LOCKED if remove else 0, name)
        todo = [(area.file, area.page_offset(lo), (hi - lo) >> PAGE_SHIFT) for area, lo, hi in pieces]
        for area, _, _ in pieces if remove else ():
            if area.file is None:
                raise MmError(errno.EINVAL, f"madvise: MADV_REMOVE of {area!r}")
            if not area.shared or not area.file.writable:
                raise MmError(errno.EACCES, f"madvise: MADV_REMOVE of {area!r}")
    if not pieces:
        return
    if remove:
        removing(pieces)
    with mm.because("mm_madvise", start=addr, end=pieces[-1][2], advice=name):
        for file, pgoff, count in todo:
            if file is not None and remove:
                file.punch_hole(pgoff, count)
            elif file is not None:
                file.readahead(pgoff, count)
