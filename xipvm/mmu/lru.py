"""Which pages reclaim looks at, in what order, and what becomes of those that stay.

There are four lists: anonymous pages (and memory files) and pages of files, each inactive and active. A new page goes
to the front of the inactive one. Pages are taken from the end of it: whoever was used since the last look goes back to
the front, once; used again by the next look, or by several, it is activated. An active list that is too long for its
inactive one gives its oldest pages back, used or not; only code of files stays.

A page that somebody looks at is isolated: on no list, and held. It goes back to a list unless it is gone.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Final

from xipvm.mmu.frames import (
    LRU_ACTIVE_ANON,
    LRU_ACTIVE_FILE,
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    PG_ACTIVE,
    PG_LRU,
    PG_REFERENCED,
    PG_SWAPBACKED,
    PG_WORKINGSET,
    HostMemory,
)
from xipvm.mmu.pageout import Used, referenced, take_out

if TYPE_CHECKING:
    from xipvm.mmu.rmap import ReverseMap
    from xipvm.trace.funnel import Trace

SWAPPINESS: Final = 60
"""How much anonymous pages are preferred to pages of files, of 200."""
_PAGES_PER_GIB: Final = 1 << 18


class Lru:
    """The lists of one host memory at work. ``put`` counts what was looked at."""

    def __init__(self, host: HostMemory, rmap: ReverseMap, trace: Trace) -> None:
        self._host = host
        self._rmap = rmap
        self._trace = trace
        self.scanned = 0
        """Pages that were looked at on inactive lists."""
        self.reclaimed = 0
        """Pages that went."""
        self._cost = [0, 0]
        """What reclaim of anonymous pages and of files cost in vain, of late: pages that came back or had to stay."""

    # ---- how much of what

    def count(self, list: int) -> int:
        """Pages of a list."""
        return self._host.lru_count(list)

    def quotas(self, priority: int) -> list[int]:
        """How many pages of each list to look at in a round that looks at 1/2**``priority`` of all (get_scan_count).

        The last round, 0, looks at all of them.
        """
        counts = [self.count(list) for list in range(4)]
        anon, file = self._fractions(counts)
        if not priority:
            anon, file = min(anon, 1), min(file, 1)
        whole = anon + file if priority else 1
        return [
            (count >> priority) * (anon if list < LRU_INACTIVE_FILE else file) // whole
            for list, count in enumerate(counts)
        ]

    def _fractions(self, counts: list[int]) -> tuple[int, int]:
        swap = self._rmap.swap
        if swap is None or (not swap.has_room and not swap.cache):
            # Anonymous pages that were given away are on the inactive list of files.
            return 0, 1
        if not counts[LRU_INACTIVE_FILE] and not counts[LRU_ACTIVE_FILE]:
            return 1, 0
        total = sum(self._cost) + 1
        anon = SWAPPINESS * total // (self._cost[0] + 1)
        file = (200 - SWAPPINESS) * total // (self._cost[1] + 1)
        return max(anon, 1), max(file, 1)

    def note_cost(self, file: bool, pages: int) -> None:
        """Reclaim of ``pages`` of one kind came to nothing, or had to be undone."""
        self._cost[file] += pages
        if sum(self._cost) > sum(map(self.count, range(4))) // 4:
            self._cost = [cost // 2 for cost in self._cost]

    def inactive_is_low(self, file: bool) -> bool:
        """The inactive list is short for its active one: 1 to 1 in small memories, 1 to 3 with a GiB of pages."""
        inactive, active = self.count(2 * file), self.count(2 * file + 1)
        gib = (inactive + active) // _PAGES_PER_GIB
        return inactive * (isqrt(10 * gib) if gib else 1) < active

    # ---- work

    def shrink_active(self, pages: int, file: bool) -> None:
        """Deactivates the oldest ``pages`` of an active list."""
        host = self._host
        active, inactive = (LRU_ACTIVE_FILE, LRU_INACTIVE_FILE) if file else (LRU_ACTIVE_ANON, LRU_INACTIVE_ANON)
        for _ in range(pages):
            pfn = self._isolate(active)
            if not pfn:
                return
            if referenced(host, pfn) >= Used.CODE:
                self._put_back(pfn, active)
            else:
                host.set_flags(pfn, PG_WORKINGSET)
                self._put_back(pfn, inactive)

    def shrink_inactive(self, pages: int, file: bool) -> int:
        """Looks at the oldest ``pages`` of an inactive list; how many went."""
        host = self._host
        gone = kept = 0
        for _ in range(pages):
            pfn = self._isolate(LRU_INACTIVE_FILE if file else LRU_INACTIVE_ANON)
            if not pfn:
                break
            self.scanned += 1
            activate = self._check_references(pfn, file)
            if activate is None and take_out(self._rmap, host, pfn):
                gone += 1
                self._put(pfn)
                continue
            kept += 1
            swapbacked = bool(host.flags(pfn) & PG_SWAPBACKED)
            if activate:
                self._give_up_slot(pfn)
                if host.flags(pfn) & PG_ACTIVE == 0 and self._rmap.reclaim is not None:
                    self._rmap.reclaim.workingset.age += 1
            self._put_back(pfn, (LRU_INACTIVE_ANON if swapbacked else LRU_INACTIVE_FILE) + bool(activate))
        self.reclaimed += gone
        self.note_cost(file, kept)
        return gone

    def _check_references(self, pfn: int, file: bool) -> bool | None:
        """Whether the page is activated, or stays as it is; None: it may go."""
        host = self._host
        used = referenced(host, pfn)
        before = bool(host.flags(pfn) & PG_REFERENCED)
        host.clear_flags(pfn, PG_REFERENCED)
        if used is Used.LOCKED:
            return True
        if used is Used.NOBODY:
            return None
        host.set_flags(pfn, PG_REFERENCED)
        return before or used >= Used.SEVERAL

    def _give_up_slot(self, pfn: int) -> None:
        """A page that stays has no use for its slot if others need one."""
        swap = self._rmap.swap
        if swap is not None and swap.nearly_full:
            swap.give_up_slot(pfn)

    def _isolate(self, list: int) -> int:
        """The oldest page of a list, off it and held; 0 when it is empty."""
        host = self._host
        pfn = host.lru_tail(list)
        if pfn:
            host.lru_isolate(pfn)
            host.get(pfn)
        return pfn

    def _put_back(self, pfn: int, list: int) -> None:
        host = self._host
        if host.mapping(pfn) and not host.flags(pfn) & PG_LRU:
            host.lru_move(pfn, list)
        self._put(pfn)

    def _put(self, pfn: int) -> None:
        freed = self._host.put_page(pfn)
        if freed and self._trace.on:
            self._trace.emit("page_free", pages=freed)
