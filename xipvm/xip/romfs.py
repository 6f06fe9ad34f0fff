"""romfs, read-only images made by genromfs: files are in one piece, and can be mapped where they begin on a page.

``genromfs -a 4096`` puts them there; one that begins elsewhere can be read, not mapped. All numbers are big-endian.
What a page shows behind the end of its file is what the image has there, the next file's header most likely.

Source: Documentation/filesystems/romfs.rst of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.address import PAGE_MASK, PAGE_SHIFT, Pfn, page_up
from xipvm.errors import MmError, XipImageError, os_reason
from xipvm.image_file import close_image, open_image
from xipvm.xip.inode import Identity, XipInode
from xipvm.xip.memory import XipMemory
from xipvm.xip.super_block import SuperBlock
from xipvm.xip.volume import Status, Volume

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace
    from xipvm.xip.filemap import XipFile

MAGIC: Final = b"-rom1fs-"
_ALIGN: Final = 16
_HARD_LINK, _DIRECTORY, _FILE, _LINK = 0, 1, 2, 3
_EXECUTABLE: Final = 8
_MAX_LINKS: Final = 40
_MAX_NAME: Final = 256
_CHECKED: Final = 512


class _Header(NamedTuple):
    """What is at byte ``at``: type and executable bit, where the next in its directory is, and its data."""

    at: int
    kind: int
    executable: bool
    next: int
    info: int
    size: int
    name: str
    data: int


class RomfsInode(XipInode):
    """The file, directory or link whose header is ``header``."""

    read_only = True

    def __init__(self, volume: RomfsVolume, header: _Header) -> None:
        self.volume = volume
        self.sb = volume.sb
        self.header = header
        self.name = header.name

    @property
    def identity(self) -> Identity:
        """See the base. Its inode number is where its header begins, as in Linux."""
        volume = self.volume
        return Identity(volume.path, f"{_word(volume.bytes, 12):08x}", self.header.at, 0, volume.memory.first)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.header.size

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """See the base. EINVAL for a file that begins in the middle of a page."""
        self.must_be_aligned()
        return self.volume.memory.pfn((self.header.data >> PAGE_SHIFT) + pgoff)

    def must_be_aligned(self) -> None:
        """Raises MmError EINVAL when no page of it can be used in place."""
        at = self.header.data
        if at & ~PAGE_MASK:
            what = f"{self.name} begins at {at:#x} of the image, in the middle of a page (genromfs -a 4096)"
            raise MmError(errno.EINVAL, what)

    def set_size(self, size: int) -> None:
        """Never: EROFS."""
        raise MmError(errno.EROFS, self.name)

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """Never: EROFS."""
        raise MmError(errno.EROFS, self.name)


class RomfsVolume(Volume):
    """The image at ``path``, which is not written to. Raises XipImageError."""

    kind = "romfs"
    read_only = True

    def __init__(self, host: HostMemory, path: str) -> None:
        super().__init__()
        self.path = path
        self.sb = SuperBlock(path)
        self._inodes: dict[int, RomfsInode] = {}
        self._fd = open_image(path, XipImageError, writable=False, shared=True)
        try:
            length = os.fstat(self._fd).st_size
            size = self._check_superblock(length)
            # A mapping reaches to the end of its last page, which the file has to have.
            self.memory = XipMemory(host, self._fd, min(page_up(size), page_up(length)), private=True)
        except OSError as error:
            close_image(self._fd)
            raise XipImageError(path, f"cannot be mapped: {os_reason(error)}") from None
        except BaseException:
            close_image(self._fd)
            raise
        self.size = size
        raw = (ctypes.c_ubyte * self.memory.size).from_address(self.memory.address)
        self.bytes = memoryview(raw).cast("B").toreadonly()
        self._root = self._first_header()

    def _check_superblock(self, length: int) -> int:
        head = os.pread(self._fd, _CHECKED, 0)
        if head[:8] != MAGIC or len(head) < 32:
            raise XipImageError(self.path, "is no romfs image")
        size = int.from_bytes(head[8:12], "big")
        if size > length:
            raise XipImageError(self.path, f"is cut short: {length} bytes, and its header says {size}")
        checked = head[: min(size, _CHECKED)]
        if len(checked) < 32 or sum(_word(checked, at) for at in range(0, len(checked) & ~3, 4)) & 0xFFFF_FFFF:
            raise XipImageError(self.path, "is damaged: its checksum is wrong")
        return size

    def _first_header(self) -> int:
        end = bytes(self.bytes[16 : 16 + _MAX_NAME]).find(b"\0")
        if end < 0:
            raise XipImageError(self.path, "is damaged: its name has no end")
        return (16 + end + _ALIGN) & -_ALIGN

    def _put_away(self) -> None:
        """See the base."""
        self.bytes.release()
        self.memory.close()
        close_image(self._fd)

    # ---- headers

    def _header(self, at: int) -> _Header:
        """The header at byte ``at``, through hard links. Raises MmError EUCLEAN, ELOOP."""
        name = ""
        for _ in range(_MAX_LINKS):
            header = self._read_header(at)
            name = name or header.name
            if header.kind != _HARD_LINK:
                return header._replace(name=name)
            at = header.info & -_ALIGN
        raise MmError(errno.ELOOP, f"{self.path}: {name}")

    def _read_header(self, at: int) -> _Header:
        if at % _ALIGN or not 16 <= at <= self.size - 32:
            raise self._corrupt(f"a header at {at:#x}")
        raw = self.bytes
        following, info, size = (_word(raw, at + n) for n in (0, 4, 8))
        end = bytes(raw[at + 16 : min(at + 16 + _MAX_NAME, self.size)]).find(b"\0")
        if end < 0:
            raise self._corrupt(f"a name at {at + 16:#x} without an end")
        name = bytes(raw[at + 16 : at + 16 + end]).decode(errors="surrogateescape")
        data = at + ((16 + end + _ALIGN) & -_ALIGN)
        if following & 7 in (_FILE, _LINK) and size:
            data = self._data_of(at, data, size)
        return _Header(at, following & 7, bool(following & _EXECUTABLE), following & -_ALIGN, info, size, name, data)

    def _data_of(self, at: int, data: int, size: int) -> int:
        if data + size > self.size:
            raise self._corrupt(f"the file at {at:#x} of {size} bytes, which reaches beyond the image")
        return data

    def _corrupt(self, what: str) -> MmError:
        return MmError(errno.EUCLEAN, f"{self.path}: {what}")

    def _inode(self, at: int) -> RomfsInode:
        header = self._header(at)
        return self._inodes.setdefault(header.at, RomfsInode(self, header))

    def _children(self, directory: RomfsInode) -> Iterator[tuple[str, int]]:
        if directory.header.kind != _DIRECTORY:
            raise MmError(errno.ENOTDIR, directory.name)
        at, seen = directory.header.info & -_ALIGN, set()
        while at:
            if at in seen:
                raise self._corrupt(f"directory {directory.name} leads back to {at:#x}")
            seen.add(at)
            header = self._read_header(at)
            if header.name not in (".", ".."):
                yield header.name, at
            at = header.next

    # ---- as a volume

    def lookup(self, path: str, *, follow: bool = True) -> RomfsInode:
        """See the base."""
        root = self._inode(self._root)
        root.name = "/"
        if root.header.kind != _DIRECTORY:
            raise self._corrupt("the first file is no directory")
        trail, links = [root], 0
        todo = path.split("/")[::-1]
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                trail = trail[:-1] or trail
                continue
            at = next((at for known, at in self._children(trail[-1]) if known == name), None)
            if at is None:
                raise MmError(errno.ENOENT, path)
            found = self._inode(at)
            if found.header.kind == _LINK and (follow or todo):
                links += 1
                if links > _MAX_LINKS:
                    raise MmError(errno.ELOOP, path)
                target = self.status(found).target
                trail = trail[:1] if target.startswith("/") else trail
                todo.extend(target.split("/")[::-1])
                continue
            trail.append(found)
        return trail[-1]

    def names(self, directory: XipInode) -> Iterator[tuple[str, XipInode]]:
        """See the base."""
        assert isinstance(directory, RomfsInode)
        for name, at in self._children(directory):
            yield name, self._inode(at)

    def status(self, inode: XipInode) -> Status:
        """See the base."""
        assert isinstance(inode, RomfsInode)
        header = inode.header
        letter = {_DIRECTORY: "d", _FILE: "-", _LINK: "l"}.get(header.kind, "?")
        rights = 0o555 if header.executable or header.kind == _DIRECTORY else 0o444
        target = bytes(self.contents(inode)).decode(errors="surrogateescape") if letter == "l" else ""
        return Status(letter, rights, 1, header.size, -(-header.size // 512), 0, target)

    def contents(self, inode: XipInode) -> memoryview:
        """The bytes of a file, wherever it begins."""
        assert isinstance(inode, RomfsInode)
        return self.bytes[inode.header.data : inode.header.data + inode.header.size]

    def read_whole(self, host: HostMemory, trace: Trace, inode: XipInode) -> Iterator[bytes]:
        """See the base."""
        self.file(host, trace, inode, unaligned=True)
        yield bytes(self.contents(inode))

    def extents(self, inode: XipInode) -> Iterator[tuple[int, int, int]]:
        """See the base."""
        assert isinstance(inode, RomfsInode)
        inode.must_be_aligned()
        if inode.size:
            yield 0, inode.header.data >> PAGE_SHIFT, page_up(inode.size) >> PAGE_SHIFT

    def file(
        self, host: HostMemory, trace: Trace, inode: XipInode, protocol: str = "modern", *, unaligned: bool = False
    ) -> XipFile:
        """See the base. EINVAL for a file that no page of can be used in place, unless ``unaligned``."""
        assert isinstance(inode, RomfsInode)
        found = super().file(host, trace, inode, protocol)
        if not unaligned:
            inode.must_be_aligned()
        return found


def _word(raw: bytes | memoryview, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "big")
