"""Whether a guest's own page tables map every address to itself.

Until the walker follows guest tables, an identity map is the only one a guest may turn on. The checks walk
all of it once, when the guest turns translation on or changes it: Armv8-A VMSAv8-64 stage 1 with a 4 KiB
granule (DDI 0487, D8.2 and D8.3) and RISC-V Sv39/Sv48 (Privileged Architecture, 10.4 and 10.5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

ReadPhysical = Callable[[int, int], bytes | None]

_ADDRESS = 0x0000_FFFF_FFFF_F000
_ADDRESS_ASID = 0x0000_FFFF_FFFF_FFFE  # what TTBR0 has beside the ASID
_TABLE = struct.Struct("<512Q")


def arm64_not_identity(ttbr0: int, tcr: int, read: ReadPhysical) -> tuple[int, int] | None:
    """(virtual, physical) of the first address that TTBR0 maps elsewhere, None when there is none.

    A granule other than 4 KiB counts as not identity at address 0.
    """
    if tcr >> 7 & 1:  # EPD0: no walks
        return None
    if tcr >> 14 & 3:
        return 0, 0
    bits = 64 - min(max(tcr & 0x3F, 16), 39)  # what is out of range counts as its end
    level = 4 - (bits - 12 + 8) // 9
    # The first table has what is left of the bits, and is aligned to its size.
    size = 8 << max(bits - (39 - 9 * level), 0)
    return _arm64_table(ttbr0 & _ADDRESS_ASID & ~(size - 1), size, level, 0, read)


def _arm64_table(table: int, size: int, level: int, base: int, read: ReadPhysical) -> tuple[int, int] | None:
    raw = read(table, size)
    if raw is None:
        return None  # an external abort on the walk: no translation at all
    shift = 39 - 9 * level
    for index, entry in enumerate(struct.unpack(f"<{size // 8}Q", raw)):
        if not entry & 1:
            continue
        gva = base + (index << shift)
        if entry & 2 and level < 3:
            different = _arm64_table(entry & _ADDRESS, 4096, level + 1, gva, read)
            if different is not None:
                return different
            continue
        if level == 0 or bool(entry & 2) != (level == 3):
            continue  # reserved: a fault
        gpa = entry & _ADDRESS & ~((1 << shift) - 1)
        if gpa != gva:
            return gva, gpa
    return None


def riscv_not_identity(satp: int, read: ReadPhysical) -> tuple[int, int] | None:
    """As ``arm64_not_identity``, for what ``satp`` names; modes other than Sv39 and Sv48 are not identity either."""
    mode = satp >> 60
    if mode == 0:
        return None
    if mode not in (8, 9):
        return 0, 0
    level = 2 if mode == 8 else 3
    return _riscv_table((satp & ((1 << 44) - 1)) << 12, level, 0, 1 << (20 + 9 * level), read)


def _riscv_table(table: int, level: int, base: int, upper: int, read: ReadPhysical) -> tuple[int, int] | None:
    """``upper`` is the address from which on all higher bits are ones."""
    raw = read(table, 4096)
    if raw is None:
        return None
    shift = 12 + 9 * level
    for index, entry in enumerate(_TABLE.unpack(raw)):
        if not entry & 1:
            continue
        gva = base + (index << shift)
        target = (entry >> 10 & ((1 << 44) - 1)) << 12
        if entry & 0b1110 == 0:
            different = None if level == 0 else _riscv_table(target, level - 1, gva, upper, read)
            if different is not None:
                return different
            continue
        virtual = gva if gva < upper else gva | (1 << 64) - upper
        if target != virtual:
            return virtual, target
    return None
