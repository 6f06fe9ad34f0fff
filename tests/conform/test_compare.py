"""Each kind of comparison: it passes for what is so, and fails for what is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conform.scenarios import fields, recorded, run, scenario, vm
from xipvm.conform.report import DIFFERS, PASS, UNSUPPORTED, VARIES
from xipvm.mmu.secondary import kvm_fault


def cut(number: int) -> dict[str, Any]:
    """The call that unmaps pages [number, number + 1)."""
    return {
        "call": "invalidate_range_start",
        "event": "UNMAP",
        "space": "slot",
        "start": number,
        "end": number + 1,
        "site": "unmap_vmas",
    }


def measured(content: dict[str, Any], op: str) -> dict[str, Any]:
    """The expectation of the first measured step that does ``op``."""
    expect: dict[str, Any] = next(s for s in content["steps"] if s["op"] == op and not s.get("setup"))["expect"]
    return expect


MUTATIONS: list[tuple[str, str, str, dict[str, Any], list[str]]] = [
    # scenario, op of the step, what the test is called, what is changed in its expectation, what must be found
    ("munmap_partial_anon", "munmap", "rc", {"rc": 1}, ["rc"]),
    ("munmap_partial_anon", "munmap", "errno", {"errno": "EINVAL"}, ["errno"]),
    ("munmap_partial_anon", "munmap", "a call is missing", {"notifier": []}, ["notifier"]),
    ("anon_cold_guest_write", "guest_write", "exit", {"exit": "mmio"}, ["exit"]),
    ("anon_cold_guest_write", "guest_write", "faulted", {"faulted": False}, ["faulted"]),
    ("anon_cold_guest_write", "guest_write", "a change that is not", {"primary": {}}, ["primary of page 4"]),
    ("anon_cold_guest_write", "host_read", "value", {"value": "0x45"}, ["value"]),
    ("anon_cold_guest_write", "host_read", "signal", {"signal": "SIGBUS"}, ["signal"]),
    ("ext4_truncate", "host_read", "another signal", {"signal": "SIGSEGV"}, ["signal"]),
    ("dirty_log", "get_dirty_log", "dirty", {"dirty": [4]}, ["dirty"]),
]


@pytest.mark.parametrize(("name", "op", "what", "change", "found"), MUTATIONS, ids=[m[2] for m in MUTATIONS])
def test_an_expectation_that_is_wrong(name: str, op: str, what: str, change: dict[str, Any], found: list[str]) -> None:
    content = recorded(name)
    assert run(content).verdict == PASS
    measured(content, op).update(change)
    report = run(content)
    assert report.verdict == DIFFERS
    assert fields(report) == found


SPTE = {"perm": "rw", "frame": "n1", "frame_is": "new", "level": 1}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"perm": "r"}, ["spte perm"]),
        ({"level": 2}, ["spte level"]),
        ({"frame_is": "same"}, ["spte frame_is"]),
        ({"frame_is": "cache"}, ["spte frame_is"]),
        ({"frame_is": "zero", "frame": "zero"}, ["spte frame_is"]),
        ({"frame_is": "hugezero", "frame": "hugezero"}, ["spte frame_is"]),
        ({"frame": "f9"}, ["spte frame"]),
    ],
)
def test_the_entry_of_a_touch(change: dict[str, Any], found: list[str]) -> None:
    content = recorded("anon_cold_guest_write")
    measured(content, "guest_write")["spte"] = {**SPTE, **change}
    # f9 is bound by a page that is there before
    content["steps"].insert(1, {"op": "host_write", "setup": True, "space": "slot", "page": 9, "value": "0x9"})
    assert fields(run(content)) == found


@pytest.mark.parametrize(("kind", "found"), [("zero", []), ("same", ["spte frame_is"]), ("new", ["spte frame_is"])])
def test_the_zero_page_is_a_kind_of_its_own(kind: str, found: list[str]) -> None:
    spte = {"perm": "r", "level": 1, "frame": "zero", "frame_is": kind}
    steps = [
        *vm(),
        {"op": "madvise", "setup": True, "space": "slot", "start": 4, "end": 5, "advice": "DONTNEED"},
        {"op": "guest_read", "gfn": 4, "expect": {"exit": "ok", "value": "0x0", "spte": spte}},
    ]
    assert fields(run(scenario(steps))) == found


def test_no_entry_where_one_is_expected() -> None:
    steps = [*vm(8), {"op": "guest_read", "gfn": 9, "expect": {"exit": "mmio", "spte": SPTE}}]
    assert fields(run(scenario(steps))) == ["spte"]


@pytest.mark.parametrize(
    ("primary", "ignored", "found"),
    [
        ({"4": ["f4", "none"], "5": ["f5", "none"]}, [], []),
        ({"4": ["f4", "none"]}, [], ["primary of page 5"]),
        ({"4": ["f4", "none"]}, ["5"], []),
        ({"4": ["f4", "none"], "5": ["f5", "none"], "6": ["f6", "none"]}, [], ["primary of page 6"]),
        ({"4": ["f4", "none"], "5": ["f5", "zero"]}, [], ["primary of page 5"]),
        ({"4": ["none", "f4"], "5": ["f5", "none"]}, [], ["primary of page 4"]),
        ({"4": ["f4", "swap"], "5": ["f5", "guard"]}, [], ["primary of page 4", "primary of page 5"]),
        ({"4": ["f5", "none"], "5": ["f4", "none"]}, [], ["primary of page 4", "primary of page 5"]),
    ],
)
def test_changes_of_the_page_table(primary: dict[str, Any], ignored: list[str], found: list[str]) -> None:
    expect = {"rc": 0, "primary": primary, "primary_ignore": ignored}
    steps = [*vm(), {"op": "munmap", "space": "slot", "start": 4, "end": 6, "expect": expect}]
    assert fields(run(scenario(steps))) == found


def cold(*pages: int, **words: str) -> list[dict[str, Any]]:
    """Measured first writes to ``pages`` of memory that nobody touched; the frame's name for each by page."""
    steps = vm()
    del steps[1]
    return [
        *steps,
        *(
            {
                "op": "guest_write",
                "gfn": page,
                "value": "0x1",
                "expect": {"exit": "ok", "primary": {str(page): ["none", words.get(f"p{page}", f"n{page}")]}},
            }
            for page in pages
        ),
    ]


