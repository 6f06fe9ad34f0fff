"""UFFDIO_MOVE: private anonymous pages change their address, and keep their frames.

For each run of pages that can go together::

    range start (CLEAR, from the first source page to the end of the request) → entries cleared there and set at the
    destination → TLB flush of the source → range end

A run is broken by whatever is no page of this process alone (a hole, the zero page, a swap entry), which is a step of
its own, and by the end of a page table on either side. A huge page goes whole where both places are aligned, and is
made small pages otherwise. The destination is empty, so nobody is told of it. A frame that moves belongs to the
destination's reverse map from then on.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, join_runs
from xipvm.errors import MmError
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, pmdp_clear_flush, split_huge_pmd
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DEVICE,
    DIRTY,
    EXCLUSIVE,
    HUGE,
    MAPPED,
    MIGRATION,
    PFN_SHIFT,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.unmap import migration_entry_wait, set_nonpresent
from xipvm.mmu.vma import PROT_WRITE, VM_LOCKED, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.userfaultfd import Userfaultfd

_TABLE: Final = 512 * PAGE_SIZE
_AGAIN: Final = -1
"""The source has changed meanwhile."""


def move(uffd: Userfaultfd, dst: int, src: int, length: int, holes: bool) -> int:
    """See :meth:`Userfaultfd.move`; both addresses are checked."""
    mm = uffd.mm
    done = 0
    while done < length:
        waits = 0
        with mm.mmap_lock.read:
            try:
                target, _ = _areas(uffd, dst + done, src + done, length - done)
            except MmError:
                if not done:
                    raise
                break
            with mm.because("uffd_move", start=src + done, end=src + length, to=dst + done):
                try:
                    while done < length and not waits:
                        step = _move_huge(mm, target, dst + done, src + done, length - done)
                        step = step or _step(mm, target, dst + done, src + done, length - done, holes)
                        done += max(step, 0)
                        waits = 0 if step else mm.pgd.get((src + done) >> PAGE_SHIFT)
                except MmError:
                    if not done:
                        raise
                    break
        if waits:
            migration_entry_wait(mm, src + done, waits)
    return done


def _areas(uffd: Userfaultfd, dst: int, src: int, length: int) -> tuple[Vma, Vma]:
    """Destination and source. Raises ENOENT, EINVAL."""
    mm = uffd.mm
    target, source = mm.find_vma(dst), mm.find_vma(src)
    what = f"UFFDIO_MOVE({dst:#x}, {src:#x}, {length:#x})"
    if target is None or source is None:
        raise MmError(errno.ENOENT, f"{what}: nothing is mapped there")
    if (
        source.shared
        or target.shared
        or src + length > source.end
        or dst + length > target.end
        or source.prot != target.prot
        or (source.flags ^ target.flags) & VM_LOCKED
        or not source.prot & PROT_WRITE
        or target.uffd is not uffd
        or source.file is not None
        or target.file is not None
    ):
        raise MmError(errno.EINVAL, f"{what}: from {source!r} to {target!r}")
    return target, source


def _move_huge(mm: Mm, target: Vma, dst: int, src: int, length: int) -> int:
    """Moves the huge page at ``src`` whole, where that can be; 0: not, and it is small pages now. Raises EBUSY."""
    host, page = mm.host, src >> PAGE_SHIFT
    entry = mm.pgd.huge(page)
    if entry and (
        (src | dst) & ~HPAGE_MASK or length < HPAGE_SIZE or entry & MIGRATION or not mm.pgd.pmd_none(dst >> PAGE_SHIFT)
    ):
        split_huge_pmd(mm, src)
        entry = 0
    if not entry:
        small = mm.pgd.get(page)
        if small & MAPPED and not small & SPECIAL and not split_if_compound(host, pte_pfn(small)):
            raise MmError(errno.EBUSY, f"UFFDIO_MOVE from {src:#x} in {mm.name}: the huge page is in use")
        return 0
    head = pte_pfn(entry)
    if not entry & SPECIAL and (not entry & EXCLUSIVE or host.refcount(head) != 1):
        raise MmError(errno.EBUSY, f"UFFDIO_MOVE from {src:#x} in {mm.name}: the huge page is shared, or in use")
    with mm.notifiers.invalidate_range(src, src + HPAGE_SIZE, RangeEvent.CLEAR):
        _wait_for_tables(mm, src, dst)
        if mm.pgd.huge(page) != entry or not mm.pgd.pmd_none(dst >> PAGE_SHIFT):
            return _AGAIN
        pmdp_clear_flush(mm, src)
        flags = target.rights | HUGE | ACCESSED
        if entry & SPECIAL:
            flags |= SPECIAL
        else:
            host.set_rmap(head, anon_vma_prepare(target).id, target.page_offset(dst))
            flags |= WRITE | ANON | EXCLUSIVE | SOFT_DIRTY | entry & DIRTY
        mm.set_pte(dst, head << PFN_SHIFT | flags)
    return HPAGE_SIZE


def _wait_for_tables(mm: Mm, *places: int) -> None:
    """Nobody is about to change an entry of the page tables there. No point is passed until the move is done."""
    for hva in places:
        mm.ptl.wait_range(hva >> PMD_SHIFT, (hva >> PMD_SHIFT) + 1)


def _step(mm: Mm, target: Vma, dst: int, src: int, length: int, holes: bool) -> int:
    """Moves what can go together; how many bytes. 0: a migration has to end first; or _AGAIN."""
    anon_vma_prepare(target)
    with mm.notifiers.invalidate_range(src, src + length, RangeEvent.CLEAR):
        _wait_for_tables(mm, src, dst)
        entry = mm.pgd.get(src >> PAGE_SHIFT)
        if mm.pgd.get(dst >> PAGE_SHIFT):
            raise MmError(errno.EEXIST, f"UFFDIO_MOVE to {dst:#x} in {mm.name}")
        if not entry:
            if not holes:
                raise MmError(errno.ENOENT, f"UFFDIO_MOVE from {src:#x} in {mm.name}: a hole")
            return PAGE_SIZE
        if entry & HUGE:
            return _AGAIN
        if not entry & MAPPED:
            return _move_nonpresent(mm, target, dst, src, entry)
        if entry & SPECIAL:
            mm.clear_flush(src)
            mm.set_pte(dst, ZERO_PFN << PFN_SHIFT | target.rights | SPECIAL | ACCESSED)
            return PAGE_SIZE
        if not _movable(mm, entry):
            raise MmError(errno.EBUSY, f"UFFDIO_MOVE from {src:#x} in {mm.name}: the page is shared, or in use")
        return _move_run(mm, target, dst, src, length)


def _movable(mm: Mm, entry: int) -> bool:
    """It maps a page that is this entry's alone, and that nobody holds."""
    if not entry & MAPPED or entry & SPECIAL or not entry & ANON or not entry & EXCLUSIVE:
        return False
    pfn, swap = pte_pfn(entry), mm.rmap.swap
    cached = swap is not None and pfn in swap.slots
    return mm.host.refcount(pfn) == (2 if cached else 1)


