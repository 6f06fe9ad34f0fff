"""Where an actor may sleep, and what it sleeps for.

A callback that is called under a spinlock, from the TLB flush code or for a range that may not block runs in an
*atomic* section; what may sleep says so with :func:`might_sleep`, which reports a defect there. Schedule points are
allowed in atomic sections: other CPUs run on. Every greenlet has sections of its own.

Sleeping is looking again and again, with a schedule point between: :func:`wait_until`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from xipvm.actors import point
from xipvm.errors import InternalError

PATIENCE = 1000
"""Looks after which a sleeper concludes that nobody will ever wake it."""

_atomic: ContextVar[str] = ContextVar("atomic", default="")


@contextmanager
def atomic(why: str) -> Iterator[None]:
    """A section in which the actor must not sleep."""
    before = _atomic.set(why)
    try:
        yield
    finally:
        _atomic.reset(before)


def might_sleep(what: str) -> None:
    """Raises InternalError in an atomic section."""
    why = _atomic.get()
    if why:
        raise InternalError(f"{what} may sleep, and was called in {why}")


def wait_until(condition: Callable[[], bool], label: str) -> bool:
    """Sleep at schedule point ``label`` until ``condition()``.

    False when it did not come true however often others could run: what it waits for is further up its own stack.
    """
    for _ in range(PATIENCE):
        if condition():
            return True
        point(label)
    return condition()
