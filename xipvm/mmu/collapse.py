"""Small pages become a compound one: MADV_COLLAPSE, and khugepaged.

Anonymous memory; mmap_lock is held for writing, so that nobody faults meanwhile::

    range start (CLEAR, 2 MiB) → the page table is taken away → TLB flush → range end
    → pages that somebody else holds? then the table comes back → contents copied, old pages freed → one huge entry

That the old pages are copied and freed behind the range end is all right: nothing maps anything there by then, and
nobody can look anything up before the lock is dropped.

Memory files; no lock, the pages are in the page cache::

    every mapped page unmapped, with a range of its own → contents copied → compound page in the page cache
    → for each area that had a page table there: range start (CLEAR, 2 MiB) → table taken away → TLB flush → range end
    → old pages freed → one huge entry where MADV_COLLAPSE was asked for

khugepaged looks at areas where huge pages are wanted (thp.py) and collapses what is in use and has not too many holes;
here it makes one round over all mms whenever it is called. It does anonymous memory only.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, page_up
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.fault import handle_mm_fault
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY, PG_REFERENCED, PG_SWAPBACKED, PG_SWAPCACHE, HostMemory
from xipvm.mmu.huge_fault import map_huge_anon, map_huge_file_page
from xipvm.mmu.huge_page import put_pages
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, huge_up
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, GUARD, MAPPED, SPECIAL, SWAP, UFFD_WP, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT, reverse_map
from xipvm.mmu.thp import Thp, alloc_huge_or_none, forbidden, suitable, thp_of
from xipvm.mmu.unmap import unmap_all
from xipvm.mmu.vma import VM_UFFD, Vma
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

_TRIES: Final = 10
"""How often pages of a file that are mapped again meanwhile are unmapped."""


def madvise_collapse(mm: Mm, start: int, end: int) -> None:
    """MADV_COLLAPSE of ``[start, end)``: of every aligned 2 MiB in it.

    Raises MmError when one could not be: EINVAL (nothing there, or it does not fit), ENOMEM (no compound page), EAGAIN
    (a page is held by somebody), EFAULT. Those that could are.
    """
    first, last, failed = huge_up(start), end & HPAGE_MASK, 0
    if first > last:
        failed = errno.EINVAL
    for hva in range(first, last, HPAGE_SIZE):
        failed = _collapse(mm, hva, None) or failed
    if failed:
        raise MmError(failed, f"madvise: MADV_COLLAPSE of {start:#x}..{end:#x} in {mm.name}")


def khugepaged_scan(host: HostMemory) -> int:
    """One round of khugepaged over all mms; how many huge pages it made."""
    thp = thp_of(host)
    made = 0
    for mm in tuple(reverse_map(host).mms):
        for area in [area for area in mm.vmas if area.file is None and thp.wanted(area)]:
            for hva in range(huge_up(area.start), area.end & HPAGE_MASK, HPAGE_SIZE):
                point("khugepaged.scan")
                if not mm.dead and not mm.pgd.huge(hva >> PAGE_SHIFT):
                    made += not _collapse(mm, hva, thp)
    return made


def _collapse(mm: Mm, hva: int, limits: Thp | None) -> int:
    """Makes the 2 MiB at ``hva`` a huge page: 0, or the errno that says why not. ``limits`` are khugepaged's."""
    area = mm.find_vma(hva)
    if area is None or forbidden(area) or not suitable(area, hva):
        return errno.EINVAL
    if mm.pgd.huge(hva >> PAGE_SHIFT):
        return 0
    if area.file is None:
        return _collapse_anon(mm, area, hva, limits)
    return _collapse_file(mm, area, area.file, hva) if isinstance(area.file, ShmemFile) else errno.EINVAL


# ---- anonymous memory


def _collapse_anon(mm: Mm, area: Vma, hva: int, limits: Thp | None) -> int:
    error = _look(mm, area, hva, limits)
    if error:
        return error
    head = alloc_huge_or_none(mm)
    if head is None:
        return errno.ENOMEM
    error = _swap_in(mm, hva)
    if not error:
        with mm.mmap_lock.write:
            if mm.dead or mm.find_vma(hva) is not area or forbidden(area) or not suitable(area, hva):
                error = errno.EINVAL
            else:
                error = _look(mm, area, hva, limits) or _replace(mm, area, hva, head)
    if error:
        mm.put_frame(head)
    return error


