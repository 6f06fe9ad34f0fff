"""Actors: who runs when, what ends a run, and what is left of it."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable

import pytest
from greenlet import GreenletExit, greenlet

from tests.locks.dfs import depth_first
from xipvm import actors
from xipvm.actors import State, on_point, on_wait, point, wait
from xipvm.errors import DeadlockError, InternalError, LockLeakError
from xipvm.locks import LockClass, RwLock, checking
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace


def steps(log: list[str], name: str, count: int) -> Callable[[], None]:
    """What passes ``count`` points, and says so."""

    def run() -> None:
        for number in range(count):
            log.append(f"{name}{number}")
            point(f"{name}.{number}")

    return run


def answers(numbers: list[int]) -> Callable[[int, str], int]:
    """Chooses ``numbers``, then 0."""
    left = iter(numbers)
    return lambda n, label: next(left, 0)


def test_without_a_choice_each_runs_to_its_end() -> None:
    log: list[str] = []
    scheduler = Scheduler()
    made = [scheduler.spawn(name, steps(log, name, 2)) for name in "ab"]
    scheduler.run()
    assert log == ["a0", "a1", "b0", "b1"]
    assert [actor.state for actor in made] == [State.DONE, State.DONE]
    assert scheduler.switches == 2


def test_choose_is_asked_at_every_point_and_names_the_next() -> None:
    log: list[str] = []
    asked: list[tuple[int, str, list[str]]] = []

    def choose(n: int, label: str) -> int:
        asked.append((n, label, [actor.name for actor in scheduler.candidates]))
        return len(asked) % 2

    scheduler = Scheduler(choose)
    scheduler.spawn("a", steps(log, "a", 2))
    scheduler.spawn("b", steps(log, "b", 2))
    scheduler.run()
    assert log == ["b0", "b1", "a0", "a1"]
    assert asked == [
        (2, "start", ["a", "b"]),
        (2, "b.0", ["b", "a"]),
        (2, "b.1", ["b", "a"]),
        (2, "a.0", ["a", "b"]),
        (2, "a.1", ["a", "b"]),
    ]


def test_the_same_answers_give_the_same_run() -> None:
    def once() -> list[str]:
        log: list[str] = []
        scheduler = Scheduler(answers([1, 1, 0, 1, 1]))
        for name in "abc":
            scheduler.spawn(name, steps(log, name, 3))
        scheduler.run()
        return log

    assert once() == once()
    assert sorted(once()) == [f"{name}{number}" for name in "abc" for number in range(3)]


def test_an_actor_may_make_others() -> None:
    log: list[str] = []
    scheduler = Scheduler()

    def parent() -> None:
        scheduler.spawn("child", steps(log, "child", 1))
        wait("the child", lambda: log == ["child0"])
        log.append("parent")

    scheduler.spawn("parent", parent)
    scheduler.run()
    assert log == ["child0", "parent"]


def test_a_point_without_a_scheduler_does_nothing() -> None:
    point("nowhere")
    with on_point(lambda label: None):
        point("somewhere")
    point("nowhere")


def test_who_waits_does_not_run_until_it_is_ready() -> None:
    log: list[str] = []
    scheduler = Scheduler(lambda n, label: n - 1)

    def waiter() -> None:
        wait("three steps", lambda: len(log) >= 3)
        log.append("ready")

    waiting = scheduler.spawn("waiter", waiter)
    scheduler.spawn("other", steps(log, "s", 4))
    scheduler.run()
    assert log[:3] == ["s0", "s1", "s2"]
    assert "ready" in log
    assert waiting.state is State.DONE
    assert waiting.waits_for == ""


def test_a_deadlock_says_who_waits_for_what_and_holds_what() -> None:
    cls = LockClass("lock")
    a, b = RwLock("a", cls), RwLock("b", LockClass("other"))

    def take(first: RwLock, second: RwLock) -> None:
        with first.write:
            point("between")
            with second.write:
                raise AssertionError("unreachable")

    scheduler = Scheduler(lambda n, label: int(label == "between"))
    one = scheduler.spawn("one", take, a, b)
    two = scheduler.spawn("two", take, b, a)
    with checking() as checker:
        checker.before = lambda *_: None  # type: ignore[method-assign]  # so that it comes to that
        with pytest.raises(DeadlockError) as caught:
            scheduler.run()
    assert caught.value.errno == errno.EDEADLK
    assert caught.value.waiting == (
        ("one", "write of b", ("a (write)",)),
        ("two", "write of a", ("b (write)",)),
    )
    assert "one waits for write of b and holds a (write)" in str(caught.value)
    assert not a.taken
    assert not b.taken
    assert (one.state, two.state) == (State.FAILED, State.FAILED)


def test_a_deadlock_is_no_actors_to_handle() -> None:
    seen: list[str] = []

    def waiter() -> None:
        try:
            wait("nothing", lambda: False)
        except DeadlockError:
            seen.append("handled")

    scheduler = Scheduler()
    scheduler.spawn("waiter", waiter)
    with pytest.raises(DeadlockError, match="waiter waits for nothing"):
        scheduler.run()
    assert seen == []


def test_without_a_scheduler_a_wait_that_nobody_ends_is_an_error() -> None:
    with pytest.raises(DeadlockError, match=r"an event: it never comes: EDEADL") as caught:
        wait("an event", lambda: False, because="it never comes")
    assert caught.value.errno == errno.EDEADLK


def test_a_point_hook_may_end_a_wait_that_has_a_label() -> None:
    looks: list[str] = []
    with on_point(looks.append):
        wait("seven looks", lambda: len(looks) == 7, label="look")
        assert looks == ["look"] * 7
        with pytest.raises(DeadlockError):
            wait("seven looks", lambda: False, label="look")
        assert len(looks) == 7 + actors.PATIENCE
        with pytest.raises(DeadlockError):
            wait("without a label", lambda: False)
    assert len(looks) == 7 + actors.PATIENCE


def test_a_wait_hook_is_asked_only_when_there_is_something_to_wait_for() -> None:
    asked: list[str] = []
    with on_wait(lambda what, ready: asked.append(what)):
        wait("now", lambda: True)
        wait("later", lambda: False)
    assert asked == ["later"]


def failing() -> None:
    point("before")
    raise ValueError("mine")


def test_who_fails_ends_the_run_and_the_others_are_unwound() -> None:
    log: list[str] = []

    def other() -> None:
        try:
            point("other")
            raise AssertionError("unreachable")
        finally:
            point("unwinding")  # does nothing
            log.append("unwound")

    scheduler = Scheduler(answers([1, 1]))
    bad = scheduler.spawn("bad", failing)
    good = scheduler.spawn("good", other)
    never = scheduler.spawn("never", log.append, "ran")
    with pytest.raises(ValueError, match="mine") as caught:
        scheduler.run()
    assert caught.value.__notes__ == ["in actor bad"]
    assert log == ["unwound"]
    assert (bad.error, bad.state, good.state, never.state) == (caught.value, State.FAILED, State.FAILED, State.FAILED)
    assert isinstance(good.error, GreenletExit)


def test_a_choice_that_raises_ends_the_run() -> None:
    class DriftError(Exception):
        pass

    def choose(n: int, label: str) -> int:
        if label == "a.1":
            raise DriftError
        return 0

    scheduler = Scheduler(choose)
    scheduler.spawn("a", steps([], "a", 3))
    scheduler.spawn("b", steps([], "b", 3))
    with pytest.raises(DriftError):
        scheduler.run()
    assert all(actor.greenlet is None for actor in scheduler.actors)


def test_a_choice_outside_of_what_was_asked_is_refused() -> None:
    scheduler = Scheduler(lambda n, label: n)
    scheduler.spawn("a", steps([], "a", 1))
    scheduler.spawn("b", steps([], "b", 1))
    with pytest.raises(InternalError, match="choice 2 of 2"):
        scheduler.run()


def test_an_aborted_run_leaves_nothing() -> None:
    lock = RwLock("lock", LockClass("lock"))
    before = actors.current

    def hold() -> None:
        with lock.read:
            point("held")
            wait("never", lambda: False)

    gc.collect()
    stacks = sum(isinstance(thing, greenlet) for thing in gc.get_objects())
    for _ in range(3):
        scheduler = Scheduler(lambda n, label: n - 1)
        for number in range(10):
            scheduler.spawn(f"holder{number}", hold)
        scheduler.spawn("bad", failing)
        with checking(), pytest.raises(ValueError, match="mine"):
            scheduler.run()
        assert not lock.taken
        assert all(not actor.held and not actor.atomic for actor in scheduler.actors)
    del scheduler
    gc.collect()
    assert sum(isinstance(thing, greenlet) for thing in gc.get_objects()) == stacks
    assert actors.current is before
    assert not actors.can_wait()
    point("nobody switches any more")


def test_who_ends_with_a_lock_is_reported() -> None:
    lock = RwLock("lock", LockClass("lock"))
    scheduler = Scheduler()
    scheduler.spawn("leaky", lambda: lock.write.__enter__())
    with checking(), pytest.raises(LockLeakError, match=r"leaky holds lock \(write\) at its end") as caught:
        scheduler.run()
    assert caught.value.held == ("lock (write)",)
    assert "test_scheduler.py" in caught.value.first


def test_a_scheduler_runs_once() -> None:
    scheduler = Scheduler()
    scheduler.run()
    with pytest.raises(InternalError, match="runs once"):
        scheduler.run()


def test_the_trace_follows_the_actor_and_its_cause() -> None:
    trace = Trace()
    seen: list[tuple[str, int]] = []
    trace.attach(lambda event: None)

    def act(cause: int) -> None:
        with trace.because(cause):
            for _ in range(2):
                seen.append((trace.actor, trace.cause))
                point("step")

    trace.actor = "somebody"
    scheduler = Scheduler(lambda n, label: n - 1, trace=trace)
    scheduler.spawn("a", act, 7)
    scheduler.spawn("b", act, 9)
    scheduler.run()
    assert seen == [("b", 9), ("a", 7), ("b", 9), ("a", 7)]
    assert (trace.actor, trace.cause) == ("somebody", 0)


def test_every_schedule_of_two_actors_is_found_once() -> None:
    """Two actors of three steps: 6 over 3."""
    found: list[str] = []
    for choose in depth_first():
        log: list[str] = []
        scheduler = Scheduler(choose)
        scheduler.spawn("a", steps(log, "a", 3))
        scheduler.spawn("b", steps(log, "b", 3))
        scheduler.run()
        found.append("".join(step[0] for step in log))
    assert len(set(found)) == 20
