"""mremap: an area, or a part of one, gets another size or another place.

Shrinking unmaps the tail. Growing in place tells nobody, for nothing is mapped there. A move announces the source twice
and the destination never, which is empty: what was mapped there has been unmapped before, with a range of its own. ::

    range start (UNMAP, source) → entries leave the source and appear at the destination → TLB flush of the source
    → range end → munmap of the source: range start (UNMAP) → nothing is left to clear → range end

The flush comes before anybody else can see the entries at their new place: a page can be taken from there, and freed,
as soon as that is so, and the source's translations must be gone by then. Frames, reference counts and the pages'
offsets in their backing stay. With MREMAP_DONTUNMAP the source area stays, empty, and the munmap is left out. (In 2008
every step of up to 64 pages had a range of its own, and each entry was flushed before it appeared again.)
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT, Hva, join_runs, page_up
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_MASK, huge_up, split_huge_edges, split_huge_pmd
from xipvm.mmu.hugetlb import adjust_range_if_pmd_sharing_possible
from xipvm.mmu.mapping import insert, merge, munmap, split, unmapped_area
from xipvm.mmu.pte import HUGE, MAPPED, SOFT_DIRTY, pte_pfn
from xipvm.mmu.rmap import AreaLocks
from xipvm.mmu.uffd_reach import move_along
from xipvm.mmu.uffd_wp import forget
from xipvm.mmu.vma import TASK_SIZE, VM_HUGETLB, VM_LOCKED, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xipvm.mmu.mm import Mm

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4
_KNOWN: Final = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
_PMD_MASK: Final = -(1 << 21)


def mremap(mm: Mm, addr: int, old_len: int, new_len: int, flags: int, new_addr: int | None) -> Hva:
    """See :meth:`Mm.mremap`. mmap_lock is held for writing."""
    call = f"mremap({addr:#x}, {old_len:#x}, {new_len:#x})"
    mm.check_alive("mremap")
    if (
        flags & ~_KNOWN
        or (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and not flags & MREMAP_MAYMOVE)
        or (flags & MREMAP_DONTUNMAP and old_len != new_len)
        or addr & ~PAGE_MASK
        or min(addr, old_len) < 0
        or new_len <= 0
    ):
        raise MmError(errno.EINVAL, call)
    old_len, new_len = page_up(old_len), page_up(new_len)
    area = mm.find_vma(addr)
    if area is None:
        raise MmError(errno.EFAULT, f"{call}: nothing is mapped there")
    if flags & MREMAP_DONTUNMAP or area.flags & VM_HUGETLB:
        mm.notifiers.needs_modern("MREMAP_DONTUNMAP" if flags & MREMAP_DONTUNMAP else f"mremap of {area!r}")
    if area.flags & VM_HUGETLB:
        old_len, new_len = huge_up(old_len), huge_up(new_len)
        target = new_addr or 0 if flags & MREMAP_FIXED else 0
        if (addr | target) & ~HPAGE_MASK or new_len > old_len or flags & MREMAP_DONTUNMAP:
            raise MmError(errno.EINVAL, f"{call}: {area!r}")
    if not old_len and not area.shared:
        raise MmError(errno.EINVAL, f"{call}: private memory cannot be mapped twice")
    if flags & MREMAP_FIXED:
        _check_target(call, addr, old_len, new_len, new_addr)
    elif new_len <= old_len and not flags & MREMAP_DONTUNMAP:
        if new_len < old_len:
            munmap(mm, addr + new_len, old_len - new_len)
        return Hva(addr)
    if old_len > area.end - addr:
        raise MmError(errno.EFAULT, f"{call}: the area ends at {area.end:#x}")
    with mm.because("vma_remap", start=addr, end=addr + old_len, to=new_addr or addr, pages=new_len >> PAGE_SHIFT):
        if flags & MREMAP_FIXED:
            assert new_addr is not None
            if mm.areas_in(new_addr, new_addr + new_len):
                munmap(mm, new_addr, new_len)
            if new_len < old_len:
                munmap(mm, addr + new_len, old_len - new_len)
                old_len = new_len
        elif flags & MREMAP_DONTUNMAP or not old_len or not _expand(mm, area, addr + old_len, addr + new_len):
            new_addr = unmapped_area(mm, new_len, new_addr) if flags & MREMAP_MAYMOVE else 0
            if not new_addr:
                raise MmError(errno.ENOMEM, call)
        else:
            return Hva(addr)
        return _move(mm, addr, old_len, new_addr, new_len, bool(flags & MREMAP_DONTUNMAP))


def _check_target(call: str, addr: int, old_len: int, new_len: int, new_addr: int | None) -> None:
    """MREMAP_FIXED wants an aligned range of the address space that does not overlap the source."""
    if (
        new_addr is None
        or new_addr & ~PAGE_MASK
        or not 0 <= new_addr <= TASK_SIZE - new_len
        or (addr < new_addr + new_len and new_addr < addr + old_len)
    ):
        raise MmError(errno.EINVAL, f"{call} to {new_addr if new_addr is None else hex(new_addr)}")


def _expand(mm: Mm, area: Vma, end: int, new_end: int) -> bool:
    """Lets ``area``, if it ends at ``end``, end at ``new_end`` when nothing is in the way."""
    if end != area.end or new_end > TASK_SIZE or mm.areas_in(end, new_end):
        return False
    area.end = new_end
    if mm.trace.on:
        mm.trace.emit("vma_map", mm=mm.name, start=end, end=new_end, prot=area.prot, kind=area.kind)
    if area.file is not None:
        area.file.vma_open(area)
    merge(mm, area.start, new_end)
    return True


def _move(mm: Mm, addr: int, length: int, new_addr: int, new_len: int, keep: bool) -> Hva:
    """Moves ``[addr, addr + length)``, a part of one area, to free addresses; ``keep``: the source stays mapped."""
    area = mm.find_vma(addr)
    assert area is not None
    if area.huge_reserve is not None:  # its pages go along, those of the rest stay
        split(mm, addr)
        split(mm, addr + length)
        area = mm.find_vma(addr)
        assert area is not None
    untouched = area.file is None and area.anon_vma is None  # no page knows its offset yet
    pgoff = new_addr >> PAGE_SHIFT if untouched else area.page_offset(addr)
    new = Vma(mm, new_addr, new_addr + new_len, area.prot, area.flags, area.file, pgoff)
    if area.uffd is not None:
        move_along(area, new, addr, length)
    with AreaLocks(area):
        mm.rmap.clone(area, new)
    insert(mm, new)
    if mm.trace.on:
        mm.trace.emit("vma_map", mm=mm.name, start=new.start, end=new.end, prot=new.prot, kind=new.kind)
    if new.file is not None:
        new.file.vma_open(new)
    if length:
        start, end, event = addr, addr + length, RangeEvent.UNMAP
        if area.flags & VM_HUGETLB:
            start, end = adjust_range_if_pmd_sharing_possible(area, start, end)
            event = RangeEvent.CLEAR
            new.huge_reserve, area.huge_reserve = area.huge_reserve, None
        with mm.notifiers.around_entry(start, end, event):  # in 2008 the steps have ranges of their own
            _move_page_tables(mm, addr, length, new_addr)
            if area.uffd is not new.uffd:
                forget(mm, new_addr >> PAGE_SHIFT, (new_addr + length) >> PAGE_SHIFT)
        if not keep:
            munmap(mm, addr, length)
        else:
            area.flags &= ~VM_LOCKED
            if (area.start, area.end) == (addr, addr + length):
                mm.rmap.leave_anon(area)  # none of its pages is left
    merge(mm, new_addr, new_addr + new_len)
    return Hva(new_addr)


def _move_page_tables(mm: Mm, addr: int, length: int, new_addr: int) -> None:
    if mm.notifiers.move_limit:
        _move_in_steps(mm, addr, length, new_addr, mm.notifiers.move_limit)
        return
    pgd, shift = mm.pgd, (new_addr - addr) >> PAGE_SHIFT
    _split_for_move(mm, addr, addr + length, new_addr - addr)
    mm.lock_tables(addr, addr + length)
    mm.lock_tables(new_addr, new_addr + length)
    moved = pgd.entries(addr >> PAGE_SHIFT, (addr + length) >> PAGE_SHIFT)
    for page, entry in moved:
        pgd.set(page, 0)
        pgd.set(page + shift, entry | SOFT_DIRTY if entry & MAPPED else entry)
    if not moved:
        return
    trace = mm.trace
    if trace.on:
        end, pages = addr + length, _frames(entry for _, entry in moved if entry & MAPPED)
        trace.emit("pte_move", mm=mm.name, start=addr, end=end, to=new_addr, length=length >> PAGE_SHIFT, pages=pages)
    mm.flush_tlb_range(addr, addr + length)


def _move_in_steps(mm: Mm, addr: int, length: int, new_addr: int, limit: int) -> None:
    """As in 2008: one range for each step, which moves at most ``limit`` bytes and stays in one page table each side.

    Every entry is cleared and flushed before it appears at its new place. Where there is no page table nothing is said.
    """
    pgd, end, shift = mm.pgd, addr + length, new_addr - addr
    table_end = 0
    while addr < end:
        if addr >= table_end:
            table_end = (addr | ~_PMD_MASK) + 1
            if pgd.next_present((addr & _PMD_MASK) >> PAGE_SHIFT, table_end >> PAGE_SHIFT) < 0:
                addr = table_end
                continue
        stop = min(end, addr + limit, table_end, ((addr + shift) | ~_PMD_MASK) + 1 - shift)
        with mm.notifiers.invalidate_range(addr, stop, RangeEvent.UNMAP):
            for page, entry in pgd.entries(addr >> PAGE_SHIFT, stop >> PAGE_SHIFT):
                hva = page << PAGE_SHIFT
                if entry & MAPPED:
                    mm.clear_flush(hva)
                    mm.set_pte(hva + shift, entry | SOFT_DIRTY)
                else:
                    pgd.set(page, 0)
                    pgd.set(page + (shift >> PAGE_SHIFT), entry)
        addr = stop


def _split_for_move(mm: Mm, start: int, end: int, distance: int) -> None:
    """Huge entries move as they are where they are huge at the destination, too, and are split otherwise."""
    if not distance & ~HPAGE_MASK:
        split_huge_edges(mm, start, end)
        return
    for page, entry in mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if entry & HUGE:
            split_huge_pmd(mm, page << PAGE_SHIFT)


def _frames(entries: Iterable[int]) -> list[tuple[int, int]]:
    return join_runs((pte_pfn(entry), HUGE_PAGES if entry & HUGE else 1) for entry in entries)
