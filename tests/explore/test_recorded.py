"""Recorded sequences as scenarios: in every other order than the recorded one, too, nothing may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.run.command import inside
from xipvm.errors import BadInput
from xipvm.explore import Scene, explore, replay, strategy
from xipvm.explore.choices import Recording
from xipvm.explore.find import find
from xipvm.explore.recorded import POISON, recorded
from xipvm.explore.scene import opened
from xipvm.mutants import planted
from xipvm.trace.expect import TraceLog

GOLDEN = Path(__file__).parents[1] / "golden"
ALL = sorted(path.stem for path in GOLDEN.glob("*.json"))
QUICK = (
    "fork_host_write",
    "ksm_merge",
    "madv_pageout_anon",
    "memslot_move",
    "mprotect_rw_r",
    "mremap_move_partial",
    "shmem_two_maps_punch",
    "thp_munmap_whole",
    "two_vms",
    "uffd_wp",
)


def golden(name: str) -> str:
    return str(GOLDEN / f"{name}.json")


@pytest.mark.parametrize("by", ["random", "pct"])
@pytest.mark.parametrize("name", QUICK)
def test_a_slice_in_other_orders(name: str, by: str) -> None:
    search = explore(recorded(golden(name)), strategy(by), runs=25)
    assert search.failing is None, search.failing.failure
    assert search.distinct > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all_in_other_orders(name: str) -> None:
    search = explore(recorded(golden(name)), strategy("random"), runs=40)
    assert search.failing is None, search.failing.failure
    assert search.runs == 40


@pytest.mark.parametrize("name", ALL)
def test_who_does_what(name: str) -> None:
    """What the host does is one actor; a VM that is there has two vCPUs beside it, if the recorded guest went on."""
    content = json.loads((GOLDEN / f"{name}.json").read_text())
    guests = {
        step.get("vm", "vm1")
        for step in content["steps"]
        if step["op"] in ("guest_read", "guest_write") and not step.get("setup")
    }
    with opened(recorded(golden(name)), Recording(lambda question: 0)) as scene:
        names = [actor.name for actor in scene.scheduler.actors]
        assert names == ["host", *(f"{vm}.vcpu{number}" for vm in sorted(guests) for number in (0, 1))]
        scene.run()


@pytest.mark.parametrize(
    ("name", "mutant", "invariants"),
    [
        ("madv_dontneed_two_vmas", "no-retry-check", {"I2", "I4", "I7"}),
        ("madv_dontneed_two_vmas", "nothing-removed", {"I3"}),
        ("mprotect_rw_r", "mprotect-says-nothing", {"I1"}),
        ("fork_host_write", "copy-mapped-before-the-range", {"I1"}),
        ("madv_pageout_anon", "told-when-the-page-is-put", {"I1"}),
        ("thp_munmap_whole", "flush-skipped", {"I10"}),
    ],
)
def test_a_fault_is_found_in_them(name: str, mutant: str, invariants: set[str]) -> None:
    with planted(mutant):
        scenario = recorded(golden(name))
        search = explore(scenario, strategy("random"), runs=100)
        assert search.failing is not None
        assert search.failing.failure is not None
        assert search.failing.failure.what in invariants
        again = replay(scenario, search.failing.choices)
        assert again.failure is not None
        assert again.failure.message == search.failing.failure.message


def test_a_guest_that_reads_a_free_page_is_told_of() -> None:
    """Also where the oracle is not asked."""
    scenario = recorded(golden("madv_dontneed_two_vmas"))
    with planted("nothing-removed"):
        search = explore(scenario, strategy("random"), runs=50, invariants=())
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what == "AssertionError"


def test_what_a_free_page_holds() -> None:
    with opened(lambda scene: None, Recording(lambda question: 0)) as scene:
        pfn = scene.host.alloc()
        scene.host.put(pfn)
        assert scene.host.read(pfn, 0, 8) == bytes([POISON]) * 8


def test_accesses_to_many_pages_are_few() -> None:
    """The set-up touches all; beside the host, the ends and the middle are."""
    log = TraceLog()

    def furnish(scene: Scene) -> None:
        recorded(golden("munmap_partial_anon"))(scene)
        scene.trace.attach(log)

    with opened(furnish, Recording(lambda question: 0)) as scene:
        scene.run()
    assert 0 < log.count("kvm_page_fault") < 40


def test_from_the_command_line(tmp_path: Path) -> None:
    path = golden("madv_dontneed_two_vmas")
    outcome = inside("explore", path, "--runs", 20, "--quiet", cwd=tmp_path)
    assert outcome.status == 0, outcome
    assert outcome.out.startswith(f"{path}: random: 20 runs, ")
    saved = tmp_path / "found.json"
    outcome = inside("explore", path, "--mutant", "no-retry-check", "--save", saved, "--quiet", cwd=tmp_path)
    assert outcome.status == 1, outcome
    assert inside("replay", saved, cwd=tmp_path).status == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("informative/race_dontneed.json", "depended on the clock"),
        ("nothing.json", "No such file"),
        ("README.md.json", "No such file"),
    ],
)
def test_what_is_none(name: str, wrong: str) -> None:
    with pytest.raises(BadInput, match=wrong):
        find(str(GOLDEN / name))


def test_a_counterexample_is_no_sequence(tmp_path: Path) -> None:
    other: dict[str, Any] = {"xipvm": "counterexample", "version": 1}
    path = tmp_path / "found.json"
    path.write_text(json.dumps(other))
    with pytest.raises(BadInput, match="not a scenario"):
        find(str(path))
