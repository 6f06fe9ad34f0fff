"""Page tables: radix trees of 512 entries a table over page numbers; see tables.pyx for the invariants.

An entry is a u64: zero is empty, bit 7 makes it a 2 MiB entry, bits 12..51 are the pfn.
"""

from typing import Any

import numpy

from xipvm.mmu.frames import HostMemory

class PageTable:
    """``levels`` 3 holds 2**27 pages, 4 holds 2**36. Pages outside raise IndexError."""

    levels: int
    present: int
    tables: int
    def __init__(self, levels: int) -> None: ...
    def get(self, index: int) -> int:
        """The entry that maps page ``index``, a huge one included; 0 when empty."""

    def set(self, index: int, entry: int) -> int:
        """Stores ``entry`` (0 clears it) and returns the old one. A huge entry wants its first page as index.

        InternalError when that would put a small entry under a huge one or the reverse.
        """

    def cmpxchg(self, index: int, old: int, new: int) -> bool:
        """Stores ``new`` if the entry is ``old``; whether it was."""

    def next_present(self, start: int, end: int) -> int:
        """First page of [start, end) with an entry, -1 if none."""

    def entries(self, start: int, end: int) -> list[tuple[int, int]]:
        """(page, entry) of all entries that overlap [start, end); a huge one with its first page."""

    def zap(self, start: int, end: int) -> list[tuple[int, int]]:
        """Clears all entries that overlap [start, end); runs of their pfns (MMIO entries have none)."""

    def clear_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        """Clears ``mask`` in entries that have all bits of ``where``; how many changed."""

    def set_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        """Sets ``mask`` in entries that have all bits of ``where``; how many changed."""

    def change_bits(self, start: int, end: int, clear: int, set: int, where: int = 0) -> int:
        """Clears, then sets bits in entries that have all bits of ``where``; how many changed."""

    def table_view(self, index: int) -> numpy.ndarray[Any, Any] | None:
        """The 512 entries of the leaf table over page ``index`` as a shared u64 array; None without one."""

    def zap_mapped(
        self, start: int, end: int, gather: Gather, runs: bool = True, keep_anon: bool = False
    ) -> list[tuple[int, int]]:
        """Clears the primary PTEs of [start, end); runs of their pfns, [] unless ``runs``.

        Each counted frame loses a mapcount, takes over the dirty and accessed bits (file pages) and goes into
        ``gather``. ``keep_anon`` leaves private copies alone. No huge entry may be in the range.
        """

class Gather:
    """Frames whose last reference is dropped only after the primary TLB flush."""

    count: int
    def __init__(self, host: HostMemory) -> None: ...
    def add_page(self, pfn: int) -> None: ...
    def pages(self) -> list[int]: ...
    def free_all(self, runs: bool = True) -> list[tuple[int, int]]:
        """Puts every gathered frame once and empties the gather; runs of the frames that became free."""
