"""What RV64 integer instructions compute, in Python: the expectations of the conformance programs.

Values are unsigned 64-bit integers. Every function takes the operands of one instruction and returns what its
destination register gets. Source: The RISC-V Instruction Set Manual, volume I, chapters I, M and A.
"""

from __future__ import annotations

from collections.abc import Callable

MASK = (1 << 64) - 1
Operation = Callable[[int, int], int]


def signed(value: int, bits: int = 64) -> int:
    """The low ``bits`` of ``value`` as a two's complement number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def extend(value: int, bits: int) -> int:
    """The low ``bits`` of ``value``, sign-extended to a register."""
    return signed(value, bits) & MASK


def divide(a: int, b: int, bits: int) -> int:
    """Signed quotient, rounded towards zero; -1 for a division by zero. Overflow wraps by itself."""
    x, y = signed(a, bits), signed(b, bits)
    if y == 0:
        return MASK
    quotient = abs(x) // abs(y)
    return extend(-quotient if (x < 0) != (y < 0) else quotient, bits)


def remainder(a: int, b: int, bits: int) -> int:
    """Signed remainder with the sign of the dividend; the dividend for a division by zero."""
    x, y = signed(a, bits), signed(b, bits)
    if y == 0:
        return extend(a, bits)
    rest = abs(x) % abs(y)
    return extend(-rest if x < 0 else rest, bits)


def divide_unsigned(a: int, b: int, bits: int) -> int:
    """Unsigned quotient; all ones for a division by zero."""
    x, y = a % (1 << bits), b % (1 << bits)
    return MASK if y == 0 else extend(x // y, bits)


def remainder_unsigned(a: int, b: int, bits: int) -> int:
    """Unsigned remainder; the dividend for a division by zero."""
    x, y = a % (1 << bits), b % (1 << bits)
    return extend(x if y == 0 else x % y, bits)


REGISTER: dict[str, Operation] = {
    "add": lambda a, b: (a + b) & MASK,
    "sub": lambda a, b: (a - b) & MASK,
    "sll": lambda a, b: a << (b & 63) & MASK,
    "slt": lambda a, b: int(signed(a) < signed(b)),
    "sltu": lambda a, b: int(a < b),
    "xor": lambda a, b: a ^ b,
    "srl": lambda a, b: a >> (b & 63),
    "sra": lambda a, b: signed(a) >> (b & 63) & MASK,
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "addw": lambda a, b: extend(a + b, 32),
    "subw": lambda a, b: extend(a - b, 32),
    "sllw": lambda a, b: extend(a << (b & 31), 32),
    "srlw": lambda a, b: extend((a & 0xFFFFFFFF) >> (b & 31), 32),
    "sraw": lambda a, b: signed(a, 32) >> (b & 31) & MASK,
}

MULTIPLY: dict[str, Operation] = {
    "mul": lambda a, b: a * b & MASK,
    "mulh": lambda a, b: signed(a) * signed(b) >> 64 & MASK,
    "mulhsu": lambda a, b: signed(a) * b >> 64 & MASK,
    "mulhu": lambda a, b: a * b >> 64,
    "mulw": lambda a, b: extend(a * b, 32),
    "div": lambda a, b: divide(a, b, 64),
    "divu": lambda a, b: divide_unsigned(a, b, 64),
    "divw": lambda a, b: divide(a, b, 32),
    "divuw": lambda a, b: divide_unsigned(a, b, 32),
    "rem": lambda a, b: remainder(a, b, 64),
    "remu": lambda a, b: remainder_unsigned(a, b, 64),
    "remw": lambda a, b: remainder(a, b, 32),
    "remuw": lambda a, b: remainder_unsigned(a, b, 32),
}

#: Immediate forms compute what their register forms do; the second member is the width of a shift amount, if it is one.
IMMEDIATE: dict[str, tuple[Operation, int | None]] = {
    "addi": (REGISTER["add"], None),
    "slti": (REGISTER["slt"], None),
    "sltiu": (REGISTER["sltu"], None),
    "xori": (REGISTER["xor"], None),
    "ori": (REGISTER["or"], None),
    "andi": (REGISTER["and"], None),
    "addiw": (REGISTER["addw"], None),
    "slli": (REGISTER["sll"], 6),
    "srli": (REGISTER["srl"], 6),
    "srai": (REGISTER["sra"], 6),
    "slliw": (REGISTER["sllw"], 5),
    "srliw": (REGISTER["srlw"], 5),
    "sraiw": (REGISTER["sraw"], 5),
}

BRANCH: dict[str, Callable[[int, int], bool]] = {
    "beq": lambda a, b: a == b,
    "bne": lambda a, b: a != b,
    "blt": lambda a, b: signed(a) < signed(b),
    "bge": lambda a, b: signed(a) >= signed(b),
    "bltu": lambda a, b: a < b,
    "bgeu": lambda a, b: a >= b,
}

#: Loads: bytes, and whether the value is sign-extended.
LOAD = {
    "lb": (1, True),
    "lbu": (1, False),
    "lh": (2, True),
    "lhu": (2, False),
    "lw": (4, True),
    "lwu": (4, False),
    "ld": (8, True),
}
STORE = {"sb": 1, "sh": 2, "sw": 4, "sd": 8}


def load(memory: bytes, offset: int, name: str) -> int:
    """What the load ``name`` at ``offset`` brings from ``memory``."""
    size, is_signed = LOAD[name]
    return int.from_bytes(memory[offset : offset + size], "little", signed=is_signed) & MASK


def atomic(name: str, bits: int) -> Operation:
    """What an atomic memory operation leaves in memory: (memory, register) -> memory, both ``bits`` wide."""
    mask = (1 << bits) - 1

    def operate(memory: int, register: int) -> int:
        register &= mask
        match name:
            case "swap":
                return register
            case "add":
                return (memory + register) & mask
            case "and":
                return memory & register
            case "or":
                return memory | register
            case "xor":
                return memory ^ register
            case "maxu":
                return max(memory, register)
            case "minu":
                return min(memory, register)
            case "max":
                return max(memory, register, key=lambda value: signed(value, bits))
            case "min":
                return min(memory, register, key=lambda value: signed(value, bits))
        raise ValueError(name)

    return operate


ATOMIC = ("add", "and", "max", "maxu", "min", "minu", "or", "swap", "xor")
