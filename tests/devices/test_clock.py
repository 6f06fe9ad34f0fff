"""The event clock: order, cancellation, and time as calls see it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.clock import EventClock


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_due_calls_run_by_instant_then_by_order_of_asking(instants: list[int]) -> None:
    clock = EventClock()
    ran: list[tuple[int, int]] = []
    for order, ns in enumerate(instants):
        clock.call_at(ns, lambda ns=ns, order=order: ran.append((ns, order)))
    clock.advance(5)
    assert ran == sorted((ns, order) for order, ns in enumerate(instants))
    assert clock.next_deadline() is None


def test_a_call_sees_its_own_instant() -> None:
    clock = EventClock()
    seen: list[int] = []
    for ns in (30, 10, 20):
        clock.call_at(ns, lambda: seen.append(clock.now))
    clock.advance(25)
    assert seen == [10, 20]
    assert clock.now == 25
    assert clock.next_deadline() == 30


def test_a_call_made_by_a_call_runs_in_the_same_run_when_due() -> None:
    time = [0]
    clock = EventClock(lambda: time[0])
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        clock.call_at(15, lambda: ran.append("second"))
        clock.call_at(99, lambda: ran.append("late"))

    clock.call_at(10, first)
    assert clock.run_due() == 0
    time[0] = 20
    assert clock.run_due() == 2
    assert ran == ["first", "second"]
    assert clock.next_deadline() == 99


def test_cancelled_calls_do_not_run_and_hold_no_deadline() -> None:
    clock = EventClock()
    ran: list[int] = []
    calls = [clock.call_at(ns, lambda ns=ns: ran.append(ns)) for ns in range(1, 301)]
    for call in calls[:299]:
        clock.cancel(call)
        clock.cancel(call)
    assert clock.next_deadline() == 300
    clock.advance(1000)
    assert ran == [300]
    clock.cancel(calls[299])
    clock.call_at(2000, lambda: ran.append(2000))
    clock.advance(1000)
    assert ran == [300, 2000]


def test_order_survives_the_sweep_of_cancelled_calls() -> None:
    clock = EventClock()
    ran: list[int] = []
    for place in range(400):
        ns = place * 149 % 400
        call = clock.call_at(ns, lambda ns=ns: ran.append(ns))
        if ns % 3:
            clock.cancel(call)
    clock.advance(400)
    assert ran == list(range(0, 400, 3))


def test_on_earlier_tells_of_new_first_deadlines_only() -> None:
    clock = EventClock()
    told: list[int] = []
    clock.on_earlier = told.append
    for ns in (50, 60, 40, 40, 30):
        clock.call_at(ns, lambda: None)
    assert told == [50, 40, 30]


def test_a_followed_clock_cannot_be_advanced_until_it_is_let_go() -> None:
    clock = EventClock()
    clock.follow(lambda: 70)
    assert clock.now == 70
    with pytest.raises(RuntimeError):
        clock.advance(1)
    clock.unfollow()
    clock.advance(5)
    assert clock.now == 75
