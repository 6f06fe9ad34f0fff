"""The trace file: what is recorded is read back, whatever happens to the recorder or the file."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.errors import InternalError, TraceFileError
from xipvm.trace import Event, Trace
from xipvm.trace.events import KINDS, Kind, parse_kind
from xipvm.trace.format import MAGIC, PREAMBLE
from xipvm.trace.reader import TraceReader
from xipvm.trace.recorder import Recorder

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


def values_of(type_: str, optional: bool) -> st.SearchStrategy[Any]:
    if type_ == "str":
        return st.none() | TEXT
    if type_ == "bool":
        return st.booleans()
    if type_ in ("pfns", "gfns"):
        return st.lists(st.tuples(U64, U64), max_size=40)
    numbers = st.integers(-(2**63), 2**63 - 1) if type_ == "int" else U64
    return st.none() | numbers if optional else numbers


def fields_of(kind: Kind) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    fields = st.fixed_dictionaries({f.name: values_of(f.type, f.optional) for f in kind.fields})
    return st.tuples(st.just(kind.name), fields)


STEPS = st.lists(
    st.tuples(TEXT, U64, U64, st.sampled_from(sorted(KINDS)).flatmap(lambda name: fields_of(KINDS[name]))), max_size=30
)


def record(path: Path, steps: list[tuple[str, int, int, tuple[str, dict[str, Any]]]], **options: Any) -> list[Event]:
    """Emit ``steps`` (actor, time, cause, (kind, fields)) into a new trace at ``path``; what a sink saw of it."""
    clock = iter([step[1] for step in steps])
    trace = Trace(clock=clock.__next__)
    seen: list[Event] = []
    trace.attach(seen.append)
    with Recorder(path, **options) as recorder:
        trace.attach(recorder)
        for actor, _, cause, (kind, fields) in steps:
            trace.actor = actor
            trace.cause = cause
            trace.emit(kind, **fields)
    return seen


SMALL: list[tuple[str, int, int, tuple[str, dict[str, Any]]]] = [
    ("host", 0, 0, ("page_alloc", {"pfn": 7})),
    ("vcpu0", 10, 1, ("spte_set", {"vm": "vm0", "gfn": 0x40000, "pfn": 7, "rights": "rw"})),
    ("vcpu0", 11, 0, ("page_free", {"pages": [(7, 1), (9, 3)]})),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "scratch.trace"


@given(steps=STEPS)
@settings(deadline=None, max_examples=60)
def test_what_is_recorded_is_read_back(scratch: Path, steps: list[Any]) -> None:
    scratch.unlink(missing_ok=True)
    seen = record(scratch, steps)
    with TraceReader(scratch) as reader:
        assert list(reader) == seen
        assert reader.closed


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    record(tmp_path / "a", SMALL, machine={"board": "virt-arm64"})
    record(tmp_path / "b", SMALL, machine={"board": "virt-arm64"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_header_carries_schema_and_machine(tmp_path: Path) -> None:
    record(tmp_path / "t", SMALL, machine={"board": "virt-arm64", "memory": 1 << 27})
    with TraceReader(tmp_path / "t") as reader:
        assert reader.machine == {"board": "virt-arm64", "memory": 1 << 27}
        assert list(reader.kinds) == list(KINDS)
        assert reader.kinds["spte_set"].fields == KINDS["spte_set"].fields


def test_a_file_is_read_with_the_schema_it_was_written_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = parse_kind("page_alloc", "pfn:pfn node:int order:int?", "")
    monkeypatch.setitem(KINDS, "page_alloc", old)
    record(tmp_path / "t", [("host", 0, 0, ("page_alloc", {"pfn": 7, "node": -1, "order": None}))])
    monkeypatch.undo()
    assert len(KINDS["page_alloc"].fields) == 1
    with TraceReader(tmp_path / "t") as reader:
        assert [event.fields for event in reader] == [{"pfn": 7, "node": -1, "order": None}]


def test_cut_at_every_offset_gives_a_prefix_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_schema = {name: KINDS[name] for name in ("page_alloc", "spte_set", "page_free")}
    monkeypatch.setattr("xipvm.trace.recorder.KINDS", small_schema)
    whole = tmp_path / "whole"
    seen = record(whole, SMALL)
    data = whole.read_bytes()
    cut = tmp_path / "cut"
    read_counts = set()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        read, error = readable(cut)
        assert read == seen[: len(read)]
        assert "\n" not in error
        assert "cut short at offset" in error or (size == 0 and "empty" in error)
        read_counts.add(len(read))
    assert read_counts == {0, 1, 2, 3}


def readable(path: Path) -> tuple[list[Event], str]:
    """The events that can be read, and the error behind them."""
    events: list[Event] = []
    try:
        with TraceReader(path) as reader:
            for event in reader:
                events.append(event)
    except TraceFileError as error:
        return events, str(error)
    return events, ""


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_damage_raises_nothing_but_trace_file_error(scratch: Path, data: st.DataObject) -> None:
    scratch.unlink(missing_ok=True)
    record(scratch, SMALL)
    image = bytearray(scratch.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(image)
    readable(scratch)


def test_structural_damage_is_named_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "t"
    record(path, SMALL)
    data = bytearray(path.read_bytes())
    first = PREAMBLE.size + PREAMBLE.unpack_from(data)[2]
    data[first + 4 : first + 6] = b"\xf0\xf0"  # a kind that was never declared
    path.write_bytes(data)
    with TraceReader(path) as reader, pytest.raises(TraceFileError, match=f"corrupt record at offset {first}$"):
        list(reader)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an xipvm trace: it is empty"),
        (b"\x7fELF" + bytes(100), "not an xipvm trace$"),
        (MAGIC[:4] + b"?", "not an xipvm trace$"),
        (PREAMBLE.pack(MAGIC, 2, 0), "trace format version 2; this xipvm reads version 1"),
        (PREAMBLE.pack(MAGIC, 1, 2) + b"{}", "corrupt record at offset 0"),
        (PREAMBLE.pack(MAGIC, 1, 2) + b"\xff\xff", "corrupt record at offset 0"),
        (PREAMBLE.pack(MAGIC, 1, 100) + b"{}", "cut short at offset 0"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceFileError, match=message):
        TraceReader(path)


def test_missing_file_and_directory_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="No such file or directory"):
        TraceReader(tmp_path / "nothing")
    with pytest.raises(TraceFileError, match="Is a directory"):
        TraceReader(tmp_path)
    with pytest.raises(TraceFileError, match="Is a directory"):
        Recorder(tmp_path)


KILLED = """
import os, signal, sys
from xipvm.trace import Trace
from xipvm.trace.recorder import Recorder
trace = Trace(clock=iter(range(10**9)).__next__)
trace.attach(Recorder(sys.argv[1]))
for number in range(int(sys.argv[2])):
    trace.emit("spte_set", vm="vm0", gfn=number, pfn=number + 1, rights="rw")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("count", [0, 1, 30000])
