"""Writable xor executable as a state of the frame: whoever changes the bytes, the new code runs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asm import words
from tests.cpu.conftest import CODE, DATA, OK, PAGE, RX, Box
from xipvm.cpu import core

STORE = 0x40000  # where the code is that stores
ALIAS = DATA


def run_answer(box: Box, gva: int = CODE, engine: core.Engine | None = None) -> int:
    """What the code at ``gva`` answers."""
    engine = engine or box.engine
    box.set_x(2, 0, engine)
    code = engine.run(gva)
    while code == OK and engine.stopped:  # left because of a flush
        engine.kick = 0
        code = engine.run(box.pc(engine))
    assert code == OK
    return box.x(2, engine)


def guest_writes(box: Box, gva: int, value: int, engine: core.Engine | None = None) -> None:
    """A guest store of an instruction, followed by what the architecture asks for."""
    engine = engine or box.engine
    box.set_x(1, gva, engine)
    box.set_x(2, value, engine)
    code = engine.run(STORE)
    while code == OK and engine.stopped:
        engine.kick = 0
        code = engine.run(box.pc(engine))
    assert code == OK


@pytest.fixture
def code(pair: Box) -> int:
    """A frame of code, seen at CODE and ALIAS by both engines; its pfn."""
    pfn = pair.page(CODE, pair.answer(1))
    pair.page(ALIAS, pfn=pfn)
    pair.page(STORE, pair.store_word(), RX)
    return pfn


def test_a_write_through_a_second_address(pair: Box, code: int) -> None:
    assert run_answer(pair) == 1
    for value in (2, 3, 4):
        guest_writes(pair, ALIAS, pair.answer_insn(value))
        assert run_answer(pair) == value


def test_a_write_through_an_address_that_was_writable_before(pair: Box, code: int) -> None:
    guest_writes(pair, ALIAS + 0x800, 0)
    assert run_answer(pair) == 1
    guest_writes(pair, ALIAS, pair.answer_insn(2))
    assert run_answer(pair) == 2


def test_a_write_by_another_engine(pair: Box, code: int) -> None:
    first, second = pair.engines
    assert [run_answer(pair, CODE, engine) for engine in pair.engines] == [1, 1]
    guest_writes(pair, CODE, pair.answer_insn(2), second)
    assert [run_answer(pair, CODE, engine) for engine in pair.engines] == [2, 2]
    guest_writes(pair, ALIAS, pair.answer_insn(3), first)
    assert [run_answer(pair, gva, e) for gva in (CODE, ALIAS) for e in pair.engines] == [3, 3, 3, 3]


def test_a_write_to_the_page_that_holds_the_storing_code(box: Box) -> None:
    """Code and the code that it changes share a page: it is writable and executable by turns."""
    target = 0x100
    box.page(CODE, box.store_word())
    box.host.write(box.sptes.get(CODE >> 12) >> 12 & 0xFFFFF, target, box.answer(1))
    assert run_answer(box, CODE + target) == 1
    for value in (2, 3):
        box.set_x(1, CODE + target)
        box.set_x(2, box.answer_insn(value))
        code = box.engine.run(CODE)
        while box.engine.stopped:
            box.engine.kick = 0
            code = box.engine.run(box.pc())
        assert code == OK
        assert run_answer(box, CODE + target) == value


def test_a_page_that_goes_back_and_forth_all_the_time(pair: Box, code: int) -> None:
    """After some turns it is both for one engine, and right whoever writes, at which address, and whoever runs it."""
    dice = random.Random(7)
    for value in range(2, 400):
        writer = dice.choice([*pair.engines, None])
        if writer is None:
            pair.host.write(code, 0, words(pair.answer_insn(value)))
        else:
            guest_writes(pair, dice.choice([CODE, ALIAS]), pair.answer_insn(value), writer)
        for engine in dice.sample(pair.engines, dice.randint(1, 2)):
            assert run_answer(pair, dice.choice([CODE, ALIAS]), engine) == value


def test_going_back_and_forth_ends_in_no_more_flushes(box: Box) -> None:
    pfn = box.page(CODE, box.answer(1))
    box.page(ALIAS, pfn=pfn)
    box.page(STORE, box.store_word(), RX)
    flushes = []
    for value in range(1, 200):
        guest_writes(box, ALIAS, box.answer_insn(value))
        assert run_answer(box) == value
        flushes.append(box.engine.flushes)
    assert flushes[20] > flushes[10]
    assert flushes[-1] == flushes[-50]


@pytest.mark.parametrize("how", ["write", "view", "copy"])
def test_a_write_by_the_host(pair: Box, code: int, how: str) -> None:
    """DMA, a debugger, a loader."""
    assert [run_answer(pair, CODE, engine) for engine in pair.engines] == [1, 1]
    new = words(pair.answer_insn(2))
    if how == "write":
        pair.host.write(code, 0, new)
    elif how == "view":
        pair.host.touch(code)
        with pair.host.view(code) as view:
            view[:4] = new
    else:
        other = pair.host.alloc()
        pair.host.write(other, 0, pair.answer(2))
        pair.host.copy(other, code)
    assert [run_answer(pair, CODE, engine) for engine in pair.engines] == [2, 2]


def test_a_frame_that_is_freed_and_comes_back_as_other_code(pair: Box, code: int) -> None:
    assert run_answer(pair) == 1
    pair.unmap(CODE)
    pair.unmap(ALIAS)
    assert pair.host.put(code)
    assert pair.host.alloc() == code
    pair.host.write(code, 0, pair.answer(2))
    pair.page(CODE, pfn=code)
    assert run_answer(pair) == 2


def test_a_page_that_moves_to_another_frame(pair: Box, code: int) -> None:
    """Copy on write, migration: a flush is enough, code is found by its frame."""
    assert run_answer(pair) == 1
    new = pair.page(CODE, pair.answer(2))
    for engine in pair.engines:
        engine.flush_tlb("moved")
    assert run_answer(pair) == 2
    assert run_answer(pair, ALIAS) == 1
    pair.page(CODE, pfn=code)
    for engine in pair.engines:
        engine.flush_tlb("moved back")
    assert run_answer(pair) == 1
    assert new != code


def test_dropping_a_range_forgets_each_of_its_frames(isa: int, make_box: Callable[..., Box]) -> None:
    """Flash programming: bytes changed behind the frames' backs, on every engine."""
    box = make_box(isa, engines=2)
    frames = [box.page(CODE + PAGE * n, box.answer(n + 1)) for n in range(5)]
    assert frames == list(range(frames[0], frames[0] + 5))
    for engine in box.engines:
        assert [run_answer(box, CODE + PAGE * n, engine) for n in range(5)] == [1, 2, 3, 4, 5]
    assert box.group.executed(frames[0], 5) == 5
    for n, pfn in enumerate(frames):
        with box.host.view(pfn) as view:  # without telling anybody
            view[:4] = words(box.answer_insn(11 + n))
    dropped: list[int] = []
    box.engine.on_drop = dropped.append
    box.group.drop_code(frames[1], 3)
    assert dropped == frames[1:4]
    assert box.group.executed(frames[0], 5) == 2
    for engine in box.engines:
        assert [run_answer(box, CODE + PAGE * n, engine) for n in range(5)] == [1, 12, 13, 14, 5]


