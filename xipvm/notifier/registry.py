"""Who is told of the changes of one mm, and the dispatch to them.

An mm operation that lowers a right or changes a page does ::

    with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
        ...                                 # change primary entries

and flushes the host's TLBs and frees pages inside or behind it, flush before free. Order of one range: event S,
every start (the most recently registered notifier first), the change, event E, every end in the same order.

Joining: no range is open and no callback runs when a notifier joins, hence it never sees an end without its start,
nor misses the start of a change that is under way. Linux gets there by ``mm_take_all_locks``, which waits; here
``register`` lets the other actors run once (a schedule point) and raises EDEADLK when a range is open even then:
what it would wait for is further up its own stack. Ranges that begin while nobody listens are counted for that
reason, and nothing else is done for them: no object, no callback, no event.

Leaving: ``unregister`` calls ``release`` if the notifier is still linked and unlinks it; it may cut a start from its
end. ``release()``, the death of the mm, does so for all: every callback runs *while its notifier is linked*, then the
list is emptied, and what the rest of the teardown announces reaches nobody. When an unregister comes between, a
notifier is released twice.

Errors: a start that raises stops the operation before anything changed. The notifiers that had begun get their end,
the range is closed, the exception goes on. An end or a release that raises does not keep the others from being called.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from xipvm.actors import point
from xipvm.errors import InternalError, MmError
from xipvm.notifier.notifier import MmuNotifier
from xipvm.notifier.range import MmuNotifierRange, RangeEvent

if TYPE_CHECKING:
    from xipvm.trace.funnel import Trace


class NotifiedMm(Protocol):
    """What notifiers have to know of an mm."""

    @property
    def name(self) -> str:
        """What it is called in traces."""

    @property
    def trace(self) -> Trace:
        """Where its events go."""


class MmuNotifiers:
    """The notifiers of one mm, most recently registered first."""

    __slots__ = ("_dead", "_last_id", "_list", "_mm", "_nobody", "_open", "_running", "_unobserved")

    def __init__(self, mm: NotifiedMm) -> None:
        self._mm = mm
        self._list: tuple[MmuNotifier, ...] = ()  # replaced, never changed: a walk keeps the one it began with
        self._open: dict[int, MmuNotifierRange] = {}
        self._unobserved = 0
        self._nobody = Unobserved(self)
        self._running = 0  # walks of the list under way
        self._last_id = 0
        self._dead = False

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[MmuNotifier]:
        """In the order of dispatch."""
        return iter(self._list)

    @property
    def open_ranges(self) -> tuple[MmuNotifierRange, ...]:
        """Ranges that were announced and have not ended, oldest first."""
        return tuple(self._open.values())

    # ---- joining and leaving

    def register(self, notifier: MmuNotifier) -> None:
        """Let ``notifier`` be told of every change from now on, before all others.

        Raises MmError, and nothing is changed: EINVAL when it is registered already (here or on another mm), ESRCH when
        the mm is dead, EDEADLK when a range is open or a callback runs.
        """
        if self._busy():
            point("notifier.register.take_all_locks")
            if self._busy():
                raise MmError(errno.EDEADLK, f"mmu_notifier_register: {self._mm.name} is being invalidated")
        if notifier.subscribed_to is not None:
            raise MmError(errno.EINVAL, f"mmu_notifier_register: {notifier.name} is registered already")
        if self._dead:
            raise MmError(errno.ESRCH, f"mmu_notifier_register: {self._mm.name} is dead")
        notifier.subscribed_to = self
        self._list = (notifier, *self._list)
        if self._mm.trace.on:
            self._mm.trace.emit("mmu_notifier_register", mm=self._mm.name, notifier=notifier.name)

    def unregister(self, notifier: MmuNotifier) -> None:
        """Release ``notifier`` if it is still linked, and forget it: no callback runs after the return.

        Raises MmError, and nothing is changed: EINVAL when it is not registered here, EDEADLK inside a callback of this
        mm. An exception of its ``release`` is raised after it was unlinked.
        """
        self._synchronize("mmu_notifier_unregister")
        if notifier.subscribed_to is not self:
            raise MmError(errno.EINVAL, f"mmu_notifier_unregister: {notifier.name} is not on {self._mm.name}")
        try:
            if notifier in self._list:
                self._call_release(notifier)
                point("notifier.unregister.released")
        finally:
            self._list = tuple(other for other in self._list if other is not notifier)
            notifier.subscribed_to = None
            if self._mm.trace.on:
                self._mm.trace.emit("mmu_notifier_unregister", mm=self._mm.name, notifier=notifier.name)

    def release(self) -> None:
        """The mm dies: release all, then unlink all. Before any page or VMA is freed; a second call does nothing.

        Raises MmError EDEADLK inside a callback of this mm, and nothing is changed.
        """
        self._synchronize("mmu_notifier_release")
        if self._dead:
            return
        self._dead = True
        first: BaseException | None = None
        for notifier in self._list:
            if notifier not in self._list:  # was unregistered at a point
                continue
            try:
                self._call_release(notifier)
                point("notifier.release.called")
            except BaseException as error:
                first = first or error
        self._list = ()
        if first is not None:
            raise first

    def _busy(self) -> bool:
        return bool(self._open or self._unobserved or self._running)

    def _synchronize(self, what: str) -> None:
        """Wait until no callback runs: Linux's grace period."""
        if self._running:
            point("notifier.synchronize")
            if self._running:
                raise MmError(errno.EDEADLK, f"{what}: a callback of {self._mm.name} is running")

    def _call_release(self, notifier: MmuNotifier) -> None:
        trace = self._mm.trace
        cause = trace.cause
        if trace.on:
            cause = trace.emit("mmu_notifier_release", mm=self._mm.name, notifier=notifier.name)
        self._running += 1
        try:
            with trace.because(cause):
                notifier.release(self._mm)
        finally:
            self._running -= 1

    # ---- ranges

    def invalidate_range(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True
    ) -> Invalidation | Unobserved:
        """A context that announces bytes ``[start, end)`` on entry and ends the range on exit, also of an exception."""
        return Invalidation(self, start, end, event, blockable) if self._list else self._nobody

    def invalidate_range_start(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True
    ) -> MmuNotifierRange | None:
        """Announce that entries of bytes ``[start, end)`` are about to change.

        The result, also when it is None (nobody listens), goes to :meth:`invalidate_range_end` when they are changed.
        Raises MmError EAGAIN when a notifier declines a range that is not ``blockable``: the range is closed, nothing
        may be changed.
        """
        notifiers = self._list
        if not notifiers:
            self._unobserved += 1
            return None
        if start >= end:
            raise InternalError(f"empty range {start:#x}..{end:#x} announced for {self._mm.name}")
        self._last_id = id = self._last_id + 1
        range = MmuNotifierRange(self._mm.name, start, end, event, blockable, id)
        trace = self._mm.trace
        if trace.on:
            cause = self._emit("mmu_notifier_invalidate_range_start", range)
            self._open[id] = range
            with trace.because(cause):
                self._start(range, notifiers)
        else:
            self._open[id] = range
            self._start(range, notifiers)
        try:
            point("notifier.range_start.done")
        except BaseException:  # an aborted run unwinds its actors: leave nothing open
            self._finish(range, self._list)
            raise
        return range

    def _start(self, range: MmuNotifierRange, notifiers: tuple[MmuNotifier, ...]) -> None:
        begun = 0
        declined: list[MmuNotifier] = []
        self._running += 1
        try:
            for notifier in notifiers:
                result = notifier.invalidate_range_start(range)
                if result:
                    # All others are told nevertheless, as in Linux, and what they began is ended below.
                    if range.blockable or result != -errno.EAGAIN:
                        raise InternalError(f"{notifier.name} returned {result} for the start of {range!r}")
                    declined.append(notifier)
                begun += 1
            if declined:
                raise MmError(errno.EAGAIN, f"{declined[0].name} cannot take {range!r} without blocking")
        except BaseException as error:
            for note in self._finish(range, [n for n in notifiers[:begun] if n not in declined]):
                error.add_note(f"and ending the range: {note!r}")
            raise
        finally:
            self._running -= 1

    def invalidate_range_end(self, range: MmuNotifierRange | None) -> None:
        """The entries of ``range``, a result of :meth:`invalidate_range_start`, are changed."""
        if range is None:
            if not self._unobserved:
                raise InternalError(f"more unobserved ranges of {self._mm.name} ended than began")
            self._unobserved -= 1
            return
        if self._open.get(range.id) is not range:
            raise InternalError(f"{range!r} ended, but is not open")
        errors = self._finish(range, self._list)
        if errors:
            raise errors[0]
        point("notifier.range_end.done")

    def _finish(self, range: MmuNotifierRange, notifiers: Sequence[MmuNotifier]) -> list[BaseException]:
        """Close the range and tell ``notifiers``; returns what they raised."""
        errors: list[BaseException] = []
        del self._open[range.id]  # translations may come back as soon as the first end returns
        trace = self._mm.trace
        before = cause = trace.cause
        if trace.on:
            try:
                cause = self._emit("mmu_notifier_invalidate_range_end", range)
            except BaseException as error:  # a sink that fails must not leave anybody's count up
                errors.append(error)
        self._running += 1
        trace.cause = cause
        for notifier in notifiers:
            try:
                notifier.invalidate_range_end(range)
            except BaseException as error:
                errors.append(error)
        trace.cause = before
        self._running -= 1
        return errors

    def _emit(self, kind: str, range: MmuNotifierRange) -> int:
        return self._mm.trace.emit(
            kind, mm=range.mm, start=range.start, end=range.end, event=range.event.name, range=range.id
        )


class Unobserved:
    """The context of every range that begins while nobody listens."""

    __slots__ = ("_notifiers",)

    def __init__(self, notifiers: MmuNotifiers) -> None:
        self._notifiers = notifiers

    def __enter__(self) -> None:
        self._notifiers._unobserved += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._notifiers._unobserved -= 1


class Invalidation:
    """What :meth:`MmuNotifiers.invalidate_range` returns; good for one ``with``."""

    __slots__ = ("_arguments", "_notifiers", "_range")

    def __init__(self, notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent, blockable: bool) -> None:
        self._notifiers = notifiers
        self._arguments = (start, end, event, blockable)
        self._range: MmuNotifierRange | None = None

    def __enter__(self) -> MmuNotifierRange | None:
        start, end, event, blockable = self._arguments
        self._range = self._notifiers.invalidate_range_start(start, end, event, blockable=blockable)
        return self._range

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._notifiers.invalidate_range_end(self._range)
