"""A small host, an mm with a notifier that listens, and the events as short words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from xipvm.locks import nothing_held
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.verify import verify
from xipvm.notifier import MmuNotifier
from xipvm.trace.events import KINDS, Event
from xipvm.trace.funnel import Trace

WORDS = {
    "mmu_notifier_invalidate_range_start": "S",
    "mmu_notifier_invalidate_range_end": "E",
    "primary_tlb_flush": "tlb",
    "page_free": "free",
    "page_alloc": "alloc",
    "page_alloc_huge": "alloc",
    "pte_clear": "clear",
    "pte_set": "set",
    "pte_protect": "protect",
    "pte_copy": "copy",
    "pte_move": "move",
    "pte_nonpresent": "nonpresent",
    "pte_guard": "guard",
    "mmu_notifier_release": "release",
}


@pytest.fixture(autouse=True)
def _checked_locks(checked_locks: None) -> Iterator[None]:
    """In all tests here, which leave no lock behind."""
    yield
    nothing_held("at the end of the test")


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(256 * 4096, poison="frame")
    yield host
    verify(host)


@pytest.fixture
def trace() -> Trace:
    return Trace()


@pytest.fixture
def mm(host: HostMemory, trace: Trace) -> Mm:
    mm = Mm(host, trace)
    mm.notifiers.register(MmuNotifier())
    return mm


@pytest.fixture
def events(trace: Trace) -> list[Event]:
    """Everything that was emitted since; clear it to begin anew. Each has the fields that its kind declares."""
    seen: list[Event] = []

    def sink(event: Event) -> None:
        assert list(event.fields) == [field.name for field in KINDS[event.kind].fields], event
        seen.append(event)

    trace.attach(sink)
    return seen


@pytest.fixture
def steps(mm: Mm, events: list[Event]) -> Callable[[], list[str]]:
    """The protocol steps since the last call: ``["S CLEAR 4-8", "clear 4-8", "E", "tlb", "free 4"]``.

    Pages are counted from the first area of ``mm``; frees name how many frames.
    """

    def take() -> list[str]:
        base = mm.vmas[0].start
        words = []
        for event in events:
            word = WORDS.get(event.kind)
            fields = event.fields
            if word == "S":
                low, high = (fields["start"] - base) >> 12, (fields["end"] - base) >> 12
                words.append(f"S {fields['event']} {low}-{high}")
            elif word == "clear":
                words.append(f"clear {sum(count for _, count in fields['pages'])}")
            elif word == "free":
                words.append(f"free {sum(count for _, count in fields['pages'])}")
            elif word is not None:
                words.append(word)
        events.clear()
        return words

    return take
