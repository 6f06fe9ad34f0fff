"""Every known fault is found, by two strategies, in scenarios that do not know of it; and nothing is found without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.check import INVARIANTS
from xipvm.explore.find import KNOWN
from xipvm.explore.scenarios import SCENARIOS
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mutants import MUTANTS, planted
from xipvm.mutants.ablation import ablate
from xipvm.mutants.hunt import STRATEGIES, hunt
from xipvm.mutants.reach import Reached, changes, counting, sites, survey

RUNS = 150
DEMANDED = {
    *["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "13", "14", "15", "17", "18", "19"],
    *["20", "24", "26", "29", "30", "31", "32", "42"],
    *(f"M{number}" for number in (*range(1, 15), *range(16, 28), *range(29, 36), 38)),
    *(f"B{number}" for number in range(1, 12)),
}
SLOW = {
    "announced-one-page-short",
    "announced-where-somebody-looks",
    "device-fault-holds-what-it-waits-for",
    "exit-unlinks-first",
    "faults-after-release",
    "flush-of-one-vcpu",
    "gru-range-active-is-a-flag",
    "inner-start-shrinks-the-hull",
    "mmio-entry-over-memory",
    "mmio-generations-wrap",
    "mremap-flushes-without-the-lock",
    "pfncache-active-before-it-is-listed",
    "pfncache-valid-outside-the-lock",
    "remote-granted-late",
    "reverse-map-of-another-slot",
    "ring-reset-not-flushed",
    "seq-after-count",
    "slot-goes-without-a-second-look",
    "slots-change-under-readers",
    "walk-not-repeated",
    "xip-fault-does-not-see-truncation",
    "zap-all-keeps-seq",
}
"""Those that take a second to be found, or longer."""


@pytest.fixture(scope="module")
def reached() -> Reached:
    """What the scenarios call of what mutants change: where a mutant makes no difference it is looked for last."""
    return survey(MUTANTS.values(), KNOWN)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MUTANTS],
)
def test_a_mutant_is_caught_by_two_strategies(name: str, reached: Reached) -> None:
    mutant = MUTANTS[name]
    found = hunt(mutant, KNOWN, runs=RUNS, reached=reached)
    assert len(found.caught) == 2, [(catch.strategy, catch.what) for catch in found.catches]
    for catch in found.caught:
        assert catch.what in mutant.caught_by
        assert catch.small is not None
        assert catch.small.failure is not None
        assert catch.small.failure.what == catch.what
        assert catch.actors <= 3
        assert catch.actors or catch.small.preemptions == 0  # nobody is needed where the preparation is enough
        assert catch.small.switches <= 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pct", "random", "coverage"])
def test_the_right_system_has_no_report(strategy: str) -> None:
    found = hunt(None, SCENARIOS, (strategy,), runs=10)
    assert found.caught == []
    assert found.catches[0].runs >= 10 * len(SCENARIOS)


def test_what_is_demanded_is_there() -> None:
    numbers = {number for mutant in MUTANTS.values() for number in mutant.number.split(", ")}
    assert numbers >= DEMANDED


ONLY = {
    "I1": ("announced-where-somebody-looks", "mremap-against-truncate"),
    "I2": ("change-pte-inside-the-range", "fault-against-ksm"),
    "I3": ("engine-drops-at-the-end", "an-engine-against-mprotect"),
    "I4": ("rights-lowered-afterwards", "fault-against-cow"),
    "I5": ("freed-before-the-tlb-flush", "fault-against-dontneed"),
    "I6": ("declined-and-not-closed", "a-range-that-is-declined"),
    "I7": ("same-entry-taken-for-no-change", "fault-against-dontneed"),
    "I8": ("engine-writes-unnoticed", "an-engine-s-page-is-swapped-twice"),
    "I9": ("use-not-passed-on", "fault-against-swapout"),
    "I10": ("flush-at-the-end", "fault-against-munmap"),
    "I11": ("copy-flushed-when-the-old-page-goes", "cow-under-host-threads"),
    "I12": ("dirty-log-flushed-when-it-is-out", "the-dirty-log-is-read"),
    "I13": ("mirror-goes-while-it-faults", "a-mirror-is-closed"),
    "I15": ("interval-number-not-set-by-who-only-looks", "a-snapshot-is-taken"),
    "I16": ("xip-entries-looked-at-without-their-lock", "hole-filled-while-its-mapping-is-protected"),
    "I17": ("xip-sparse-page-becomes-writable", "hole-of-a-file-system-that-turns-read-only"),
    "I18": ("xip-partial-copy-not-counted", "reads-of-all-lengths"),
}
"""For each invariant a mutant that it alone sees, and where."""


def test_every_invariant_is_needed() -> None:
    assert set(ONLY) == set(INVARIANTS)


@pytest.mark.parametrize("invariant", ONLY)
def test_what_an_invariant_sees_alone_escapes_without_it(invariant: str) -> None:
    mutant, scenario = ONLY[invariant]
    found = ablate(invariant, [MUTANTS[mutant]], {scenario: SCENARIOS[scenario]}, runs=40)
    assert found.escapes == [mutant], found.seen
    assert not found.dead


def test_a_mutant_that_something_else_sees_does_not_escape() -> None:
    scenario = {"fault-against-munmap": SCENARIOS["fault-against-munmap"]}
    found = ablate("I3", [MUTANTS["nothing-removed"], MUTANTS["use-not-passed-on"]], scenario, runs=4)
    assert found.dead
    assert found.seen == {"nothing-removed": "I10"}
    assert found.instead == {"I10": 1}


def test_what_is_only_seen_when_the_run_is_over_is_late() -> None:
    scenario = {"the-dirty-log-is-read": SCENARIOS["the-dirty-log-is-read"]}
    found = ablate("I12", [MUTANTS["dirty-log-without-a-flush"]], scenario, runs=40)
    assert found.late == {"dirty-log-without-a-flush": "AssertionError"}
    assert not found.dead


def test_the_right_system_gets_to_what_mutants_change() -> None:
    where = sites([MUTANTS["no-retry-check"], MUTANTS["mremap-flushes-without-the-lock"]])
    assert (KvmBase, "mmu_invalidate_retry") in where
    scenario = {"fault-against-munmap": SCENARIOS["fault-against-munmap"]}
    with counting(where) as calls:
        assert hunt(None, scenario, ("random",), runs=4).caught == []
    assert calls[KvmBase, "mmu_invalidate_retry"] > 0
    assert len(calls) < len(where)  # nothing is moved there


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_leaves_nothing_behind(name: str) -> None:
    before = dict(vars(KvmBase))
    with planted(name):
        pass
    assert dict(vars(KvmBase)) == before


def test_the_list(tmp_path: Path) -> None:
    outcome = inside("mutants", cwd=tmp_path)
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) == len(MUTANTS)
    lines = [json.loads(line) for line in inside("mutants", "--json", cwd=tmp_path).out.splitlines()]
    assert [line["mutant"] for line in lines] == list(MUTANTS)
    columns = [outcome.out.splitlines()[n].index(mutant.doc) for n, mutant in enumerate(MUTANTS.values())]
    assert len(set(columns)) == 1
    named = inside("mutants", "flush-skipped", "no-retry-check", cwd=tmp_path)
    assert [line.split()[1] for line in named.out.splitlines()] == ["flush-skipped", "no-retry-check"]
    assert inside("mutants", "nothing", cwd=tmp_path).status == 2
    assert inside("mutants", "--control", "flush-skipped", cwd=tmp_path).status == 2


@pytest.mark.slow
def test_a_hunt_from_the_command_line(tmp_path: Path) -> None:
    outcome = inside("mutants", "--run", "no-retry-check", "--json", cwd=tmp_path)
    assert outcome.status == 0, outcome
    found = json.loads(outcome.out)
    assert {catch["caught_by"] for catch in found["catches"]} <= set(MUTANTS["no-retry-check"].caught_by)
    text = inside("mutants", "--run", "flush-skipped", cwd=tmp_path).out
    assert text.endswith("1 mutants, 0 not caught by two strategies\n")


def test_a_hunt_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["fault-against-munmap", "mremap-against-truncate"]
    monkeypatch.setattr("xipvm.cli.mutants.KNOWN", {name: SCENARIOS[name] for name in names})
    hunted = ["flush-skipped", "no-retry-check"]
    outcome = inside("mutants", "--run", "--markdown", "--runs", 40, *hunted, cwd=tmp_path)
    assert outcome.status == 0, outcome
    header, line, *rows, empty, count, times = outcome.out.splitlines()
    assert {text.count("|") for text in (header, line, *rows)} == {7}
    assert [row.split(" | ")[1] for row in rows] == [f"`{name}`" for name in hunted]
    assert (empty, count) == ("", "2 mutants, 0 not caught by two strategies")
    assert " s until two strategies have found it in the median, " in times


def test_where_a_mutant_makes_no_difference_is_looked_at_last() -> None:
    names = ["fault-against-munmap", "mremap-against-truncate"]
    scenarios = {name: SCENARIOS[name] for name in names}
    mutant = MUTANTS["mremap-leaves-the-old-address-in-tlbs"]
    where = survey([mutant], scenarios)
    assert changes(mutant).matter(where["mremap-against-truncate", "modern"].called)
    assert not changes(mutant).matter(where["fault-against-munmap", "modern"].called)
    without = {"fault-against-munmap": scenarios["fault-against-munmap"]}
    assert hunt(mutant, without, ("random",), runs=4, reached=where, everywhere=False).catches == []
    (catch,) = hunt(mutant, without, ("random",), runs=4, reached=where).catches
    assert catch.runs == 4
    found = hunt(mutant, scenarios, ("random",), runs=100, reached=where, enough=1)
    assert {scenario for scenario, _, _ in found.catches[0].seen} == {"mremap-against-truncate"}


def test_an_unknown_mutant(tmp_path: Path) -> None:
    outcome = inside("mutants", "--run", "nothing", cwd=tmp_path)
    assert outcome.status == 2
    assert "no mutant is called 'nothing'" in outcome.err


def test_one_that_escapes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.cli.mutants.KNOWN", {"fault-against-munmap": SCENARIOS["fault-against-munmap"]})
    outcome = inside("mutants", "--run", "dirty-log-without-a-flush", "--runs", 2, cwd=tmp_path)
    assert outcome.status == 1
    assert "ESCAPED" in outcome.out


@pytest.mark.slow
def test_the_control_from_the_command_line(tmp_path: Path) -> None:
    outcome = inside("mutants", "--control", "--runs", 1, cwd=tmp_path)
    assert outcome.status == 0, outcome
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == list(STRATEGIES)
    for line in lines:
        assert line.endswith(" calls: no report")
        assert " functions that mutants change reached, " in line


def test_an_ablation_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.cli.mutants.KNOWN", {"a-mirror-is-closed": SCENARIOS["a-mirror-is-closed"]})
    outcome = inside("mutants", "--ablate", "mirror-goes-while-it-faults", "--runs", 8, cwd=tmp_path)
    assert outcome.status == 0, outcome
    assert outcome.out.splitlines() == [
        "without  escape  late  seen by another invariant",
        "I13           1     0  none",
        "                       mirror-goes-while-it-faults",
        "1 invariants, 0 missed by nobody",
    ]
    outcome = inside("mutants", "--ablate", "nothing-removed", "--runs", 1, cwd=tmp_path)
    assert outcome.status == 1
    assert outcome.out.endswith("1 invariants, 1 missed by nobody: I3\n")
