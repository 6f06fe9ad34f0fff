"""The address of an access, computed from the instruction: the engine, asked through a device, says the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.asm import a64, words
from tests.cpu.conftest import CODE, RX, Box
from xipvm.cpu import core
from xipvm.cpu.effective import arm64_address, fault_address, riscv64_address, riscv64_is_store

REGISTERS = st.integers(0, 30)
ADDRESSES = st.integers(0x100000, 0x1FFFFF)


class Prober:
    """Runs single instructions whose every data access is a device's."""

    def __init__(self, kind: int) -> None:
        self.box = Box(kind)
        self.code = self.box.page(CODE, rights=RX)
        self.accesses: list[tuple[str, int]] = []
        self.box.engine.on_miss = lambda gva, access: core.MMIO if access != core.FETCH else core.FAULT
        self.box.engine.on_read = self._read
        self.box.engine.on_write = self._write

    def _read(self, gpa: int, size: int) -> int:
        self.accesses.append(("read", gpa))
        return 0

    def _write(self, gpa: int, size: int, value: int) -> None:
        self.accesses.append(("write", gpa))

    def first(self, code: bytes) -> tuple[str, int] | None:
        """Kind and address of the first access of the instruction, None when it makes none."""
        self.accesses.clear()
        self.box.host.write(self.code, 0, code)
        self.box.engine.flush_tlb("probe")
        self.box.engine.kick = 0
        self.box.engine.run(CODE)
        while self.box.engine.stopped:
            self.box.engine.kick = 0
            self.box.engine.run(self.box.pc())
        return self.accesses[0] if self.accesses else None


@pytest.fixture(scope="module")
def arm() -> Iterator[Prober]:
    prober = Prober(core.ARM64)
    yield prober
    prober.box.close()


@pytest.fixture(scope="module")
def hart() -> Iterator[Prober]:
    prober = Prober(core.RISCV64)
    yield prober
    prober.box.close()


# AArch64, DDI 0487 C4.1.94 "Loads and Stores": fixed bits, and the fields that are drawn.
ARM_FORMS = {
    "unsigned offset": (0x39000000, 0xC0FFFFFF, (0, 1)),
    "unscaled": (0x38000000, 0xC01FF3FF, (0, 1)),
    "post-index": (0x38000400, 0xC01FF3FF, (0, 1)),
    "pre-index": (0x38000C00, 0xC01FF3FF, (0, 1)),
    "register": (0x38206800, 0xC01F13FF, (0, 1)),  # option x1x: LSL and SXTX come with bit 15
    "extended register": (0x38204800, 0xC01F93FF, (0, 1)),
    "pair": (0xA9000000, 0x003FFFFF, (0, 1)),
    "pair post-index": (0xA8800000, 0x003FFFFF, (0, 1)),
    "pair pre-index": (0xA9800000, 0x003FFFFF, (0, 1)),
    "ordered": (0x889FFC00, 0x400003FF, (0, 1)),
    "exclusive load": (0x885F7C00, 0x400003FF, (1,)),
    "vector, one register": (0x3D800000, 0x003FFFFF, (0, 1)),
    "vector, post-index": (0x3C800400, 0x001FF3FF, (0, 1)),
}