def test_frames_are_compared_up_to_their_names() -> None:
    assert fields(run(scenario(cold(4, 5)))) == []
    assert fields(run(scenario(cold(4, 5, p4="n77", p5="n3")))) == []
    assert fields(run(scenario(cold(4, 5, p4="n1", p5="n1")))) == ["primary of page 5"]


def test_one_frame_has_one_name() -> None:
    steps = cold(4)
    spte = {"perm": "rw", "level": 1, "frame": "n2", "frame_is": "new"}
    steps[-1]["expect"]["spte"] = spte
    assert fields(run(scenario(steps))) == ["spte frame"]
    spte["frame"] = "n4"
    assert fields(run(scenario(steps))) == []


def test_a_number_that_is_used_again_is_another_frame() -> None:
    """The freed frame is the next one that is handed out; a name ends with its frame."""
    drop = {"op": "madvise", "space": "slot", "start": 4, "end": 5, "advice": "DONTNEED"}
    touch = {"op": "guest_write", "gfn": 4, "value": "0x1"}
    spte = {"perm": "rw", "level": 1, "frame_is": "new"}
    for name, found in (("n1", []), ("f5", ["primary of page 4", "spte frame"])):
        steps = [
            *vm(),
            {**drop, "expect": {"rc": 0, "primary": {"4": ["f4", "none"]}}},
            {
                **touch,
                "expect": {"exit": "ok", "primary": {"4": ["none", name]}, "spte": {**spte, "frame": name}},
            },
        ]
        assert fields(run(scenario(steps))) == found


def two_cuts(notifier: list[dict[str, Any]], **expect: Any) -> dict[str, Any]:
    """Two areas go, in one file: a hole punched in one that is mapped twice calls for each."""
    mapping = {"op": "mmap", "setup": True, "pages": 4, "kind": "file", "share": "shared", "prot": "rw", "file": "F"}
    return scenario(
        [
            {
                "op": "file_create",
                "setup": True,
                "file": "F",
                "fs": "shmem",
                "pages": 4,
                "contents": {"start": 0, "end": 4, "value": "0x1"},
                "page_cache": "dirty",
            },
            {**mapping, "space": "slot", "page": 0, "file_page": 0},
            {**mapping, "space": "slot", "page": 100, "file_page": 0},
            {"op": "vm_create", "setup": True, "vm": "vm1", "guest_pages": "4k"},
            {
                "op": "fallocate",
                "file": "F",
                "mode": "punch_hole",
                "start": 1,
                "end": 2,
                "expect": {"rc": 0, "notifier": notifier, **expect},
            },
        ]
    )


