"""A file of an ext2 volume: its blocks by page, its size and times.

Blocks 0 to 11 of a file are named in its inode, others by indirect blocks, up to three of them one after another. A
block number 0 is a hole. A branch is allocated whole, filled in from its end, and then linked at one place.

2 MiB at once are named at two places at most, in indirect blocks that are there by then; they are used and filled with
zeros before the first is named. Whoever is cut short has some of them, and loses the others.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from stat import S_ISGID, S_ISUID, S_IXGRP
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import Pfn
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.xip.ext2 import layout
from xipvm.xip.ext2.layout import BLOCK, PER_BLOCK
from xipvm.xip.ext2.volume import corrupt
from xipvm.xip.inode import HOLE, Identity, XipInode

if TYPE_CHECKING:
    from xipvm.xip.ext2.volume import Ext2Image

_ROOTS: Final = tuple(
    (slot, PER_BLOCK**depth, depth)
    for slot, depth in [
        *((n, 0) for n in range(layout.NDIR_BLOCKS)),
        (layout.IND_BLOCK, 1),
        (layout.DIND_BLOCK, 2),
        (layout.TIND_BLOCK, 3),
    ]
)
"""Of each block number in the inode: its slot, how many pages it stands for, and behind how many indirect blocks."""
_SECTORS: Final = BLOCK // 512
_RUN: Final = f"<{HUGE_PAGES}I"
"""The block numbers of 2 MiB."""
MAX_BYTES: Final = min((12 + PER_BLOCK + PER_BLOCK**2 + PER_BLOCK**3) * BLOCK, ((1 << 32) - 1) * 512)
"""How large a file can be: i_blocks counts sectors of 512 bytes."""


class Ext2Inode(XipInode):
    """Inode ``number`` of ``image``, whose 128 or more bytes begin at byte ``at`` of it."""

    max_bytes = MAX_BYTES

    def __init__(self, image: Ext2Image, number: int, at: int) -> None:
        self.image = image
        self.sb = image.super_block
        self.number = number
        self.at = at
        self.name = f"inode {number}"

    @property
    def identity(self) -> Identity:
        """See the base."""
        image, at = self.image, layout.SUPERBLOCK_AT + layout.S_UUID
        uuid = bytes(image.bytes[at : at + 16]).hex()
        generation = image.get32(self.at + layout.I_GENERATION)
        return Identity(image.path, uuid, self.number, generation, image.memory.first)

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """See the base."""
        return self.image.read_only

    @property
    def mode(self) -> int:
        """Type and rights, as ``st_mode`` has them."""
        return self.image.get16(self.at + layout.I_MODE)

    @property
    def is_dir(self) -> bool:
        """It is a directory."""
        return self.mode & layout.S_IFMT == layout.S_IFDIR

    @property
    def is_file(self) -> bool:
        """It is a regular file."""
        return self.mode & layout.S_IFMT == layout.S_IFREG

    @property
    def is_symlink(self) -> bool:
        """It is a symbolic link."""
        return self.mode & layout.S_IFMT == layout.S_IFLNK

    @property
    def links(self) -> int:
        """How many names it has."""
        return self.image.get16(self.at + layout.I_LINKS)

    @links.setter
    def links(self, count: int) -> None:
        self.image.put16(self.at + layout.I_LINKS, count)

    @property
    def mtime(self) -> int:
        """When it was last written, seconds since 1970."""
        return self.image.get32(self.at + layout.I_MTIME)

    @property
    def blocks(self) -> int:
        """How many sectors of 512 bytes it has, indirect blocks included."""
        return self.image.get32(self.at + layout.I_BLOCKS)

    @property
    def size(self) -> int:
        """Bytes."""
        mode, low, high = layout.SIZE(self.image.bytes, self.at)
        size: int = low | high << 32 if mode & layout.S_IFMT == layout.S_IFREG else low
        return size

    def set_size(self, size: int) -> None:
        """See the base."""
        if size > self.max_bytes:
            raise MmError(errno.EFBIG, f"{self.name} with {size} bytes")
        self.image.put32(self.at + layout.I_SIZE, size & 0xFFFF_FFFF)
        if self.is_file:
            self.image.put32(self.at + layout.I_SIZE_HIGH, size >> 32)
            if size >> 31:
                self.image.note_large_file()

    def accessed(self) -> None:
        """See the base; not while nothing may change (touch_atime)."""
        if not self.read_only and self.sb.writers.attempt():
            self.image.put32(self.at + layout.I_ATIME, self.image.now() & 0xFFFF_FFFF)
            self.sb.writers.leave()

    def modified(self) -> None:
        """See the base."""
        now = self.image.now() & 0xFFFF_FFFF
        self.image.put32(self.at + layout.I_MTIME, now)
        self.image.put32(self.at + layout.I_CTIME, now)

    def drop_privileges(self) -> None:
        """See the base: S_ISUID goes, and S_ISGID where it is no mark of mandatory locking."""
        mode = self.mode
        gone = S_ISUID | (S_ISGID if mode & S_IXGRP else 0)
        if mode & gone:
            self.image.put16(self.at + layout.I_MODE, mode & ~gone)

    def sync(self) -> None:
        """See the base."""
        self.image.sync()

    # ---- blocks

    def get_xip_mem(self, pgoff: int, *, create: bool) -> Pfn:
        """See the base. EUCLEAN when the image names a block that cannot be."""
        path = _path(pgoff)
        block = self._find(path)
        if not block and create:
            point("xip.allocate")
            block = self._find(path) or self._allocate(path, self._goal(pgoff))
        if not block:
            raise MmError(errno.ENODATA, f"page {pgoff:#x} of {self.name}")
        return self.image.pfn(block)

    def find(self, pgoff: int) -> Pfn | None:
        """See the base. EUCLEAN as above."""
        block = self._find(_path(pgoff))
        return Pfn(self.image.memory.first + block) if block else None

    def _slot(self, index: int) -> int:
        """The byte at which block number ``index`` of the inode is."""
        return self.at + layout.I_BLOCK + 4 * index

    def _find(self, path: tuple[int, ...]) -> int:
        """The block at the end of ``path``, 0 for a hole."""
        image, number = self.image, layout.U32
        data, check = image.bytes, image.check_block
        block: int = number(data, self.at + layout.I_BLOCK + 4 * path[0])[0]
        for index in path[1:]:
            if not block:
                return 0
            block = number(data, check(block, "an indirect block", self.name) * BLOCK + 4 * index)[0]
        return check(block, "a block", self.name) if block else 0

    def _allocate(self, path: tuple[int, ...], goal: int) -> int:
        """Gives the end of ``path``, a hole, a block, with the indirect ones on the way. Raises MmError ENOSPC."""
        image = self.image
        link, rest = self._slot(path[0]), path[1:]
        while rest and image.get32(link):
            link, rest = image.get32(link) * BLOCK + 4 * rest[0], rest[1:]
        branch: list[int] = []
        try:
            for _ in range(len(rest) + 1):
                branch.append(image.allocate_block(goal))
                goal = branch[-1] + 1
        except MmError:
            for block in branch:
                image.release_block(block)
            raise
        for above, index, below in zip(branch, rest, branch[1:], strict=False):
            image.put32(above * BLOCK + 4 * index, below)
        image.put32(self.at + layout.I_BLOCKS, self.blocks + _SECTORS * len(branch))
        image.put32(link, branch[0])
        return branch[-1]

    def find_huge(self, pgoff: int) -> Pfn | None:
        """See the base."""
        image = self.image
        places = [(self._place(path), count) for path, count in _pieces(pgoff)]
        numbers = b"".join(bytes(image.bytes[at : at + 4 * count]) if at else bytes(4 * count) for at, count in places)
        first: int = layout.U32(numbers)[0]
        if not first:
            return None if any(numbers) else HOLE
        last: int = layout.U32(numbers, 4 * (HUGE_PAGES - 1))[0]
        if image.pfn(first) % HUGE_PAGES or last != first + HUGE_PAGES - 1:
            return None
        if numbers != struct.pack(_RUN, *range(first, last + 1)):
            return None
        return image.pfn(image.check_run(first, "blocks", self.name))

    def create_huge(self, pgoff: int) -> Pfn | None:
        """See the base."""
        self.image.may_write()
        point("xip.allocate")
        if self.find_huge(pgoff) != HOLE:
            return None
        try:
            return self._allocate_huge(pgoff, self._goal(pgoff))
        except MmError as error:
            if error.errno != errno.ENOSPC:
                raise
            return None

    def _allocate_huge(self, pgoff: int, goal: int) -> Pfn:
        image = self.image
        first = image.allocate_run(goal)
        try:
            places = [(self._place(path) or self._make_place(path, goal), count) for path, count in _pieces(pgoff)]
        except MmError:
            for block in range(first, first + HUGE_PAGES):
                image.release_block(block)
            self.free_blocks(pgoff, pgoff + HUGE_PAGES)  # the indirect ones that there was room for
            raise
        image.put32(self.at + layout.I_BLOCKS, self.blocks + _SECTORS * HUGE_PAGES)
        block = first
        for at, count in places:
            image.put_numbers(at, range(block, block + count))
            block += count
        return image.pfn(first)

    def _place(self, path: tuple[int, ...]) -> int:
        """The byte at which the block number at the end of ``path`` is; 0 when an indirect block is missing."""
        if len(path) == 1:
            return self._slot(path[0])
        table = self._find(path[:-1])
        return table * BLOCK + 4 * path[-1] if table else 0

    def _make_place(self, path: tuple[int, ...], goal: int) -> int:
        """The same where one is missing, which there is then. Raises MmError ENOSPC."""
        start = goal - goal % self.image.sb.blocks_per_group  # not where other 2 MiB could be
        return self._allocate(path[:-1], start) * BLOCK + 4 * path[-1]

    def _goal(self, pgoff: int) -> int:
        """Where a block for page ``pgoff`` would best be: behind that of the page before it."""
        before = self._find(_path(pgoff - 1)) if pgoff else 0
        if before:
            return before + 1
        group = (self.number - 1) // self.image.sb.inodes_per_group
        return group * self.image.sb.blocks_per_group

    def free_blocks(self, first: int, end: int) -> list[Pfn]:
        """See the base. EUCLEAN when an indirect block is met twice."""
        self.image.may_write()
        seen: set[int] = set()
        freed: list[Pfn] = []
        start = 0
        for slot, pages, depth in _ROOTS:
            if start < end and first < start + pages:
                freed += self._free_below(self._slot(slot), depth, start, first, end, seen)
            start += pages
        return freed

    def _free_below(self, link: int, depth: int, start: int, first: int, end: int, seen: set[int]) -> list[Pfn]:
        """Frees what lies in ``[first, end)`` of the pages from ``start`` on behind the number at byte ``link``."""
        image = self.image
        block = image.get32(link)
        if not block:
            return []
        image.check_block(block, "a block", self.name)
        if depth == 0:
            self._unlink(link, block)
            return [image.pfn(block)]
        if block in seen:
            raise corrupt(f"{image.path}: block {block:#x} of {self.name} is met twice")
        seen.add(block)
        freed: list[Pfn] = []
        pages = PER_BLOCK ** (depth - 1)
        for index in _used(image.block(block)):
            at = start + index * pages
            if at < end and first < at + pages:
                freed += self._free_below(block * BLOCK + 4 * index, depth - 1, at, first, end, seen)
        if not any(image.block(block)):
            self._unlink(link, block)
        return freed

    def _unlink(self, link: int, block: int) -> None:
        self.image.put32(link, 0)
        self.image.put32(self.at + layout.I_BLOCKS, max(self.blocks - _SECTORS, 0))
        self.image.release_block(block)

    def extents(self) -> Iterator[tuple[int, int, int]]:
        """Its blocks as runs of (first page, first block, count), ascending. Raises MmError EUCLEAN."""
        run: tuple[int, int, int] | None = None
        for page, block in self._walk():
            if run is not None and run[0] + run[2] == page and run[1] + run[2] == block:
                run = (run[0], run[1], run[2] + 1)
                continue
            if run is not None:
                yield run
            run = (page, block, 1)
        if run is not None:
            yield run

    def _walk(self) -> Iterator[tuple[int, int]]:
        seen: set[int] = set()
        start = 0
        for slot, pages, depth in _ROOTS:
            yield from self._walk_below(self.image.get32(self._slot(slot)), depth, start, seen)
            start += pages

    def _walk_below(self, block: int, depth: int, start: int, seen: set[int]) -> Iterator[tuple[int, int]]:
        image = self.image
        if not block:
            return
        image.check_block(block, "a block", self.name)
        if depth == 0:
            yield start, block
            return
        if block in seen:
            raise corrupt(f"{image.path}: block {block:#x} of {self.name} is met twice")
        seen.add(block)
        for index in _used(image.block(block)):
            below = image.get32(block * BLOCK + 4 * index)
            yield from self._walk_below(below, depth - 1, start + index * PER_BLOCK ** (depth - 1), seen)

    def link_target(self) -> bytes:
        """Where a symbolic link leads. Raises MmError."""
        size = self.size
        if size < 60 and not self.blocks:
            return bytes(self.image.bytes[self._slot(0) : self._slot(0) + size])
        if size > BLOCK:
            raise corrupt(f"{self.image.path}: {self.name} is a link of {size} bytes")
        block = self._find((0,))
        return bytes(self.image.block(block)[:size]) if block else b""


def blocks_for(pages: Iterable[int]) -> int:
    """How many blocks a file with data in ``pages`` has, those counted that lead to them. Raises MmError EFBIG."""
    data = 0
    leading: set[tuple[int, ...]] = set()
    for page in pages:
        path = _path(page)
        data += 1
        leading.update(path[:depth] for depth in range(1, len(path)))
    return data + len(leading)


def most_blocks_for(size: int) -> int:
    """At least as many as a file of ``size`` bytes can have."""
    data = -(-size // BLOCK)
    return data + data // PER_BLOCK + data // PER_BLOCK**2 + 6  # of each depth one that is not full, and those above


def _path(pgoff: int) -> tuple[int, ...]:
    """Which block number in the inode leads to page ``pgoff``, and which in each indirect block. Raises EFBIG."""
    if pgoff < layout.NDIR_BLOCKS:
        return (pgoff,)
    rest = pgoff - layout.NDIR_BLOCKS
    if rest < PER_BLOCK:
        return layout.IND_BLOCK, rest
    rest -= PER_BLOCK
    if rest < PER_BLOCK**2:
        return (layout.DIND_BLOCK, *divmod(rest, PER_BLOCK))
    rest -= PER_BLOCK**2
    if rest < PER_BLOCK**3:
        high, rest = divmod(rest, PER_BLOCK**2)
        return (layout.TIND_BLOCK, high, *divmod(rest, PER_BLOCK))
    raise MmError(errno.EFBIG, f"page {pgoff:#x} of an ext2 file")


def _pieces(pgoff: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """The 2 MiB from page ``pgoff`` on: what leads to the first page of each piece that has its numbers side by side,
    and how many pages it has. Raises EFBIG."""
    end = pgoff + HUGE_PAGES
    while pgoff < end:
        path = _path(pgoff)
        count = min(end - pgoff, layout.NDIR_BLOCKS - pgoff if len(path) == 1 else PER_BLOCK - path[-1])
        yield path, count
        pgoff += count


def _used(block: memoryview) -> list[int]:
    """The indices of block numbers that are not 0."""
    return [index for index, number in enumerate(block.cast("I")) if number]
