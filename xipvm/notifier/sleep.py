"""Where an actor may sleep: the names under which notifiers know it. See :mod:`xipvm.locks.check`."""

from __future__ import annotations

from collections.abc import Callable

from xipvm.actors import wait
from xipvm.errors import DeadlockError
from xipvm.locks.check import atomic, might_sleep

__all__ = ["atomic", "might_sleep", "wait_until"]


def wait_until(condition: Callable[[], bool], label: str) -> bool:
    """Waits for ``condition()``; False when nobody can bring it about."""
    try:
        wait(label, condition, label=label)
    except DeadlockError:
        return False
    return True