def test_kill_keeps_everything_that_was_emitted(tmp_path: Path, count: int) -> None:
    path = tmp_path / "t"
    child = subprocess.run([sys.executable, "-c", KILLED, str(path), str(count)], check=False)
    assert child.returncode == -signal.SIGKILL
    with TraceReader(path) as reader:
        assert [event.fields["gfn"] for event in reader] == list(range(count))
        assert not reader.closed


def test_a_record_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t"
    trace = Trace()
    recorder = Recorder(path)
    trace.attach(recorder)
    trace.emit("page_alloc", pfn=1)
    with TraceReader(path) as reader:
        list(reader)
        end = reader.offset
    trace.emit("page_alloc", pfn=0x1122)
    torn = bytearray(path.read_bytes())
    recorder.close()
    with TraceReader(path) as reader:
        list(reader)
    size = int.from_bytes(torn[end : end + 4], "little")
    for written in range(1, size):
        data = torn[: end + written] + bytes(len(torn) - end - written)
        (tmp_path / "torn").write_bytes(data)
        with TraceReader(tmp_path / "torn") as reader:
            events = list(reader)
            assert not reader.closed
        assert [event.fields["pfn"] for event in events] == [1]


def test_records_may_cross_the_pieces_by_which_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "t"
    long = [(number, 1) for number in range(100_000)]
    steps: list[Any] = []
    for number in range(12000):
        steps.append(("host", 0, 0, ("page_free", {"pages": long[: number % 23]})))
    steps.append(("host", 0, 0, ("page_free", {"pages": long})))
    steps.append(("x" * 2_000_000, 0, 0, ("page_alloc", {"pfn": 1})))
    seen = record(path, steps)
    assert path.stat().st_size > 5 << 20
    with TraceReader(path) as reader:
        assert list(reader) == seen
        assert reader.closed


def test_more_strings_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.trace.recorder.MAX_STRINGS", 5)
    steps: list[Any] = [
        ("host", 0, 0, ("spte_set", {"vm": f"vm{n}", "gfn": 1, "pfn": 2, "rights": f"r{n % 3}"})) for n in range(50)
    ]
    seen = record(tmp_path / "t", steps)
    with TraceReader(tmp_path / "t") as reader:
        assert list(reader) == seen


def test_appending_adds_a_segment(tmp_path: Path) -> None:
    path = tmp_path / "t"
    first = record(path, SMALL, machine={"run": 1})
    second = record(path, SMALL[:2], machine={"run": 2}, append=True)
    with TraceReader(path) as reader:
        assert reader.machine == {"run": 1}
        assert list(reader) == first + second
        assert reader.machine == {"run": 2}
        assert reader.closed


def test_appending_to_a_killed_trace_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t"
    subprocess.run([sys.executable, "-c", KILLED, str(path), "3"], check=False)
    second = record(path, SMALL, append=True)
    with TraceReader(path) as reader:
        assert list(reader)[3:] == second
        assert not reader.closed


def test_recording_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t"
    record(path, SMALL * 20_000)
    seen = record(path, SMALL)
    with TraceReader(path) as reader:
        assert list(reader) == seen
    path.write_bytes(b"")
    Recorder(path).close()


