"""Translated code: what keeps it, what drops it, what a running loop notices."""

from __future__ import annotations

from typing import Any

import pytest
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import Uc

from tests.asm import a64, join, rv64, words
from tests.canary.conftest import CODE, DATA, FETCH, PAGE, R, Raw, W, X

SCRATCH = 0x7FFF_FFFF_F000
MMIO = 0x1000_0000


def answer(raw: Raw, value: int) -> bytes:
    """x2 := value, and wait."""
    return words(a64.movz(2, value), a64.WFI) if raw.arm else words(rv64.addi(2, 0, value), rv64.WFI)


def loop_that_stores(raw: Raw) -> bytes:
    """x2 counts x3 iterations, each with a store to [x1]."""
    if raw.arm:
        return words(a64.add(2, 2, 1), a64.str(2, 1, 0, 4), a64.subs(3, 3, 1), a64.cbnz(3, -12), a64.WFI)
    return words(rv64.addi(2, 2, 1), rv64.sw(2, 1, 0), rv64.addi(3, 3, -1), rv64.bne(3, 0, -12), rv64.WFI)


def device(raw: Raw, on_write: Any) -> None:
    """A page of MMIO at ``MMIO``."""
    raw.uc.mmio_map(MMIO, PAGE, lambda *_: 0, None, lambda _u, offset, size, value, _d: on_write(value), None)
    raw.map(MMIO)
    raw[1] = MMIO


def test_code_outlives_a_write_by_the_host(raw: Raw) -> None:
    """HostMemory calls the code hook before bytes of an executed frame change; nothing less than a drop helps."""
    raw.code(answer(raw, 1))
    raw.run()
    raw.poke(CODE, answer(raw, 2))
    raw.run()
    assert raw[2] == 1
    raw.flush_tlb()
    raw.run()
    assert raw[2] == 1
    raw.uc.ctl_remove_cache(CODE, CODE + PAGE)
    raw.run()
    assert raw[2] == 2


