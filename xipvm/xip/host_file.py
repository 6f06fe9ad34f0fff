"""An XIP file system with one file: a plain file of the host, whose holes are the host's.

Page ``n`` of the file is page ``n`` of the device. A hole is what SEEK_HOLE says is one; a block is allocated by
fallocate, so that a full disk is ENOSPC there and then, and not a signal at the first store. The map of blocks is read
once, when the file is opened, and kept up to date: nobody else may change the file meanwhile (it is locked).

The host's kernel takes what is stored behind the end of the file for nothing, and zeroes it when the file grows. So the
host's file grows before the bytes are stored, and the size that is shown afterwards.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Pfn, page_up
from xipvm.errors import MmError, XipImageError
from xipvm.host_mapping import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, allocate
from xipvm.image_file import close_image, open_image
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.xip.inode import HOLE, XipInode
from xipvm.xip.memory import XipMemory
from xipvm.xip.super_block import SuperBlock

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory

RESERVE = 1 << 30
"""How much a file can grow beyond what it has when it is opened, bytes."""


class HostInode(XipInode):
    """The file at ``path``. ``snapshot``: what is written is gone with the run. :meth:`close` it.

    Raises XipImageError when it cannot be opened or locked.
    """

    def __init__(self, host: HostMemory, path: str, *, read_only: bool = False, snapshot: bool = False) -> None:
        self.name = os.path.basename(path)
        self.sb = SuperBlock(path, freeze_fs=self.sync)
        self.path = path
        self.read_only = read_only
        self._private = read_only or snapshot
        self._fd = open_image(path, XipImageError, writable=not self._private, shared=self._private)
        try:
            self._size = os.fstat(self._fd).st_size
            self._blocks = _data_pages(self._fd, self.size)
            self._promised = 0
            self._beyond: set[int] = set()  # blocks behind the end, until they are freed or the file grows
            self.memory = XipMemory(host, self._fd, self.size, reserve=self.size + RESERVE, private=self._private)
        except BaseException:
            close_image(self._fd)
            raise
        self.max_bytes = self.memory.reserve
        self._host = host

    @property
    def label(self) -> str:
        """See the base."""
        return self.path

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def close(self) -> None:
        """Let go of the file, which nobody maps any more."""
        self.memory.close()
        close_image(self._fd)

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """See the base."""
        if pgoff not in self._blocks:
            if not create:
                raise MmError(errno.ENODATA, f"page {pgoff:#x} of {self.name}")
            self._allocate(pgoff)
        return self.memory.pfn(pgoff)

    def find(self, pgoff: int) -> Pfn | None:
        """See the base."""
        return Pfn(self.memory.first + pgoff) if pgoff in self._blocks else None

    def find_huge(self, pgoff: int) -> Pfn | None:
        """See the base."""
        pages = range(pgoff, pgoff + HUGE_PAGES)
        if self._blocks.isdisjoint(pages):
            return HOLE
        first = self.memory.pfn(pgoff)
        return first if self._blocks.issuperset(pages) and first % HUGE_PAGES == 0 else None

    def create_huge(self, pgoff: int) -> Pfn | None:
        """See the base: there always is one."""
        first = self.memory.pfn(pgoff)
        if first % HUGE_PAGES:
            return None
        self._allocate(pgoff, HUGE_PAGES)
        return first

    def _allocate(self, pgoff: int, count: int = 1) -> None:
        what = f"a block for page {pgoff:#x} of {self.name}"
        if self.read_only:
            raise MmError(errno.EROFS, what)
        start = pgoff << PAGE_SHIFT
        if start >= self.max_bytes:
            raise MmError(errno.EFBIG, what)
        point("xip.allocate")
        missing = [page for page in range(pgoff, pgoff + count) if page not in self._blocks]
        if not missing:
            return
        beyond = [page for page in missing if page >= page_up(self.size) >> PAGE_SHIFT]
        try:
            if not self._private:
                allocate(self._fd, FALLOC_FL_KEEP_SIZE, start, count << PAGE_SHIFT)
            self._beyond.update(beyond)
            self._fit()
        except OSError as error:
            self._beyond.difference_update(beyond)
            raise MmError(error.errno or errno.EIO, what) from None
        for page in missing:
            self._host.write(self.memory.pfn(page), 0, bytes(PAGE_SIZE))
        self._blocks.update(missing)

    def will_end(self, size: int) -> None:
        """See the base."""
        before, self._promised = self._promised, size
        try:
            self._fit()
        except OSError as error:
            self._promised = before
            raise MmError(error.errno or errno.EIO, f"{self.name} with {size} bytes") from None

    def set_size(self, size: int) -> None:
        """See the base."""
        if self.read_only:
            raise MmError(errno.EROFS, f"truncate of {self.name}")
        if size > self.max_bytes:
            raise MmError(errno.EFBIG, f"truncate of {self.name}")
        end = page_up(size) >> PAGE_SHIFT
        before = self.size, self._beyond
        self._beyond = {page for page in (self._blocks if size < self.size else self._beyond) if page >= end}
        self._size, self._promised = size, 0
        try:
            self._fit()
        except OSError as error:
            self._size, self._beyond = before
            raise MmError(error.errno or errno.EIO, f"truncate of {self.name}") from None

    def _fit(self) -> None:
        """The host's file has its size, or what the last block behind that needs; all of it is mapped. OSError."""
        length = (max(self._beyond) + 1) << PAGE_SHIFT if self._beyond else max(self.size, self._promised)
        if self._private:
            return
        if page_up(length) < self.memory.size:
            self.memory.resize(length)  # never is a page mapped that the file does not have
        os.ftruncate(self._fd, length)
        self.memory.resize(length)

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """See the base."""
        gone = sorted(page for page in self._blocks if first <= page < end)
        try:
            for page in gone:
                self._host.write(self.memory.pfn(page), 0, bytes(PAGE_SIZE))
                if not self._private:
                    self._punch(page)
                self._blocks.discard(page)
            self._beyond.difference_update(gone)
            self._fit()
        except OSError as error:
            raise MmError(error.errno or errno.EIO, f"a hole in {self.name}") from None
        return [self.memory.pfn(page) for page in gone]

    def _punch(self, page: int) -> None:
        try:
            allocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page << PAGE_SHIFT, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # there it stays, and is zeros
                raise

    def sync(self) -> None:
        """See the base."""
        try:
            self.memory.sync()
            if not self._private:
                os.fsync(self._fd)
        except OSError as error:
            raise MmError(error.errno or errno.EIO, f"fsync of {self.name}") from None


def _data_pages(fd: int, size: int) -> set[int]:
    """The pages of an open file that are not holes."""
    pages: set[int] = set()
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        pages.update(range(start >> PAGE_SHIFT, page_up(at) >> PAGE_SHIFT))
    return pages
