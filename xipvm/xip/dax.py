"""A file used in place, as DAX has it today (fs/dax.c, 6.12): an entry a page, which everything serialises on.

The entry of a page says what is mapped for it: nothing yet, the zero page (it is a hole), or its block; and whether the
block was written through a mapping since the last write-back. Who faults, writes back or makes a hole holds its lock.

======================  ==========================================================================================
read fault on a hole    the zero page; nothing is allocated, also where the mapping is shared and may be written
write fault on a hole   block allocated → the zero page unmapped everywhere → entry is the block → mapped writable
write fault on a block  the entry is dirty from now on
private write fault     copied at once; of a hole, zeros
write(2) over a hole    block allocated → the page unmapped everywhere → data copied
write-back              for each area: range start, entry read-only and clean, range end; then the entry is clean
truncation, a hole      unmapped everywhere → nobody has a page pinned → size → unmapped → blocks freed
======================  ==========================================================================================

Where 2 MiB are one piece of the device, or one hole, they are one entry, with one lock, that of its first page, and
dirty or clean as a whole:

======================  ==========================================================================================
fault                   one huge entry, of the huge zero page for a hole; where the area, or the file, has room for it
write fault on a block  the huge entry becomes writable where it is
write fault on a hole   as a small one, if the file system has one piece; if not, small entries
a small fault           of a block: its page of the entry; of a hole: unmapped everywhere, small entries from then on
write(2) over a hole    block allocated → all of the 2 MiB unmapped everywhere → data copied
write(2) over all of it one piece allocated, if the file system has one → the same
write-back              of all 512 pages
truncation in it        small entries of what is left
small entries are there small entries; nobody makes one of them (grab_mapping_entry)
======================  ==========================================================================================

Faults hold invalidate_lock for reading, truncation for writing; those that allocate, or make an entry writable, wait
while the file system is frozen. The decision what a fault maps is made with no schedule point between it and the
entry, or under the entry's lock.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, Pfn, page_up
from xipvm.errors import MmError
from xipvm.locks.lock import Keyed, KeyedLocks
from xipvm.locks.order import DAX_ENTRY
from xipvm.mmu.file import FaultResult, VmFault
from xipvm.mmu.frames import HUGE_PAGES, ZERO_PFN
from xipvm.mmu.mkclean import pfn_mkclean_range
from xipvm.mmu.thp import thp_of
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.xip.filemap import ALL_PAGES, XipFile, alone
from xipvm.xip.inode import HOLE

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace
    from xipvm.xip.inode import XipInode


_OK: Final = VmFault.OK  # attributes of enumerations are slow
_RETRY: Final = VmFault.RETRY


class DaxFile(XipFile):
    """``inode`` as a file. Reads, writes and their corner values are those of the base."""

    kind = "dax"
    tracks_writes = True

    def __init__(self, host: HostMemory, trace: Trace, inode: XipInode, *, writable: bool = True) -> None:
        super().__init__(host, trace, inode, writable=writable)
        self.entries: dict[int, int] = {}
        """What is mapped, by page: the frame of a block, or the zero page for a hole."""
        self.huge: set[int] = set()
        """The first pages of 2 MiB that have one entry. The entry is empty until those pages are in ``entries``."""
        self.dirty: set[int] = set()
        """Pages that were written through a mapping; all of a huge entry, or none."""
        self.entry_lock = KeyedLocks(f"dax entry {{:#x}} of {self.name}", DAX_ENTRY)

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """The block, or the zero page; a write fault of a shared area allocates (dax_iomap_fault)."""
        try:
            found = self._dax_fault(pgoff, write)
        except MmError as error:
            if error.errno == errno.EDEADLK:
                raise
            return 0, VmFault.OOM if error.errno == errno.ENOMEM else self._failed(pgoff, error)
        return (0, self._thawed()) if found[1] is _RETRY else found

    def _dax_fault(self, pgoff: int, write: bool) -> FaultResult:
        huge_hole = bool(self.huge) and self._huge_hole(pgoff & -HUGE_PAGES)
        if alone() and not (huge_hole or self.entry_lock.held or self.invalidate_lock.writer):
            return self._fault_locked(pgoff, write)
        with self.invalidate_lock.read, self._grab(pgoff):
            return self._fault_locked(pgoff, write)

    def _fault_locked(self, pgoff: int, write: bool) -> FaultResult:
        point("dax.fault.locked")
        inode = self.inode
        if pgoff << PAGE_SHIFT >= inode.size:
            return 0, self.behind_end(pgoff, inode.size)
        pfn: int | None = inode.find(pgoff)
        if pfn is None and write:
            pfn = self._fill(pgoff)
            if pfn is None:
                return 0, _RETRY
        self.entries[pgoff] = found = ZERO_PFN if pfn is None else pfn
        if self.trace.on:
            self.trace.emit("dax_entry", file=self.label, pgoff=pgoff, pfn=found)
        return found, _OK

    def _block(self, pgoff: int) -> int:
        """See the base; for who does not have the entry's lock."""
        pfn = self.inode.find(pgoff)
        if pfn is not None:
            return pfn
        with self._locked(pgoff):
            return super()._block(pgoff)

    def _filled(self, pgoff: int) -> None:
        """A hole got a block: nobody maps the zero page for it any more."""
        if pgoff & -HUGE_PAGES in self.huge:
            self._forget_huge_hole(pgoff & -HUGE_PAGES)
        elif self.entries.pop(pgoff, None) is not None:
            unmap_mapping_range(self, pgoff, 1, even_cows=False)

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """The page is dirty from now on (dax_finish_sync_fault's pfn_mkwrite). NOPAGE when it is not the block."""
        with self.sb.pagefaults, self.invalidate_lock.read, self._grab(pgoff):
            point("dax.mkwrite.locked")
            try:
                if pgoff >= page_up(self.size) >> PAGE_SHIFT:
                    return self.behind_end(pgoff, self.size)
                if super()._block(pgoff) != pfn:
                    return VmFault.NOPAGE
            except MmError as error:
                if error.errno == errno.EDEADLK:
                    raise
                return self._failed(pgoff, error)
            self.entries[pgoff] = pfn
            if pgoff not in self.dirty:
                self.dirty.update(self._with(pgoff))
            return VmFault.OK

    def fsync(self, pgoff: int = 0, count: int | None = None) -> int:
        """Writes back what was written through mappings in the range; how many pages. Raises MmError.

        Of a huge entry all pages are, whichever are in the range (dax_writeback_one).
        """
        end = ALL_PAGES if count is None else pgoff + count
        done = 0
        for page in sorted(page for page in self.dirty if pgoff <= page < end):
            if page not in self.dirty:
                continue
            with self._locked(page):
                if page in self.dirty:
                    pages = self._with(page)
                    pfn_mkclean_range(self, pages.start, self.entries[pages.start], len(pages))
                    self.dirty.difference_update(pages)
                    done += len(pages)
        self.inode.sync()
        return done

    # ---- entries and their locks

    def _with(self, pgoff: int) -> range:
        """The pages whose entry is that of page ``pgoff``."""
        first = pgoff & -HUGE_PAGES
        return range(first, first + HUGE_PAGES) if first in self.huge else range(pgoff, pgoff + 1)

    def _locked(self, pgoff: int) -> Keyed:
        """The lock of the entry of page ``pgoff``, which nobody has now. That of a huge one is its first page's."""
        huge, locks, first = self.huge, self.entry_lock, pgoff & -HUGE_PAGES
        number = first if first in huge else pgoff
        while locks.held:
            locks.not_others(number)
            before, number = number, first if first in huge else pgoff
            if before == number:
                break
        return locks(number)

    def _grab(self, pgoff: int) -> Keyed:
        """As :meth:`_locked`, for a fault on this page alone: a huge hole goes before (grab_mapping_entry)."""
        if not self.huge and not self.entry_lock.held:
            return self.entry_lock(pgoff)
        lock, first = self._locked(pgoff), pgoff & -HUGE_PAGES
        while self._huge_hole(first):
            with lock:
                self._forget_huge_hole(first)
            lock = self._locked(pgoff)
        return lock

    def _huge_hole(self, first: int) -> bool:
        return first in self.huge and self.entries.get(first) == ZERO_PFN

    def _forget_huge_hole(self, first: int) -> None:
        """The 2 MiB are no hole any more, or not to be mapped as one: all of them go from all mappings. Locked."""
        unmap_mapping_range(self, first, HUGE_PAGES, even_cows=False)
        self._drop(range(first, first + HUGE_PAGES))
        self.huge.discard(first)

    def _drop(self, pages: Collection[int]) -> None:
        """``pages`` have no entries any more."""
        for page in pages:
            self.entries.pop(page, None)
        self.dirty.difference_update(pages)

    # ---- 2 MiB at once

    @contextmanager
    def huge_fault(self, mm: Mm, pgoff: int, write: bool) -> Iterator[int | None]:
        """See the base (dax_iomap_pmd_fault). Small entries take precedence: where there is one, it stays so."""
        with self.sb.pagefaults if write else nullcontext(), self.invalidate_lock.read:
            lock = None if pgoff + HUGE_PAGES > page_up(self.size) >> PAGE_SHIFT else self._grab_huge(pgoff)
            if lock is None:
                yield None
                return
            with lock:
                point("dax.huge_fault.locked")
                try:
                    yield self._dax_huge_fault(mm, pgoff, write)
                finally:
                    if pgoff not in self.entries:
                        self.huge.discard(pgoff)

    def _grab_huge(self, first: int) -> Keyed | None:
        """The lock of one entry for the 2 MiB from page ``first`` on, which is there from now on, if only empty.

        None where a page of them has an entry of its own, or somebody is about to give it one.
        """
        if first not in self.huge:
            pages = range(first, first + HUGE_PAGES)
            if not self.entries.keys().isdisjoint(pages) or not self.entry_lock.free_range(first, pages.stop):
                return None
            self.huge.add(first)
            return self.entry_lock(first)
        lock = self._locked(first)
        return lock if first in self.huge else self._grab_huge(first)

    def _dax_huge_fault(self, mm: Mm, first: int, write: bool) -> int | None:
        """What the 2 MiB are to be mapped as, if by one entry, which says so then. Raises MmError EDEADLK."""
        try:
            found = self.inode.find_huge(first)
            if found == HOLE and write:
                found = self._fill_huge(first)
        except MmError as error:
            if error.errno == errno.EDEADLK:
                raise
            return None
        if found is None:
            return None
        pfn = thp_of(self.host).get_zero(mm) if found == HOLE else found
        if pfn is None:
            return None
        pages = range(first, first + HUGE_PAGES)
        blocks = range(pfn, pfn + HUGE_PAGES)
        self.entries.update(dict.fromkeys(pages, ZERO_PFN) if found == HOLE else zip(pages, blocks, strict=True))
        if write:
            self.dirty.update(pages)
        if self.trace.on:
            self.trace.emit(
                "dax_entry_huge", file=self.label, pgoff=first, count=HUGE_PAGES, pfn=pfn, hole=found == HOLE
            )
        return pfn

    def _prefer_piece(self, first: int) -> None:
        """See the base. What cannot be had, and what has small entries, is left to single pages."""
        lock = self._grab_huge(first)
        if lock is None:
            return
        with lock:
            try:
                if self.inode.find_huge(first) == HOLE and self._fill_huge(first) is not None:
                    self._drop(range(first, first + HUGE_PAGES))
            except MmError as error:
                if error.errno == errno.EDEADLK:
                    raise
            finally:
                if first not in self.entries:
                    self.huge.discard(first)

    def _fill_huge(self, first: int) -> Pfn | None:
        """Gives the 2 MiB from page ``first`` on, a hole, one piece of the device, if there is one. Raises MmError."""
        with self.sparse_mutex.write:
            pfn = self.inode.create_huge(first)
        if pfn is None:
            return None
        if self.trace.on:
            self.trace.emit("xip_allocate_huge", file=self.label, pgoff=first, count=HUGE_PAGES, pfn=pfn)
        point("mm.xip.allocated")
        if first in self.entries:
            unmap_mapping_range(self, first, HUGE_PAGES, even_cows=False)
        if self.trace.on:
            self.trace.emit("xip_unmapped_huge", file=self.label, pgoff=first, count=HUGE_PAGES)
        return pfn

    # ---- truncated

    @property
    def in_use(self) -> bool:
        """See the base: a page that is pinned counts."""
        return super().in_use or self._busy(0, ALL_PAGES)

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
        for huge in [huge for huge in self.huge if huge < end and first < huge + HUGE_PAGES]:
            with self._locked(huge):
                if self._huge_hole(huge):
                    self._drop(range(huge, huge + HUGE_PAGES))
                self.huge.discard(huge)  # what is left of blocks has entries of its own
        self._drop([page for page in self.entries if first <= page < end])
        super()._free(first, end)
