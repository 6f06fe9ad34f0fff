"""Two stages of translation: the guest's own tables, which are guest memory, and the shadow entries under them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.asm import a64, join, rv64, words
from tests.cpu.conftest import EXCEPTION, OK, PAGE, RW, RWX, RX, Box, R
from xipvm.cpu import core
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_PRESENT

#: Guest physical pages of the tables, by level from the root on, and of what they map.
ROOT, MIDDLE, LAST = 0x100000, 0x101000, 0x102000
TEXT, DATA = 0x200000, 0x201000
#: Where the guest has them.
VTEXT, VDATA, VALIAS, VOTHER = 0x400000, 0x401000, 0x402000, 0x403000

V_R_X, V_R_W = 0x0B, 0x07
A, D, U = 0x40, 0x80, 0x10
SV39 = 8 << 60

TTBR0, TCR, SCTLR = (3, 0, 2, 0, 0), (3, 0, 2, 0, 2), (3, 0, 1, 0, 0)
PSTATE_EL1, PSTATE_EL0 = 0x3C5, 0x3C0
RISCV_S, RISCV_U = 1, 0


class Paged:
    """A box whose guest translates: text and data of a page each, one table of each level."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.arm = box.arm
        self.engine = box.engine
        for gpa in (ROOT, MIDDLE, LAST, TEXT, DATA):
            box.page(gpa, rights=RW if gpa != TEXT else RWX)
        self.table(ROOT, 0, MIDDLE)
        self.table(MIDDLE, VTEXT >> 21, LAST)
        self.entry(VTEXT, TEXT, execute=True)
        self.entry(VDATA, DATA, write=True)

    def pfn(self, gpa: int) -> int:
        return self.box.sptes.get(gpa >> 12) >> PFN_SHIFT & (1 << 40) - 1

    def poke(self, gpa: int, data: bytes) -> None:
        self.box.host.write(self.pfn(gpa), gpa % PAGE, data)

    def peek(self, gpa: int) -> int:
        return int.from_bytes(self.box.host.read(self.pfn(gpa), gpa % PAGE, 8), "little")

    def table(self, table: int, index: int, target: int) -> None:
        value = target | 3 if self.arm else target >> 2 | 1
        self.poke(table + 8 * index, value.to_bytes(8, "little"))

    def entry_at(self, gva: int) -> int:
        """The gpa of the last level's entry for ``gva``."""
        return LAST + 8 * (gva >> 12 & 511)

    def entry(
        self, gva: int, gpa: int, *, write: bool = False, execute: bool = False, user: bool = False, bits: int = A | D
    ) -> None:
        if self.arm:
            value = gpa | 3 | (1 << 10 if bits & A else 0) | (0 if write else 1 << 7) | (1 << 6 if user else 0)
            value |= 0 if execute else 3 << 53
        else:
            value = gpa >> 2 | 3 | (4 if write else 0) | (8 if execute else 0) | (U if user else 0) | bits
        self.poke(self.entry_at(gva), value.to_bytes(8, "little"))

    def turn_on(self, engine: core.Engine | None = None, *, user: bool = False) -> None:
        engine = engine or self.engine
        if self.arm:
            engine.set_cp_reg(*TTBR0, ROOT)
            engine.set_cp_reg(*TCR, 25 | 1 << 23)
            engine.set_reg(core.ARM64_PSTATE, PSTATE_EL0 if user else PSTATE_EL1)
            engine.set_cp_reg(*SCTLR, engine.cp_reg(*SCTLR) | 1)
        else:
            engine.set_reg(core.RISCV_PRIV, 3)
            engine.set_reg(core.RISCV_SATP, SV39 | ROOT >> 12)
            engine.set_reg(core.RISCV_PRIV, RISCV_U if user else RISCV_S)

    def run(self, pc: int = VTEXT) -> int:
        code = self.engine.run(pc)
        while code == OK and self.engine.stopped:
            self.engine.kick = 0
            code = self.engine.run(self.box.pc())
        return code

    @property
    def fault(self) -> tuple[int, int, int]:
        """(page, kind, level)."""
        return self.engine.fault_address, self.engine.fault_kind, self.engine.fault_level