def clear(start: int, **change: Any) -> dict[str, Any]:
    return {**cut(start), "event": "CLEAR", **change}


@pytest.mark.parametrize(
    ("notifier", "order", "found"),
    [
        ([clear(1), clear(101)], "exact", 0),
        ([clear(101), clear(1)], "exact", 1),
        ([clear(101), clear(1)], "overlap", 0),
        ([clear(1), clear(101)], "overlap", 0),
        ([clear(1)], "exact", 1),
        ([clear(1)], "overlap", 1),
        ([clear(1), clear(101), clear(101)], "exact", 1),
        ([clear(1), clear(101), clear(101)], "overlap", 1),
        ([clear(1, end=3), clear(101)], "exact", 1),
        ([clear(1, event="UNMAP"), clear(101)], "exact", 1),
        ([clear(1, space="alt"), clear(101)], "exact", 1),
        ([clear(1, site="somewhere", by="child"), clear(101)], "exact", 0),
    ],
)
def test_notifier_calls(notifier: list[dict[str, Any]], order: str, found: int) -> None:
    report = run(two_cuts(notifier, notifier_order=order))
    assert fields(report) == ["notifier"] * found
    if found:
        assert report.steps[0].differences[0].cause


def test_overlapping_calls_keep_their_order() -> None:
    """Truncation announces a range twice; a call for all of the mm overlaps everything."""
    shrink = {"op": "ftruncate", "file": "F", "pages": 2}
    for notifier, found in (
        ([clear(2, end=4), clear(102, end=104)] * 2, []),
        ([clear(102, end=104)] * 2 + [clear(2, end=4)] * 2, []),
        ([clear(2, end=4), clear(102, end=104)], ["notifier"]),
    ):
        content = two_cuts([])
        content["steps"][-1] = {**shrink, "expect": {"notifier": notifier, "notifier_order": "overlap"}}
        assert fields(run(content)) == found


@pytest.mark.parametrize(("last", "found"), [(8, []), (7, ["notifier"]), (9, ["notifier"])])
def test_repeated_calls(last: int, found: list[str]) -> None:
    block = {"from": 4, "to": last, "step": 1, "pages": 1, "call": "invalidate_range_start", "event": "PROTECTION_PAGE"}
    content = recorded("ext4_msync")
    expect = measured(content, "msync")
    assert expect["notifier"] == [{"repeat": {**block, "to": 8, "space": "slot", "site": "page_vma_mkclean_one"}}]
    expect["notifier"] = [{"repeat": {**block, "space": "slot"}}]
    assert fields(run(content)) == found


def test_release_is_a_call() -> None:
    content = recorded("exit_vm_open")
    content["steps"][-1]["expect"]["notifier"].append({"call": "release"})
    assert fields(run(content)) == ["notifier"]


def test_two_vms_are_told_both() -> None:
    content = recorded("two_vms")
    calls = measured(content, "madvise")["notifier"]
    assert len(calls) == 2
    del calls[0]
    assert fields(run(content)) == ["notifier"]


def test_a_set_up_step_cannot_fail() -> None:
    steps = [*vm(), {"op": "munmap", "setup": True, "space": "slot", "start": 20, "end": 21}]
    steps.append({"op": "mprotect", "setup": True, "space": "slot", "start": 20, "end": 21, "prot": "r"})
    report = run(scenario(steps))
    assert fields(report) == ["set-up"]
    assert report.steps[0].differences[0].got == "ENOMEM"
    steps[-1] = {"op": "guest_read", "setup": True, "range": {"start": 14, "end": 18}}
    assert run(scenario(steps)).steps[0].differences[0].got == "mmio"


