"""A base for secondary MMUs that have a table: the protocol is here, the table is a driver's own.

What a driver has to supply is abstract, and is called in the right order, under the lock, so that there is little left
to get wrong: entries are set, cleared and looked up, and the device's TLBs are flushed. What it may not override is the
protocol. What it says of itself is not taken from it: after each call the table is asked, and the oracle told what it
answers, so that an entry that was to go and did not is known.

The protocol. ``lock`` spins, and protects the table, how many ranges are open and how many have ended. A fault cannot
hold it while it looks the page up, which sleeps::

    count of ended ranges read → page looked up → lock → give up if a range is open or one has ended → entry → unlock

Start of a range that touches a window: lock → one more is open → entries cleared → *TLBs flushed* → unlock. End: lock →
one more has ended, one less is open → unlock. Ageing, for want of accessed bits: entries are cleared, and whether there
were any is the answer. Release: nothing is entered any more → all entries cleared, TLBs flushed.

An entry is writable only for an access that writes, and its page is dirty from then on.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final, final

from xipvm.actors import give_way, point
from xipvm.errors import GuestAccessError, MmError
from xipvm.locks import LockClass, RwLock
from xipvm.mmu.secondary.base import FAULT, RETRY_WALK, WRITE
from xipvm.mmu.secondary.device import DeviceMmu
from xipvm.notifier import MmuNotifierRange, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

TABLE_LOCK: Final = LockClass("lock of a device's table", spins=True)
_PROTOCOL: Final = (
    "fault",
    "invalidate_range_start",
    "invalidate_range_end",
    "clear_flush_young",
    "clear_young",
    "test_young",
    "release",
)


class TableMmu(DeviceMmu):
    """The secondary MMU ``name`` whose pages ``[0, pages)`` are the bytes of ``mm`` from ``hva`` on.

    Made when the table is: it is told of changes at once. Raises MmError as :meth:`map_window` and ``register``.
    """

    def __init_subclass__(cls) -> None:
        for name in _PROTOCOL:
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name}: that is the protocol, which TableMmu has")

    def __init__(self, mm: Mm, hva: int, pages: int, *, name: str = "dev0") -> None:
        super().__init__(mm, name=name)
        self._lock = RwLock(f"lock of {name}", TABLE_LOCK)
        self._open = 0
        self._ended = 0
        self._closed = False
        self.map_window(hva, pages)
        self.register()

    # ---- what a driver supplies

    @abstractmethod
    def set_entry(self, page: int, pfn: int, *, write: bool) -> None:
        """Put an entry for ``page`` into the table, in place of what is there. Under the lock."""

    @abstractmethod
    def clear_entries(self, first: int, last: int) -> None:
        """Remove every entry of pages ``[first, last)``. Under the lock."""

    @abstractmethod
    def flush_tlbs(self) -> None:
        """Have every TLB of the device forget everything; done when it returns. Under the lock: it may not sleep."""

    # ---- what a device uses

    def entry(self, page: int, access: int) -> tuple[int, bool]:
        """Frame and writability of ``page`` for an ``access``, faulted in if need be. Good until the next point.

        Raises GuestAccessError where there is no memory.
        """
        point("table.access")
        while True:
            seen = self.translate(page)
            if seen is not None and (seen[1] or access != WRITE):
                return seen
            if self.fault(page, access) == FAULT:
                raise GuestAccessError(page, self.last_error)
            give_way("table.retry")

    # ---- the protocol

    @final
    def fault(self, page: int, access: int) -> int:
        """See the module."""
        ended = self._ended
        self.looking_up(page)
        hva = self.hva_of(page)
        if hva is None or self._closed:
            self.last_error = f"{self.name} has no page {page:#x}" if hva is None else f"{self.name} is closed"
            return FAULT
        point("table.fault.counted")
        try:
            found = self.mm.get_user_pages(hva, write=access == WRITE)
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        point("table.fault.looked_up")
        with self._lock.write:
            if not (self._closed or self._open or self._ended != ended):
                if access == WRITE:
                    self.set_page_dirty(found.pfn)
                self.set_entry(page, found.pfn, write=access == WRITE)
                seen = self.translate(page)
                if seen is not None:
                    self.installed(page, seen[0], write=seen[1])
        return RETRY_WALK

    def _clear(self, first: int, last: int) -> bool:
        """Whether entries of pages ``[first, last)`` were there, which no TLB has any more either. Under the lock."""
        had = [page for page in self._said if first <= page < last]
        if not had:
            return False
        self.clear_entries(first, last)
        for page in had:
            if self.translate(page) is None:
                self.zapped(page, page + 1)
        self.flush_tlbs()
        return True

    @final
    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """See the module."""
        hit = self.pages_in(range.start, range.end)
        if hit:
            with self._lock.write:
                self._open += 1
                for first, last in hit:
                    self._clear(first, last)
        return 0

    @final
    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """See the module."""
        if self.pages_in(range.start, range.end):
            with self._lock.write:
                self._ended += 1
                self._open -= 1

    @final
    def clear_flush_young(self, start: int, end: int) -> bool:
        """See the module."""
        with self._lock.write:
            return sum(self._clear(first, last) for first, last in self.pages_in(start, end)) > 0

    @final
    def clear_young(self, start: int, end: int) -> bool:
        """As :meth:`clear_flush_young`."""
        return self.clear_flush_young(start, end)

    @final
    def test_young(self, address: int) -> bool:
        """Whether there is an entry."""
        return any(self.translate(first) is not None for first, _ in self.pages_in(address, address + 1))

    @final
    def release(self, mm: NotifiedMm) -> None:
        """See the module."""
        with self._lock.write:
            self._closed = True
            for window in self.windows:
                self._clear(window.gfn, window.gfn_end)
