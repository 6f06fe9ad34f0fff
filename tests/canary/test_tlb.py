"""The virtual TLB and its fill hook, which are the secondary MMU's TLB."""

from __future__ import annotations

import pytest
from unicorn import arm64_const as arm
from unicorn import riscv_const as riscv
from unicorn import unicorn_const as uc

from tests.asm import a64, join, rv64, words
from tests.canary.conftest import CODE, DATA, FETCH, PAGE, READ, WRITE, R, Raw, W, X

VIRTUAL = DATA  # a virtual page that tests map here and there
OTHER = DATA + PAGE
ELR_EL1, SPSR_EL1, ERET = (3, 0, 4, 0, 1), (3, 0, 4, 0, 0), 0xD69F03E0


def load_then_wait(raw: Raw) -> bytes:
    """x2 := [x1], with an instruction before and one behind."""
    if raw.arm:
        return words(a64.add(3, 3, 1), a64.ldr(2, 1), a64.add(4, 4, 1), a64.WFI)
    return words(rv64.addi(3, 3, 1), rv64.ld(2, 1, 0), rv64.addi(4, 4, 1), rv64.WFI)


def store_then_wait(raw: Raw) -> bytes:
    """[x1] := x2, with an instruction before and one behind."""
    if raw.arm:
        return words(a64.add(3, 3, 1), a64.str(2, 1), a64.add(4, 4, 1), a64.WFI)
    return words(rv64.addi(3, 3, 1), rv64.sd(2, 1, 0), rv64.addi(4, 4, 1), rv64.WFI)


def clear(raw: Raw) -> None:
    for n in (2, 3, 4):
        raw[n] = 0


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
@pytest.mark.parametrize("answer", ["no", "wrong rights"])
def test_a_refused_fill_is_error_21_with_everything_before_it_retired(raw: Raw, store: bool, answer: str) -> None:
    """A FAULT of the secondary MMU ends the run so, precisely: Vcpu._exit counts and delivers by that PC."""
    raw.code(store_then_wait(raw) if store else load_then_wait(raw))
    if answer == "wrong rights":
        raw.map(VIRTUAL, rights=R if store else W)
    clear(raw)
    raw[1] = VIRTUAL + 0x124
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert raw.pc == CODE + 4
    assert (raw[3], raw[4]) == (1, 0)


def test_a_refused_fetch_is_error_21_with_the_target_as_pc(raw: Raw) -> None:
    """The address of a failed fetch is the PC: the hook sees only its page."""
    raw.code(words(a64.br(1)) if raw.arm else words(rv64.jalr(0, 1, 0)))
    raw[1] = VIRTUAL + 0x124
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert raw.pc == VIRTUAL + 0x124
    assert raw.fills[-1] == (VIRTUAL, FETCH)


def test_the_fill_hook_sees_pages_and_kinds_of_access_only(raw: Raw) -> None:
    """The walker takes the address as a page: the faulting address itself has to come from the instruction."""
    raw.code(load_then_wait(raw))
    raw.map(VIRTUAL, rights=R)
    raw[1] = VIRTUAL + 0x128
    raw.run()
    assert raw.fills == [(CODE, FETCH), (VIRTUAL, READ)]


def sweep(raw: Raw, pages: int) -> int:
    """Loads from ``pages`` pages, one after the other; how many fills that took."""
    if raw.arm:
        code = words(a64.ldr(2, 1), a64.add_reg(1, 1, 5), a64.subs(3, 3, 1), a64.cbnz(3, -12), a64.WFI)
    else:
        code = words(rv64.ld(2, 1, 0), rv64.add(1, 1, 5), rv64.addi(3, 3, -1), rv64.bne(3, 0, -12), rv64.WFI)
    if CODE // PAGE not in raw.table:
        raw.code(code)
        for n in range(pages):
            raw.map(VIRTUAL + n * PAGE, OTHER, R)
    raw[1], raw[3], raw[5] = VIRTUAL, pages, PAGE
    raw.fills.clear()
    assert raw.run() == uc.UC_ERR_OK
    return sum(access == READ for _, access in raw.fills)


def test_a_fill_may_repeat_without_any_change(raw: Raw) -> None:
    """TLB capacity: nothing that counts fills may go into a trace."""
    counts = [sweep(raw, 600) for _ in range(3)]
    assert counts[0] == 600
    assert min(counts[1:]) > 0  # nothing was flushed in between


