"""Names: looking up paths, listing, making and removing.

A directory's blocks are filled with entries, each of which says where the next begins; one with inode 0 is free. A
directory with a hash tree is one of these too, once the flag that says so is cleared, as it is before a name is added.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.errors import MmError
from xipvm.xip.ext2 import layout
from xipvm.xip.ext2.layout import BLOCK, DIRENT, FT_DIR, FT_REG_FILE, FT_SYMLINK
from xipvm.xip.ext2.volume import corrupt

if TYPE_CHECKING:
    from xipvm.xip.ext2.inode import Ext2Inode
    from xipvm.xip.ext2.volume import Ext2Image

NAME_LEN: Final = 255
_MAX_LINKS: Final = 40
"""How many symbolic links a path may lead through, as in Linux."""
_LINK_MAX: Final = 32000


class Entry(NamedTuple):
    """A name in a directory. ``at`` is the byte of the image at which it is."""

    name: bytes
    number: int
    at: int


def entries(directory: Ext2Inode) -> Iterator[Entry]:
    """The names of ``directory``, ``.`` and ``..`` included. Raises MmError ENOTDIR, EUCLEAN."""
    for entry in _slots(directory):
        if entry.number:
            yield entry


def _slots(directory: Ext2Inode) -> Iterator[Entry]:
    """All entries, free ones too."""
    image = directory.image
    if not directory.is_dir:
        raise MmError(errno.ENOTDIR, directory.name)
    for page in range(directory.size // BLOCK):
        pfn = directory.find(page)
        if pfn is None:
            raise corrupt(f"{image.path}: directory {directory.name} has a hole")
        base, at = image.block_of(pfn) * BLOCK, 0
        while at < BLOCK:
            number, length, name_length, _ = DIRENT.unpack_from(image.bytes, base + at)
            if length < 8 + name_length or length % 4 or length < 12 or at + length > BLOCK:
                raise corrupt(f"{image.path}: directory {directory.name} has a bad entry at {page * BLOCK + at:#x}")
            start = base + at + DIRENT.size
            yield Entry(bytes(image.bytes[start : start + name_length]), number, base + at)
            at += length


def find(directory: Ext2Inode, name: bytes) -> Ext2Inode:
    """What ``name`` in ``directory`` is. Raises MmError ENOENT, ENOTDIR, EUCLEAN."""
    for entry in entries(directory):
        if entry.name == name:
            found = directory.image.inode(entry.number)
            found.name = name.decode(errors="surrogateescape") if name not in (b".", b"..") else found.name
            return found
    raise MmError(errno.ENOENT, name.decode(errors="replace"))


def lookup(image: Ext2Image, path: str, *, follow: bool = True) -> Ext2Inode:
    """What ``path`` names, from the root; ``follow``: through a symbolic link at its end.

    Raises MmError ENOENT, ENOTDIR, ELOOP, EUCLEAN.
    """
    return _walk(image, path, follow=follow)[-1][1]


def where(image: Ext2Image, path: str) -> tuple[Ext2Inode, Entry]:
    """The directory with the file that ``path`` leads to, and its entry there. Errors as lookup's; EISDIR."""
    trail = _walk(image, path, follow=True)
    name, found = trail[-1]
    if found.is_dir:
        raise MmError(errno.EISDIR, path)
    directory = trail[-2][1]
    return directory, next(entry for entry in entries(directory) if entry.name == name)


def _walk(image: Ext2Image, path: str, *, follow: bool) -> list[tuple[bytes, Ext2Inode]]:
    """What one comes through on the way, by the names they have there: the root first, last what ``path`` names."""
    root = image.inode(layout.ROOT_INO)
    root.name = "/"
    trail = [(b"", root)]
    todo = path.encode(errors="surrogateescape").split(b"/")[::-1]
    links = 0
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            trail = trail[:-1] or trail
            continue
        try:
            found = find(trail[-1][1], name)
        except MmError as error:
            if error.errno == errno.ENOENT:
                raise MmError(errno.ENOENT, path) from None
            raise
        if found.is_symlink and (follow or any(part not in (b"", b".") for part in todo)):
            links += 1
            if links > _MAX_LINKS:
                raise MmError(errno.ELOOP, path)
            target = found.link_target()
            if target.startswith(b"/"):
                trail = trail[:1]
            todo.extend(target.split(b"/")[::-1])
            continue
        if todo and any(part not in (b"", b".") for part in todo) and not found.is_dir:
            raise MmError(errno.ENOTDIR, path)
        trail.append((name, found))
    return trail