def test_frames_that_were_never_executed_cost_nothing(pair: Box, code: int) -> None:
    """No drop, no flush, no kick for them: most frames are data."""
    data = pair.page(DATA + PAGE)
    flushes = [engine.flushes for engine in pair.engines]
    dropped: list[int] = []
    pair.engine.on_drop = dropped.append
    pair.host.write(data, 0, b"data")
    guest_writes(pair, DATA + PAGE, 5)
    assert dropped == []
    assert [engine.flushes for engine in pair.engines] == flushes
    assert pair.group.executed(data, 1) == 0


def test_a_frame_is_paid_for_once(pair: Box, code: int) -> None:
    """After the first write the frame is data like any other, at every address and for every engine."""
    dropped: list[int] = []
    for engine in pair.engines:
        run_answer(pair, CODE, engine)
        engine.on_drop = dropped.append
    guest_writes(pair, CODE, 0)
    assert dropped == [code, code]
    for engine in pair.engines:
        guest_writes(pair, ALIAS, 0, engine)  # the storing code is entered
    flushes = [engine.flushes for engine in pair.engines]
    for engine in pair.engines:
        guest_writes(pair, CODE, 0, engine)
        guest_writes(pair, ALIAS, 0, engine)
    pair.host.write(code, 0, b"data")
    assert dropped == [code, code]
    assert [engine.flushes for engine in pair.engines] == flushes


class Observer:
    """What TLBs may hold, from what is recorded; checks the rule at every hand-out."""

    def __init__(self, box: Box) -> None:
        self.writers: dict[int, set[tuple[int, int]]] = {}  # pfn -> {(engine, its flushes when it got W)}
        self.executors: set[tuple[int, int]] = set()  # (engine, pfn)
        self.box = box
        for number, engine in enumerate(box.engines):
            engine.record_inserts(True)
            engine.on_insert = lambda gfn, pfn, perms, n=number: self.insert(n, pfn, perms)
            engine.on_drop = lambda pfn, n=number: self.executors.discard((n, pfn))

    def insert(self, engine: int, pfn: int, perms: int) -> None:
        assert perms in (1, 3, 5), "writable and executable in one entry"
        if perms == 3:
            assert pfn not in {frame for _, frame in self.executors}, "writable while code of the frame exists"
            self.writers.setdefault(pfn, set()).add((engine, self.box.engines[engine].flushes))
        elif perms == 5:
            held = [n for n, at in self.writers.pop(pfn, ()) if self.box.engines[n].flushes == at]
            assert held == [], "executable while a writable entry may be held"
            self.executors.add((engine, pfn))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["run", "guest", "host", "load"]),
        st.integers(0, 1),  # engine
        st.integers(0, 1),  # frame
        st.sampled_from([0, PAGE]),  # which of the frame's two addresses
        st.integers(1, 2000),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, kind=st.sampled_from([core.ARM64, core.RISCV64]))
def test_whatever_is_done_in_whatever_order(operations: list[tuple[str, int, int, int, int]], kind: int) -> None:
    """The code that runs is the code that was written last, and no frame is ever writable and executable."""
    box = Box(kind, engines=2)
    try:
        box.page(STORE, box.store_word(), RX)
        box.page(STORE + PAGE, box.load(), RX)
        places = [CODE, CODE + 2 * PAGE]
        frames = []
        for gva in places:
            frames.append(box.page(gva, box.answer(7)))
            box.page(gva + PAGE, pfn=frames[-1])
        Observer(box)
        expected = [7, 7]
        for what, number, which, offset, value in operations:
            engine, gva = box.engines[number], places[which] + offset
            if what == "run":
                assert run_answer(box, gva, engine) == expected[which]
            elif what == "load":
                box.set_x(1, gva, engine)
                assert run_answer(box, STORE + PAGE, engine) & 0xFFFFFFFF == box.answer_insn(expected[which])
            else:
                expected[which] = value
                if what == "guest":
                    guest_writes(box, gva, box.answer_insn(value), engine)
                else:
                    box.host.write(frames[which], 0, words(box.answer_insn(value)))
    finally:
        box.close()
