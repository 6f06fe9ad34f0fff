"""A file used in place, as DAX has it today (fs/dax.c, 6.12): an entry a page, which everything serialises on.

The entry of a page says what is mapped for it: nothing yet, the zero page (it is a hole), or its block; and whether the
block was written through a mapping since the last write-back. Who faults, writes back or makes a hole holds its lock.

======================  ==========================================================================================
read fault on a hole    the zero page; nothing is allocated, also where the mapping is shared and may be written
write fault on a hole   block allocated → the zero page unmapped everywhere → entry is the block → mapped writable
write fault on a block  the entry is dirty from now on
read fault of 2 MiB     one huge entry, where the file has them in one piece; a write splits it, which takes it away
private write fault     copied at once; of a hole, zeros
write(2) over a hole    block allocated → the page unmapped everywhere → data copied
write-back              for each area: range start, entry read-only and clean, range end; then the entry is clean
truncation, a hole      unmapped everywhere → nobody has a page pinned → size → unmapped → blocks freed
======================  ==========================================================================================

Faults hold invalidate_lock for reading, truncation for writing; those that write, and whoever makes an entry writable,
wait while the file system is frozen. The decision what a fault maps is made with no schedule point between it and the
entry.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, page_up
from xipvm.errors import MmError
from xipvm.locks.lock import KeyedLocks
from xipvm.locks.order import DAX_ENTRY
from xipvm.mmu.file import FaultResult, VmFault
from xipvm.mmu.frames import HUGE_PAGES, ZERO_PFN
from xipvm.mmu.mkclean import page_mkclean
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.xip.filemap import XipFile

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace
    from xipvm.xip.inode import XipInode


class DaxFile(XipFile):
    """``inode`` as a file. Reads, writes and their corner values are those of the base."""

    kind = "dax"
    tracks_writes = True

    def __init__(self, host: HostMemory, trace: Trace, inode: XipInode, *, writable: bool = True) -> None:
        super().__init__(host, trace, inode, writable=writable)
        self.entries: dict[int, int] = {}
        """What is mapped, by page: the frame of a block, or the zero page for a hole."""
        self.dirty: set[int] = set()
        """Pages that were written through a mapping."""
        self.entry_lock = KeyedLocks(f"dax entry {{:#x}} of {self.name}", DAX_ENTRY)

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """The block, or the zero page; a write fault of a shared area allocates (dax_iomap_fault)."""
        try:
            if not write:
                return self._dax_fault(pgoff, False)
            with self.sb.pagefaults:
                return self._dax_fault(pgoff, True)
        except MmError as error:
            if error.errno == errno.EDEADLK:
                raise
            return 0, VmFault.OOM if error.errno == errno.ENOMEM else VmFault.SIGBUS

    def _dax_fault(self, pgoff: int, write: bool) -> FaultResult:
        with self.invalidate_lock.read, self.entry_lock(pgoff):
            point("dax.fault.locked")
            if pgoff >= page_up(self.size) >> PAGE_SHIFT:
                return 0, VmFault.SIGBUS
            if write:
                super()._block(pgoff)
            pfn = self.inode.find(pgoff)
            self.entries[pgoff] = ZERO_PFN if pfn is None else pfn
            if self.trace.on:
                self.trace.emit("dax_entry", file=self.name, pgoff=pgoff, pfn=self.entries[pgoff])
            return self.entries[pgoff], VmFault.OK

    def device_pmd(self, pgoff: int) -> int | None:
        """See the base: 512 blocks in one piece, none of whose entries anybody holds, nor the file is cut in."""
        pages = range(pgoff, pgoff + HUGE_PAGES)
        if self.invalidate_lock.writer or pages.stop > self.size >> PAGE_SHIFT:
            return None
        if not all(self.entry_lock.free(page) for page in pages):
            return None
        try:
            first = self.inode.find(pgoff)
            if first is None or first % HUGE_PAGES:
                return None
            if any(self.inode.find(page) != first + n for n, page in enumerate(pages)):
                return None
        except MmError:
            return None
        for n, page in enumerate(pages):
            self.entries[page] = first + n
        return first

    def _block(self, pgoff: int) -> int:
        """See the base; for who does not have the entry's lock."""
        pfn = self.inode.find(pgoff)
        if pfn is not None:
            return pfn
        with self.entry_lock(pgoff):
            return super()._block(pgoff)

    def _filled(self, pgoff: int) -> None:
        """A hole got a block: nobody maps the zero page for it any more."""
        if self.entries.pop(pgoff, None) is not None:
            unmap_mapping_range(self, pgoff, 1, even_cows=False)

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """The page is dirty from now on (dax_finish_sync_fault's pfn_mkwrite). NOPAGE when it is not the block."""
        with self.sb.pagefaults, self.invalidate_lock.read, self.entry_lock(pgoff):
            point("dax.mkwrite.locked")
            try:
                if pgoff >= page_up(self.size) >> PAGE_SHIFT:
                    return VmFault.SIGBUS
                super()._block(pgoff)
                if self.inode.find(pgoff) != pfn:
                    return VmFault.NOPAGE
            except MmError as error:
                if error.errno == errno.EDEADLK:
                    raise
                return VmFault.SIGBUS
            self.entries[pgoff] = pfn
            self.dirty.add(pgoff)
            return VmFault.OK

    def fsync(self, pgoff: int = 0, count: int | None = None) -> int:
        """Writes back what was written through mappings in the range; how many pages. Raises MmError."""
        end = 1 << 52 if count is None else pgoff + count
        done = 0
        for page in sorted(page for page in self.dirty if pgoff <= page < end):
            with self.entry_lock(page):
                if page in self.dirty:
                    page_mkclean(self, page, self.entries[page])
                    self.dirty.discard(page)
                    done += 1
        self.inode.sync()
        return done

    @contextmanager
    def _cutting(self, first: int, end: int) -> Iterator[None]:
        """See the base. Nobody has a page of these pinned either (dax_layout_busy_page): who has may still need faults
        to get on, so the lock is not kept while that is waited for, and what was mapped meanwhile goes again."""
        while True:
            with self.invalidate_lock.write:
                if any(first <= page < end for page in self.entries):
                    unmap_mapping_range(self, first, end - first, even_cows=False)
                if not self._busy(first, end):
                    yield
                    return
            actors.wait(
                f"pinned pages of {self.name}",
                lambda: not self._busy(first, end),
                because="who pins them would have to let go first",
                label="dax.busy",
            )

    def _busy(self, first: int, end: int) -> bool:
        """Whether somebody has a block of the pages ``[first, end)`` pinned."""
        refcount = self.host.refcount
        return any(first <= page < end and pfn != ZERO_PFN and refcount(pfn) for page, pfn in self.entries.items())

    def _free(self, first: int, end: int) -> None:
        for page in [page for page in self.entries if first <= page < end]:
            del self.entries[page]
            self.dirty.discard(page)
        super()._free(first, end)