def _move_run(mm: Mm, target: Vma, dst: int, src: int, length: int) -> int:
    """The first page can be moved."""
    end = min(length, _TABLE - src % _TABLE, _TABLE - dst % _TABLE)
    done = 0
    moved: list[tuple[int, int]] = []
    assert target.anon_vma is not None
    while done < end:
        entry = mm.pgd.get((src + done) >> PAGE_SHIFT)
        if done and (not _movable(mm, entry) or mm.pgd.get((dst + done) >> PAGE_SHIFT)):
            break
        pfn = pte_pfn(entry)
        mm.pgd.set((src + done) >> PAGE_SHIFT, 0)
        mm.host.set_rmap(pfn, target.anon_vma.id, target.page_offset(dst + done))
        flags = target.rights | WRITE | ANON | EXCLUSIVE | SOFT_DIRTY | ACCESSED | entry & DIRTY
        mm.pgd.set((dst + done) >> PAGE_SHIFT, pfn << PFN_SHIFT | flags)
        moved.append((pfn, 1))
        done += PAGE_SIZE
    if mm.trace.on:
        pages = done >> PAGE_SHIFT
        mm.trace.emit("pte_move", mm=mm.name, start=src, end=src + done, to=dst, length=pages, pages=join_runs(moved))
    mm.flush_tlb_range(src, src + done)
    return done


def _move_nonpresent(mm: Mm, target: Vma, dst: int, src: int, entry: int) -> int:
    """A swap entry goes as it is, with its page if that is cached. Raises EBUSY, EFAULT."""
    if entry & MIGRATION:
        return 0
    if not entry & SWAP or entry & DEVICE:
        raise MmError(errno.EFAULT, f"UFFDIO_MOVE from {src:#x} in {mm.name}: a marker, or a device's page")
    if not entry & EXCLUSIVE:
        raise MmError(errno.EBUSY, f"UFFDIO_MOVE from {src:#x} in {mm.name}: the page is shared")
    swap = mm.rmap.swap
    assert swap is not None
    assert target.anon_vma is not None
    pfn = swap.cache.get(pte_pfn(entry))
    if pfn is not None:
        mm.host.set_rmap(pfn, target.anon_vma.id, target.page_offset(dst))
    mm.pgd.set(src >> PAGE_SHIFT, 0)
    set_nonpresent(mm, dst, (entry & ~UFFD_WP) | SOFT_DIRTY)
    return PAGE_SIZE
