"""A file system in an image: names, and one XIP file for each inode that is open.

:func:`open_volume` finds out what an image is by its magic number.
"""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Never, Self

from xipvm.errors import MmError, XipImageError
from xipvm.image_file import read_head
from xipvm.xip.dax import DaxFile
from xipvm.xip.filemap import XipFile
from xipvm.xip.inode import ClosedInode, GoneInode
from xipvm.xip.open_file import OpenFile

if TYPE_CHECKING:
    from types import TracebackType

    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace
    from xipvm.xip.inode import XipInode

_PIECE = 1 << 20

FORMS: dict[str, type[XipFile]] = {"2008": XipFile, "modern": DaxFile}
"""What a file is under each notifier protocol."""


class Status(NamedTuple):
    """What ``ls -l`` shows of a file."""

    letter: str
    """``d``, ``-``, ``l``, or ``?``."""
    rights: int
    links: int
    size: int
    sectors: int
    """Of 512 bytes, those of the file system's own included."""
    mtime: int
    """Seconds since 1970."""
    target: str = ""
    """Where a symbolic link leads."""


class Volume(ABC):
    """A file system, in the image at ``path``. Paths of files are absolute, as text."""

    kind: str
    path: str
    read_only: bool
    clean = True
    """It was put away properly the last time."""
    closed = False

    def __init__(self) -> None:
        self._files: dict[XipInode, XipFile] = {}

    @abstractmethod
    def lookup(self, path: str, *, follow: bool = True) -> XipInode:
        """What ``path`` names. Raises MmError ENOENT, ENOTDIR, ELOOP, EUCLEAN."""

    @abstractmethod
    def names(self, directory: XipInode) -> Iterator[tuple[str, XipInode]]:
        """What is in a directory, without ``.`` and ``..``. Raises MmError ENOTDIR, EUCLEAN."""

    @abstractmethod
    def status(self, inode: XipInode) -> Status:
        """What is known of a file."""

    @abstractmethod
    def extents(self, inode: XipInode) -> Iterator[tuple[int, int, int]]:
        """A file's blocks as runs of (first page, first block of the device, count), ascending. Raises MmError."""

    def close(self) -> None:
        """Puts the image away. A second call does nothing; whatever else is asked of the volume, or of a file: EBADF.

        Raises MmError EBUSY while a file is mapped, or a page of it is pinned; it is open then.
        """
        if self.closed:
            return
        for file in self._files.values():
            if file.in_use:
                raise MmError(errno.EBUSY, f"{self.path} cannot be closed: {file.name}: {file.users()}")
        self._put_away()
        self.closed = True
        for inode, file in self._files.items():
            file.inode = ClosedInode(inode, self.path)
        for name in dir(type(self)):
            if not name.startswith("_") and name != "close" and callable(getattr(type(self), name)):
                setattr(self, name, partial(self._refuse, name))

    @abstractmethod
    def _put_away(self) -> None:
        """The image is what others may use from now on, and its memory is gone."""

    def _refuse(self, asked: str, *arguments: object, **named: object) -> Never:
        raise MmError(errno.EBADF, f"{asked}: {self.path} is closed")

    def create(self, path: str) -> XipInode:
        """A new empty file. Raises MmError EROFS, EEXIST, ENOENT, ENOSPC."""
        raise MmError(errno.EROFS, self.path)

    def mkdir(self, path: str) -> XipInode:
        """A new empty directory. Raises MmError as :meth:`create` does."""
        raise MmError(errno.EROFS, self.path)

    def check_room(self, size: int, pages: Iterable[int], path: str, *, replaces: bool) -> None:
        """That there is room for a new file ``path`` of ``size`` bytes, which ``replaces`` one that is there.

        ``pages`` are those with data, which are looked at if it would not fit with data in all of them. Raises MmError
        ENOSPC, EROFS.
        """
        raise MmError(errno.EROFS, self.path)

    def tmpfile(self, path: str, mode: int = 0o644) -> XipInode:
        """A new empty file that is to become ``path``, and has no name until then (O_TMPFILE).

        One of :meth:`link`, :meth:`replace` and :meth:`discard` is to follow. Raises MmError as :meth:`create` does.
        """
        raise MmError(errno.EROFS, self.path)

    def link(self, inode: XipInode, path: str) -> None:
        """``inode``, of :meth:`tmpfile`, is ``path`` from now on. Raises MmError EEXIST, and as :meth:`create` does."""
        raise MmError(errno.EROFS, self.path)

    def replace(self, inode: XipInode, path: str) -> None:
        """The file ``path`` has the contents of ``inode``, of :meth:`tmpfile`, which is gone; all else of it remains.

        Whoever looks meanwhile, or after a kill, finds all of the old contents or all of the new ones. Who has either
        open finds nothing in it any more. Raises MmError EBUSY (it is in use), EISDIR, EROFS, and as :meth:`lookup`.
        """
        raise MmError(errno.EROFS, self.path)

    def discard(self, inode: XipInode) -> None:
        """``inode``, of :meth:`tmpfile`, goes if it has got no name. Raises MmError EBUSY (in use)."""
        raise MmError(errno.EROFS, self.path)

    def unlink(self, path: str) -> None:
        """Takes a file's name away, and an empty directory.

        Raises MmError EBUSY (in use, and it has no other name), EROFS, ENOENT, ENOTEMPTY.
        """
        raise MmError(errno.EROFS, self.path)

    def freeze(self) -> None:
        """Nothing of the image changes until :meth:`thaw`, and a copy of it is consistent (FIFREEZE).

        Waits for whoever is changing something; who begins to waits for the thaw. Only stores through mappings of the
        2008 form go on, to blocks that are there. Raises MmError EBUSY (frozen), EDEADLK, EIO, EOPNOTSUPP.
        """
        raise MmError(errno.EOPNOTSUPP, self.path)

    def thaw(self) -> None:
        """Everybody goes on (FITHAW). Raises MmError EINVAL (not frozen), EOPNOTSUPP."""
        raise MmError(errno.EOPNOTSUPP, self.path)

    def file(self, host: HostMemory, trace: Trace, inode: XipInode, protocol: str = "modern") -> XipFile:
        """``inode`` as a file to read, write and map; the same one for everybody. Raises MmError EISDIR, EINVAL."""
        letter = self.status(inode).letter
        if letter != "-":
            raise MmError(errno.EISDIR if letter == "d" else errno.EINVAL, inode.name)
        if inode not in self._files:
            self._files[inode] = FORMS[protocol](host, trace, inode)
        return self._files[inode]

    def read_whole(self, host: HostMemory, trace: Trace, inode: XipInode) -> Iterator[bytes]:
        """A file's bytes, in pieces. Raises MmError EISDIR and what reading does."""
        file = OpenFile(self.file(host, trace, inode), os.O_RDONLY)
        while data := file.get(_PIECE):
            yield data

    def forget(self, inode: XipInode) -> None:
        """``inode`` is about to go away. Raises MmError EBUSY while it is mapped, or a page of it is pinned.

        Who merely has it open finds nothing in it any more, and cannot write to it: its number and blocks become
        others'.
        """
        file = self._files.get(inode)
        if file is not None and file.in_use:
            raise MmError(errno.EBUSY, inode.name)
        if file is not None:
            del self._files[inode]
            inode.sb.files.remove(file)
            file.inode, file.writable = GoneInode(inode), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close()
        except MmError as busy:
            if error is None:
                raise
            error.add_note(str(busy))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of the file at ``path`` tell all of it, where the file itself knows its last part only. Raises MmError."""
    try:
        yield
    except MmError as error:
        name = path.rstrip("/").rpartition("/")[2] or "/"
        what = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", lambda match: path, error.what, count=1)
        raise MmError(error.errno or errno.EIO, what) from None


def open_volume(
    host: HostMemory,
    path: str,
    *,
    read_only: bool = False,
    snapshot: bool = False,
    now: Callable[[], int] | None = None,
) -> Volume:
    """The file system in the image at ``path``. Raises XipImageError."""
    from xipvm.xip.ext2.layout import MAGIC, SUPERBLOCK_AT
    from xipvm.xip.ext2.tree import Ext2Volume
    from xipvm.xip.romfs import MAGIC as ROMFS_MAGIC
    from xipvm.xip.romfs import RomfsVolume

    head = read_head(path, XipImageError, SUPERBLOCK_AT + 64)
    if int.from_bytes(head[SUPERBLOCK_AT + 56 : SUPERBLOCK_AT + 58], "little") == MAGIC:
        return Ext2Volume(host, path, read_only=read_only, snapshot=snapshot, now=now)
    if head.startswith(ROMFS_MAGIC):
        return RomfsVolume(host, path)
    raise XipImageError(path, f"is no ext2 or romfs image{'' if head else ': it is empty'}")
