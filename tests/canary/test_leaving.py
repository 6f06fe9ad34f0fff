"""When and in what state the guest is left."""

from __future__ import annotations

import ctypes

import pytest
from unicorn import arm64_const as arm
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import Uc

from tests.asm import a64, rv64, words
from tests.canary.conftest import CODE, DATA, PAGE, READ, Raw

MMIO = 0x1000_0000


def device(raw: Raw, stop: bool) -> list[int]:
    """A page of MMIO; the list of what was written. A write stops the engine, once, if asked."""
    written: list[int] = []

    def write(engine: Uc, _offset: int, _size: int, value: int, _user: object) -> None:
        written.append(value)
        if stop and len(written) == 1:
            engine.emu_stop()

    raw.uc.mmio_map(MMIO, PAGE, None, None, write, None)
    raw.map(MMIO)
    raw[1] = MMIO
    return written


def store_then_count(raw: Raw) -> bytes:
    """[x1] := x2; x3 += 1."""
    if raw.arm:
        return words(a64.str(2, 1, 0, 4), a64.add(3, 3, 1), a64.WFI)
    return words(rv64.sw(2, 1, 0), rv64.addi(3, 3, 1), rv64.WFI)


def set_no_exit_request(raw: Raw) -> None:
    """What Engine.stop_at_blocks does."""
    assert raw.uc._uch.value is not None
    ctypes.memset(raw.uc._uch.value + 2034, 1, 1)


def test_a_stop_inside_a_device_write_repeats_the_store(raw: Raw) -> None:
    """By itself the engine asks after each access whether to stop. Callbacks of ours do not stop it for this reason."""
    raw.code(store_then_count(raw))
    written = device(raw, stop=True)
    raw[2], raw[3] = 7, 0
    assert raw.run() == uc.UC_ERR_OK
    assert (raw.pc, raw[3], written) == (CODE, 0, [7])
    assert raw.run(raw.pc) == uc.UC_ERR_OK
    assert (raw[3], written) == (1, [7, 7])


def test_a_stop_after_a_load_into_its_own_base_has_lost_the_address(arm64: Raw) -> None:
    """A stop from a signal comes at any moment: on the host clock one of these would corrupt a list walk."""
    arm64.code(words(a64.ldr(0, 0), a64.add(3, 3, 1), a64.WFI))
    arm64.poke(DATA, (DATA + 8).to_bytes(8, "little") + DATA.to_bytes(8, "little"))
    arm64.map(DATA)
    arm64[0] = DATA
    arm64.on_fill = lambda _address, access: arm64.uc.emu_stop() if access == READ else None
    assert arm64.run() == uc.UC_ERR_OK
    assert (arm64.pc, arm64[0]) == (CODE, DATA + 8)  # the load is to be repeated, from elsewhere


def test_a_stop_in_an_atomic_update_comes_between_its_store_and_its_end(riscv64: Raw) -> None:
    """The same for read-modify-write: repeated, it adds twice. Seen where the stop is asked for in the W fill."""
    riscv64.code(words(rv64.amoadd_d(2, 1, 4), rv64.WFI))
    riscv64.poke(DATA, bytes(8))
    riscv64.map(DATA, rights=uc.UC_PROT_READ)
    riscv64[1], riscv64[4] = DATA, 1

    def fill(_address: int, access: int) -> None:
        if access == uc.UC_MEM_WRITE:
            riscv64.map(DATA)
            riscv64.uc.emu_stop()

    riscv64.on_fill = fill
    assert riscv64.run() == uc.UC_ERR_OK
    assert (riscv64.pc, riscv64.peek(DATA)) == (CODE, 1)
    riscv64.on_fill = None
    assert riscv64.run(riscv64.pc) == uc.UC_ERR_OK
    assert riscv64.peek(DATA) == 2


def test_without_exit_requests_a_stop_waits_for_the_next_block(raw: Raw) -> None:
    """Engine.stop_at_blocks relies on this byte: it leaves the questions after loads and stores out."""
    set_no_exit_request(raw)
    code = store_then_count(raw)
    # a second block behind the store's: the stop is taken there
    code = code[:-4] + (
        words(a64.b(4), a64.add(3, 3, 1), a64.WFI) if raw.arm else words(rv64.jal(0, 4), rv64.addi(3, 3, 1), rv64.WFI)
    )
    raw.code(code)
    written = device(raw, stop=True)
    raw[2], raw[3] = 7, 0
    assert raw.run() == uc.UC_ERR_OK
    assert (raw.pc, raw[3], written) == (CODE + 12, 1, [7])
    assert raw.run(raw.pc) == uc.UC_ERR_OK
    assert (raw[3], written) == (2, [7])


