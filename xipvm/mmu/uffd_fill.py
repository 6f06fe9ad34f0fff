"""What a monitor puts into empty entries: COPY, ZEROPAGE, CONTINUE and POISON of userfaultfd, a page at a time.

Nobody is told: where nothing was, nobody has anything to forget. A page is ready before its entry is there, so that who
finds the entry finds the content. A page for a shared mapping goes into its file first, and stays there.

COPY and CONTINUE replace the marker of a write-protected empty entry, ZEROPAGE and POISON do not (EEXIST), as in Linux.
Raises MmError; nothing has changed then. mmap_lock is held for reading.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, page_up
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.cow import map_new_anon
from xipvm.mmu.frames import PG_DIRTY, ZERO_PFN
from xipvm.mmu.page_cache import PageCache, ShmemFile
from xipvm.mmu.pte import ACCESSED, DIRTY, PFN_SHIFT, POISON, SOFT_DIRTY, SPECIAL, UFFD_WP, WRITE, is_marker
from xipvm.mmu.reclaim import retry
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import PROT_WRITE, Vma

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


def copy(mm: Mm, area: Vma, hva: int, data: bytes, wp: bool) -> None:
    """A new page with ``data``."""
    pfn = _new_page(mm, area, hva, data, markers=True)
    if area.shared:
        _add_to_file(mm, area, hva, pfn, wp)
    else:
        map_new_anon(mm, area, hva, pfn, 0, UFFD_WP if wp else 0)


def zeropage(mm: Mm, area: Vma, hva: int) -> None:
    """Zeros."""
    if area.shared:
        _add_to_file(mm, area, hva, _new_page(mm, area, hva, b"", markers=False), False)
    else:
        _check_vacant(mm, area, hva, markers=False)
        mm.set_pte(hva, ZERO_PFN << PFN_SHIFT | area.rights | SPECIAL | ACCESSED)


def continue_(mm: Mm, area: Vma, hva: int, wp: bool) -> None:
    """The page that the file has."""
    assert isinstance(area.file, ShmemFile)
    pgoff = area.page_offset(hva)
    if pgoff not in area.file.pages and pgoff not in area.file.swapped:
        raise MmError(errno.EFAULT, f"UFFDIO_CONTINUE at {hva:#x}: {area.file.name} has no page {pgoff:#x}")
    _check_vacant(mm, area, hva, markers=True)
    file = area.file
    try:
        pfn, fault = retry(mm.host, lambda: file.fault(area, pgoff, True))
    except OutOfFrames as error:
        raise MmError(errno.ENOMEM, f"UFFDIO_CONTINUE at {hva:#x}: {error}") from None
    if fault:
        raise MmError(errno.EFAULT, f"UFFDIO_CONTINUE at {hva:#x}: {fault.name}")
    try:
        _check_vacant(mm, area, hva, markers=True)
    except MmError:
        mm.put_frame(pfn)
        raise
    _map_file_page(mm, area, hva, pfn, wp)


def poison(mm: Mm, area: Vma, hva: int) -> None:
    """A marker that makes every access a SIGBUS."""
    _check_vacant(mm, area, hva, markers=False)
    mm.pgd.set(hva >> PAGE_SHIFT, POISON)


def _check_vacant(mm: Mm, area: Vma, hva: int, *, markers: bool) -> None:
    """Raises EFAULT behind the end of the file, and EEXIST. Nobody is about to change the entry then."""
    file, page = area.file, area.page_offset(hva)
    if isinstance(file, PageCache) and page >= page_up(file.size) >> PAGE_SHIFT:
        raise MmError(errno.EFAULT, f"userfaultfd at {hva:#x}: behind the end of {file.name}")
    mm.ptl.wait_range(hva >> PMD_SHIFT, (hva >> PMD_SHIFT) + 1)
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    if entry and not (markers and is_marker(entry)):
        raise MmError(errno.EEXIST, f"userfaultfd at {hva:#x} in {mm.name}: there is something already")


def _new_page(mm: Mm, area: Vma, hva: int, data: bytes, *, markers: bool) -> int:
    """A frame with ``data``, or zeros, for the entry of ``hva``, which is vacant."""
    _check_vacant(mm, area, hva, markers=markers)
    try:
        pfn = retry(mm.host, lambda: mm.alloc_frame(not data))
    except OutOfFrames as error:
        raise MmError(errno.ENOMEM, f"userfaultfd: {error}") from None
    try:
        _check_vacant(mm, area, hva, markers=markers)  # making room takes a while
        if area.shared and area.file is not None and area.file.has_page(area.page_offset(hva)):
            raise MmError(errno.EEXIST, f"userfaultfd at {hva:#x}: {area.file.name} has the page")
    except MmError:
        mm.put_frame(pfn)
        raise
    if data:
        mm.host.write(pfn, 0, data)
    return pfn


def _add_to_file(mm: Mm, area: Vma, hva: int, pfn: int, wp: bool) -> None:
    """Gives the file a page that it does not have, and maps it."""
    assert isinstance(area.file, ShmemFile)
    area.file.add_page(area.page_offset(hva), pfn)
    mm.host.get(pfn)
    _map_file_page(mm, area, hva, pfn, wp)


def _map_file_page(mm: Mm, area: Vma, hva: int, pfn: int, wp: bool) -> None:
    """The reference to ``pfn`` becomes the entry's. Dirty at once: nobody will hear of a first write."""
    flags = area.rights | DIRTY | SOFT_DIRTY | ACCESSED
    if wp:
        flags |= UFFD_WP
    elif area.shared and area.prot & PROT_WRITE:
        flags |= WRITE
    mm.host.set_flags(pfn, PG_DIRTY)
    mm.host.add_mapcount(pfn, 1)
    mm.set_pte(hva, pfn << PFN_SHIFT | flags)
