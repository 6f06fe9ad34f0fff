"""What is where on an ext2 volume: superblock, group descriptors, inodes, directory entries. All little-endian.

Source: Documentation/filesystems/ext2.rst and ext4/ of Linux (the on-disk format is the same as far as it goes).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

BLOCK: Final = 4096
"""The block size that XIP needs, bytes: one page."""
PER_BLOCK: Final = BLOCK // 4
"""Block numbers in an indirect block."""
SUPERBLOCK_AT: Final = 1024
MAGIC: Final = 0xEF53
VALID_FS: Final = 1

INCOMPAT_FILETYPE: Final = 0x2
RO_COMPAT_SPARSE_SUPER: Final = 0x1
RO_COMPAT_LARGE_FILE: Final = 0x2
INCOMPAT_NAMES: Final = {
    0x1: "compression",
    0x4: "needs_recovery",
    0x8: "journal_dev",
    0x10: "meta_bg",
    0x40: "extents",
    0x80: "64bit",
    0x100: "mmp",
    0x200: "flex_bg",
    0x400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
RO_COMPAT_NAMES: Final = {
    0x8: "huge_file",
    0x10: "uninit_bg",
    0x20: "dir_nlink",
    0x40: "extra_isize",
    0x100: "quota",
    0x200: "bigalloc",
    0x400: "metadata_csum",
    0x1000: "readonly",
    0x2000: "project",
}

ROOT_INO: Final = 2
GOOD_OLD_FIRST_INO: Final = 11
GOOD_OLD_INODE_SIZE: Final = 128

S_IFMT: Final = 0o170000
S_IFDIR: Final = 0o040000
S_IFREG: Final = 0o100000
S_IFLNK: Final = 0o120000

FT_UNKNOWN, FT_REG_FILE, FT_DIR = 0, 1, 2
FT_SYMLINK: Final = 7
INDEX_FL: Final = 0x1000
"""The directory has a hash tree; it is one without, too, as soon as the flag is gone."""

NDIR_BLOCKS: Final = 12
IND_BLOCK, DIND_BLOCK, TIND_BLOCK = 12, 13, 14

_SUPERBLOCK = Struct("<13I6H4I2HI2H3I")
_GROUP = Struct("<3I3H14x")
GROUP_SIZE: Final = 32

# Places in the superblock, bytes.
S_FREE_BLOCKS, S_FREE_INODES, S_WTIME, S_STATE, S_RO_COMPAT = 12, 16, 48, 58, 100
S_UUID: Final = 104
# In a group descriptor.
BG_FREE_BLOCKS, BG_FREE_INODES, BG_USED_DIRS = 12, 14, 16
# In an inode.
I_MODE, I_SIZE, I_ATIME, I_CTIME, I_MTIME, I_DTIME, I_LINKS, I_BLOCKS, I_FLAGS, I_BLOCK, I_FILE_ACL, I_SIZE_HIGH = (
    0, 4, 8, 12, 16, 20, 26, 28, 32, 40, 104, 108,
)  # fmt: skip
I_GENERATION: Final = 100
DIRENT = Struct("<IHBB")
"""inode, rec_len, name_len, file_type; the name follows."""

# Readers of numbers: of a buffer, from a byte on.
U16: Final = Struct("<H").unpack_from
U32: Final = Struct("<I").unpack_from
SIZE: Final = Struct(f"<H{I_SIZE - 2}xI{I_SIZE_HIGH - I_SIZE - 4}xI").unpack_from
"""Of an inode: i_mode, i_size, i_size_high (i_dir_acl)."""


@dataclass(frozen=True)
class Superblock:
    """Those fields of the superblock that do not change while it is in use."""

    inodes_count: int
    blocks_count: int
    first_data_block: int
    log_block_size: int
    blocks_per_group: int
    inodes_per_group: int
    magic: int
    state: int
    rev_level: int
    first_ino: int
    inode_size: int
    compat: int
    incompat: int
    ro_compat: int

    @classmethod
    def parse(cls, raw: bytes) -> Superblock:
        """From the 1024 bytes at 1024."""
        f = _SUPERBLOCK.unpack_from(raw)
        old = f[22] == 0  # the fields behind s_rev_level's came with revision 1
        return cls(
            inodes_count=f[0],
            blocks_count=f[1],
            first_data_block=f[5],
            log_block_size=f[6],
            blocks_per_group=f[8],
            inodes_per_group=f[10],
            magic=f[15],
            state=f[16],
            rev_level=f[22],
            first_ino=GOOD_OLD_FIRST_INO if old else f[25],
            inode_size=GOOD_OLD_INODE_SIZE if old else f[26],
            compat=0 if old else f[28],
            incompat=0 if old else f[29],
            ro_compat=0 if old else f[30],
        )


@dataclass(frozen=True)
class Group:
    """Where a block group has its bitmaps and inodes: block numbers."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int

    @classmethod
    def parse(cls, raw: bytes) -> Group:
        """From a descriptor's 32 bytes."""
        return cls(*_GROUP.unpack_from(raw)[:3])
