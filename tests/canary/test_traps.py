"""Exceptions never enter the guest; the engine reports them by number, with a PC that depends on the kind."""

from __future__ import annotations

from typing import Any

import pytest
from unicorn import arm64_const as arm
from unicorn import riscv_const as riscv
from unicorn import unicorn_const as uc

from tests.asm import a64, join, rv64, words
from tests.canary.conftest import CODE, Raw

VBAR = (12, 0, 3, 0, 0)  # CRn, CRm, op0, op1, op2: the order of the engine's structure
ESR = (5, 2, 3, 0, 0)


@pytest.mark.parametrize(
    ("insn", "number", "pc"),
    [
        pytest.param(a64.svc(5), 2, CODE + 4, id="svc"),
        pytest.param(a64.brk(5), 7, CODE, id="brk"),
        pytest.param(a64.hvc(5), 1, CODE, id="hvc is undefined without EL2"),
        pytest.param(0xD4000003, 13, CODE + 4, id="smc"),
        pytest.param(a64.UDF, 1, CODE, id="udf"),
        pytest.param(a64.HLT_SEMIHOST, 1, CODE, id="hlt is undefined"),
    ],
)
def test_arm64_exceptions(arm64: Raw, insn: int, number: int, pc: int) -> None:
    """Arm64.exception: the number, and whether the PC is on the instruction or behind it."""
    arm64.code(words(insn, a64.WFI))
    assert arm64.run() == uc.UC_ERR_OK
    assert (arm64.interrupts, arm64.pc) == ([number], pc)


@pytest.mark.parametrize("privilege", [0, 1, 3])
def test_ecall_is_8_in_every_mode_with_the_pc_behind(riscv64: Raw, privilege: int) -> None:
    """Riscv64.exception adds the privilege to the cause and takes 4 off the PC."""
    riscv64.code(words(rv64.ECALL, rv64.WFI))
    riscv64.uc.reg_write(riscv.UC_RISCV_REG_PRIV, privilege)
    assert riscv64.run() == uc.UC_ERR_OK
    assert (riscv64.interrupts, riscv64.pc) == ([8], CODE + 4)


@pytest.mark.parametrize("insn", [rv64.EBREAK, rv64.C_EBREAK], ids=["ebreak", "c.ebreak"])
def test_ebreak_is_an_invalid_instruction(riscv64: Raw, insn: int) -> None:
    """Not an interrupt: Riscv64.illegal looks whether it was one."""
    invalid = []

    def hook(_engine: Any, _user: object) -> bool:
        invalid.append(riscv64.pc)
        return False

    riscv64.uc.hook_add(uc.UC_HOOK_INSN_INVALID, hook)
    riscv64.code(join(insn, rv64.WFI))
    assert riscv64.run() == uc.UC_ERR_INSN_INVALID
    assert riscv64.interrupts == []
    assert riscv64.pc == CODE


@pytest.mark.parametrize(
    "insn", [pytest.param(rv64.csrrs(5, rv64.TIME, 0), id="rdtime"), pytest.param(0xFFFFFFFF, id="no instruction")]
)
def test_an_illegal_instruction_is_2_with_4_added_to_the_pc(riscv64: Raw, insn: int) -> None:
    """rdtime is among them, so the time can be answered from the exit."""
    riscv64.code(words(insn, rv64.WFI))
    assert riscv64.run() == uc.UC_ERR_OK
    assert (riscv64.interrupts, riscv64.pc) == ([2], CODE + 4)


def test_an_illegal_compressed_instruction_has_4_added_to_the_pc_as_well(riscv64: Raw) -> None:
    """Riscv64.exception takes 4 off whatever the length was."""
    riscv64.code(join(rv64.C_NOP) + bytes(2) + words(rv64.WFI))
    assert riscv64.run() == uc.UC_ERR_OK
    assert (riscv64.interrupts, riscv64.pc) == ([2], CODE + 2 + 4)


def test_nothing_is_written_to_the_trap_registers(riscv64: Raw) -> None:
    """Trap entry is ours alone."""
    riscv64.code(words(rv64.ECALL, rv64.WFI))
    for register in (riscv.UC_RISCV_REG_MEPC, riscv.UC_RISCV_REG_MCAUSE):
        riscv64.uc.reg_write(register, 0x44)
    riscv64.run()
    assert [riscv64.uc.reg_read(r) for r in (riscv.UC_RISCV_REG_MEPC, riscv.UC_RISCV_REG_MCAUSE)] == [0x44, 0x44]


def test_csr_access_from_outside_obeys_the_current_privilege_silently(riscv64: Raw) -> None:
    """Riscv64 raises the privilege to M around every CSR access."""
    engine = riscv64.uc
    engine.reg_write(riscv.UC_RISCV_REG_MEPC, 0x1000)
    engine.reg_write(riscv.UC_RISCV_REG_PRIV, 0)
    engine.reg_write(riscv.UC_RISCV_REG_MEPC, 0x2000)
    assert engine.reg_read(riscv.UC_RISCV_REG_MEPC) != 0x2000
    engine.reg_write(riscv.UC_RISCV_REG_PRIV, 3)
    assert engine.reg_read(riscv.UC_RISCV_REG_MEPC) == 0x1000


def enter_el0(raw: Raw) -> None:
    """EL0 with the engine's derived flags right: PSTATE, then any system register by its encoding."""
    raw.uc.reg_write(arm.UC_ARM64_REG_PSTATE, 0x3C0)
    raw.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (*ESR, 0))


