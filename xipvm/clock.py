"""Virtual time: a nanosecond counter and the calls that wait for it.

Devices never ask the host what time it is; they read ``EventClock.now`` and leave a call for a later
instant. Two clocks can stand behind ``now``: a source that the machine gives (retired
instructions, or the host's clock), or, with no source, a counter that ``advance`` moves.

Invariants: due calls run in order of their instant, and calls of one instant in the order they were made;
a call runs at most once; a call made from inside a call runs in the same ``run_due`` when it is due already.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

TimeSource = Callable[[], int]


class Call:
    """A call that waits for its instant; what ``call_at`` returns and ``cancel`` takes."""

    __slots__ = ("fn", "ns", "order")

    def __init__(self, ns: int, order: int, fn: Callable[[], None]) -> None:
        self.ns = ns
        self.order = order
        self.fn: Callable[[], None] | None = fn

    def __lt__(self, other: Call) -> bool:
        return self.ns < other.ns or (self.ns == other.ns and self.order < other.order)


class EventClock:
    """Virtual time in nanoseconds and the calls that wait for it.

    ``on_earlier``, where set, is called with the instant of each new call that precedes every waiting one:
    the vCPU loop shortens the slice it is in. ``on_look`` is called before each ``look``.
    """

    def __init__(self, source: TimeSource | None = None) -> None:
        self.on_earlier: Callable[[int], None] | None = None
        self.on_look: Callable[[], None] | None = None
        self._source = source
        self._time = 0
        self._heap: list[Call] = []
        self._order = 0
        self._cancelled = 0

    @property
    def now(self) -> int:
        """Virtual time, ns."""
        return self._time if self._source is None else self._source()

    def follow(self, source: TimeSource) -> None:
        """Take the time from ``source`` (ns, never backwards) from now on."""
        self._source = source

    def unfollow(self) -> None:
        """Stand still at the source's last time; ``advance`` moves the clock again."""
        self._time = self.now
        self._source = None

    def look(self) -> int:
        """As ``now``, for a guest that reads a clock register: one that does so over and over is waiting."""
        if self.on_look is not None:
            self.on_look()
        return self.now

    def call_at(self, ns: int, fn: Callable[[], None]) -> Call:
        """Call ``fn()`` in the first ``run_due`` at or after the instant ``ns``."""
        call = Call(ns, self._order, fn)
        self._order += 1
        earlier = self.on_earlier
        if earlier is not None:
            first = self.next_deadline()
            if first is None or ns < first:
                heapq.heappush(self._heap, call)
                earlier(ns)
                return call
        heapq.heappush(self._heap, call)
        return call

    def cancel(self, call: Call) -> None:
        """Take a waiting call back; nothing happens when it has run or was cancelled before."""
        if call.fn is None:
            return
        call.fn = None
        self._cancelled += 1
        # A timer that is programmed again and again leaves its old calls behind: sweep when most are dead.
        if self._cancelled > 64 and self._cancelled * 2 > len(self._heap):
            self._heap = [waiting for waiting in self._heap if waiting.fn is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_deadline(self) -> int | None:
        """The instant of the first waiting call, None when nothing waits."""
        heap = self._heap
        while heap and heap[0].fn is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0].ns if heap else None

    def run_due(self) -> int:
        """Run every call whose instant has come. Returns how many ran."""
        ran = 0
        while (deadline := self.next_deadline()) is not None and deadline <= self.now:
            self._run_first()
            ran += 1
        return ran

    def advance(self, ns: int) -> None:
        """Move a clock without a source ``ns`` on; every call on the way sees ``now`` at its own instant."""
        if self._source is not None:
            raise RuntimeError("this clock follows a source; only the source moves it")
        end = self._time + ns
        while (deadline := self.next_deadline()) is not None and deadline <= end:
            self._time = max(self._time, deadline)
            self._run_first()
        self._time = end

    def _run_first(self) -> None:
        call = heapq.heappop(self._heap)
        fn = call.fn
        call.fn = None
        if fn is not None:
            fn()