def test_without_exit_requests_a_code_hook_cannot_skip_its_instruction(riscv64: Raw) -> None:
    """Why the core turns that byte off again when it hooks an instruction of a RISC-V page."""
    from unicorn import riscv_const

    set_no_exit_request(riscv64)

    def hook(engine: Uc, address: int, _size: int, _user: object) -> None:
        engine.reg_write(riscv_const.UC_RISCV_REG_PC, address + 4)

    riscv64.uc.hook_add(uc.UC_HOOK_CODE, hook, None, CODE, CODE)
    riscv64.code(words(rv64.addi(5, 0, 7), rv64.WFI))
    riscv64[5] = 0
    riscv64.run()
    assert riscv64[5] == 7


def test_a_stop_in_the_block_hook_leaves_before_the_block_which_is_announced_again(raw: Raw) -> None:
    """Budgets and kicks stop there: the block hook must not count a block that it refuses."""
    raw.code(store_then_count(raw))
    raw.map(DATA)
    raw[1], raw[3] = DATA, 0
    blocks: list[int] = []

    def block(engine: Uc, address: int, _size: int, _user: object) -> None:
        blocks.append(address)
        if len(blocks) == 1:
            engine.emu_stop()

    raw.uc.hook_add(uc.UC_HOOK_BLOCK, block)
    assert raw.run() == uc.UC_ERR_OK
    assert (raw.pc, raw[3]) == (CODE, 0)
    assert raw.run(raw.pc) == uc.UC_ERR_OK
    assert raw[3] == 1
    assert blocks == [CODE, CODE]


def test_a_stop_before_the_start_is_lost(raw: Raw) -> None:
    """Whoever wants a vCPU out sets the kick word, too, which the next block start finds."""
    raw.code(store_then_count(raw))
    raw.map(DATA)
    raw[1], raw[3] = DATA, 0
    raw.uc.emu_stop()
    assert raw.run() == uc.UC_ERR_OK
    assert raw[3] == 1


def test_wfi_ends_the_run_without_a_sign(raw: Raw) -> None:
    """No error, PC behind it: the ISA modules decode the instruction before the PC."""
    raw.code(words(a64.NOP, a64.WFI) if raw.arm else words(rv64.NOP, rv64.WFI))
    assert raw.run() == uc.UC_ERR_OK
    assert raw.pc == CODE + 8
    assert raw.interrupts == []


@pytest.mark.parametrize("insn", [a64.WFE, a64.YIELD], ids=["wfe", "yield"])
def test_wfe_and_yield_do_not_end_a_run(arm64: Raw, insn: int) -> None:
    """A vCPU that spins for another one runs until its slice is used up: slices of several vCPUs have to be short."""
    arm64.code(words(insn, a64.add(3, 3, 1), a64.WFI))
    arm64[3] = 0
    assert arm64.run() == uc.UC_ERR_OK
    assert arm64[3] == 1


def test_a_tlb_flush_inside_a_device_write_is_safe(raw: Raw) -> None:
    """A flash command leaves read-array mode inside the store: zap, flush and kick happen in that callback."""
    raw.code(store_then_count(raw))
    written: list[int] = []

    def write(_engine: Uc, _offset: int, _size: int, value: int, _user: object) -> None:
        written.append(value)
        raw.flush_tlb()
        raw.uc.ctl_remove_cache(CODE, CODE + PAGE)

    raw.uc.mmio_map(MMIO, PAGE, None, None, write, None)
    raw.map(MMIO)
    raw[1], raw[2], raw[3] = MMIO, 7, 0
    assert raw.run() == uc.UC_ERR_OK
    assert (raw[3], written) == (1, [7])


def test_registers_written_between_runs_hold(arm64: Raw) -> None:
    """Trap entry is written so; the vector registers come along in a saved context."""
    arm64.code(words(a64.WFI))
    saved = arm64.uc.context_save()
    arm64[5] = 99
    arm64.uc.reg_write(arm.UC_ARM64_REG_CP_REG, (12, 0, 3, 0, 0, 0x8000))
    arm64.run()
    assert arm64[5] == 99
    arm64.uc.context_restore(saved)
    assert arm64[5] == 0
    assert arm64.uc.reg_read(arm.UC_ARM64_REG_CP_REG, (12, 0, 3, 0, 0)) == 0
