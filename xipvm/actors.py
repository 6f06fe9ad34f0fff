"""Schedule points: the places where a real kernel could be preempted.

Code calls ``point("kvm.fault.gup_done")`` there. In a normal run nothing happens; a scheduler
installs itself with ``on_point`` and may then run other actors before the call returns. Between
two points an actor is atomic. Nothing else may be assumed: whatever was read before a point has
to be checked again after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

PointHook = Callable[[str], None]

_hook: PointHook | None = None


def point(label: str) -> None:
    """A place where another actor may run. ``label`` names it, dotted, module first."""
    if _hook is not None:
        _hook(label)


@contextmanager
def on_point(hook: PointHook) -> Iterator[None]:
    """Call ``hook(label)`` at every point while the context is open; contexts nest, the innermost counts."""
    global _hook
    previous = _hook
    _hook = hook
    try:
        yield
    finally:
        _hook = previous
