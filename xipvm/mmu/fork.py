"""fork: a second mm with the same areas, whose private pages are shared read-only until one side writes.

For each private area that has something to copy (an anon_vma, or device frames)::

    range start over the whole area → parent's entries lose WRITE, child's are filled → range end

and one flush of the whole parent behind the last range end: until then threads of the parent may still write through
old translations. The other areas copy nothing, their pages come back by faults. The child has no notifiers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.device_private import after_fork, before_fork, is_device_slot
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mapping import insert
from xipvm.mmu.pte import HUGE
from xipvm.mmu.thp import thp_of
from xipvm.mmu.uffd_message import UFFD_EVENT_FORK, UffdMsg
from xipvm.mmu.uffd_reach import inherit
from xipvm.mmu.uffd_wp import forget
from xipvm.mmu.vma import TASK_SIZE, VM_DONTCOPY, VM_HUGETLB, VM_LOCKED, VM_MIXEDMAP, VM_UFFD_WP, Vma
from xipvm.mmu.zap import check_unlocked
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.userfaultfd import Userfaultfd


def fork(mm: Mm, name: str | None) -> Mm:
    """See :meth:`Mm.fork`."""
    mm.check_alive("fork")
    check_unlocked(mm, [area for area in mm.vmas if not area.flags & VM_DONTCOPY])
    mm.children += 1
    child = type(mm)(mm.host, mm.trace, name=name or f"{mm.name}.{mm.children}", protocol=mm.protocol)
    child.start_brk, child.end_brk = mm.start_brk, mm.end_brk
    child.memcg = mm.memcg
    child.uffd_used = mm.uffd_used
    uffds: dict[Userfaultfd, Userfaultfd] = {}
    with mm.because("mm_fork", child=child.name):
        for area in tuple(mm.vmas):
            if not area.flags & VM_DONTCOPY:
                _dup_area(mm, child, area, uffds)
        point("mm.fork.unflushed")
        mm.flush_tlb_range(0, TASK_SIZE)
    for uffd, heir in uffds.items():
        mm.uffd_reports.add(uffd, UffdMsg(UFFD_EVENT_FORK, ufd=heir))
    return child


def _dup_area(mm: Mm, child: Mm, area: Vma, uffds: dict[Userfaultfd, Userfaultfd]) -> None:
    twin = Vma(child, area.start, area.end, area.prot, area.flags & ~VM_LOCKED, area.file, area.pgoff)
    if area.uffd is not None:
        inherit(area, twin, uffds)
    mm.rmap.fork(area, twin)
    insert(child, twin)
    if mm.trace.on:
        mm.trace.emit("vma_map", mm=child.name, start=twin.start, end=twin.end, prot=twin.prot, kind=twin.kind)
    if area.anon_vma is None and not area.flags & VM_MIXEDMAP and not twin.flags & VM_UFFD_WP:
        return
    if area.shared:
        _copy_entries(mm, child, area)
    else:
        if area.flags & VM_HUGETLB:  # of which nobody was told in 2008
            announced = mm.notifiers.around_entry(area.start, area.end, RangeEvent.CLEAR)
        else:
            announced = mm.notifiers.invalidate_range(area.start, area.end, RangeEvent.PROTECTION_PAGE)
        with announced:
            _copy_entries(mm, child, area)
    if mm.uffd_used and not twin.flags & VM_UFFD_WP:
        forget(child, area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT)


def _copy_entries(mm: Mm, child: Mm, area: Vma) -> None:
    trace = mm.trace
    thp_of(mm.host).share_zero(mm, child)
    swaps: list[int] = []
    mm.lock_tables(area.start, area.end)
    before_fork(mm, area)
    changed, parts = [], _to_copy(mm, area)
    for lo, hi in parts:
        first, last = lo >> PAGE_SHIFT, hi >> PAGE_SHIFT
        changed += mm.pgd.copy_to(child.pgd, first, last, mm.host, not area.shared, trace.on, swaps)
    if mm.rmap.devices is not None:
        after_fork(mm, area, filter(is_device_slot, swaps))
    for slot in swaps:
        if is_device_slot(slot):
            continue
        assert mm.rmap.swap is not None
        mm.rmap.swap.duplicate(slot)
    if trace.on:
        for lo, hi, flags in changed:
            trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
        for lo, hi in parts:
            trace.emit("pte_copy", mm=mm.name, child=child.name, start=lo, end=hi)


def _to_copy(mm: Mm, area: Vma) -> list[tuple[int, int]]:
    """Which bytes of ``area``: all, but for 2 MiB of a file in place, which faults will map again (copy_huge_pmd)."""
    if area.file is None or not area.file.devmap:
        return [(area.start, area.end)]
    parts, at = [], area.start
    for page, entry in mm.pgd.entries(area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT):
        if entry & HUGE:
            parts.append((at, page << PAGE_SHIFT))
            at = (page << PAGE_SHIFT) + HPAGE_SIZE
    return [(lo, hi) for lo, hi in (*parts, (at, area.end)) if lo < hi]