def test_the_tlb_grows_only_when_it_is_flushed(raw: Raw) -> None:
    """Engine.grow flushes after many fills: without invalidations a guest would miss on and on."""
    for _ in range(10):
        sweep(raw, 600)
    assert sweep(raw, 600) == 600
    for _ in range(2):
        raw.flush_tlb()
        assert sweep(raw, 600) == 600
    assert sweep(raw, 600) == 0


def test_an_entry_stays_until_the_flush(raw: Raw) -> None:
    """A zap of a shadow entry is nothing to the guest until flush_tlb: that window is what the project is about."""
    raw.code(load_then_wait(raw))
    raw.poke(VIRTUAL, b"old")
    raw.poke(OTHER, b"new")
    raw.map(VIRTUAL, VIRTUAL, R)
    raw[1] = VIRTUAL
    raw.run()
    raw.map(VIRTUAL, OTHER, R)
    raw.run()
    assert raw[2].to_bytes(8, "little")[:3] == b"old"
    del raw.table[VIRTUAL // PAGE]
    assert raw.run() == uc.UC_ERR_OK
    raw.map(VIRTUAL, OTHER, R)
    raw.flush_tlb()
    raw.run()
    assert raw[2].to_bytes(8, "little")[:3] == b"new"


def test_a_write_to_a_page_entered_for_reading_asks_again(raw: Raw) -> None:
    """So W can be handed out late: for dirty state, for copy on write, and after code was dropped."""
    raw.code(load_then_wait(raw))
    raw.map(VIRTUAL, rights=R)
    raw[1] = VIRTUAL
    raw.run()
    raw.code(store_then_wait(raw), CODE + PAGE)
    raw.map(VIRTUAL, rights=R | W)
    raw.fills.clear()
    assert raw.run(CODE + PAGE) == uc.UC_ERR_OK
    assert (VIRTUAL, WRITE) in raw.fills


def test_a_fetch_from_a_page_entered_for_reading_asks_again(raw: Raw) -> None:
    """Loads get no X, so every executed page comes by as a fetch and is searched for clocks."""
    raw.code(load_then_wait(raw))
    raw.code(words(a64.WFI if raw.arm else rv64.WFI), VIRTUAL)
    raw.map(VIRTUAL, rights=R)
    raw[1] = VIRTUAL
    raw.run()
    raw.map(VIRTUAL, rights=R | X)
    raw.fills.clear()
    assert raw.run(VIRTUAL) == uc.UC_ERR_OK
    assert (VIRTUAL, FETCH) in raw.fills


def test_a_flush_inside_the_fill_hook_is_safe_and_keeps_the_entry_that_it_returns(raw: Raw) -> None:
    """Revoking W or X for a hand-out flushes in the middle of that very fill."""
    raw.code(store_then_wait(raw))
    raw.map(VIRTUAL)
    raw[1], raw[2] = VIRTUAL, 0x1234
    raw.on_fill = lambda address, access: raw.flush_tlb() if access == WRITE else None
    assert raw.run() == uc.UC_ERR_OK
    assert raw.peek(VIRTUAL) == 0x1234
    assert raw[2] == 0x1234
    raw.on_fill = None
    raw.fills.clear()
    raw.run()
    assert (VIRTUAL, WRITE) not in raw.fills


def test_an_exclusive_or_atomic_update_asks_for_a_read_and_for_a_write(raw: Raw) -> None:
    """The walker knows two kinds of data access; an atomic one must not write through a read-only entry."""
    if raw.arm:
        code = words(a64.ldxr(2, 1), a64.add(2, 2, 1), a64.stxr(3, 2, 1), a64.WFI)
    else:
        code = words(rv64.amoadd_d(2, 1, 4), rv64.WFI)
    raw.code(code)
    raw.poke(VIRTUAL, bytes(8))
    raw.map(VIRTUAL, rights=R)
    raw[1], raw[4] = VIRTUAL, 1
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert raw.fills[-1] == (VIRTUAL, WRITE)
    assert raw.peek(VIRTUAL) == 0
    raw.map(VIRTUAL, rights=R | W)
    assert raw.run() == uc.UC_ERR_OK
    assert raw.peek(VIRTUAL) == 1


def test_a_fetch_that_fails_inside_a_block_leaves_before_the_block(riscv64: Raw) -> None:
    """An instruction across two pages is read when its block is translated: nothing of the block has run."""
    start = CODE + PAGE - 6
    riscv64.code(bytes(PAGE))
    riscv64.poke(start, join(rv64.c_addi(3, 1), rv64.c_addi(3, 1), rv64.addi(3, 3, 1)))
    riscv64[3] = 0
    assert riscv64.run(start) == uc.UC_ERR_EXCEPTION
    assert riscv64.fills[-1] == (CODE + PAGE, FETCH)
    assert riscv64.pc == start
    assert riscv64[3] == 0


def test_every_privilege_has_a_tlb_of_its_own_and_the_fill_hook_sees_which(raw: Raw) -> None:
    """Rights of guest tables depend on it; no flush is needed, nor made, when a trap is taken or returned from."""
    privileges: list[tuple[int, int]] = []

    def fill(address: int, access: int) -> None:
        if address == VIRTUAL:
            register = arm.UC_ARM64_REG_PSTATE if raw.arm else riscv.UC_RISCV_REG_PRIV
            privileges.append((access, int(raw.uc.reg_read(register)) & (0xC if raw.arm else 3)))

    below = CODE + 0x100
    if raw.arm:
        code = join(a64.ldr(2, 1), a64.msr(ELR_EL1, 3), a64.msr(SPSR_EL1, 4), ERET)
        raw[4] = 0x3C0
    else:
        code = join(rv64.ld(2, 1, 0), rv64.csrrw(0, rv64.MEPC, 3), rv64.MRET)
    load = a64.ldr(2, 1) if raw.arm else rv64.ld(2, 1, 0)
    raw.code(code.ljust(0x100, b"\0") + join(load, load, a64.svc() if raw.arm else rv64.ECALL))
    raw.map(VIRTUAL)
    raw[1], raw[3] = VIRTUAL, below
    raw.on_fill = fill
    raw.run()
    assert raw.interrupts == [2 if raw.arm else 8]
    assert privileges == [(READ, 4 if raw.arm else 3), (READ, 0)]


def test_an_unprivileged_load_at_el1_has_the_tlb_of_el0_and_looks_like_el1(arm64: Raw) -> None:
    """The walker has to look at the instruction."""
    seen: list[int] = []
    arm64.on_fill = lambda address, access: (
        seen.append(int(arm64.uc.reg_read(arm.UC_ARM64_REG_PSTATE)) & 0xC) if address == VIRTUAL else None
    )
    arm64.code(words(a64.ldr(2, 1), 0xF8400822, a64.WFI))  # ldr x2, [x1]; ldtr x2, [x1]
    arm64.map(VIRTUAL)
    arm64[1] = VIRTUAL
    assert arm64.run() == uc.UC_ERR_OK
    assert seen == [4, 4]


def test_every_engine_says_that_it_is_cpu_0(arm64: Raw) -> None:
    """Whatever was written to MPIDR_EL1; reads are answered with the vCPU's number."""
    arm64.code(words(a64.mrs(2, (3, 0, 0, 0, 5)), a64.WFI))
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (0, 0, 3, 0, 5, 1 << 31 | 3))
    assert arm64.run() == uc.UC_ERR_OK
    assert arm64[2] & 0xFF == 0


