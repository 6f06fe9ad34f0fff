"""The last events of a run, kept in memory for crash reports."""

from __future__ import annotations

from collections import deque

from xipvm.address import PAGE_SHIFT
from xipvm.trace.events import KINDS, Event, spans


class History:
    """A sink (``trace.attach(history)``) that remembers the last ``limit`` events, oldest first."""

    __slots__ = ("_remember", "events")

    def __init__(self, limit: int = 4096) -> None:
        self.events: deque[Event] = deque(maxlen=limit)
        self._remember = self.events.append

    def __call__(self, event: Event) -> None:
        """Remember ``event``."""
        self._remember(event)

    def touching(
        self, *, pfn: int | None = None, gfn: int | None = None, hva: int | None = None, last: int = 16
    ) -> list[Event]:
        """The last ``last`` remembered events that name host frame ``pfn``, guest frame ``gfn`` or address ``hva``.

        Oldest first. An event that names any of them counts, by a range or a run too.
        """
        wanted = {"pfn": pfn, "gfn": gfn, "hva": None if hva is None else hva >> PAGE_SHIFT}
        found: list[Event] = []
        for event in reversed(self.events):
            if len(found) == last:
                break
            for space, first, end in spans(KINDS[event.kind], event.fields):
                page = wanted.get(space)
                if page is not None and first <= page < end:
                    found.append(event)
                    break
        return found[::-1]
