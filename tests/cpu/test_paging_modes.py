"""Every mode and every size of an address space: one mapping somewhere, looked for there and beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.conftest import PAGE, Box
from xipvm.cpu import core

TABLES = 0x8000_0000
TTBR0, TTBR1, TCR, SCTLR = (3, 0, 2, 0, 0), (3, 0, 2, 0, 1), (3, 0, 2, 0, 2), (3, 0, 1, 0, 0)
BLOCKS = {1: 1 << 30, 2: 2 << 20, 3: PAGE}
MASK64 = (1 << 64) - 1
NO_FAULT = -1


class Memory:
    """Guest memory that holds page tables, one after the other."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.next = TABLES

    def new(self) -> int:
        self.next += PAGE
        return self.next

    def read(self, gpa: int, size: int) -> bytes:
        assert size == 8
        return self.words.get(gpa, 0).to_bytes(8, "little")


@pytest.fixture(scope="module")
def boxes() -> Iterator[dict[int, Box]]:
    """One of each kind for all examples."""
    made = {isa: Box(isa) for isa in (core.ARM64, core.RISCV64)}
    yield made
    for box in made.values():
        box.close()


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(16, 39),
    upper=st.booleans(),
    level=st.sampled_from([1, 2, 3]),
    address=st.integers(0, (1 << 48) - 1),
    target=st.integers(0, (1 << 44) - 1),
    asid=st.integers(0, 0xFFFF),
)
def test_arm64(boxes: dict[int, Box], size: int, upper: bool, level: int, address: int, target: int, asid: int) -> None:
    """T0SZ and T1SZ from 16 to 39: the first table is of level 0, 1 or 2, and may have from 2 to 512 entries."""
    engine, memory = boxes[core.ARM64].engine, Memory()
    bits = 64 - size
    first = 4 - -(-(bits - 12) // 9)
    level = max(level, first)
    block = BLOCKS[level]
    low = address & (1 << bits) - 1
    gva = (MASK64 << bits & MASK64 if upper else 0) | low
    target &= -block
    root = table = memory.new()
    for at in range(first, level):
        index = low >> 39 - 9 * at & (0x1FF if at > first else MASK64)
        memory.words[table + 8 * index] = memory.new() | 3
        table = memory.next
    index = low >> 39 - 9 * level & (0x1FF if level > first else MASK64)
    memory.words[table + 8 * index] = target | 1 << 10 | (3 if level == 3 else 1)

    engine.set_cp_reg(*SCTLR, engine.cp_reg(*SCTLR) | 1)
    engine.set_cp_reg(*(TTBR1 if upper else TTBR0), asid << 48 | root)
    other = 23 if not upper else 7  # EPD of the half that is not used
    engine.set_cp_reg(*TCR, size << (16 if upper else 0) | 2 << 30 | 5 << 32 | 1 << other)
    assert engine.translate(gva, core.WRITE, memory.read)[:3] == (target | gva & block - 1, NO_FAULT, level)
    assert engine.translate(gva ^ block, core.READ, memory.read)[1] == core.FAULT_TRANSLATION
    assert engine.translate(gva ^ 1 << 63, core.READ, memory.read)[1:3] == (core.FAULT_TRANSLATION, 0)
    if bits < 48:
        assert engine.translate(gva ^ 1 << bits, core.READ, memory.read)[1:3] == (core.FAULT_TRANSLATION, 0)


@settings(max_examples=300, deadline=None)
@given(
    levels=st.sampled_from([3, 4, 5]),
    level=st.integers(0, 4),
    address=st.integers(0, MASK64),
    target=st.integers(0, (1 << 56) - 1),
    asid=st.integers(0, 0xFFFF),
)
def test_riscv64(boxes: dict[int, Box], levels: int, level: int, address: int, target: int, asid: int) -> None:
    """Sv39, Sv48 and Sv57, with leaves on every level."""
    engine, memory = boxes[core.RISCV64].engine, Memory()
    level = min(level, levels - 1)
    bits, block = 12 + 9 * levels, PAGE << 9 * level
    low = address & (1 << bits) - 1
    gva = low | (MASK64 << bits & MASK64 if low >> bits - 1 else 0)
    target &= -block
    root = table = memory.new()
    for at in range(levels - 1, level, -1):
        memory.words[table + 8 * (low >> 12 + 9 * at & 0x1FF)] = memory.new() >> 2 | 1
        table = memory.next
    leaf = table + 8 * (low >> 12 + 9 * level & 0x1FF)
    memory.words[leaf] = target >> 2 | 0x47

    engine.set_reg(core.RISCV_PRIV, 3)
    engine.set_reg(core.RISCV_SATP, levels + 5 << 60 | asid << 44 | root >> 12)
    engine.set_reg(core.RISCV_PRIV, 1)
    assert engine.translate(gva, core.WRITE, memory.read)[:3] == (target | gva & block - 1, NO_FAULT, level)
    assert engine.translate(gva ^ block, core.READ, memory.read)[1] == core.FAULT_TRANSLATION
    assert engine.translate(gva ^ 1 << 63, core.READ, memory.read)[1] == core.FAULT_TRANSLATION
    assert engine.translate(gva ^ 1 << bits, core.READ, memory.read)[1] == core.FAULT_TRANSLATION
    if level:
        memory.words[leaf] |= 1 << 10 + 9 * level - 1
        assert engine.translate(gva, core.READ, memory.read)[1] == core.FAULT_TRANSLATION, "misaligned"