def test_page_table_pointers_are_written_without_a_flush(raw: Raw) -> None:
    """Of the same ASID. The walker hooks the instruction."""
    satp = 8 << 60 | 0x80000
    if raw.arm:
        raw.code(words(a64.ldr(2, 1), a64.msr((3, 0, 2, 0, 0), 3), a64.ldr(2, 1), a64.WFI))
    else:
        raw.code(words(rv64.ld(2, 1, 0), rv64.csrrw(0, rv64.SATP, 3), rv64.ld(2, 1, 0), rv64.WFI))
    raw.map(VIRTUAL)
    raw[1], raw[3] = VIRTUAL, 0x80000000 if raw.arm else satp
    assert raw.run() == uc.UC_ERR_OK
    assert raw.fills.count((VIRTUAL, READ)) == 1


@pytest.mark.parametrize("bit", [17, 18, 19], ids=["MPRV", "SUM", "MXR"])
def test_what_decides_over_rights_in_mstatus_flushes_when_it_changes(riscv64: Raw, bit: int) -> None:
    """So the walker need not be told."""
    load = rv64.ld(2, 1, 0)
    change = rv64.csrrs(0, rv64.MSTATUS, 3)
    riscv64.code(words(load, change, load, change, load, rv64.WFI))
    riscv64.map(VIRTUAL)
    riscv64[1], riscv64[3] = VIRTUAL, 1 << bit
    assert riscv64.run() == uc.UC_ERR_OK
    assert riscv64.fills.count((VIRTUAL, READ)) == 2
