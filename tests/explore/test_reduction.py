"""The exhaustive search with partial-order reduction: numbers that are known, and nothing that is missed."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import factorial

import pytest

from tests.explore.toys import (
    Furnish,
    indexer,
    last_zero,
    lost_update,
    peterson,
    philosophers,
    readers,
    readers_and_writers,
    writers,
)
from xipvm.actors import access, point
from xipvm.explore import Scene, explore, replay, run_once, strategy
from xipvm.explore.explorer import Run
from xipvm.explore.find import find
from xipvm.explore.footprint import Recorder, recording
from xipvm.explore.reduction import Reduced
from xipvm.explore.scene import Furnish as AnyScenario
from xipvm.explore.shared import Shared
from xipvm.explore.steps import Trail
from xipvm.explore.strategies import Exhaustive
from xipvm.mutants import planted

MUTANTS = [
    ("announced-when-it-has-happened", "fault-against-munmap", True),
    ("announced-one-page-short", "fault-against-dontneed", True),
    ("ended-before-it-happens", "fault-against-truncate", True),
    ("told-when-the-page-is-put", "fault-against-munmap", False),
    ("mprotect-says-nothing", "fault-against-munmap", False),
]
"""A fault of the system, a scenario, and whether the one shows in the other."""

FAULTS = (
    "fault-against-munmap",
    "fault-against-dontneed",
    "fault-against-mprotect",
    "fault-against-cow",
    "fault-against-swapout",
    "fault-against-migrate",
    "fault-against-ksm",
    "fault-against-truncate",
    "fault-against-flash-mode",
    "fault-against-memslot-move",
)
"""A fault of two vCPUs against everything that can take the page away."""


# ---- numbers of Mazurkiewicz traces

LITERATURE = [
    (writers(2), 2),
    (writers(4), factorial(4)),
    (readers(2), 4),
    (readers(8), 256),
    (last_zero(5), 64),
    (indexer(11), 1),
    (indexer(12), 8),
    (indexer(13), 64),
]
"""Abdulla, Aronis, Jonsson and Sagonas (POPL 2014) for readers, last zero and indexer; n writers have n! orders."""


@pytest.mark.parametrize(("program", "traces"), LITERATURE)
def test_each_trace_is_run_to_its_end_once(program: Furnish, traces: int) -> None:
    search = explore(program, Reduced(None), runs=10_000)
    assert search.complete
    assert (search.runs, search.distinct) == (traces, traces)


@pytest.mark.slow
def test_the_last_zero_of_many() -> None:
    """XIPVM_LAST_ZERO says of how many; of 10 the literature has 3328, which take some 20 s."""
    n = int(os.environ.get("XIPVM_LAST_ZERO", "8"))
    traces = (n + 3) << (n - 2)
    search = explore(last_zero(n), Reduced(None), runs=2 * traces)
    assert (search.complete, search.runs, search.distinct) == (True, traces, traces)


@pytest.mark.parametrize(
    "program",
    [
        last_zero(3),
        readers(3),
        philosophers(2, ordered=True),
        philosophers(2, ordered=False),
        lost_update(2),
        lost_update(3),
    ],
)
@pytest.mark.parametrize("bound", [None, 0, 1, 2])
def test_nothing_of_a_program_is_missed(program: Furnish, bound: int | None) -> None:
    every, _ = outcomes(program, Exhaustive(bound))
    reduced, made = outcomes(program, Reduced(bound))
    assert reduced == every
    if bound is None:
        assert made == len(every)


# ---- the problems of the field


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (lost_update(2), "AssertionError"),
        (readers_and_writers(locked=False), "AssertionError"),
        (philosophers(3, ordered=False), "deadlock"),
        (peterson(fence=False), "AssertionError"),
    ],
)
@pytest.mark.parametrize("bound", [None, 3])
def test_what_is_wrong_is_found(program: Furnish, what: str, bound: int | None) -> None:
    search = explore(program, Reduced(bound), runs=5000)
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what == what
    assert replay(program, search.failing.choices).failure is not None


@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (readers_and_writers(locked=True), None),
        (philosophers(3, ordered=True), None),
        (peterson(fence=True), 1),
    ],
)
def test_what_is_right_is_searched_to_the_end(program: Furnish, bound: int | None) -> None:
    search = explore(program, Reduced(bound), runs=5000)
    assert search.failing is None
    assert search.complete


# ---- against the search that leaves nothing out


def watch(scene: Scene, recorder: Recorder) -> Trail:
    """Only follows the run."""
    trail = Trail(recorder, scene.scheduler, scene.fingerprint, events_are_mine=False)
    scene.trace.attach(trail)
    return trail


def outcomes(scenario: AnyScenario, by: Exhaustive, **options: object) -> tuple[dict[str, set[str]], int]:
    """By trace, what was wrong with its runs; and how many runs were made to their end.

    Only for scenarios in which all actors come to their end: what would have come is not known otherwise.
    """
    found: dict[str, set[str]] = {}
    made = 0
    with recording():
        while by.begin():
            run: Run = run_once(scenario, by.pick, watch=by.watch if isinstance(by, Reduced) else watch, **options)
            by.end(run.choices, run.features)
            if not run.cut:
                made += 1
                found.setdefault(run.trace, set()).add(run.failure.what if run.failure is not None else "")
    return found, made


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_of_a_fault_is_missed(name: str) -> None:
    every, runs = outcomes(find(name), Exhaustive(1))
    reduced, made = outcomes(find(name), Reduced(1))
    assert reduced == every
    assert made < runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fault-against-munmap", "fault-against-migrate", "fault-against-flash-mode"])
def test_nothing_is_missed_with_two_preemptions(name: str) -> None:
    assert outcomes(find(name), Reduced(2))[0] == outcomes(find(name), Exhaustive(2))[0]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_right_with_one_preemption(name: str) -> None:
    search = explore(find(name), strategy("exhaustive", preemptions=1, reduce=True), runs=1000)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
    assert search.complete


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fault-against-munmap", "fault-against-memslot-move"])
def test_faults_are_right_with_three(name: str) -> None:
    search = explore(find(name), Reduced(3), runs=100_000)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
    assert search.complete


@pytest.mark.parametrize(("mutant", "name", "shows"), MUTANTS)
def test_a_broken_system_is_found_to_be(mutant: str, name: str, shows: bool) -> None:
    with planted(mutant):
        assert (explore(find(name), Exhaustive(1), runs=1000).failing is not None) == shows
        assert (explore(find(name), Reduced(1), runs=1000).failing is not None) == shows


@pytest.mark.parametrize(
    ("mutant", "name", "bound"),
    [
        ("interval-number-not-set-by-who-only-looks", "a-snapshot-is-taken", 2),
        ("interval-number-not-set", "a-watched-page-is-given-up", 1),
        ("mirror-asks-for-open-ranges-only", "a-mirror-against-dontneed", 1),
        ("no-retry-check", "fault-against-dontneed", 1),
    ],
)
def test_who_forgets_to_look_is_still_judged(mutant: str, name: str, bound: int) -> None:
    """What a part that is wrong does not read or write, the oracle's verdict hangs on all the same."""
    with planted(mutant):
        every, _ = outcomes(find(name), Exhaustive(bound), invariants=())
        assert outcomes(find(name), Reduced(bound), invariants=())[0] == every


