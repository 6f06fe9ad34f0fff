"""A base for secondary MMUs of devices: windows onto an mm, and the words by which a driver says what it does.

A driver derives from it, registers (``mm.notifiers.register(self)``) and implements ``fault``, ``translate`` and the
callbacks of :class:`~xipvm.notifier.MmuNotifier`. Its tables are its own; the oracle knows of them what it says::

    map_window     its pages are these bytes of the mm
    installed      a page has an entry now, or another one
    protected      entries lost the right to write
    zapped         entries are gone
    tlb_filled     a TLB of the device got a translation
    tlb_flushed    a TLB forgot all of them

Each is said when it is done, with no schedule point in between: a driver that says less than it does is not judged for
the rest, one that says what it does not do is judged for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xipvm.address import Gfn, Hva
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.secondary.base import SecondaryMmu
from xipvm.mmu.secondary.memslot import Memslot, Memslots
from xipvm.notifier import MmuNotifier

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


class DeviceMmu(SecondaryMmu, MmuNotifier):
    """The secondary MMU ``name`` of a device. Pages are its own numbers; windows say which bytes of ``mm`` they are."""

    def __init__(self, mm: Mm, *, name: str = "dev0") -> None:
        SecondaryMmu.__init__(self, mm, mm.trace, name)
        self.windows = Memslots()
        self._said: dict[int, int] = {}
        """Frames by page, as they were said to be installed."""

    # ---- windows

    def map_window(self, hva: int, pages: int, *, page: int = 0) -> None:
        """Its pages ``[page, page + pages)`` are the bytes of the mm from ``hva`` on.

        Raises MmError: EINVAL for an unaligned or empty window, EEXIST for one that overlaps another.
        """
        window = Memslot(len(self.windows), Gfn(page), pages, Hva(hva), 0)
        self.windows.check(window)
        self.windows.insert(window)
        if self.trace.on:
            self.trace.emit("memslot_set", vm=self.name, slot=window.id, gfn=page, pages=pages, hva=hva, flags=0)

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
        gone = [page for page in self._said if start <= page < end]
        runs = [(self._said.pop(page), 1) for page in sorted(gone)]
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

    def destroy(self) -> None:
        """Unregister, which calls ``release``. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)
