"""The native part of the oracle comes to the same as the rules in Python, whatever it is told, live or from a file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.check import Oracle, reader_of
from xipvm.errors import BadInput, InternalError
from xipvm.explore import explore, strategy
from xipvm.explore.scenarios import SCENARIOS
from xipvm.explore.story import tell
from xipvm.mmu.frames import HostMemory
from xipvm.mutants.mutant import planted
from xipvm.trace import Event, Trace
from xipvm.trace.reader import TraceReader
from xipvm.trace.recorder import Recorder

HVA, GFN, PAGE = 0x7000_0000, 0x40, 0x1000
Said = tuple[str, str, bool, dict[str, Any]]
"""Kind, actor, whether the last event caused it, fields."""

pages = st.integers(0, 3)
frames = st.integers(0x20, 0x24)
mms = st.sampled_from(["mm0", "mm0", "mm1"])
vms = st.sampled_from(["vm0", "vm0", "vm1"])
rights = st.sampled_from(["r", "rw", "rwx"])
runs = st.lists(st.tuples(frames, st.integers(1, 2)), max_size=2)


def hva(page: int) -> int:
    return HVA + page * PAGE


@st.composite
def ranges(draw: st.DrawFn, base: int, unit: int) -> dict[str, int]:
    first, count = draw(pages), draw(st.integers(0, 3))
    return {"start": base + first * unit, "end": base + (first + count) * unit}


hvas, gfns = ranges(HVA, PAGE), ranges(GFN, 1)


def fields(**of: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(of)


def over(extents: st.SearchStrategy[dict[str, int]], **of: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(extents, fields(**of)).map(lambda both: {**both[1], **both[0]})


KINDS = {
    "page_alloc": fields(pfn=frames),
    "page_free": fields(pages=runs),
    "pte_set": fields(mm=mms, hva=pages.map(hva), pfn=frames, flags=st.sampled_from([1, 3])),
    "pte_clear": over(hvas, mm=mms, pages=runs),
    "pte_protect": over(hvas, mm=mms, flags=st.sampled_from([1, 3])),
    "pte_nonpresent": fields(mm=mms, hva=pages.map(hva), entry=st.just("swap"), value=st.just(0)),
    "spte_set": fields(vm=vms, gfn=pages.map(lambda n: GFN + n), pfn=frames, rights=rights),
    "spte_zap": over(gfns, vm=vms, pages=st.just([])),
    "spte_age": over(gfns, vm=vms),
    "tlb_insert": fields(vcpu=st.integers(0, 1), gfn=pages.map(lambda n: GFN + n), pfn=frames, rights=rights),
    "tlb_flush": fields(vcpu=st.integers(0, 1), reason=st.just("test")),
    "host_tlb_insert": fields(
        mm=mms, hva=pages.map(hva), pfn=frames, rights=st.sampled_from(["r", "rw"]), thread=st.just("t")
    ),
    "primary_tlb_flush": over(hvas, mm=mms),
    "mmu_notifier_invalidate_range_start": over(hvas, mm=mms, event=st.just("CLEAR"), range=st.integers(1, 2)),
    "mmu_notifier_invalidate_range_end": over(hvas, mm=mms, event=st.just("CLEAR"), range=st.integers(1, 2)),
    "mmu_notifier_clear_flush_young": over(hvas, mm=mms, young=st.booleans()),
    "mmu_notifier_unregister": fields(mm=mms, notifier=vms),
    "page_pin": fields(vm=vms, gfn=pages.map(lambda n: GFN + n), pfn=frames),
    "kvm_page_fault": fields(vm=vms, gfn=pages.map(lambda n: GFN + n), access=st.just("read")),
}
said = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.sampled_from(["host", "vcpu0"]), st.booleans(), KINDS[kind])
)


def emit(trace: Trace, story: list[Said], protocol: str) -> None:
    for number in range(2):
        name, mm = f"vm{number}", f"mm{number}"
        trace.emit("mmu_notifier_register", mm=mm, notifier=name, protocol=protocol)
        trace.emit("memslot_set", vm=name, slot=0, gfn=GFN, pages=4, hva=HVA, flags=0)
    for kind, actor, caused, values in story:
        trace.actor, trace.cause = actor, trace.seq if caused else 0
        order = {"mm", "vm", "start", "end"}
        head = {name: values[name] for name in ("mm", "vm", "start", "end") if name in values}
        trace.emit(kind, **head, **{name: value for name, value in values.items() if name not in order})


def state(oracle: Oracle) -> object:
    """All that an oracle knows, in a form that can be compared."""
    world = oracle.world
    return (
        {
            name: (process.entries, process.tlbs, process.notifiers, process.aged, process.cleared)
            for name, process in world.mms.items()
        },
        {name: (vm.mm, vm.gone, vm.sptes, vm.pins) for name, vm in world.vms.items()},
        world.tlbs,
        {key: (opened.seq, opened.returned, opened.young, opened.inside) for key, opened in world.open.items()},
        world.swapped,
        [{key: numbers[key] for key in numbers} for numbers in (world.freed, world.written, world.holders)],
        oracle.checks,
        oracle.events,
        oracle.last_range,
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(said, max_size=30), st.sampled_from(["modern", "modern", "2008"]))
def test_it_comes_to_the_same_as_the_rules(story: list[Said], protocol: str) -> None:
    trace, usual, rules = Trace(), Oracle(), Oracle(usual=False)
    trace.attach(usual)
    trace.attach(rules)
    emit(trace, story, protocol)
    assert state(usual) == state(rules)
    usual.finish()
    rules.finish()
    assert [violation.render() for violation in usual.violations] == [v.render() for v in rules.violations]


@settings(max_examples=50, deadline=None)
@given(st.lists(said, max_size=30))
def test_a_file_gives_the_same_report_as_the_run(story: list[Said]) -> None:
    trace, live, later = Trace(), Oracle(), Oracle()
    events: list[Event] = []
    trace.attach(live)
    trace.attach(events.append)
    emit(trace, story, "modern")
    live.finish()
    later.check(events)
    assert state(live) == state(later)
    assert [violation.render() for violation in live.violations] == [v.render() for v in later.violations]


def test_a_trace_file_too(tmp_path: Path) -> None:
    trace, live = Trace(), Oracle()
    trace.attach(live)
    with Recorder(tmp_path / "t.xtrace") as recorder:
        trace.attach(recorder)
        emit(trace, [("page_free", "host", False, {"pages": [(0x20, 2)]})] * 2, "modern")
    with TraceReader(tmp_path / "t.xtrace") as reader:
        later = Oracle().check(reader)
    assert [v.render() for v in later] == [v.render() for v in live.violations]
    assert len(later) == 2


@pytest.mark.parametrize(
    "mutant",
    ["", "announced-when-it-has-happened", "flush-skipped", "flush-at-the-end", "no-retry-check", "nothing-removed"],
)
def test_what_a_search_finds_the_rules_find_in_its_events(mutant: str) -> None:
    with planted(mutant) if mutant else nullcontext():
        found = explore(SCENARIOS["fault-against-munmap"], strategy("random", 1), runs=40)
        assert (found.failing is not None) == bool(mutant)
        if found.failing is None:
            return
        story = tell(SCENARIOS["fault-against-munmap"], found.failing)
    assert story.run.failure is not None
    expected = story.run.failure.violation
    assert expected is not None
    first = Oracle(usual=False).check(story.events)[0]
    assert (first.invariant, first.message, first.event) == (expected.invariant, expected.message, expected.event)
    assert (first.history, first.chain) == (expected.history, expected.chain)


def test_rules_are_asked_only_where_something_may_be_wrong() -> None:
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    asked: list[str] = []
    emit(trace, [], "modern")
    for kind in ("page_alloc", "pte_set", "spte_set"):
        oracle.on(kind, lambda event, _: asked.append(event.kind), since_range=True)
    trace.emit("page_alloc", pfn=0x20)
    trace.emit("pte_set", mm="mm0", hva=HVA, pfn=0x20, flags=3)
    trace.emit("spte_set", vm="vm0", gfn=GFN, pfn=0x20, rights="rw")
    assert asked == []
    assert oracle.checks["I4"] == 1
    assert set(oracle.world.vms["vm0"].sptes) == {GFN}


def test_an_event_that_is_none_is_refused() -> None:
    trace = Trace()
    trace.attach(Oracle())
    with pytest.raises(InternalError, match="is not declared"):
        trace.emit("page_lost", pfn=1)
    with pytest.raises(InternalError, match=r"has fields \['gfn'\], it is declared with \['pfn'\]"):
        trace.emit("page_alloc", gfn=1)
    with pytest.raises(BadInput, match="event #7, page_alloc, does not say its pfn"):
        Oracle()(Event(7, 0, "host", 0, "page_alloc", {}))


def test_fields_may_come_in_any_order() -> None:
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    trace.emit("pte_set", flags=3, pfn=0x20, hva=HVA, mm="mm0")
    assert oracle.world.mm("mm0").entries == {HVA // PAGE: (0x20, 3)}


def test_a_report_shows_the_bytes_that_are_read() -> None:
    trace, host = Trace(), HostMemory(1 << 20, poison="frame")
    oracle = Oracle(reader=reader_of(host))
    trace.attach(oracle)
    emit(trace, [], "modern")
    pfn = host.alloc(True)
    trace.emit("page_alloc", pfn=pfn)
    trace.emit("pte_set", mm="mm0", hva=HVA, pfn=pfn, flags=3)
    trace.emit("spte_set", vm="vm0", gfn=GFN, pfn=pfn, rights="rw")
    trace.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=pfn, rights="rw")
    host.write(pfn, 0, b"secret")
    host.put(pfn)
    trace.emit("page_free", pages=[(pfn, 1)])
    trace.detach(oracle)
    [violation] = oracle.violations
    assert violation.reads == [
        f"vm0 at guest frame {GFN:#x} reads frame {pfn:#x}",
        f"vcpu0 at guest frame {GFN:#x} reads frame {pfn:#x}",
        f"frame {pfn:#x} is free from #9 on",
        f"it holds {'6b ' * 15}6b, the poison of freed frames",
    ]
    assert [(step.seq, step.what.split()[0]) for step in violation.chain] == [
        (7, "vm0"), (8, "vcpu0"), (0, "spte_zap"), (0, "tlb_flush"), (9, "page_free"),
    ]  # fmt: skip
    assert "  missing  spte_zap of guest frame 0x40\n" in violation.render()
    host.close()