@pytest.fixture
def paged(box: Box) -> Paged:
    """A guest that loads x2 from VDATA, where there is 7."""
    paged = Paged(box)
    paged.poke(TEXT, box.load())
    paged.poke(DATA, b"\x07")
    box.set_x(1, VDATA)
    paged.turn_on()
    return paged


@pytest.fixture
def riscv(make_box: Callable[..., Box]) -> Paged:
    """The same on RISC-V."""
    paged = Paged(make_box(core.RISCV64))
    paged.poke(TEXT, paged.box.load())
    paged.box.set_x(1, VDATA)
    paged.turn_on()
    return paged


@pytest.fixture
def arm(make_box: Callable[..., Box]) -> Paged:
    """The same on AArch64."""
    paged = Paged(make_box(core.ARM64))
    paged.poke(TEXT, paged.box.load())
    paged.box.set_x(1, VDATA)
    paged.turn_on()
    return paged


# ---- through both stages


def test_both_stages_are_walked(paged: Paged) -> None:
    assert paged.run() == OK
    assert paged.box.x(2) == 7
    assert paged.box.misses == []


def test_a_table_that_the_host_has_taken_is_faulted_in_and_the_walk_begins_again(paged: Paged) -> None:
    """While it is brought back, the table above it is replaced: what was read of that is not believed."""
    box = paged.box
    spare, target = 0x103000, 0x202000
    box.page(spare, rights=RW)
    box.page(target, b"\x09", RW)
    wrong = paged.peek(paged.entry_at(VDATA))
    paged.poke(
        spare + paged.entry_at(VDATA) % PAGE, (wrong ^ (DATA ^ target) >> (0 if paged.arm else 2)).to_bytes(8, "little")
    )
    paged.poke(spare + paged.entry_at(VTEXT) % PAGE, paged.peek(paged.entry_at(VTEXT)).to_bytes(8, "little"))
    last = box.sptes.get(LAST >> 12)
    box.unmap(LAST)
    asked = []

    def miss(gpa: int, access: int) -> int:
        asked.append((gpa, access))
        box.sptes.set(LAST >> 12, last)
        paged.table(MIDDLE, VTEXT >> 21, spare)
        return core.RETRY_WALK

    box.engine.on_miss = miss
    assert paged.run() == OK
    assert asked == [(LAST, core.READ)]
    assert box.x(2) == 9


def test_nothing_behind_a_table_is_no_page_fault(paged: Paged) -> None:
    paged.box.unmap(MIDDLE)
    assert paged.run() == EXCEPTION
    assert paged.fault == (VTEXT, core.FAULT_WALK, 2 if paged.arm else 1)
    assert paged.box.misses == [(MIDDLE, core.READ)]


def test_nothing_behind_the_page_is_no_page_fault(paged: Paged) -> None:
    paged.box.unmap(DATA)
    assert paged.run() == EXCEPTION
    assert paged.fault[:2] == (VDATA, core.FAULT_ABSENT)
    assert paged.engine.fault_gpa == DATA


def test_a_device_behind_the_page(paged: Paged) -> None:
    paged.box.devices.add(0x900000)
    paged.entry(VDATA, 0x900000, write=True)
    paged.box.on_read = lambda gpa, size: gpa + size
    assert paged.run() == OK
    assert paged.box.x(2) & 0xFFFFFFFF == 0x900000 + 4


def test_a_miss_names_the_guest_physical_page(paged: Paged) -> None:
    paged.box.unmap(TEXT)
    assert paged.run() == EXCEPTION
    assert paged.box.misses == [(TEXT, core.FETCH)]


def test_no_entry_and_no_right(paged: Paged) -> None:
    level = 3 if paged.arm else 0
    paged.box.set_x(1, VOTHER)
    assert paged.run() == EXCEPTION
    assert paged.fault == (VOTHER, core.FAULT_TRANSLATION, level)
    assert paged.run(VDATA) == EXCEPTION
    assert paged.fault == (VDATA, core.FAULT_PERMISSION, level)
    assert paged.engine.fault_access == core.FETCH


# ---- bits


def test_a_write_sets_the_dirty_bit_and_a_read_does_not(riscv: Paged) -> None:
    riscv.entry(VDATA, DATA, write=True, bits=0)
    assert riscv.run() == OK
    assert riscv.peek(riscv.entry_at(VDATA)) & (A | D) == A
    riscv.poke(TEXT, riscv.box.store_word())
    assert riscv.run() == OK
    assert riscv.peek(riscv.entry_at(VDATA)) & (A | D) == A | D


