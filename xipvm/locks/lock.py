"""The locks themselves: many readers or one writer. What makes a spinlock of one is its class.

An actor is atomic between two points, so a lock matters only to those who hold it across one, and taking a free one is
next to nothing. Who has to wait hands itself to whoever schedules (``actors.wait``); without a scheduler nobody else
could ever release the lock, and the wait is an error: DeadlockError, EDEADLK.

*Lenient* locks, all those inside mmap_lock, are an exception to the latter: without a scheduler, who finds one taken
goes on nevertheless. What a point hook does stands on the stack of what it interrupts, and could not be taken back in
the middle; and the code under these locks looks at everything again behind a point anyway.

A lock tells a search which steps it makes depend on each other (``actors.access``): who reads looks at it, who writes
changes it, and two readers do not depend on each other.
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
        self.writer = 0
        """How many write; more than one only where a lenient lock was passed."""
        self.read = Reading(self)
        self.write = Writing(self)
        self.nested = Writing(self, nest=True)
        """As ``write``, by who holds other locks of the class and has an order for them."""
        actors.made(self)

    @property
    def taken(self) -> bool:
        """Somebody holds it."""
        actors.access(self, write=True)  # readers change it, too
        return self.writer > 0 or self.readers > 0

    def wait_for_writer(self) -> None:
        """Returns when nobody holds it for writing: as if it was taken for reading and dropped at once."""
        if check.checker is not None:
            check.checker.before(self, "read", False)
        actors.access(self, write=False)
        if self.writer:
            self.block("read", self._no_writer)

    def block(self, how: str, ready: Callable[[], bool]) -> None:
        """Waits until ``ready()``; not for a lenient lock that nobody could ever drop."""
        if self.cls.lenient and not actors.can_wait():
            return
        holder = "its writer" if self.writer else f"{self.readers} readers"
        while not ready():
            actors.wait(f"{how} of {self.name}", ready, because=f"{holder} would have to go on first")

    def _no_writer(self) -> bool:
        actors.access(self, write=False)
        return not self.writer

    def _free(self) -> bool:
        actors.access(self, write=True)
        return not self.writer and not self.readers

    def downgrade(self) -> None:
        """The writer goes on as a reader, until its ``with`` ends."""
        actors.access(self, write=True)
        self.writer -= 1
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
        if actors.watched:
            actors.access(lock, write=False)
        if lock.writer:
            lock.block("read", lock._no_writer)
        lock.readers += 1
        if check.checker is not None:
            check.checker.acquired(lock, "read")

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        if actors.watched:
            actors.access(lock, write=False)
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
        if actors.watched:
            actors.access(lock, write=True)
        if lock.writer or lock.readers:
            lock.block("write", lock._free)
        lock.writer += 1
        if check.checker is not None:
            check.checker.acquired(lock, "write")

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        if actors.watched:
            actors.access(lock, write=True)
        if lock.writer:
            lock.writer -= 1
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
        actors.made(self)

    def __call__(self, number: int, *, nest: bool = False) -> Keyed:
        """The lock ``number`` as a context."""
        return Keyed(self, number, self._name, self._cls, nest)

    def free(self, number: int) -> bool:
        """Nobody holds it."""
        actors.access(self, number, write=False)
        return number not in self.held

    def free_range(self, first: int, end: int) -> bool:
        """Nobody holds any of ``[first, end)``."""
        actors.access_range(self, first, end, write=False)
        return not any(first <= number < end for number in self.held)

    def wait(self, number: int) -> bool:
        """Returns when nobody holds it, as if it was taken and dropped at once; False when it was passed."""
        lock = self(number)
        with lock:
            return lock.owner is not None

    def attempt(self, number: int) -> Keyed | None:
        """The lock ``number``, taken, if it is free: ``drop`` it. Any order will do, as nobody waits."""
        actors.access(self, number, write=False)
        if number in self.held:
            return None
        lock = self(number)
        lock.take()
        return lock

    def not_others(self, number: int) -> None:
        """Returns when nobody but the current actor holds it."""
        actors.access(self, number, write=False)
        found = self.held.get(number)
        if self._cls.lenient and not actors.can_wait():
            return
        while found is not None and found.owner is not actors.current:
            actors.wait(found.name, lambda: number not in self.held, because="its holder would have to go on first")
            found = self.held.get(number)

    def wait_range(self, first: int, end: int) -> None:
        """Returns when nobody holds any of ``[first, end)``. For what then passes no point until it is done."""
        if check.checker is not None and first < end:
            check.checker.before(self(first), "write", False)
        actors.access_range(self, first, end, write=False)
        if self.held and (actors.can_wait() or not self._cls.lenient):
            actors.wait(
                f"{self._name.format(first)} to {end - 1:#x}",
                lambda: not any(first <= number < end for number in self.held),
                because="who holds one of them would have to go on first",
            )


class Keyed:
    """One of :class:`KeyedLocks`; good for one ``with`` at a time."""

    __slots__ = ("_all", "_format", "_nest", "_number", "cls", "owner")

    def __init__(self, all: KeyedLocks, number: int, format: str, cls: LockClass, nest: bool) -> None:
        self._all = all
        self._number = number
        self._format = format
        self._nest = nest
        self.cls = cls
        self.owner: actors.Actor | None = None
        """Who holds it; None for one that was passed."""

    @property
    def name(self) -> str:
        """For errors."""
        return self._format.format(self._number)

    def take(self) -> None:
        """It is free: now it is not."""
        if actors.watched:
            actors.access(self._all, self._number, write=True)
        self._all.held[self._number] = self
        self.owner = actors.current
        if check.checker is not None:
            check.checker.acquired(self, "write")

    def drop(self) -> None:
        """Gives it back."""
        if actors.watched:
            actors.access(self._all, self._number, write=True)
        if self._all.held.pop(self._number, None) is not self:
            raise InternalError(f"{self.name} is dropped, and was not held")
        if check.checker is not None:
            check.checker.released(self)

    def __enter__(self) -> None:
        held, number = self._all.held, self._number
        if check.checker is not None:
            check.checker.before(held.get(number, self), "write", self._nest)
        if actors.watched:
            actors.access(self._all, number, write=False)
        if self.cls.lenient and number in held and not actors.can_wait():
            return
        while number in held:
            actors.wait(self.name, lambda: number not in held, because="its holder would have to go on first")
        self.take()

    def __exit__(self, *_: object) -> None:
        if self.owner is not None:
            self.drop()
