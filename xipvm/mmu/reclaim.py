"""Memory pressure: watermarks, kswapd, direct reclaim, and the end of it.

::

    frames free
        high  ┈┈  kswapd goes on until here, and sleeps
        low   ┈┈  an allocation that would leave no more than this wakes kswapd
        min   ┈┈  an allocation that would leave no more than this reclaims by itself, and if that is in vain, calls the
                  OOM killer (oom.py)

Nothing of this is on the way of an allocation that succeeds: ``HostMemory.watermark`` makes one that comes to *low*
fail like one that finds no frame, and whoever made it comes here (:func:`make_room`) and tries again from the
beginning, having looked at nothing before. That is also why reclaim may pass schedule points.

kswapd is an actor. In a normal run it runs to completion in the allocation that woke it, so that equal runs are equal.
Who schedules actors calls :meth:`Reclaim.kswapd` in one of its own; then allocations only wake it and go on, down to
*min*. While kswapd fails, *min* is what counts.

A host has no watermarks before :func:`watch_memory`; then an allocation fails when there is no frame, and that is that.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING, Final, TypeVar

from xipvm import actors
from xipvm.actors import wait
from xipvm.errors import OutOfFrames
from xipvm.mmu.huge_page import deferred_split_scan
from xipvm.mmu.lru import Lru
from xipvm.mmu.oom import Watermarks, out_of_memory
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.workingset import Workingset

if TYPE_CHECKING:
    from xipvm.actors import Actor
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace

CLUSTER: Final = 32
"""Pages of a list that are looked at before it is another one's turn (SWAP_CLUSTER_MAX)."""
PRIORITY: Final = 12
"""The first round looks at 1/2**12 of the pages, each further one at twice as many."""
SLACK: Final = 4
"""No fault needs more frames than this."""
RETRIES: Final = 3
"""Times that all lists are gone through in vain before memory counts as exhausted.

Linux tries up to 16 times, since others may free memory meanwhile; here nobody does who was not asked.
"""

T = TypeVar("T")


