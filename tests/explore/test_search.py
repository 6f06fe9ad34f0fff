"""The explorer on problems whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from math import comb, factorial

import pytest

from xipvm.actors import give_way, point
from xipvm.errors import BadInput
from xipvm.explore import Choice, DriftError, Scene, explore, replay, run_once, shrink, strategy
from xipvm.explore.choices import Question
from xipvm.locks import LockClass, RwLock

STRATEGIES = ("random", "pct", "coverage", "exhaustive")


def walkers(actors: int, points: int) -> Callable[[Scene], None]:
    """Actors that pass points and do nothing."""

    def furnish(scene: Scene) -> None:
        def walk() -> None:
            for _ in range(points):
                point("walk")

        for number in range(actors):
            scene.actor(f"walker{number}", walk)

    return furnish


def lost_update(scene: Scene) -> None:
    """Two actors add one to a counter that they read and write in two steps."""
    counter = [0]

    def add() -> None:
        seen = counter[0]
        point("read")
        counter[0] = seen + 1

    def both() -> None:
        if counter[0] != 2:
            raise AssertionError(f"2 additions gave {counter[0]}")

    scene.actor("one", add)
    scene.actor("two", add)
    scene.afterwards(both)


def philosophers(seats: int, *, ordered: bool) -> Callable[[Scene], None]:
    """Each takes the fork at the left, then the one at the right; or the lower one first."""

    def furnish(scene: Scene) -> None:
        forks = [RwLock(f"fork{number}", LockClass(f"fork{number}")) for number in range(seats)]

        def eat(seat: int) -> None:
            hands = [seat, (seat + 1) % seats]
            first, second = sorted(hands) if ordered else hands
            with forks[first].write:
                point("one fork")
                with forks[second].write:
                    point("eating")

        for seat in range(seats):
            scene.actor(f"philosopher{seat}", eat, seat)

    return furnish


def peterson(scene: Scene, *, announce: bool) -> None:
    """Peterson's algorithm for two; without its announcement both may enter."""
    wants, turn, inside = [False, False], [0], [0]

    def enter(me: int) -> None:
        other = 1 - me
        if announce:
            wants[me] = True
            point("wants")
        turn[0] = other
        point("turn")
        while wants[other] and turn[0] == other:
            give_way("spin")
        point("checked")
        inside[0] += 1
        if inside[0] > 1:
            raise AssertionError("two are in the critical section")
        point("inside")
        inside[0] -= 1
        wants[me] = False

    scene.actor("one", enter, 0)
    scene.actor("two", enter, 1)


@pytest.mark.parametrize(("actors", "points"), [(2, 1), (2, 2), (2, 4), (3, 1), (3, 2)])
def test_exhaustive_makes_every_interleaving_once(actors: int, points: int) -> None:
    steps = points + 1
    search = explore(walkers(actors, points), strategy("exhaustive", preemptions=None), runs=100_000)
    assert search.complete
    assert search.runs == factorial(actors * steps) // factorial(steps) ** actors


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_the_bound_counts_preemptions(bound: int) -> None:
    """Two actors of s steps: one ends a run; with p preemptions the runs before that are cut at p places."""
    steps = 4
    runs = set()
    by = strategy("exhaustive", preemptions=bound)
    while by.begin():
        run = run_once(walkers(2, steps - 1), by.pick)
        by.end(run.choices, run.features)
        assert run.preemptions <= bound
        runs.add(tuple(choice.answer for choice in run.choices))
    # Blocks alternate between the two. The last block but one ends its actor; every other end of a block preempts.
    expected = 0
    for preemptions in range(bound + 1):
        blocks = preemptions + 2
        first, second = (blocks + 1) // 2, blocks // 2
        expected += 2 * comb(steps - 1, first - 1) * comb(steps - 1, second - 1)
    assert len(runs) == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_lost_update_is_found_and_shrunk(name: str) -> None:
    search = explore(lost_update, strategy(name, 1), runs=50)
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what == "AssertionError"
    small = shrink(lost_update, search.failing)
    assert small.preemptions == 1
    assert replay(lost_update, small.choices).failure is not None


@pytest.mark.parametrize("name", STRATEGIES)
def test_philosophers_starve_only_at_a_round_table(name: str) -> None:
    search = explore(philosophers(3, ordered=False), strategy(name, 1), runs=500)
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what in ("deadlock", "lock")
    assert explore(philosophers(3, ordered=True), strategy(name, 1), runs=200).failing is None


def test_peterson_needs_the_announcement() -> None:
    every = strategy("exhaustive", preemptions=3)
    assert explore(lambda scene: peterson(scene, announce=True), every, runs=2000).failing is None
    search = explore(lambda scene: peterson(scene, announce=False), strategy("exhaustive", preemptions=3), runs=2000)
    assert search.failing is not None


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_is_the_same_each_time(name: str) -> None:
    def runs() -> list[list[Choice]]:
        found = []
        by = strategy(name, 7)
        for _ in range(20):
            if not by.begin():
                break
            run = run_once(walkers(3, 2), by.pick)
            by.end(run.choices, run.features)
            found.append(run.choices)
        return found

    assert runs() == runs()


def test_a_changed_program_drifts_at_the_first_difference() -> None:
    search = explore(lost_update, strategy("exhaustive"), runs=50)
    assert search.failing is not None

    def changed(scene: Scene) -> None:
        def walk() -> None:
            point("read")
            point("another")
            point("read")

        scene.actor("one", walk)
        scene.actor("two", walk)

    with pytest.raises(DriftError, match=r"choice \d+ was recorded at .*, now it asks another"):
        replay(changed, [Choice(2, "start", 0), Choice(2, "read", 0), Choice(2, "read", 1)])
    assert replay(changed, search.failing.choices, strict=False).failure is None
    with pytest.raises(DriftError, match="the run has ended"):
        replay(walkers(1, 1), search.failing.choices)


def test_other_choices_than_who_goes_on() -> None:
    def furnish(scene: Scene) -> None:
        def pick() -> None:
            if (scene.choose(3, "x"), scene.choose(5, "y"), scene.choose(1, "z")) == (2, 3, 0):
                raise AssertionError("found")

        scene.actor("one", pick)

    search = explore(furnish, strategy("exhaustive", preemptions=0), runs=100)
    assert search.failing_at == 2 * 5 + 3 + 1
    assert explore(furnish, strategy("pct", 3), runs=300).failing is not None


def test_an_answer_that_is_too_large_is_the_dull_one() -> None:
    run = run_once(walkers(2, 1), lambda question: 9)
    assert {choice.answer for choice in run.choices} == {0}


def test_a_run_that_does_not_end() -> None:
    def furnish(scene: Scene) -> None:
        def spin() -> None:
            while True:
                point("spin")

        scene.actor("one", spin)
        scene.actor("two", spin)

    run = run_once(furnish, lambda question: 0)
    assert run.failure is not None
    assert run.failure.what == "livelock"


def test_unknown_strategy() -> None:
    with pytest.raises(BadInput, match="no strategy is called 'clever'"):
        strategy("clever")


def test_questions_name_the_candidates() -> None:
    asked: list[Question] = []

    def pick(question: Question) -> int:
        asked.append(question)
        return 0

    run_once(walkers(2, 1), pick)
    assert [(question.label, question.preempts, question.actors) for question in asked] == [
        ("start", False, ("walker0", "walker1")),
        ("walk", True, ("walker0", "walker1")),
    ]