def test_bits_are_set_by_way_of_a_writable_entry_of_the_host(riscv: Paged) -> None:
    """A write-protected table (a dirty log, a copy on write) is a write fault of the host's."""
    riscv.entry(VDATA, DATA, write=True, bits=0)
    riscv.box.sptes.set(LAST >> 12, riscv.pfn(LAST) << PFN_SHIFT | SPTE_PRESENT | R)
    asked = []

    def miss(gpa: int, access: int) -> int:
        asked.append((gpa, access))
        riscv.box.page(LAST, rights=RW, pfn=riscv.pfn(LAST))
        return core.RETRY_WALK

    riscv.engine.on_miss = miss
    assert riscv.run() == OK
    assert asked == [(LAST, core.WRITE)]
    assert riscv.peek(riscv.entry_at(VDATA)) & A


def test_bits_that_cannot_be_set_are_a_page_fault(riscv: Paged) -> None:
    riscv.entry(VDATA, DATA, write=True, bits=0)
    riscv.box.sptes.set(LAST >> 12, riscv.pfn(LAST) << PFN_SHIFT | SPTE_PRESENT | R)
    riscv.box.devices.add(LAST)  # flash: to be read, but writes are the device's
    assert riscv.run() == EXCEPTION
    assert riscv.fault == (VDATA, core.FAULT_PERMISSION, 0)


def test_a_table_in_a_frame_of_code(riscv: Paged) -> None:
    """Setting a bit changes bytes that may have been executed."""
    code = LAST + 0x800
    riscv.poke(code, riscv.box.answer(1))
    riscv.box.page(LAST, rights=RWX, pfn=riscv.pfn(LAST))
    riscv.entry(VOTHER, LAST, execute=True)
    assert riscv.run(VOTHER + 0x800) == OK
    assert riscv.box.group.executed(riscv.pfn(LAST), 1) == 1
    riscv.entry(VDATA, DATA, write=True, bits=0)
    riscv.engine.guest_flush()
    assert riscv.run(VTEXT) == OK
    assert riscv.peek(riscv.entry_at(VDATA)) & A
    assert riscv.run(VOTHER + 0x800) == OK


def test_an_access_flag_is_the_guest_s_to_set(arm: Paged) -> None:
    arm.entry(VDATA, DATA, write=True, bits=0)
    assert arm.run() == EXCEPTION
    assert arm.fault == (VDATA, core.FAULT_ACCESS_FLAG, 3)


# ---- who and what


def test_a_page_to_be_executed_only(arm: Paged) -> None:
    """EL0 may execute what it may not read: the entry for the fetch must not let it."""
    arm.poke(arm.entry_at(VTEXT), (TEXT | 3 | 1 << 10 | 1 << 7 | 1 << 53).to_bytes(8, "little"))  # AP: no EL0; PXN
    arm.box.set_x(1, VTEXT)
    arm.turn_on(user=True)
    assert arm.run() == EXCEPTION
    assert arm.fault == (VTEXT, core.FAULT_PERMISSION, 3)
    assert arm.engine.fault_access == core.READ


def test_an_unprivileged_load(arm: Paged) -> None:
    arm.poke(TEXT, words(0xF8400822, a64.WFI))  # ldtr x2, [x1]
    assert arm.run() == EXCEPTION
    assert arm.fault == (VDATA, core.FAULT_PERMISSION, 3)
    arm.entry(VDATA, DATA, user=True)
    arm.engine.guest_flush()
    assert arm.run() == OK


def test_what_the_kernel_had_is_not_the_user_s(paged: Paged) -> None:
    """The same addresses, without a flush in between."""
    paged.entry(VTEXT, TEXT, execute=True, user=True)
    if not paged.arm:
        paged.entry(VOTHER, TEXT, execute=True)  # S mode executes no page of U mode's
    assert paged.run(VTEXT if paged.arm else VOTHER) == OK
    if paged.arm:
        paged.engine.set_reg(core.ARM64_PSTATE, PSTATE_EL0)
        paged.engine.set_cp_reg(3, 0, 5, 2, 0, 0)  # derive the flags anew
    else:
        paged.engine.set_reg(core.RISCV_PRIV, RISCV_U)
    assert paged.run() == EXCEPTION
    assert paged.fault[:2] == (VDATA, core.FAULT_PERMISSION)


