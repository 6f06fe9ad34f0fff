"""Memslots: which guest frames are backed by which host virtual addresses.

Every change of the memslots begins a new *generation*; while one is under way, the number carries
``UPDATE_IN_PROGRESS``. What somebody has cached under another generation (MMIO entries, gfn_to_pfn caches) says nothing
any more.

A slot maps guest frames ``[gfn, gfn_end)`` to the bytes ``[hva, hva_end)`` of the VM's mm. Slots never overlap in guest
frames; two may show the same bytes. Host mappings behind a slot may be smaller than it, or missing: that shows only
when a guest access faults. Errors are those of KVM_SET_USER_MEMORY_REGION.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, Hva
from xipvm.errors import MmError

MEM_LOG_DIRTY_PAGES = 1 << 0
"""KVM_MEM_LOG_DIRTY_PAGES: which pages the guest may have written is kept, for KVM_GET_DIRTY_LOG."""
MEM_READONLY = 1 << 1
"""KVM_MEM_READONLY: reads are memory, a write is an MMIO access."""
MEM_ROMD = 1 << 16
"""The slot shows a ROM device: like READONLY, and when the host cannot give the page (flash that is in a command mode),
reads are MMIO accesses too."""

MEM_FLAGS = MEM_LOG_DIRTY_PAGES | MEM_READONLY | MEM_ROMD

MAX_SLOTS = 32764
"""KVM_USER_MEM_SLOTS of x86: slot numbers are below it."""
GFN_LIMIT = 1 << 27
"""Guest physical addresses have 39 bits, which is what three levels of sptes map."""
HVA_LIMIT = 1 << 47
UPDATE_IN_PROGRESS = 1 << 63
"""KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS: in a generation, that readers may still see the memslots of the one before."""


class Memslot:
    """One slot. ``invalid``: it is being deleted or moved, and faults in it have to be retried.

    ``logged``: what the guest writes is kept track of. ``dirty_bitmap`` is where: bit n (of byte n // 8) for the slot's
    n-th page; None without logging, and where dirty rings have it alone.
    """

    __slots__ = (
        "dirty_bitmap",
        "flags",
        "gfn",
        "gfn_end",
        "hva",
        "hva_end",
        "id",
        "invalid",
        "logged",
        "pages",
        "readonly",
        "romd",
    )

    def __init__(self, id: int, gfn: Gfn, pages: int, hva: Hva, flags: int) -> None:
        self.id = id
        self.gfn = gfn
        self.pages = pages
        self.hva = hva
        self.flags = flags
        self.gfn_end = gfn + pages
        self.hva_end = hva + (pages << PAGE_SHIFT)
        self.readonly = bool(flags & (MEM_READONLY | MEM_ROMD))
        self.romd = bool(flags & MEM_ROMD)
        self.logged = bool(flags & MEM_LOG_DIRTY_PAGES)
        self.invalid = False
        self.dirty_bitmap: bytearray | None = None

    def __repr__(self) -> str:
        return f"<memslot {self.id}: gfn {self.gfn:#x}..{self.gfn_end:#x} at hva {self.hva:#x}, flags {self.flags:#x}>"

    def hva_of(self, gfn: Gfn) -> Hva:
        """Host virtual address of the first byte of ``gfn``, which lies in the slot."""
        return Hva(self.hva + ((gfn - self.gfn) << PAGE_SHIFT))

    def start_log(self, old: Memslot | None, *, initially_set: bool = False) -> None:
        """Give a logged slot its dirty bitmap: that of ``old``, which it replaces, or a new one.

        A new one is clean, or with ``initially_set`` names every page.
        """
        if self.logged:
            kept = old.dirty_bitmap if old is not None else None
            if kept is None:
                every = (1 << self.pages) - 1 if initially_set else 0
                kept = bytearray(every.to_bytes(self.pages + 7 >> 3, "little"))
            self.dirty_bitmap = kept

    def mark_dirty(self, gfn: int) -> None:
        """``gfn``, which lies in the slot, may be written from now on. The slot is logged."""
        bitmap, page = self.dirty_bitmap, gfn - self.gfn
        if bitmap is not None:
            bitmap[page >> 3] |= 1 << (page & 7)


_NOWHERE = Memslot(-1, Gfn(0), 0, Hva(0), 0)


class Memslots:
    """The slots of a VM, by guest frame. Changed by the VM only, under its rules for open invalidations."""

    __slots__ = ("_bases", "_by_gfn", "_by_id", "_last", "generation")

    def __init__(self) -> None:
        self.generation = 0
        self._by_id: dict[int, Memslot] = {}
        self._by_gfn: list[Memslot] = []
        self._bases: list[int] = []
        self._last = _NOWHERE

    def __len__(self) -> int:
        return len(self._by_gfn)

    def __iter__(self) -> Iterator[Memslot]:
        """By ascending guest frame."""
        return iter(self._by_gfn)

    def get(self, id: int) -> Memslot | None:
        """The slot called ``id``."""
        return self._by_id.get(id)

    def find(self, gfn: int) -> Memslot | None:
        """The slot that backs ``gfn``; the last one found is tried first."""
        slot = self._last
        if slot.gfn <= gfn < slot.gfn_end:
            return slot
        at = bisect_right(self._bases, gfn) - 1
        if at >= 0:
            slot = self._by_gfn[at]
            if gfn < slot.gfn_end:
                self._last = slot
                return slot
        return None

    def in_hva_range(self, start: int, end: int) -> list[tuple[int, int]]:
        """The guest frames, as half-open ranges, that show a byte of ``[start, end)``; one range for each slot."""
        ranges = []
        for slot in self._by_gfn:
            hva = slot.hva
            if hva < end and start < slot.hva_end:
                first = slot.gfn if start <= hva else slot.gfn + ((start - hva) >> PAGE_SHIFT)
                last = slot.gfn_end if end >= slot.hva_end else slot.gfn + ((end - hva + PAGE_SIZE - 1) >> PAGE_SHIFT)
                ranges.append((first, last))
        return ranges

    def check(self, new: Memslot) -> Memslot | None:
        """Whether ``new`` may be set; the slot of the same number that it would change, None if there is none.

        Raises MmError: EINVAL for unknown flags, a bad slot number, no pages, an unaligned or too large range, or
        a change of size, host address or another flag than the dirty log's; EEXIST when another slot has one of its
        guest frames.
        """
        if new.flags & ~MEM_FLAGS:
            raise MmError(errno.EINVAL, f"memslot {new.id}: flags {new.flags & ~MEM_FLAGS:#x} are unknown")
        if not 0 <= new.id < MAX_SLOTS:
            raise MmError(errno.EINVAL, f"memslot {new.id}: numbers are 0 to {MAX_SLOTS - 1}")
        if new.pages <= 0:
            raise MmError(errno.EINVAL, f"memslot {new.id}: {new.pages} pages")
        if new.gfn < 0 or new.gfn_end > GFN_LIMIT:
            raise MmError(errno.EINVAL, f"memslot {new.id}: guest frames end at {GFN_LIMIT:#x}")
        if new.hva & ~PAGE_MASK or new.hva < 0 or new.hva_end > HVA_LIMIT:
            raise MmError(errno.EINVAL, f"memslot {new.id}: host address {new.hva:#x} is unaligned or out of range")
        old = self._by_id.get(new.id)
        if old is not None and (
            (old.pages, old.hva) != (new.pages, new.hva) or (old.flags ^ new.flags) & ~MEM_LOG_DIRTY_PAGES
        ):
            raise MmError(
                errno.EINVAL,
                f"memslot {new.id}: only its guest frame and dirty logging can be changed; delete it first",
            )
        for slot in self._by_gfn:
            if slot is not old and slot.gfn < new.gfn_end and new.gfn < slot.gfn_end:
                raise MmError(errno.EEXIST, f"memslot {new.id} overlaps {slot!r}")
        return old

    def insert(self, slot: Memslot) -> None:
        """Add a checked slot; replaces the one of the same number."""
        self.remove(slot.id)
        at = bisect_right(self._bases, slot.gfn)
        self._by_gfn.insert(at, slot)
        self._bases.insert(at, slot.gfn)
        self._by_id[slot.id] = slot

    def remove(self, id: int) -> None:
        """Take the slot called ``id`` away, if there is one."""
        slot = self._by_id.pop(id, None)
        if slot is not None:
            at = self._by_gfn.index(slot)
            del self._by_gfn[at], self._bases[at]
            if self._last is slot:
                self._last = _NOWHERE
