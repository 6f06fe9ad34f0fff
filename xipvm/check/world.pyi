"""What the events so far say of the world: primary entries, shadow entries, TLBs, ranges that are open.

This is state only; oracle.py asks it and judges. Page numbers throughout: a page of an mm is its hva >> 12. See
world.pyx.
"""

from collections.abc import Iterable
from typing import Final, overload

from xipvm.trace.table import Table

WRITE: Final = 2
"""The bit of a primary entry's flags that allows writing (mmu/pte.py)."""
GONE: Final = 1024
"""How many address spaces, and VMs, are known before those that are gone are forgotten."""

class Numbers(Table):
    """A number by page number: what of a dictionary's ways the rules need."""

    def __getitem__(self, key: int) -> int: ...
    def __setitem__(self, key: int, value: int) -> None: ...
    @overload  # type: ignore[override]
    def get(self, key: int) -> int | None: ...
    @overload
    def get(self, key: int, default: int) -> int:
        """The number of ``key``."""
    @overload  # type: ignore[override]
    def pop(self, key: int) -> int | None: ...
    @overload
    def pop(self, key: int, default: int | None) -> int | None:
        """The number of ``key``, which is there no longer."""

class Area:
    """A memslot: guest frames ``[gfn, gfn + pages)`` are the host's pages from ``page`` on."""

    def __init__(self, gfn: int, pages: int, page: int) -> None: ...
    gfn: Final[int]
    pages: Final[int]
    page: Final[int]

class Range:
    """A range that was announced and has not ended. Pages, half-open."""

    def __init__(self, id: int, mm: str, start: int, end: int, actor: str, seq: int, cause: int) -> None: ...
    id: Final[int]
    mm: Final[str]
    start: Final[int]
    end: Final[int]
    seq: Final[int]
    cause: Final[int]
    """What its operation is done for, as all of that operation's events say."""
    actor: str
    returned: bool
    """Every notifier has been told."""
    inside: set[int]
    """Until then: what its start has caused, by way of others too, its own event first."""
    young: set[int]
    """Pages whose shadow entries, used since somebody last asked, its start has removed."""
    owed: list[tuple[Vm, int, Entry]]
    """Entries of pinned pages that changed in it, with their guest frames: they may stay until its end has returned."""

class Entry:
    """A translation that somebody holds."""

    def __init__(self, pfn: int, write: bool, seq: int, young: bool = True) -> None: ...
    pfn: Final[int]
    seq: Final[int]
    """The event that put it there."""
    write: bool
    young: bool
    """It was used since it was last made to miss."""

class Vm:
    """A secondary MMU with shadow entries by guest frame."""

    def __init__(self, name: str) -> None: ...
    name: Final[str]
    mm: str | None
    """The mm that it is a notifier of."""
    gone: bool
    """It was, and is not any more."""
    slots: Final[dict[int, Area]]
    sptes: Final[dict[int, Entry]]
    chiplets: Final[dict[int, dict[int, Entry]]]
    """What its TLBs have that are filled by drop-ins, by number: for such a one, all there is."""
    huge: Final[dict[int, int]]
    """First guest frame and length of its entries that map many."""
    pins: Final[dict[int, int]]
    """Frames that it holds references to, by guest frame; see pins.py."""

    def tables(self) -> tuple[dict[int, Entry], ...]:
        """All of its entries by guest frame: the shadow entries, and those of each of its TLBs."""
    def zapped(self, start: int, end: int) -> tuple[int, int]:
        """What goes when ``[start, end)`` is removed: huge entries go as a whole."""
    def gfns(self, page: int) -> list[int]:
        """Where the guest sees the host's ``page``."""
    def page(self, gfn: int) -> int | None:
        """The host's page behind ``gfn``."""

class Process:
    """An mm: its entries by page, flags as in ``pte_set``; and the TLBs of its threads."""

    def __init__(self, name: str, protocol: str = "modern") -> None: ...
    name: Final[str]
    protocol: str
    dead: bool
    """It was told to end."""
    entries: Final[dict[int, tuple[int, int]]]
    notifiers: Final[set[str]]
    intervals: Final[set[str]]
    tlbs: Final[dict[str, dict[int, Entry]]]
    """By thread, by page."""
    devices: Final[dict[str, dict[int, Entry]]]
    """The TLBs of devices that follow the host's: by device, by page."""
    iotlbs: Final[dict[str, dict[int, Entry]]]
    """Likewise of those that say themselves what they have forgotten."""
    aged: Final[set[int]]
    """Pages that a secondary MMU has used, and was made to forget: whoever did that has to say so."""
    cleared: tuple[int, int]
    """The page whose entry was the last to be cleared by itself, and the frame that it mapped."""

    def mapped(self, start: int, end: int) -> list[int]:
        """The pages of ``[start, end)`` that have an entry, in no order."""
    @property
    def idle(self) -> bool:
        """Nothing is left of it but its name."""

class World:
    """Everything that the events have said. Names that were never announced come into being when they are used."""

    mms: Final[dict[str, Process]]
    vms: Final[dict[str, Vm]]
    tlbs: Final[dict[int, dict[int, Entry]]]
    """By vCPU, by guest frame."""
    open: Final[dict[tuple[str, int], Range]]
    """By mm and number, which is the mm's own."""
    swapped: Final[dict[int, tuple[str, int]]]
    """Frames whose content has to be in a swap slot when they are freed: for which mm and page."""
    freed: Final[Numbers]
    """Frames on the free list, and the event that put them there."""
    written: Final[Numbers]
    """Frames that a secondary MMU may have written since they were last saved, and the event that let it."""
    holders: Final[Numbers]
    """How many shadow and TLB entries translate to a frame; none are left out."""

    def mm(self, name: str) -> Process:
        """The mm ``name``."""
    def vm(self, name: str) -> Vm:
        """The secondary MMU ``name``."""
    def covering(self, mm: str, page: int) -> list[Range]:
        """The open ranges that contain ``page``."""
    def watchers(self, mm: str) -> Iterable[Vm]:
        """The secondary MMUs that are notifiers of ``mm``."""
    def hold(self, table: dict[int, Entry], key: int, entry: Entry) -> int:
        """``table[key] = entry``."""
    def release(self, table: dict[int, Entry], key: int) -> int:
        """``del table[key]``, if it is there."""
    def release_range(self, table: dict[int, Entry], start: int, end: int) -> int:
        """:meth:`release` of ``[start, end)``."""
    def release_all(self, table: dict[int, Entry]) -> int:
        """:meth:`release` of everything."""
    def who_holds(self, pfn: int) -> list[str]:
        """Everybody who translates to ``pfn``, in words."""
