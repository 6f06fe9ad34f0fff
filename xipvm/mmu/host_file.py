"""A file of the real host behind a page cache with dirty tracking, as a disk file system has it.

A clean page is mapped read-only, so that the first write faults and marks it dirty. Write-back takes the right away
again before it reads the page (``page_mkclean``): for every shared area that maps it ::

    range start (PROTECTION_PAGE) → entry cleared → TLB flush → same page, clean and read-only → range end

so that a write during or after the write-back faults and makes the page dirty again, for the next one.

Writing past the page cache (O_DIRECT) first writes back what is dirty there, then takes the pages out of every mapping
and out of the cache, writes, and does the latter again: a fault may have read the old data in meanwhile.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, page_up
from xipvm.errors import BadInput, MmError, os_reason
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.mkclean import page_mkclean
from xipvm.mmu.page_cache import PageCache
from xipvm.mmu.zap import unmap_mapping_range

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace

_BLOCK: Final = 512


class HostFile(PageCache):
    """The file at ``path``, written only if ``writable``. Raises BadInput when it cannot be opened."""

    tracks_writes = True

    def __init__(self, host: HostMemory, trace: Trace, path: str, *, writable: bool = False) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise BadInput(f"{path}: {os_reason(error)}") from None
        super().__init__(host, trace, path, os.fstat(self._fd).st_size, writable=writable)

    def unmapped(self) -> None:
        """The last area is gone: of a closed file, what is dirty is written, and the file let go."""
        if self.closed and not self.areas and self._fd >= 0:
            self.fsync()
            super().unmapped()
            os.close(self._fd)
            self._fd = -1

    def _read_page(self, pgoff: int, pfn: int) -> None:
        with self.invalidate_lock.read:
            data = os.pread(self._fd, PAGE_SIZE, pgoff << PAGE_SHIFT)
            if data:
                self.host.write(pfn, 0, data)
            point("mm.file.read")

    def readahead(self, pgoff: int, count: int) -> None:
        """Reads pages into the cache, as far as the file goes. Raises OutOfFrames."""
        for near in range(pgoff, min(pgoff + count, page_up(self.size) >> PAGE_SHIFT)):
            self._need(near)

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """The page is dirty from now on; NOPAGE when the file has lost it meanwhile."""
        point("mm.file.page_mkwrite")
        if self.pages.get(pgoff) != pfn:
            return VmFault.NOPAGE
        self.host.set_flags(pfn, PG_DIRTY)
        return VmFault.OK

    def fsync(self, pgoff: int = 0, count: int | None = None) -> int:
        """Writes back the dirty pages of the range (all by default); how many there were. Raises OSError."""
        end = page_up(self.size) >> PAGE_SHIFT if count is None else pgoff + count
        written = 0
        for near in sorted(near for near in self.pages if pgoff <= near < end):
            pfn = self.pages.get(near)
            if pfn is not None and self.host.flags(pfn) & PG_DIRTY:
                with self.rmap.page_lock(pfn):
                    if self.pages.get(near) == pfn and self.host.flags(pfn) & PG_DIRTY:
                        self._write_back(near, pfn)
                        written += 1
        return written

    def _write_back(self, pgoff: int, pfn: int) -> None:
        """Writes a dirty page, which is locked. Raises OSError."""
        self.host.get(pfn)  # a truncation does not take it away, but the last one to unmap it may
        try:
            self.host.clear_flags(pfn, PG_DIRTY)
            page_mkclean(self, pgoff, pfn)
            used = min(self.size - (pgoff << PAGE_SHIFT), PAGE_SIZE)
            if used > 0:
                os.pwrite(self._fd, self.host.read(pfn, 0, used), pgoff << PAGE_SHIFT)
        except OSError:
            self.host.set_flags(pfn, PG_DIRTY)
            raise
        finally:
            self._put(pfn)

    def direct_write(self, offset: int, data: bytes) -> None:
        """Writes ``data`` at ``offset``, past the page cache, as O_DIRECT does; mappings read it back in.

        Raises MmError EBADF (closed, or not writable), EINVAL unless both are whole blocks of 512 bytes, and OSError.
        """
        self._check("direct_write", offset, len(data), write=errno.EBADF)
        if offset < 0 or (offset | len(data)) % _BLOCK:
            raise MmError(errno.EINVAL, f"{self.name}: direct write of {len(data)} bytes at {offset:#x}")
        pages = range(offset >> PAGE_SHIFT, page_up(offset + len(data)) >> PAGE_SHIFT)
        with self.i_rwsem.write:
            self.fsync(pages.start, len(pages))
            for pgoff in pages:
                self._invalidate(pgoff)
            point("mm.file.direct_write")
            os.pwrite(self._fd, data, offset)
            self.size = max(self.size, offset + len(data))
            for pgoff in pages:
                self._invalidate(pgoff)

    def fadvise_dontneed(self) -> None:
        """POSIX_FADV_DONTNEED for all of the file: dirty pages are written back; what nobody maps leaves the cache."""
        self.fsync()
        for pgoff, pfn in sorted(self.pages.items()):
            if not self.host.mapcount(pfn) and not self.host.flags(pfn) & PG_DIRTY:
                self._evict(pgoff, pgoff + 1)

    def can_reclaim(self) -> bool:
        """There always is a place in the file."""
        return True

    def reclaim(self, pgoff: int, pfn: int) -> bool:
        """Writes a dirty page back and drops it from the cache."""
        if self.host.flags(pfn) & PG_DIRTY and self.pages.get(pgoff) == pfn:
            self._write_back(pgoff, pfn)
        if self.host.flags(pfn) & PG_DIRTY or self.host.refcount(pfn) != 2 or self.pages.get(pgoff) != pfn:
            return False
        if self.rmap.reclaim is not None:
            self.shadows[pgoff] = self.rmap.reclaim.workingset.evicted(pfn)
        self._drop(pgoff)
        return True

    def _invalidate(self, pgoff: int) -> None:
        """Takes a page out of the mappings and out of the cache, as invalidate_inode_pages2 does."""
        while (pfn := self.pages.get(pgoff)) is not None:
            if self.host.mapcount(pfn):
                unmap_mapping_range(self, pgoff, 1, even_cows=False)
            elif self.host.flags(pfn) & PG_DIRTY:  # written through a mapping since
                self.fsync(pgoff, 1)
            else:
                self._evict(pgoff, pgoff + 1)

    def _resize(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except (OSError, OverflowError) as error:
            number = error.errno if isinstance(error, OSError) else errno.EFBIG
            raise MmError(number or errno.EIO, f"truncate({size:#x}): {self.name}") from None

    def punch_hole(self, pgoff: int, count: int) -> None:
        """See :meth:`PageCache.punch_hole`; the file itself gets zeros there. Raises OSError."""
        super().punch_hole(pgoff, count)
        start = pgoff << PAGE_SHIFT
        os.pwrite(self._fd, bytes(max(min(count << PAGE_SHIFT, self.size - start), 0)), start)
