from __future__ import annotations

import pytest

from xipvm.trace import Event, Trace
from xipvm.trace.events import KINDS, parse_kind, spans


def test_off_until_a_sink_is_attached() -> None:
    trace = Trace()
    assert not trace.on
    assert trace.emit("page_alloc", pfn=1) == 0
    seen: list[Event] = []
    trace.attach(seen.append)
    assert trace.on
    assert trace.emit("page_alloc", pfn=2) == 1
    trace.detach(seen.append)
    assert not trace.on
    assert trace.emit("page_alloc", pfn=3) == 0
    assert [event.fields for event in seen] == [{"pfn": 2}]


def test_event_carries_time_actor_and_cause() -> None:
    trace = Trace(clock=lambda: 42)
    seen: list[Event] = []
    trace.attach(seen.append)
    trace.actor = "vcpu1"
    first = trace.emit("kvm_page_fault", vm="vm0", gfn=0x40000, access="read")
    with trace.because(first):
        second = trace.emit("page_alloc", pfn=7)
        with trace.because(second):
            trace.emit("page_alloc", pfn=8)
        trace.emit("page_alloc", pfn=9)
    trace.emit("page_alloc", pfn=10)
    assert seen[0] == Event(1, 42, "vcpu1", 0, "kvm_page_fault", {"vm": "vm0", "gfn": 0x40000, "access": "read"})
    assert [event.cause for event in seen] == [0, 1, 2, 1, 0]


def test_cause_is_restored_after_an_exception() -> None:
    trace = Trace()
    causes = []

    def fail() -> None:
        with trace.because(5):
            causes.append(trace.cause)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert causes == [5]
    assert trace.cause == 0


def test_sinks_are_called_in_order_of_attachment_and_one_may_leave_while_called() -> None:
    trace = Trace()
    calls: list[str] = []

    def once(event: Event) -> None:
        calls.append("once")
        trace.detach(once)

    trace.attach(once)
    trace.attach(lambda event: calls.append("always"))
    trace.emit("page_alloc", pfn=1)
    trace.emit("page_alloc", pfn=2)
    assert calls == ["once", "always", "always"]


def test_a_field_may_be_called_kind() -> None:
    trace = Trace()
    seen: list[Event] = []
    trace.attach(seen.append)
    trace.emit("vma_map", mm="mm0", start=0, end=4096, prot=3, kind="anon")
    assert (seen[0].kind, seen[0].fields["kind"]) == ("vma_map", "anon")


def test_detaching_a_stranger_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in list"):
        Trace().detach(print)


@pytest.mark.parametrize("spec", ["a:nothing", "a", "a:int a:int", "a:str?"])
def test_a_bad_declaration_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="event kind x"):
        parse_kind("x", spec)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("pte_clear", {"mm": "m", "start": 0x5000, "end": 0x7000, "pages": [(9, 2)]}, [("hva", 5, 7), ("pfn", 9, 11)]),
        ("pte_clear", {"mm": "m", "start": 0x5800, "end": 0x5801, "pages": []}, [("hva", 5, 6)]),
        ("vma_unmap", {"mm": "m", "start": 0x5000, "end": 0x5000}, []),
        (
            "spte_zap",
            {"vm": "v", "start": 16, "end": 32, "pages": [(1, 1), (3, 1)]},
            [("gfn", 16, 32), ("pfn", 1, 2), ("pfn", 3, 4)],
        ),
        (
            "memslot_set",
            {"vm": "v", "slot": 0, "gfn": 64, "pages": 8, "hva": 0x10000, "flags": 0},
            [("gfn", 64, 72), ("hva", 16, 24)],
        ),
        ("guest_exception", {"vcpu": 0, "vector": 0x200, "pc": 0x1234, "cause": 1, "address": None}, [("gva", 1, 2)]),
    ],
)
def test_the_pages_an_event_names(kind: str, fields: dict[str, object], expected: list[object]) -> None:
    assert list(spans(KINDS[kind], fields)) == expected
