"""A violation of the protocol, and how it is told.

``INVARIANTS`` names what is checked. A violation carries the event at which it became visible, the page it is about
and the remembered events that touched that page: who mapped it, who invalidated it, who freed it, who used it; which
steps of the protocol are missing; and what is read from the page by those who should have forgotten it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xipvm.check.explain import Step
from xipvm.trace.events import Event
from xipvm.trace.show import format_event

INVARIANTS = {
    "I1": "an entry that loses rights or changes its page does so inside a range that was announced for it",
    "I2": "no secondary MMU installs a translation of a range between its start and its end",
    "I3": "once the start has returned no secondary MMU translates the range by what it is about to lose",
    "I4": "a translation that is installed is the primary entry's page, with no more rights than it has",
    "I5": "a frame is freed only when no TLB and no secondary MMU translates to it",
    "I6": "every start has its end, and every end its start",
    "I7": "what is installed was looked up when no invalidation of it was still to end",
    "I8": "what was written to a page is saved before its frame is given away for a swap slot",
    "I9": "who asks whether a page was used is told of every use since the last time, by whomever",
    "I10": "what was removed from a secondary MMU's tables is flushed from its TLBs before anybody relies on it",
    "I11": "once anybody can write the copy of a page, nobody reads the old page at that address",
    "I12": "when a dirty log is handed out, nobody can write unnoticed to a page that it does not name",
    "I13": "after it was unregistered or released, a notifier's MMU installs nothing",
    "I15": "a lookup in a watched range counts only if no invalidation touched that meanwhile",
    "I16": "a page of a file that is used in place is mapped as a hole only while it is one",
    "I17": "nobody may write to the page that stands for every hole",
    "I18": "a read returns what it has stored, and no more than it was asked for",
}
"""By name, as in the kernel's own terms; see docs/check.md for how each is judged from events."""


@dataclass(frozen=True)
class Violation:
    """One broken invariant. ``history`` ends with ``event``.

    ``earlier`` events of the page are not in it. ``chain``: the steps that have to come up to ``event``, in order, with
    those that are missing. ``reads``: what those who still translate to the page find there.
    """

    invariant: str
    message: str
    event: Event
    history: Sequence[Event] = ()
    earlier: int = 0
    chain: Sequence[Step] = ()
    reads: Sequence[str] = ()

    def render(self) -> str:
        """Several lines, the first of which says it all."""
        lines = [
            f"{self.invariant} broken at event #{self.event.seq}: {self.message}",
            f"  {self.invariant}: {INVARIANTS[self.invariant]}",
        ]
        if self.history:
            lines.append("  what touched the page, oldest first:")
            if self.earlier:
                lines.append(f"    ... {self.earlier} more events, of which none is the last of its kind")
            lines += [f"    {format_event(event)}" for event in self.history]
        if self.chain:
            lines.append("  what has to come, in this order:")
            lines += [f"    {step}" for step in self.chain]
        if self.reads:
            lines.append("  what is read there now:")
            lines += [f"    {line}" for line in self.reads]
        return "\n".join(lines)
