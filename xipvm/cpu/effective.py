"""The address that a load or store at some PC accesses, from the instruction and the registers.

The engine reports the page of a fault, not its address; guests and people want the address. AArch64's
addressing modes are left to capstone; RISC-V's are few, and capstone 5 does not give them for compressed
and atomic instructions (The RISC-V Instruction Set Manual, volume I, chapters 2, 13 and 26).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xipvm.address import PAGE_MASK

_MASK = 0xFFFF_FFFF_FFFF_FFFF

_arm64: Any = None


def fault_address(page: int, computed: int | None) -> int:
    """The address of a fault in the page at ``page``: the access's own, or the page's start when it reaches into it."""
    if computed is not None and computed & PAGE_MASK == page & PAGE_MASK:
        return computed
    return page


def arm64_address(code: bytes, pc: int, register: Callable[[str], int]) -> int | None:
    """The first byte that the instruction ``code`` at ``pc`` accesses; None when it is no load or store.

    ``register(name)`` gives a register's value by its assembler name (``x3``, ``w3``, ``sp``).
    """
    global _arm64
    insn = int.from_bytes(code, "little")
    if insn & 0x3B00_0000 == 0x1800_0000:  # from a literal pool; capstone gives no memory operand
        return pc + (((insn >> 5 & 0x7_FFFF) ^ 0x4_0000) - 0x4_0000) * 4 & _MASK
    import capstone

    if _arm64 is None:
        _arm64 = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN)
        _arm64.detail = True
    for found in _arm64.disasm(code, pc, 1):
        for operand in found.operands:
            if operand.type != capstone.arm64.ARM64_OP_MEM:
                continue
            memory = operand.mem
            value = register(found.reg_name(memory.base))
            if memory.index:
                name = found.reg_name(memory.index)
                index = register(name)
                if name.startswith("w"):
                    index &= 0xFFFF_FFFF
                    if operand.ext == capstone.arm64.ARM64_EXT_SXTW and index >> 31:
                        index -= 1 << 32
                value += index << operand.shift.value
            # A post-indexed form accesses the base and adds afterwards.
            if not found.writeback or found.op_str.endswith("!"):
                value += int(memory.disp)
            return value & _MASK
    return None


def riscv64_address(insn: int, register: Callable[[int], int]) -> int | None:
    """As ``arm64_address``, for the instruction word ``insn``; ``register(n)`` gives integer register ``n``."""
    if insn & 3 == 3:
        opcode = insn & 0x7F
        base = insn >> 15 & 31
        if opcode in (0x03, 0x07):  # LOAD, LOAD-FP
            offset = insn >> 20
        elif opcode in (0x23, 0x27):  # STORE, STORE-FP
            offset = insn >> 25 << 5 | insn >> 7 & 31
        elif opcode == 0x2F:  # AMO
            return register(base)
        else:
            return None
        return (register(base) + ((offset & 0xFFF) ^ 0x800) - 0x800) & _MASK
    kind = insn >> 13 & 7
    quadrant = insn & 3
    if quadrant == 0 and kind & 3:
        offset = (insn >> 10 & 7) << 3
        if kind & 3 == 2:  # c.lw, c.sw
            offset |= (insn >> 6 & 1) << 2 | (insn >> 5 & 1) << 6
        else:  # c.fld, c.ld, c.fsd, c.sd
            offset |= (insn >> 5 & 3) << 6
        return register(8 + (insn >> 7 & 7)) + offset & _MASK
    if quadrant == 2 and kind & 3:
        if kind in (1, 3):  # c.fldsp, c.ldsp
            offset = (insn >> 12 & 1) << 5 | (insn >> 5 & 3) << 3 | (insn >> 2 & 7) << 6
        elif kind == 2:  # c.lwsp
            offset = (insn >> 12 & 1) << 5 | (insn >> 4 & 7) << 2 | (insn >> 2 & 3) << 6
        elif kind == 6:  # c.swsp
            offset = (insn >> 9 & 15) << 2 | (insn >> 7 & 3) << 6
        else:  # c.fsdsp, c.sdsp
            offset = (insn >> 10 & 7) << 3 | (insn >> 7 & 7) << 6
        return register(2) + offset & _MASK
    return None


def riscv64_is_store(insn: int) -> bool:
    """Whether a trap of the load, store or atomic ``insn`` is a store's (an LR is a load, every other AMO a store)."""
    if insn & 3 == 3:
        return insn & 0x7F in (0x23, 0x27) or (insn & 0x7F == 0x2F and insn >> 27 != 2)
    return bool(insn >> 15 & 1)