def watermarks(pages: int) -> Watermarks:
    """Linux's for a memory of so many pages: min is 4 * sqrt(KiB) KiB, low and high a quarter and a half more."""
    low = max(min(4 * isqrt(pages * 4), 1 << 18), 128) // 4
    step = max(low // 4, pages // 1000)
    return Watermarks(low, low + step, low + 2 * step)


class Reclaim:
    """Reclaim of one host memory; :func:`watch_memory` makes it."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self._host = host
        self._trace = trace
        rmap = reverse_map(host)
        self.marks = watermarks(host.nr_frames)
        self.lru = Lru(host, rmap, trace)
        self.workingset = Workingset(host, trace)
        self.wanted = False
        """kswapd is to run."""
        self.scheduled = False
        """Somebody runs :meth:`kswapd`."""
        self.stopped = False
        self.kswapd_runs = 0
        """How often it had something to do."""
        self.kills = 0
        self._at_work: set[Actor] = set()
        host.watermark = self.marks.low

    # ---- allocations that failed

    def make_room(self, mm: Mm | None, oom: bool) -> bool:
        """See :func:`make_room`."""
        host, marks = self._host, self.marks
        if actors.current in self._at_work:  # reclaim itself gets the last frames
            return False
        if mm is not None and mm.oom is not None:
            return False
        self._wake_kswapd()
        if host.free_frames >= marks.high:
            host.watermark = marks.low
            return True
        host.watermark = marks.min
        # Who needs several frames has given back what it had, and would not get further with them.
        if host.free_frames > marks.min + SLACK:
            return True
        before = self.lru.reclaimed
        for _ in range(RETRIES):
            self._direct()
            if host.free_frames > marks.min and self.lru.reclaimed > before:
                return True
        while oom and out_of_memory(host, self._trace, marks, mm):
            self.kills += 1
            if mm is not None and mm.oom is not None:
                return False
            if host.free_frames > marks.min:
                return True
        return False

    def _direct(self) -> None:
        before = self.lru.reclaimed
        self._run(self.marks.min + CLUSTER)
        if self._trace.on:
            free = self._host.free_frames
            self._trace.emit("direct_reclaim", free=free, min=self.marks.min, reclaimed=self.lru.reclaimed - before)

    # ---- kswapd

    def _wake_kswapd(self) -> None:
        self.wanted = True
        if not self.scheduled:
            before = self._trace.actor
            self._trace.actor = "kswapd0"
            try:
                self._balance()
            finally:
                self._trace.actor = before

    def kswapd(self) -> None:
        """kswapd, as an actor of its own: until :meth:`stop`."""
        self.scheduled = True
        try:
            while True:
                wait("kswapd", lambda: self.wanted or self.stopped, label="kswapd.sleep")
                if self.stopped:
                    return
                self._balance()
        finally:
            self.scheduled = False

    def stop(self) -> None:
        """Ends :meth:`kswapd`."""
        self.stopped = True

    def _balance(self) -> None:
        """Reclaims until ``high``."""
        self.wanted = False
        host, trace, marks = self._host, self._trace, self.marks
        if host.free_frames >= marks.high:
            return
        self.kswapd_runs += 1
        before = self.lru.reclaimed
        if trace.on:
            trace.emit("kswapd_wake", free=host.free_frames, low=marks.low)
        self._run(marks.high)
        if host.free_frames >= marks.high:
            host.watermark = marks.low
        if trace.on:
            gone = self.lru.reclaimed - before
            trace.emit("kswapd_sleep", free=host.free_frames, high=marks.high, reclaimed=gone)

    # ---- the work

    def _run(self, target: int) -> None:
        """Reclaims until ``target`` frames are free, or all pages were looked at.

        Active pages are left alone as long as the inactive ones are enough of them; if those do not help, nobody is.
        """
        me = actors.current
        if me in self._at_work:
            return
        self._at_work.add(me)
        try:
            if self._host.free_frames < target:
                deferred_split_scan(self._host)
            for force in (False, True):
                for priority in range(PRIORITY, -1, -1):
                    if self._host.free_frames >= target:
                        return
                    self._shrink(self.lru.quotas(priority), target, force)
        finally:
            self._at_work.discard(me)

    def _shrink(self, quotas: list[int], target: int, force: bool) -> None:
        lru = self.lru
        while any(quotas) and self._host.free_frames < target:
            for list, quota in enumerate(quotas):
                pages = min(quota, CLUSTER)
                quotas[list] -= pages
                file, active = list >= 2, bool(list & 1)
                if not active:
                    lru.shrink_inactive(pages, file)
                elif force or lru.inactive_is_low(file):
                    lru.shrink_active(pages, file)


def watch_memory(host: HostMemory, trace: Trace) -> Reclaim:
    """Gives ``host`` watermarks: from now on allocations leave frames free, and reclaim makes room."""
    rmap = reverse_map(host)
    if rmap.reclaim is None:
        rmap.reclaim = Reclaim(host, trace)
    return rmap.reclaim


def make_room(host: HostMemory, mm: Mm | None = None, *, oom: bool = True) -> bool:
    """An allocation, for ``mm`` if any, has raised OutOfFrames: reclaims; whether it is worth another try.

    Everything may have changed meanwhile. If nothing can be reclaimed and ``oom`` says so, somebody is killed; the
    answer is no when that is ``mm``. Called without any lock but mmap_lock for reading.
    """
    reclaim = reverse_map(host).reclaim
    return reclaim is not None and reclaim.make_room(mm, oom)


def retry(host: HostMemory, operation: Callable[[], T], *, oom: bool = True) -> T:
    """The result of ``operation``, which is done again as long as it raises OutOfFrames and room can be made."""
    while True:
        try:
            return operation()
        except OutOfFrames:
            if not make_room(host, oom=oom):
                raise
