"""The tables of shadow paging: entries by guest frame, and below each the shadow entries that were made of it.

A :class:`Root` maps guest virtual pages for one role. What it has for a page is the entry of a guest frame with fewer
rights, those that the guest's own tables give. *Whatever is taken from the entry of a guest frame is taken from the
shadow entries below it in the same step*: that is :class:`GfnTable`, and its ``rmap`` is how they are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from xipvm.mmu.secondary.guest_walk import Role
from xipvm.mmu.secondary.spte import SPTE_MMU_WRITABLE, SPTE_PRESENT, SPTE_WRITE
from xipvm.mmu.tables import PageTable

INDEX_BITS: Final = 36
"""Of an address those from 12 on by which a root is looked up; the others are in its role."""
INDEX_LIMIT: Final = 1 << INDEX_BITS
LEAF_SHIFT: Final = 12
ENTRIES: Final = 512


@dataclass(slots=True)
class ShadowEntry:
    """What one shadow entry was made of."""

    gfn: int
    at: int
    """gpa of the guest's entry."""
    value: int
    """What that was."""


@dataclass(slots=True, eq=False)
class ShadowPage:
    """A page of the guest's tables that shadow entries of ``root`` were made of."""

    root: Root
    gfn: int
    shift: int
    """Each of its entries is for ``1 << shift`` bytes of addresses."""
    base: int
    """The page that its first entry is for; below 0 when a smaller table begins further up in it."""
    top: bool
    """The walk begins here."""
    writes: int = 0
    """How often the guest has written to it since it was last walked."""

    def pages_of(self, offset: int, size: int) -> tuple[int, int]:
        """The pages ``[first, last)`` that its bytes ``[offset, offset + size)`` are for."""
        span = 1 << self.shift - LEAF_SHIFT
        first = self.base + offset // 8 * span
        last = self.base + ((offset + size - 1) // 8 + 1) * span
        return max(0, min(first, INDEX_LIMIT)), max(0, min(last, INDEX_LIMIT))


@dataclass(slots=True, eq=False)
class Root:
    """The shadow entries of one role."""

    number: int
    role: Role
    sptes: PageTable = field(default_factory=lambda: PageTable(4))
    """By page of the virtual address."""
    gfns: PageTable = field(default_factory=lambda: PageTable(4))
    """The guest frame of each, in bits 12 and up; bit 0 is set."""
    made_of: dict[int, ShadowEntry] = field(default_factory=dict)
    pages: dict[tuple[int, int], ShadowPage] = field(default_factory=dict)
    """By shift and base."""
    obsolete: bool = False
    """Nobody looks at it any more; nothing may be put into it."""


class GfnTable(PageTable):
    """Entries by guest frame with the shadow entries below them."""

    def __init__(self, levels: int) -> None:
        super().__init__()  # type: ignore[call-arg]  # the extension type takes its arguments when it is made
        self.rmap: dict[int, list[tuple[Root, int]]] = {}
        """Root and page of every shadow entry, by guest frame."""

    # ---- one shadow entry

    def put(self, root: Root, index: int, entry: ShadowEntry, spte: int) -> None:
        """Have ``root`` map page ``index`` by ``spte``, which was made of ``entry``. None of another frame is there."""
        if index not in root.made_of:
            self.link(root, index, entry.gfn)
        root.made_of[index] = entry
        root.gfns.set(index, entry.gfn << LEAF_SHIFT | 1)
        root.sptes.set(index, spte)

    def link(self, root: Root, index: int, gfn: int) -> None:
        """Page ``index`` of ``root`` maps ``gfn``: what happens to that happens to it."""
        self.rmap.setdefault(gfn, []).append((root, index))

    def drop(self, root: Root, index: int) -> None:
        """Remove what ``root`` has for page ``index``."""
        gfn = root.made_of.pop(index).gfn
        root.sptes.set(index, 0)
        root.gfns.set(index, 0)
        below = self.rmap.get(gfn, [])
        if (root, index) in below:
            below.remove((root, index))
            if not below:
                del self.rmap[gfn]

    def _below(self, start: int, end: int) -> list[int]:
        """The guest frames of the range that have shadow entries."""
        rmap = self.rmap
        if end - start < len(rmap):
            return [gfn for gfn in range(start, end) if gfn in rmap]
        return [gfn for gfn in rmap if start <= gfn < end]

    def drop_below(self, start: int, end: int) -> None:
        """Remove the shadow entries of guest frames ``[start, end)``."""
        for gfn in self._below(start, end):
            for root, index in list(self.rmap.get(gfn, ())):
                self.drop(root, index)

    def _take(self, start: int, end: int, mask: int) -> None:
        if mask & ~(SPTE_WRITE | SPTE_MMU_WRITABLE):
            self.drop_below(start, end)
            return
        for gfn in self._below(start, end):
            for root, index in self.rmap[gfn]:
                root.sptes.clear_bits(index, index + 1, mask, SPTE_PRESENT)

    # ---- what takes from entries of guest frames

    def zap(self, start: int, end: int, runs: bool = True) -> list[tuple[int, int]]:
        """See PageTable."""
        self.drop_below(start, end)
        return super().zap(start, end, runs)

    def clear_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        """See PageTable. ``mask`` has what guests may do."""
        self._take(start, end, mask)
        return super().clear_bits(start, end, mask, where)

    def clear_bits_of(self, first: int, bitmap: bytes, mask: int, where: int = 0) -> int:
        """See PageTable."""
        for gfn in self._below(first, first + 8 * len(bitmap)):
            at = gfn - first
            if bitmap[at >> 3] >> (at & 7) & 1:
                self._take(gfn, gfn + 1, mask)
        return super().clear_bits_of(first, bitmap, mask, where)

    def change_bits(self, start: int, end: int, clear: int, set: int, where: int = 0) -> int:
        """See PageTable."""
        self.drop_below(start, end)
        return super().change_bits(start, end, clear, set, where)
