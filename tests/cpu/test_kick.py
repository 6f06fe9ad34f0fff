"""Leaving the guest: kicks and budgets take effect at the next block start, and never in the middle of anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.asm import a64, rv64, words
from tests.cpu.conftest import CODE, DATA, DEVICE, EXCEPTION, OK, PAGE, RX, Box
from xipvm.cpu import core


@pytest.fixture
def looping(isa: int, counted: bool, make_box: Callable[..., Box]) -> Box:
    """A loop of one block that writes its count to a device."""
    box = make_box(isa, counted=counted)
    box.page(CODE, box.store_loop(), RX)
    box.set_x(1, DEVICE)
    box.set_x(2, 0)
    box.set_x(3, 1000)
    return box


def test_a_kick_in_a_callback_leaves_a_chained_loop_at_its_next_block(looping: Box) -> None:
    looping.on_write = lambda value: looping.engine.leave(core.KICK_EXIT) if value == 10 else None
    assert looping.engine.run(CODE) == OK
    assert (looping.x(2), looping.pc()) == (10, CODE)
    assert looping.engine.kick == core.KICK_EXIT
    looping.engine.kick = 0
    assert looping.engine.run(looping.pc()) == OK
    assert [value for _, _, value in looping.written] == list(range(1, 1001))


def test_a_revoked_page_is_left_at_the_next_block_and_faults(looping: Box) -> None:
    """Zap, flush, kick: what an invalidation does to a vCPU that runs the very page."""

    def revoke(value: int) -> None:
        if value == 10:
            looping.unmap(CODE)
            looping.engine.leave(core.KICK_FLUSH)

    looping.on_write = revoke
    assert looping.engine.run(CODE) == OK
    assert looping.engine.run(looping.pc()) == EXCEPTION
    assert (looping.engine.fault_address, looping.engine.fault_access) == (CODE, core.FETCH)
    assert looping.x(2) == 10


def test_dropping_the_code_of_a_running_loop_kicks_it(looping: Box) -> None:
    """The bytes change behind a block that jumps to itself: the host writes another loop body."""
    pfn = looping.sptes.get(CODE >> 12) >> 12 & 0xFFFFF

    def rewrite(value: int) -> None:
        if value == 10:
            looping.host.write(pfn, 0, words(looping.answer_insn(77)))

    looping.on_write = rewrite
    assert looping.engine.run(CODE) == OK
    assert (looping.x(2), looping.pc()) == (10, CODE)
    looping.on_write = lambda value: looping.engine.leave(core.KICK_EXIT)
    looping.engine.run(looping.pc())
    assert looping.x(2) == 77


def test_a_kick_before_the_run_is_not_lost(looping: Box) -> None:
    """The engine forgets a stop that comes before its start; the kick word does not."""
    looping.engine.leave(core.KICK_EXIT)
    assert looping.engine.run(CODE) == OK
    assert looping.engine.stopped
    assert looping.written == []
    assert looping.engine.kick == core.KICK_EXIT


def test_a_flush_kick_before_the_run_has_done_its_work(looping: Box) -> None:
    """Entering the guest looks everything up anew, so there is nothing to leave for."""
    looping.engine.leave(core.KICK_FLUSH)
    assert looping.engine.run(CODE) == OK
    assert looping.x(2) == 1000


def test_two_blocks_chained_to_each_other_are_left_as_well(
    isa: int, counted: bool, make_box: Callable[..., Box]
) -> None:
    box = make_box(isa, counted=counted)
    if box.arm:
        code = words(a64.add(2, 2, 1), a64.str(2, 1, 0, 4), a64.b(4), a64.subs(3, 3, 1), a64.cbnz(3, -16), a64.WFI)
    else:
        code = words(
            *(rv64.addi(2, 2, 1), rv64.sw(2, 1, 0), rv64.jal(0, 4)),
            *(rv64.addi(3, 3, -1), rv64.bne(3, 0, -16), rv64.WFI),
        )
    box.page(CODE, code, RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 1000)):
        box.set_x(n, value)
    box.on_write = lambda value: box.engine.leave(core.KICK_EXIT) if value == 10 else None
    box.engine.run(CODE)
    assert (box.x(2), box.pc()) == (10, CODE + 12)


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 399])
def test_a_budget_ends_at_the_first_block_that_begins_with_it_used_up(
    isa: int, make_box: Callable[..., Box], limit: int
) -> None:
    box = make_box(isa)
    box.page(CODE, box.store_loop(), RX)
    box.page(DATA)
    for n, value in ((1, DATA), (2, 0), (3, 1000)):
        box.set_x(n, value)
    box.engine.run(CODE, limit)
    blocks = -(-limit // 4)  # of four instructions
    assert box.engine.stopped
    assert (box.engine.insns, box.x(2), box.pc()) == (4 * blocks, blocks, CODE)


def test_a_budget_can_be_shortened_from_a_callback(isa: int, make_box: Callable[..., Box]) -> None:
    box = make_box(isa)
    box.page(CODE, box.store_loop(), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 1000)):
        box.set_x(n, value)

    def shorten(value: int) -> None:
        if value == 3:
            box.engine.stop_at = 17

    box.on_write = shorten
    box.engine.run(CODE, 4000)
    assert box.engine.insns == 20


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_uncounted_hart_with_a_hooked_csr_still_leaves_at_block_starts(
    make_box: Callable[..., Box], number: int
) -> None:
    """With such a hook the engine takes stops after memory accesses again, so it is polled instead of stopped.

    Code that was translated before, of each page, has to get the poll, too.
    """
    box = make_box(core.RISCV64, counted=False)
    loops = [CODE + n * PAGE for n in range(3)]
    for gva in loops:
        box.page(gva, box.store_loop(), RX)
    csr = CODE + 8 * PAGE
    box.page(csr, words(rv64.csrrs(5, rv64.CYCLE, 0), rv64.jal(0, loops[number] - csr - 4)), RX)

    def on_insn(pc: int, size: int) -> None:
        box.set_x(5, 1234)
        box.set_pc(pc + 4)

    box.engine.on_insn = on_insn
    box.set_x(1, DEVICE)
    for gva in loops:
        box.set_x(2, 0)
        box.set_x(3, 20)
        assert box.engine.run(gva) == OK  # translated without a poll
    box.written.clear()
    box.set_x(2, 0)
    box.set_x(3, 1000)
    box.on_write = lambda value: box.engine.leave(core.KICK_EXIT) if value == 10 else None
    assert box.engine.run(csr) == OK
    assert (box.x(5), box.x(2), box.pc()) == (1234, 10, loops[number])
    box.engine.kick = 0
    assert box.engine.run(box.pc()) == OK
    assert [value for _, _, value in box.written] == list(range(1, 1001))


def test_another_engine_that_writes_kicks_the_one_that_executes(isa: int, make_box: Callable[..., Box]) -> None:
    """Engines take turns; here the second one runs inside a callback of the first."""
    box = make_box(isa, engines=2)
    first, second = box.engines
    pfn = box.page(CODE, box.store_loop(), RX)
    box.page(DATA, pfn=pfn)
    box.page(CODE + PAGE, box.store_word(), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 1000)):
        box.set_x(n, value, first)

    def write(value: int) -> None:
        if value == 10:
            box.set_x(1, DATA, second)
            box.set_x(2, box.answer_insn(55), second)
            assert second.run(CODE + PAGE) == OK

    box.on_write = write
    assert first.run(CODE) == OK
    assert (box.x(2, first), box.pc(first)) == (10, CODE)
    first.run(CODE, first.insns + 1)
    assert box.x(2, first) == 55
