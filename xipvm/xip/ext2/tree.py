"""An ext2 image as a :class:`~xipvm.xip.volume.Volume`."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from xipvm.errors import MmError
from xipvm.xip.ext2 import directory
from xipvm.xip.ext2.inode import Ext2Inode, blocks_for, most_blocks_for
from xipvm.xip.ext2.replace import replace
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

    def check_room(self, size: int, pages: Iterable[int], path: str, *, replaces: bool) -> None:
        """See the base."""
        free = self.image.free_blocks
        if most_blocks_for(size) <= free:
            return
        needed = blocks_for(pages)
        if needed > free:
            beside = ", beside those of the old file, which stays until the new one is whole" if replaces else ""
            raise MmError(errno.ENOSPC, f"{path} needs {needed} blocks, and {free} are free{beside}")

    def tmpfile(self, path: str, mode: int = 0o644) -> Ext2Inode:
        """See the base."""
        with self.image.super_block.writers:
            return directory.tmpfile(self.image, path, mode)

    def link(self, inode: XipInode, path: str) -> None:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        with self.image.super_block.writers:
            directory.link(self.image, inode, path)

    def replace(self, inode: XipInode, path: str) -> None:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        with self.image.super_block.writers:
            self.forget(self.lookup(path))
            self.forget(inode)
            replace(self.image, inode, path)

    def discard(self, inode: XipInode) -> None:
        """See the base."""
        assert isinstance(inode, Ext2Inode)
        with self.image.super_block.writers:
            if not inode.links:
                self.forget(inode)
                directory.discard(inode)

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

    def _put_away(self) -> None:
        """See the base."""
        self.image.close()
