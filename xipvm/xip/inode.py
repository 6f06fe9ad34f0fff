"""What a file system gives to a file that is used in place: blocks by page offset, a size, times.

A block is one page: 4 KiB, as ext2 demanded of its own blocks for XIP. It is named by the frame that it is, a device
frame of the :class:`~xipvm.xip.memory.XipMemory` that the file system lives in.

**Ordering.** A look-up (``create=False``) passes no schedule point: what it says is true until the caller passes one.
An allocation may sleep; the block is zeroed before anybody can find it. Blocks are freed when nobody maps them any
more, which is the caller's business.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, Never

from xipvm.address import Pfn
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES

if TYPE_CHECKING:
    from xipvm.xip.super_block import SuperBlock

HOLE: Final = Pfn(0)
"""What :meth:`XipInode.find_huge` says of a hole. No block is frame 0."""


class Identity(NamedTuple):
    """Which file a file of an image is, whatever its names are: what ``xip_file`` says."""

    image: str
    """Its path, as given."""
    volume: str
    """What tells the file system from others that were at that path."""
    inode: int
    generation: int
    """Tells the file from others that had its inode number."""
    base: int
    """The frame of the file system's first block, in this run."""

    @property
    def at(self) -> str:
        """Where it is, or was: other files may have been there as well."""
        return f"inode {self.inode} of {self.image}"

    def __str__(self) -> str:
        again = f".{self.generation}" if self.generation else ""
        return f"{self.image}:{self.inode}{again}"


class XipInode(ABC):
    """A file of ``size`` bytes, called ``name``."""

    name: str
    sb: SuperBlock
    """Its file system, which may be frozen. Whoever calls what changes something keeps to that."""
    read_only: bool = False
    """Nothing of its file system may change: no block is allocated, no size or time written."""
    max_bytes: int = (1 << 63) - 1
    """How large the file can become (s_maxbytes)."""

    @property
    def identity(self) -> Identity | None:
        """Which file of its image it is; None if it is in none."""
        return None

    @property
    def label(self) -> str:
        """What events call it: no other file of the run is called so."""
        return str(self.identity or self.name)

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes."""

    @abstractmethod
    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """The frame of page ``pgoff``.

        Raises MmError: ENODATA when the page is a hole, unless ``create``, which gives it a block of zeros; ENOSPC,
        EROFS, EIO.
        """

    @abstractmethod
    def set_size(self, size: int) -> None:
        """The file has ``size`` bytes from now on. Blocks are not touched. Raises MmError."""

    def will_end(self, size: int) -> None:  # noqa: B027
        """Bytes up to ``size``, behind the present end, are about to be stored; ``set_size`` follows. MmError."""

    @abstractmethod
    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """The pages ``[first, end)`` are holes from now on; the frames of those that were not. Raises MmError."""

    def accessed(self) -> None:  # noqa: B027
        """Somebody read the file: its atime. By default it has none; likewise below."""

    def modified(self) -> None:  # noqa: B027
        """Somebody wrote to it: its mtime and ctime. Raises MmError."""

    def drop_privileges(self) -> None:  # noqa: B027
        """It is about to be written: nobody runs it with its owner's rights any more (file_remove_suid). MmError."""

    def sync(self) -> None:  # noqa: B027
        """Whatever the file system keeps of the file outside of the device goes there. Raises MmError."""

    def find(self, pgoff: int) -> Pfn | None:
        """As a look-up; None for a hole. Raises MmError for what is worse than a hole."""
        try:
            return self.get_xip_mem(pgoff, create=False)
        except MmError as error:
            if error.errno == errno.ENODATA:
                return None
            raise

    def find_huge(self, pgoff: int) -> Pfn | None:
        """The first frame of the 2 MiB from page ``pgoff`` on if they are one aligned piece, HOLE if they are one hole.

        None for anything else. Raises MmError as :meth:`find`.
        """
        first = self.find(pgoff)
        if first is None:
            holes = all(self.find(page) is None for page in range(pgoff, pgoff + HUGE_PAGES))
            return HOLE if holes else None
        if first % HUGE_PAGES or any(self.find(pgoff + n) != first + n for n in range(HUGE_PAGES)):
            return None
        return first

    def create_huge(self, pgoff: int) -> Pfn | None:
        """Gives the 2 MiB from page ``pgoff`` on, which are a hole, one aligned piece of zeros; its first frame.

        None where there is none to be had, or the file system does not look for one. Raises MmError.
        """
        return None


class GoneInode(XipInode):
    """``inode`` after its removal, for those who still have it open: it is empty, and remains so."""

    read_only = True

    def __init__(self, inode: XipInode) -> None:
        self.name = inode.name
        self.sb = inode.sb

    @property
    def size(self) -> int:
        """Nothing."""
        return 0

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """Never: ESTALE; likewise below."""
        raise MmError(errno.ESTALE, self.name)

    def set_size(self, size: int) -> None:
        """See :meth:`get_xip_mem`."""
        raise MmError(errno.ESTALE, self.name)

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """See :meth:`get_xip_mem`."""
        raise MmError(errno.ESTALE, self.name)


class ClosedInode(XipInode):
    """``inode`` of the image at ``path``, which was put away, for those who still have it open: EBADF, all of it."""

    def __init__(self, inode: XipInode, path: str) -> None:
        self.name = inode.name
        self.sb = inode.sb
        self.path = path

    def _refuse(self) -> Never:
        raise MmError(errno.EBADF, f"{self.name}: {self.path} is closed")

    @property
    def size(self) -> int:
        """Never; likewise below."""
        self._refuse()

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """See :attr:`size`."""
        self._refuse()

    def set_size(self, size: int) -> None:
        """See :attr:`size`."""
        self._refuse()

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """See :attr:`size`."""
        self._refuse()

    def accessed(self) -> None:
        """See :attr:`size`; hence nobody maps it."""
        self._refuse()

    def modified(self) -> None:
        """See :attr:`size`."""
        self._refuse()

    def drop_privileges(self) -> None:
        """See :attr:`size`."""
        self._refuse()

    def sync(self) -> None:
        """See :attr:`size`."""
        self._refuse()