@pytest.mark.parametrize("by", [Exhaustive, Reduced])
@pytest.mark.parametrize("bound", [1, 2])
def test_a_reader_that_is_told_of_nothing(by: type[Exhaustive], bound: int) -> None:
    """Nothing but the trace sets its question and the end of the range in an order."""
    with planted("interval-number-not-set-by-who-only-looks"):
        search = explore(find("a-snapshot-is-taken"), by(bound), runs=100, invariants=("I15",))
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what == "I15"


# ---- what a step touches


def footprints(furnish: Furnish) -> tuple[Trail, Run]:
    """Of the plain run."""
    trails: list[Trail] = []

    def follow(scene: Scene, recorder: Recorder) -> Trail:
        trails.append(watch(scene, recorder))
        return trails[0]

    with recording():
        run = run_once(furnish, lambda question: 0, watch=follow)
    return trails[0], run


def depends(act: Callable[[Shared[object]], object], other: Callable[[Shared[object]], object], held: object) -> bool:
    """Whether two actors' only steps depend on each other, given something that they share."""

    def furnish(scene: Scene) -> None:
        shared: Shared[object] = Shared(held)
        scene.actor("one", act, shared)
        scene.actor("two", other, shared)

    trail, run = footprints(furnish)
    assert run.failure is None
    first, second = trail.steps_made
    return first.print.conflicts(second.print)


