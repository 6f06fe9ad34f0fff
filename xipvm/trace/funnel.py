"""The one funnel through which a machine says what happens.

A machine owns one :class:`Trace`. Code that has something to say writes ::

    if trace.on:
        seq = trace.emit("spte_set", vm=self.name, gfn=gfn, pfn=pfn, rights="rw")

so that an untraced run pays one attribute test. Sinks (the recorder, the history for crash reports, the
oracle) are called in the order in which they were attached, each with the same :class:`Event`; they must
neither change it nor emit. Sequence numbers run from 1 over everything emitted while a sink was attached.

``actor`` says who acts; whoever switches actors sets it, together with ``cause``. ``cause`` is the event that provoked
what happens now::

    with trace.because(seq):
        ...                     # everything emitted in here says `<- #seq`
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from xipvm.trace.events import Event

Sink = Callable[[Event], None]

_event = tuple.__new__  # what Event(...) does, without the call of a Python function


def _no_clock() -> int:
    return 0


class Trace:
    """The funnel of one machine. Attributes may be set freely by whoever switches actors."""

    __slots__ = ("_seq", "_sinks", "actor", "cause", "clock", "on")

    def __init__(self, clock: Callable[[], int] = _no_clock) -> None:
        self.on = False
        """Somebody listens. Read only; attach and detach change it."""
        self.actor = "host"
        """Who acts now."""
        self.cause = 0
        """``seq`` of the event that provoked what happens now, 0 for none."""
        self.clock = clock
        """Gives the virtual time in ns."""
        self._seq = 0
        self._sinks: tuple[Sink, ...] = ()

    @property
    def seq(self) -> int:
        """Sequence number of the last event."""
        return self._seq

    def emit(self, kind: str, /, **fields: Any) -> int:
        """Tell every sink that ``kind`` happened. Returns its sequence number, 0 when nobody listens.

        ``fields`` are those that :data:`xipvm.trace.events.KINDS` declares; sinks that encode
        them raise InternalError for others.
        """
        if not self.on:
            return 0
        self._seq = seq = self._seq + 1
        event: Event = _event(Event, (seq, self.clock(), self.actor, self.cause, kind, fields))
        for sink in self._sinks:
            sink(event)
        return seq

    def because(self, seq: int) -> Because:
        """A context in which events are caused by event ``seq``; afterwards the old cause is back."""
        return Because(self, seq)

    def attach(self, sink: Sink) -> None:
        """Let ``sink`` see every event from now on."""
        self._sinks = (*self._sinks, sink)
        self.on = True

    def detach(self, sink: Sink) -> None:
        """Take back one ``attach(sink)``. Allowed while an event is delivered. Unknown sinks raise ValueError."""
        sinks = list(self._sinks)
        sinks.remove(sink)
        self._sinks = tuple(sinks)
        self.on = bool(sinks)


class Because:
    """What :meth:`Trace.because` returns."""

    __slots__ = ("_before", "_seq", "_trace")

    def __init__(self, trace: Trace, seq: int) -> None:
        self._trace = trace
        self._seq = seq
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._trace.cause
        self._trace.cause = self._seq

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._trace.cause = self._before