def _look(mm: Mm, area: Vma, hva: int, limits: Thp | None) -> int:
    """Whether the pages at ``hva`` can become one, as far as can be seen without touching them."""
    host, page = mm.host, hva >> PAGE_SHIFT
    entries = mm.pgd.entries(page, page + HUGE_PAGES)
    if not entries or mm.pgd.huge(page):
        return errno.EINVAL
    shared = swapped = young = 0
    none = HUGE_PAGES - len(entries)
    for at, entry in entries:
        if entry & UFFD_WP:
            return errno.EINVAL
        if not entry & MAPPED:
            if not entry & SWAP:
                return errno.EINVAL if entry & GUARD else errno.EAGAIN
            swapped += 1
            continue
        if entry & SPECIAL:
            none += 1
            continue
        pfn = pte_pfn(entry)
        if not entry & ANON:
            return errno.EINVAL
        if _held(host, pfn):
            return errno.EAGAIN
        shared += host.mapcount(pfn) > 1
        if limits is not None and not young:
            young = bool(entry & ACCESSED or host.flags(pfn) & PG_REFERENCED) or mm.notifiers.test_young(
                at << PAGE_SHIFT
            )
    if none and area.flags & VM_UFFD:  # a monitor waits for faults there
        return errno.EINVAL
    if limits is None:
        return 0
    if area.flags & VM_UFFD or not young:
        return errno.EINVAL
    too_much = none > limits.max_ptes_none or shared > limits.max_ptes_shared or swapped > limits.max_ptes_swap
    return errno.EINVAL if too_much else 0


def _held(host: HostMemory, pfn: int) -> bool:
    """Somebody besides entries and the swap cache has the page."""
    cached = bool(host.flags(pfn) & PG_SWAPCACHE)
    return host.refcount(pfn) != host.total_mapcount(pfn) + cached


def _swap_in(mm: Mm, hva: int) -> int:
    page = hva >> PAGE_SHIFT
    for at in [at for at, entry in mm.pgd.entries(page, page + HUGE_PAGES) if entry & SWAP]:
        while mm.pgd.get(at) & SWAP:
            if handle_mm_fault(mm, at << PAGE_SHIFT, False):
                return errno.EAGAIN
    return 0