def test_remove_cache_of_an_address_that_does_not_translate_does_nothing(raw: Raw) -> None:
    """When a frame's bytes change its guest address is gone: Engine.drop maps a scratch address to the frame."""
    raw.code(answer(raw, 1))
    raw.run()
    raw.poke(CODE, answer(raw, 2))
    del raw.table[CODE // PAGE]
    raw.flush_tlb()
    raw.uc.ctl_remove_cache(CODE, CODE + PAGE)  # no error either
    raw.map(CODE, rights=R | X)
    raw.flush_tlb()
    raw.run()
    assert raw[2] == 1

    raw.map(SCRATCH, CODE, R | X)
    raw.uc.ctl_remove_cache(SCRATCH, SCRATCH + PAGE)
    raw.run()
    assert raw[2] == 2


def test_remove_cache_fills_the_tlb(raw: Raw) -> None:
    """The scratch address keeps its frame until a flush: Engine.drop flushes, or the next drop would hit this frame."""
    raw.code(answer(raw, 1))
    raw.code(answer(raw, 3), DATA)
    raw.run()
    raw.run(DATA)
    raw.poke(CODE, answer(raw, 2))
    raw.poke(DATA, answer(raw, 4))
    for frame in (CODE, DATA):
        raw.map(SCRATCH, frame, R | X)
        raw.uc.ctl_remove_cache(SCRATCH, SCRATCH + PAGE)
    raw.run()
    assert raw[2] == 2
    raw.run(DATA)
    assert raw[2] == 3


def test_remove_cache_of_two_pages_looks_up_the_first_one_only(raw: Raw) -> None:
    """Engine.drop removes exactly one page at a time."""
    first, second = CODE, CODE + PAGE
    frames = {first: 0x40000, second: 0x60000}
    for va, frame in frames.items():
        raw.code(answer(raw, 1), va, frame)
        raw.run(va)
        raw.poke(frame, answer(raw, 2))
    raw.uc.ctl_remove_cache(first, second + PAGE)
    raw.run(first)
    assert raw[2] == 2
    raw.run(second)
    assert raw[2] == 1


def test_code_is_found_by_its_frame(raw: Raw) -> None:
    """A page mapped to another frame runs that frame's code after a flush alone; mapped back, the old code is kept."""
    raw.code(answer(raw, 1))
    raw.run()
    raw.poke(DATA, answer(raw, 2))
    raw.map(CODE, DATA, R | X)
    raw.flush_tlb()
    raw.run()
    assert raw[2] == 2
    raw.map(CODE, CODE, R | X)
    raw.flush_tlb()
    raw.run()
    assert raw[2] == 1


@pytest.mark.parametrize("entered_first", [True, False])
def test_a_store_through_an_entry_older_than_the_code_leaves_old_code(raw: Raw, entered_first: bool) -> None:
    """Writable xor executable for each entry alone is wrong: handing out X has to revoke W at every address.

    Through an entry made after the translation the engine does notice the store.
    """
    alias = DATA + PAGE
    raw.code(answer(raw, 1))
    raw.map(alias, CODE, R | W)
    raw.code(words(a64.str(2, 1, 0, 4), a64.WFI) if raw.arm else words(rv64.sw(2, 1, 0), rv64.WFI), DATA)
    if entered_first:
        raw[1] = alias + 0x800
        raw.run(DATA)
    raw.run()
    new = int.from_bytes(answer(raw, 2)[:4], "little")
    raw[1], raw[2] = alias, new
    assert raw.run(DATA) == uc.UC_ERR_OK
    assert raw.peek(CODE, 4) == new
    raw.flush_tlb()
    raw.run()
    assert raw[2] == (1 if entered_first else 2)


def test_a_store_to_a_page_that_is_writable_and_executable_does_drop_code(raw: Raw) -> None:
    """What the engine would do by itself, at the price of a slow path for every store to such a page."""
    raw.code(answer(raw, 1))
    raw.map(CODE, rights=R | W | X)
    raw.run()
    new = int.from_bytes(answer(raw, 2)[:4], "little")
    raw.code(words(a64.str(2, 1, 0, 4), a64.WFI) if raw.arm else words(rv64.sw(2, 1, 0), rv64.WFI), DATA)
    raw[1], raw[2] = CODE, new
    raw.run(DATA)
    raw.run()
    assert raw[2] == 2


def test_a_chained_loop_does_not_notice_that_its_page_was_revoked(raw: Raw) -> None:
    """Zap and flush are not enough for a vCPU that runs: every flush comes with a kick."""
    raw.code(loop_that_stores(raw))

    def revoke(value: int) -> None:
        if value == 10:
            raw.table.pop(CODE // PAGE)
            raw.flush_tlb()

    device(raw, revoke)
    raw[2], raw[3] = 0, 1000
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert (raw[2], raw.pc) == (1000, CODE + 16)  # the page is looked up for the first block behind the loop


def test_a_stop_in_the_block_hook_ends_a_chained_loop(raw: Raw) -> None:
    """A kick is a word that the block hook turns into a stop: the vCPU leaves at the next block start."""
    raw.code(loop_that_stores(raw))
    kicked: list[int] = []

    def block(engine: Uc, _address: int, _size: int, _user: object) -> None:
        if kicked:
            engine.emu_stop()

    raw.uc.hook_add(uc.UC_HOOK_BLOCK, block)

    def revoke(value: int) -> None:
        if value == 10:
            raw.table.pop(CODE // PAGE)
            raw.flush_tlb()
            kicked.append(value)

    device(raw, revoke)
    raw[2], raw[3] = 0, 1000
    assert raw.run() == uc.UC_ERR_OK
    assert (raw[2], raw.pc) == (10, CODE)
    kicked.clear()
    assert raw.run(raw.pc) == uc.UC_ERR_EXCEPTION
    assert raw.fills[-1] == (CODE, FETCH)


@pytest.mark.parametrize("blocks", [1, 2])
def test_dropping_code_ends_a_chain_except_of_a_block_to_itself(raw: Raw, blocks: int) -> None:
    """So it takes the place of no kick: an engine without a block hook has to be stopped, too."""
    if raw.arm:
        code = words(
            *(a64.add(2, 2, 1), a64.str(2, 1, 0, 4), a64.NOP if blocks == 1 else a64.b(4)),
            *(a64.subs(3, 3, 1), a64.cbnz(3, -16), a64.WFI),
        )
    else:
        code = words(
            *(rv64.addi(2, 2, 1), rv64.sw(2, 1, 0), rv64.NOP if blocks == 1 else rv64.jal(0, 4)),
            *(rv64.addi(3, 3, -1), rv64.bne(3, 0, -16), rv64.WFI),
        )
    raw.code(code)

    def revoke(value: int) -> None:
        if value == 10:
            raw.uc.ctl_remove_cache(CODE, CODE + PAGE)
            raw.table.pop(CODE // PAGE)
            raw.flush_tlb()

    device(raw, revoke)
    raw[2], raw[3] = 0, 1000
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert (raw[2], raw.pc) == ((1000, CODE + 20) if blocks == 1 else (10, CODE + 12))


def test_the_block_hook_is_told_bytes_and_comes_again_after_a_fault_in_the_block(raw: Raw) -> None:
    """Instructions are counted by blocks; a fault takes back what did not run, and the rest comes as a block."""
    blocks = []
    raw.uc.hook_add(uc.UC_HOOK_BLOCK, lambda _e, address, size, _u: blocks.append((address - CODE, size)))
    if raw.arm:
        code = words(a64.add(3, 3, 1), a64.add(3, 3, 1), a64.ldr(2, 1), a64.add(3, 3, 1), a64.WFI)
        at, end = 8, 20
    else:
        code = join(rv64.c_addi(3, 1), rv64.c_addi(3, 1), rv64.ld(2, 1, 0), rv64.c_addi(3, 1), rv64.WFI)
        at, end = 4, 14
    raw.code(code)
    raw[1] = DATA
    assert raw.run() == uc.UC_ERR_EXCEPTION
    assert raw.pc == CODE + at
    raw.map(DATA)
    assert raw.run(raw.pc) == uc.UC_ERR_OK
    assert blocks == [(0, end), (at, end - at)]


def test_a_code_hook_misses_blocks_that_exist(riscv64: Raw) -> None:
    """The walker places hooks on CSR instructions when it hands a page out for execution, before its translation."""
    riscv64.code(words(rv64.addi(2, 2, 1), rv64.addi(2, 2, 1), rv64.WFI))
    riscv64.run()
    seen: list[int] = []
    riscv64.uc.hook_add(uc.UC_HOOK_CODE, lambda _e, address, _s, _u: seen.append(address), None, CODE + 4, CODE + 4)
    riscv64.run()
    assert seen == []
    riscv64.uc.ctl_remove_cache(CODE, CODE + PAGE)
    riscv64.run()
    assert seen == [CODE + 4]


def test_a_code_hook_added_in_the_fill_of_a_fetch_sees_the_page_s_blocks(riscv64: Raw) -> None:
    """See above: this is where the walker adds them."""
    seen: list[int] = []

    def fill(address: int, access: int) -> None:
        if access == FETCH and not seen:
            seen.append(0)
            riscv64.uc.hook_add(
                uc.UC_HOOK_CODE, lambda _e, address, _s, _u: seen.append(address), None, CODE + 4, CODE + 4
            )

    riscv64.on_fill = fill
    riscv64.code(words(rv64.addi(2, 2, 1), rv64.addi(2, 2, 1), rv64.WFI))
    riscv64.run()
    assert seen == [0, CODE + 4]


def test_a_csr_instruction_ends_its_block(riscv64: Raw) -> None:
    """Riscv64._insn_hook sets the PC behind it: were it in mid-block, what follows would be counted twice."""
    blocks = []
    riscv64.uc.hook_add(uc.UC_HOOK_BLOCK, lambda _e, address, size, _u: blocks.append((address - CODE, size)))
    riscv64.code(words(rv64.addi(2, 2, 1), rv64.csrrs(5, rv64.CYCLE, 0), rv64.addi(2, 2, 1), rv64.WFI))
    riscv64.run()
    assert blocks == [(0, 8), (8, 8)]


@pytest.mark.parametrize("writes_pc", [False, True], ids=["result only", "PC too"])
def test_a_code_hook_can_do_the_work_of_its_instruction(riscv64: Raw, writes_pc: bool) -> None:
    """Counters are answered by writing the result and the PC behind the instruction, which then does not run."""
    from unicorn import riscv_const

    def count(engine: Uc, address: int, _size: int, _user: object) -> None:
        riscv64[5] = 0x1234
        if writes_pc:
            engine.reg_write(riscv_const.UC_RISCV_REG_PC, address + 4)

    riscv64.uc.hook_add(uc.UC_HOOK_CODE, count, None, CODE + 4, CODE + 4)
    riscv64.code(words(rv64.addi(2, 2, 1), rv64.addi(5, 0, 7), rv64.addi(2, 2, 1), rv64.WFI))
    riscv64[2] = 0
    assert riscv64.run() == uc.UC_ERR_OK
    assert (riscv64[2], riscv64[5]) == (2, 0x1234 if writes_pc else 7)


def test_remove_cache_inside_the_fill_hook_is_safe(raw: Raw) -> None:
    """Handing out W drops the frame's code in the middle of that fill; the store's own block, too, may be in it."""
    raw.code(loop_that_stores(raw))
    raw[1] = CODE + 0x800
    raw[2], raw[3] = 0, 5

    def fill(address: int, access: int) -> None:
        if access != FETCH and address == CODE:
            raw.map(SCRATCH, CODE, R | X)
            raw.uc.ctl_remove_cache(SCRATCH, SCRATCH + PAGE)
            raw.flush_tlb()
            raw.map(CODE, rights=R | W)
        elif access == FETCH and address == CODE:
            raw.map(CODE, rights=R | X)
            raw.flush_tlb()

    raw.on_fill = fill
    assert raw.run() == uc.UC_ERR_OK
    assert raw[2] == 5
    assert raw.peek(CODE + 0x800, 4) == 5