@settings(max_examples=250, deadline=None)
@given(form=st.sampled_from(sorted(ARM_FORMS)), bits=st.integers(0, (1 << 32) - 1), load=st.booleans(), data=st.data())
def test_arm64(arm: Prober, form: str, bits: int, load: bool, data: st.DataObject) -> None:
    base, free, directions = ARM_FORMS[form]
    assume(int(load) in directions)
    insn = base | bits & free | (1 << 22 if load else 0)
    rt, rn, rt2, rm = insn & 31, insn >> 5 & 31, insn >> 10 & 31, insn >> 16 & 31
    # What the architecture calls unpredictable: a pair of one register, a base that is written back and transferred.
    assume(not ("pair" in form and rt == rt2))
    assume(not ("index" in form and rn != 31 and rn in ((rt, rt2) if "pair" in form else (rt,))))
    engine = arm.box.engine
    for n in range(31):
        engine.set_reg(regid(n), 0)
    engine.set_reg(core.ARM64_SP, 0x180000)
    if "register" in form and form != "vector, one register" and rm != 31 and rm != rn:
        engine.set_reg(regid(rm), data.draw(st.sampled_from([0, 8, 0x1234, 0xFFFF_FFF8, 0x1_0000_0010])))
    if rn != 31:
        engine.set_reg(regid(rn), data.draw(ADDRESSES) & ~15)
    before = {f"x{n}": engine.reg(regid(n)) for n in range(31)}
    before |= {f"w{n}": before[f"x{n}"] & 0xFFFFFFFF for n in range(31)}
    before |= {"sp": engine.reg(core.ARM64_SP), "xzr": 0, "wzr": 0, "fp": before["x29"], "lr": before["x30"]}
    computed = arm64_address(words(insn), CODE, before.__getitem__)
    seen = arm.first(words(insn, a64.WFI))
    assume(seen is not None and engine.interrupt < 0)
    assert seen is not None
    assert computed is not None
    # An access that is not aligned arrives as aligned ones.
    assert computed & ~15 <= seen[1] <= computed


def regid(n: int) -> int:
    return core.ARM64_X0 + n if n < 29 else (core.ARM64_X29, core.ARM64_X30)[n - 29]


@pytest.mark.parametrize("insn", [a64.NOP, a64.add(1, 2, 3), a64.b(4), a64.UDF, a64.svc()])
def test_what_accesses_nothing_has_no_address(insn: int) -> None:
    assert arm64_address(words(insn), CODE, lambda name: 0) is None


@pytest.mark.parametrize(
    ("insn", "address"),
    [
        (0x58008000, CODE + 0x1000),  # ldr x0, .+0x1000
        (0x18FFFFE1, CODE - 4),  # ldr w1, .-4
        (0x98000062, CODE + 12),  # ldrsw x2, .+12
        (0x9C000080, CODE + 16),  # ldr q0, .+16
    ],
)
def test_a_literal(insn: int, address: int) -> None:
    assert arm64_address(words(insn), CODE, lambda name: 0) == address


@settings(max_examples=250, deadline=None)
@given(
    opcode=st.sampled_from([0x03, 0x23, 0x2F, 0x4000, 0x6000, 0xC000, 0xE000, 0x4002, 0x6002, 0xC002, 0xE002]),
    bits=st.integers(0, (1 << 32) - 1),
    address=ADDRESSES,
)
def test_riscv64(hart: Prober, opcode: int, bits: int, address: int) -> None:
    if opcode < 0x100:
        insn = bits & ~0x7F & 0xFFFFFFFF | opcode
        code = insn.to_bytes(4, "little")
    else:
        insn = opcode | bits & 0x1FFC
        code = insn.to_bytes(2, "little")
    for n in range(1, 32):
        hart.box.set_x(n, address & ~15)
    engine = hart.box.engine
    registers = [0, *(hart.box.x(n) for n in range(1, 32))]
    computed = riscv64_address(insn, registers.__getitem__)
    seen = hart.first(code + (0x10500073).to_bytes(4, "little"))
    assume(seen is not None and engine.interrupt < 0)
    assert seen is not None
    assert computed is not None
    assert computed & ~7 <= seen[1] <= computed
    if opcode != 0x2F:
        assert riscv64_is_store(insn) == (seen[0] == "write")


def test_an_atomic_is_a_store_and_a_reservation_a_load() -> None:
    lr, sc, amoadd = (0b00010 << 27 | 0x302F, 0b00011 << 27 | 0x302F, 0x302F)
    assert [riscv64_is_store(insn) for insn in (lr, sc, amoadd)] == [False, True, True]


@pytest.mark.parametrize(
    ("page", "computed", "address"),
    [
        pytest.param(0x5000, 0x5123, 0x5123, id="in the page"),
        pytest.param(0x5000, 0x4FFD, 0x5000, id="reaches into the page"),
        pytest.param(0x5000, None, 0x5000, id="unknown"),
    ],
)
def test_the_address_of_a_fault(page: int, computed: int | None, address: int) -> None:
    assert fault_address(page, computed) == address
