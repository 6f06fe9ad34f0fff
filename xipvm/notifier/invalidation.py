"""The contexts of a range: what an mm operation does its change in."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xipvm.notifier.range import MmuNotifierRange, RangeEvent
    from xipvm.notifier.registry import MmuNotifiers


class Unobserved:
    """The context of every range that begins while nobody listens."""

    __slots__ = ("_notifiers",)

    def __init__(self, notifiers: MmuNotifiers) -> None:
        self._notifiers = notifiers

    def __enter__(self) -> None:
        notifiers = self._notifiers
        notifiers._unobserved += 1
        if notifiers._intervals is not None:
            notifiers._intervals.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        notifiers = self._notifiers
        notifiers._unobserved -= 1
        if notifiers._intervals is not None:
            notifiers._intervals.end()


class Invalidation:
    """What :meth:`MmuNotifiers.invalidate_range` returns; good for one ``with``."""

    __slots__ = ("_arguments", "_notifiers", "_range")

    def __init__(
        self, notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent, blockable: bool, owner: object
    ) -> None:
        self._notifiers = notifiers
        self._arguments = (start, end, event, blockable, owner)
        self._range: MmuNotifierRange | None = None

    def __enter__(self) -> MmuNotifierRange | None:
        start, end, event, blockable, owner = self._arguments
        self._range = self._notifiers.invalidate_range_start(start, end, event, blockable=blockable, owner=owner)
        return self._range

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._notifiers.invalidate_range_end(self._range)
