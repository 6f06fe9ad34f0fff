"""Compound pages as a whole: made small pages of, and moved to other frames.

To split the *page*, not only its entries, nobody else may have it::

    a reference that is neither an entry's nor a cache's nor the caller's? then not now
    → for each area: range start (CLEAR, what of the page lies in it) → migration entries in place of all entries (512
      of them for a huge one) → TLB flush → range end
    → still nobody else? 512 pages → entries in place of the migration entries, nobody is told
    → pages that nobody mapped any more are freed

This is what reclaim, KSM and MADV_PAGEOUT of a part do first, except for a page that was given away and is dropped
as a whole (:func:`drop_lazyfree`). A page of a file is unmapped instead; faults bring it
back. A compound page that is only in part mapped, after munmap or MADV_DONTNEED of the rest, keeps all of its frames
until somebody splits it: :func:`deferred_split_scan`, for memory pressure.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, join_runs
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_DIRTY, PG_REFERENCED, PG_SWAPBACKED, HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE, page_remove_rmap, pmdp_clear_flush
from xipvm.mmu.hugetlb import WP_MARKER, adjust_range_if_pmd_sharing_possible
from xipvm.mmu.pte import ACCESSED, DIRTY, HUGE, MAPPED, MIGRATION, PFN_SHIFT, SPECIAL, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT, reverse_map
from xipvm.mmu.unmap import migration_entry
from xipvm.mmu.vma import PROT_WRITE, VM_HUGETLB, VM_LOCKED
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.page_cache import PageCache
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

_FOLLOW = PG_ANON | PG_DIRTY | PG_REFERENCED | PG_SWAPBACKED


def split_huge_page(host: HostMemory, pfn: int) -> bool:
    """Makes small pages of the compound one that ``pfn`` belongs to; the caller has locked it and has a reference.

    That is one to the page ``pfn`` afterwards. False when somebody else has the page, too: it stays as it is then, but
    may be mapped by small entries.
    """
    if not host.is_compound(pfn):
        return True
    head = host.compound_head(pfn)
    cache = _cache_of(host, head)
    expected = 1 if cache is None else 1 + HUGE_PAGES
    if host.refcount(head) - host.total_mapcount(head) != expected:
        return False
    unmapped = unmap_huge_page(host, head, whole=False)
    point("mm.split.unmapped")
    done = unmapped and not host.total_mapcount(head) and host.refcount(head) == expected
    if done:
        host.split_compound(head, cache is not None)
    trace = _trace_of(host)
    if trace.on:
        trace.emit("page_split", pfn=head, split=done)
    remove_migration_ptes(host, head, head)
    if done:
        put_pages(host, trace, [page for page in range(head, head + HUGE_PAGES) if page != pfn])
    return done


def split_if_compound(host: HostMemory, pfn: int) -> bool:
    """As :func:`split_huge_page`, for a caller that neither holds nor has locked the page, which somebody maps."""
    if not host.is_compound(pfn):
        return True
    host.get(pfn)
    try:
        with reverse_map(host).page_lock(host.compound_head(pfn)):
            return split_huge_page(host, pfn)
    finally:
        put_pages(host, _trace_of(host), [pfn])


def split_huge_pages(mm: Mm, start: int, end: int, *, partial: bool = False) -> None:
    """Splits the compound pages that huge entries of ``[start, end)`` map, and no other entries.

    ``partial``: only those that lie in it only in part.
    """
    for page, entry in mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        hva = page << PAGE_SHIFT
        whole = start <= hva and hva + HPAGE_SIZE <= end
        if not entry & HUGE or not entry & MAPPED or entry & SPECIAL or (partial and whole):
            continue
        if mm.pgd.huge(page) == entry and mm.host.total_mapcount(pte_pfn(entry)) == 1:
            split_if_compound(mm.host, pte_pfn(entry))


def drop_lazyfree(host: HostMemory, head: int) -> bool:
    """Takes a compound page that was given away (MADV_FREE) out of its entries, all huge; whether nobody maps it now.

    Announced once for each entry, and nothing is split. An entry through which it has been written since, or a
    reference of somebody else, keeps it: then it counts as given away no longer. The caller has locked it and holds it.
    """
    with reverse_map(host).walk_lock(host, head):
        while host.total_mapcount(head):
            found = next((place for place in _extents(host, head) if _entries(*place, head, MAPPED)), None)
            if found is None or found[0].flags & VM_LOCKED:
                return False
            area, start, end = found
            with area.mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR), area.mm.ptl(start >> PMD_SHIFT):
                if not _drop_entry(area, start, head):
                    return False
    return True


def _drop_entry(area: Vma, start: int, head: int) -> bool:
    mm, host = area.mm, area.mm.host
    entry = mm.pgd.huge(start >> PAGE_SHIFT)
    if not entry & MAPPED or pte_pfn(entry) != head:
        return host.entire_mapcount(head) == host.total_mapcount(head)  # gone, or split
    pmdp_clear_flush(mm, start)
    used = entry & DIRTY or host.flags(head) & PG_DIRTY
    if used or host.refcount(head) != host.total_mapcount(head) + 1:
        host.set_flags(head, PG_SWAPBACKED)
        mm.set_pte(start, entry)
        return False
    page_remove_rmap(mm, entry)
    host.put(head)
    return True


def deferred_split_scan(host: HostMemory) -> int:
    """Splits the anonymous compound pages of which a part is not mapped any more; how many frames that freed."""
    before = host.free_frames
    for head in host.partially_mapped():
        if host.is_compound(head) and host.flags(head) & PG_ANON and host.total_mapcount(head):
            split_if_compound(host, head)
    return max(host.free_frames - before, 0)


def migrate_huge_page(host: HostMemory, head: int, new: int) -> bool:
    """Moves the compound page ``head``, which the caller has locked and refers to, to ``new``, one of the caller's own.

    False when somebody else has it, too; everything is as before then.
    """
    cache = _cache_of(host, head)
    expected = 1 if cache is None else 1 + HUGE_PAGES
    if host.refcount(head) - host.total_mapcount(head) != expected:
        return False
    unmapped = unmap_huge_page(host, head, whole=True)
    point("mm.migrate.unmapped")
    done = unmapped and not host.total_mapcount(head) and host.refcount(head) == expected
    if done:
        for i in range(HUGE_PAGES):
            host.copy(head + i, new + i)
        host.set_flags(new, host.flags(head) & _FOLLOW)
        host.set_rmap(new, host.mapping(head), host.index(head))
        for i in range(HUGE_PAGES if cache is not None else 0):
            assert cache is not None
            host.get(new)
            cache.pages[host.index(head) + i] = new + i
            host.put(head)
    remove_migration_ptes(host, head, new if done else head)
    return done


def _trace_of(host: HostMemory) -> Trace:
    """The trace of whoever maps anything: there is one for a host."""
    return next(iter(reverse_map(host).mms)).trace


def _cache_of(host: HostMemory, head: int) -> PageCache | None:
    """The page cache that has the page, None if none does."""
    from xipvm.mmu.page_cache import PageCache  # which is above this

    file = reverse_map(host).file(host.mapping(head))
    return file if isinstance(file, PageCache) and file.pages.get(host.index(head)) == head else None


def move_page(host: HostMemory, trace: Trace, head: int, new: int, move: Callable[[HostMemory, int, int], bool]) -> int:
    """Has ``move`` put ``new`` in the place of ``head``, and tells of it; ``new``. Who then has nothing is free.

    Raises MmError EAGAIN when it could not.
    """
    host.get(head)
    moved = False
    try:
        moved = move(host, head, new)
    finally:
        if trace.on:
            trace.emit("page_migrate", old=head, new=new, moved=moved)
        put_pages(host, trace, [head, new])
    if not moved:
        raise MmError(errno.EAGAIN, f"frame {head:#x} is in use")
    return new


def put_pages(host: HostMemory, trace: Trace, pfns: list[int]) -> None:
    """Drops a reference to each of ``pfns``."""
    freed = [run for pfn in pfns for run in host.put_page(pfn)]
    if freed and trace.on:
        trace.emit("page_free", pages=join_runs(freed))


# ---- all entries of a compound page


def _extents(host: HostMemory, head: int) -> Iterator[tuple[Vma, int, int]]:
    """(area, start, end) of the parts of areas where pages of ``head`` may be mapped, in bytes."""
    index = host.index(head)
    for area in reverse_map(host).areas(host.mapping(head)):
        start = area.start + ((index - area.pgoff) << PAGE_SHIFT)
        lo, hi = max(start, area.start), min(start + HPAGE_SIZE, area.end)
        if lo < hi:
            yield area, lo, hi


def _entries(area: Vma, start: int, end: int, head: int, kind: int) -> list[tuple[int, int]]:
    """(page, entry) of the entries in ``[start, end)`` that name a frame of ``head`` and have a bit of ``kind``."""
    return [
        (page, entry)
        for page, entry in area.mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
        if entry & kind and head <= pte_pfn(entry) < head + HUGE_PAGES and (kind == MIGRATION or not entry & MIGRATION)
    ]


def unmap_huge_page(host: HostMemory, head: int, *, whole: bool) -> bool:
    """Puts migration entries in place of all entries of an anonymous page, nothing for one of a file.

    Huge entries become huge ones if ``whole``, 512 small ones otherwise. Whether nobody maps the page afterwards. The
    caller has a reference.
    """
    anon = bool(host.flags(head) & PG_ANON)
    with reverse_map(host).walk_lock(host, head):
        while host.total_mapcount(head):
            found = next((place for place in _extents(host, head) if _entries(*place, head, MAPPED)), None)
            if found is None:
                return False
            area, start, end = found
            lo, hi = start, end
            if area.flags & VM_HUGETLB:
                lo, hi = adjust_range_if_pmd_sharing_possible(area, lo, hi)
            with area.mm.notifiers.invalidate_range(lo, hi, RangeEvent.CLEAR), area.mm.ptl(start >> PMD_SHIFT):
                _unmap_area(area, start, end, head, anon, whole)
    return True


def _unmap_area(area: Vma, start: int, end: int, head: int, anon: bool, whole: bool) -> None:
    mm, host = area.mm, area.mm.host
    small = []
    for page, entry in _entries(area, start, end, head, MAPPED):
        if not entry & HUGE:
            small.append((page, entry))
            continue
        pmdp_clear_flush(mm, page << PAGE_SHIFT)
        page_remove_rmap(mm, entry)
        host.put(head)
        if anon:
            mm.pgd.set(page, migration_entry(area, entry) | HUGE)
            if not whole:
                mm.pgd.split_huge(page, migration_entry(area, entry))
            _tell_nonpresent(area, page, entry)
        elif entry & UFFD_WP and area.flags & VM_HUGETLB:
            mm.pgd.set(page, WP_MARKER)
    for page, entry in small:
        mm.pgd.set(page, migration_entry(area, entry) if anon else 0)
        if mm.trace.on:
            hva = page << PAGE_SHIFT
            mm.trace.emit("pte_clear", mm=mm.name, start=hva, end=hva + PAGE_SIZE, pages=[(pte_pfn(entry), 1)])
    if small:
        mm.flush_tlb_range(small[0][0] << PAGE_SHIFT, (small[-1][0] + 1) << PAGE_SHIFT)
    for page, entry in small:
        if entry & DIRTY:
            host.set_flags(head, PG_DIRTY)
        if entry & ACCESSED:
            host.set_flags(head, PG_REFERENCED)
        host.add_mapcount(pte_pfn(entry), -1)
        host.put(head)
        if anon:
            _tell_nonpresent(area, page, entry)


def _tell_nonpresent(area: Vma, page: int, entry: int) -> None:
    trace, hva = area.mm.trace, page << PAGE_SHIFT
    if trace.on:
        trace.emit("pte_nonpresent", mm=area.mm.name, hva=hva, entry="migration", value=pte_pfn(entry))


def remove_migration_ptes(host: HostMemory, old: int, new: int) -> None:
    """Entries of ``new``, and what follows it, in place of the migration entries of ``old``."""
    for area, start, end in list(_extents(host, new)):
        mm = area.mm
        keep = UFFD_WP | (0xFFF if area.prot & PROT_WRITE else 0xFFF & ~WRITE)
        for page, entry in _entries(area, start, end, old, MIGRATION):
            pfn = pte_pfn(entry) - old + new
            host.get(pfn)
            if entry & HUGE:
                host.add_entire_mapcount(pfn, 1)
            else:
                host.add_mapcount(pfn, 1)
            mm.set_pte(page << PAGE_SHIFT, pfn << PFN_SHIFT | area.rights | entry & keep)
