"""What the events so far say of the world: primary entries, shadow entries, TLBs, ranges that are open.

This is state only; oracle.py asks it and judges. Page numbers throughout: a page of an mm is its hva >> 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from xipvm.trace.events import Event

WRITE = 1 << 1
"""The bit of a primary entry's flags that allows writing (mmu/pte.py)."""


@dataclass(slots=True)
class Area:
    """A memslot: guest frames ``[gfn, gfn + pages)`` are the host's pages from ``page`` on."""

    gfn: int
    pages: int
    page: int


@dataclass(slots=True)
class Range:
    """A range that was announced and has not ended. Pages, half-open."""

    id: int
    mm: str
    start: int
    end: int
    actor: str
    seq: int
    cause: int
    """What its operation is done for, as all of that operation's events say."""
    returned: bool = False
    """Every notifier has been told."""
    inside: set[int] = field(default_factory=set)
    """Until then: what its start has caused, by way of others too, its own event first."""
    young: set[int] = field(default_factory=set)
    """Pages whose shadow entries, used since somebody last asked, its start has removed."""
    owed: list[tuple[Vm, int, Entry]] = field(default_factory=list)
    """Entries of pinned pages that changed in it, with their guest frames: they may stay until its end has returned."""


@dataclass(slots=True)
class Change:
    """In 2008: an entry that changed outside of every range, so that its notifiers have to be told of the page."""

    mm: str
    page: int
    pfn: int
    actor: str
    event: Event
    told: int = 0
    """The event that tells them."""


@dataclass(slots=True)
class Entry:
    """A translation that somebody holds."""

    pfn: int
    write: bool
    seq: int
    """The event that put it there."""
    young: bool = True
    """It was used since it was last made to miss."""


@dataclass(slots=True)
class Vm:
    """A secondary MMU with shadow entries by guest frame."""

    name: str
    mm: str | None = None
    """The mm that it is a notifier of."""
    gone: bool = False
    """It was, and is not any more."""
    slots: dict[int, Area] = field(default_factory=dict)
    sptes: dict[int, Entry] = field(default_factory=dict)
    chiplets: dict[int, dict[int, Entry]] = field(default_factory=dict)
    """What its TLBs have that are filled by drop-ins, by number: for such a one, all there is."""
    huge: dict[int, int] = field(default_factory=dict)
    """First guest frame and length of its entries that map many."""
    pins: dict[int, int] = field(default_factory=dict)
    """Frames that it holds references to, by guest frame; see pins.py."""

    def tables(self) -> tuple[dict[int, Entry], ...]:
        """All of its entries by guest frame: the shadow entries, and those of each of its TLBs."""
        return self.sptes, *self.chiplets.values()

    def zapped(self, start: int, end: int) -> tuple[int, int]:
        """What goes when ``[start, end)`` is removed: huge entries go as a whole."""
        for first in [first for first, pages in self.huge.items() if first < end and start < first + pages]:
            pages = self.huge.pop(first)
            start, end = min(start, first), max(end, first + pages)
        return start, end

    def gfns(self, page: int) -> Iterator[int]:
        """Where the guest sees the host's ``page``."""
        for slot in self.slots.values():
            offset = page - slot.page
            if 0 <= offset < slot.pages:
                yield slot.gfn + offset

    def page(self, gfn: int) -> int | None:
        """The host's page behind ``gfn``."""
        for slot in self.slots.values():
            if 0 <= gfn - slot.gfn < slot.pages:
                return slot.page + gfn - slot.gfn
        return None


@dataclass(slots=True)
class Process:
    """An mm: its entries by page, flags as in ``pte_set``; and the TLBs of its threads."""

    name: str
    protocol: str = "modern"
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)
    notifiers: set[str] = field(default_factory=set)
    intervals: set[str] = field(default_factory=set)
    tlbs: dict[str, dict[int, Entry]] = field(default_factory=dict)
    """By thread, by page."""
    devices: dict[str, dict[int, Entry]] = field(default_factory=dict)
    """The TLBs of devices that follow the host's: by device, by page."""
    iotlbs: dict[str, dict[int, Entry]] = field(default_factory=dict)
    """Likewise of those that say themselves what they have forgotten."""
    aged: set[int] = field(default_factory=set)
    """Pages that a secondary MMU has used, and was made to forget: whoever did that has to say so."""
    cleared: tuple[int, int] = (-1, 0)
    """The page whose entry was the last to be cleared by itself, and the frame that it mapped."""

    def mapped(self, start: int, end: int) -> list[int]:
        """The pages of ``[start, end)`` that have an entry, in no order."""
        if end - start > len(self.entries):
            return [page for page in self.entries if start <= page < end]
        return [page for page in range(start, end) if page in self.entries]


