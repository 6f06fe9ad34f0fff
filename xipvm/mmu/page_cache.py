"""Files whose pages are frames of the arena: the page cache, and memory files, which have nothing else.

``pages`` holds one reference to each cached frame; every mapping holds another. A page leaves the cache only unmapped:
truncation, hole punching and reclaim take the entries away first (with notification), then the pages.

When a page of a disk file is reclaimed, what it leaves is a shadow (workingset.py); of a memory file, its swap slot.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, page_up
from xipvm.errors import InternalError, MmError, os_reason
from xipvm.locks.lock import RwLock
from xipvm.locks.order import INODE_LOCK, INVALIDATE_LOCK
from xipvm.mmu.file import AddressSpace, FaultResult, VmFault
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY, PG_SWAPBACKED
from xipvm.mmu.gup import pieces
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.reclaim import retry
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.vma import TASK_SIZE
from xipvm.mmu.zap import unmap_mapping_range

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

_ALL_PAGES = TASK_SIZE >> PAGE_SHIFT
_EVICT_TRIES = 1000
"""How often a page that leaves the cache is unmapped: more faults do not come in between."""


class PageCache(AddressSpace):
    """A file of ``size`` bytes. :meth:`close` it; its pages go when the last mapping is gone, too."""

    def __init__(self, host: HostMemory, trace: Trace, name: str, size: int, *, writable: bool = True) -> None:
        super().__init__(host, trace, name, writable=writable)
        self.size = size
        self.pages: dict[int, int] = {}
        """Cached frames by page offset."""
        self.shadows: dict[int, int] = {}
        """When pages that are not cached were reclaimed."""
        self.rmap = reverse_map(host)
        self.i_rwsem = RwLock(f"i_rwsem of {name}", INODE_LOCK)
        """For writing: who writes to the file, or changes its length or its holes."""
        self.invalidate_lock = RwLock(f"invalidate_lock of {name}", INVALIDATE_LOCK)
        """Between reading a page in and taking pages out. Memory files, which read nothing, do without."""
        self.closed = False

    def close(self) -> None:
        """Nobody will use the object as a file any more. Idempotent."""
        self.closed = True
        self.unmapped()

    def unmapped(self) -> None:
        """The last area is gone."""
        if self.closed and not self.areas:
            self._evict(0, _ALL_PAGES)

    # ---- for the fault handler

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """The cached page, read in if it is not. Raises OutOfFrames."""
        if pgoff >= page_up(self.size) >> PAGE_SHIFT:
            return 0, self.behind_end(pgoff, self.size)
        try:
            pfn = self._grab(pgoff)
        except OSError as error:
            return 0, self.sigbus(pgoff, f"{self.name}: {os_reason(error)}")
        if pfn is None:
            return 0, self.behind_end(pgoff, self.size)
        if not self.rmap.page_lock.free(pfn) and self.rmap.page_lock.wait(pfn):
            return 0, VmFault.NOPAGE
        self.host.get(pfn)
        return pfn, VmFault.OK

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """NOPAGE when the file has lost the page meanwhile."""
        return VmFault.OK if self.pages.get(pgoff) == pfn else VmFault.NOPAGE

    def cached(self, pgoff: int) -> int | None:
        """The cached frame that a fault nearby may map along; None for one that is locked."""
        pfn = self.pages.get(pgoff) if pgoff < page_up(self.size) >> PAGE_SHIFT else None
        return pfn if pfn is None or self.rmap.page_lock.free(pfn) else None

    # ---- the cache

    def _grab(self, pgoff: int) -> int | None:
        """The frame of ``pgoff``, None when the file ends before it by now. Raises OutOfFrames and OSError."""
        while True:
            pfn = self.pages.get(pgoff)
            if pfn is not None:
                return pfn
            pfn = self.host.alloc()
            if self.trace.on:
                self.trace.emit("page_alloc", pfn=pfn)
            try:
                self._read_page(pgoff, pfn)
            except BaseException:
                self._put(pfn)
                raise
            if pgoff >= page_up(self.size) >> PAGE_SHIFT:
                self._put(pfn)
                return None
            if pgoff in self.pages:
                self._put(pfn)
                continue
            self.host.set_rmap(pfn, self.id, pgoff)
            self.pages[pgoff] = pfn
            shadow = self.shadows.pop(pgoff, None)
            if shadow is not None and self.rmap.reclaim is not None:
                self.rmap.reclaim.workingset.refault(pfn, shadow, swap=self.rmap.swap is not None)
            return pfn

    def _need(self, pgoff: int) -> int | None:
        """As :meth:`_grab`, for who is no fault; makes room if it has to."""
        return retry(self.host, lambda: self._grab(pgoff))

    def _read_page(self, pgoff: int, pfn: int) -> None:
        """Fills a new zeroed frame with what the file has at ``pgoff``. May sleep."""

    def _evict(self, first: int, end: int) -> None:
        """Takes the pages ``[first, end)``, which nobody maps, out of the cache, and of swap."""
        first, end = self._without_held(first, end)
        for pgoff in sorted(pgoff for pgoff in self.swapped if first <= pgoff < end):
            assert self.rmap.swap is not None
            self.rmap.swap.free((self.swapped.pop(pgoff),))
        for pgoff in [pgoff for pgoff in self.shadows if first <= pgoff < end]:
            del self.shadows[pgoff]
        for pgoff in sorted(pgoff for pgoff in self.pages if first <= pgoff < end):
            tries = 0
            while (pfn := self.pages.get(pgoff)) is not None:
                with self.rmap.page_lock(pfn):
                    if self.host.mapcount(pfn):  # by a fault that came since its entries were taken away
                        unmap_mapping_range(self, pgoff, 1, even_cows=False)
                        tries += 1
                        if tries > _EVICT_TRIES:
                            raise InternalError(f"{self.name}: page {pgoff:#x} is mapped where nobody finds it")
                    elif self.pages.get(pgoff) == pfn:
                        self._drop(pgoff)

    def _drop(self, pgoff: int) -> None:
        """Takes a page out of the cache, a compound one as a whole."""
        host, pfn = self.host, self.pages[pgoff]
        head, count = host.compound_head(pfn), HUGE_PAGES if host.is_compound(pfn) else 1
        for i in range(count):
            del self.pages[pgoff - (pfn - head) + i]
        host.set_rmap(head, 0, 0)
        for i in range(count):
            self._put(head + i)

    def _without_held(self, first: int, end: int) -> tuple[int, int]:
        """``[first, end)`` without parts of compound pages that reach beyond and cannot be split: those get zeros."""
        held = self._unsplit(first)
        if held:
            self._zero(first, min(held[1], end))
            first = min(held[1], end)
        held = self._unsplit(end)
        if held:
            self._zero(max(held[0], first), end)
            end = max(held[0], first)
        return first, end

    def _unsplit(self, edge: int) -> tuple[int, int] | None:
        """Splits the compound page that ``edge`` lies inside of; where it begins and ends if that cannot be."""
        host, pfn = self.host, self.pages.get(edge)
        if pfn is None or host.compound_head(pfn) == pfn or split_if_compound(host, pfn):
            return None
        start = edge - (pfn - host.compound_head(pfn))
        return start, start + HUGE_PAGES

    def _zero(self, first: int, end: int) -> None:
        for pgoff in range(first, end):
            self.host.write(self.pages[pgoff], 0, bytes(PAGE_SIZE))

    def _put(self, pfn: int) -> None:
        freed = self.host.put_page(pfn)
        if freed and self.trace.on:
            self.trace.emit("page_free", pages=freed)

    # ---- as a file

    def _check(self, call: str, offset: int, size: int, *, write: int = 0) -> None:
        """The arguments of a call of whoever has the file open. ``write``: the error for a file that is read-only."""
        if self.closed:
            raise MmError(errno.EBADF, f"{call}: {self.name} is closed")
        if min(offset, size) < 0:
            raise MmError(errno.EINVAL, f"{call}: {size} bytes at {offset:#x} of {self.name}")
        if write and not self.writable:
            raise MmError(write, f"{call}: {self.name} is not writable")

    def pread(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, fewer at the end of the file. Errors: EBADF (closed), EINVAL."""
        self._check("pread", offset, size)
        parts = []
        for at, in_page, length in pieces(offset, max(min(size, self.size - offset), 0)):
            pfn = self._need(at >> PAGE_SHIFT)
            if pfn is None:
                break
            parts.append(self.host.read(pfn, in_page, length))
        return b"".join(parts)

    def pwrite(self, offset: int, data: bytes) -> None:
        """Writes ``data`` at ``offset``, growing the file. Mappings see it at once; nobody is told.

        Errors: EBADF (closed, or not writable), EINVAL.
        """
        self._check("pwrite", offset, len(data), write=errno.EBADF)
        with self.i_rwsem.write:
            self.size = max(self.size, offset + len(data))
            for at, in_page, length in pieces(offset, len(data)):
                pfn = self._need(at >> PAGE_SHIFT)
                if pfn is None:
                    return
                self.host.write(pfn, in_page, data[at - offset : at - offset + length])
                self.host.set_flags(pfn, PG_DIRTY)

    def truncate(self, size: int) -> None:
        """Makes the file ``size`` bytes long. What is cut off goes from every mapping, private copies included.

        Unmapped twice: a fault between the first time and the emptying of the cache may have mapped a page again.
        Errors: EBADF (closed), EINVAL (also: not writable), of a host file its own. Nothing has changed then.
        """
        self._check("truncate", size, 0, write=errno.EINVAL)
        with self.i_rwsem.write, self.invalidate_lock.write:
            self._resize(size)
            old, self.size = self.size, size
            if size >= old:
                return
            first = page_up(size) >> PAGE_SHIFT
            unmap_mapping_range(self, first, _ALL_PAGES)
            point("mm.truncate.unmapped")
            self._zero_tail()
            self._evict(first, _ALL_PAGES)
            unmap_mapping_range(self, first, _ALL_PAGES)

    def _resize(self, size: int) -> None:
        """What is behind the cache gets its new size, before anything else changes. Passes no point; raises MmError."""

    def _zero_tail(self) -> None:
        """Bytes of the last page behind the end of the file read as zero when it grows again."""
        pgoff = self.size >> PAGE_SHIFT
        pfn = self._need(pgoff) if pgoff in self.swapped else self.pages.get(pgoff)
        used = self.size & (PAGE_SIZE - 1)
        if pfn is not None and used:
            self.host.write(pfn, used, bytes(PAGE_SIZE - used))
            self.host.set_flags(pfn, PG_DIRTY)

    def punch_hole(self, pgoff: int, count: int) -> None:
        """Makes ``count`` pages from ``pgoff`` read as zero; private copies of them keep their content.

        Errors: EBADF (not writable), EINVAL.
        """
        if pgoff < 0 or count <= 0:
            raise MmError(errno.EINVAL, f"{self.name}: a hole of {count} pages at {pgoff:#x}")
        if not self.writable:
            raise MmError(errno.EBADF, f"{self.name} is not writable")
        with self.i_rwsem.write, self.invalidate_lock.write:
            unmap_mapping_range(self, pgoff, count, even_cows=False)
            self._evict(pgoff, pgoff + count)


