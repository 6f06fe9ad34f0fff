from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xipvm.errors import BadInput
from xipvm.trace import Event, Trace
from xipvm.trace.history import History
from xipvm.trace.reader import TraceReader
from xipvm.trace.recorder import Recorder
from xipvm.trace.show import Filter, format_event, shown


def line(event_kind: str, **fields: Any) -> str:
    return format_event(Event(12, 3456, "vcpu0", 0, event_kind, fields)).split(event_kind + " ", 1)[1]


def test_a_line_has_time_seq_actor_kind_and_cause() -> None:
    event = Event(12, 3456, "vcpu0", 11, "spte_set", {"vm": "vm0", "gfn": 0x40000, "pfn": 5, "rights": "rw"})
    assert format_event(event) == "        3456     #12 vcpu0  spte_set vm=vm0 gfn=0x40000 pfn=0x5 rights=rw <- #11"


def test_ranges_and_runs() -> None:
    assert line("spte_zap", vm="vm0", start=0x40000, end=0x40010, pages=[(1, 16), (3, 1)]) == (
        "vm=vm0 gfn 0x40000..0x40010 (16 pages) pages pfn 0x1..0x11 (16 pages), 0x3..0x4 (1 page)"
    )
    assert line("pte_clear", mm="m", start=0x1800, end=0x2001, pages=[]) == (
        "mm=m hva 0x1800..0x2001 (2 pages) pages pfn none"
    )
    assert line("memslot_set", vm="v", slot=1, gfn=64, pages=8, hva=0x10000, flags=2) == (
        "vm=v slot=1 gfn 0x40..0x48 (8 pages) hva 0x10000..0x18000 (8 pages) flags=0x2"
    )


def test_values() -> None:
    assert line("vma_map", mm="m", start=0, end=0x1000, prot=5, kind="anon") == (
        "mm=m hva 0x0..0x1000 (1 page) prot=r-x kind=anon"
    )
    assert line("flash_mode", bank=0, chip=1, mode="status", array=False) == "bank=0 chip=1 mode=status array=no"
    assert line("machine_end", reason="exit", status=-1) == "reason=exit status=-1"
    assert line("guest_exception", vcpu=0, vector=0x200, pc=0, cause=0x2A, address=None).endswith("address=-")
    assert line("machine_start", board="b", memory=1, smp=1, clock="c", guest=None).endswith("guest=-")


def test_text_from_a_file_cannot_drive_a_terminal() -> None:
    assert line("mm_exit", mm="a b\x1b[31m\udcff\n") == r"mm='a b\x1b[31m\udcff\n'"
    assert line("mm_exit", mm="") == "mm=''"


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = Trace()
    with Recorder(tmp_path / "t") as recorder:
        trace.attach(recorder)
        trace.emit("page_alloc", pfn=7)
        trace.actor = "vcpu0"
        trace.emit("spte_set", vm="vm0", gfn=0x40000, pfn=7, rights="rw")
        trace.emit("mmu_notifier_invalidate_range_start", mm="m", start=0x7000, end=0x9000, event="UNMAP", range=1)
        trace.emit("mmu_notifier_invalidate_range_end", mm="m", start=0x7000, end=0x9000, event="UNMAP", range=1)
        trace.emit("page_free", pages=[(5, 3)])
    return tmp_path / "t"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), [1, 2, 3, 4, 5]),
        (Filter(kinds=["page_alloc", "mmu_notifier_*"]), [1, 3, 4]),
        (Filter(actors=["host"]), [1]),
        (Filter(actors=["vcpu*"], first=3), [3, 4, 5]),
        (Filter(first=2, last=3), [2, 3]),
        (Filter(page=7), [1, 2, 3, 4, 5]),
        (Filter(page=0x40000), [2]),
        (Filter(page=0x8FFF), [3, 4]),
        (Filter(page=8, kinds=["page_*"]), []),
    ],
)
def test_filters(trace_file: Path, wanted: Filter, expected: list[int]) -> None:
    with TraceReader(trace_file) as reader:
        assert [json.loads(line)["seq"] for line in shown(reader, wanted, as_json=True)] == expected


def test_json_says_everything(trace_file: Path) -> None:
    with TraceReader(trace_file) as reader:
        lines = list(shown(reader, Filter(first=5), as_json=True))
    assert lines == ['{"seq":5,"time":0,"actor":"vcpu0","cause":0,"kind":"page_free","fields":{"pages":[[5,3]]}}']


def test_a_mistyped_kind_is_not_an_empty_trace(trace_file: Path) -> None:
    with TraceReader(trace_file) as reader, pytest.raises(BadInput, match="no event kind 'page_aloc'"):
        list(shown(reader, Filter(kinds=["page_aloc"])))


def test_history_keeps_the_last_events_and_finds_those_of_a_page() -> None:
    trace = Trace()
    history = History(limit=5)
    trace.attach(history)
    trace.emit("page_alloc", pfn=7)
    for gfn in range(3):
        trace.emit("spte_set", vm="v", gfn=gfn, pfn=gfn + 100, rights="rw")
    trace.emit("pte_clear", mm="m", start=0x5000, end=0x7000, pages=[(100, 2)])
    trace.emit("primary_tlb_flush", mm="m", start=0x5000, end=0x7000)

    def seqs(**page: int) -> list[int]:
        return [event.seq for event in history.touching(**page)]

    assert [event.seq for event in history.events] == [2, 3, 4, 5, 6]
    assert seqs(pfn=7) == []
    assert seqs(pfn=101) == [3, 5]
    assert seqs(gfn=2) == [4]
    assert seqs(hva=0x6FFF) == [5, 6]
    assert seqs(hva=0x7000) == []
    assert seqs(gfn=0, pfn=100, hva=0x5000) == [2, 5, 6]
    assert seqs(gfn=0, pfn=100, hva=0x5000, last=2) == [5, 6]
    assert seqs() == []
    trace.emit("kvm_page_fault", vm="v", gfn=-1, access="read")
    assert seqs(gfn=2) == [4]
