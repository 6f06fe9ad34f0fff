"""A file gets other contents, whole and at once: what rename(2) is used for.

**Order of changes.** The new contents are those of an inode without a name, which e2fsck takes for a deleted one. It
gets what the old inode has besides contents, then the directory's entry names it instead of the old one: one store of
one number. Then the old one goes.

A file with several names remains the same one under all of them, so its inode stays, and takes the other's contents:
size, times, and the numbers of its blocks, by one copy of about a hundred bytes. Whoever is cut short before, or
after, loses blocks, as anywhere else.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.errors import MmError
from xipvm.xip.ext2 import directory, layout
from xipvm.xip.ext2.layout import BLOCK

if TYPE_CHECKING:
    from xipvm.xip.ext2.inode import Ext2Inode
    from xipvm.xip.ext2.volume import Ext2Image

_CONTENTS: Final = (
    (layout.I_SIZE, 4),
    (layout.I_CTIME, 8),  # and i_mtime
    (layout.I_BLOCKS, 4),
    (layout.I_BLOCK, 60),
    (layout.I_SIZE_HIGH, 4),
)
"""What of an inode tells what is in it, and since when: byte and length."""
_CHANGED: Final = (layout.I_SIZE, layout.I_SIZE_HIGH + 4)
"""From the first byte of that to behind the last."""
_ACL_SECTORS: Final = BLOCK // 512


def replace(image: Ext2Image, inode: Ext2Inode, path: str) -> None:
    """The file ``path`` has what ``inode`` has, which has no name; that is gone, and so is what the file had.

    Nobody may have either mapped. Raises MmError EINVAL, EISDIR, EROFS and as a look-up.
    """
    image.may_write()
    parent, entry = directory.where(image, path)
    old = image.inode(entry.number)
    if not old.is_file:
        raise MmError(errno.EINVAL, path)
    old.drop_privileges()
    mine, contents = _raw(old), _raw(inode)
    if old.links > 1:
        _store(old, _mixed(mine, contents), *_CHANGED)
        _store(inode, _mixed(contents, mine), *_CHANGED)
        directory.discard(inode)
        return
    _store(inode, _mixed(mine, contents), 0, len(mine))
    image.put32(entry.at, inode.number)
    parent.modified()
    directory.discard(old)


def _raw(inode: Ext2Inode) -> bytes:
    return bytes(inode.image.bytes[inode.at : inode.at + inode.image.sb.inode_size])


def _mixed(attributes: bytes, contents: bytes) -> bytes:
    """The inode with the contents of one, and all else of another."""
    mixed = bytearray(attributes)
    for at, size in _CONTENTS:
        mixed[at : at + size] = contents[at : at + size]
    if layout.U32(attributes, layout.I_FILE_ACL)[0]:  # its block counts, too
        blocks = layout.U32(mixed, layout.I_BLOCKS)[0] + _ACL_SECTORS
        mixed[layout.I_BLOCKS : layout.I_BLOCKS + 4] = blocks.to_bytes(4, "little")
    return bytes(mixed)


def _store(inode: Ext2Inode, raw: bytes, start: int, end: int) -> None:
    inode.image.bytes[inode.at + start : inode.at + end] = raw[start:end]