def test_other_granules_say_so(arm: Paged) -> None:
    arm.engine.set_cp_reg(*TCR, 25 | 1 << 23 | 2 << 14)
    assert arm.run() == EXCEPTION
    assert arm.fault[1] == core.FAULT_GRANULE


# ---- TLBs


def test_a_flush_of_the_guest_s_is_nobody_else_s(paged: Paged) -> None:
    """What is recorded of a TLB is which frames it may have: the guest's own tables do not matter to that."""
    inserts: list[int] = []
    flushes: list[str] = []
    paged.engine.record_inserts(True)
    paged.engine.on_insert = lambda gfn, pfn, perms: inserts.append(gfn)
    paged.engine.on_flush = flushes.append
    assert paged.run() == OK
    assert sorted(inserts) == [TEXT >> 12, DATA >> 12]
    before = paged.engine.flushes
    paged.entry(VDATA, TEXT)
    paged.engine.guest_flush()
    assert paged.run() == OK
    assert paged.box.x(2) == int.from_bytes(paged.box.load(), "little")
    assert (len(inserts), flushes, paged.engine.flushes) == (2, [], before)


def test_the_guest_s_own_flush_and_new_tables(paged: Paged) -> None:
    """SFENCE.VMA and TLBI; a write of satp or TTBR0, of the same ASID."""
    box = paged.box
    root, middle, last, data = 0x104000, 0x105000, 0x106000, 0x203000
    for gpa in (root, middle, last, data):
        box.page(gpa, rights=RW)
    paged.poke(data, b"\x0b")
    paged.table(root, 0, middle)
    paged.table(middle, VTEXT >> 21, last)
    for gva in (VTEXT, VDATA):
        paged.poke(last + paged.entry_at(gva) % PAGE, paged.peek(paged.entry_at(gva)).to_bytes(8, "little"))
    shift = 0 if paged.arm else 2
    changed = paged.peek(paged.entry_at(VDATA)) ^ (DATA ^ data) >> shift
    paged.poke(last + paged.entry_at(VDATA) % PAGE, changed.to_bytes(8, "little"))
    box.set_x(4, root if paged.arm else SV39 | root >> 12)
    switch = a64.msr(TTBR0, 4) if paged.arm else rv64.csrrw(0, rv64.SATP, 4)
    paged.poke(
        TEXT, (words(a64.ldr(3, 1), switch, a64.ISB) if paged.arm else join(rv64.ld(3, 1, 0), switch)) + box.load()
    )
    assert paged.run() == OK
    assert (box.x(3), box.x(2)) == (7, 0x0B)


def test_maintenance_for_all_cpus_reaches_all(make_box: Callable[..., Box]) -> None:
    box = make_box(core.ARM64, engines=2)
    paged = Paged(box)
    first, second = box.engines
    paged.poke(DATA, b"\x07")
    other = box.page(0x204000, b"\x08", RW)
    assert other
    paged.poke(TEXT, box.load())
    for engine in (first, second):
        box.set_x(1, VDATA, engine)
        paged.turn_on(engine)
    assert second.run(VTEXT) == OK
    paged.entry(VDATA, 0x204000, write=True)
    assert second.run(VTEXT) == OK
    assert box.x(2, second) == 7, "an entry may stay until it is told"
    paged.poke(TEXT + 0x100, words(0xD508831F, a64.WFI))  # tlbi vmalle1is
    assert first.run(VTEXT + 0x100) == OK
    code = second.run(VTEXT)
    while second.stopped:
        second.kick = 0
        code = second.run(box.pc(second))
    assert code == OK
    assert box.x(2, second) == 8


# ---- code


def test_code_is_found_by_its_virtual_address(paged: Paged) -> None:
    code = paged.box.load()
    assert paged.run() == OK
    assert paged.engine.read_code(VTEXT, len(code)) == code
    assert paged.engine.last_code == TEXT


