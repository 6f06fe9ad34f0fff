"""Instructions are counted by blocks; the sum is what stepping them one at a time gives.

The peer is the engine's own package in its default mode, one instruction a call, with none of our hooks. Both sides do
the same at an exit: an access that faults and an instruction that traps are skipped. Such an instruction does not
count; SVC and ecall, which complete, do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import arm64_const, riscv_const
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import Uc, UcError

from tests.asm import a64, join, rv64, words
from tests.cpu.conftest import CODE, DATA, DEVICE, EXCEPTION, INVALID, OK, PAGE, RW, RX, Box
from xipvm.cpu import core

UNMAPPED = 0x70000
Encode = Callable[[int, list[int]], int]


@dataclass
class Item:
    """One instruction: its size, and its encoding from its own index and the addresses of all items."""

    size: int
    encode: Encode


def fixed(insn: int) -> Item:
    """An instruction that is the same everywhere."""
    return Item(4 if insn & 3 == 3 or insn > 0xFFFF or insn == 0 else 2, lambda index, at: insn)


def branch(size: int, target: int, encode: Callable[[int], int]) -> Item:
    """An instruction with an offset to the item ``target`` items on."""
    return Item(size, lambda index, at: encode(at[min(max(index + target, 0), len(at) - 1)] - at[index]))


def assemble(items: list[Item], start: int) -> bytes:
    at = [start]
    for item in items:
        at.append(at[-1] + item.size)
    at.pop()
    return b"".join(item.encode(n, at).to_bytes(item.size, "little") for n, item in enumerate(items))


def flat(parts: list[list[Item]]) -> list[Item]:
    return [item for part in parts for item in part]


# AArch64: x0..x7 values, x8 points to data, x9 to nothing, x10 counts loops.

REG = st.integers(0, 7)
BASE = st.sampled_from([8, 8, 8, 9])
OFFSET = st.integers(0, 31).map(lambda n: 8 * n)

ARM_SIMPLE = st.one_of(
    st.builds(a64.add, REG, REG, st.integers(0, 4095)),
    st.builds(a64.subs, REG, REG, st.integers(0, 4095)),
    st.builds(a64.eor_reg, REG, REG, REG),
    st.builds(a64.madd, REG, REG, REG, REG),
    st.builds(a64.ldr, REG, BASE, OFFSET),
    st.builds(a64.ldr, REG, BASE, OFFSET, st.sampled_from([1, 2, 4])),
    st.builds(a64.str, REG, BASE, OFFSET),
    st.builds(a64.ldp, st.integers(0, 3), st.integers(4, 7), BASE, OFFSET),
    st.builds(a64.stp, REG, REG, BASE, OFFSET),
    st.sampled_from([a64.NOP, a64.ISB, a64.svc(1), a64.brk(1), a64.UDF, a64.hvc(1)]),
).map(lambda insn: [fixed(insn)])
SKIP = st.integers(1, 4)
ARM_BRANCH = st.one_of(
    st.builds(lambda n: [branch(4, n, a64.b)], SKIP),
    st.builds(lambda n, r: [branch(4, n, lambda o: a64.cbz(r, o))], SKIP, REG),
    st.builds(lambda n, r, bit: [branch(4, n, lambda o: a64.tbz(r, bit, o))], SKIP, REG, st.integers(0, 3)),
)


def arm_loop(turns: int, body: list[list[Item]]) -> list[Item]:
    items = flat(body)
    return [
        fixed(a64.movz(10, turns)),
        *items,
        fixed(a64.subs(10, 10, 1)),
        branch(4, -len(items) - 1, lambda offset: a64.cbnz(10, offset)),
    ]


# RV64: a0..a5 values, s0 points to data, s1 to nothing, t2 counts loops.

VALUE = st.integers(10, 15)
POINTER = st.sampled_from([8, 8, 8, 9])
SMALL = st.integers(-32, 31)

RV_SIMPLE = st.one_of(
    st.builds(rv64.addi, VALUE, VALUE, st.integers(-2048, 2047)),
    st.builds(rv64.xor, VALUE, VALUE, VALUE),
    st.builds(rv64.mul, VALUE, VALUE, VALUE),
    st.builds(rv64.c_addi, VALUE, SMALL.filter(bool)),
    st.builds(rv64.c_li, VALUE, SMALL),
    st.builds(rv64.c_mv, VALUE, VALUE),
    st.builds(rv64.c_add, VALUE, VALUE),
    st.builds(rv64.ld, VALUE, POINTER, OFFSET),
    st.builds(rv64.lb, VALUE, POINTER, OFFSET),
    st.builds(rv64.sd, VALUE, POINTER, OFFSET),
    st.builds(rv64.c_ld, VALUE, POINTER, OFFSET),
    st.builds(rv64.c_sd, VALUE, POINTER, OFFSET),
    st.builds(rv64.amoadd_d, VALUE, POINTER, VALUE),
    st.sampled_from([rv64.C_NOP, rv64.NOP, rv64.FENCE_I, rv64.ECALL, rv64.EBREAK, rv64.C_EBREAK, 0xFFFFFFFF]),
).map(lambda insn: [fixed(insn)])
RV_BRANCH = st.one_of(
    st.builds(lambda n: [branch(4, n, lambda o: rv64.jal(0, o))], SKIP),
    st.builds(lambda n: [branch(2, n, rv64.c_j)], SKIP),
    st.builds(lambda n, r, s: [branch(4, n, lambda o: rv64.blt(r, s, o))], SKIP, VALUE, VALUE),
    st.builds(lambda n, r: [branch(2, n, lambda o: rv64.c_bnez(r, o))], SKIP, VALUE),
)


def rv_loop(turns: int, body: list[list[Item]]) -> list[Item]:
    items = flat(body)
    return [
        fixed(rv64.addi(7, 0, turns)),
        *items,
        fixed(rv64.c_addi(7, -1)),
        branch(4, -len(items) - 1, lambda offset: rv64.bne(7, 0, offset)),
    ]


def programs(
    simple: st.SearchStrategy[list[Item]],
    branches: st.SearchStrategy[list[Item]],
    loop: Callable[[int, list[list[Item]]], list[Item]],
    nop: int,
    wfi: int,
) -> st.SearchStrategy[list[Item]]:
    """Straight code, jumps forward and loops; all of it ends at a WFI behind enough NOPs to jump over."""
    nops = [fixed(nop)] * 4
    # A jump into a loop would skip the setting of its counter, so there is more in front of one than a jump reaches.
    loops = st.builds(loop, st.integers(1, 4), st.lists(simple, min_size=1, max_size=5)).map(lambda items: nops + items)
    parts = st.lists(st.one_of(simple, simple, simple, branches, loops), min_size=1, max_size=30)
    return parts.map(lambda drawn: flat(drawn) + nops + [fixed(wfi)])


ARM_PROGRAMS = programs(ARM_SIMPLE, ARM_BRANCH, arm_loop, a64.NOP, a64.WFI)
RV_PROGRAMS = programs(RV_SIMPLE, RV_BRANCH, rv_loop, rv64.C_NOP, rv64.WFI)


@dataclass
class Outcome:
    """What one side says of a program."""

    insns: int = 0
    exits: list[tuple[str, int]] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)
    data: bytes = b""


def length(arm: bool, code: bytes, start: int, pc: int) -> int:
    """Size of the instruction at ``pc``."""
    return 4 if arm or code[pc - start] & 3 == 3 else 2


def stepped(arm: bool, code: bytes, start: int) -> Outcome:
    """One instruction at a time."""
    engine = Uc(uc.UC_ARCH_ARM64, uc.UC_MODE_ARM) if arm else Uc(uc.UC_ARCH_RISCV, uc.UC_MODE_RISCV64)
    x0 = arm64_const.UC_ARM64_REG_X0 if arm else riscv_const.UC_RISCV_REG_X0
    pc_register = arm64_const.UC_ARM64_REG_PC if arm else riscv_const.UC_RISCV_REG_PC
    engine.mem_map(CODE, 2 * PAGE)
    engine.mem_map(DATA, PAGE)
    engine.mem_write(start, code)
    interrupts: list[int] = []

    def interrupt(_engine: Uc, number: int, _user: object) -> None:
        interrupts.append(number)
        engine.emu_stop()

    engine.hook_add(uc.UC_HOOK_INTR, interrupt)
    engine.reg_write(x0 + 8, DATA)
    engine.reg_write(x0 + 9, UNMAPPED)
    done = Outcome()
    pc = start
    while pc != start + len(code):
        kind = ""
        try:
            engine.emu_start(pc, 0, 0, 1)
        except UcError as error:
            kind = "invalid" if error.errno == uc.UC_ERR_INSN_INVALID else "fault"
        at = engine.reg_read(pc_register)
        if kind:
            assert at == pc
            done.exits.append((kind, pc))
            pc += length(arm, code, start, pc)
            continue
        if interrupts:
            number = interrupts.pop()
            done.exits.append((f"interrupt {number}", at))
            if arm and at == pc:  # an exception that leaves the PC on its instruction
                pc += 4
                continue
            done.insns += 0 if not arm and number == 2 else 1
        else:
            done.insns += 1
        pc = at
    done.registers = [engine.reg_read(x0 + n) for n in range(1, 16)]
    done.data = bytes(engine.mem_read(DATA, PAGE))
    return done


def counted_run(kind: int, code: bytes, start: int, budgets: list[int]) -> Outcome:
    """By blocks, in slices."""
    box = Box(kind)
    try:
        frames = [box.page(CODE + n * PAGE, rights=RX) for n in (0, 1)]
        for n, byte_ in enumerate(code):
            at = start - CODE + n
            box.host.write(frames[at // PAGE], at % PAGE, bytes([byte_]))
        data = box.page(DATA, rights=RW)
        box.set_x(8, DATA)
        box.set_x(9, UNMAPPED)
        engine = box.engine
        done = Outcome()
        pc, slices = start, iter(budgets)
        while pc != start + len(code):
            left = next(slices, None)
            limit = None if left is None else engine.insns + left
            result = engine.run(pc, limit)
            pc = box.pc()
            if result == EXCEPTION:
                assert engine.fault_access != core.FETCH
                engine.uncount(pc)
                done.exits.append(("fault", pc))
                pc += length(box.arm, code, start, pc)
            elif result == INVALID:
                engine.uncount(pc)
                done.exits.append(("invalid", pc))
                pc += length(box.arm, code, start, pc)
            elif engine.interrupt >= 0:
                engine.uncount(pc)
                done.exits.append((f"interrupt {engine.interrupt}", pc))
                if not box.arm and engine.interrupt == 2:
                    engine.uncount(pc - 4)
                elif box.arm and engine.interrupt != 2:
                    pc += 4
            else:
                assert result == OK
                assert engine.stopped == (pc != start + len(code))
                if engine.stopped and not engine.kick:
                    assert limit is not None
                    assert engine.insns >= limit
                engine.kick = 0
        done.insns = engine.insns
        done.registers = [box.x(n) for n in range(1, 16)]
        done.data = box.host.read(data, 0, PAGE)
        return done
    finally:
        box.close()


STARTS = st.one_of(st.just(CODE), st.integers(1, 80).map(lambda n: CODE + PAGE - 4 * n))
BUDGETS = st.lists(st.integers(1, 40), max_size=8)


@settings(max_examples=150, deadline=None)
@given(program=ARM_PROGRAMS, start=STARTS, budgets=BUDGETS)
def test_arm64(program: list[Item], start: int, budgets: list[int]) -> None:
    code = assemble(program, start)
    assert counted_run(core.ARM64, code, start, budgets) == stepped(True, code, start)


@settings(max_examples=200, deadline=None)
@given(program=RV_PROGRAMS, start=STARTS, halfword=st.sampled_from([0, 2]), budgets=BUDGETS)
def test_riscv64(program: list[Item], start: int, halfword: int, budgets: list[int]) -> None:
    code = assemble(program, start + halfword)
    assert counted_run(core.RISCV64, code, start + halfword, budgets) == stepped(False, code, start + halfword)


# What the programs above cannot do


def test_a_failed_fetch_takes_nothing_back(box: Box) -> None:
    """The block that could not be fetched was not counted, also where it begins as the one before it did."""
    if box.arm:
        code = words(a64.str(2, 1, 0, 4), a64.subs(3, 3, 1), a64.cbnz(3, -8), a64.WFI)
    else:
        code = words(rv64.sw(2, 1, 0), rv64.addi(3, 3, -1), rv64.bne(3, 0, -8), rv64.WFI)
    box.page(CODE, code, RX)
    box.set_x(1, DEVICE)
    box.set_x(3, 5)

    def revoke(value: int) -> None:
        if box.engine.insns == 6:
            box.unmap(CODE)
            box.engine.leave(core.KICK_FLUSH)

    box.on_write = revoke
    assert box.engine.run(CODE) == OK
    assert box.engine.run(box.pc()) == EXCEPTION
    assert (box.engine.fault_address, box.engine.fault_access) == (CODE, core.FETCH)
    assert box.engine.insns == 6
    assert box.engine.uncount(box.pc()) == 0  # nothing runs


def test_a_fault_in_a_block_whose_page_was_taken_away(make_box: Callable[..., Box]) -> None:
    """A device takes the page of the running block away; instruction lengths are still those of its bytes."""
    box = make_box(core.RISCV64)
    code = join(rv64.c_addi(5, 1), rv64.sw(2, 1, 0), rv64.c_addi(5, 1), rv64.ld(6, 4, 0), *[rv64.c_addi(5, 1)] * 4)
    box.page(CODE, code + words(rv64.jal(0, 0)), RX)
    box.set_x(1, DEVICE)
    box.set_x(4, UNMAPPED)
    box.on_write = lambda value: box.unmap(CODE)
    assert box.engine.run(CODE) == EXCEPTION
    assert box.pc() == CODE + 8
    assert box.engine.insns == 9
    assert box.engine.uncount(box.pc()) == 6
    assert box.engine.insns == 3


def test_retired_is_the_count_before_an_instruction_of_the_running_block(box: Box) -> None:
    """Clocks are answered with it: one instruction, one nanosecond."""
    if box.arm:
        code = words(*[a64.NOP] * 5, a64.str(2, 1, 0, 4), a64.NOP, a64.b(4), a64.WFI)
        pcs = [CODE + 4 * n for n in range(9)]
    else:
        code = join(rv64.C_NOP, rv64.NOP, rv64.C_NOP, rv64.sw(2, 1, 0), rv64.C_NOP, rv64.jal(0, 4), rv64.WFI)
        pcs = [CODE + n for n in (0, 2, 6, 8, 12, 14)]
    box.page(CODE, code, RX)
    box.set_x(1, DEVICE)
    seen: list[list[int]] = []
    box.on_write = lambda value: seen.append([box.engine.retired(pc) for pc in pcs])
    assert box.engine.run(CODE) == OK
    count = 8 if box.arm else 6
    assert seen == [[n if n < count else count for n in range(len(pcs))]]


def test_a_hooked_csr_instruction_counts_once(make_box: Callable[..., Box]) -> None:
    box = make_box(core.RISCV64)
    code = words(rv64.addi(5, 5, 1), rv64.csrrs(6, rv64.INSTRET, 0), rv64.addi(5, 5, 1), rv64.csrrs(7, rv64.INSTRET, 0))
    box.page(CODE, code + words(rv64.WFI), RX)

    def on_insn(pc: int, size: int) -> None:
        box.set_x(6 if pc == CODE + 4 else 7, box.engine.retired(pc))
        box.set_pc(pc + 4)

    box.engine.on_insn = on_insn
    assert box.engine.run(CODE) == OK
    assert (box.x(6), box.x(7), box.engine.insns) == (1, 3, 5)


@pytest.mark.parametrize("at", [0xFFC, 0xFFE])
def test_a_hooked_csr_instruction_at_the_end_of_a_page(make_box: Callable[..., Box], at: int) -> None:
    """Or across it: it is found in the page that it begins in, where only half of it can be seen."""
    box = make_box(core.RISCV64)
    code = words(rv64.csrrs(6, rv64.CYCLE, 0), rv64.WFI)
    box.page(CODE, bytes(at) + code[: PAGE - at], RX)
    box.page(CODE + PAGE, code[PAGE - at :], RX)

    def on_insn(pc: int, size: int) -> None:
        if box.engine.read_code(pc, 4) == code[:4]:
            box.set_x(6, 1234)
            box.set_pc(pc + 4)

    box.engine.on_insn = on_insn
    assert box.engine.run(CODE + at) == OK
    assert (box.x(6), box.engine.insns) == (1234, 2)


def test_a_csr_instruction_is_found_at_every_address_of_its_page(make_box: Callable[..., Box]) -> None:
    """Also where the page was first entered by a load."""
    box = make_box(core.RISCV64)
    pfn = box.page(CODE, words(rv64.csrrs(6, rv64.CYCLE, 0), rv64.WFI), RX)
    box.page(DATA, rights=RX, pfn=pfn)
    box.page(CODE + PAGE, box.load(), RX)
    hooked: list[int] = []
    box.engine.on_insn = lambda pc, size: hooked.append(pc)
    box.engine.run(CODE)
    box.set_x(1, DATA)
    box.engine.run(CODE + PAGE)
    box.engine.run(DATA)
    assert hooked == [CODE, DATA]


@pytest.mark.parametrize("gap", [0, 3])
def test_virtual_time_never_goes_backwards(make_box: Callable[..., Box], gap: int) -> None:
    """Clock reads in blocks that fault half way, with the budget running out in between."""
    box = make_box(core.ARM64)
    read = a64.mrs(2, (3, 3, 9, 13, 0))  # PMCCNTR_EL0, which has no short way
    body = [read, *[a64.NOP] * gap, a64.ldr(4, 9), read, a64.svc(), read, a64.subs(3, 3, 1)]
    box.page(CODE, words(*body, a64.cbnz(3, -4 * len(body)), a64.WFI), RX)
    box.set_x(3, 50)
    box.set_x(9, UNMAPPED)
    seen: list[int] = []

    def sysreg(op0: int, op1: int, crn: int, crm: int, op2: int, value: int | None) -> int:
        seen.append(box.engine.ticks_at(box.pc()))
        return seen[-1]

    box.engine.on_sysreg = sysreg
    pc, ticks = CODE, [0]
    while pc != CODE + 4 * (len(body) + 2):
        code = box.engine.run(pc, box.engine.ticks + 7)
        pc = box.pc()
        if code == EXCEPTION or box.engine.interrupt >= 0:
            box.engine.uncount(pc)
            pc += 4 if code == EXCEPTION else 0
        ticks.append(box.engine.ticks)
    assert ticks == sorted(ticks)
    assert seen == sorted(seen)
    per_turn = len(body)  # what faults does not count
    assert seen == [turn * per_turn + at for turn in range(50) for at in (0, 1 + gap, 3 + gap)]


def test_a_guest_that_only_looks_at_the_clock_makes_it_run(make_box: Callable[..., Box]) -> None:
    """Waiting is skipped: time passes, instructions do not, and none of it is ever taken back."""
    box = make_box(core.ARM64)
    box.page(
        CODE, words(a64.mrs(2, a64.CNTVCT_EL0), a64.str(2, 1, 0, 4), a64.subs(3, 3, 1), a64.cbnz(3, -12), a64.WFI), RX
    )
    box.set_x(1, DEVICE)
    box.set_x(3, 200)
    assert box.engine.run(CODE) == OK
    values = [value for _, _, value in box.written]
    assert values == sorted(values)
    assert box.engine.insns == 200 * 4 + 1
    assert box.engine.ticks > 100 * 1000
    assert values[-1] * 16 <= box.engine.ticks
