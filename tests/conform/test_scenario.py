"""Files that are no scenarios, and the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conform.scenarios import GOLDEN, scenario, vm
from xipvm.cli import main
from xipvm.conform.scenario import ScenarioError, expand, fill_values, find, load

GOOD = scenario([*vm(), {"op": "guest_read", "gfn": 4, "expect": {"exit": "ok", "value": "0x1004"}}])
LAST = len(GOOD["steps"])


def step(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """A change that puts other fields into the last step."""
    return lambda content: content["steps"][-1].update(fields)


def last(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """A change that makes another step of the last one."""
    return lambda content: content["steps"].__setitem__(-1, fields)


BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda content: content.pop("steps"), "an object with steps is expected"),
    (lambda content: content.pop("title"), "the scenario lacks 'title'"),
    (lambda content: content.update(steps=[]), "steps cannot be []"),
    (lambda content: content.update(format=2), "format cannot be 2"),
    (lambda content: content.update(format=True), "format cannot be true"),
    (lambda content: content.update(author="me"), "unknown field 'author'"),
    (lambda content: content.update(scenario="other"), "called 'other', not like its file"),
    (lambda content: content["steps"].append(7), f"step {LAST + 1}: no op"),
    (last(gfn=4), "no op"),
    (last(op="frobnicate"), "there is no op 'frobnicate'"),
    (step(gfn=-1), "gfn cannot be -1"),
    (step(gfn=True), "gfn cannot be true"),
    (step(gfn=1 << 40), f"gfn cannot be {1 << 40}"),
    (step(page=1), "unknown field 'page'"),
    (step(range={"start": 0, "end": 1}), "guest_read wants either gfn or range"),
    (step(vm="vm2"), "no earlier step made vm 'vm2'"),
    (step(setup=True), "a set-up step expects nothing"),
    (last(op="exit", setup=False), "setup is true or left out"),
    (step(expect={"exit": "fine"}), "exit cannot be fine"),
    (step(expect={"wish": 1}), "unknown field 'wish'"),
    (step(detail={"mood": 1}), "unknown field 'mood'"),
    (step(expect={"primary": {"four": ["f4", "none"]}}), "primary cannot be"),
    (step(expect={"primary": {"4": ["q4", "none"]}}), "primary cannot be"),
    (step(expect={"spte": {"perm": "rw"}}), "spte cannot be"),
    (step(expect={"notifier": [{"call": "shout"}]}), "notifier cannot be"),
    (
        last(op="guest_read", range={"start": 0, "end": 1}, expect={"spte": dict.fromkeys(("perm", "level"), 1)}),
        "spte cannot be",
    ),
    (last(op="munmap", space="slot", start=4, end=4), "range 4 to 4 is empty"),
    (last(op="munmap", space="void", start=4, end=5), "space cannot be void"),
    (last(op="munmap", space="slot", start=4), "munmap lacks 'end'"),
    (last(op="guest_read", range={"start": 0, "end": 4, "step": 0}), "step 0"),
    (last(op="guest_write", gfn=4), "guest_write wants either gfn and value or fill"),
    (last(op="host_write", space="slot", page=4, value="0x1", offset=1), "offset and bytes belong together"),
    (last(op="host_write", space="slot", page=4, value="0x1", offset=4092, bytes=8), "leaves the page"),
    (last(op="host_write", space="slot", page=4, value="65"), "value cannot be 65"),
    (
        last(op="file_create", file="F", fs="shmem", pages=1 << 17, contents=None, page_cache="none"),
        "pages cannot be 131072",
    ),
    (last(op="fsync", file="F"), "no earlier step made file 'F'"),
    (last(op="child_exit", child="c"), "no earlier step made child 'c'"),
    (last(op="memslot_delete", vm="vm1", slot=3), "no earlier step made memslot 3"),
    (last(op="uffd_unregister", space="slot", start=0, end=1), "uffd_unregister without uffd_open"),
    (last(op="vm_create", vm="vm1", guest_pages="4k"), "vm 'vm1' is there already"),
    (
        last(op="mmap", space="alt", page=0, pages=1, kind="anon", share="private", prot="rw", file="F"),
        "file and file_page belong to kind file",
    ),
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a scenario, or any text, to ``made.json``."""

    def put(content: Any) -> Path:
        path = tmp_path / "made.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return put