def parent_of(image: Ext2Image, path: str) -> tuple[Ext2Inode, bytes]:
    """The directory that ``path`` is to be in, and its name there. Raises MmError EINVAL and as :func:`lookup`."""
    head, _, name = path.rstrip("/").rpartition("/")
    raw = name.encode(errors="surrogateescape")
    if raw in (b"", b".", b".."):
        raise MmError(errno.EINVAL, f"{path!r} is no name")
    if len(raw) > NAME_LEN:
        raise MmError(errno.ENAMETOOLONG, path)
    directory = lookup(image, head)
    if not directory.is_dir:
        raise MmError(errno.ENOTDIR, head)
    return directory, raw


def create(image: Ext2Image, path: str, mode: int = 0o644) -> Ext2Inode:
    """A new empty file. Raises MmError EEXIST, ENOSPC, EROFS and as :func:`parent_of`."""
    inode = tmpfile(image, path, mode)
    try:
        link(image, inode, path)
    except MmError:
        image.release_inode(inode)
        raise
    return inode


def tmpfile(image: Ext2Image, path: str, mode: int) -> Ext2Inode:
    """A new empty file that has no name, and is to become ``path``: a deleted one, as e2fsck sees it.

    Raises MmError ENOSPC, EROFS and as :func:`parent_of`.
    """
    directory, name = parent_of(image, path)
    inode = image.allocate_inode(layout.S_IFREG | mode, directory.number)
    inode.name = name.decode(errors="surrogateescape")
    return inode


def link(image: Ext2Image, inode: Ext2Inode, path: str) -> None:
    """``inode``, which has no name, is ``path``. Raises MmError EEXIST, ENOSPC, EROFS and as :func:`parent_of`."""
    directory, name = parent_of(image, path)
    _absent(directory, name, path)
    inode.links = 1
    try:
        _add(directory, name, inode.number, FT_REG_FILE)
    except MmError:
        inode.links = 0
        raise


def mkdir(image: Ext2Image, path: str, mode: int = 0o755) -> Ext2Inode:
    """A new empty directory. Errors as for :func:`create`; EMLINK."""
    directory, name = parent_of(image, path)
    _absent(directory, name, path)
    if directory.links >= _LINK_MAX:
        raise MmError(errno.EMLINK, path)
    inode = image.allocate_inode(layout.S_IFDIR | mode, directory.number)
    try:
        base = image.block_of(inode.get_xip_mem(0, create=True)) * BLOCK
        inode.set_size(BLOCK)
        _fill(image, base, inode.number, 12, b".", FT_DIR)
        _fill(image, base + 12, directory.number, BLOCK - 12, b"..", FT_DIR)
        inode.links = 2
        _add(directory, name, inode.number, FT_DIR)
    except MmError:
        inode.free_blocks(0, 1)
        image.release_inode(inode)
        raise
    directory.links += 1
    return inode


def unlink(image: Ext2Image, path: str) -> None:
    """Takes a file's name away, and the file with its last one. Raises MmError EISDIR and as :func:`lookup`.

    Nobody may have it mapped.
    """
    directory, name = parent_of(image, path)
    inode = find(directory, name)
    if inode.is_dir:
        raise MmError(errno.EISDIR, path)
    _remove(directory, name)
    if inode.links > 1:
        inode.links -= 1
        return
    discard(inode)


