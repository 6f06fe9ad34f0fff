"""Page migration: the content of a page goes to another frame, and nobody notices but by faulting.

::

    new frame allocated → every entry becomes a migration entry (unmap.py: S, clear, flush, E for each) → is ours the
    only reference left besides that of a cache? → content and bookkeeping copied → migration entries become entries of
    the new frame, nobody is told → old frame put

Nobody has to be told at the end: the secondary MMUs dropped the page at the start, and get_user_pages, like any fault,
*waits* while it finds a migration entry (``migration_entry_wait``). The waiting is a schedule point; an actor that
waits for a migration that is further up its own stack, or which nobody lets go on, gets EDEADLK.

A page with more references than its entries and its cache have, a pinned one, does not move: its entries come back as
they were. Migration entries of an area that goes away meanwhile are gone, those that fork copies are found as well.

A compound page moves as a whole, by migration entries that are huge where its entries are; where there is no room for
another it is split (huge_page.py).

There is one NUMA node, so move_pages and mbind find every page where it should be. :func:`compact_memory` is what
moves pages here, as kcompactd does.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.frames import (
    LRU_ACTIVE_ANON,
    LRU_ACTIVE_FILE,
    PG_ACTIVE,
    PG_ANON,
    PG_DIRTY,
    PG_FILE,
    PG_HUGETLB,
    PG_KSM,
    PG_REFERENCED,
    PG_RESERVED,
    PG_SWAPBACKED,
    HostMemory,
)
from xipvm.mmu.huge_page import migrate_huge_page, move_page, split_if_compound
from xipvm.mmu.hugetlb_migrate import migrate_hugetlb_page
from xipvm.mmu.page_cache import PageCache
from xipvm.mmu.pte import FLAGS, MAPPED, MIGRATION, PFN_SHIFT, SPECIAL, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.thp import alloc_huge
from xipvm.mmu.unmap import try_to_migrate
from xipvm.mmu.vma import PROT_WRITE

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace

_FOLLOW = PG_ANON | PG_DIRTY | PG_KSM | PG_REFERENCED | PG_SWAPBACKED


def migrate_page(host: HostMemory, trace: Trace, pfn: int) -> int:
    """Moves a mapped or cached page to another frame, which it returns.

    Raises OutOfFrames, and MmError EAGAIN for a page that somebody holds, EBUSY for one that cannot be moved.
    """
    head = host.compound_head(pfn)
    with reverse_map(host).page_lock(head):
        if not host.is_compound(pfn):
            return _migrate_page(host, trace, pfn)
        if host.flags(head) & PG_HUGETLB:
            return migrate_hugetlb_page(host, trace, head) + pfn - head
        new = _migrate_huge_page(host, trace, head)
        if new is not None:
            return new + pfn - head
    if not split_if_compound(host, pfn):
        raise MmError(errno.EAGAIN, f"frame {pfn:#x} is in use")
    return migrate_page(host, trace, pfn)


def _migrate_huge_page(host: HostMemory, trace: Trace, head: int) -> int | None:
    """Moves a compound page as a whole. None when there is no room for one; raises as :func:`migrate_page`."""
    if host.flags(head) & PG_RESERVED or not host.mapping(head):
        raise MmError(errno.EBUSY, f"frame {head:#x} is no page that can be moved")
    try:
        new = alloc_huge(host, trace, False)
    except OutOfFrames:
        return None
    return move_page(host, trace, head, new, migrate_huge_page)


def _migrate_page(host: HostMemory, trace: Trace, pfn: int) -> int:
    if host.is_device(pfn) or host.flags(pfn) & PG_RESERVED or not host.mapping(pfn):
        raise MmError(errno.EBUSY, f"frame {pfn:#x} is no page that can be moved")
    new = host.alloc(False)
    if trace.on:
        trace.emit("page_alloc", pfn=new)
    host.get(pfn)
    target: int = pfn
    try:
        if try_to_migrate(host, pfn):
            point("mm.migrate.unmapped")
            if _move(host, pfn, new):
                target = new
    finally:
        _remove_migration_entries(host, pfn, target)
        if trace.on:
            trace.emit("page_migrate", old=pfn, new=new, moved=target == new)
        for frame in (pfn, new):
            if host.put(frame) and trace.on:
                trace.emit("page_free", pages=[(frame, 1)])
    if target == pfn:
        raise MmError(errno.EAGAIN, f"frame {pfn:#x} is in use")
    return new


def _move(host: HostMemory, old: int, new: int) -> bool:
    """Content and bookkeeping, if nobody but the caller and a cache has a reference to ``old``. Passes no point."""
    file = reverse_map(host).file(host.mapping(old))
    pgoff = host.index(old)
    cache = file if isinstance(file, PageCache) and file.pages.get(pgoff) == old else None
    swap = reverse_map(host).swap
    swapped = swap is not None and old in swap.slots
    if host.mapcount(old) or host.refcount(old) != (2 if swapped or cache is not None else 1):
        return False
    host.copy(old, new)
    host.set_flags(new, host.flags(old) & _FOLLOW)
    host.set_rmap(new, host.mapping(old), pgoff)
    shared = reverse_map(host).ksm_root(host.mapping(old))
    if shared is not None:
        shared.pfn = new
    if host.flags(old) & PG_ACTIVE:
        host.lru_move(new, LRU_ACTIVE_FILE if host.flags(new) & PG_FILE else LRU_ACTIVE_ANON)
    if cache is not None:
        host.get(new)
        cache.pages[pgoff] = new
        host.put(old)
    if swap is not None and swapped:
        swap.replace(old, new)
    return True


def _remove_migration_entries(host: HostMemory, old: int, new: int) -> None:
    """Entries of ``new`` in place of the migration entries of ``old``."""
    for area, hva in reverse_map(host).places(host, old):
        mm, page = area.mm, hva >> PAGE_SHIFT
        entry = mm.pgd.get(page)
        if entry & MAPPED or not entry & MIGRATION or pte_pfn(entry) != old:
            continue
        keep = FLAGS | UFFD_WP if area.prot & PROT_WRITE else (FLAGS | UFFD_WP) & ~WRITE
        host.get(new)
        host.add_mapcount(new, 1)
        mm.set_pte(hva, new << PFN_SHIFT | area.rights | entry & keep)


def compact_memory(host: HostMemory, trace: Trace) -> int:
    """Moves every mapped page that can be moved, but those of the hugetlb pool; how many were."""
    for mm in reverse_map(host).mms:
        mm.notifiers.needs_modern("compaction")
    moved = 0
    pages: dict[int, None] = {}
    for mm in reverse_map(host).mms:
        for _, entry in mm.pgd.entries(0, 1 << 36):
            if entry & MAPPED and not entry & SPECIAL and not host.flags(pte_pfn(entry)) & PG_HUGETLB:
                pages[host.compound_head(pte_pfn(entry))] = None
    for pfn in pages:
        if host.total_mapcount(pfn):  # has not gone meanwhile
            try:
                migrate_page(host, trace, pfn)
            except MmError as error:
                if error.errno != errno.EAGAIN:
                    raise
            except OutOfFrames:
                break
            else:
                moved += 1
    return moved


def move_pages(mm: Mm, addr: int, length: int, node: int) -> list[int]:
    """See :meth:`Mm.move_pages`."""
    start, end = mm.check_range("move_pages", addr, length)
    if node != 0:
        raise MmError(errno.ENODEV, f"move_pages: there is no node {node}")
    status = []
    for page in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        entry = mm.pgd.get(page)
        if mm.find_vma(page << PAGE_SHIFT) is None or (entry & MAPPED and entry & SPECIAL):
            status.append(-errno.EFAULT)
        else:
            status.append(0 if entry & MAPPED else -errno.ENOENT)
    return status


def mbind(mm: Mm, addr: int, length: int, node: int) -> None:
    """See :meth:`Mm.mbind`."""
    start, end = mm.check_range("mbind", addr, length)
    if node != 0:
        raise MmError(errno.EINVAL, f"mbind: there is no node {node}")
    areas = mm.areas_in(start, end)
    if sum(min(area.end, end) - max(area.start, start) for area in areas) != end - start:
        raise MmError(errno.EFAULT, f"mbind({addr:#x}, {length:#x}): a hole")