def _look(shared: Shared[object]) -> object:
    return shared.value


def _set(shared: Shared[object]) -> None:
    shared.value = 1


def _fill(shared: Shared[list[int]]) -> None:
    shared.value.append(1)


def test_reads_and_writes_are_told_apart() -> None:
    assert not depends(_look, _look, 0)
    assert depends(_look, _set, 0)
    assert depends(_set, _set, 0)


def test_what_a_container_holds_is_seen_to_change() -> None:
    assert not depends(_look, _look, [])
    assert depends(_look, _fill, [])  # type: ignore[arg-type]
    assert depends(lambda shared: shared.value["inner"], lambda shared: shared.value["inner"].append(1), {"inner": []})  # type: ignore[index]


def test_what_is_not_understood_depends_on_everything() -> None:
    assert depends(_look, _look, object())
    counter = [0]
    assert depends(lambda shared: counter[0], lambda shared: shared, 0)


def test_a_container_that_is_kept_over_a_point() -> None:
    def furnish(scene: Scene) -> None:
        shared = Shared([1, 2, 3])

        def iterate() -> None:
            for _ in shared.value:
                point("between")

        def keep() -> None:
            mine = shared.value
            point("kept")
            mine.append(4)

        scene.actor("iterates", iterate)
        scene.actor("keeps", keep)

    trail, run = footprints(furnish)
    assert run.failure is None
    *reads, _, adds = trail.steps_made
    assert [each.print.conflicts(adds.print) for each in reads] == [True] * 4


def test_an_actor_that_sets_a_variable_of_others_is_not_understood() -> None:
    def furnish(scene: Scene) -> None:
        count = 0

        def add() -> None:
            nonlocal count
            count += 1

        scene.actor("one", add)
        scene.actor("two", add)

    trail, _ = footprints(furnish)
    assert all(step.print.unknown for step in trail.steps_made)


def test_accesses_that_are_told() -> None:
    def furnish(scene: Scene) -> None:
        def use(write: bool) -> None:
            access("a register", write=write)

        for number, write in enumerate((False, False, True)):
            scene.actor(f"user{number}", use, write)

    trail, _ = footprints(furnish)
    one, two, three = (step.print for step in trail.steps_made)
    assert (one.conflicts(two), one.conflicts(three)) == (False, True)
    search = explore(furnish, Reduced(None), runs=100)
    assert (search.complete, search.runs) == (True, 4)


def test_the_model_is_understood() -> None:
    """A step of the model's that depends on everything would be right, but costs reduction."""
    for name in FAULTS:
        trail, run = footprints(find(name))
        assert run.failure is None
        assert not any(step.print.unknown for step in trail.steps_made), (name, trail.recorder.not_understood)


def test_nothing_is_left_of_the_watching() -> None:
    before = Shared.__getattribute__, Shared.__setattr__
    with recording():
        assert (Shared.__getattribute__, Shared.__setattr__) != before
        with recording():
            pass
        assert (Shared.__getattribute__, Shared.__setattr__) != before
    assert (Shared.__getattribute__, Shared.__setattr__) == before
    assert "__getattribute__" not in vars(Shared)
