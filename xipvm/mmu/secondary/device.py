"""Bases for secondary MMUs of devices: windows onto an mm, and the words by which a driver says what it does.

A driver derives from :class:`DeviceMmu`, registers (``self.register()``) and implements ``fault``, ``translate`` and
the callbacks of :class:`~xipvm.notifier.MmuNotifier`; in the protocol of 2008 the same callbacks are called, see there.
One that watches single ranges derives from :class:`IntervalMmu`, watches them (``self.watch(hva, pages)``) and
implements ``invalidate``. Its tables are its own; the oracle knows of them what it says::

    map_window     its pages are these bytes of the mm; unmap_window: they are not any more
    looking_up     a fault has read its count of invalidations, and looks a page up now
    installed      a page has an entry now, or another one
    protected      entries lost the right to write
    zapped         entries are gone
    tlb_filled     a TLB of the device got a translation
    tlb_flushed    a TLB forgot all of them

Each is said when it is done, with no schedule point in between: a driver that says less than it does is not judged for
the rest, one that says what it does not do is judged for that.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Gfn, Hva
from xipvm.errors import MmError
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.secondary.base import SecondaryMmu
from xipvm.mmu.secondary.memslot import MAX_SLOTS, Memslot, Memslots
from xipvm.notifier import (
    MmuIntervalNotifier,
    MmuNotifier,
    MmuNotifier2008,
    MmuNotifierRange,
    MmuNotifiers2008,
    NotifiedMm,
    RangeEvent,
)
from xipvm.notifier.notifier import implements

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


def pages_of(table: Collection[int], start: int, end: int) -> list[int]:
    """The pages of ``[start, end)`` that are in ``table``, a set or a dictionary by page; ascending."""
    if end - start <= len(table):
        return [page for page in range(start, end) if page in table]
    return sorted(page for page in table if start <= page < end)


class DeviceTables(SecondaryMmu):
    """What both have: windows, words, DMA. Pages are its own numbers; windows say which bytes of ``mm`` they are."""

    def __init__(self, mm: Mm, name: str) -> None:
        super().__init__(mm, mm.trace, name)
        self.windows = Memslots()
        self._said: dict[int, int] = {}
        """Frames by page, as they were said to be installed."""

    # ---- windows

    def map_window(self, hva: int, pages: int, *, page: int = 0) -> Memslot:
        """Its pages ``[page, page + pages)`` are the bytes of the mm from ``hva`` on.

        Raises MmError: EINVAL for an unaligned or empty window, EEXIST for one that overlaps another, ENFILE.
        """
        number = next((n for n in range(MAX_SLOTS) if self.windows.get(n) is None), None)
        if number is None:
            raise MmError(errno.ENFILE, f"{self.name} has {MAX_SLOTS} windows")
        window = Memslot(number, Gfn(page), pages, Hva(hva), 0)
        self.windows.check(window)
        self.windows.insert(window)
        if self.trace.on:
            self.trace.emit("memslot_set", vm=self.name, slot=window.id, gfn=page, pages=pages, hva=hva, flags=0)
        return window

    def unmap_window(self, window: Memslot) -> None:
        """Its pages in ``window`` are nothing any more. Raises MmError: EBUSY while there are entries, EINVAL."""
        if self.windows.get(window.id) is not window:
            raise MmError(errno.EINVAL, f"{window!r} is no window of {self.name}")
        if pages_of(self._said, window.gfn, window.gfn_end):
            raise MmError(errno.EBUSY, f"{self.name} has entries in {window!r}")
        self.windows.remove(window.id)
        if self.trace.on:
            self.trace.emit("memslot_delete", vm=self.name, slot=window.id)

    def hva_of(self, page: int) -> Hva | None:
        """The first byte of ``page``, None outside of all windows."""
        window = self.windows.find(page)
        return None if window is None else window.hva_of(Gfn(page))

    def pages_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """Its pages that show a byte of ``[start, end)`` of the mm, as half-open ranges."""
        return self.windows.in_hva_range(start, end)

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """See the base."""
        for window in self.windows:
            for page in range(window.gfn, window.gfn_end):
                yield page, window.hva_of(Gfn(page))

    # ---- memory, as the device reaches it

    def dma_read(self, pfn: int, size: int, offset: int = 0) -> bytes:
        """``size`` bytes at ``offset`` of frame ``pfn``, whatever that holds by now."""
        return self.mm.host.read(pfn, offset, size)

    def dma_write(self, pfn: int, data: bytes, offset: int = 0) -> None:
        """Put ``data`` there."""
        self.mm.host.write(pfn, offset, data)

    def set_page_dirty(self, pfn: int) -> None:
        """Tell the mm that the device has written to frame ``pfn``, or may."""
        self.mm.host.set_flags(pfn, PG_DIRTY)

    # ---- what it says

    def looking_up(self, page: int) -> None:
        """A fault of ``page`` looks at the mm from now on: what it installs must not rest on anything older.

        To be said right behind what remembers the invalidations so far (the driver's sequence number).
        """
        if self.trace.on:
            self.trace.emit("spte_lookup", vm=self.name, gfn=page)

    def installed(self, page: int, pfn: int, *, write: bool) -> None:
        """``page`` translates to frame ``pfn`` now."""
        self._said[page] = pfn
        if self.trace.on:
            self.trace.emit("spte_set", vm=self.name, gfn=page, pfn=pfn, rights="rw" if write else "r")

    def protected(self, start: int, end: int) -> None:
        """What entries there are in ``[start, end)`` cannot be written through any more."""
        if self.trace.on:
            self.trace.emit("spte_protect", vm=self.name, start=start, end=end)

    def zapped(self, start: int, end: int) -> None:
        """There are no entries in ``[start, end)`` any more. Nothing is said where there were none."""
        runs = [(self._said.pop(page), 1) for page in pages_of(self._said, start, end)]
        if runs and self.trace.on:
            self.trace.emit("spte_zap", vm=self.name, start=start, end=end, pages=runs)

    def tlb_filled(self, index: int, page: int, pfn: int, *, write: bool) -> None:
        """TLB ``index``, a number that nobody else's has, translates ``page`` to frame ``pfn`` from now on."""
        if self.trace.on:
            self.trace.emit("tlb_insert", vcpu=index, gfn=page, pfn=pfn, rights="rw" if write else "r")

    def tlb_flushed(self, index: int, reason: str) -> None:
        """TLB ``index`` translates nothing any more."""
        if self.trace.on:
            self.trace.emit("tlb_flush", vcpu=index, reason=reason)

    # ---- questions

    def describe(self, page: int) -> str:
        """What is known of ``page``, on one line."""
        hva, seen = self.hva_of(page), self.translate(page)
        where = "no window" if hva is None else f"hva {hva:#x}"
        entry = "nothing" if seen is None else f"frame {seen[0]:#x} {'rw' if seen[1] else 'r'}"
        return f"page {page:#x} of {self.name}: {entry}; {where}"


class DeviceMmu(DeviceTables, MmuNotifier):
    """The secondary MMU ``name`` of a device that is told of every change of ``mm``.

    In the protocol of 2008 it is called as today: a single page, of which that protocol tells when its entry has
    changed, is a start and an end at once, of event CLEAR as every range then; callbacks may not sleep.
    """

    def __init__(self, mm: Mm, *, name: str = "dev0") -> None:
        super().__init__(mm, name)
        self._as_in_2008: _In2008 | None = None

    def register(self) -> None:
        """Have it told from now on, in the protocol of ``mm``. Raises MmError as ``MmuNotifiers.register``."""
        if self.mm.protocol != MmuNotifiers2008.protocol:
            self.mm.notifiers.register(self)
            return
        translator = _In2008Young(self) if implements(self, "clear_flush_young") else _In2008(self)
        self.mm.notifiers.register(translator)
        self._as_in_2008 = translator

    def destroy(self) -> None:
        """Unregister, which calls ``release``. A second call does nothing."""
        for notifier in (self, self._as_in_2008):
            if notifier is not None and notifier.subscribed_to is not None:
                self.mm.notifiers.unregister(notifier)


class _In2008(MmuNotifier2008):
    """Stands in the list of 2008 for a driver that knows the callbacks of today."""

    def __init__(self, device: DeviceMmu) -> None:
        self.name = device.name
        self._device = device
        self._open: list[MmuNotifierRange] = []

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        """A range of one page, over at once."""
        page = MmuNotifierRange(mm.name, address, address + PAGE_SIZE, RangeEvent.CLEAR)
        self._device.invalidate_range_start(page)
        self._device.invalidate_range_end(page)

    def invalidate_range_start(self, mm: NotifiedMm, start: int, end: int) -> None:
        """As today."""
        range = MmuNotifierRange(mm.name, start, end, RangeEvent.CLEAR)
        self._device.invalidate_range_start(range)
        self._open.append(range)

    def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
        """As today, with the range that the start had."""
        range = next(range for range in self._open if (range.start, range.end) == (start, end))
        self._open.remove(range)
        self._device.invalidate_range_end(range)

    def release(self, mm: NotifiedMm) -> None:
        """As today."""
        self._device.release(mm)


class _In2008Young(_In2008):
    """For a driver that knows what its device uses."""

    def clear_flush_young(self, mm: NotifiedMm, address: int) -> bool:
        """As today, for one page."""
        return self._device.clear_flush_young(address, address + PAGE_SIZE)


class IntervalMmu(DeviceTables, MmuIntervalNotifier):
    """The secondary MMU ``name`` of a device that watches one range of ``mm``: what it has of it is its window.

    The oracle takes ``read_begin`` for the beginning of every lookup.
    """

    def __init__(self, mm: Mm, *, name: str = "odp0") -> None:
        super().__init__(mm, name)

    def watch(self, hva: int, pages: int, *, page: int = 0) -> None:
        """Its pages ``[page, page + pages)`` are the bytes from ``hva`` on, and it is told of changes of those.

        Once. Raises MmError as :meth:`map_window` and ``MmuNotifiers.insert_interval``.
        """
        self.mm.notifiers.insert_interval(self, hva, pages << PAGE_SHIFT)
        self.map_window(hva, pages, page=page)

    def destroy(self) -> None:
        """Watch nothing any more; what it has is its own to drop. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.remove_interval(self)
