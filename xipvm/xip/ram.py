"""A file system in memory, for scenarios and tests: a few blocks, files without names, nothing kept.

Freed blocks are given out again, the last one first, so that a translation that should have gone shows another file's
data.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import PAGE_SIZE, Pfn
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.xip.inode import XipInode
from xipvm.xip.memory import XipMemory
from xipvm.xip.super_block import SuperBlock

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory


class RamVolume:
    """``blocks`` blocks of memory. :meth:`close` it when nothing maps its files any more."""

    def __init__(self, host: HostMemory, blocks: int) -> None:
        self.host = host
        self.sb = SuperBlock("the file system in memory")
        self.read_only = False
        self._fd = os.memfd_create("xipvm-xip", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, blocks * PAGE_SIZE)
        self.memory = XipMemory(host, self._fd, blocks * PAGE_SIZE)
        self.free = list(range(blocks))[::-1]
        self._files = 0

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()
        os.close(self._fd)

    def file(self, size: int = 0) -> RamInode:
        """A new file of ``size`` bytes, all holes."""
        self._files += 1
        return RamInode(self, f"file{self._files}", size)

    def take_huge(self) -> int | None:
        """The first of 512 blocks that were free, and are one aligned piece; None if there are none."""
        free, first = set(self.free), -self.memory.first % HUGE_PAGES
        for block in range(first, self.memory.pages - HUGE_PAGES + 1, HUGE_PAGES):
            blocks = range(block, block + HUGE_PAGES)
            if free.issuperset(blocks):
                self.free = [block for block in self.free if block not in blocks]
                return block
        return None


class RamInode(XipInode):
    """A file of a :class:`RamVolume`."""

    def __init__(self, volume: RamVolume, name: str, size: int) -> None:
        self.volume = volume
        self.sb = volume.sb
        self.name = name
        self._size = size
        self.blocks: dict[int, int] = {}
        self.failing = False
        """Every look-up is an I/O error from now on."""

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """See the base."""
        return self.volume.read_only

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """See the base."""
        if self.failing:
            raise MmError(errno.EIO, f"page {pgoff:#x} of {self.name}")
        if pgoff not in self.blocks:
            if not create:
                raise MmError(errno.ENODATA, f"page {pgoff:#x} of {self.name}")
            if self.read_only:
                raise MmError(errno.EROFS, self.name)
            point("xip.allocate")
            if not self._found_meanwhile(pgoff):
                if not self.volume.free:
                    raise MmError(errno.ENOSPC, self.name)
                block = self.volume.free.pop()
                self.volume.host.write(self.volume.memory.pfn(block), 0, bytes(PAGE_SIZE))
                self.blocks[pgoff] = block
        return self.volume.memory.pfn(self.blocks[pgoff])

    def create_huge(self, pgoff: int) -> Pfn | None:
        """See the base."""
        if self.read_only:
            raise MmError(errno.EROFS, self.name)
        point("xip.allocate")
        volume = self.volume
        first = volume.take_huge()
        if first is None:
            return None
        for n in range(HUGE_PAGES):
            volume.host.write(volume.memory.pfn(first + n), 0, bytes(PAGE_SIZE))
            self.blocks[pgoff + n] = first + n
        return volume.memory.pfn(first)

    def _found_meanwhile(self, pgoff: int) -> bool:
        """Somebody else has allocated the block since it was looked up."""
        return pgoff in self.blocks

    def set_size(self, size: int) -> None:
        """See the base."""
        if self.read_only:
            raise MmError(errno.EROFS, self.name)
        self._size = size

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """See the base."""
        freed = [self.blocks.pop(page) for page in list(self.blocks) if first <= page < end]
        self.volume.free += freed
        return [self.volume.memory.pfn(block) for block in freed]
