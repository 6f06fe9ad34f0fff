"""The protocol of 2008: what :class:`MmuNotifiers` did in Linux 2.6.27.

What mm operations say is the same in both protocols. What becomes of it is not: the change of one entry, which today
is a range around it, was announced when it had happened, under the page-table lock ::

    entry cleared → TLB flush → invalidate_page → new entry, or the page's reference put

and a fault that had looked the page up before finds out by its sequence number. Only batches (munmap, mprotect, fork,
truncation, ...) have a start and an end, which tell the addresses and nothing else.

The list is walked inside RCU, so nothing in it may sleep. Joining is as today. Leaving: a notifier is *unlinked before*
its ``release`` is called, at the end of the mm as well as by ``unregister``. (Which was a mistake: whoever else changes
entries meanwhile does not reach it, though it still has translations.)

What came later raises ProtocolUnsupported, and has changed nothing: ranges that may be declined, ``clear_young`` and
``test_young``, TLBs that follow the host's, ``get`` and ``put``, interval notifiers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Never, TypeVar

from xipvm.address import PAGE_SIZE
from xipvm.errors import ProtocolUnsupported
from xipvm.locks.check import atomic
from xipvm.notifier.interval import MmuIntervalNotifier
from xipvm.notifier.invalidation import Invalidation, Unobserved
from xipvm.notifier.notifier import MmuNotifier, Subscriber
from xipvm.notifier.notifier_2008 import MmuNotifier2008
from xipvm.notifier.range import MmuNotifierRange, RangeEvent
from xipvm.notifier.registry import MmuNotifiers

N = TypeVar("N", bound=MmuNotifier)

_NOTHING = nullcontext()


class MmuNotifiers2008(MmuNotifiers):
    """The notifiers of one mm, most recently registered first."""

    __slots__ = ("_invalidate_page", "_young")

    protocol: ClassVar[str] = "2008"
    flush_in_range: ClassVar[bool] = True
    gather_per_area: ClassVar[bool] = True
    unmap_asks_young: ClassVar[bool] = True
    huge_entries: ClassVar[bool] = False
    move_limit: ClassVar[int] = 64 * PAGE_SIZE

    def _link(self, notifiers: tuple[Any, ...]) -> None:
        self._list = notifiers
        self._young = tuple(n for n in notifiers if _implements(n, "clear_flush_young"))
        self._invalidate_page = tuple(n for n in notifiers if _implements(n, "invalidate_page"))
        self._secondary_tlbs = ()

    def needs_modern(self, what: str) -> Never:
        """See :meth:`MmuNotifiers.needs_modern`."""
        raise ProtocolUnsupported(what, self.protocol)

    # ---- joining and leaving

    def _check_kind(self, notifier: Subscriber) -> None:
        if not isinstance(notifier, MmuNotifier2008):
            self.needs_modern(f"registering {notifier.name}")

    def _call_release(self, notifier: Subscriber) -> None:
        self._unlink(notifier)
        with atomic("mmu_notifier_release"):
            super()._call_release(notifier)

    def get(self, kind: type[N]) -> N:
        """Raises ProtocolUnsupported."""
        self.needs_modern("mmu_notifier_get")

    def put(self, notifier: MmuNotifier) -> None:
        """Raises ProtocolUnsupported."""
        self.needs_modern("mmu_notifier_put")

    def insert_interval(self, notifier: MmuIntervalNotifier, start: int, length: int) -> None:
        """Raises ProtocolUnsupported."""
        self.needs_modern("mmu_interval_notifier_insert")

    # ---- single entries

    def around_entry(self, start: int, end: int, event: RangeEvent) -> AbstractContextManager[MmuNotifierRange | None]:
        """Nothing is said before an entry changes."""
        return _NOTHING

    def invalidate_page(self, address: int) -> None:
        """The entry of the page at ``address`` is cleared, and the host's CPUs have forgotten it. Under its lock.

        Every notifier is told, also when one raises; the first exception goes on.
        """
        notifiers = self._invalidate_page
        if not notifiers:
            return
        mm, trace = self._mm, self._mm.trace
        before = trace.cause
        if trace.on:
            trace.cause = trace.emit("mmu_notifier_invalidate_page", mm=mm.name, address=address)
        first: BaseException | None = None
        section = self._srcu.read_lock()
        try:
            with atomic("mmu_notifier_invalidate_page"):
                for notifier in notifiers:
                    try:
                        notifier.invalidate_page(mm, address)
                    except BaseException as error:
                        first = first or error
        finally:
            self._srcu.read_unlock(section)
            trace.cause = before
        if first is not None:
            raise first

    # ---- young pages

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether a secondary MMU used ``[start, end)``; all forget it, and flush. Under the page-table lock."""
        notifiers = self._young
        if not notifiers:
            return False
        mm, trace = self._mm, self._mm.trace
        young = False
        section = self._srcu.read_lock()
        try:
            with atomic("mmu_notifier_clear_flush_young"):
                for address in range(start, end, PAGE_SIZE):
                    for notifier in notifiers:
                        young |= bool(notifier.clear_flush_young(mm, address))
        finally:
            self._srcu.read_unlock(section)
        if trace.on:
            trace.emit("mmu_notifier_clear_flush_young", mm=mm.name, start=start, end=end, young=young)
        return young

    def clear_young(self, start: int, end: int) -> bool:
        """Raises ProtocolUnsupported."""
        self.needs_modern("mmu_notifier_clear_young")

    def test_young(self, address: int) -> bool:
        """Raises ProtocolUnsupported."""
        self.needs_modern("mmu_notifier_test_young")

    # ---- ranges

    def invalidate_range(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True, owner: object = None
    ) -> Invalidation | Unobserved:
        """As today; the event is told to nobody."""
        if not blockable or owner is not None:
            self.needs_modern("a range that may be declined")
        return super().invalidate_range(start, end, event)

    def invalidate_range_start(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True, owner: object = None
    ) -> MmuNotifierRange | None:
        """As today; the event is told to nobody, and nobody can decline."""
        if not blockable or owner is not None:
            self.needs_modern("a range that may be declined")
        return super().invalidate_range_start(start, end, event)

    def _start(self, range: MmuNotifierRange, notifiers: tuple[Any, ...]) -> None:
        begun: list[Any] = []
        section = self._srcu.read_lock()
        try:
            with atomic("mmu_notifier_invalidate_range_start"):
                for notifier in notifiers:
                    notifier.invalidate_range_start(self._mm, range.start, range.end)
                    begun.append(notifier)
        except BaseException as error:
            for note in self._finish(range, begun, None):
                error.add_note(f"and ending the range: {note!r}")
            raise
        finally:
            self._srcu.read_unlock(section)

    def _end(self, notifier: Any, range: MmuNotifierRange) -> None:
        with atomic("mmu_notifier_invalidate_range_end"):
            notifier.invalidate_range_end(self._mm, range.start, range.end)

    def _emit(self, kind: str, range: MmuNotifierRange) -> int:
        return self._mm.trace.emit(kind, mm=range.mm, start=range.start, end=range.end, event=None, range=range.id)


def _implements(notifier: MmuNotifier2008, callback: str) -> bool:
    return getattr(type(notifier), callback) is not getattr(MmuNotifier2008, callback)
