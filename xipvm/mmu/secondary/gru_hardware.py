"""The hardware of a GRU: chiplets with a TLB each, address space numbers (ASIDs), and fault handles.

A chiplet translates what its *contexts* access by its TLB alone. An entry belongs to an ASID, which an mm has on a
chiplet; nothing reaches what is under an ASID that nobody has any more, so a new one is an empty TLB.

An access that misses stalls, and its *fault handle* (TFH) says why: page, ASID, whether it writes. Software reads the
handle, looks the page up, and *drops in* an entry, with which the access goes on. **An invalidation that hits the page
between the reading and the drop-in makes the hardware discard the drop-in**: the access misses again. That, and no
sequence number, is what closes the race of a drop-in against an invalidation.

One command invalidates ``GRUMAXINVAL`` pages at most; what is asked for beyond them is left as it was.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_EXEC, SPTE_PRESENT, SPTE_READ, SPTE_WRITE
from xipvm.mmu.tables import PageTable

GRUMAXINVAL: Final = 1024
"""Pages that one invalidate command covers."""
CHIPLETS: Final = 2
"""Of a blade; a context is on the one of its number modulo this."""
CONTEXTS: Final = 16
"""That a chiplet can have loaded."""
FIRST_ASID: Final = 8
ASID_INC: Final = 8
ASID_LIMIT: Final = 1 << 24

_READABLE: Final = SPTE_PRESENT | SPTE_READ | SPTE_EXEC


class TfhState(Enum):
    """What a fault handle is about."""

    IDLE = "idle"
    EXCEPTION = "exception"
    """The access waits for software, which has had an interrupt."""
    POLLING = "polling"
    """It waits until its user asks for help: the interrupt could not serve it."""


class Tfh:
    """The fault handle of one context."""

    __slots__ = ("asid", "discarded", "page", "state", "write")

    def __init__(self) -> None:
        self.state = TfhState.IDLE
        self.page = 0
        self.asid = 0
        self.write = False
        self.discarded = False
        """An invalidation has hit the page since the handle was read."""

    def miss(self, page: int, asid: int, write: bool) -> None:
        """The context's access of ``page`` stalls."""
        self.state, self.page, self.asid, self.write = TfhState.EXCEPTION, page, asid, write
        self.discarded = False

    def read(self) -> bool:
        """Software looks at it: from here on invalidations are noticed. False when nothing waits."""
        self.discarded = False
        return self.state is not TfhState.IDLE


class AddressSpace:
    """What one mm has on one chiplet: its ASID there, what the TLB has under it, and its contexts that are loaded."""

    __slots__ = ("asid", "chiplet", "handles", "loaded", "tlb")

    def __init__(self, chiplet: Chiplet) -> None:
        self.chiplet = chiplet
        self.asid = 0
        """0: the chiplet has forgotten the mm."""
        self.loaded: set[int] = set()
        """Numbers of contexts."""
        self.handles: list[Tfh] = []
        self.tlb = PageTable(3)
        """What is under the present ASID, by page, in the form of shadow entries."""

    def entry(self, page: int) -> tuple[int, bool] | None:
        """Frame and writability of what the TLB has for ``page``."""
        entry = self.tlb.get(page) if 0 <= page < GFN_LIMIT else 0
        return (entry >> PFN_SHIFT, bool(entry & SPTE_WRITE)) if entry else None

    def drop_in(self, tfh: Tfh, asid: int, pfn: int, write: bool) -> bool:
        """Give the stalled access of ``tfh`` an entry. False when the hardware has discarded it; it goes on anyway."""
        waits, tfh.state = tfh.state is not TfhState.IDLE, TfhState.IDLE
        if not waits or tfh.discarded or asid != self.asid or not asid:
            return False
        self.tlb.set(tfh.page, pfn << PFN_SHIFT | _READABLE | (SPTE_WRITE if write else 0))
        return True

    def invalidate(self, page: int, count: int) -> list[tuple[int, int]]:
        """The command: at most GRUMAXINVAL pages from ``page`` on are forgotten. Runs of the frames that they had."""
        end = page + min(count, GRUMAXINVAL)
        for tfh in self.handles:
            if page <= tfh.page < end:
                tfh.discarded = True
        return self.tlb.zap(page, end, True)

    def forget(self) -> list[tuple[int, int]]:
        """The mm has no ASID here any more, so what was under it is out of reach. Runs of the frames."""
        self.asid = 0
        return self.tlb.zap(0, GFN_LIMIT, True)


class Chiplet:
    """One chiplet."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._spaces: list[AddressSpace] = []
        self._next = FIRST_ASID

    def join(self) -> AddressSpace:
        """Another mm."""
        space = AddressSpace(self)
        self._spaces.append(space)
        return space

    def leave(self, space: AddressSpace) -> None:
        """An mm goes that has forgotten everything."""
        self._spaces.remove(space)

    @property
    def full(self) -> bool:
        """No further context can be loaded."""
        return sum(len(space.loaded) for space in self._spaces) >= CONTEXTS

    def new_asid(self) -> int:
        """A number under which the TLB has nothing. One that was given up comes back when all others were used."""
        used = {space.asid for space in self._spaces}
        while True:
            asid, self._next = self._next, self._next + ASID_INC
            if self._next >= ASID_LIMIT:
                self._next = FIRST_ASID
            if asid not in used:
                return asid
