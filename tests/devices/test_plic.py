"""The PLIC through its registers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.devices import plic as p
from xipvm.devices.plic import Plic


class Machine:
    def __init__(self, contexts: int = 2) -> None:
        self.levels = [False] * contexts
        self.plic = Plic(96, [lambda level, i=i: self.levels.__setitem__(i, level) for i in range(contexts)])

    def set_up(self, context: int, source: int, priority: int) -> None:
        self.plic.write(p.PRIORITY + 4 * source, 4, priority)
        at = p.ENABLE + p.ENABLE_STRIDE * context + source // 32 * 4
        self.plic.write(at, 4, self.plic.read(at, 4) | 1 << source % 32)

    def claim(self, context: int = 0) -> int:
        return self.plic.read(p.CONTEXT + p.CONTEXT_STRIDE * context + p.CONTEXT_CLAIM, 4)

    def complete(self, source: int, context: int = 0) -> None:
        self.plic.write(p.CONTEXT + p.CONTEXT_STRIDE * context + p.CONTEXT_CLAIM, 4, source)

    def threshold(self, value: int, context: int = 0) -> None:
        self.plic.write(p.CONTEXT + p.CONTEXT_STRIDE * context + p.CONTEXT_THRESHOLD, 4, value)


def test_a_claimed_level_source_comes_again_after_completion_only() -> None:
    machine = Machine()
    machine.set_up(0, 40, 3)
    line = machine.plic.source(40)
    line(True)
    assert machine.levels == [True, False]
    assert machine.plic.read(p.PENDING + 4, 4) == 1 << 8
    assert machine.claim() == 40
    assert machine.levels == [False, False]
    line(False)
    line(True)
    assert machine.claim() == 0
    machine.complete(40)
    assert machine.levels[0]
    assert machine.claim() == 40
    line(False)
    machine.complete(40)
    assert machine.claim() == 0


def test_a_request_that_was_handed_on_is_not_withdrawn() -> None:
    machine = Machine()
    machine.set_up(0, 1, 1)
    line = machine.plic.source(1)
    line(True)
    line(False)
    assert machine.claim() == 1
    machine.complete(1)
    assert not machine.levels[0]


def test_priority_then_number_and_the_threshold_masks_the_line_only() -> None:
    machine = Machine()
    for source, priority in ((5, 2), (7, 3), (6, 3), (8, 0)):
        machine.set_up(0, source, priority)
        machine.plic.source(source)(True)
    machine.threshold(3)
    assert not machine.levels[0]
    assert machine.plic.read(p.CONTEXT, 4) == 3
    assert [machine.claim() for _ in range(4)] == [6, 7, 5, 0]
    machine.threshold(0)
    machine.complete(5)
    assert machine.levels[0]


def test_contexts_enable_on_their_own_and_one_gets_it() -> None:
    machine = Machine(4)
    machine.set_up(1, 10, 1)
    machine.set_up(3, 10, 1)
    machine.plic.source(10)(True)
    assert machine.levels == [False, True, False, True]
    assert machine.claim(3) == 10
    assert machine.claim(1) == 0
    machine.complete(10, context=0)
    assert not any(machine.levels), "completion by a context that has it disabled is ignored"
    machine.complete(10, context=1)
    assert machine.levels == [False, True, False, True]


def test_reserved_places_stay_zero() -> None:
    machine = Machine()
    machine.plic.write(p.PRIORITY, 4, 7)
    machine.plic.write(p.PRIORITY + 4 * 97, 4, 7)
    machine.plic.write(p.PENDING, 4, 0xFFFF_FFFF)
    machine.plic.write(p.ENABLE, 4, 0xFFFF_FFFF)
    machine.plic.write(p.ENABLE + 12, 4, 0xFFFF_FFFF)
    assert machine.plic.read(p.PRIORITY, 4) == 0
    assert machine.plic.read(p.PRIORITY + 4 * 97, 4) == 0
    assert machine.plic.read(p.PENDING, 4) == 0
    assert machine.plic.read(p.ENABLE, 4) == 0xFFFF_FFFE
    assert machine.plic.read(p.ENABLE + 12, 4) == 1
    assert machine.claim(9) == 0
    machine.complete(97)
    machine.threshold(1, context=9)
    for number in (0, 97):
        with pytest.raises(ValueError, match="sources 1 to 96"):
            machine.plic.source(number)


def test_reset() -> None:
    machine = Machine()
    machine.set_up(0, 1, 1)
    machine.plic.source(1)(True)
    machine.plic.reset()
    assert machine.levels == [False, False]
    machine.set_up(0, 1, 1)
    assert machine.claim() == 0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("udc"), st.integers(1, 4)), max_size=40))
def test_no_request_is_lost_and_none_is_invented(steps: list[tuple[str, int]]) -> None:
    machine = Machine(1)
    for source in range(1, 5):
        machine.set_up(0, source, 1)
    lines = [machine.plic.source(source) for source in range(1, 5)]
    high, asked, served = set[int](), set[int](), set[int]()
    for step, source in steps:
        if step == "u":
            if source not in high and source not in served:
                asked.add(source)
            high.add(source)
            lines[source - 1](True)
        elif step == "d":
            high.discard(source)
            lines[source - 1](False)
        elif source in served:
            served.discard(source)
            machine.complete(source)
            if source in high:
                asked.add(source)
        else:
            got = machine.claim()
            assert got == min(asked, default=0)
            asked.discard(got)
            if got:
                served.add(got)
        assert machine.levels == [bool(asked)]
