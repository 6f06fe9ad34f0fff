"""An ext2 image: what its superblock says, its bitmaps, and its inodes by number.

**Order of changes.** A block is marked as used, then filled, then linked to its file, then counted; it is unlinked,
then marked as free, then counted. Whoever is cut short loses a block or a count, which e2fsck finds, and never has two
files share one. All changes are stores to the mapped image: what was stored is in the image whatever becomes of the
process.

The file of the host may be sparse, as mke2fs makes it. A block gets its room there when it is allocated, and so do
bitmaps and inodes: a full disk is ENOSPC there and then, and not a signal at the first store.

Numbers that come from the image are checked before they are used: EUCLEAN ("structure needs cleaning"), as Linux says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, Pfn, format_size
from xipvm.errors import MmError, XipImageError, os_reason
from xipvm.host_mapping import FALLOC_FL_KEEP_SIZE, allocate
from xipvm.image_file import close_image, open_image
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.xip.ext2 import layout
from xipvm.xip.ext2.layout import BLOCK, Group, Superblock
from xipvm.xip.memory import XipMemory
from xipvm.xip.super_block import SuperBlock

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.xip.ext2.inode import Ext2Inode

_NOT_FULL = re.compile(rb"[^\xff]")
_RUN = (1 << HUGE_PAGES) - 1
"""The bits of 2 MiB in a bitmap."""
_KNOWN_INCOMPAT = layout.INCOMPAT_FILETYPE
_KNOWN_RO_COMPAT = layout.RO_COMPAT_SPARSE_SUPER | layout.RO_COMPAT_LARGE_FILE


def corrupt(what: str) -> MmError:
    """The error for an image that contradicts itself."""
    return MmError(errno.EUCLEAN, what)


class Ext2Image:
    """The image at ``path`` as a memory device of ``host``. :meth:`close` it, when nothing maps its files any more.

    ``read_only``: nothing may change; ``snapshot``: what changes is gone with the run. ``now()`` gives the times of
    files, seconds since 1970. Raises XipImageError.
    """

    def __init__(
        self,
        host: HostMemory,
        path: str,
        *,
        read_only: bool = False,
        snapshot: bool = False,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self.path = path
        self.host = host
        self.read_only = read_only
        self.now = now
        self.super_block = SuperBlock(path, self._freeze, lambda: self._mark_clean(False))
        """The file system as the kernel has it; ``sb`` is what the image says."""
        private = read_only or snapshot
        self._fd = open_image(path, XipImageError, writable=not private, shared=private)
        try:
            self.sb = self._read_superblock()
            try:
                self.memory = XipMemory(host, self._fd, self.sb.blocks_count * BLOCK, private=private)
            except OSError as error:
                raise XipImageError(path, f"cannot be mapped: {os_reason(error)}") from None
        except BaseException:
            close_image(self._fd)
            raise
        raw = (ctypes.c_ubyte * self.memory.size).from_address(self.memory.address)
        self.bytes = memoryview(raw).cast("B")
        """All of it."""
        self._inodes: dict[int, Ext2Inode] = {}
        self._backed: set[int] = set()  # blocks of bitmaps and inodes that the host has room for
        try:
            self.groups = self._read_groups()
        except BaseException:
            self._unmap()
            raise
        self.clean = bool(self.sb.state & layout.VALID_FS)
        """It was put away properly the last time; else e2fsck should look at it."""
        self._mark_clean(False)

    def _read_superblock(self) -> Superblock:
        def bad(reason: str) -> XipImageError:
            return XipImageError(self.path, reason)

        raw = os.pread(self._fd, 1024, layout.SUPERBLOCK_AT)
        if len(raw) < 1024:
            raise bad("is no ext2 image: too short for a superblock")
        sb = Superblock.parse(raw)
        if sb.magic != layout.MAGIC:
            raise bad(f"is no ext2 image: magic {sb.magic:#06x} instead of {layout.MAGIC:#06x}")
        if sb.log_block_size != 2:
            has = format_size(1024 << sb.log_block_size) if sb.log_block_size < 7 else "an impossible size"
            raise bad(f"has blocks of {has}; XIP needs 4K, one page (mke2fs -b 4096)")
        unknown = sb.incompat & ~_KNOWN_INCOMPAT
        if unknown:
            raise bad(f"has the feature {_names(unknown, layout.INCOMPAT_NAMES)}: it is not ext2 (mke2fs -t ext2)")
        unknown = sb.ro_compat & ~_KNOWN_RO_COMPAT
        if unknown and not self.read_only:
            raise bad(f"can only be read: it has the feature {_names(unknown, layout.RO_COMPAT_NAMES)}")
        length = os.fstat(self._fd).st_size
        if sb.blocks_count * BLOCK > length:
            raise bad(f"is cut short: {length} bytes, and its superblock says {sb.blocks_count * BLOCK}")
        if sb.first_data_block != 0 or not 0 < sb.blocks_per_group <= 8 * BLOCK or sb.blocks_count < 2:
            raise bad("has a superblock that makes no sense: its blocks")
        size, per_group = sb.inode_size, sb.inodes_per_group
        if not layout.GOOD_OLD_INODE_SIZE <= size <= BLOCK or size & (size - 1):
            raise bad(f"has a superblock that makes no sense: inodes of {size} bytes")
        groups = -(-sb.blocks_count // sb.blocks_per_group)
        if not 0 < per_group <= 8 * BLOCK or sb.inodes_count != groups * per_group or sb.first_ino > sb.inodes_count:
            raise bad("has a superblock that makes no sense: its inodes")
        if (1 + groups * layout.GROUP_SIZE // BLOCK) >= sb.blocks_count:
            raise bad("has a superblock that makes no sense: its groups")
        return sb

    def _read_groups(self) -> list[Group]:
        sb = self.sb
        table = -(-sb.inodes_per_group * sb.inode_size // BLOCK)
        groups = []
        for number in range(-(-sb.blocks_count // sb.blocks_per_group)):
            at = self._group_at(number)
            group = Group.parse(bytes(self.bytes[at : at + layout.GROUP_SIZE]))
            for first, count in ((group.block_bitmap, 1), (group.inode_bitmap, 1), (group.inode_table, table)):
                if not 0 < first <= sb.blocks_count - count:
                    raise XipImageError(self.path, f"group {number} names blocks that it does not have: {first}")
            groups.append(group)
        self._metadata = {0, *range(1, 1 + -(-len(groups) * layout.GROUP_SIZE // BLOCK))}
        self._metadata.update(group.block_bitmap for group in groups)
        self._metadata.update(group.inode_bitmap for group in groups)
        self._tables = {group.inode_table: table for group in groups}
        return groups

    def close(self) -> None:
        """Puts the image away; it counts as clean again if it was. A second call does nothing."""
        if self._fd < 0:
            return
        self._mark_clean(True)
        if self.clean and not self.memory.private:
            self._put32(layout.SUPERBLOCK_AT + layout.S_WTIME, self.now() & 0xFFFF_FFFF)
        self._unmap()

    def _freeze(self) -> None:
        self._mark_clean(True)
        self.sync()

    def _mark_clean(self, clean: bool) -> None:
        """Whether the image says that it was put away properly, if it said so when it was opened."""
        if self.clean and not self.memory.private:
            state = self.sb.state if clean else self.sb.state & ~layout.VALID_FS
            self._put16(layout.SUPERBLOCK_AT + layout.S_STATE, state)

    def _unmap(self) -> None:
        self.bytes.release()
        self.memory.close()
        close_image(self._fd)
        self._fd = -1

    # ---- numbers in the image

    def get16(self, at: int) -> int:
        """The 16-bit number at byte ``at``."""
        value: int = layout.U16(self.bytes, at)[0]
        return value

    def get32(self, at: int) -> int:
        """The 32-bit number at byte ``at``."""
        value: int = layout.U32(self.bytes, at)[0]
        return value

    def _put16(self, at: int, value: int) -> None:
        self.bytes[at : at + 2] = value.to_bytes(2, "little")

    def _put32(self, at: int, value: int) -> None:
        self.bytes[at : at + 4] = value.to_bytes(4, "little")

    def _put_bytes(self, at: int, data: bytes) -> None:
        self.bytes[at : at + len(data)] = data

    def put16(self, at: int, value: int) -> None:
        """Changes the 16-bit number at byte ``at``. Raises MmError EROFS."""
        self.may_write()
        self._put16(at, value)

    def put32(self, at: int, value: int) -> None:
        """Changes the 32-bit number at byte ``at``. Raises MmError EROFS."""
        self.may_write()
        self._put32(at, value)

    def put_numbers(self, at: int, numbers: range) -> None:
        """Changes the 32-bit numbers from byte ``at`` on. Raises MmError EROFS."""
        self.may_write()
        self._put_bytes(at, struct.pack(f"<{len(numbers)}I", *numbers))

    def may_write(self) -> None:
        """Raises MmError EROFS where nothing may change."""
        if self.read_only:
            raise MmError(errno.EROFS, self.path)

    # ---- blocks

    def check_block(self, block: int, what: str, owner: str) -> int:
        """``block``, which the image says is ``what`` of ``owner``, if that can be. Raises MmError EUCLEAN."""
        if 0 < block < self.sb.blocks_count and block not in self._metadata:
            table = self.groups[block // self.sb.blocks_per_group].inode_table
            if not table <= block < table + self._tables[table]:
                return block
        raise corrupt(f"{self.path}: {what} of {owner} is block {block:#x}, which is no file's")

    def check_run(self, first: int, what: str, owner: str) -> int:
        """As :meth:`check_block` for the 512 blocks from ``first`` on."""
        per_group, run = self.sb.blocks_per_group, range(first, first + HUGE_PAGES)
        if run.start > 0 and run.stop <= self.sb.blocks_count and self._metadata.isdisjoint(run):
            groups = self.groups[run.start // per_group : (run.stop - 1) // per_group + 1]
            tables = [(group.inode_table, self._tables[group.inode_table]) for group in groups]
            if not any(table < run.stop and run.start < table + count for table, count in tables):
                return first
        raise corrupt(f"{self.path}: {what} of {owner} are the {HUGE_PAGES} from {first:#x} on, not all of them files'")

    def pfn(self, block: int) -> Pfn:
        """The frame of a block."""
        return self.memory.pfn(block)

    def block(self, block: int) -> memoryview:
        """The bytes of a block, writable."""
        return self.bytes[block * BLOCK : (block + 1) * BLOCK]

    @property
    def free_blocks(self) -> int:
        """How many blocks are nobody's, as the superblock has it."""
        return self.get32(layout.SUPERBLOCK_AT + layout.S_FREE_BLOCKS)

    def allocate_block(self, goal: int) -> int:
        """A block that was free, filled with zeros, from ``goal`` on if it can be. Raises MmError ENOSPC, EROFS."""
        self.may_write()
        per_group, count = self.sb.blocks_per_group, len(self.groups)
        first = goal // per_group % count
        for n in range(count + 1):
            number = (first + n) % count
            start = goal % per_group if n == 0 else 0
            bit = self._take_bit(self.groups[number].block_bitmap, start, self._group_blocks(number))
            if bit is not None:
                block = number * per_group + bit
                try:
                    self._back(self.check_block(block, "a free block", f"group {number}"))
                except MmError:
                    self._clear_bit(self.groups[number].block_bitmap, bit)
                    raise
                self._count(number, layout.BG_FREE_BLOCKS, layout.S_FREE_BLOCKS, -1)
                self.host.write(self.pfn(block), 0, bytes(BLOCK))
                return block
        raise MmError(errno.ENOSPC, f"{self.path}: no block is free")

    def allocate_run(self, goal: int) -> int:
        """The first of 512 blocks that were free, filled with zeros: one piece, whose frames could be a huge page's.

        From ``goal`` on if it can be. Raises MmError ENOSPC, EROFS.
        """
        self.may_write()
        per_group, count = self.sb.blocks_per_group, len(self.groups)
        first = goal // per_group % count
        for n in range(count + 1):
            number = (first + n) % count
            bit = self._find_run(number, goal % per_group if n == 0 else 0)
            if bit is not None:
                block = self.check_run(number * per_group + bit, "free blocks", f"group {number}")
                bitmap = self.groups[number].block_bitmap
                self._back_once(bitmap)
                self._back(block, HUGE_PAGES)
                at, shift = bitmap * BLOCK + bit // 8, bit & 7
                used = int.from_bytes(self.bytes[at : at + _run_bytes(shift)], "little") | _RUN << shift
                self._put_bytes(at, used.to_bytes(_run_bytes(shift), "little"))
                self._count(number, layout.BG_FREE_BLOCKS, layout.S_FREE_BLOCKS, -HUGE_PAGES)
                for page in range(block, block + HUGE_PAGES):
                    self.host.write(self.pfn(page), 0, bytes(BLOCK))
                return block
        raise MmError(errno.ENOSPC, f"{self.path}: no {HUGE_PAGES} blocks are free in one piece")

    def _find_run(self, number: int, start: int) -> int | None:
        """The first of 512 clear bits of a group's bitmap, from ``start`` on, whose frame is that of a huge page."""
        if self.get16(self._group_at(number) + layout.BG_FREE_BLOCKS) < HUGE_PAGES:
            return None
        bits = self._group_blocks(number)
        data = bytes(self.block(self.groups[number].block_bitmap))
        first = start + -self.pfn(number * self.sb.blocks_per_group + start) % HUGE_PAGES
        for bit in range(first, bits - HUGE_PAGES + 1, HUGE_PAGES):
            at, shift = bit // 8, bit & 7
            if not int.from_bytes(data[at : at + _run_bytes(shift)], "little") >> shift & _RUN:
                return bit
        return None

    def release_block(self, block: int) -> None:
        """``block`` is nobody's any more."""
        number, bit = divmod(block, self.sb.blocks_per_group)
        if self._clear_bit(self.groups[number].block_bitmap, bit):
            self._count(number, layout.BG_FREE_BLOCKS, layout.S_FREE_BLOCKS, 1)

    def _back(self, block: int, count: int = 1) -> None:
        """Has the host make room for blocks from ``block`` on. Raises MmError ENOSPC and what its file system has."""
        if self.memory.private:
            return
        try:
            allocate(self._fd, FALLOC_FL_KEEP_SIZE, block * BLOCK, count * BLOCK)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # there nobody can make room ahead
                raise MmError(error.errno or errno.EIO, f"{self.path}: block {block:#x} on the host's disk") from None

    def _back_once(self, block: int) -> None:
        """As :meth:`_back`, for one that is never given back."""
        if block not in self._backed:
            self._back(block)
            self._backed.add(block)

    def _group_blocks(self, number: int) -> int:
        return min(self.sb.blocks_per_group, self.sb.blocks_count - number * self.sb.blocks_per_group)

    def _take_bit(self, bitmap: int, start: int, bits: int) -> int | None:
        """Sets the first clear one of the bits ``[start, bits)``; None when there is none. Raises MmError ENOSPC."""
        self._back_once(bitmap)
        data = bytes(self.block(bitmap)[: (bits + 7) // 8])
        at = start // 8
        while True:
            found = _NOT_FULL.search(data, at)
            if found is None:
                return None
            at = found.start()
            for bit in range(max(at * 8, start), min(at * 8 + 8, bits)):
                if not data[at] >> (bit & 7) & 1:
                    self.bytes[bitmap * BLOCK + at] = data[at] | 1 << (bit & 7)
                    return bit
            at += 1

    def _clear_bit(self, bitmap: int, bit: int) -> bool:
        at = bitmap * BLOCK + bit // 8
        was = bool(self.bytes[at] >> (bit & 7) & 1)
        self.bytes[at] &= ~(1 << (bit & 7)) & 0xFF
        return was

    def _group_at(self, number: int) -> int:
        return BLOCK + number * layout.GROUP_SIZE

    def _count(self, number: int, in_group: int, in_superblock: int, delta: int) -> None:
        at = self._group_at(number) + in_group
        self._put16(at, self.get16(at) + delta & 0xFFFF)
        if in_superblock:
            at = layout.SUPERBLOCK_AT + in_superblock
            self._put32(at, self.get32(at) + delta & 0xFFFF_FFFF)

    # ---- inodes

    def inode_at(self, number: int) -> int:
        """The byte at which inode ``number`` begins. Raises MmError EUCLEAN."""
        if not 1 <= number <= self.sb.inodes_count:
            raise corrupt(f"{self.path}: there is no inode {number}")
        group, index = divmod(number - 1, self.sb.inodes_per_group)
        return self.groups[group].inode_table * BLOCK + index * self.sb.inode_size

    def inode(self, number: int) -> Ext2Inode:
        """Inode ``number``, one object for each. Raises MmError EUCLEAN, ESTALE (nobody's)."""
        from xipvm.xip.ext2.inode import Ext2Inode

        found = self._inodes.get(number)
        if found is None:
            at = self.inode_at(number)
            if number != layout.ROOT_INO and number < self.sb.first_ino:
                raise corrupt(f"{self.path}: inode {number} is reserved")
            if not self.get16(at + layout.I_MODE) or not self.get16(at + layout.I_LINKS):
                raise MmError(errno.ESTALE, f"{self.path}: inode {number} is nobody's")
            found = self._inodes[number] = Ext2Inode(self, number, at)
        return found

    def allocate_inode(self, mode: int, parent: int) -> Ext2Inode:
        """A new inode of type and rights ``mode``. It counts as deleted until it has links. Raises ENOSPC, EROFS."""
        from xipvm.xip.ext2.inode import Ext2Inode

        self.may_write()
        count = len(self.groups)
        first = (parent - 1) // self.sb.inodes_per_group
        for n in range(count):
            group = (first + n) % count
            reserved = self.sb.first_ino - 1 if group == 0 else 0
            bit = self._take_bit(self.groups[group].inode_bitmap, reserved, self.sb.inodes_per_group)
            if bit is None:
                continue
            number = group * self.sb.inodes_per_group + bit + 1
            at = self.inode_at(number)
            try:
                self._back_once(at // BLOCK)
            except MmError:
                self._clear_bit(self.groups[group].inode_bitmap, bit)
                raise
            generation = self.get32(at + layout.I_GENERATION)
            self.bytes[at : at + self.sb.inode_size] = bytes(self.sb.inode_size)
            self._put32(at + layout.I_GENERATION, generation + 1 & 0xFFFF_FFFF)  # it is not the file before it
            now = self.now() & 0xFFFF_FFFF
            struct.pack_into("<3I", self.bytes, at + layout.I_ATIME, now, now, now)
            self._put16(at + layout.I_MODE, mode)
            self._count(group, layout.BG_FREE_INODES, layout.S_FREE_INODES, -1)
            if mode & layout.S_IFMT == layout.S_IFDIR:
                self._count(group, layout.BG_USED_DIRS, 0, 1)
            inode = self._inodes[number] = Ext2Inode(self, number, at)
            return inode
        raise MmError(errno.ENOSPC, f"{self.path}: no inode is free")

    def release_inode(self, inode: Ext2Inode) -> None:
        """``inode``, which has no block and no name any more, is nobody's."""
        self.may_write()
        at = inode.at
        is_dir = inode.is_dir
        self._put16(at + layout.I_LINKS, 0)
        self._put32(at + layout.I_DTIME, max(self.now() & 0xFFFF_FFFF, 1))
        group, bit = divmod(inode.number - 1, self.sb.inodes_per_group)
        if self._clear_bit(self.groups[group].inode_bitmap, bit):
            self._count(group, layout.BG_FREE_INODES, layout.S_FREE_INODES, 1)
        if is_dir:
            self._count(group, layout.BG_USED_DIRS, 0, -1)
        self._inodes.pop(inode.number, None)

    def note_large_file(self) -> None:
        """Some file has 2 GiB or more."""
        at = layout.SUPERBLOCK_AT + layout.S_RO_COMPAT
        self.put32(at, self.get32(at) | layout.RO_COMPAT_LARGE_FILE)

    def sync(self) -> None:
        """Waits until the host's kernel has written the image. Raises MmError EIO."""
        try:
            self.memory.sync()
        except OSError as error:
            raise MmError(error.errno or errno.EIO, f"sync of {self.path}") from None

    def block_of(self, pfn: int) -> int:
        """The block that a frame is."""
        return self.memory.page(pfn)


def _run_bytes(shift: int) -> int:
    """In how many bytes of a bitmap the bits of 2 MiB are that begin at bit ``shift`` of the first."""
    return (shift + HUGE_PAGES + 7) // 8


def _names(bits: int, known: dict[int, str]) -> str:
    return ", ".join(known.get(1 << n, f"{1 << n:#x}") for n in range(32) if bits >> n & 1)


assert BLOCK == 1 << PAGE_SHIFT
