"""Huge pages of the pool (hugetlbfs, MAP_HUGETLB): their areas, what is set aside for them, and the ranges announced.

A page of such an area is 2 MiB, is mapped by one huge entry or not at all, and comes from a pool that was filled before
(``HostMemory.reserve_huge_pages``). It is never split, swapped, merged or reclaimed, and nothing in the area begins or
ends inside one: what would cut a page is EINVAL.

**Reservations.** mmap sets aside what the mapping can need, or fails with ENOMEM; then a fault cannot fail for want of
a page. A shared mapping sets pages of the *file* aside, once for all that map it (hugetlb_file.py). A private one has a
:class:`HugeReserve` of its own: every page of the area is set aside until it is *consumed* by the first page that is
mapped there. A child that is forked has none, nor has a mapping with MAP_NORESERVE: their faults take what is free
beyond all that is set aside, or get SIGBUS. Invariants (verify.py counts)::

    host.reserved_huge_pages = reserved and not cached pages of all files + pages of private areas not consumed
    host.reserved_huge_pages <= host.free_huge_pages, but while pages wait for a TLB flush to be freed

**Ranges.** As for small pages, except: mprotect announces also where nothing is mapped, and flushes before the end;
fork and mremap announce CLEAR; truncation announces once. Where an area could share page tables with others (shared,
1 GiB aligned and long), ranges are widened to 1 GiB, and cutting it announces the 1 GiB that it is cut in. The tables
are not shared here, but whoever listens could not tell.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_MASK
from xipvm.mmu.hugetlb_pool import hugetlb_acct_memory
from xipvm.mmu.pte import ANON, HUGE, MAPPED, UFFD_WP, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import VM_HUGETLB, VM_SHARED, VM_UFFD_WP, Vma
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm

_PUD_SIZE: Final = 1 << 30
WP_MARKER: Final = UFFD_WP | HUGE
"""In an empty entry: the huge page that comes there is protected by userfaultfd."""


# ---- reservations


class HugeReserve:
    """What is set aside for a private mapping; the areas that it is split into have one of these together."""

    __slots__ = ("consumed",)

    def __init__(self) -> None:
        self.consumed: set[int] = set()
        """Offsets, in pages, of the huge pages that have been mapped: for all others one is set aside."""


LOST: Final = HugeReserve()
"""In place of the reserve of an area from which a page was taken (unmap_ref_private): its faults are SIGBUS."""


def own_reserve(area: Vma) -> HugeReserve | None:
    """The reserve of a private area, None where nothing was set aside."""
    return None if area.huge_reserve is LOST else area.huge_reserve


def reserved_by(area: Vma) -> int:
    """How many huge pages are set aside for a private area now."""
    reserve = own_reserve(area)
    if reserve is None:
        return 0
    first, end = area.pgoff, area.page_offset(area.end)
    return (end - first) // HUGE_PAGES - sum(first <= pgoff < end for pgoff in reserve.consumed)


def vm_op_close(area: Vma) -> None:
    """The area goes away: what is still set aside for it is given back."""
    hugetlb_acct_memory(area.mm.host, -reserved_by(area))
    area.huge_reserve = None


# ---- what may be cut where


def check_split(mm: Mm, what: str, *places: int) -> None:
    """Raises EINVAL when one of ``places`` cuts a huge page of an area."""
    for hva in places:
        if hva & ~HPAGE_MASK:
            area = mm.find_vma(hva)
            if area is not None and area.flags & VM_HUGETLB and area.start < hva:
                raise MmError(errno.EINVAL, f"{what}: {hva:#x} lies in a huge page of {area!r}")


def check_mmap(call: str, file: AddressSpace | None, wanted: bool, addr: int, pgoff: int) -> None:
    """What mmap of a hugetlbfs file wants beside the rest; ``wanted``: MAP_HUGETLB, which other files cannot do."""
    if file is None or not file.hugetlb:
        if wanted:
            raise MmError(errno.EINVAL, f"{call}: MAP_HUGETLB of a file that has no huge pages")
    elif (addr & ~HPAGE_MASK) or pgoff & (HUGE_PAGES - 1):
        raise MmError(errno.EINVAL, f"{call}: page {pgoff:#x} at {addr:#x} is no huge page")


def adjust_range_if_pmd_sharing_possible(area: Vma, start: int, end: int) -> tuple[int, int]:
    """``[start, end)`` of ``area`` widened to what shared page tables would cover."""
    low, high = (area.start + _PUD_SIZE - 1) & -_PUD_SIZE, area.end & -_PUD_SIZE
    if not area.flags & VM_SHARED or low >= high or end <= low or start >= high:
        return start, end
    if start > low:
        start &= -_PUD_SIZE
    if end < high:
        end = (end + _PUD_SIZE - 1) & -_PUD_SIZE
    return start, end


def hugetlb_split(area: Vma, hva: int) -> None:
    """``area`` is about to be cut at ``hva``: page tables that cover both sides can be shared no longer."""
    floor = hva & -_PUD_SIZE
    if area.flags & VM_SHARED and floor != hva and area.start <= floor and floor + _PUD_SIZE <= area.end:
        with area.mm.notifiers.around_entry(floor, floor + _PUD_SIZE, RangeEvent.CLEAR):
            area.mm.flush_tlb_range(floor, floor + _PUD_SIZE)


# ---- entries


def dontneed(mm: Mm, gather: MmuGather, area: Vma, start: int, end: int) -> None:
    """MADV_DONTNEED: the range ends with the last whole huge page, if its length is no multiple of one."""
    mm.notifiers.needs_modern("MADV_DONTNEED of huge pages")
    end &= HPAGE_MASK
    if start < end:
        with mm.notifiers.invalidate_range(*adjust_range_if_pmd_sharing_possible(area, start, end), RangeEvent.CLEAR):
            zap_hugepage_range(gather, area, start, end)


def unmap_hugepage_range(area: Vma, start: int, end: int, *, drop_markers: bool = False) -> None:
    """Takes ``[start, end)`` out of one area, private copies included: truncation, holes, a child that has to yield.

    i_mmap of the file is locked.
    """
    mm, file = area.mm, area.file
    assert file is not None
    around = adjust_range_if_pmd_sharing_possible(area, start, end)
    with MmuGather(mm) as gather, mm.notifiers.invalidate_range(*around, RangeEvent.CLEAR):
        # Split, or gone: somebody was faster.
        for part in [part for part in file.areas if part.mm is mm and part.start < end and start < part.end]:
            lo, hi = max(start, part.start), min(end, part.end)
            zap_hugepage_range(gather, part, lo, hi, drop_markers=drop_markers)
        if mm.notifiers.flush_in_range:
            gather.flush()


def zap_hugepage_range(gather: MmuGather, area: Vma, start: int, end: int, *, drop_markers: bool = False) -> None:
    """Clears entries of an area that stays. A private page that goes is set aside again if its mapping had it so.

    What userfaultfd has protected stays so, unless ``drop_markers``.
    """
    mm, reserve = area.mm, own_reserve(area)
    if reserve is not None:
        for page, entry in mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            pgoff = area.page_offset(page << PAGE_SHIFT)
            if entry & ANON and pgoff in reserve.consumed and mm.host.refcount(pte_pfn(entry)) == 1:
                reserve.consumed.discard(pgoff)
                mm.host.reserved_huge_pages += 1
    protected = []
    if area.flags & VM_UFFD_WP and not drop_markers:
        entries = mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
        protected = [page for page, entry in entries if entry & MAPPED and entry & UFFD_WP]
    gather.zap(start, end, keep_markers=not drop_markers)
    for page in protected:
        mm.pgd.set(page, WP_MARKER)


def hugetlb_change_protection(mm: Mm, area: Vma) -> None:
    """mprotect. Announced and flushed whether or not anything is mapped; the flush comes before the range end."""
    trace, file = mm.trace, area.file
    assert file is not None
    start, end = adjust_range_if_pmd_sharing_possible(area, area.start, area.end)
    with mm.notifiers.invalidate_range(start, end, RangeEvent.PROTECTION_VMA), file.i_mmap.write:
        first, last = area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT
        mm.ptl.wait_range(area.start >> PMD_SHIFT, area.end >> PMD_SHIFT)
        for lo, hi, flags in mm.pgd.protect(first, last, area.page_prot, 0, trace.on)[1]:
            trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
        mm.flush_tlb_range(start, end)
