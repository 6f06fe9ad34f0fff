"""The rules of locking, checked while somebody looks: ``with checking(): ...``.

Off, which is the default, it costs one comparison a lock. On, every lock that is taken is looked at before it is waited
for, so that a mistake shows in every schedule and not only in the one that deadlocks:

* *order*: against the ranks of order.py; and where those say nothing, against the orders seen so far. Each pair of
  classes (held, taken) is an edge of a graph; an edge that closes a circle is reported with the stack at which its
  opposite was first seen;
* *recursion*: no lock is taken twice by one actor, not even for reading: between the two a writer may queue. Two locks
  of a class are taken together only by who says so (``nest``);
* *atomicity*: where a spinlock is held, or in an :func:`atomic` section, nobody may sleep: take a sleeping lock, or
  call what says :func:`might_sleep`;
* *leaks*: who is done, or goes back to the guest, holds nothing (:func:`nothing_held`).

``atomic`` and ``might_sleep`` are always on; only their stacks are missing then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xipvm import actors
from xipvm.errors import AtomicSleepError, InternalError, LockLeakError, LockOrderError, RecursiveLockError
from xipvm.locks.order import LockClass
from xipvm.locks.stack import Stack, show, take

if TYPE_CHECKING:
    from xipvm.actors import Actor


class Held:
    """A lock that an actor holds: which, how (``read`` or ``write``), and where it was taken."""

    __slots__ = ("cls", "how", "lock", "stack")

    def __init__(self, lock: Any, cls: LockClass | None, how: str, stack: Stack) -> None:
        self.lock = lock
        self.cls = cls
        self.how = how
        self.stack = stack

    def __str__(self) -> str:
        return f"{self.lock.name} ({self.how})"


class Checker:
    """What is known of the use of locks so far. ``orders`` are the pairs (held, taken) that were seen."""

    def __init__(self) -> None:
        self.orders: dict[tuple[LockClass, LockClass], tuple[Stack, Stack]] = {}
        """Where the first of the two was taken, and where the second."""
        self.taken = 0
        """Locks that were looked at."""

    def before(self, lock: Any, how: str, nest: bool) -> None:
        """``lock`` is about to be taken, or waited for. Raises LockError."""
        self.taken += 1
        actor = actors.current
        cls: LockClass = lock.cls
        if not cls.spins and (actor.atomic or actor.held):
            self.may_sleep(f"taking {lock.name}")
        for held in actor.held:
            if held.lock is lock:
                raise RecursiveLockError(
                    f"{actor.name} takes {lock.name} ({how}), which it holds ({held.how})",
                    actor=actor.name, first=show(held.stack), second=show(take()),
                )  # fmt: skip
            if held.cls is None or (held.cls is cls and nest):
                continue
            if held.cls is cls:
                why = f"{lock.name} is taken while {held.lock.name} is held, and nothing orders the two"
                self._refuse(actor, cls, cls, held.stack, take(), why)
            elif (held.cls, cls) not in self.orders:
                self._learn(actor, held, lock)

    def _learn(self, actor: Actor, held: Held, lock: Any) -> None:
        first, second = held.cls, lock.cls
        assert first is not None
        stack = take()
        why = f"{lock.name} is taken while {held.lock.name} is held"
        if first.rank is not None and second.rank is not None and first.rank > second.rank:
            self._refuse(actor, first, second, held.stack, stack, f"{why}, but {second.name} comes before {first.name}")
        path = self._path(second, first)
        if path is not None:
            names = " → ".join(cls.name for cls in path)
            self._refuse(actor, first, second, self.orders[path[0], path[1]][1], stack, f"{why}, but {names} was seen")
        self.orders[first, second] = held.stack, stack

    def _refuse(self, actor: Actor, held: LockClass, taken: LockClass, first: Stack, second: Stack, what: str) -> None:
        raise LockOrderError(
            f"{actor.name}: {what}", actor=actor.name, first=show(first), second=show(second),
            held=held.name, taken=taken.name,
        )  # fmt: skip

    def _path(self, start: LockClass, goal: LockClass) -> list[LockClass] | None:
        """By which orders that were seen ``goal`` is taken under ``start``."""
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for first, second in self.orders:
                if first is path[-1] and second not in seen:
                    if second is goal:
                        return [*path, second]
                    seen.add(second)
                    paths.append([*path, second])
        return None

    def acquired(self, lock: Any, how: str) -> None:
        """The current actor has ``lock`` now."""
        actors.current.held.append(Held(lock, lock.cls, how, take()))

    def entered(self, section: Any) -> None:
        """The current actor is in a read section that may be nested and has no place in the order."""
        actors.current.held.append(Held(section, None, "read", take()))

    def released(self, lock: Any) -> None:
        """The current actor has ``lock`` no longer. What was taken before anybody looked is not known."""
        held = actors.current.held
        for at in range(len(held) - 1, -1, -1):
            if held[at].lock is lock:
                del held[at]
                return

    def downgraded(self, lock: Any) -> None:
        """The current actor holds ``lock`` for reading only."""
        for held in actors.current.held:
            if held.lock is lock:
                held.how = "read"

    def not_in(self, section: Any, what: str) -> None:
        """``what`` waits for those in ``section`` to leave it. Raises RecursiveLockError when the current actor is."""
        actor = actors.current
        for held in actor.held:
            if held.lock is section:
                raise RecursiveLockError(
                    f"{what}: {actor.name} is itself in {section.name}",
                    actor=actor.name, first=show(held.stack), second=show(take()),
                )  # fmt: skip

    def may_sleep(self, what: str) -> None:
        """Raises AtomicSleepError where the current actor holds a spinlock or is in an atomic section."""
        actor = actors.current
        for held in actor.held:
            if held.cls is not None and held.cls.spins:
                _refuse_sleep(what, held.lock.name, held.stack)
        if actor.atomic:
            _refuse_sleep(what, *actor.atomic[0])


checker: Checker | None = None
"""Who checks now, if anybody does."""


@contextmanager
def checking() -> Iterator[Checker]:
    """Locks are checked while the context is open, in the whole process. A context inside has a graph of its own."""
    global checker
    actor = actors.current
    before, checker = checker, Checker()
    held, actor.held = actor.held, []  # what was taken before anybody looked is not known; nor is who drops it later
    try:
        yield checker
    finally:
        checker = before
        actor.held = held


@contextmanager
def atomic(why: str) -> Iterator[None]:
    """A section in which the current actor must not sleep. Schedule points are allowed: other CPUs run on."""
    sections = actors.current.atomic
    sections.append((why, take() if checker is not None else ()))
    try:
        yield
    finally:
        sections.pop()


def might_sleep(what: str) -> None:
    """Raises AtomicSleepError in an atomic section, and while locks are checked under a spinlock."""
    if checker is not None:
        checker.may_sleep(what)
    elif actors.current.atomic:
        _refuse_sleep(what, *actors.current.atomic[0])


def sleep_until(what: str, ready: Callable[[], bool], *, because: str = "", label: str = "") -> None:
    """:func:`xipvm.actors.wait` of somebody who sleeps. Raises AtomicSleepError, also when there is no need to wait."""
    might_sleep(what)
    actors.wait(what, ready, because=because, label=label)


def nothing_held(where: str, actor: Actor | None = None) -> None:
    """Raises LockLeakError, while locks are checked, when ``actor``, by default the current one, holds any."""
    if checker is None:
        return
    actor = actor or actors.current
    if actor.held:
        names = tuple(map(str, actor.held))
        raise LockLeakError(
            f"{actor.name} holds {', '.join(names)} {where}",
            actor=actor.name, first=show(actor.held[0].stack), second=show(take()), held=names,
        )  # fmt: skip
    if actor.atomic:
        raise InternalError(f"{actor.name} is in {actor.atomic[-1][0]} {where}")


def _refuse_sleep(what: str, why: str, began: Stack) -> None:
    raise AtomicSleepError(
        f"{what} may sleep, and was called in {why}",
        actor=actors.current.name, first=show(began), second=show(take()), why=why,
    )  # fmt: skip
