"""Taking primary entries away: the gather, munmap, truncation, exit.

The order, for every one of them::

    range start → entries cleared, frames into the gather → range end → TLB flush → gathered frames put

A frame keeps its last reference until every CPU has forgotten it: as long as a TLB holds the old translation,
accesses go to the old page and not to somebody else's. The range is what the caller asked for, whether or not
anything is mapped there; the flush is left out when nothing was.

Entries of device pages have nothing to be flushed: their references go while the entries do. Nobody meets such a page
with a reference that no entry accounts for, and takes it for one that is held.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from xipvm.actors import point, scheduled
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.device_private import is_device_slot, put_entries, zap_entries
from xipvm.mmu.huge_pmd import HPAGE_SIZE, split_huge_edges
from xipvm.mmu.pte import HUGE
from xipvm.mmu.rmap import AreaLocks
from xipvm.mmu.tables import Gather
from xipvm.mmu.thp import thp_of
from xipvm.mmu.uffd_wp import before_zap, mark
from xipvm.mmu.vma import TASK_SIZE, VM_HUGETLB, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm


class MmuGather:
    """The frames and the address range of one operation, between the clearing of entries and the flush.

    A context: at its end they are finished, also when the operation fails half way (EDEADLK).
    """

    __slots__ = ("_end", "_flushed", "_frames", "_mm", "_start")

    def __init__(self, mm: Mm) -> None:
        self._mm = mm
        self._flushed = False
        self._frames = Gather(mm.host)
        self._start = TASK_SIZE
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def zap(self, start: int, end: int, *, keep_anon: bool = False, keep_markers: bool = False) -> None:
        """Clears the entries of ``[start, end)``; keeps private copies or what maps nothing, if told to.

        A huge entry that lies in it only in part is split before, with a range of its own.
        """
        mm = self._mm
        split_huge_edges(mm, start, end)
        trace = mm.trace
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        mm.lock_tables(start, end)
        protected = before_zap(mm, start, end, keep_anon) if mm.uffd_used and keep_markers else ()
        cleared, runs = mm.pgd.zap_mapped(first, last, self._frames, trace.on, keep_anon, keep_markers)
        if mm.rmap.devices is not None and self._frames.swaps:
            self._drop_device_entries(start, end, self._frames.swaps)
        mark(mm, protected)
        if not cleared:
            return
        self._start = min(self._start, start)
        self._end = max(self._end, end)
        if trace.on:
            trace.emit("pte_clear", mm=mm.name, start=start, end=end, pages=runs)

    def _drop_device_entries(self, start: int, end: int, slots: list[int]) -> None:
        mm = self._mm
        of_devices = [slot for slot in slots if is_device_slot(slot)]
        if not of_devices:
            return
        self._frames.swaps = [slot for slot in slots if not is_device_slot(slot)]
        runs = zap_entries(mm, of_devices)
        if mm.trace.on:
            mm.trace.emit("pte_clear", mm=mm.name, start=start, end=end, pages=runs)
        put_entries(mm, of_devices)

    def flush_later(self, hva: int, entry: int = 0) -> None:
        """The entry of the page at ``hva``, a huge one if ``entry`` is, has changed."""
        self._start = min(self._start, hva)
        self._end = max(self._end, hva + (HPAGE_SIZE if entry & HUGE else PAGE_SIZE))

    def flush(self) -> None:
        """Flushes the TLBs now already: what is cleared so far needs no flush in the end."""
        if self._end:
            self._mm.flush_tlb_range(self._start, self._end)
            self._start, self._end, self._flushed = TASK_SIZE, 0, True

    def finish(self) -> None:
        """Flushes the TLBs, then puts the frames."""
        mm = self._mm
        if self._frames.swaps:
            slots, self._frames.swaps = self._frames.swaps, None
            assert mm.rmap.swap is not None
            mm.rmap.swap.free(slots)
        if self._end:
            point("mm.gather.unflushed")
            mm.flush_tlb_range(self._start, self._end)
        elif not self._flushed:
            return
        point("mm.gather.flushed")
        trace = mm.trace
        swap = mm.rmap.swap
        gone = self._frames.pages() if swap is not None and swap.cache else ()
        freed = self._frames.free_all(trace.on)
        if freed:
            trace.emit("page_free", pages=freed)
        if swap is not None:
            swap.forget(gone)


def unmap_vmas(mm: Mm, areas: list[Vma], start: int, end: int) -> None:
    """Takes away the entries of ``areas``, which are unlinked and lie in ``[start, end)``, then the areas."""
    with MmuGather(mm) as gather:
        with mm.notifiers.invalidate_range(start, end, RangeEvent.UNMAP):
            for area in areas:
                if area.flags & VM_HUGETLB and mm.notifiers.flush_in_range:
                    _unmap_hugetlb_2008(mm, area)
                else:
                    gather.zap(area.start, area.end)
        for area in areas:
            mm.rmap.leave(area)


def check_unlocked(mm: Mm, areas: list[Vma]) -> None:
    """Before ``areas`` are unlinked or copied, which nothing takes back half way. Raises DeadlockError.

    Who works on them further up the stack, as a walk that looks for the entries of a page, would have to go on first.
    With a scheduler that is waited for where it is needed.
    """
    if scheduled():
        return
    for area in areas:
        mm.lock_tables(area.start, area.end)
        with AreaLocks(area):
            pass


def _unmap_hugetlb_2008(mm: Mm, area: Vma) -> None:
    """Huge pages of the pool had a range of their own inside the other, a flush in it, and went behind it."""
    with MmuGather(mm) as gather, mm.notifiers.invalidate_range(area.start, area.end, RangeEvent.CLEAR):
        gather.zap(area.start, area.end)
        gather.flush()


def unmap_mapping_range(file: AddressSpace, pgoff: int, count: int, *, even_cows: bool = True) -> None:
    """Takes pages ``[pgoff, pgoff + count)`` of ``file`` out of every mapping, private copies only if ``even_cows``.

    Every area that covers a part of them gets a range, a flush and a free of its own.
    """
    with file.i_mmap.read:
        for area in tuple(file.areas):
            lo = max(area.start, area.start + ((pgoff - area.pgoff) << PAGE_SHIFT))
            hi = min(area.end, area.start + ((pgoff + count - area.pgoff) << PAGE_SHIFT))
            if lo >= hi or area not in file.areas:
                continue
            mm, place = area.mm, (area.start, area.end, area.pgoff)
            with MmuGather(mm) as gather, mm.notifiers.invalidate_range(lo, hi, RangeEvent.CLEAR):
                if area in file.areas and place == (area.start, area.end, area.pgoff):
                    gather.zap(lo, hi, keep_anon=not even_cows, keep_markers=True)
                else:  # split, or gone: somebody has passed the lock
                    for part in [part for part in file.areas if part.mm is mm and part.start < hi and lo < part.end]:
                        gather.zap(max(lo, part.start), min(hi, part.end), keep_anon=not even_cows, keep_markers=True)


def exit_mmap(mm: Mm) -> None:
    """See :meth:`Mm.exit`. The notifiers are released first, so none of them hears of the unmapping."""
    with mm.mmap_lock.write:
        if mm.dead:
            return
        check_unlocked(mm, mm.vmas)
        mm.dead = True
        _exit_mmap(mm)


def _exit_mmap(mm: Mm) -> None:
    with mm.because("mm_exit"):
        mm.notifiers.release()
        areas, mm.vmas, mm.cached_vma = mm.vmas, [], None
        if areas:
            with mm.because("vma_unmap", start=areas[0].start, end=areas[-1].end):
                unmap_vmas(mm, areas, areas[0].start, TASK_SIZE)
    thp_of(mm.host).leave(mm)
    mm.threads.clear()
    del mm.rmap.mms[mm]
