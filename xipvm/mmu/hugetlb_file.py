"""Files of hugetlbfs: a page cache of huge pages, and what of the file is set aside in the pool.

``pages`` holds one reference to each cached huge page, every entry another. ``reserved`` names the pages that a shared
mapping may count on: mmap of one sets them aside, and a page that is allocated joins them. They are given back by
truncation, by a hole (the pages that were there) and with the file. Anonymous MAP_HUGETLB memory is a file that nobody
else has.

A page leaves the cache unmapped: entries go first, with a range for every area, then the page; one that a fault has
mapped in between is unmapped again, alone. Sizes are whole huge pages. Offsets in pages are of 4 KiB, as everywhere.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Pfn
from xipvm.errors import MmError
from xipvm.mmu.file import AddressSpace
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.gup import pieces
from xipvm.mmu.huge_pmd import HPAGE_MASK, HPAGE_SIZE, huge_up
from xipvm.mmu.hugetlb import (
    HugeReserve,
    unmap_hugepage_range,
    vm_op_close,
)
from xipvm.mmu.hugetlb_pool import HugePagesInFlightError, alloc_hugetlb_page, hugetlb_acct_memory, wait_for_huge_page
from xipvm.mmu.vma import PROT_WRITE, VM_NORESERVE, Vma

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace


class HugetlbFile(AddressSpace):
    """A file of ``size`` bytes in hugetlbfs. :meth:`close` it; its pages go with the last mapping. Raises EINVAL."""

    kind = "hugetlb"
    hugetlb = True

    def __init__(self, host: HostMemory, trace: Trace, name: str, size: int = 0, *, writable: bool = True) -> None:
        _check_size(name, size)
        super().__init__(host, trace, name, writable=writable)
        self.size = size
        self.pages: dict[int, Pfn] = {}
        """The first frame of each cached huge page, by page offset."""
        self.reserved: set[int] = set()
        """Page offsets of huge pages that are set aside or were, and are cached now."""
        self.closed = False

    def close(self) -> None:
        """Nobody will use the object as a file any more. Idempotent."""
        self.closed = True
        self.unmapped()

    def unmapped(self) -> None:
        """The last area is gone."""
        if self.closed and not self.areas:
            self._remove(0, None)

    # ---- for mmap and munmap

    def mmap(self, area: Vma) -> None:
        """Sets aside what ``area`` can need, and grows the file if it may be written there. Raises ENOMEM."""
        first, end = area.pgoff, area.page_offset(area.end)
        if not area.flags & VM_NORESERVE:
            count = (end - first) // HUGE_PAGES
            if area.shared:
                hugetlb_acct_memory(self.host, count - sum(first <= pgoff < end for pgoff in self.reserved))
                self.reserved.update(range(first, end, HUGE_PAGES))
            else:
                hugetlb_acct_memory(self.host, count)
                area.huge_reserve = HugeReserve()
        if area.prot & PROT_WRITE:
            self.size = max(self.size, end << PAGE_SHIFT)

    def vma_close(self, area: Vma) -> None:
        """See the base."""
        vm_op_close(area)

    # ---- the cache

    def grab(self, pgoff: int) -> Pfn | None:
        """The huge page at ``pgoff``, allocated if it is not cached; None when the pool has none for it.

        Raises HugePagesInFlightError.
        """
        pfn = self.pages.get(pgoff)
        if pfn is None:
            pfn = alloc_hugetlb_page(self.host, self.trace, reserved=pgoff in self.reserved)
            if pfn is not None:
                self.reserved.add(pgoff)
                self.host.set_rmap(pfn, self.id, pgoff)
                self.pages[pgoff] = pfn
        return pfn

    def has_page(self, pgoff: int) -> bool | None:
        """See the base."""
        pgoff &= -HUGE_PAGES
        return None if pgoff + HUGE_PAGES > self.size >> PAGE_SHIFT else pgoff in self.pages

    def _unmap(self, first: int, end: int | None) -> None:
        """Takes ``[first, end)`` out of every mapping, private copies included."""
        with self.i_mmap.write:
            for area in tuple(self.areas):
                lo = max(area.start, area.start + ((first - area.pgoff) << PAGE_SHIFT))
                hi = area.end if end is None else min(area.end, area.start + ((end - area.pgoff) << PAGE_SHIFT))
                if lo < hi and area in self.areas:
                    unmap_hugepage_range(area, lo, hi, drop_markers=end is None)

    def _remove(self, first: int, end: int | None) -> None:
        """Takes the pages ``[first, end)`` out of the cache, and gives back what is set aside for them.

        Without an ``end``, as for truncation, also what is set aside for pages that are not there.
        """
        for pgoff in sorted(pgoff for pgoff in self.pages if first <= pgoff and (end is None or pgoff < end)):
            while pgoff in self.pages and self.host.mapcount(self.pages[pgoff]):
                self._unmap(pgoff, pgoff + HUGE_PAGES)
            pfn = self.pages.pop(pgoff, None)
            if pfn is None:  # somebody else has removed it
                continue
            self.reserved.discard(pgoff)
            self.host.set_rmap(pfn, 0, 0)
            if self.host.put(pfn) and self.trace.on:
                self.trace.emit("page_free", pages=[(pfn, HUGE_PAGES)])
        if end is None:
            gone = {pgoff for pgoff in self.reserved if pgoff >= first and pgoff not in self.pages}
            self.reserved -= gone
            hugetlb_acct_memory(self.host, -len(gone))

    # ---- as a file

    def pread(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, fewer at the end of the file. Holes read as zero and stay holes."""
        parts = []
        for at, in_page, length in pieces(offset, max(min(size, self.size - offset), 0)):
            pfn = self.pages.get((at & HPAGE_MASK) >> PAGE_SHIFT)
            frame = None if pfn is None else pfn + ((at & ~HPAGE_MASK) >> PAGE_SHIFT)
            parts.append(bytes(length) if frame is None else self.host.read(frame, in_page, length))
        return b"".join(parts)

    def pwrite(self, offset: int, data: bytes) -> None:
        """hugetlbfs has no write: EINVAL."""
        raise MmError(errno.EINVAL, f"write to {self.name}, which is in hugetlbfs")

    def truncate(self, size: int) -> None:
        """Makes the file ``size`` bytes long. What lies behind goes from every mapping, private copies included.

        Announced once for every area that reaches beyond ``size``, also when the file grows. Raises EINVAL.
        """
        _check_size(self.name, size)
        self.size = size
        first = size >> PAGE_SHIFT
        self._unmap(first, None)
        point("mm.truncate.unmapped")
        self._remove(first, None)

    def punch_hole(self, pgoff: int, count: int) -> None:
        """Makes ``count`` pages from ``pgoff`` read as zero: frees whole huge pages, and zeroes parts of others.

        Unlike with other files, private copies of the pages that are freed go, too.
        """
        for area in self.areas:
            area.mm.notifiers.needs_modern(f"a hole in {self.name}")
        end = pgoff + count
        low, high = (pgoff + HUGE_PAGES - 1) & -HUGE_PAGES, end & -HUGE_PAGES
        if low < high:
            self._zero(pgoff, low)
            self._unmap(low, high)
            point("mm.truncate.unmapped")
            self._remove(low, high)
            self._zero(high, end)
        else:
            self._zero(pgoff, end)

    def _zero(self, first: int, end: int) -> None:
        for page in range(first, end):
            pfn = self.pages.get(page & -HUGE_PAGES)
            if pfn is not None:
                self.host.write(pfn + page % HUGE_PAGES, 0, bytes(PAGE_SIZE))

    def _allocate(self, pgoff: int) -> bool:
        """Has the huge page at ``pgoff`` cached; whether there was one. May sleep."""
        while True:
            try:
                return self.grab(pgoff) is not None
            except HugePagesInFlightError:
                if not wait_for_huge_page(self.host, lambda: pgoff in self.pages or pgoff not in self.reserved):
                    return False

    def fallocate(self, offset: int, length: int, *, keep_size: bool = False) -> None:
        """Allocates the huge pages of ``[offset, offset + length)`` bytes, and grows the file to there if it may.

        Errors: EINVAL, ENOSPC (the pool has no more; as in Linux, the pages before that stay).
        """
        if offset < 0 or length <= 0:
            raise MmError(errno.EINVAL, f"fallocate({offset:#x}, {length:#x}) of {self.name}")
        for pgoff in range((offset & HPAGE_MASK) >> PAGE_SHIFT, huge_up(offset + length) >> PAGE_SHIFT, HUGE_PAGES):
            if not self._allocate(pgoff):
                raise MmError(errno.ENOSPC, f"fallocate of {self.name}: no huge page for page {pgoff:#x}")
        if not keep_size:
            self.size = max(self.size, offset + length)


def _check_size(name: str, size: int) -> None:
    if size < 0 or size & (HPAGE_SIZE - 1):
        raise MmError(errno.EINVAL, f"{name}: {size} bytes are no whole huge pages")