def test_what_could_not_be_made_is_not_there() -> None:
    """After the exit of the process a VM or a child cannot be made; what uses them fails, too."""
    steps = [
        {"op": "exit", "setup": True},
        {"op": "vm_create", "vm": "vm1", "guest_pages": "4k", "expect": {"rc": -1, "errno": "ESRCH"}},
        {"op": "fork", "child": "c1", "expect": {"rc": -1}},
        {"op": "child_exit", "child": "c1", "expect": {"rc": 0}},
        {"op": "guest_read", "gfn": 4, "expect": {"exit": "ok", "spte": SPTE, "primary": {}}},
    ]
    assert fields(run(scenario(steps))) == ["rc", "exit", "spte"]


def test_an_error_is_compared() -> None:
    step = {"op": "mprotect", "space": "slot", "start": 20, "end": 21, "prot": "r"}
    good = {"rc": -1, "errno": "ENOMEM"}
    assert fields(run(scenario([*vm(), {**step, "expect": good}]))) == []
    assert fields(run(scenario([*vm(), {**step, "expect": {**good, "errno": "EINVAL"}}]))) == ["errno"]


def test_causes_name_what_happened() -> None:
    steps = [
        *vm(),
        {"op": "munmap", "space": "slot", "start": 4, "end": 6, "expect": {"notifier": [], "primary": {}}},
        {"op": "guest_read", "gfn": 4, "expect": {"exit": "ok"}},
    ]
    report = run(scenario(steps))
    causes = {difference.field: difference.cause for step in report.steps for difference in step.differences}
    assert "vma_unmap" in causes["notifier"]
    assert "pte_clear" in causes["primary of page 4"]
    assert "get_user_pages" in causes["exit"]


def test_wrong_pages_are_counted() -> None:
    check = {"op": "host_check", "space": "slot", "range": {"start": 0, "end": 4}, "value": "0x1002"}
    assert fields(run(scenario([*vm(), {**check, "expect": {"wrong": 3}}]))) == []
    assert fields(run(scenario([*vm(), {**check, "expect": {"wrong": 0}}]))) == ["wrong"]


def test_detail_is_no_error() -> None:
    step = {"op": "guest_read", "gfn": 4, "expect": {"exit": "ok"}}
    good = {
        "faults": 1,
        "fault_access": ["U"],
        "flush_requests": 0,
        "spte_delta": {"4k": 1},
        "prefetched": [],
        "primary_around": {},
        "order": ["fault", "spte"],
    }
    assert run(scenario([*vm(), {**step, "detail": good}])).steps == []
    bad = {
        "faults": 2,
        "fault_access": ["W+U"],
        "flush_requests": 1,
        "spte_delta": {},
        "prefetched": [{"gfn": 5, "perm": "rw", "frame": "f5", "level": 1}],
        "primary_around": {"5": ["none", "f5"]},
        "order": [{"times": 2, "of": ["fault", "alloc1"]}],
    }
    report = run(scenario([*vm(), {**step, "detail": bad}]))
    assert report.verdict == PASS
    assert {difference.field for difference in report.steps[0].detail} == {f"detail {name}" for name in bad}


def test_a_scenario_that_depends_on_timing_varies() -> None:
    steps = [*vm(), {"op": "guest_read", "gfn": 4, "expect": {"exit": "mmio"}}]
    assert run(scenario(steps)).verdict == DIFFERS
    assert run(scenario(steps, stable=["It depends."])).verdict == VARIES


def test_a_defect_of_the_model_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the zero page is handed out for writing."""
    monkeypatch.setattr(kvm_fault, "SPTE_READ_ONLY", kvm_fault.SPTE_WRITABLE)
    content = recorded("zero_read_host_write")
    content["steps"].append({"op": "guest_write", "gfn": 9, "value": "0x1", "expect": {"exit": "mmio"}})
    content["steps"][-1:-1] = [{"op": "guest_read", "gfn": 9, "expect": {"exit": "ok"}}]
    report = run(content)
    assert report.verdict == DIFFERS
    assert fields(report)[-1] == "model"
    assert "zero page" in report.steps[-1].differences[-1].cause


def test_what_is_not_modelled_ends_the_replay() -> None:
    steps = [*vm(), {"op": "wait_damon", "seconds": 1}, {"op": "guest_read", "gfn": 4, "expect": {"exit": "mmio"}}]
    report = run(scenario(steps))
    assert (report.verdict, report.unsupported, fields(report)) == (UNSUPPORTED, "wait_damon", [])