def test_pstate_alone_leaves_the_guest_in_el0(arm64: Raw) -> None:
    """Arm64._switch ends with a write by encoding: before it, the handler would run with EL0's rights."""
    arm64.code(words(a64.mrs(0, a64.VBAR_EL1), a64.WFI))
    enter_el0(arm64)
    arm64.run()
    assert arm64.interrupts == [1]  # EL0 may not read it

    arm64.interrupts.clear()
    arm64.uc.reg_write(arm.UC_ARM64_REG_PSTATE, 0x3C5)
    arm64.run()
    assert arm64.interrupts == [1]  # still

    arm64.interrupts.clear()
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (*ESR, 0))
    arm64.run()
    assert arm64.interrupts == []
    assert arm64.pc == CODE + 8


def test_pstate_does_not_switch_the_stack_pointer(arm64: Raw) -> None:
    """Arm64._switch saves SP in SP_EL0 and loads SP_EL1 itself."""
    arm64.code(words(a64.WFI))
    enter_el0(arm64)
    arm64.uc.reg_write(arm.UC_ARM64_REG_SP, 0x1110)
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (4, 1, 3, 4, 0, 0x2220))  # SP_EL1
    arm64.uc.reg_write(arm.UC_ARM64_REG_PSTATE, 0x3C5)
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (*ESR, 0))
    arm64.run()
    assert arm64.uc.reg_read(arm.UC_ARM64_REG_SP) == 0x1110


def runs_until_it_differs(raw: Raw, register: int) -> bool:
    """Runs the same code again and again; whether the register ever showed another value."""
    raw.run()
    first = raw[register]
    for _ in range(200_000):
        raw.run()
        if raw[register] != first:
            return True
    return False


def test_the_counter_of_arm64_is_the_host_s(arm64: Raw) -> None:
    """The same instructions show another time: Arm64 answers the timer's registers itself."""
    arm64.code(words(a64.mrs(2, a64.CNTVCT_EL0), a64.WFI))
    assert runs_until_it_differs(arm64, 2)


@pytest.mark.parametrize("counter", [rv64.CYCLE, rv64.INSTRET, rv64.MCYCLE, rv64.MINSTRET])
def test_the_counters_of_riscv_are_the_host_s(riscv64: Raw, counter: int) -> None:
    """The walker hooks every instruction that names one."""
    riscv64.code(words(rv64.csrrs(2, counter, 0), rv64.WFI))
    assert runs_until_it_differs(riscv64, 2)


def test_a_hook_on_mrs_answers_in_its_place_with_a_precise_pc(arm64: Raw) -> None:
    """Arm64._sysreg computes the time from the PC, and its answer stands."""
    seen = []

    def mrs(_engine: Any, register: int, cp: Any, _user: object) -> int:
        if cp.crn != 14:
            return 0
        seen.append((arm64.pc, register, (cp.op0, cp.op1, cp.crn, cp.crm, cp.op2)))
        arm64[2] = 0x1234
        return 1

    arm64.uc.hook_add(uc.UC_HOOK_INSN, mrs, None, 1, 0, arm.UC_ARM64_INS_MRS)
    arm64.code(words(a64.add(3, 3, 1), a64.mrs(2, a64.CNTVCT_EL0), a64.mrs(4, a64.CURRENTEL), a64.WFI))
    arm64[3] = 0
    assert arm64.run() == uc.UC_ERR_OK
    assert seen == [(CODE + 4, arm.UC_ARM64_REG_X2, a64.CNTVCT_EL0)]
    assert (arm64[2], arm64[3], arm64[4]) == (0x1234, 1, 4)


def test_a_hook_on_msr_sees_the_value_and_may_let_the_engine_do_it(arm64: Raw) -> None:
    """Changes of SCTLR, TTBR0 and TCR are checked before they happen."""
    seen = []

    def msr(_engine: Any, _register: int, cp: Any, _user: object) -> int:
        seen.append(((cp.op0, cp.op1, cp.crn, cp.crm, cp.op2), cp.val))
        return 0

    arm64.uc.hook_add(uc.UC_HOOK_INSN, msr, None, 1, 0, arm.UC_ARM64_INS_MSR)
    arm64.code(words(a64.msr(a64.VBAR_EL1, 2), a64.WFI))
    arm64[2] = 0x8000
    assert arm64.run() == uc.UC_ERR_OK
    assert seen == [(a64.VBAR_EL1, 0x8000)]
    assert arm64.uc.reg_read(arm.UC_ARM64_REG_CP_REG, VBAR) == 0x8000


def test_eret_and_mret_return_by_themselves(arm64: Raw, riscv64: Raw) -> None:
    """Only the way in is ours; the way out the engine does, with rights and flags."""
    arm64.code(words(a64.ERET))
    arm64.code(words(a64.mrs(0, a64.VBAR_EL1), a64.WFI), CODE + 0x1000)
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (4, 0, 3, 0, 1, CODE + 0x1000))  # ELR_EL1
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (4, 0, 3, 0, 0, 0x3C0))  # SPSR_EL1: EL0
    arm64.run()
    assert (arm64.interrupts, arm64.pc) == ([1], CODE + 0x1000)

    riscv64.code(words(rv64.MRET))
    riscv64.code(words(rv64.csrrs(5, rv64.MEPC, 0), rv64.WFI), CODE + 0x1000)
    riscv64.uc.reg_write(riscv.UC_RISCV_REG_MEPC, CODE + 0x1000)
    riscv64.uc.reg_write(riscv.UC_RISCV_REG_MSTATUS, 0)  # MPP: U
    riscv64.run()
    assert (riscv64.interrupts, riscv64.pc) == ([2], CODE + 0x1000 + 4)
    assert riscv64.uc.reg_read(riscv.UC_RISCV_REG_PRIV) == 0
