"""Pages that come back too soon: were they in use, and did they go only because there is too little memory?

A clock (``age``) moves with every page that is reclaimed and with every one that is activated: with each of them the
oldest inactive page comes one place nearer to the end of its list. What time it was when a page went is kept where the
page went to (``shadow``: of a slot, of a place in a file). When it comes back, the time since is the *refault
distance*: so many places longer the inactive list would have had to be to keep the page. If the active pages, which
could have given way, are as many, the page belongs to the working set: it comes back active, and the others have to
prove themselves again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.mmu.frames import (
    LRU_ACTIVE_ANON,
    LRU_ACTIVE_FILE,
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    PG_FILE,
    PG_WORKINGSET,
    HostMemory,
)

if TYPE_CHECKING:
    from xipvm.trace.funnel import Trace

_WORKINGSET: Final = 1
"""The lowest bit of a shadow: the page had been active before it went."""


class Workingset:
    """The clock of one host memory."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self._host = host
        self._trace = trace
        self.age = 0
        self.refaults = 0
        """Pages that came back."""
        self.activations = 0
        """Those of them that belonged to the working set."""

    def evicted(self, pfn: int) -> int:
        """The shadow of a page that is being reclaimed."""
        shadow = self.age << 1 | (_WORKINGSET if self._host.flags(pfn) & PG_WORKINGSET else 0)
        self.age += 1
        return shadow

    def refault(self, pfn: int, shadow: int, *, swap: bool) -> bool:
        """``pfn``, a new page on an LRU list, has the content of which ``shadow`` was left; whether it is active now.

        ``swap``: anonymous pages can be reclaimed, too.
        """
        host = self._host
        file = bool(host.flags(pfn) & PG_FILE)
        distance = self.age - (shadow >> 1)
        size = host.lru_count(LRU_ACTIVE_FILE)
        if not file:
            size += host.lru_count(LRU_INACTIVE_FILE)
        if swap:
            size += host.lru_count(LRU_ACTIVE_ANON)
            if file:
                size += host.lru_count(LRU_INACTIVE_ANON)
        self.refaults += 1
        active = distance <= size
        if active:
            self.age += 1
            self.activations += 1
            host.lru_move(pfn, LRU_ACTIVE_FILE if file else LRU_ACTIVE_ANON)
            if shadow & _WORKINGSET:
                host.set_flags(pfn, PG_WORKINGSET)
        if self._trace.on:
            self._trace.emit("workingset_refault", pfn=pfn, distance=distance, active=active)
        return active
