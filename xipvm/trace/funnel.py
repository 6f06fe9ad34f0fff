"""The one funnel through which a machine says what happens.

A machine owns one :class:`Trace`. Code that has something to say writes ::

    if trace.on:
        seq = trace.emit("spte_set", vm=self.name, gfn=gfn, pfn=pfn, rights="rw")

so that an untraced run pays one attribute test. Sinks (the recorder, the history for crash reports, the
oracle) are called in the order in which they were attached, each with the same :class:`Event`; they must
neither change it nor emit. Sequence numbers run from 1 over everything emitted while a sink was attached.
``emit`` itself and native sinks, for which no Event is made, are in emit.pyx.

``actor`` says who acts; whoever switches actors sets it, together with ``cause``. ``cause`` is the event that provoked
what happens now::

    with trace.because(seq):
        ...                     # everything emitted in here says `<- #seq`
"""

from __future__ import annotations

from collections.abc import Callable

from xipvm.trace.emit import Emitter, bind
from xipvm.trace.events import Event

Sink = Callable[[Event], None]


def _no_clock() -> int:
    return 0


class Trace(Emitter):
    """The funnel of one machine. Attributes may be set freely by whoever switches actors."""

    __slots__ = ("actor", "cause", "clock", "on")

    def __init__(self, clock: Callable[[], int] = _no_clock) -> None:
        self.on = False
        """Somebody listens. Read only; attach and detach change it."""
        self.actor = "host"
        """Who acts now."""
        self.cause = 0
        """``seq`` of the event that provoked what happens now, 0 for none."""
        self.clock = clock
        """Gives the virtual time in ns."""

    def attach(self, sink: Sink) -> None:
        """Let ``sink`` see every event from now on."""
        self._attach(sink)
        self.on = True

    def detach(self, sink: Sink) -> None:
        """Take back one ``attach(sink)``. Allowed while an event is delivered. Unknown sinks raise ValueError."""
        self.on = self._detach(sink)


bind(Trace, _no_clock)
