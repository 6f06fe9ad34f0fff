"""A TLB without a table behind it: what the handler of a miss drops in is good for that miss."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.conftest import CODE, DATA, EXCEPTION, OK, RW, RX, Box
from xipvm.cpu import core
from xipvm.mmu.tables import PageTable


class Dropin:
    """A box whose engine keeps no entries; ``pages`` says what a miss finds, ``misses`` what was asked for."""

    def __init__(self, box: Box) -> None:
        self.box = box
        box.engine.release()
        box.engines.clear()
        engine = core.take_engine(box.isa, True)
        engine.bind(box.group, box.sptes, keep=False)
        box.engines.append(engine)
        self.pages: dict[int, tuple[int, int]] = {}
        self.misses: list[tuple[int, int]] = []
        engine.on_miss = self._miss

    def _miss(self, gpa: int, access: int) -> int:
        self.misses.append((gpa, access))
        if gpa not in self.pages:
            return core.FAULT
        pfn, rights = self.pages[gpa]
        self.box.page(gpa, rights=rights, pfn=pfn)
        return core.RETRY_WALK

    def page(self, gpa: int, data: bytes, rights: int) -> int:
        pfn = self.box.host.alloc()
        self.box.host.write(pfn, 0, data)
        self.pages[gpa] = pfn, rights
        return pfn


@pytest.fixture
def dropin(box: Box) -> Dropin:
    """Code at CODE that loads x2 from DATA."""
    found = Dropin(box)
    found.page(CODE, box.load(), RX)
    found.page(DATA, b"\x07", RW)
    box.set_x(1, DATA)
    return found


def test_every_miss_is_asked_for(dropin: Dropin) -> None:
    box = dropin.box
    assert box.engine.run(CODE) == OK
    assert box.x(2) == 7
    asked = [(CODE, core.FETCH), (DATA, core.READ)]
    assert dropin.misses == asked
    assert box.sptes.present == 0
    assert box.engine.run(CODE) == OK
    assert dropin.misses == asked, "the TLB holds them"
    box.engine.flush_tlb("test")
    assert box.engine.run(CODE) == OK
    assert dropin.misses == asked * 2


def test_a_flush_discards_what_was_dropped_in(dropin: Dropin) -> None:
    """An invalidation between the answer and the walk that would use it."""
    box, engine = dropin.box, dropin.box.engine
    answer = engine.on_miss
    assert answer is not None
    fresh = box.host.alloc()
    box.host.write(fresh, 0, b"\x09")

    def miss(gpa: int, access: int) -> int:
        result = answer(gpa, access)
        if gpa == DATA and len(dropin.misses) == 2:
            box.sptes.set(DATA >> 12, 0)
            dropin.pages[DATA] = fresh, RW
            engine.flush_tlb("invalidated")
        return result

    engine.on_miss = miss
    assert engine.run(CODE) == OK
    assert box.x(2) == 9
    assert dropin.misses[1:] == [(DATA, core.READ)] * 2


def test_the_code_that_runs_is_found_without_an_entry(dropin: Dropin) -> None:
    """Counting by length, the page's scan and reports read it."""
    box = dropin.box
    assert box.engine.run(CODE) == OK
    code = box.load()
    assert box.engine.read_code(CODE, len(code)) == code
    assert box.engine.insns == len(code) // 4
    box.host.put(dropin.pages[CODE][0])
    assert box.engine.read_code(CODE, 4) == b""


def test_rights_that_were_not_dropped_in_are_asked_for(dropin: Dropin) -> None:
    box = dropin.box
    pfn = dropin.page(DATA, b"\x01", RX)
    dropin.page(CODE, box.store_word(), RX)
    box.engine.flush_tlb("test")

    def miss(gpa: int, access: int) -> int:
        if access == core.WRITE:
            dropin.pages[gpa] = pfn, RW
        return dropin._miss(gpa, access)

    box.engine.on_miss = miss
    box.set_x(2, 0x55)
    assert box.engine.run(CODE) == OK
    assert box.host.read(pfn, 0, 1) == b"\x55"
    assert dropin.misses[-1] == (DATA, core.WRITE)


def test_a_fault_leaves_nothing_behind(dropin: Dropin) -> None:
    box = dropin.box
    del dropin.pages[DATA]
    assert box.engine.run(CODE) == EXCEPTION
    assert box.sptes.present == 0


def test_two_engines_have_a_table_each(isa: int, make_box: Callable[..., Box]) -> None:
    box = make_box(isa)
    dropin = Dropin(box)
    dropin.page(CODE, box.load(), RX)
    dropin.page(DATA, b"\x05", RW)
    box.set_x(1, DATA)
    other, table = core.take_engine(isa, True), PageTable(3)
    other.bind(box.group, table, keep=False)

    def miss(gpa: int, access: int) -> int:
        pfn, rights = dropin.pages[gpa]
        table.set(gpa >> 12, pfn << 12 | 1 << 11 | rights)
        return core.RETRY_WALK

    other.on_miss = miss
    box.set_x(1, DATA, other)
    assert box.engine.run(CODE) == other.run(CODE) == OK
    assert box.x(2) == box.x(2, other) == 5
