"""Whether a guest's tables are the identity, on tables made by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xipvm.cpu.paging import arm64_not_identity, riscv_not_identity

GIB, MIB, PAGE = 1 << 30, 2 << 20, 4096


class Tables:
    """Tables in a memory that has nothing else."""

    def __init__(self) -> None:
        self.memory: dict[int, list[int]] = {}

    def table(self, entries: dict[int, int]) -> int:
        """A table with these entries; its address."""
        address = 0x8000_0000 + PAGE * len(self.memory)
        self.memory[address] = [entries.get(n, 0) for n in range(512)]
        return address

    def read(self, gpa: int, size: int) -> bytes | None:
        """As the machine reads physical memory."""
        found = self.memory.get(gpa & ~0xFFF)
        if found is None:
            return None
        offset = gpa & 0xFFF
        return struct.pack("<512Q", *found)[offset : offset + size]


@pytest.fixture
def tables() -> Tables:
    return Tables()


BLOCK, TABLE, LEAF = 0b01, 0b11, 0b11
AF = 1 << 10


def tcr(bits: int) -> int:
    """TCR_EL1 for an address space of ``bits`` with 4 KiB pages."""
    return 64 - bits


class TestArm64:
    def test_1_gib_blocks(self, tables: Tables) -> None:
        level1 = tables.table({n: n * GIB | AF | BLOCK for n in range(4)})
        assert arm64_not_identity(level1, tcr(39), tables.read) is None
        shifted = tables.table({0: AF | BLOCK, 1: 2 * GIB | AF | BLOCK})
        assert arm64_not_identity(shifted, tcr(39), tables.read) == (GIB, 2 * GIB)

    def test_every_level(self, tables: Tables) -> None:
        level3 = tables.table({n: 3 * GIB + 5 * MIB + n * PAGE | AF | LEAF for n in range(512)})
        level2 = tables.table({5: level3 | TABLE, 6: 3 * GIB + 6 * MIB | AF | BLOCK})
        level1 = tables.table({3: level2 | TABLE, 4: 4 * GIB | AF | BLOCK})
        level0 = tables.table({0: level1 | TABLE})
        assert arm64_not_identity(level0, tcr(48), tables.read) is None
        assert arm64_not_identity(level1, tcr(39), tables.read) is None
        tables.memory[level3][17] += PAGE
        at = 3 * GIB + 5 * MIB + 17 * PAGE
        assert arm64_not_identity(level0, tcr(48), tables.read) == (at, at + PAGE)

    def test_attributes_are_no_part_of_the_address(self, tables: Tables) -> None:
        upper = 0b111 << 52 | 1 << 63
        level1 = tables.table({1: GIB | upper | 0xFFC | BLOCK})
        assert arm64_not_identity(level1, tcr(39), tables.read) is None

    def test_nothing_mapped_is_the_identity(self, tables: Tables) -> None:
        assert arm64_not_identity(tables.table({}), tcr(48), tables.read) is None

    def test_a_table_where_no_memory_is_maps_nothing(self, tables: Tables) -> None:
        assert arm64_not_identity(0x4000, tcr(39), tables.read) is None
        level1 = tables.table({0: 0x4000 | TABLE, 1: 2 * GIB | BLOCK})
        assert arm64_not_identity(level1, tcr(39), tables.read) == (GIB, 2 * GIB)

    def test_a_first_table_of_a_few_entries(self, tables: Tables) -> None:
        """36 bits: 64 entries at level 1, and the table is aligned to its size only."""
        page = tables.table({})
        table = page + 512
        tables.memory[page][:] = [0xDEAD_BEEF_F001] * 512
        tables.memory[page][64:128] = [n * GIB | AF | BLOCK for n in range(64)]
        assert arm64_not_identity(table, tcr(36), tables.read) is None
        tables.memory[page][64 + 63] += GIB
        assert arm64_not_identity(table, tcr(36), tables.read) == (63 * GIB, 64 * GIB)

    def test_reserved_entries_map_nothing(self, tables: Tables) -> None:
        """A block at level 0, and the encoding of a block at level 3."""
        level3 = tables.table({0: 7 * PAGE | BLOCK})
        level2 = tables.table({0: level3 | TABLE})
        level1 = tables.table({0: level2 | TABLE})
        level0 = tables.table({0: level1 | TABLE, 1: 0x1000_0000 | BLOCK})
        assert arm64_not_identity(level0, tcr(48), tables.read) is None

    @pytest.mark.parametrize(("t0sz", "like"), [(0, 16), (15, 16), (40, 39), (63, 39)])
    def test_a_size_out_of_range_counts_as_the_nearest(self, tables: Tables, t0sz: int, like: int) -> None:
        table = tables.table({0: PAGE | LEAF, 1: 4 * MIB | AF | BLOCK})
        found = arm64_not_identity(table, like, tables.read)
        assert arm64_not_identity(table, t0sz, tables.read) == found

    @pytest.mark.parametrize("granule", [0b01, 0b10])
    def test_another_granule_is_not_followed(self, tables: Tables, granule: int) -> None:
        assert arm64_not_identity(tables.table({}), tcr(48) | granule << 14, tables.read) == (0, 0)

    def test_walks_that_are_turned_off(self, tables: Tables) -> None:
        """EPD0: no walk by TTBR0, so nothing is mapped."""
        level1 = tables.table({0: GIB | BLOCK})
        assert arm64_not_identity(level1, tcr(39), tables.read) == (0, GIB)
        assert arm64_not_identity(level1, tcr(39) | 1 << 7, tables.read) is None


V, RWX, AD = 1, 0b1110, 0xC0


def pte(address: int, flags: int) -> int:
    """A RISC-V entry."""
    return address >> 12 << 10 | flags


def satp(mode: int, root: int) -> int:
    return mode << 60 | root >> 12


class TestRiscv:
    @pytest.mark.parametrize("asid", [0, 0xFFFF])
    def test_gigapages(self, tables: Tables, asid: int) -> None:
        root = tables.table({n: pte(n * GIB, V | RWX | AD) for n in range(4)})
        assert riscv_not_identity(satp(8, root) | asid << 44, tables.read) is None
        tables.memory[root][2] = pte(3 * GIB, V | RWX)
        assert riscv_not_identity(satp(8, root) | asid << 44, tables.read) == (2 * GIB, 3 * GIB)

    def test_every_level(self, tables: Tables) -> None:
        leaf = tables.table({n: pte(2 * GIB + 9 * MIB + n * PAGE, V | RWX) for n in range(512)})
        middle = tables.table({9: pte(leaf, V), 10: pte(2 * GIB + 10 * MIB, V | RWX)})
        root = tables.table({2: pte(middle, V)})
        top = tables.table({0: pte(root, V)})
        assert riscv_not_identity(satp(8, root), tables.read) is None
        assert riscv_not_identity(satp(9, top), tables.read) is None
        tables.memory[leaf][511] = pte(PAGE, V | RWX)
        assert riscv_not_identity(satp(9, top), tables.read) == (2 * GIB + 9 * MIB + 511 * PAGE, PAGE)

    def test_the_upper_half_is_never_the_identity(self, tables: Tables) -> None:
        """Its virtual addresses have all upper bits set, whatever the numbers look like without them."""
        at = 256 * GIB
        root = tables.table({256: pte(at, V | RWX)})
        assert riscv_not_identity(satp(8, root), tables.read) == (0xFFFF_FFC0_0000_0000, at)
        top = tables.table({0: 0, 256: pte(tables.table({0: pte(256 << 39, V | RWX)}), V)})
        assert riscv_not_identity(satp(9, top), tables.read) == (0xFFFF_8000_0000_0000, 256 << 39)

    def test_bare_is_no_translation(self, tables: Tables) -> None:
        assert riscv_not_identity(0, tables.read) is None

    @pytest.mark.parametrize("mode", [1, 7, 10, 15])
    def test_other_modes_are_not_followed(self, tables: Tables, mode: int) -> None:
        assert riscv_not_identity(satp(mode, tables.table({})), tables.read) == (0, 0)

    def test_invalid_entries_map_nothing(self, tables: Tables) -> None:
        """V clear; and at the last level an entry without rights, which is no pointer there."""
        leaf = tables.table({0: pte(GIB, V)})
        root = tables.table({0: pte(tables.table({0: pte(leaf, V)}), V), 1: pte(7 * GIB, RWX)})
        assert riscv_not_identity(satp(8, root), tables.read) is None

    def test_a_table_where_no_memory_is_maps_nothing(self, tables: Tables) -> None:
        root = tables.table({0: pte(0x4000, V), 1: pte(2 * GIB, V | RWX)})
        assert riscv_not_identity(satp(8, root), tables.read) == (GIB, 2 * GIB)


@given(st.integers(0, 511), st.integers(0, 511), st.integers(0, 511), st.integers(0, (1 << 26) - 1))
def test_one_page_anywhere(top: int, middle: int, last: int, pfn: int) -> None:
    """For one mapped page both walks say what the arithmetic says."""
    tables = Tables()
    leaf = tables.table({last: pte(pfn << 12, V | RWX)})
    root = tables.table({top: pte(tables.table({middle: pte(leaf, V)}), V)})
    gva = top << 30 | middle << 21 | last << 12
    virtual = gva | (0xFFFF_FF80_0000_0000 if top >= 256 else 0)
    expected = None if virtual == pfn << 12 else (virtual, pfn << 12)
    assert riscv_not_identity(satp(8, root), tables.read) == expected

    tables = Tables()
    leaf = tables.table({last: pfn << 12 | LEAF})
    root = tables.table({top: tables.table({middle: leaf | TABLE}) | TABLE})
    assert arm64_not_identity(root, tcr(39), tables.read) == (None if gva == pfn << 12 else (gva, pfn << 12))
