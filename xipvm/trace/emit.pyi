"""The native part of the funnel, and the base of native sinks. See emit.pyx."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from xipvm.trace.events import Event

class Listener:
    """A sink that takes events without an :class:`Event` being made. Attach it as any other, or call it with events."""

    def __call__(self, event: Event) -> None:
        """Take an event that comes from somewhere else, a file for instance. Raises BadInput if it lacks a field."""

class Ticking(Protocol):
    """What makes time go on."""

    @property
    def ticks(self) -> int: ...
    @property
    def time_offset(self) -> int: ...
    @time_offset.setter
    def time_offset(self, value: int) -> None: ...

class VirtualTime:
    """Time that an engine makes go on while it runs: ``base``, and what it has ticked since ``start``; ns.

    ``floor``: no earlier time is told. Calling it gives the time.
    """

    base: int
    start: int
    floor: int
    def __call__(self) -> int: ...
    def enter(self, engine: Ticking) -> None:
        """From here on ``engine`` runs: an object with ``ticks`` and ``time_offset``, which is time less ticks."""
    def leave(self, counts: bool) -> None:
        """It runs no longer. What it has ticked is added to ``base`` if it ``counts``."""

class Because:
    """What :meth:`Emitter.because` returns."""

    def __enter__(self) -> None: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

class Emitter:
    """What of a Trace is native. Its subclass has the slots actor, cause and clock."""

    __slots__ = ()
    @property
    def seq(self) -> int:
        """Sequence number of the last event."""
    def emit(self, kind: str, /, **fields: Any) -> int:
        """Tell every sink that ``kind`` happened. Returns its sequence number, 0 when nobody listens.

        ``fields`` are those that :data:`xipvm.trace.events.KINDS` declares; sinks that encode
        or judge them raise InternalError for others.
        """
    def because(self, seq: int) -> Because:
        """A context in which events are caused by event ``seq``; afterwards the old cause is back."""
    def _attach(self, sink: Callable[[Event], None]) -> None: ...
    def _detach(self, sink: Callable[[Event], None]) -> bool: ...

def bind(trace: type[Emitter], still: Callable[[], int]) -> None:
    """``trace`` is the subclass that has the slots; ``still`` the clock that need not be asked, as it always says 0."""