class World:
    """Everything that the events have said. Names that were never announced come into being when they are used."""

    def __init__(self) -> None:
        self.mms: dict[str, Process] = {}
        self.vms: dict[str, Vm] = {}
        self.tlbs: dict[int, dict[int, Entry]] = {}
        """By vCPU, by guest frame."""
        self.open: dict[tuple[str, int], Range] = {}
        """By mm and number, which is the mm's own."""
        self.freed: dict[int, int] = {}
        """Frames on the free list, and the event that put them there."""
        self.written: dict[int, int] = {}
        """Frames that a secondary MMU may have written since they were last saved, and the event that let it."""
        self.swapped: dict[int, tuple[str, int]] = {}
        """Frames whose content has to be in a swap slot when they are freed: for which mm and page."""
        self.holders: dict[int, int] = {}
        """How many shadow and TLB entries translate to a frame; none are left out."""

    def mm(self, name: str) -> Process:
        """The mm ``name``."""
        found = self.mms.get(name)
        if found is None:
            found = self.mms[name] = Process(name)
        return found

    def vm(self, name: str) -> Vm:
        """The secondary MMU ``name``."""
        found = self.vms.get(name)
        if found is None:
            found = self.vms[name] = Vm(name)
        return found

    def covering(self, mm: str, page: int) -> Iterator[Range]:
        """The open ranges that contain ``page``."""
        for opened in self.open.values():
            if opened.start <= page < opened.end and opened.mm == mm:
                yield opened

    def watchers(self, mm: str) -> Iterator[Vm]:
        """The secondary MMUs that are notifiers of ``mm``."""
        for vm in self.vms.values():
            if vm.mm == mm:
                yield vm

    def hold(self, table: dict[int, Entry], key: int, entry: Entry) -> None:
        """``table[key] = entry``."""
        before = table.get(key)
        if before is not None:
            self._drop(before.pfn)
        table[key] = entry
        self.holders[entry.pfn] = self.holders.get(entry.pfn, 0) + 1

    def release(self, table: dict[int, Entry], key: int) -> None:
        """``del table[key]``, if it is there."""
        before = table.pop(key, None)
        if before is not None:
            self._drop(before.pfn)

    def release_range(self, table: dict[int, Entry], start: int, end: int) -> None:
        """:meth:`release` of ``[start, end)``."""
        keys = [key for key in table if start <= key < end] if end - start > len(table) else range(start, end)
        for key in keys:
            self.release(table, key)

    def release_all(self, table: dict[int, Entry]) -> None:
        """:meth:`release` of everything."""
        for entry in table.values():
            self._drop(entry.pfn)
        table.clear()

    def _drop(self, pfn: int) -> None:
        left = self.holders[pfn] - 1
        if left:
            self.holders[pfn] = left
        else:
            del self.holders[pfn]

    def who_holds(self, pfn: int) -> list[str]:
        """Everybody who translates to ``pfn``, in words."""
        found = [
            f"{vm.name} maps guest frame {gfn:#x} to it since #{entry.seq}"
            for vm in self.vms.values()
            for table in vm.tables()
            for gfn, entry in table.items()
            if entry.pfn == pfn
        ]
        found += [
            f"vcpu{vcpu} has guest frame {gfn:#x} in its TLB since #{entry.seq}"
            for vcpu, tlb in self.tlbs.items()
            for gfn, entry in tlb.items()
            if entry.pfn == pfn
        ]
        found += [
            f"{device} on {process.name} has {page << 12:#x} in its TLB since #{entry.seq}"
            for process in self.mms.values()
            for device, tlb in (*process.devices.items(), *process.iotlbs.items())
            for page, entry in tlb.items()
            if entry.pfn == pfn
        ]
        found += [
            f"{thread} of {process.name} has {page << 12:#x} in its TLB since #{entry.seq}"
            for process in self.mms.values()
            for thread, tlb in process.tlbs.items()
            for page, entry in tlb.items()
            if entry.pfn == pfn
        ]
        return found
