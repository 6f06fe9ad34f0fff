"""Who acts, and where others may: schedule points, and the one way to wait.

Everything that can run concurrently in a real host is an :class:`Actor`. Code calls ``point("kvm.fault.gup_done")``
where a real kernel could be preempted, and ``wait(what, ready)`` where it sleeps or spins. In a normal run there is one
actor, points do nothing, and nobody ever has to wait: everything runs to completion. A scheduler (scheduler.py) runs
several actors and decides at every point who goes on. Between two points an actor is atomic. Nothing else may be
assumed: whatever was read before a point has to be checked again after it.

``on_point`` is for those who want to look at points, or to do something at one, without a scheduler. What its hook
does counts as another actor's doing: it holds none of the locks that the interrupted one holds.

An actor that waits for something that nobody can bring about is an error: DeadlockError, an MmError EDEADLK.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from xipvm.errors import DeadlockError

if TYPE_CHECKING:
    from greenlet import greenlet

    from xipvm.locks.stack import Stack

PointHook = Callable[[str], None]
WaitHook = Callable[[str, Callable[[], bool]], None]
AccessHook = Callable[[object, Hashable, bool], None]
RangeHook = Callable[[object, int, int, bool], None]

PATIENCE: Final = 1000
"""How often a wait calls a point hook, where there is no scheduler, before it concludes that nothing comes of it."""


class State(Enum):
    """What an actor is about."""

    READY = "ready"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


class Actor:
    """Somebody who runs beside others. ``name`` is what traces call it."""

    __slots__ = (
        "after",
        "atomic",
        "body",
        "cause",
        "error",
        "gives_way",
        "greenlet",
        "held",
        "name",
        "on_enter",
        "on_leave",
        "ran",
        "ready",
        "state",
        "trace_name",
        "waits_for",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.READY
        self.greenlet: greenlet | None = None
        """Its stack, None without a scheduler."""
        self.body: tuple[object, ...] | None = None
        """What it calls, and with what, if that was told."""
        self.waits_for = ""
        """While it waits: what for, in words."""
        self.ready: Callable[[], bool] | None = None
        """While it waits: whether it can go on."""
        self.held: list[Any] = []
        """The locks it holds (:class:`xipvm.locks.check.Held`), in the order of taking. Known while checked."""
        self.atomic: list[tuple[str, Stack]] = []
        """The atomic sections it is in, outermost first: why, and where each began."""
        self.error: BaseException | None = None
        """What it failed with."""
        self.gives_way = False
        """It has nothing to do until somebody else has done something."""
        self.after: set[Actor] = set()
        """It gave way, and these go first."""
        self.ran: set[Actor] = set()
        """Who has run since it gave way the last time."""
        self.trace_name = name
        self.cause = 0
        self.on_enter: Callable[[], None] | None = None
        self.on_leave: Callable[[], None] | None = None
        """Called by the scheduler whenever it goes on, and whenever another does instead."""

    def __repr__(self) -> str:
        what = f" for {self.waits_for}" if self.state is State.WAITING else ""
        return f"<actor {self.name}: {self.state.value}{what}>"


current: Actor = Actor("host")
"""Who acts now. Set by schedulers only."""

_point_hook: PointHook | None = None
_wait_hook: WaitHook | None = None
_access_hook: AccessHook | None = None
_range_hook: RangeHook | None = None
_made_hook: Callable[[object], object] | None = None

watched: bool = False
"""Somebody listens to :func:`access`, which need not be called otherwise. Set by :func:`on_access` only."""


def point(label: str) -> None:
    """A place where another actor may run. ``label`` names it, dotted, module first."""
    if _point_hook is not None:
        _point_hook(label)


def hooked() -> bool:
    """Somebody looks at points: what another actor does can come between."""
    return _point_hook is not None


def give_way(label: str) -> None:
    """A point for who tries again and again: others go first, if any can, so that a search does not try for ever."""
    actor = current
    actor.gives_way = True
    try:
        point(label)
    finally:
        actor.gives_way = False


def wait(what: str, ready: Callable[[], bool], *, because: str = "", label: str = "") -> None:
    """Returns when ``ready()``, which must not change anything and may be called at any time by anybody.

    Raises DeadlockError when that cannot come true: without a scheduler, or when all its actors wait. ``what`` is what
    is waited for and ``because`` why it is not ready. ``label`` makes it a schedule point for those who hook points
    without a scheduler: they are called until it is ready, or patience ends.
    """
    if ready():
        return
    if _wait_hook is not None:
        _wait_hook(what, ready)
        return
    if label and _point_hook is not None:
        for _ in range(PATIENCE):
            _point_hook(label)
            if ready():
                return
    raise DeadlockError(f"{what}: {because or 'nobody can go on'}")


def access(owner: object, what: Hashable = "", *, write: bool) -> None:
    """For searches that leave out what is the same: the current step reads, or writes to, ``what`` of ``owner``.

    Nothing is done when nobody listens. What xipvm's own model touches is known without (explore/footprint.py).
    """
    if _access_hook is not None:
        _access_hook(owner, what, write)


def access_range(owner: object, first: int, end: int, *, write: bool) -> None:
    """As :func:`access`, for all numbers of ``[first, end)``."""
    if _range_hook is not None:
        _range_hook(owner, first, end, write)


def made(owner: object) -> None:
    """The current step has made ``owner``, of which :func:`access` will tell."""
    if _made_hook is not None:
        _made_hook(owner)


def on_access(single: AccessHook | None, ranges: RangeHook | None, birth: Callable[[object], object] | None) -> None:
    """Who listens to :func:`access`, :func:`access_range` and :func:`made` from now on, if anybody. For searches."""
    global _access_hook, _range_hook, _made_hook, watched
    _access_hook, _range_hook, _made_hook, watched = single, ranges, birth, single is not None


def can_wait() -> bool:
    """Somebody schedules, or decides what becomes of who has to wait."""
    return _wait_hook is not None


def scheduled() -> bool:
    """The current actor has a stack of its own: what it waits for can come while it waits."""
    return current.greenlet is not None


@contextmanager
def on_point(hook: PointHook) -> Iterator[None]:
    """Call ``hook(label)`` at every point while the context is open; contexts nest, the innermost counts."""
    global _point_hook
    others: list[Actor] = []
    depth = 0

    def run(label: str) -> None:
        global current
        nonlocal depth
        before = current
        if depth == len(others):
            others.append(Actor(f"{before.name}'"))
        current = others[depth]
        depth += 1
        try:
            hook(label)
        finally:
            depth -= 1
            current = before

    previous, _point_hook = _point_hook, run
    try:
        yield
    finally:
        _point_hook = previous


@contextmanager
def on_wait(hook: WaitHook) -> Iterator[None]:
    """Call ``hook(what, ready)`` when somebody has to wait; it returns when ``ready()`` holds. The innermost counts."""
    global _wait_hook
    previous, _wait_hook = _wait_hook, hook
    try:
        yield
    finally:
        _wait_hook = previous


def set_current(actor: Actor) -> Actor:
    """Makes ``actor`` the one that acts; returns who did before. For schedulers."""
    global current
    before, current = current, actor
    return before


def set_hooks(points: PointHook | None, waits: WaitHook | None) -> tuple[PointHook | None, WaitHook | None]:
    """Installs both hooks of a scheduler; returns those that were there."""
    global _point_hook, _wait_hook
    before = _point_hook, _wait_hook
    _point_hook, _wait_hook = points, waits
    return before
