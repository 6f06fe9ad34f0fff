"""The locks themselves: many readers or one writer. What makes a spinlock of one is its class.

An actor is atomic between two points, so a lock matters only to those who hold it across one, and taking a free one is
next to nothing. Who has to wait hands itself to whoever schedules (``actors.wait``); without a scheduler nobody else
could ever release the lock, and the wait is an error: DeadlockError, EDEADLK.
"""

from __future__ import annotations

from collections.abc import Callable

from xipvm import actors
from xipvm.errors import InternalError
from xipvm.locks import check
from xipvm.locks.order import LockClass


class RwLock:
    """Many readers or one writer: ``with lock.read:``, ``with lock.write:``. Not recursive.

    ``name`` is for errors. Taking it raises DeadlockError when that means to wait and nobody can go on, and while
    locks are checked LockError. A lock whose class spins makes what is done under it atomic.
    """

    __slots__ = ("cls", "name", "nested", "read", "readers", "write", "writer")

    def __init__(self, name: str, cls: LockClass) -> None:
        self.name = name
        self.cls = cls
        self.readers = 0
        self.writer = False
        self.read = Reading(self)
        self.write = Writing(self)
        self.nested = Writing(self, nest=True)
        """As ``write``, by who holds other locks of the class and has an order for them."""

    @property
    def taken(self) -> bool:
        """Somebody holds it."""
        return self.writer or self.readers > 0

    def wait_for_writer(self) -> None:
        """Returns when nobody holds it for writing: as if it was taken for reading and dropped at once."""
        if check.checker is not None:
            check.checker.before(self, "read", False)
        if self.writer:
            self.block("read", self._no_writer)

    def block(self, how: str, ready: Callable[[], bool]) -> None:
        """Waits until ``ready()``."""
        holder = "its writer" if self.writer else f"{self.readers} readers"
        while not ready():
            actors.wait(f"{how} of {self.name}", ready, because=f"{holder} would have to go on first")

    def _no_writer(self) -> bool:
        return not self.writer

    def _free(self) -> bool:
        return not self.writer and not self.readers

    def downgrade(self) -> None:
        """The writer goes on as a reader, until its ``with`` ends."""
        self.writer = False
        self.readers += 1
        if check.checker is not None:
            check.checker.downgraded(self)

    def __repr__(self) -> str:
        return f"<{self.name}: {'a writer' if self.writer else f'{self.readers} readers'}>"


class Reading:
    """The context of a reader; has no state of its own, so one serves all."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        if check.checker is not None:
            check.checker.before(lock, "read", False)
        if lock.writer:
            lock.block("read", lock._no_writer)
        lock.readers += 1
        if check.checker is not None:
            check.checker.acquired(lock, "read")

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        if not lock.readers:
            raise InternalError(f"{lock.name} is dropped by a reader, and has none")
        lock.readers -= 1
        if check.checker is not None:
            check.checker.released(lock)


class Writing:
    """The context of a writer, who may have become a reader. ``nest``: others of the class may be held."""

    __slots__ = ("_lock", "_nest")

    def __init__(self, lock: RwLock, *, nest: bool = False) -> None:
        self._lock = lock
        self._nest = nest

    def __enter__(self) -> None:
        lock = self._lock
        if check.checker is not None:
            check.checker.before(lock, "write", self._nest)
        if lock.writer or lock.readers:
            lock.block("write", lock._free)
        lock.writer = True
        if check.checker is not None:
            check.checker.acquired(lock, "write")

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        if lock.writer:
            lock.writer = False
        elif lock.readers:
            lock.readers -= 1
        else:
            raise InternalError(f"{lock.name} is dropped by a writer, and has none")
        if check.checker is not None:
            check.checker.released(lock)


class KeyedLocks:
    """Locks that exist only while they are held, one a number: page locks, page table locks.

    ``with locks(number): ...``. ``name`` is a format for the number. Exclusive.
    """

    __slots__ = ("_cls", "_name", "held")

    def __init__(self, name: str, cls: LockClass) -> None:
        self._name = name
        self._cls = cls
        self.held: dict[int, Keyed] = {}
        """Those that somebody holds."""

    def __call__(self, number: int, *, nest: bool = False) -> Keyed:
        """The lock ``number`` as a context."""
        return Keyed(self, number, self._name, self._cls, nest)

    def free(self, number: int) -> bool:
        """Nobody holds it."""
        return number not in self.held

    def wait(self, number: int) -> None:
        """Returns when nobody holds it: as if it was taken and dropped at once."""
        with self(number):
            pass

    def wait_range(self, first: int, end: int) -> None:
        """Returns when nobody holds any of ``[first, end)``. For what then passes no point until it is done."""
        if check.checker is not None and first < end:
            check.checker.before(self(first), "write", False)
        if self.held:
            actors.wait(
                f"{self._name.format(first)} to {end - 1:#x}",
                lambda: not any(first <= number < end for number in self.held),
                because="who holds one of them would have to go on first",
            )


class Keyed:
    """One of :class:`KeyedLocks`; good for one ``with`` at a time."""

    __slots__ = ("_all", "_format", "_nest", "_number", "cls")

    def __init__(self, all: KeyedLocks, number: int, format: str, cls: LockClass, nest: bool) -> None:
        self._all = all
        self._number = number
        self._format = format
        self._nest = nest
        self.cls = cls

    @property
    def name(self) -> str:
        """For errors."""
        return self._format.format(self._number)

    def __enter__(self) -> None:
        held, number = self._all.held, self._number
        if check.checker is not None:
            check.checker.before(held.get(number, self), "write", self._nest)
        while number in held:
            actors.wait(self.name, lambda: number not in held, because="its holder would have to go on first")
        held[number] = self
        if check.checker is not None:
            check.checker.acquired(self, "write")

    def __exit__(self, *_: object) -> None:
        if self._all.held.pop(self._number, None) is not self:
            raise InternalError(f"{self.name} is dropped, and was not held")
        if check.checker is not None:
            check.checker.released(self)
