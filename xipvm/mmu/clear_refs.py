"""clear_refs: forget which pages were used, or which were written.

Modes 1 to 3 clear young bits; no notifier hears of it and nothing is flushed. Mode 4 begins a round of soft-dirty
tracking: every entry loses WRITE and its soft-dirty bit, and the first write to a page faults and sets both again::

    range start (SOFT_DIRTY, the whole address space) → entries lose the bits → range end → flush of the whole mm

An area that is newer than the last round counts as written altogether (VM_SOFTDIRTY).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, PG_REFERENCED
from xipvm.mmu.pte import ACCESSED, HUGE, PRESENT, SOFT_DIRTY, SPECIAL, pte_pfn
from xipvm.mmu.vma import TASK_SIZE, VM_HUGETLB, VM_SOFTDIRTY, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

CLEAR_REFS_ALL: Final = 1
CLEAR_REFS_ANON: Final = 2
CLEAR_REFS_MAPPED: Final = 3
CLEAR_REFS_SOFT_DIRTY: Final = 4

_EVERYTHING: Final = (1 << 64) - PAGE_SIZE


def clear_refs(mm: Mm, mode: int) -> None:
    """See :meth:`Mm.clear_refs`. mmap_lock is held for writing."""
    mm.check_alive("clear_refs")
    if mode == CLEAR_REFS_SOFT_DIRTY:
        mm.notifiers.needs_modern("soft-dirty bits")
        _clear_soft_dirty(mm)
        return
    if mode not in (CLEAR_REFS_ALL, CLEAR_REFS_ANON, CLEAR_REFS_MAPPED):
        raise MmError(errno.EINVAL, f"clear_refs: mode {mode}")
    for area in _tracked(mm):
        if mode == CLEAR_REFS_ALL or (mode == CLEAR_REFS_ANON) == (area.file is None):
            _clear_young(mm, area)


def _tracked(mm: Mm) -> list[Vma]:
    """Huge pages of the pool are left out."""
    return [area for area in mm.vmas if not area.flags & VM_HUGETLB]


def _clear_young(mm: Mm, area: Vma) -> None:
    mm.lock_tables(area.start, area.end)
    for page, entry in mm.pgd.entries(area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT):
        if entry & PRESENT and not entry & SPECIAL:
            mm.pgd.set(page, entry & ~ACCESSED)
            mm.host.clear_flags(pte_pfn(entry), PG_REFERENCED)


def _clear_soft_dirty(mm: Mm) -> None:
    trace = mm.trace
    with mm.because("mm_clear_soft_dirty"):
        for area in mm.vmas:
            area.flags &= ~VM_SOFTDIRTY
            area.set_prot(area.prot)
        with mm.notifiers.invalidate_range(0, _EVERYTHING, RangeEvent.SOFT_DIRTY):
            for area in _tracked(mm):
                start, end = area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT
                mm.lock_tables(area.start, area.end)
                mm.pgd.clear_bits(start, end, SOFT_DIRTY)
                for lo, hi, flags in mm.pgd.protect(start, end, area.rights, 0, trace.on)[1]:
                    trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
        mm.flush_tlb_range(0, TASK_SIZE)


def soft_dirty(mm: Mm, start: int, end: int) -> list[tuple[int, int]]:
    """See :meth:`Mm.soft_dirty`."""
    runs: list[tuple[int, int]] = []
    for area in mm.areas_in(start, end):
        lo, hi = max(area.start, start), min(area.end, end)
        if area.flags & VM_SOFTDIRTY:
            pages = list(range(lo, hi, PAGE_SIZE))
        elif area.flags & VM_HUGETLB:
            pages = []
        else:
            entries = mm.pgd.entries(lo >> PAGE_SHIFT, hi >> PAGE_SHIFT)
            pages = [
                each << PAGE_SHIFT
                for page, entry in entries
                if entry & SOFT_DIRTY
                for each in range(page, page + (HUGE_PAGES if entry & HUGE else 1))
                if lo <= each << PAGE_SHIFT < hi
            ]
        for hva in pages:
            if runs and runs[-1][1] == hva:
                runs[-1] = runs[-1][0], hva + PAGE_SIZE
            else:
                runs.append((hva, hva + PAGE_SIZE))
    return runs
