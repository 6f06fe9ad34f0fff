"""userfaultfd on huge pages of the pool: what is told of, and what COPY and CONTINUE put into empty entries.

A fault on an empty entry is the monitor's where neither the file has the page (MISSING), or where it has (MINOR). It is
told with the address of the huge page. What fills is done a huge page at a time, ready before its entry is there;
nobody is told, for nothing was there. As in Linux there is no ZEROPAGE here.

Write protection is announced and flushed as mprotect of huge pages is, whether or not anything is mapped; a marker in
an empty entry keeps it, until truncation. POISON is refused, and so is WP_ASYNC: Linux has both.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Pfn
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY
from xipvm.mmu.huge_pmd import HPAGE_MASK
from xipvm.mmu.hugetlb import WP_MARKER, adjust_range_if_pmd_sharing_possible, own_reserve
from xipvm.mmu.hugetlb_fault import alloc_private, map_cached, map_new_anon
from xipvm.mmu.hugetlb_pool import HugePagesInFlightError, wait_for_huge_page
from xipvm.mmu.pte import MIGRATION, UFFD_WP, WRITE
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import PROT_WRITE, VM_HUGETLB, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.hugetlb_file import HugetlbFile
    from xipvm.mmu.mm import Mm


def check_pieces(what: str, areas: list[Vma], start: int, end: int) -> None:
    """Raises EINVAL when ``[start, end)`` cuts a huge page of one of ``areas``."""
    for area in areas:
        if area.flags & VM_HUGETLB and (max(area.start, start) | min(area.end, end)) & ~HPAGE_MASK:
            raise MmError(errno.EINVAL, f"{what}: [{start:#x}, {end:#x}) cuts a huge page of {area!r}")


def copy(mm: Mm, area: Vma, hva: int, data: bytes, wp: bool) -> None:
    """A new huge page with ``data``, 2 MiB of it; in a shared area it goes into the file.

    Raises EFAULT behind the end of the file, EEXIST where a page is, ENOMEM when the pool has none.
    """
    file: HugetlbFile = area.file  # type: ignore[assignment]
    pgoff = area.page_offset(hva)
    while True:
        _check_vacant(mm, area, hva)
        if area.shared and pgoff in file.pages:
            raise MmError(errno.EEXIST, f"UFFDIO_COPY at {hva:#x}: {file.name} has the page")
        try:
            pfn = file.grab(pgoff) if area.shared else alloc_private(mm, own_reserve(area), pgoff)[0]
            break
        except HugePagesInFlightError:
            if not wait_for_huge_page(mm.host, lambda: mm.pgd.get(hva >> PAGE_SHIFT) not in (0, WP_MARKER)):
                pfn = None
                break
    if pfn is None:
        raise MmError(errno.ENOMEM, f"UFFDIO_COPY at {hva:#x}: there is no huge page for it")
    _fill(mm, pfn, data)
    if area.shared:
        map_cached(mm, area, hva, pfn, wp)
    else:
        map_new_anon(mm, area, hva, pfn, bool(area.prot & PROT_WRITE), wp)


def continue_(mm: Mm, area: Vma, hva: int, wp: bool) -> None:
    """The page that the file has. Raises EFAULT when it has none, or ends before, and EEXIST."""
    file: HugetlbFile = area.file  # type: ignore[assignment]
    _check_vacant(mm, area, hva)
    pfn = file.pages.get(area.page_offset(hva))
    if pfn is None:
        raise MmError(errno.EFAULT, f"UFFDIO_CONTINUE at {hva:#x}: {file.name} has no page there")
    map_cached(mm, area, hva, pfn, wp)


def writeprotect(mm: Mm, area: Vma, start: int, end: int, on: bool) -> None:
    """Protects ``[start, end)`` of ``area``, whole huge pages, or lifts the protection."""
    pgd, trace, file = mm.pgd, mm.trace, area.file
    assert file is not None
    first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    lo, hi = adjust_range_if_pmd_sharing_possible(area, start, end)
    with mm.notifiers.invalidate_range(lo, hi, RangeEvent.PROTECTION_VMA), file.i_mmap.write:
        mm.ptl.wait_range(start >> PMD_SHIFT, end >> PMD_SHIFT)
        for page in range(first, last, HUGE_PAGES):
            if pgd.get(page) in (0, WP_MARKER):
                pgd.set(page, WP_MARKER if on else 0)
        if on:
            pgd.set_bits(first, last, UFFD_WP)
            pgd.clear_bits(first, last, WRITE, MIGRATION)
        else:
            pgd.clear_bits(first, last, UFFD_WP)
        for at, to, flags in pgd.protect(first, last, area.page_prot, 0, trace.on)[1]:
            trace.emit("pte_protect", mm=mm.name, start=at << PAGE_SHIFT, end=to << PAGE_SHIFT, flags=flags)
        mm.flush_tlb_range(lo, hi)


def _check_vacant(mm: Mm, area: Vma, hva: int) -> None:
    file: HugetlbFile = area.file  # type: ignore[assignment]
    if area.page_offset(hva) + HUGE_PAGES > file.size >> PAGE_SHIFT:
        raise MmError(errno.EFAULT, f"userfaultfd at {hva:#x}: behind the end of {file.name}")
    mm.ptl.wait_range(hva >> PMD_SHIFT, (hva >> PMD_SHIFT) + 1)
    if mm.pgd.get(hva >> PAGE_SHIFT) not in (0, WP_MARKER):
        raise MmError(errno.EEXIST, f"userfaultfd at {hva:#x} in {mm.name}: there is something already")


def _fill(mm: Mm, pfn: Pfn, data: bytes) -> None:
    mm.host.set_flags(pfn, PG_DIRTY)
    for offset in range(HUGE_PAGES):
        mm.host.write(pfn + offset, 0, data[offset * PAGE_SIZE : (offset + 1) * PAGE_SIZE])
