"""Code whose page goes away while a block of it is being translated, or runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.asm import join, rv64
from tests.cpu.conftest import CODE, DATA, EXCEPTION, OK, PAGE, Box
from xipvm.cpu import core

C_NOP = 0x0001


def run_to_wfi(box: Box, pc: int) -> None:
    """Run, and go on where a flush had the engine leave."""
    for _ in range(10):
        assert box.engine.run(pc) == OK
        if not box.engine.stopped and not box.engine.kick:
            return
        box.engine.kick, pc = 0, box.pc()
    pytest.fail("it never came to an end")


def test_a_block_does_not_run_when_its_first_page_goes_while_the_second_is_fetched(
    make_box: Callable[..., Box], counted: bool
) -> None:
    box = make_box(core.RISCV64, counted=counted)
    start = CODE + PAGE - 6
    second = join(rv64.addi(2, 2, 32))

    def first_page(step: int) -> bytes:
        """x2 += step in two bytes and, with half of it on the next page, x2 += 32."""
        return bytes(PAGE - 6) + join(rv64.addi(2, 2, step)) + second[:2]

    old = box.page(CODE, first_page(1))

    def miss(gva: int, access: int) -> int:
        assert (gva, access) == (CODE + PAGE, core.FETCH)
        box.unmap(CODE)
        box.host.put(old)
        box.page(CODE + PAGE, second[2:] + join(rv64.WFI))  # in the frame that has just become free
        box.page(CODE, first_page(2))
        return core.RETRY_WALK

    box.engine.on_miss = miss
    run_to_wfi(box, start)
    assert box.x(2) == 2 + 32, "the new page ran, and not what was translated from the old one"
    if counted:
        assert box.engine.insns == 3


def test_instructions_are_counted_after_the_page_of_the_block_has_gone(make_box: Callable[..., Box]) -> None:
    box = make_box(core.RISCV64)
    frame = box.page(CODE, join(C_NOP, C_NOP, rv64.ld(2, 1, 0), C_NOP, C_NOP, C_NOP, rv64.WFI))
    box.set_x(1, DATA)

    def miss(gva: int, access: int) -> int:
        box.unmap(CODE)
        box.host.put(frame)  # poisoned
        return core.FAULT

    box.engine.on_miss = miss
    assert box.engine.run(CODE) == EXCEPTION
    box.engine.uncount(CODE + 4)
    assert box.engine.insns == 2
