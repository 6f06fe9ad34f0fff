"""An ext2 image as a :class:`~xipvm.xip.volume.Volume`."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from xipvm.errors import MmError
from xipvm.xip.ext2 import directory
from xipvm.xip.ext2.inode import Ext2Inode, blocks_for
from xipvm.xip.ext2.layout import BLOCK
from xipvm.xip.ext2.volume import Ext2Image
from xipvm.xip.volume import Status, Volume

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.xip.inode import XipInode


class Ext2Volume(Volume):
    """The image at ``path``; arguments and errors are those of :class:`Ext2Image`."""

    kind = "ext2"

    def __init__(
        self,
        host: HostMemory,
        path: str,
        *,
        read_only: bool = False,
        snapshot: bool = False,
        now: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        clock = (lambda: int(time.time())) if now is None else now
        self.image = Ext2Image(host, path, read_only=read_only, snapshot=snapshot, now=clock)
        self.path = path
        self.read_only = read_only
        self.clean = self.image.clean

    def lookup(self, path: str, *, follow: bool = True) -> Ext2Inode:
        """See the base."""
        return directory.lookup(self.image, path, follow=follow)

    def names(self, inode: XipInode) -> Iterator[tuple[str, XipInode]]:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        for entry in directory.entries(inode):
            if entry.name not in (b".", b".."):
                yield entry.name.decode(errors="surrogateescape"), self.image.inode(entry.number)

    def status(self, inode: XipInode) -> Status:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        target = inode.link_target().decode(errors="surrogateescape") if inode.is_symlink else ""
        return Status(
            directory.type_letter(inode),
            inode.mode & 0o7777,
            inode.links,
            inode.size,
            inode.blocks,
            inode.mtime,
            target,
        )

    def extents(self, inode: XipInode) -> Iterator[tuple[int, int, int]]:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        return inode.extents()

    def create(self, path: str) -> Ext2Inode:
        """See the base."""
        with self.image.super_block.writers:
            return directory.create(self.image, path)

    def mkdir(self, path: str) -> Ext2Inode:
        """See the base."""
        with self.image.super_block.writers:
            return directory.mkdir(self.image, path)

    def check_room(self, pages: Iterable[int], instead_of: XipInode) -> None:
        """See the base."""
        assert isinstance(instead_of, Ext2Inode)
        needed = blocks_for(pages)
        free = self.image.free_blocks + instead_of.blocks * 512 // BLOCK
        if needed > free:
            raise MmError(errno.ENOSPC, f"{instead_of.name} would have {needed} blocks, and there is room for {free}")

    def unlink(self, path: str) -> None:
        """See the base."""
        with self.image.super_block.writers:
            inode = self.lookup(path, follow=False)
            if inode.is_dir or inode.links <= 1:  # under another name it goes on as the same file
                self.forget(inode)
            if inode.is_dir:
                directory.rmdir(self.image, path)
            else:
                directory.unlink(self.image, path)

    def freeze(self) -> None:
        """See the base."""
        self.image.super_block.freeze()

    def thaw(self) -> None:
        """See the base."""
        self.image.super_block.thaw()

    def close(self) -> None:
        """See the base."""
        self.image.close()