def discard(inode: Ext2Inode) -> None:
    """A file or directory that has no name any more goes. Nobody may have it mapped. Raises MmError EUCLEAN."""
    inode.links = 0  # first: for e2fsck it is one that was deleted, and no lost one
    if inode.is_file or inode.blocks:
        inode.set_size(0)
        inode.free_blocks(0, 1 << 40)
    inode.image.release_inode(inode)


def rmdir(image: Ext2Image, path: str) -> None:
    """Takes an empty directory away. Raises MmError ENOTDIR, ENOTEMPTY and as :func:`lookup`."""
    directory, name = parent_of(image, path)
    inode = find(directory, name)
    if any(entry.name not in (b".", b"..") for entry in entries(inode)):
        raise MmError(errno.ENOTEMPTY, path)
    _remove(directory, name)
    directory.links -= 1
    discard(inode)


def _absent(directory: Ext2Inode, name: bytes, path: str) -> None:
    if any(entry.name == name for entry in entries(directory)):
        raise MmError(errno.EEXIST, path)


def _add(directory: Ext2Inode, name: bytes, number: int, file_type: int) -> None:
    image = directory.image
    _forget_index(directory)
    need = _length(len(name))
    for entry in _slots(directory):
        _, length, name_length, old_type = DIRENT.unpack_from(image.bytes, entry.at)
        used = _length(name_length) if entry.number else 0
        if length - used >= need:
            _fill(image, entry.at + used, number, length - used, name, file_type)
            if used:  # last: until now the new entry is inside of the old one's slack
                DIRENT.pack_into(image.bytes, entry.at, entry.number, used, name_length, old_type)
            break
    else:
        page = directory.size // BLOCK
        base = image.block_of(directory.get_xip_mem(page, create=True)) * BLOCK
        _fill(image, base, number, BLOCK, name, file_type)
        directory.set_size((page + 1) * BLOCK)
    directory.modified()


def _remove(directory: Ext2Inode, name: bytes) -> None:
    image = directory.image
    image.may_write()
    before: Entry | None = None
    for entry in _slots(directory):
        if entry.number and entry.name == name:
            break
        before = entry
    else:
        raise MmError(errno.ENOENT, name.decode(errors="replace"))
    if before is not None and before.at // BLOCK == entry.at // BLOCK:
        gap = DIRENT.unpack_from(image.bytes, entry.at)[1]
        number, length, name_length, file_type = DIRENT.unpack_from(image.bytes, before.at)
        DIRENT.pack_into(image.bytes, before.at, number, length + gap, name_length, file_type)
    else:
        image.put32(entry.at, 0)
    _forget_index(directory)
    directory.modified()


def _forget_index(directory: Ext2Inode) -> None:
    at = directory.at + layout.I_FLAGS
    flags = directory.image.get32(at)
    if flags & layout.INDEX_FL:
        directory.image.put32(at, flags & ~layout.INDEX_FL)


def _length(name_length: int) -> int:
    """The bytes that an entry needs."""
    return DIRENT.size + name_length + 3 & ~3


def _fill(image: Ext2Image, at: int, number: int, length: int, name: bytes, file_type: int) -> None:
    image.may_write()
    image.bytes[at + DIRENT.size : at + DIRENT.size + len(name)] = name
    if not image.sb.incompat & layout.INCOMPAT_FILETYPE:
        file_type = 0
    DIRENT.pack_into(image.bytes, at, number, length, len(name), file_type)


def type_letter(inode: Ext2Inode) -> str:
    """What ``ls -l`` begins a line with."""
    kinds = {layout.S_IFDIR: "d", layout.S_IFREG: "-", layout.S_IFLNK: "l"}
    return kinds.get(inode.mode & layout.S_IFMT, "?")


__all__ = [
    "FT_SYMLINK",
    "Entry",
    "create",
    "discard",
    "entries",
    "find",
    "link",
    "lookup",
    "mkdir",
    "parent_of",
    "rmdir",
    "tmpfile",
    "type_letter",
    "unlink",
    "where",
]