@pytest.mark.parametrize("append", [False, True])
def test_what_is_no_trace_is_never_replaced(tmp_path: Path, append: bool) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(TraceFileError, match="exists and is no trace, so it is not replaced"):
        Recorder(path, append=append)
    assert path.read_bytes() == b"\x7fELF" + bytes(100)


def test_two_recorders_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Recorder(path), pytest.raises(TraceFileError, match="another run is recording into it"):
        Recorder(path)
    Recorder(path).close()


def test_only_regular_files(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="regular file"):
        Recorder("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TraceFileError, match="regular file"):
        Recorder(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("no_such_kind", {}, "event no_such_kind is not declared"),
        ("page_alloc", {}, r"event page_alloc has fields \[\], it is declared with \['pfn'\]"),
        ("page_alloc", {"pfn": 1, "order": 2}, r"has fields \['order', 'pfn'\]"),
        ("page_alloc", {"pfn": "7"}, "'7' is no pfn for pfn"),
        ("page_alloc", {"pfn": -1}, "-1 is no pfn"),
        ("page_alloc", {"pfn": 1 << 64}, "is no pfn"),
        ("page_alloc", {"pfn": None}, "None is no pfn"),
        ("page_free", {"pages": 7}, "7 is no pfns"),
        ("page_free", {"pages": [(7,)]}, r"\[\(7,\)\] is no pfns"),
        ("mm_exit", {"mm": 7}, "7 is no str"),
        ("mm_exit", {"mm": []}, r"\[\] is no str"),
        ("flash_mode", {"bank": 0, "chip": 0, "mode": "array", "array": 2}, "2 is no bool"),
    ],
)
def test_undeclared_events_are_refused_and_leave_no_mark(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "t"
    trace = Trace()
    with Recorder(path) as recorder:
        trace.attach(recorder)
        trace.emit("page_alloc", pfn=1)
        with pytest.raises(InternalError, match=message):
            trace.emit(kind, **fields)
        trace.emit("page_alloc", pfn=2)
        left_behind = path.read_bytes()  # as if the process died here
    with TraceReader(path) as reader:
        assert [event.fields["pfn"] for event in reader] == [1, 2]
    path.write_bytes(left_behind)
    with TraceReader(path) as reader:
        assert [event.fields["pfn"] for event in reader] == [1, 2]


def test_an_event_after_close_is_a_defect(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t")
    recorder.close()
    recorder.close()
    with pytest.raises(InternalError, match="after the trace was closed"):
        recorder(Event(1, 0, "host", 0, "page_alloc", {"pfn": 1}))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_ends_the_recording_not_the_run(tmp_path: Path) -> None:
    path = tmp_path / "t"
    errors: list[TraceFileError] = []
    trace = Trace()
    with file_size_limit(2 << 20), Recorder(path, on_error=errors.append) as recorder:
        trace.attach(recorder)
        for number in range(60_000):
            trace.emit("page_alloc", pfn=number)
        recorded = recorder.events
        assert recorder.error is errors[0]
    assert len(errors) == 1
    assert str(errors[0]) == f"{path}: File too large; it holds the run's first {recorded} events"
    got, error = readable(path)
    assert "cut short" in error
    assert [event.fields["pfn"] for event in got] == list(range(recorded))
    assert recorded > 20_000


def test_without_a_handler_the_error_leaves_the_emit_once(tmp_path: Path) -> None:
    trace = Trace()
    with file_size_limit(1 << 20), Recorder(tmp_path / "t") as recorder:
        trace.attach(recorder)

        def emit_many() -> None:
            for number in range(60_000):
                trace.emit("page_alloc", pfn=number)

        with pytest.raises(TraceFileError, match="File too large"):
            emit_many()
        trace.emit("page_alloc", pfn=0)


def test_no_room_for_the_header_is_an_error_of_opening(tmp_path: Path) -> None:
    with file_size_limit(4096), pytest.raises(TraceFileError, match="File too large"):
        Recorder(tmp_path / "t")


def test_records_may_cross_the_pieces_in_which_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    seen = record(path, SMALL)
    monkeypatch.setattr("xipvm.trace.reader._CHUNK", 7)
    with TraceReader(path) as reader:
        assert list(reader) == seen


def test_a_deferred_recorder_can_be_discarded(tmp_path: Path) -> None:
    path = tmp_path / "t"
    Recorder(path, deferred=True).discard()
    assert not path.exists()
    with Recorder(path, deferred=True):
        pass
    with TraceReader(path) as reader:
        assert list(reader) == []
        assert reader.closed
    old = path.read_bytes()
    Recorder(path, deferred=True).discard()
    assert path.read_bytes() == old
    trace = Trace()
    recorder = Recorder(path, deferred=True)
    trace.attach(recorder)
    trace.emit("page_alloc", pfn=1)
    recorder.discard()
    with TraceReader(path) as reader:
        assert [event.kind for event in reader] == ["page_alloc"]
        assert reader.closed
