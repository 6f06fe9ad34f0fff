"""An interrupt that waits is taken at the first block that does not mask it, wherever slices and signals fall."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.asm import a64, rv64, words
from tests.cpu.conftest import CODE, OK, PAGE, RX, Box
from xipvm.cpu import core

U, S, M = 0, 1, 3
MTI, STI = 1 << 7, 1 << 5
SIE, MIE, MPP_S = 1 << 1, 1 << 3, 1 << 11
MSTATUS, MIE_CSR, SSTATUS, SIE_CSR = 0x300, 0x304, 0x100, 0x104
LOOP = CODE + PAGE
BUDGET = 1000


@pytest.fixture
def hart(counted: bool, make_box: Callable[..., Box]) -> Box:
    """A hart with a loop of two instructions at LOOP, and nothing enabled."""
    box = make_box(core.RISCV64, counted=counted)
    box.page(LOOP, words(rv64.addi(5, 5, 1), rv64.jal(0, -4)), RX)
    box.engine.set_reg(core.RISCV_MSTATUS, 0)
    box.engine.set_reg(core.RISCV_MEPC, LOOP)
    return box


def leaves_at(box: Box, pending: int, pc: int = CODE, *, tick: float = 10.0) -> int | None:
    """Where a watched run is left for the interrupt; None when it is not, but for its budget or the tick."""
    box.engine.watch(pending)
    with core.SignalGuard(tick):
        assert box.engine.run(pc, box.engine.ticks + BUDGET if box.engine.counted else None) == OK
    core.take_signals()
    watched = box.engine.kick == core.KICK_WATCH and (not box.engine.counted or box.engine.ticks < BUDGET)
    box.engine.kick = 0
    return box.pc() if watched else None


def stays(box: Box, pending: int) -> bool:
    """Whether a watched run of the loop goes on."""
    return leaves_at(box, pending, LOOP, tick=0.005) is None


def enter(box: Box, privilege: int, mie: int = 0, mideleg: int = 0, status: int = 0) -> None:
    engine = box.engine
    engine.set_reg(core.RISCV_MIE, mie)
    engine.set_reg(core.RISCV_MIDELEG, mideleg)
    engine.set_reg(core.RISCV_MSTATUS, status)
    engine.set_reg(core.RISCV_PRIV, privilege)


@pytest.mark.parametrize("lower", [U, S])
def test_a_return_to_a_lower_privilege_unmasks_what_is_the_machine_s(hart: Box, lower: int) -> None:
    """Whatever mstatus.MIE says: it counts in M mode only."""
    hart.page(CODE, words(rv64.NOP, rv64.MRET), RX)
    enter(hart, M, mie=MTI, status=MPP_S if lower == S else 0)
    assert leaves_at(hart, MTI) == LOOP
    assert hart.x(5) == 0


def test_a_return_from_s_mode_unmasks_what_is_delegated(hart: Box) -> None:
    hart.page(CODE, words(rv64.NOP, rv64.SRET), RX)
    hart.engine.set_reg(core.RISCV_SEPC, LOOP)
    enter(hart, S, mie=STI, mideleg=STI)
    assert leaves_at(hart, STI) == LOOP


@pytest.mark.parametrize(
    ("privilege", "csr", "bit"), [(M, MSTATUS, MIE), (S, SSTATUS, SIE)], ids=["mstatus.MIE", "sstatus.SIE"]
)
def test_setting_the_enable_bit_unmasks(hart: Box, privilege: int, csr: int, bit: int) -> None:
    """A CSR instruction ends its block, so the next instruction does not run any more."""
    hart.page(CODE, words(rv64.addi(6, 0, bit), rv64.csrrs(0, csr, 6), rv64.addi(7, 0, 1), rv64.jal(0, 0)), RX)
    enter(hart, privilege, mie=MTI | STI, mideleg=STI)
    hart.set_x(7, 0)
    assert leaves_at(hart, MTI if privilege == M else STI) == CODE + 8
    assert hart.x(7) == 0


@pytest.mark.parametrize(
    ("privilege", "csr", "status", "mideleg"),
    [(M, MIE_CSR, MIE, 0), (S, SIE_CSR, SIE, STI)],
    ids=["mie", "sie"],
)
def test_enabling_the_interrupt_itself_unmasks(hart: Box, privilege: int, csr: int, status: int, mideleg: int) -> None:
    hart.page(CODE, words(rv64.addi(6, 0, STI), rv64.csrrs(0, csr, 6), rv64.jal(0, 0)), RX)
    enter(hart, privilege, mideleg=mideleg, status=status)
    assert leaves_at(hart, STI) == CODE + 8


@pytest.mark.parametrize(
    ("privilege", "mie", "mideleg", "status"),
    [
        pytest.param(M, STI, 0, 0, id="masked in M"),
        pytest.param(M, 0, 0, MIE, id="not enabled in M"),
        pytest.param(M, STI, STI, MIE, id="delegated, in M"),
        pytest.param(S, STI, STI, 0, id="masked in S"),
        pytest.param(S, 0, STI, SIE, id="not enabled in S"),
        pytest.param(U, 0, 0, MIE | SIE, id="not enabled in U"),
    ],
)
def test_what_stays_masked_does_not_leave(hart: Box, privilege: int, mie: int, mideleg: int, status: int) -> None:
    enter(hart, privilege, mie, mideleg, status)
    assert stays(hart, STI)


def test_the_block_that_a_run_begins_with_is_run(hart: Box) -> None:
    """Otherwise a vCPU whose caller does not take the interrupt would stand still."""
    enter(hart, M, mie=MTI, status=MIE)
    assert leaves_at(hart, MTI, LOOP) == LOOP
    assert hart.x(5) == 1


@pytest.fixture
def arm(counted: bool, make_box: Callable[..., Box]) -> Box:
    """An AArch64 vCPU with interrupts masked, and a loop at LOOP."""
    box = make_box(core.ARM64, counted=counted)
    box.page(LOOP, words(a64.add(5, 5, 1), a64.b(-4)), RX)
    return box


def test_clearing_the_mask_unmasks(arm: Box) -> None:
    """msr daifclr, #2 ends its block."""
    arm.page(CODE, words(a64.NOP, 0xD50342FF, a64.b(PAGE - 8)), RX)
    assert leaves_at(arm, 1) == CODE + 8
    assert stays(arm, 0)


def test_eret_unmasks(arm: Box) -> None:
    arm.page(CODE, words(a64.NOP, a64.ERET), RX)
    arm.engine.set_cp_reg(*a64.ELR_EL1, LOOP)
    arm.engine.set_cp_reg(*a64.SPSR_EL1, 0x345)
    assert leaves_at(arm, 1) == LOOP


def test_masked_interrupts_of_arm64_do_not_leave(arm: Box) -> None:
    assert stays(arm, 1)


def test_a_watch_ends(arm: Box) -> None:
    arm.engine.set_reg(core.ARM64_PSTATE, 0x345)
    arm.engine.watch(1)
    assert arm.engine.kick == core.KICK_WATCH
    arm.engine.watch(0)
    assert arm.engine.kick == 0


def test_a_kick_ends_a_watched_run_as_well(arm: Box) -> None:
    arm.engine.watch(1)
    arm.engine.leave(core.KICK_EXIT)
    assert arm.engine.run(LOOP) == OK
    assert arm.x(5) == 0
    assert arm.engine.kick == core.KICK_WATCH | core.KICK_EXIT