def test_a_frame_that_is_written_at_one_address_and_executed_at_another(paged: Paged) -> None:
    box = paged.box
    paged.entry(VALIAS, DATA, execute=True)
    box.page(DATA, rights=RWX, pfn=paged.pfn(DATA))
    paged.poke(TEXT, box.store_word())
    for value in range(100):  # more turns than a frame keeps being one or the other
        box.set_x(1, VDATA)
        box.set_x(2, box.answer_insn(value))
        paged.poke(DATA + 4, box.answer(0)[4:]) if value == 0 else None
        assert paged.run() == OK
        assert paged.run(VALIAS) == OK
        assert box.x(2) == value


def test_blocks_are_counted_by_what_their_address_space_has_there(riscv: Paged) -> None:
    """Two processes with code of other lengths at the same address, and M mode, which is not translated, at it, too."""
    box, engine = riscv.box, riscv.engine
    short = join(*[rv64.c_addi(5, 1)] * 8, rv64.WFI)
    long = join(*[rv64.addi(5, 5, 1)] * 4, rv64.WFI)
    other = 0x205000
    box.page(other, long, RX)
    box.page(VTEXT, join(*[rv64.c_addi(5, 1)] * 2, *[rv64.addi(5, 5, 1)] * 3, rv64.WFI), RX)
    riscv.poke(TEXT, short)
    for _ in range(3):
        before = engine.insns
        riscv.entry(VTEXT, TEXT, execute=True)
        engine.guest_flush()
        assert riscv.run() == OK
        assert engine.insns - before == 9
        riscv.entry(VTEXT, other, execute=True)
        engine.guest_flush()
        assert riscv.run() == OK
        assert engine.insns - before == 9 + 5
        engine.set_reg(core.RISCV_PRIV, 3)
        assert riscv.run() == OK
        assert engine.insns - before == 9 + 5 + 6
        engine.set_reg(core.RISCV_PRIV, RISCV_S)


def test_a_return_from_a_trap_changes_what_an_address_is(riscv: Paged) -> None:
    """MRET goes on at its own address plus four, which is another page of memory by then."""
    box, engine = riscv.box, riscv.engine
    box.page(VTEXT, words(rv64.MRET, rv64.addi(5, 5, 1), rv64.WFI), RX)
    riscv.poke(TEXT, join(rv64.addi(0, 0, 0), *[rv64.c_addi(5, 1)] * 2, rv64.WFI))
    engine.set_reg(core.RISCV_PRIV, 3)
    engine.set_reg(core.RISCV_MEPC, VTEXT + 4)
    engine.set_reg(core.RISCV_MSTATUS, 1 << 11)  # to S mode
    assert riscv.run() == OK
    assert box.x(5) == 2
    assert engine.insns == 1 + 3


# ---- questions


def test_translate_changes_nothing(paged: Paged) -> None:
    def read(gpa: int, size: int) -> bytes | None:
        return paged.box.host.read(paged.pfn(gpa), gpa % PAGE, size) if paged.box.sptes.get(gpa >> 12) else None

    paged.entry(VDATA, DATA, write=True, bits=A)
    entry = paged.peek(paged.entry_at(VDATA))
    level = 3 if paged.arm else 0
    assert paged.engine.translate(VDATA + 5, core.WRITE, read) == (DATA + 5, -1, level, entry)
    assert paged.peek(paged.entry_at(VDATA)) == entry
    assert paged.engine.translate(VOTHER, core.READ, read)[1:3] == (core.FAULT_TRANSLATION, level)
    assert paged.engine.translate(VDATA, core.READ, read, privilege=0)[1] == core.FAULT_PERMISSION
    assert paged.engine.translate(VDATA, core.READ, lambda gpa, size: None)[1] == core.FAULT_WALK
    assert paged.box.misses == []

    def fails(gpa: int, size: int) -> bytes | None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        paged.engine.translate(VDATA, core.READ, fails)


def test_without_translation_an_address_is_what_it_is(box: Box) -> None:
    assert box.engine.translate(0x1234, core.READ, lambda gpa, size: None) == (0x1234, -1, 0, 0)


def test_an_engine_that_goes_back_translates_no_more(paged: Paged) -> None:
    assert paged.run() == OK
    paged.engine.reset_cpu()
    if not paged.arm:
        paged.engine.set_reg(core.RISCV_PRIV, 3)
    assert paged.engine.run(VTEXT) == EXCEPTION
    assert paged.box.misses[-1] == (VTEXT, core.FETCH)
