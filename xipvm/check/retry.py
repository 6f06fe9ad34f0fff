"""I7 and I15: what a fault installs, or a reader takes for true, is no older than the last invalidation of it.

A secondary MMU that holds no references remembers how many invalidations there were, looks a page up, which may take a
while, and installs it only if there were none meanwhile. Events say when it remembered:

* ``kvm_page_fault``: KVM reads its sequence number right behind it, and what the fault installs is caused by it;
* ``spte_lookup``: a driver of a device says so itself, page by page; it holds for the actor that said it;
* ``mmu_interval_read_begin``: has returned, to the actor that asked, for everything that the notifier watches.

From there until the entry is installed no range of the page may have ended (I7): what changed inside it the lookup may
have seen as it was before. A range that is open is no matter of I7: before its start has returned, an entry may still
come, the start removes it; behind that, it breaks I2. In 2008 a page that notifiers are told of by itself counts as a
range that ends when all have been told.

``mmu_interval_read_retry`` answers whether a lookup is worthless. When it says no, no range that touches the notifier
may have ended since ``read_begin``, nor be open with its start returned (I15); also where nothing is installed.

Ranges that were declined changed nothing, and those with an owner may be ignored by him: neither counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT
from xipvm.check.rules import Fields
from xipvm.trace.events import Event

if TYPE_CHECKING:
    from xipvm.check.oracle import Oracle

REMEMBERED: Final = 1024
"""Ranges that have ended. A fault that more of them overtake is judged by the last ones."""
_GOES_ON: Final = (
    "pte_set",
    "pte_clear",
    "pte_nonpresent",
    "page_free",
    "mmu_notifier_invalidate_range_start",
    "mmu_notifier_invalidate_range_end",
)
"""What somebody who has told of a page may say next, as far as it matters: the callbacks have returned then."""


@dataclass(slots=True)
class _Over:
    """Pages ``[start, end)`` of ``mm`` were invalidated, and that was over at ``seq``."""

    seq: int
    mm: str
    start: int
    end: int
    what: str


class Retries:
    """Judges one oracle's events."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._over: deque[_Over] = deque(maxlen=REMEMBERED)
        self._started: dict[tuple[str, int], int] = {}
        """The events of starts, of ranges that are open."""
        self._owned: set[tuple[str, int]] = set()
        self._lookups: dict[tuple[str, str, int], int] = {}
        """When a driver's fault began: by device, actor and page."""
        self._watches: dict[str, tuple[str, int, int]] = {}
        """Of interval notifiers: mm, first page, end."""
        self._reads: dict[tuple[str, str], tuple[int, int]] = {}
        """By interval notifier and actor: the event and the number of its last ``read_begin``."""
        self._told: dict[str, list[_Over]] = {}
        """In 2008, by actor: pages of which it tells now."""
        oracle.on("mmu_notifier_invalidate_range_start", self._range_starts)
        oracle.on("mmu_notifier_invalidate_range_end", self._range_ends)
        oracle.on("mmu_notifier_invalidate_page", self._page_told)
        oracle.on("spte_lookup", self._lookup)
        oracle.on("spte_set", self._installed, since_range=True)
        oracle.on("spte_set_huge", self._installed, since_range=True)
        oracle.on("mmu_interval_notifier_insert", self._inserted)
        oracle.on("mmu_interval_notifier_remove", self._removed)
        oracle.on("mmu_interval_notifier_invalidate", self._interval_told)
        oracle.on("mmu_interval_read_begin", self._read_begins)
        oracle.on("mmu_interval_read_retry", self._read_ends)

    # ---- what there was

    def _range_starts(self, event: Event, fields: Fields) -> None:
        self._started[fields["mm"], fields["range"]] = event.seq

    def _range_ends(self, event: Event, fields: Fields) -> None:
        name = fields["mm"], fields["range"]
        started = self._started.pop(name, 0)
        owned = name in self._owned
        self._owned.discard(name)
        if event.cause == started or owned:  # it ended inside its own start: declined
            return
        start, end = fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        self._over.append(_Over(event.seq, fields["mm"], start, end, f"range {fields['range']}"))

    def _page_told(self, event: Event, fields: Fields) -> None:
        if not self._told:
            for kind in _GOES_ON:
                self._oracle.on(kind, self._goes_on)
        page = fields["address"] >> PAGE_SHIFT
        told = _Over(event.seq, fields["mm"], page, page + 1, "it was told of alone")
        self._told.setdefault(event.actor, []).append(told)

    def _goes_on(self, event: Event, fields: Fields) -> None:
        told = self._told.get(event.actor)
        if told and event.cause != told[-1].seq:
            self._over.extend(told)
            told.clear()

    def _overtaken(self, since: int, mm: str, start: int, end: int) -> _Over | None:
        """What was over behind event ``since`` and touched ``[start, end)`` of ``mm``."""
        for over in reversed(self._over):
            if over.seq < since:
                break
            if over.mm == mm and over.start < end and start < over.end:
                return over
        return None

    # ---- I7

    def _lookup(self, event: Event, fields: Fields) -> None:
        self._lookups[fields["vm"], event.actor, fields["gfn"]] = event.seq

    def _installed(self, event: Event, fields: Fields) -> None:
        oracle = self._oracle
        vm = oracle.world.vm(fields["vm"])
        gfn, pages = fields["gfn"], fields.get("pages", 1)
        page = vm.page(gfn)
        if page is None or vm.mm is None:
            return
        read = self._reads.get((vm.name, event.actor))
        said = self._lookups.get((vm.name, event.actor, gfn), 0) if read is None else read[0]
        since = said or event.cause
        if not since:
            return
        oracle.checks["I7"] += 1
        over = self._overtaken(since, vm.mm, page, page + pages)
        if over is not None and not said:  # it may be that something else has caused it
            cause = oracle.recall(since)
            over = over if cause is not None and cause.kind == "kvm_page_fault" else None
        if over is not None:
            what = f"#{over.seq} ({over.what}) has come since its lookup began at #{since}"
            oracle.broken(
                "I7", f"guest frame {gfn:#x} gets frame {fields['pfn']:#x}, but {what}", event, hva=page << PAGE_SHIFT
            )

    # ---- I15

    def _inserted(self, event: Event, fields: Fields) -> None:
        start, end = fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        self._watches[fields["notifier"]] = fields["mm"], start, end

    def _removed(self, event: Event, fields: Fields) -> None:
        self._watches.pop(fields["notifier"], None)
        for key in [key for key in self._reads if key[0] == fields["notifier"]]:
            del self._reads[key]

    def _interval_told(self, event: Event, fields: Fields) -> None:
        if fields["owned"]:
            self._owned.add((fields["mm"], fields["range"]))

    def _read_begins(self, event: Event, fields: Fields) -> None:
        self._reads[fields["notifier"], event.actor] = event.seq, fields["seq"]

    def _read_ends(self, event: Event, fields: Fields) -> None:
        began, seq = self._reads.get((fields["notifier"], event.actor), (0, 0))
        watched = self._watches.get(fields["notifier"])
        if fields["retry"] or not began or seq != fields["seq"] or watched is None:
            return
        oracle = self._oracle
        oracle.checks["I15"] += 1
        mm, start, end = watched
        over = self._overtaken(began, mm, start, end)
        if over is not None:
            self._worthless(event, fields, f"#{over.seq} ({over.what}) has come", began, start)
            return
        for opened in oracle.world.open.values():
            touches = opened.mm == mm and opened.start < end and start < opened.end
            if touches and opened.returned and (mm, opened.id) not in self._owned:
                self._worthless(event, fields, f"range {opened.id}, begun at #{opened.seq}, is open", began, start)
                return

    def _worthless(self, event: Event, fields: Fields, why: str, began: int, page: int) -> None:
        what = f"{fields['notifier']}'s lookup since #{began} counts as good, but {why}"
        self._oracle.broken("I15", what, event, hva=page << PAGE_SHIFT)
