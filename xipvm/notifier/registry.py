"""Who is told of the changes of one mm, and the dispatch to them.

An mm operation that lowers a right or changes a page does ::

    with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
        ...                                 # change primary entries

and flushes the host's TLBs and frees pages inside or behind it, flush before free. Order of one range: event S,
interval notifiers that it touches (interval.py), every start (the most recently registered notifier first), the change,
event E, the interval notifiers' end, every end in the order of the starts.

Joining: no range is open and no callback runs when a notifier joins, hence it never sees an end without its start,
nor misses the start of a change that is under way. ``register`` waits for that, as ``mm_take_all_locks`` does in Linux,
and raises EDEADLK when it waits for something further up its own stack. Ranges that begin while nobody listens are
counted for that reason, and nothing else is done for them: no object, no callback, no event.

Leaving: ``unregister`` calls ``release`` if the notifier is still linked and unlinks it; it may cut a start from its
end. ``put`` unlinks without ``release`` and without waiting; the notifier is freed when no callback can run any more.
``release()``, the death of the mm, invalidates all interval notifiers with one range over everything, then calls every
``release`` *while its notifier is linked*, then empties the list. What the rest of the teardown announces reaches
interval notifiers only, which stay until they are removed. When an unregister comes between, a notifier is released
twice.

A range that may not block is declined as a whole when one declines. An interval notifier that does ends it at once:
nobody behind it is told. When one of the list does, the others are told nevertheless, and then everybody who had begun
gets an end. *That includes the interval notifiers*: Linux 6.12 forgets them then, and their readers would sleep for
ever; it does not show there because nobody in its list ever declines.

Errors: a start that raises stops the operation before anything changed. The notifiers that had begun get their end,
the range is closed, the exception goes on. An end or a release that raises does not keep the others from being called.

The file is long because joining, leaving and telling are one protocol over one list.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

from xipvm.actors import point, wait
from xipvm.errors import InternalError, MmError, ProtocolUnsupported
from xipvm.locks.check import atomic, might_sleep
from xipvm.locks.lock import RwLock
from xipvm.locks.order import NOTIFIER_LOCK
from xipvm.notifier.interval import ULONG_MAX, IntervalTree, MmuIntervalNotifier
from xipvm.notifier.invalidation import Invalidation, Unobserved
from xipvm.notifier.mm import NotifiedMm
from xipvm.notifier.notifier import MmuNotifier, Subscriber, implements
from xipvm.notifier.range import MmuNotifierRange, RangeEvent
from xipvm.notifier.srcu import Srcu

N = TypeVar("N", bound=MmuNotifier)

UINT_MAX = (1 << 32) - 1


def _no() -> bool:
    return False


class MmuNotifiers:
    """The notifiers of one mm, most recently registered first."""

    __slots__ = (
        "_clear_flush_young",
        "_clear_young",
        "_dead",
        "_has_notifiers",
        "_intervals",
        "_last_id",
        "_list",
        "_lock",
        "_mm",
        "_nobody",
        "_open",
        "_secondary_tlbs",
        "_srcu",
        "_test_young",
        "_unobserved",
        "out_of_memory",
        "signal_pending",
    )

    protocol: ClassVar[str] = "modern"
    """Which protocol it speaks; registry_2008.py is the other one."""
    flush_in_range: ClassVar[bool] = False
    """mprotect flushes the host's TLBs before the end of its range, not behind it."""
    gather_per_area: ClassVar[bool] = False
    """DONTNEED frees the pages of an area before it begins with the next one."""
    unmap_asks_young: ClassVar[bool] = False
    """Reclaim asks once more whether an entry was used when it is about to take it away."""
    huge_entries: ClassVar[bool] = True
    """There are transparent huge pages."""
    move_limit: ClassVar[int | None] = None
    """The most bytes that mremap moves in one range, None without a limit."""

    def __init__(self, mm: NotifiedMm) -> None:
        self._mm = mm
        self._lock = RwLock(f"mmu_notifier_mm->lock of {mm.name}", NOTIFIER_LOCK)
        self._link(())
        self._intervals: IntervalTree | None = None  # from the first insert on
        self._open: dict[int, MmuNotifierRange] = {}
        self._unobserved = 0
        self._nobody = Unobserved(self)
        self._srcu = Srcu(mm.name)
        self._last_id = 0
        self._dead = False
        self._has_notifiers = False
        self.out_of_memory: Callable[[], bool] = _no
        """Whether the kernel has no memory for what the first registration allocates. For fault injection."""
        self.signal_pending: Callable[[], bool] = _no
        """Whether a signal waits for the task that registers. For fault injection."""

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[Subscriber]:
        """In the order of dispatch."""
        return iter(self._list)

    @property
    def open_ranges(self) -> tuple[MmuNotifierRange, ...]:
        """Ranges that were announced and have not ended, oldest first."""
        return tuple(self._open.values())

    @property
    def has_notifiers(self) -> bool:
        """Somebody has registered once: true until the mm goes, as mm_has_notifiers."""
        return self._has_notifiers

    @property
    def intervals(self) -> IntervalTree | None:
        """The interval notifiers, None before the first insert."""
        return self._intervals

    def _link(self, notifiers: tuple[Any, ...]) -> None:
        """The list is replaced, never changed: a walk keeps the one it began with.

        What is in it is of the protocol's kind; ``_check_kind`` has seen to that.
        """
        self._list = notifiers
        self._clear_flush_young = tuple(n for n in notifiers if implements(n, "clear_flush_young"))
        self._clear_young = tuple(n for n in notifiers if implements(n, "clear_young"))
        self._test_young = tuple(n for n in notifiers if implements(n, "test_young"))
        self._secondary_tlbs = tuple(n for n in notifiers if implements(n, "arch_invalidate_secondary_tlbs"))

    def _relink(self, notifiers: tuple[Any, ...]) -> None:
        with self._lock.write:
            self._link(notifiers)

    def _unlink(self, notifier: Subscriber) -> None:
        self._relink(tuple(other for other in self._list if other is not notifier))

    # ---- joining and leaving

    def register(self, notifier: Subscriber) -> None:
        """Let ``notifier`` be told of every change from now on, before all others.

        Raises MmError, and nothing is changed: EINVAL when it is registered already (here or on another mm) or has both
        ``arch_invalidate_secondary_tlbs`` and a start or an end, ESRCH when the mm is dead, ENOMEM, EINTR, EDEADLK when
        a range is open or a callback runs that cannot end meanwhile. ProtocolUnsupported for one of the other protocol.
        """
        might_sleep("mmu_notifier_register")
        with self._mm.mmap_write_lock():
            self._register_locked(notifier)

    def _register_locked(self, notifier: Subscriber) -> None:
        self._check(notifier)
        locks = self._all_locks("mmu_notifier_register")
        self._check(notifier)  # others may have run
        with locks:
            self._has_notifiers = True
            notifier.subscribed_to = self
            notifier.users = 1
            self._relink((notifier, *self._list))
        if self._mm.trace.on:
            self._mm.trace.emit(
                "mmu_notifier_register", mm=self._mm.name, notifier=notifier.name, protocol=self.protocol
            )

    def _check(self, notifier: Subscriber) -> None:
        if notifier.subscribed_to is not None:
            raise MmError(errno.EINVAL, f"mmu_notifier_register: {notifier.name} is registered already")
        self._check_kind(notifier)
        if self._dead:
            raise MmError(errno.ESRCH, f"mmu_notifier_register: {self._mm.name} is dead")

    def _check_kind(self, notifier: Subscriber) -> None:
        if not isinstance(notifier, MmuNotifier):
            raise ProtocolUnsupported(f"registering {notifier.name}", self.protocol)
        if implements(notifier, "arch_invalidate_secondary_tlbs") and (
            implements(notifier, "invalidate_range_start") or implements(notifier, "invalidate_range_end")
        ):
            raise MmError(errno.EINVAL, f"mmu_notifier_register: {notifier.name} wants ranges and the host's flushes")

    def _all_locks(self, what: str) -> AbstractContextManager[object]:
        if not self._has_notifiers and self.out_of_memory():
            raise MmError(errno.ENOMEM, f"{what}: {self._mm.name}")
        because = f"{self._mm.name} is being invalidated"
        wait(what, self._idle, because=because, label="notifier.register.take_all_locks")
        return self._mm.take_all_locks(self.signal_pending)

    def _idle(self) -> bool:
        return not (self._open or self._unobserved or self._srcu.read)

    def unregister(self, notifier: Subscriber) -> None:
        """Release ``notifier`` if it is still linked, and forget it: no callback runs after the return.

        Raises MmError, and nothing is changed: EINVAL when it is not registered here or was put, EDEADLK inside a
        callback of this mm. An exception of its ``release`` is raised after it was unlinked.
        """
        self._check_here(notifier)
        self._srcu.synchronize("mmu_notifier_unregister")
        self._check_here(notifier)  # others may have run
        try:
            if notifier in self._list:
                self._call_release(notifier)
                point("notifier.unregister.released")
        finally:
            self._unlink(notifier)
            notifier.subscribed_to = None
            notifier.users = 0
            if self._mm.trace.on:
                self._mm.trace.emit("mmu_notifier_unregister", mm=self._mm.name, notifier=notifier.name)
        self._srcu.synchronize("mmu_notifier_unregister")

    def _check_here(self, notifier: Subscriber) -> None:
        if notifier.subscribed_to is not self or not notifier.users:
            raise MmError(errno.EINVAL, f"mmu_notifier_unregister: {notifier.name} is not on {self._mm.name}")

    def get(self, kind: type[N]) -> N:
        """The notifier of class ``kind``, made by its ``alloc_notifier`` if the mm has none; :meth:`put` gives it back.

        Raises MmError, and nothing is changed: EOVERFLOW when it has too many users, what ``alloc_notifier`` and
        :meth:`register` raise, EDEADLK inside an ``alloc_notifier`` of this mm.
        """
        might_sleep("mmu_notifier_get")
        with self._mm.mmap_write_lock():
            for found in self._list:
                if type(found) is kind:
                    if found.users == UINT_MAX:
                        raise MmError(errno.EOVERFLOW, f"mmu_notifier_get: {found.name}")
                    found.users += 1
                    return found
            made = kind.alloc_notifier(self._mm)
            try:
                self._register_locked(made)
            except BaseException:
                made.free_notifier()
                raise
            return made

    def put(self, notifier: MmuNotifier) -> None:
        """Give back what :meth:`get` gave. The last one unlinks it, without ``release``; it is freed later.

        Never sleeps, and may be called by callbacks. Until it is freed callbacks of it may still run, and ``get`` makes
        another one. :meth:`synchronize` waits for that.
        """
        if notifier.subscribed_to is not self or not notifier.users:
            raise InternalError(f"{notifier.name} was put more often than got")
        notifier.users -= 1
        if notifier.users:
            return
        self._unlink(notifier)
        if self._mm.trace.on:
            self._mm.trace.emit("mmu_notifier_put", mm=self._mm.name, notifier=notifier.name)

        def free() -> None:
            notifier.subscribed_to = None
            notifier.free_notifier()

        self._srcu.call(free)

    def synchronize(self) -> None:
        """Wait until every notifier that was put is freed. Raises MmError EDEADLK inside a callback of this mm."""
        self._srcu.synchronize("mmu_notifier_synchronize")

    def release(self) -> None:
        """The mm dies: release all, then unlink all. Before any page or VMA is freed; a second call does nothing.

        Raises MmError EDEADLK inside a callback of this mm, and nothing is changed.
        """
        self._srcu.synchronize("mmu_notifier_release")
        if self._dead:
            return
        self._dead = True
        first: BaseException | None = None
        try:
            self._release_intervals()
        except BaseException as error:
            first = error
        for notifier in self._list:
            if notifier not in self._list:  # was unregistered at a point
                continue
            try:
                self._call_release(notifier)
                point("notifier.release.called")
            except BaseException as error:
                first = first or error
        self._relink(())
        if first is not None:
            raise first
        self._srcu.synchronize("mmu_notifier_release")

    def _release_intervals(self) -> None:
        intervals = self._intervals
        if not intervals:
            return
        self._last_id = id = self._last_id + 1
        range = MmuNotifierRange(self._mm.name, 0, ULONG_MAX, RangeEvent.RELEASE, id=id)
        intervals.start(range, self._tell_interval(range))
        try:
            point("notifier.release.intervals")
        finally:
            intervals.end()

    def _call_release(self, notifier: Subscriber) -> None:
        trace = self._mm.trace
        cause = trace.cause
        if trace.on:
            cause = trace.emit("mmu_notifier_release", mm=self._mm.name, notifier=notifier.name)
        section = self._srcu.read_lock()
        try:
            with trace.because(cause):
                notifier.release(self._mm)
        finally:
            self._srcu.read_unlock(section)

    # ---- interval notifiers

    def insert_interval(self, notifier: MmuIntervalNotifier, start: int, length: int) -> None:
        """Let ``notifier`` be told of every change in ``[start, start + length)``, which it may be already.

        The first one of an mm joins as in :meth:`register`; later ones may come at any time.
        Raises MmError, and nothing is changed: EOVERFLOW when the range is empty or leaves the 64 bits, EINVAL when it
        is inserted already or the mm is dead, and for the first one ENOMEM, EINTR, EDEADLK.
        """
        might_sleep("mmu_interval_notifier_insert")
        if length <= 0 or start < 0 or start + length - 1 > ULONG_MAX:
            raise MmError(errno.EOVERFLOW, f"mmu_interval_notifier_insert: {length:#x} bytes at {start:#x}")
        self._check_interval(notifier)
        if self._intervals is None:
            with self._mm.mmap_write_lock():
                intervals = self._first_interval()
            self._check_interval(notifier)
        else:
            intervals = self._intervals
        intervals.insert(notifier, start, start + length - 1)
        if self._mm.trace.on:
            self._mm.trace.emit(
                "mmu_interval_notifier_insert",
                mm=self._mm.name,
                notifier=notifier.name,
                start=start,
                end=min(start + length, ULONG_MAX),
            )

    def _first_interval(self) -> IntervalTree:
        if self._intervals is None:
            locks = self._all_locks("mmu_interval_notifier_insert")
            with locks:
                self._has_notifiers = True
                self._intervals = self._intervals or IntervalTree(self._mm)
        return self._intervals

    def _check_interval(self, notifier: MmuIntervalNotifier) -> None:
        if notifier.subscribed_to is not None:
            raise MmError(errno.EINVAL, f"mmu_interval_notifier_insert: {notifier.name} is inserted already")
        if self._dead:
            raise MmError(errno.EINVAL, f"mmu_interval_notifier_insert: {self._mm.name} is dead")

    def remove_interval(self, notifier: MmuIntervalNotifier) -> None:
        """No callback of ``notifier`` runs after the return. Waits for the ranges that are open.

        Raises MmError, and nothing is changed: EINVAL when it is not inserted here or is being removed, EDEADLK when
        it waits for something further up its own stack.
        """
        might_sleep("mmu_interval_notifier_remove")
        if self._intervals is None or notifier.subscribed_to is not self._intervals:
            raise MmError(errno.EINVAL, f"mmu_interval_notifier_remove: {notifier.name} is not on {self._mm.name}")
        self._intervals.remove(notifier)
        if self._mm.trace.on:
            self._mm.trace.emit("mmu_interval_notifier_remove", mm=self._mm.name, notifier=notifier.name)

    def _tell_interval(self, range: MmuNotifierRange) -> Callable[[MmuIntervalNotifier, int], None]:
        trace = self._mm.trace

        def tell(notifier: MmuIntervalNotifier, seq: int) -> None:
            if trace.on:
                trace.emit(
                    "mmu_interval_notifier_invalidate",
                    mm=range.mm,
                    notifier=notifier.name,
                    seq=seq,
                    range=range.id,
                    owned=range.owner is not None,
                )

        return tell

    # ---- young pages, and TLBs that follow the host's

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether a secondary MMU used ``[start, end)``; all forget it, and flush. Under the page-table lock."""
        return bool(self._clear_flush_young) and self._age("clear_flush_young", self._clear_flush_young, start, end)

    def clear_young(self, start: int, end: int) -> bool:
        """As :meth:`clear_flush_young`, without a flush: what a TLB still holds may be used unnoticed."""
        return bool(self._clear_young) and self._age("clear_young", self._clear_young, start, end)

    def _age(self, callback: str, notifiers: tuple[Any, ...], start: int, end: int) -> bool:
        young = False
        section = self._srcu.read_lock()
        try:
            with atomic(callback):
                for notifier in notifiers:
                    young |= bool(getattr(notifier, callback)(start, end))
        finally:
            self._srcu.read_unlock(section)
        trace = self._mm.trace
        if trace.on:
            trace.emit(f"mmu_notifier_{callback}", mm=self._mm.name, start=start, end=end, young=young)
        return young

    def test_young(self, address: int) -> bool:
        """Whether a secondary MMU used the page at ``address``; the first that did ends the search. Changes nothing."""
        notifiers = self._test_young
        if not notifiers:
            return False
        section = self._srcu.read_lock()
        try:
            with atomic("test_young"):
                young = any(notifier.test_young(address) for notifier in notifiers)
        finally:
            self._srcu.read_unlock(section)
        trace = self._mm.trace
        if trace.on:
            trace.emit("mmu_notifier_test_young", mm=self._mm.name, address=address, young=young)
        return young

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """The host's CPUs forget ``[start, end)`` (ULONG_MAX: everything): those that follow them do, too. Atomic."""
        notifiers = self._secondary_tlbs
        if not notifiers:
            return
        trace = self._mm.trace
        if trace.on:
            trace.emit("mmu_notifier_arch_invalidate_secondary_tlbs", mm=self._mm.name, start=start, end=end)
        section = self._srcu.read_lock()
        try:
            with atomic("arch_invalidate_secondary_tlbs"):
                for notifier in notifiers:
                    notifier.arch_invalidate_secondary_tlbs(start, end)
        finally:
            self._srcu.read_unlock(section)

    # ---- single entries

    def around_entry(self, start: int, end: int, event: RangeEvent) -> AbstractContextManager[MmuNotifierRange | None]:
        """A context in which one entry, that of bytes ``[start, end)``, may be changed: a range.

        What changes it goes by ``Mm.ptep_clear_flush_notify``, which calls :meth:`invalidate_page`.
        """
        return self.invalidate_range(start, end, event)

    def invalidate_page(self, address: int) -> None:
        """The entry of the page at ``address`` is cleared and flushed: which the range around it has announced."""

    def needs_modern(self, what: str) -> None:
        """Raises ProtocolUnsupported where ``what``, which came after 2008, cannot be announced."""

    # ---- ranges

    def invalidate_range(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True, owner: object = None
    ) -> Invalidation | Unobserved:
        """A context that announces bytes ``[start, end)`` on entry and ends the range on exit, also of an exception."""
        if self._list or self._intervals:
            return Invalidation(self, start, end, event, blockable, owner)
        return self._nobody

    def invalidate_range_start(
        self, start: int, end: int, event: RangeEvent, *, blockable: bool = True, owner: object = None
    ) -> MmuNotifierRange | None:
        """Announce that entries of bytes ``[start, end)`` are about to change.

        The result, also when it is None (nobody listens), goes to :meth:`invalidate_range_end` when they are changed.
        Raises MmError EAGAIN when a notifier declines a range that is not ``blockable``: the range is closed, nothing
        may be changed.
        """
        notifiers = self._list
        if not notifiers and not self._intervals:
            self._nobody.__enter__()
            return None
        if start >= end:
            raise InternalError(f"empty range {start:#x}..{end:#x} announced for {self._mm.name}")
        if blockable:
            might_sleep("mmu_notifier_invalidate_range_start")
        self._last_id = id = self._last_id + 1
        range = MmuNotifierRange(self._mm.name, start, end, event, blockable, id, owner)
        trace = self._mm.trace
        before = cause = trace.cause
        if trace.on:
            cause = self._emit("mmu_notifier_invalidate_range_start", range)
        self._open[id] = range
        trace.cause = cause
        try:
            if blockable:
                self._start(range, notifiers)
            else:
                with atomic("a range that may not block"):
                    self._start(range, notifiers)
        finally:
            trace.cause = before
        try:
            point("notifier.range_start.done")
        except BaseException:  # an aborted run unwinds its actors: leave nothing open
            self._finish(range, self._list, self._intervals)
            raise
        return range

    def _start(self, range: MmuNotifierRange, notifiers: tuple[Any, ...]) -> None:
        intervals: IntervalTree | None = None  # that count the range
        begun = 0
        declined: list[MmuNotifier] = []
        section = 0
        try:
            if self._intervals is not None:
                if not self._intervals.start(range, self._tell_interval(range)):
                    raise MmError(errno.EAGAIN, f"an interval notifier cannot take {range!r} without blocking")
                intervals = self._intervals
            section = self._srcu.read_lock()
            for notifier in notifiers:
                result = notifier.invalidate_range_start(range)
                if result:
                    if range.blockable or result != -errno.EAGAIN:
                        raise InternalError(f"{notifier.name} returned {result} for the start of {range!r}")
                    if implements(notifier, "invalidate_range_end"):
                        raise InternalError(f"{notifier.name} declined {range!r}, but would be told of its end")
                    declined.append(notifier)  # all others are told nevertheless
                begun += 1
            if declined:
                raise MmError(errno.EAGAIN, f"{declined[0].name} cannot take {range!r} without blocking")
        except BaseException as error:
            for note in self._finish(range, notifiers[:begun], intervals):
                error.add_note(f"and ending the range: {note!r}")
            raise
        finally:
            if section:
                self._srcu.read_unlock(section)

    def invalidate_range_end(self, range: MmuNotifierRange | None) -> None:
        """The entries of ``range``, a result of :meth:`invalidate_range_start`, are changed."""
        if range is None:
            if not self._unobserved:
                raise InternalError(f"more unobserved ranges of {self._mm.name} ended than began")
            self._nobody.__exit__(None, None, None)
            return
        if self._open.get(range.id) is not range:
            raise InternalError(f"{range!r} ended, but is not open")
        errors = self._finish(range, self._list, self._intervals)
        if errors:
            raise errors[0]
        point("notifier.range_end.done")

    def _finish(
        self, range: MmuNotifierRange, notifiers: Sequence[Any], intervals: IntervalTree | None
    ) -> list[BaseException]:
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
        if intervals is not None:
            intervals.end()
        section = self._srcu.read_lock()
        trace.cause = cause
        for notifier in notifiers:
            try:
                self._end(notifier, range)
            except BaseException as error:
                errors.append(error)
        trace.cause = before
        self._srcu.read_unlock(section)
        return errors

    def _end(self, notifier: Any, range: MmuNotifierRange) -> None:
        if range.blockable:
            notifier.invalidate_range_end(range)
            return
        with atomic("a range that may not block"):
            notifier.invalidate_range_end(range)

    def _emit(self, kind: str, range: MmuNotifierRange) -> int:
        return self._mm.trace.emit(
            kind, mm=range.mm, start=range.start, end=range.end, event=range.event.name, range=range.id
        )
