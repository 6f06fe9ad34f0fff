"""Grace periods: what is waited for, and what is not."""

from __future__ import annotations

import errno

import pytest

from tests.notifier.world import error_of
from xipvm.actors import on_point, point
from xipvm.errors import InternalError
from xipvm.locks import might_sleep
from xipvm.notifier.srcu import Srcu


def test_a_callback_waits_for_the_sections_that_were_open() -> None:
    srcu, ran = Srcu("mm0"), list[str]()
    early = srcu.read_lock()
    srcu.call(lambda: ran.append("one"))
    late = srcu.read_lock()
    srcu.call(lambda: ran.append("two"))
    srcu.read_unlock(srcu.read_lock())
    assert (ran, srcu.pending) == ([], 2)
    srcu.read_unlock(early)  # the late one came after the first callback
    assert (ran, srcu.pending) == (["one"], 1)
    srcu.read_unlock(late)
    assert (ran, srcu.pending, srcu.read) == (["one", "two"], 0, False)


def test_a_callback_never_runs_at_once() -> None:
    srcu, ran = Srcu("mm0"), list[str]()
    srcu.call(lambda: ran.append("one"))
    assert ran == []
    srcu.synchronize("test")
    assert ran == ["one"]


def test_later_sections_are_not_waited_for() -> None:
    srcu = Srcu("mm0")
    sections: list[int] = []
    with on_point(lambda label: sections.append(srcu.read_lock())):
        point("somebody else's")

    def others(label: str) -> None:
        assert label == "notifier.synchronize"
        sections.append(srcu.read_lock())
        srcu.read_unlock(sections.pop(0))

    with on_point(others):
        srcu.synchronize("test")
    assert len(sections) == 1
    assert srcu.read


def test_ones_own_section_is_a_deadlock() -> None:
    srcu, ran = Srcu("mm0"), list[str]()
    section = srcu.read_lock()
    srcu.call(lambda: ran.append("one"))
    assert error_of(lambda: srcu.synchronize("test")) == errno.EDEADLK
    assert ran == []
    srcu.read_unlock(section)
    assert ran == ["one"]


def test_callbacks_are_atomic() -> None:
    srcu = Srcu("mm0")
    srcu.call(lambda: might_sleep("mutex_lock"))
    with pytest.raises(InternalError, match="called in an SRCU callback"):
        srcu.synchronize("test")
    assert srcu.pending == 0
