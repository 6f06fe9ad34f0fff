"""mprotect: other rights for a range, on the areas and on the entries that are there.

One range for each area whose protection really changes, if anything is mapped in it: all of the area that the request
covers (from the first 1 GiB on that has a page table), whatever the direction of the change. The frames stay, so
nothing is freed. One flush follows behind the last range end; it is left out when no TLB can know the entries. Pages
that may be written without a fault get WRITE back at once; the rest fault. Areas of huge pages of the pool have rules
of their own (hugetlb.py).

In 2008 the range was the whole piece, mapped or not, and each had a flush of its own before its end.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.errors import MmError
from xipvm.mmu.device_private import protect_entries
from xipvm.mmu.hugetlb import check_split, hugetlb_change_protection
from xipvm.mmu.mapping import merge, split
from xipvm.mmu.vma import PROT_ALL, PROT_WRITE, VM_HUGETLB, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

_PUD_PAGES: Final = 1 << 18


def mprotect(mm: Mm, addr: int, length: int, prot: int) -> None:
    """See :meth:`Mm.mprotect`."""
    start, end = mm.check_range("mprotect", addr, length, errno.ENOMEM)
    if prot & ~PROT_ALL:
        raise MmError(errno.EINVAL, f"mprotect: protection {prot:#x}")
    for area in mm.covered("mprotect", start, end):
        if prot & PROT_WRITE and area.shared and area.file is not None and not area.file.writable:
            raise MmError(errno.EACCES, f"mprotect: {area.file.name} is not writable")
    if start == end:
        return
    check_split(mm, "mprotect", start, end)
    split(mm, start)
    split(mm, end)
    changed: list[Vma] = []
    for area in mm.areas_in(start, end):
        if area.prot == prot:
            continue
        area.set_prot(prot)
        with mm.because("vma_protect", start=area.start, end=area.end, prot=prot):
            if area.flags & VM_HUGETLB:
                hugetlb_change_protection(mm, area)
            elif _change_protection(mm, area):
                changed.append(area)
    if changed:
        point("mm.mprotect.unflushed")
        mm.flush_tlb_range(changed[0].start, changed[-1].end)
    merge(mm, start, end)


def _change_protection(mm: Mm, area: Vma) -> bool:
    """Brings the entries of ``area`` in line with its protection; whether TLBs must be flushed."""
    first, end = area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT
    early = mm.notifiers.flush_in_range
    populated = first if early else mm.pgd.next_present(first, end)
    if populated < 0:
        return False
    start = max(first, populated & ~(_PUD_PAGES - 1)) << PAGE_SHIFT
    trace = mm.trace
    with mm.notifiers.invalidate_range(start, area.end, RangeEvent.PROTECTION_VMA):
        mm.lock_tables(area.start, area.end)
        flushes, changed = mm.pgd.protect(first, end, area.page_prot, area.upgrade, trace.on)
        for lo, hi, flags in changed:
            trace.emit("pte_protect", mm=mm.name, start=lo << PAGE_SHIFT, end=hi << PAGE_SHIFT, flags=flags)
        protect_entries(mm, area.start, area.end)
        if early:
            mm.flush_tlb_range(start, area.end)
    return flushes > 0 and not early
