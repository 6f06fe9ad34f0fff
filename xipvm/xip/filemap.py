"""A file used in place, as mm/filemap_xip.c had it in July 2008 (commit cddb8a5c14), without its bugs.

A page is a block of the device, mapped as it is, or a hole, which is mapped as the sparse page. There is no page cache:
what is stored through one mapping is what all others, reads included, see at once, and nobody is told.

**What is told, and in which order.** A hole that gets a block::

    block allocated, zeroed, linked → __xip_unmap: for each area, sparse entry cleared and flushed, notifiers told,
    reference put → data copied

so whoever faults in between maps the block. The look-up that decides what a fault maps is made with no schedule point
between it and the entry: of two that race for a page, the later finds what the earlier did. Truncation writes the size
first, then unmaps, then zeroes the rest of the last block, then frees; no fault comes in between (invalidate_lock:
in 2008 there was none, and the size was looked at only once, when a fault began).

Where this differs from what was there in 2008, and by which bug of it each time: docs/xip.md.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from resource import RLIM_INFINITY
from typing import TYPE_CHECKING, Final

from xipvm.actors import hooked, point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, join_runs, page_up
from xipvm.errors import MmError
from xipvm.locks import check
from xipvm.locks.lock import RwLock
from xipvm.locks.order import INODE_LOCK, INVALIDATE_LOCK, XIP_SPARSE
from xipvm.mmu.file import AddressSpace, FaultResult, VmFault
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.pte import ACCESSED, DIRTY, MAPPED, PFN_SHIFT, SOFT_DIRTY, SPECIAL, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import TASK_SIZE
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.notifier import RangeEvent
from xipvm.xip.sparse import need_sparse_page, sparse_page

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace
    from xipvm.xip.buffer import UserBuffer
    from xipvm.xip.inode import XipInode

ALL_PAGES: Final = TASK_SIZE >> PAGE_SHIFT
"""More than any file has."""
_NOPAGE: Final = VmFault.NOPAGE  # attributes of enumerations are slow
_RETRY: Final = VmFault.RETRY


class XipFile(AddressSpace):
    """``inode`` as a file. ``writable``: it may be written, and shared mappings of it may."""

    kind = "xip"
    mixed = True
    devmap = True

    def __init__(self, host: HostMemory, trace: Trace, inode: XipInode, *, writable: bool = True) -> None:
        super().__init__(host, trace, inode.name, writable=writable and not inode.read_only)
        self.inode = inode
        self.label = inode.label
        """What events call it."""
        self.identity = inode.identity
        self.sb = inode.sb
        self.sb.files.append(self)
        self.i_rwsem = RwLock(f"i_rwsem of {self.name}", INODE_LOCK)
        """For writing: who writes to the file, or changes its length (i_mutex)."""
        self.sparse_mutex = RwLock(f"xip_sparse_mutex of {self.name}", XIP_SPARSE)
        """For writing: who allocates a block. Of two for one page, the second finds the first one's."""
        self.invalidate_lock = RwLock(f"invalidate_lock of {self.name}", INVALIDATE_LOCK)
        """For writing: who frees blocks, which a fault must not find meanwhile."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.inode.size

    @property
    def in_use(self) -> bool:
        """Somebody maps it, or has memory of it that has to remain its own."""
        return bool(self.areas)

    def users(self) -> str:
        """Who uses it, for a message."""
        mapped = ", ".join(f"{area.mm.name} maps it at {area.start:#x}" for area in self.areas)
        return mapped or "somebody has a page of it pinned"

    def opened_read_only(self) -> XipFile:
        """The same file, with the same mappings, for who may not write it."""
        view = copy.copy(self)
        view.writable = False
        return view

    # ---- read and write

    def read(self, buffer: UserBuffer, count: int, pos: int) -> int:
        """Up to ``count`` bytes from ``pos`` into ``buffer``; how many. A hole reads as zeros (xip_file_read).

        Raises MmError: EFAULT, EINVAL, and what the file system has, when there is not even one byte.
        """
        self._check("read", pos, count)
        if not buffer.access_ok(count):
            raise MmError(errno.EFAULT, f"read of {count} bytes of {self.name}")
        done, stored, error = self._read_pages(buffer, count, pos)
        if self.trace.on:
            result = -(error.errno or 0) if error is not None and not done else done
            self.trace.emit("xip_read", file=self.label, pos=pos, count=count, result=result, stored=stored)
        if error is not None and not done:
            raise error
        self.inode.accessed()
        return done

    def _read_pages(self, buffer: UserBuffer, count: int, pos: int) -> tuple[int, int, MmError | None]:
        """do_xip_mapping_read: how many bytes count, how many were stored, and why there are no more."""
        size, done, stored = self.size, 0, 0
        while done < min(count, size - pos):
            at = pos + done
            offset = at & (PAGE_SIZE - 1)
            length = self._chunk(count, done, offset, size - at)
            try:
                pfn = self.inode.find(at >> PAGE_SHIFT)
            except MmError as error:
                return done, stored, error
            data = bytes(length) if pfn is None else self.host.read(pfn, offset, length)
            copied = buffer.put(done, data)
            stored = done + copied
            done += self._counted(copied, length)
            point("mm.xip.read")
            if copied < length:
                return done, stored, MmError(errno.EFAULT, f"read of {count} bytes of {self.name}")
        return done, stored, None

    @staticmethod
    def _counted(copied: int, length: int) -> int:
        """How many of the bytes of a chunk that were stored count."""
        return copied

    @staticmethod
    def _chunk(count: int, done: int, offset: int, left: int) -> int:
        """How many bytes to read from ``offset`` of a page, ``done`` of ``count`` being read; ``left`` to the end."""
        return min(PAGE_SIZE - offset, count - done, left)

    def write(
        self, buffer: UserBuffer, count: int, pos: int, *, append: bool = False, limit: int = RLIM_INFINITY
    ) -> tuple[int, int]:
        """``count`` bytes of ``buffer`` to ``pos``, or to the end; (how many, the position behind) (xip_file_write).

        What would lie behind ``limit``, the writer's RLIMIT_FSIZE, is not written; a partial copy counts. Waits while
        the file system is frozen. Raises MmError: EBADF (not writable), EFAULT, EFBIG, EINVAL, EDEADLK, and what the
        file system has, when there is not even one byte.
        """
        self._check("write", pos, count)
        if not self.writable:
            raise MmError(errno.EBADF, f"{self.name} is not writable")
        if not buffer.access_ok(count):
            raise MmError(errno.EFAULT, f"write of {count} bytes to {self.name}")
        with self.sb.writers, self.i_rwsem.write:
            if count == 0:
                return 0, pos
            start = self.size if append else pos
            end = self._largest(limit)
            if start >= end:
                raise MmError(errno.EFBIG, f"write at {start:#x} of {self.name}")
            count = min(count, end - start)
            self.inode.drop_privileges()
            self.inode.modified()
            if start > self.size:
                self._zero_tail()
            if start + count > self.size:
                self.inode.will_end(start + count)
            done, error = self._write_pages(buffer, count, start)
            if start + count > self.size:
                self.inode.set_size(max(start + done, self.size))
            if error is not None:  # blocks behind the end, which nobody can have mapped
                with self.invalidate_lock.write:
                    self._free(page_up(self.size) >> PAGE_SHIFT, ALL_PAGES)
            if error is not None and not done:
                raise error
            return done, start + done

    def _largest(self, limit: int) -> int:
        """How large somebody whose RLIMIT_FSIZE is ``limit`` may make the file (generic_write_check_limits)."""
        most = self.inode.max_bytes
        return most if limit == RLIM_INFINITY else min(limit, most)

    def _write_pages(self, buffer: UserBuffer, count: int, start: int) -> tuple[int, MmError | None]:
        """__xip_file_write: how many bytes, and why not all of them."""
        done = 0
        while done < count:
            at = start + done
            offset = at & (PAGE_SIZE - 1)
            length = min(PAGE_SIZE - offset, count - done)
            try:
                if at % HPAGE_SIZE == 0 and count - done >= HPAGE_SIZE:
                    self._prefer_piece(at >> PAGE_SHIFT)
                pfn = self._block(at >> PAGE_SHIFT)
            except MmError as error:
                return done, error
            point("mm.xip.write")
            data = buffer.take(done, length)
            self.host.write(pfn, offset, data)
            done += len(data)
            if len(data) < length:
                return done, MmError(errno.EFAULT, f"write of {count} bytes to {self.name}")
        return done, None

    def _prefer_piece(self, first: int) -> None:
        """The 2 MiB from page ``first`` on are about to be written: holes may get one piece. Raises MmError EDEADLK."""

    def _block(self, pgoff: int) -> int:
        """The frame of page ``pgoff``, allocated if it is a hole, which nobody maps any more then. Raises MmError."""
        found = self.inode.find(pgoff)
        if found is not None:
            return found
        pfn = self._create(pgoff)
        if self.trace.on:
            self.trace.emit("xip_allocate", file=self.label, pgoff=pgoff, pfn=pfn)
        point("mm.xip.allocated")
        self._filled(pgoff)
        if self.trace.on:
            self.trace.emit("xip_unmapped", file=self.label, pgoff=pgoff)
        return pfn

    def _create(self, pgoff: int) -> int:
        """Allocates the block of a hole, or finds what somebody else has allocated. Raises MmError."""
        with self.sparse_mutex.write:
            return self.inode.get_xip_mem(pgoff, create=True)

    # ---- mapped

    def mmap(self, area: Vma) -> None:
        """See the base: the file counts as read (xip_file_mmap)."""
        self.inode.accessed()
        self.vma_open(area)

    def vma_open(self, area: Vma) -> None:
        """See the base."""
        if self.trace.on:
            if self.identity is not None:
                self.trace.emit("xip_file", file=self.label, name=self.name, **self.identity._asdict())
            self.trace.emit(
                "xip_map", file=self.label, mm=area.mm.name, start=area.start, end=area.end, pgoff=area.pgoff
            )

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """Fills the entry itself, hence never OK (xip_file_fault).

        NOPAGE: it is filled, or was. SIGBUS: behind the end, or the file system has an error or no room. What would
        allocate waits while the file system is frozen. Raises OutOfFrames, and MmError EDEADLK.
        """
        mmap_lock = area.mm.mmap_lock
        if alone() and not (mmap_lock.writer or self.invalidate_lock.writer):
            result = self._fault(area, pgoff, write)
        else:
            with mmap_lock.read, self.invalidate_lock.read:
                result = self._fault(area, pgoff, write)
        return 0, self._thawed() if result is _RETRY else result

    def _fill(self, pgoff: int) -> int | None:
        """Gives a hole its block, for a fault, which has taken its locks. None when the file system is frozen."""
        if not self.sb.pagefaults.attempt():
            return None
        try:
            return XipFile._block(self, pgoff)
        finally:
            self.sb.pagefaults.leave()

    def _thawed(self) -> VmFault:
        """Waits until the file system is not frozen: the fault has to look again."""
        self.sb.pagefaults.wait()
        return _NOPAGE

    def _fault(self, area: Vma, pgoff: int, write: bool) -> VmFault:
        inode = self.inode
        hva = area.address_of(pgoff)
        if hva is None or area.mm.find_vma(hva) is not area:
            return _NOPAGE
        if pgoff << PAGE_SHIFT >= inode.size:
            return self.behind_end(pgoff, inode.size)
        try:
            found: int | None = inode.find(pgoff)
            point("mm.xip.looked_up")
            if found is None and self._allocates(area):
                found = self._fill(pgoff)
                if found is None:
                    return _RETRY
            if alone():
                return self._insert(area, hva, found, write)
            with self.i_mmap.read:
                if not self._still_there(pgoff):
                    return self.behind_end(pgoff, inode.size)
                return self._insert(area, hva, self._look_again(pgoff, found), write)
        except MmError as error:
            if error.errno == errno.EDEADLK:
                raise
            return self._failed(pgoff, error)

    def _still_there(self, pgoff: int) -> bool:
        """Whether the file still has page ``pgoff``, which it had when the fault began."""
        return pgoff << PAGE_SHIFT < self.inode.size

    def _look_again(self, pgoff: int, found: int | None) -> int | None:
        """What is mapped: behind all points, as a hole may have been filled since it was ``found`` to be one."""
        return self.inode.find(pgoff)

    def _failed(self, pgoff: int, error: MmError) -> VmFault:
        """What a fault gives when the file system has an error."""
        return self.sigbus(pgoff, str(error))

    def _allocates(self, area: Vma) -> bool:
        """Whether a fault in ``area`` gives a hole its block, even to read: it may be written and is shared."""
        return area.shared and self.writable and not self.inode.read_only

    def _insert(self, area: Vma, hva: int, pfn: int | None, write: bool) -> VmFault:
        """Fills the entry of ``hva`` with a block or the sparse page; one that is there stays. Passes no point."""
        mm = area.mm
        if mm.pgd.get(hva >> PAGE_SHIFT):  # another thread was faster
            return _NOPAGE
        if pfn is None:
            sparse = need_sparse_page(self.host, self.trace)
            self.host.get(sparse)
            self.host.add_mapcount(sparse, 1)
            mm.set_pte(hva, sparse << PFN_SHIFT | area.rights | ACCESSED)
        else:
            flags = area.page_prot | SPECIAL | ACCESSED
            if write and flags & WRITE:
                flags |= DIRTY | SOFT_DIRTY
            mm.set_pte(hva, pfn << PFN_SHIFT | flags)
        return _NOPAGE

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """A read-only entry of a shared area is to be written: a block may be, the sparse page never."""
        if pgoff >= page_up(self.size) >> PAGE_SHIFT:
            return VmFault.NOPAGE
        if pfn == sparse_page(self.host):
            return self.sigbus(pgoff, f"page {pgoff:#x} of {self.name} is a hole, and mapped as one")
        return VmFault.OK

    def _filled(self, pgoff: int) -> None:
        """A hole got a block: nobody maps the hole any more when this returns."""
        self.unmap_sparse(pgoff)

    def unmap_sparse(self, pgoff: int) -> None:
        """Takes the sparse page out of every mapping of page ``pgoff`` (__xip_unmap)."""
        sparse = sparse_page(self.host)
        if sparse is None:
            return
        with self.i_mmap.read:
            for area in tuple(self.areas):
                hva = area.address_of(pgoff)
                if hva is not None:
                    self._unmap_sparse(area, hva, sparse)

    def _unmap_sparse(self, area: Vma, hva: int, sparse: int) -> None:
        mm = area.mm
        self._settle(area, hva)
        if not _shows(mm, hva, sparse):
            return
        with mm.notifiers.around_entry(hva, hva + PAGE_SIZE, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
            if not _shows(mm, hva, sparse):
                return
            mm.ptep_clear_flush_notify(hva)
            mm.host.add_mapcount(sparse, -1)
        mm.put_frame(sparse)

    def _settle(self, area: Vma, hva: int) -> None:
        """Nobody is in the middle of changing the entry of ``hva``, which would not show what it maps."""
        area.mm.ptl.not_others(hva >> PMD_SHIFT)

    # ---- truncated

    def truncate(self, size: int, *, limit: int = RLIM_INFINITY) -> None:
        """The file has ``size`` bytes; what is cut off goes from every mapping, private copies included.

        Nobody makes it grow beyond his RLIMIT_FSIZE, ``limit``. Waits while the file system is frozen. Raises MmError:
        EINVAL (also: not writable), EFBIG, EDEADLK, and what the file system has.
        """
        self._check("truncate", size, 0)
        if not self.writable:
            raise MmError(errno.EINVAL, f"truncate: {self.name} is not writable")
        first = page_up(size) >> PAGE_SHIFT
        with self.sb.writers, self.i_rwsem.write, self._cutting(first, ALL_PAGES):
            if size > self.size:
                if size > self._largest(limit):
                    raise MmError(errno.EFBIG, f"truncate of {self.name} to {size:#x}")
                self._zero_tail()
            old = self.size
            self.inode.set_size(size)
            self.inode.modified()
            if size < old:
                unmap_mapping_range(self, first, ALL_PAGES)
                point("mm.xip.truncate.unmapped")
                self._zero_tail()
                self._free(first, ALL_PAGES)

    def punch_hole(self, pgoff: int, count: int) -> None:
        """Pages ``[pgoff, pgoff + count)`` are holes from now on; private copies of them stay.

        They may lie behind the end and anybody's RLIMIT_FSIZE, but not where no file can reach. Waits while the file
        system is frozen. Errors as truncate's; EBADF where it is not writable.
        """
        if pgoff < 0 or count <= 0:
            raise MmError(errno.EINVAL, f"{self.name}: a hole of {count} pages at {pgoff:#x}")
        if not self.writable:
            raise MmError(errno.EBADF, f"{self.name} is not writable")
        if pgoff + count << PAGE_SHIFT > self.inode.max_bytes:
            raise MmError(errno.EFBIG, f"{self.name}: a hole of {count} pages at {pgoff:#x}")
        with self.sb.writers, self.i_rwsem.write, self._cutting(pgoff, pgoff + count):
            unmap_mapping_range(self, pgoff, count, even_cows=False)
            self._free(pgoff, pgoff + count)

    @contextmanager
    def _cutting(self, first: int, end: int) -> Iterator[None]:
        """No fault comes while blocks of pages ``[first, end)`` are freed. Raises DeadlockError."""
        with self.invalidate_lock.write:
            yield

    def _free(self, first: int, end: int) -> None:
        """Frees blocks, which nobody maps."""
        freed = self.inode.free_blocks(first, end)
        if freed and self.trace.on:
            self.trace.emit(
                "xip_free", file=self.label, first=first, end=end, pages=join_runs((pfn, 1) for pfn in freed)
            )

    def _zero_tail(self) -> None:
        """The bytes of the last block behind the end of the file are zeros (xip_truncate_page)."""
        used = self.size & (PAGE_SIZE - 1)
        pfn = self.inode.find(self.size >> PAGE_SHIFT) if used else None
        if pfn is not None:
            self.host.write(pfn, used, bytes(PAGE_SIZE - used))

    def fsync(self, pgoff: int = 0, count: int | None = None) -> int:
        """Has the file system write what it keeps elsewhere; no page is dirty, so 0. Raises MmError."""
        self.inode.sync()
        return 0

    def _check(self, call: str, pos: int, count: int) -> None:
        if min(pos, count) < 0:
            raise MmError(errno.EINVAL, f"{call}: {count} bytes at {pos:#x} of {self.name}")


def alone() -> bool:
    """Nobody can come between, nor looks at locks: most faults are like that, and need not take any."""
    return not hooked() and check.checker is None


def _shows(mm: Mm, hva: int, pfn: int) -> bool:
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    return bool(entry & MAPPED) and pte_pfn(entry) == pfn