@pytest.fixture
def conform(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """Runs ``xipvm conform`` with arguments; status, output and errors."""

    def call(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["conform", *map(str, arguments)])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


@pytest.mark.parametrize(("change", "complaint"), BROKEN, ids=[complaint for _, complaint in BROKEN])
def test_a_broken_scenario(
    change: Callable[[dict[str, Any]], object], complaint: str, write: Callable[[Any], Path]
) -> None:
    content = copy.deepcopy(GOOD)
    change(content)
    path = str(write(content))
    with pytest.raises(ScenarioError) as caught:
        load(path)
    assert complaint in str(caught.value)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"steps"', "[" * 100_000, "\0"])
def test_what_is_no_scenario_at_all(
    text: str, write: Callable[[Any], Path], conform: Callable[..., tuple[object, str, str]]
) -> None:
    path = write(text)
    status, out, err = conform(path)
    assert (status, out) == (2, "")
    assert err.startswith(f"xipvm: {path}: ")
    assert err.count("\n") == 1


def test_files_that_cannot_be_read(tmp_path: Path, conform: Callable[..., tuple[object, str, str]]) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for name, complaint in (
        ("missing.json", "No such file"),
        ("bytes.json", "not a text file"),
        ("empty", "no .json file"),
    ):
        status, out, err = conform(tmp_path / name)
        assert (status, out) == (2, "")
        assert complaint in err
    assert conform()[0] == 2


def test_nothing_is_replayed_when_one_file_is_bad(
    write: Callable[[Any], Path], conform: Callable[..., tuple[object, str, str]]
) -> None:
    assert conform(GOLDEN / "two_vms.json", write("{"))[:2] == (2, "")


def test_statuses(write: Callable[[Any], Path], conform: Callable[..., tuple[object, str, str]]) -> None:
    good = conform(write(GOOD))
    assert good == (0, "made: pass\n1 scenario: 1 pass, 0 differ, 0 vary, 0 unsupported\n", "")
    content = copy.deepcopy(GOOD)
    content["steps"][-1]["expect"]["value"] = "0x1005"
    status, out, _ = conform(write(content))
    assert status == 1
    assert out.splitlines()[:4] == [
        "made: differs",
        f"  step {LAST}, guest_read gfn=4",
        "    value: expected 0x1005",
        "           got      0x1004",
    ]
    assert conform(write({**content, "stable": ["It depends."]}))[0] == 0
    content["steps"].append({"op": "wait_damon", "seconds": 1})
    path = write(content)
    status, out, _ = conform(path)
    assert (status, out.splitlines()[0]) == (1, "made: unsupported: wait_damon")
    assert conform("--skip-unsupported", path)[0] == 0


def test_json(write: Callable[[Any], Path], conform: Callable[..., tuple[object, str, str]]) -> None:
    content = copy.deepcopy(GOOD)
    content["steps"][-1].update(expect={"exit": "mmio"}, detail={"faults": 2})
    status, out, _ = conform("--json", "--detail", write(content), GOLDEN / "two_vms.json")
    assert status == 1
    made, golden = json.loads(out)
    assert (golden["scenario"], golden["verdict"], golden["group"]) == ("two_vms", "pass", "kvm")
    assert (made["verdict"], made["unsupported"]) == ("differs", None)
    (found,) = made["steps"]
    assert (found["step"], found["op"]) == (LAST, "guest_read")
    (difference,) = found["differences"]
    assert (difference["field"], difference["expected"], difference["got"]) == ("exit", "mmio", "ok")
    assert "spte_set" in difference["cause"]
    assert [detail["field"] for detail in found["detail"]] == ["detail faults"]


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "notes.txt"):
        (tmp_path / name).write_text("")
    assert find([str(tmp_path), "x"]) == [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "x"]


def test_fills() -> None:
    assert list(fill_values({"start": 2, "end": 4, "base": "0x10"})) == [(2, 0x12), (3, 0x13)]
    assert list(fill_values({"start": 2, "end": 4, "base": "0x10", "step": "0x100"})) == [(2, 0x210), (3, 0x310)]
    assert list(fill_values({"start": 2, "end": 4, "value": "0x7"})) == [(2, 7), (3, 7)]


def test_repeats() -> None:
    block = {"from": 4, "to": 8, "step": 2, "pages": 1, "call": "clear_young", "space": "slot"}
    one = {"call": "clear_young", "space": "slot"}
    assert expand([{"repeat": block}, {"call": "release"}]) == [
        {**one, "start": 4, "end": 5},
        {**one, "start": 6, "end": 7},
        {"call": "release"},
    ]
