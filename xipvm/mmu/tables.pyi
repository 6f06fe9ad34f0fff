"""Page tables: radix trees of 512 entries a table over page numbers; see tables.pyx for the invariants.

An entry is a u64: zero is empty, bit 7 makes it a 2 MiB entry, bits 12..51 are the pfn.
"""

from typing import Any

import numpy

from xipvm.address import Pfn
from xipvm.mmu.frames import HostMemory

class PageTable:
    """``levels`` 3 holds 2**27 pages, 4 holds 2**36. Pages outside raise IndexError."""

    levels: int
    present: int
    tables: int
    mmio_generation: int
    """Of secondary tables: MMIO entries that were made in another generation say nothing to a walker."""
    def __init__(self, levels: int) -> None: ...
    def get(self, index: int) -> int:
        """The entry that maps page ``index``, a huge one included; 0 when empty."""

    def pte(self, index: int) -> int:
        """As :meth:`get`, but of a huge entry what it says of this one page: the page's own pfn, and HUGE."""

    def set(self, index: int, entry: int) -> int:
        """Stores ``entry`` (0 clears it) and returns the old one. A huge entry wants its first page as index.

        InternalError when that would put a small entry under a huge one or the reverse.
        """

    def cmpxchg(self, index: int, old: int, new: int) -> bool:
        """Stores ``new`` if the entry is ``old``; whether it was."""

    def pmd_none(self, index: int) -> bool:
        """Whether the aligned 512 pages around ``index`` have neither entries nor a huge one."""

    def huge(self, index: int) -> int:
        """The huge entry that maps page ``index``, 0 if none does."""

    def split_huge(self, index: int, first: int, step: int = 1) -> None:
        """Puts 512 small entries in place of the huge one over ``index``: ``first``, then each pfn ``step`` further.

        Counts of frames are the caller's business. InternalError when there is no huge entry.
        """

    def detach(self, index: int) -> list[int]:
        """Takes away the 512 entries around ``index``, which it returns ([] when all were empty). None is huge."""

    def attach(self, index: int, entries: list[int]) -> None:
        """Puts back what :meth:`detach` took; nothing may be there."""

    def next_present(self, start: int, end: int) -> int:
        """First page of [start, end) with an entry, -1 if none."""

    def entries(self, start: int, end: int) -> list[tuple[int, int]]:
        """(page, entry) of all entries that overlap [start, end); a huge one with its first page."""

    def zap(self, start: int, end: int, runs: bool = True) -> list[tuple[int, int]]:
        """Clears all entries that overlap [start, end).

        Returns runs of their pfns (MMIO entries have none), [] unless ``runs``.
        """

    def clear_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        """Clears ``mask`` in entries that have all bits of ``where``; how many changed."""

    def clear_bits_of(self, first: int, bitmap: bytes, mask: int, where: int = 0) -> int:
        """Clears ``mask`` in the entries of those pages from ``first`` on whose bits are set in ``bitmap``.

        Only in entries that have all bits of ``where``; how many changed.
        """

    def set_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        """Sets ``mask`` in entries that have all bits of ``where``; how many changed."""

    def change_bits(self, start: int, end: int, clear: int, set: int, where: int = 0) -> int:
        """Clears, then sets bits in entries that have all bits of ``where``; how many changed."""

    def table_view(self, index: int) -> numpy.ndarray[Any, Any] | None:
        """The 512 entries of the leaf table over page ``index`` as a shared u64 array; None without one."""

    def gup(self, index: int, write: bool) -> GupPage | None:
        """The page behind a present primary PTE, None where a fault is needed. Sets accessed; ``write``: dirty, too."""

    def map_anon(self, index: int, flags: int, host: HostMemory, mapping: int, offset: int) -> int:
        """Maps a new zeroed frame, exclusive, with ``flags`` and that rmap root; its pfn, -1 if an entry is there.

        Raises OutOfFrames.
        """

    def protect(
        self, start: int, end: int, rights: int, upgrade: int = 0, segments: bool = False
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """Gives the mapped primary PTEs ``rights`` (PRESENT or PROTNONE, WRITE, EXEC) in place of those they have.

        WRITE as well where all bits of ``upgrade`` (not 0) are set. Returns how many changed that a TLB may hold
        and, if ``segments`` and something changed, (start, end, flags) of ranges whose mapped entries agree.
        """

    def copy_to(
        self,
        child: PageTable,
        start: int,
        end: int,
        host: HostMemory,
        cow: bool,
        segments: bool = False,
        swaps: list[int] | None = None,
    ) -> list[tuple[int, int, int]]:
        """Copies the primary PTEs, mapped ones with a reference and a mapcount; ``cow`` takes WRITE and EXCLUSIVE.

        The slots of swap entries are appended to ``swaps``: each has one entry more now.
        Returns segments of this table, as ``protect`` does.
        """

    def zap_mapped(
        self,
        start: int,
        end: int,
        gather: Gather,
        runs: bool = True,
        keep_anon: bool = False,
        keep_markers: bool = False,
    ) -> tuple[int, list[tuple[int, int]]]:
        """Clears the primary PTEs of [start, end); how many mapped a page, and runs of the pfns, [] unless ``runs``.

        Each counted frame loses a mapcount, takes over the dirty and accessed bits (file pages) and goes into
        ``gather``. ``keep_anon`` leaves private copies alone, ``keep_markers`` markers. Swap and migration entries go,
        too; the slots of the former are left in ``gather.swaps``. A huge entry goes as a whole.

        This, ``protect`` and ``copy_to`` raise InternalError when a huge entry is only in part in the range.
        """

class GupPage:
    """What get_user_pages found: the frame, and whether the primary entry allows writing to it."""

    pfn: Pfn
    writable: bool
    def __init__(self, pfn: int, writable: bool) -> None: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

class Gather:
    """Pages whose last reference is dropped only after the primary TLB flush; one entry for each mapping that went."""

    count: int
    swaps: list[int] | None
    def __init__(self, host: HostMemory) -> None: ...
    def add_page(self, pfn: int) -> None: ...
    def pages(self) -> list[int]: ...
    def free_all(self, runs: bool = True) -> list[tuple[int, int]]:
        """Puts every gathered frame once and empties the gather; runs of the frames that became free."""