class ShmemFile(PageCache):
    """A memory file (memfd, shared anonymous memory): a page that was never written is zero."""

    kind = "shmem"

    def has_page(self, pgoff: int) -> bool | None:
        """See :meth:`AddressSpace.has_page`."""
        if pgoff >= page_up(self.size) >> PAGE_SHIFT:
            return None
        return pgoff in self.pages or pgoff in self.swapped

    def add_page(self, pgoff: int, pfn: int) -> None:
        """Caches a frame for a page that the file does not have; takes over a reference."""
        self.host.set_flags(pfn, PG_SWAPBACKED | PG_DIRTY)
        self.host.set_rmap(pfn, self.id, pgoff)
        self.pages[pgoff] = pfn

    def _read_page(self, pgoff: int, pfn: int) -> None:
        self.host.set_flags(pfn, PG_SWAPBACKED)
        slot = self.swapped.get(pgoff)
        if slot is not None:
            assert self.rmap.swap is not None
            self.rmap.swap.read(pfn, slot)
            del self.swapped[pgoff]
            shadow = self.rmap.swap.shadows.get(slot)
            if shadow is not None:
                self.shadows[pgoff] = shadow  # for the one who caches the page, in a moment
            self.rmap.swap.free((slot,))

    def bring_back(self, pgoff: int) -> None:
        """See :meth:`AddressSpace.bring_back`."""
        if pgoff in self.swapped:
            self._grab(pgoff)

    def can_reclaim(self) -> bool:
        """There is a free slot."""
        return self.rmap.swap is not None and self.rmap.swap.has_room

    def reclaim(self, pgoff: int, pfn: int) -> bool:
        """Moves the page to a slot."""
        swap = self.rmap.swap
        slot = swap.alloc() if swap is not None and self.pages.get(pgoff) == pfn else None
        if swap is None or slot is None:
            return False
        swap.duplicate(slot)  # ours
        try:
            swap.write(pfn, slot)
        except OSError:
            swap.free((slot,))
            raise
        if self.rmap.reclaim is not None:
            swap.shadows[slot] = self.rmap.reclaim.workingset.evicted(pfn)
        self.swapped[pgoff] = slot
        self._drop(pgoff)
        return True