def _replace(mm: Mm, area: Vma, hva: int, head: int) -> int:
    """``head`` in place of the pages at ``hva``. mmap_lock is held for writing."""
    host, page, trace = mm.host, hva >> PAGE_SHIFT, mm.trace
    end = hva + HPAGE_SIZE
    with mm.notifiers.invalidate_range(hva, end, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
        entries = mm.pgd.detach(page)
        if trace.on:
            pages = [(pte_pfn(entry), 1) for entry in entries if entry & MAPPED]
            trace.emit("pte_clear", mm=mm.name, start=hva, end=end, pages=pages)
        mm.flush_tlb_range(hva, end)
    point("mm.collapse.detached")
    mapped = [(i, pte_pfn(entry), entry) for i, entry in enumerate(entries) if entry & MAPPED and not entry & SPECIAL]
    if any(entry and not entry & MAPPED for entry in entries) or any(_held(host, pfn) for _, pfn, _ in mapped):
        mm.pgd.attach(page, entries)
        if trace.on:
            for i, _, entry in mapped:
                mm.emit_pte_set((page + i) << PAGE_SHIFT, entry)
        return errno.EAGAIN
    for i, pfn, entry in mapped:
        host.copy(pfn, head + i)
        if entry & DIRTY:
            host.set_flags(head, PG_DIRTY)
        host.add_mapcount(pfn, -1)
    put_pages(host, trace, [pfn for _, pfn, _ in mapped])
    if mm.rmap.swap is not None:
        mm.rmap.swap.forget([pfn for _, pfn, _ in mapped])
    if trace.on:
        trace.emit("pmd_collapse", mm=mm.name, start=hva, end=end, pfn=head)
    map_huge_anon(mm, area, hva, head)
    return 0


# ---- memory files


def _collapse_file(mm: Mm, area: Vma, file: ShmemFile, hva: int) -> int:
    host, first = mm.host, area.page_offset(hva)
    if first + HUGE_PAGES > page_up(file.size) >> PAGE_SHIFT:
        return errno.EAGAIN
    pfn = file.pages.get(first)
    if pfn is not None and host.is_compound(pfn):
        return _map_cached(mm, area, file, hva)
    head = alloc_huge_or_none(mm)
    if head is None:
        return errno.ENOMEM
    tables = [each for each in file.areas if _has_table(each, first)]
    old = _take_over(file, first, head) if _unmap_pages(file, first) else None
    if old is None:
        mm.put_frame(head)
        return errno.EAGAIN
    with file.i_mmap.read:
        for each in tables:
            if each in file.areas and _has_table(each, first, emptied=True):
                _retract_page_table(each, first)
    put_pages(host, mm.trace, old)
    with mm.mmap_lock.read:
        if not mm.dead and mm.find_vma(hva) is area:
            map_huge_file_page(mm, area, file, hva, False)
    return 0


def _has_table(area: Vma, first: int, *, emptied: bool = False) -> bool:
    """Whether ``area`` has a page table for the 2 MiB from page ``first`` of its file on, that nobody would miss."""
    hva = area.address_of(first)
    if hva is None or not suitable(area, hva) or area.anon_vma is not None or area.flags & VM_UFFD:
        return False
    page = hva >> PAGE_SHIFT
    return not area.mm.pgd.huge(page) and (emptied or not area.mm.pgd.pmd_none(page))


def _unmap_pages(file: ShmemFile, first: int) -> bool:
    """Brings the pages of ``file`` back from swap and takes them out of all entries; False when they do not stay so."""
    host, pages, place = file.host, file.pages, range(first, first + HUGE_PAGES)
    for _ in range(_TRIES):
        for pgoff in [pgoff for pgoff in file.swapped if pgoff in place]:
            try:
                file.bring_back(pgoff)
            except OutOfFrames:
                return False
        for pgoff in place:
            pfn = pages.get(pgoff)
            if pfn is None or not host.mapcount(pfn):
                continue
            host.get(pfn)
            try:
                with reverse_map(host).page_lock(pfn):
                    unmap_all(host, pfn, lambda area, entry: 0)
            finally:
                put_pages(host, file.trace, [pfn])
        found = [pages[pgoff] for pgoff in place if pgoff in pages]
        if not any(host.total_mapcount(pfn) for pfn in found) and not any(pgoff in place for pgoff in file.swapped):
            within = first + HUGE_PAGES <= page_up(file.size) >> PAGE_SHIFT
            return within and not any(host.is_compound(pfn) or host.refcount(pfn) != 1 for pfn in found)
    return False


def _take_over(file: ShmemFile, first: int, head: int) -> list[int]:
    """``head`` in place of the pages of ``file`` from ``first`` on, which are returned, each with a reference."""
    host, old = file.host, []
    host.set_flags(head, PG_SWAPBACKED | PG_DIRTY)
    host.set_rmap(head, file.id, first)
    for i in range(HUGE_PAGES):
        pfn = file.pages.get(first + i)
        if pfn is not None:
            host.copy(pfn, head + i)
            host.set_rmap(pfn, 0, 0)
            old.append(pfn)
        file.pages[first + i] = head + i
        if i:
            host.get(head)
    return old


def _retract_page_table(area: Vma, first: int) -> None:
    mm, hva = area.mm, area.address_of(first)
    assert hva is not None
    with MmuGather(mm) as gather, mm.notifiers.invalidate_range(hva, hva + HPAGE_SIZE, RangeEvent.CLEAR):
        if area.mm.find_vma(hva) is area and not mm.pgd.huge(hva >> PAGE_SHIFT):
            gather.zap(hva, hva + HPAGE_SIZE)
            mm.flush_tlb_range(hva, hva + HPAGE_SIZE)


def _map_cached(mm: Mm, area: Vma, file: ShmemFile, hva: int) -> int:
    """One huge entry in place of small ones that map parts of the same compound page."""
    page = hva >> PAGE_SHIFT
    with mm.mmap_lock.write:
        if mm.find_vma(hva) is not area or any(entry & ANON for _, entry in mm.pgd.entries(page, page + HUGE_PAGES)):
            return errno.EINVAL
        if not mm.pgd.pmd_none(page):
            with MmuGather(mm) as gather, mm.notifiers.invalidate_range(hva, hva + HPAGE_SIZE, RangeEvent.CLEAR):
                gather.zap(hva, hva + HPAGE_SIZE)
                mm.flush_tlb_range(hva, hva + HPAGE_SIZE)
        return 0 if map_huge_file_page(mm, area, file, hva, False) else errno.EAGAIN
