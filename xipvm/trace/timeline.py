"""Events as a timeline: a column for each actor, a line for each event, time going down.

::

       vcpu0  host
         *    .     0 #23 vcpu0 spte_set vm=vm0 gfn=0x10 pfn=0x5 rights=rw
         .    *     0 #41 host page_free pages pfn 0x5..0x6 (1 page)  <==
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from xipvm.trace.events import Event
from xipvm.trace.show import format_event


def timeline(events: Sequence[Event], marked: Collection[Event] = ()) -> str:
    """Several lines. Events of ``marked`` get an arrow; left out are no events, so order ``events`` as they came."""
    actors = list(dict.fromkeys(event.actor for event in events))
    lines = ["  " + "  ".join(actors)]
    for event in events:
        lanes = "  ".join(("*" if actor == event.actor else ".").center(len(actor)) for actor in actors)
        text = " ".join(format_event(event).split())
        lines.append(f"  {lanes}  {text}{'  <==' if event in marked else ''}")
    return "\n".join(lines)
