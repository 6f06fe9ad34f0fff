"""The conformance programs: assembler text for each RV64 user-level instruction, with expectations from the model.

A program is a sequence of numbered cases: gp holds the number, and a case that goes wrong jumps to ``fail``. Where an
instruction is a function of two operands its cases are a table in memory and one loop; the rest is written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import model

#: Operands: small ones, the ends of both widths, patterns, and what a shift amount may look like.
VALUES = (
    *(0, 1, 31, 32, 63),
    *(value & model.MASK for value in (-1, -64)),
    *(0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF80000000),
    *(0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0x0123456789ABCDEF),
)
IMMEDIATES = (0, 1, 2, 0x555, 2047, -1, -2, -0x556, -2048)
PATTERN = bytes((i * 0x3B + 0x85) & 0xFF for i in range(32))


class Program:
    """Assembler text being written: code, data, and the number of the next case."""

    def __init__(self) -> None:
        self.code: list[str] = []
        self.data: list[str] = []
        self.case = 2  # 1 in gp means success

    def text(self) -> str:
        """The whole source; it is assembled behind environment.S."""
        return "\n".join(
            [
                *(".option norvc", ".text", ".globl program", "program:", *self.code, "    j pass"),
                *(".data", ".balign 4096", *self.data, ""),
            ]
        )

    def emit(self, *lines: str) -> None:
        """Appends instructions and labels."""
        self.code += [line if line.endswith(":") else f"    {line}" for line in lines]

    def expect(self, register: str, value: int, *lines: str) -> None:
        """One case: after ``lines`` the register holds ``value``. Uses t2."""
        self.emit(f"li gp, {self.case}", *lines, f"li t2, {hex(value & model.MASK)}", f"bne {register}, t2, fail")
        self.case += 1

    def table(self, rows: Iterable[tuple[int, ...]], *lines: str) -> None:
        """One case for each row: ``lines`` find its columns in a0, a1, ... and jump to ``fail`` if they do not fit."""
        rows = list(rows)
        label = f"table{len(self.data)}"
        self.data += [f"{label}: .dword " + ", ".join(hex(column) for row in rows for column in row)]
        self.emit(f"li gp, {self.case}", f"la s0, {label}", f"la s1, {label} + {8 * len(rows[0]) * len(rows)}", "1:")
        self.emit(*(f"ld a{index}, {8 * index}(s0)" for index in range(len(rows[0]))), *lines)
        self.emit(f"addi s0, s0, {8 * len(rows[0])}", "addi gp, gp, 1", "bltu s0, s1, 1b")
        self.case += len(rows)


def register_operation(name: str, operation: model.Operation) -> Program:
    """rd, rs1, rs2 all different, rd the same as either, rs1 the same as rs2, rd = x0."""
    program = Program()
    program.table(
        ((a, b, operation(a, b)) for a, b in itertools.product(VALUES, repeat=2)),
        *(f"{name} t0, a0, a1", "bne t0, a2, fail"),
        *("mv t0, a0", f"{name} t0, t0, a1", "bne t0, a2, fail"),
        *("mv t0, a1", f"{name} t0, a0, t0", "bne t0, a2, fail"),
        *(f"{name} zero, a0, a1", "bnez zero, fail"),
    )
    program.table(((a, operation(a, a)) for a in VALUES), f"{name} t0, a0, a0", "bne t0, a1, fail")
    program.table(((b, operation(0, b)) for b in VALUES), f"{name} t0, zero, a0", "bne t0, a1, fail")
    program.table(((a, operation(a, 0)) for a in VALUES), f"{name} t0, a0, zero", "bne t0, a1, fail")
    return program


def immediate_operation(name: str, operation: model.Operation, shift: int | None) -> Program:
    """Every immediate on every value; rd the same as rs1; rd = x0."""
    program = Program()
    for immediate in IMMEDIATES if shift is None else (0, 1, 7, 14, 31, 32, 63)[: 7 if shift == 6 else 5]:
        program.table(
            ((a, operation(a, immediate & model.MASK)) for a in VALUES),
            *(f"{name} t0, a0, {immediate}", "bne t0, a1, fail"),
            *("mv t0, a0", f"{name} t0, t0, {immediate}", "bne t0, a1, fail"),
            *(f"{name} zero, a0, {immediate}", "bnez zero, fail"),
        )
    return program


def branch(name: str) -> Program:
    """Forward and backward, taken and not taken."""
    program = Program()
    program.table(
        ((a, b, int(model.BRANCH[name](a, b))) for a, b in itertools.product(VALUES, repeat=2)),
        *("li t0, 1", f"{name} a0, a1, 2f", "li t0, 0", "2:", "bne t0, a2, fail"),
        *("li t0, 0", "j 4f", "3:", "li t0, 1", "j 5f", "4:", f"{name} a0, a1, 3b", "5:", "bne t0, a2, fail"),
    )
    return program


def load(name: str) -> Program:
    """Every aligned place of a pattern, with the offset in the instruction, below and above the base."""
    program = Program()
    program.data += ["pattern: .byte " + ", ".join(map(hex, PATTERN))]
    size = model.LOAD[name][0]
    for place in range(0, len(PATTERN), size):
        value = model.load(PATTERN, place, name)
        program.expect("a1", value, "la a0, pattern", f"{name} a1, {place}(a0)")
        program.expect("a0", value, f"la a0, pattern + {len(PATTERN)}", f"{name} a0, {place - len(PATTERN)}(a0)")
    for offset in (-2048, 2047):
        program.expect(
            "a1", model.load(PATTERN, 0, name), "la a0, pattern", f"li a2, {-offset}", "add a0, a0, a2",
            f"{name} a1, {offset}(a0)",
        )  # fmt: skip
    program.expect("zero", 0, "la a0, pattern", f"{name} zero, 0(a0)")
    return program


def store(name: str) -> Program:
    """Every aligned place of 16 bytes: what is stored is there, and nothing else has changed."""
    program = Program()
    program.data += [".balign 8", "area: .dword 0, 0"]
    size = model.STORE[name]
    background = bytes.fromhex("deadbeefcafef00d0ff01ee12dd23cc3")
    for value, place in itertools.product((0x0123456789ABCDEF, 0xF0E1D2C3B4A59687), range(0, 16, size)):
        after = (
            background[:place] + (value & ((1 << 8 * size) - 1)).to_bytes(size, "little") + background[place + size :]
        )
        halves = [int.from_bytes(half, "little") for half in (background[:8], background[8:], after[:8], after[8:])]
        for base in (0, 16):
            fill = (f"li a1, {halves[0]:#x}", "sd a1, 0(a0)", f"li a1, {halves[1]:#x}", "sd a1, 8(a0)")
            act = (f"li a1, {value:#x}", f"la a2, area + {base}", f"{name} a1, {place - base}(a2)")
            program.expect("a3", halves[2], "la a0, area", *fill, *act, "ld a3, 0(a0)")
            program.expect("a3", halves[3], "ld a3, 8(a0)")
    return program


def upper(name: str) -> Program:
    """Lui and auipc: the upper 20 bits, sign-extended; auipc relative to itself."""
    program = Program()
    for immediate in (0, 1, 0x7FFFF, 0x80000, 0xFFFFF, 0x12345, 0xABCDE):
        value = model.extend(immediate << 12, 32)
        if name == "lui":
            program.expect("a0", value, f"lui a0, {immediate:#x}")
        else:
            program.expect("a0", value, "lla a1, 1f", "1:", f"auipc a0, {immediate:#x}", "sub a0, a0, a1")
    return program


def jump_and_link() -> Program:
    """Jal, forward and backward; the link; no link."""
    program = Program()
    program.expect("a0", 0, "lla a1, 2f", "jal a0, 3f", "2:", "j fail", "3:", "sub a0, a0, a1")
    program.expect(
        "a0", 0, "lla a1, 2f", "j 1f", "3:", "sub a0, a0, a1", "j 4f", "1:", "jal a0, 3b", "2:", "j fail", "4:"
    )
    program.expect("a0", 7, "li a0, 7", "jal zero, 1f", "li a0, 8", "1:")
    return program


def jump_and_link_register() -> Program:
    """Jalr: the link, the offset, the lowest bit cleared, the link in the base register."""
    program = Program()
    program.expect("a0", 0, "lla a1, 2f", "lla a2, 3f", "jalr a0, 0(a2)", "2:", "j fail", "3:", "sub a0, a0, a1")
    program.expect("a0", 0, "lla a1, 2f", "lla a0, 3f", "jalr a0, 0(a0)", "2:", "j fail", "3:", "sub a0, a0, a1")
    for offset in (1, -2048, 2046, 2047):
        bias = offset & ~1
        program.expect(
            "a3", 5, "li a3, 5", "lla a2, 3f", f"li a4, {-bias}", "add a2, a2, a4", f"jalr zero, {offset}(a2)",
            "li a3, 6", "3:",
        )  # fmt: skip
    return program


def misaligned() -> Program:
    """Misaligned loads and stores of every width, also over the edge of a page: user mode sees them work."""
    program = Program()
    program.data += [".balign 4096", ".zero 4080", "edge: .zero 32"]
    for name, size in model.STORE.items():
        for place in range(1 if size > 1 else 16, 17):
            value = 0x8192A3B4C5D6E7F8 & ((1 << 8 * size) - 1)
            zeros = tuple(f"sd zero, {8 * word}(a0)" for word in range(4))
            for read in (load for load, (width, _) in model.LOAD.items() if width == size):
                program.expect(
                    "a2", model.load(value.to_bytes(size, "little"), 0, read), "la a0, edge", *zeros,
                    f"li a1, {value:#x}", f"{name} a1, {place}(a0)", f"{read} a2, {place}(a0)",
                )  # fmt: skip
            program.expect("a2", 0, f"lbu a2, {place - 1}(a0)", f"lbu a3, {place + size}(a0)", "or a2, a2, a3")
    return program


def forwarding(store_first: bool) -> Program:
    """A load right behind a store of another width to the same place, or a store of what was just loaded."""
    program = Program()
    program.data += [".balign 8", "area: .dword 0, 0", "pattern: .byte " + ", ".join(map(hex, PATTERN))]
    for (write, size), (read, (width, _)) in itertools.product(model.STORE.items(), model.LOAD.items()):
        for place in range(0, 8, width):
            before = PATTERN[:8]
            value = 0xF7E6D5C4B3A29180
            if store_first:
                after = value.to_bytes(8, "little")[:size] + before[size:]
                lines = [f"li a2, {value:#x}", f"{write} a2, 0(a0)", f"{read} a3, {place}(a0)"]
                expected = model.load(after, place, read)
            else:
                loaded = model.load(PATTERN, 8 + place, read).to_bytes(8, "little")
                expected = int.from_bytes(loaded[:size] + before[size:], "little")
                lines = ["la a2, pattern", f"{read} a2, {8 + place}(a2)", f"{write} a2, 0(a0)", "ld a3, 0(a0)"]
            fill = (f"li a1, {int.from_bytes(before, 'little'):#x}", "sd a1, 0(a0)")
            program.expect("a3", expected, "la a0, area", *fill, *lines)
    return program


def atomic(name: str, bits: int) -> Program:
    """The old value to the register, the new one to memory; with every ordering; the address stays."""
    program = Program()
    program.data += [".balign 8", "cell: .dword 0, 0"]
    suffix = "d" if bits == 64 else "w"
    operate = model.atomic(name, bits)
    mask = (1 << bits) - 1
    rows = [
        (a & mask, b, model.extend(a, bits), model.extend(operate(a & mask, b), bits))
        for a, b in itertools.product(VALUES[::2] + VALUES[1::4], VALUES[:3] + VALUES[5:])
    ]
    for order in ("", ".aq", ".rl", ".aqrl"):
        instruction = f"amo{name}.{suffix}{order}"
        program.table(
            rows if order == "" else rows[::7],
            *("la t0, cell", f"s{suffix} a0, 0(t0)", f"{instruction} t1, a1, (t0)", "bne t1, a2, fail"),
            *(f"l{suffix} t1, 0(t0)", "bne t1, a3, fail"),
            *(f"s{suffix} a0, 0(t0)", f"{instruction} zero, a1, (t0)", f"l{suffix} t1, 0(t0)", "bne t1, a3, fail"),
        )
    program.expect("a2", 0x77, "la a0, cell", "sd zero, 0(a0)", "li a1, 0x77", "sd a1, 8(a0)",
                   f"amo{name}.{suffix} a1, a1, (a0)", "ld a2, 8(a0)")  # fmt: skip
    return program


def load_reserved() -> Program:
    """lr and sc of both widths: success, no reservation, another address, a used-up reservation, a counting loop."""
    program = Program()
    program.data += [".balign 64", "cell: .dword 0", ".balign 1024", "other: .dword 0"]
    for width, value in (("w", 0xFFFFFFFF89ABCDEF), ("d", 0x0123456789ABCDEF)):
        address = ("la a0, cell",)
        program.expect("a2", 1, *address, "li a1, 5", f"sc.{width} a2, a1, (a0)", "snez a2, a2")
        program.expect(
            "a2", 0, "sd zero, 0(a0)", f"lr.{width} a3, (a0)", f"li a1, {value:#x}", f"sc.{width} a2, a1, (a0)"
        )
        program.expect("a2", value, f"l{width} a2, 0(a0)")
        program.expect("a2", 1, "li a1, 9", f"sc.{width} a2, a1, (a0)", "snez a2, a2")
        program.expect("a2", value, f"lr.{width}.aq a2, (a0)")
        program.expect("a2", 1, "la a4, other", f"sc.{width}.rl a2, a1, (a4)", "snez a2, a2")
        program.expect("a2", value, f"l{width} a2, 0(a0)")
        program.expect(
            "a2", 1000, "sd zero, 0(a0)", "li a3, 1000", "1:", f"lr.{width}.aqrl a1, (a0)", "addi a1, a1, 1",
            f"sc.{width} a4, a1, (a0)", "bnez a4, 1b", "addi a3, a3, -1", "bnez a3, 1b", f"l{width} a2, 0(a0)",
        )  # fmt: skip
    return program


def fence_i() -> Program:
    """Code overwritten after it has run, ahead and behind; the fence makes the new instruction run."""
    program = Program()
    program.emit(".option push", ".option norvc", "lla s2, patched", "lla s3, replacement")
    program.expect("a0", 11, "call patched")
    program.expect("a0", 22, "lw a1, 0(s3)", "lw a2, 4(s3)", "sw a1, 0(s2)", "fence.i", "call patched")
    for round_ in range(16):
        other = f"li a3, {round_}"
        program.expect("a0", 22 if round_ % 2 else 33, "sw a1, 0(s2)" if round_ % 2 else "sw a2, 0(s2)", "fence.i",
                       other, "call patched")  # fmt: skip
    program.expect("a0", 44, "lla a4, 2f", "lw a3, 8(s3)", "sw a3, 0(a4)", "fence.i", "2:", "li a0, 0")
    program.emit("j 9f", "patched:", "li a0, 11", "ret")
    program.emit("replacement:", "li a0, 22", "li a0, 33", "li a0, 44", "9:", ".option pop")
    return program


def compressed() -> Program:
    """Every integer instruction of the C extension for RV64, and a long one over the edge of a page."""
    program = Program()
    program.data += [".balign 16", "stack: .zero 1024", "top:"]
    big = 0x0123456789ABCDEF
    expect = program.expect
    program.emit(".option push", ".option rvc")
    expect("a0", 1020, "la sp, stack", "mv a1, sp", "c.addi4spn a0, sp, 1020", "sub a0, a0, a1")
    expect("a0", -496, "c.addi16sp sp, -496", "sub a0, sp, a1")
    expect("a0", -80, "c.addi16sp sp, 416", "sub a0, sp, a1")
    program.emit("la sp, stack", "la a1, stack")
    expect("a0", model.extend(big, 32), f"li a2, {big:#x}", "c.sw a2, 124(a1)", "c.lw a0, 124(a1)")
    expect("a0", big, "c.sd a2, 248(a1)", "c.ld a0, 248(a1)")
    expect("a0", model.extend(big, 32), "c.swsp a2, 252(sp)", "c.lwsp a0, 252(sp)")
    expect("a0", big, "c.sdsp a2, 504(sp)", "c.ldsp a0, 504(sp)")
    expect("a0", 31, "c.li a0, 31")
    expect("a0", -32, "c.li a0, -32")
    expect("a0", -1, "c.addi a0, 31")
    expect("a0", -33, "c.addi a0, -32")
    expect("a0", model.extend(0x80000000, 32), "li a0, 0x7fffffff", "c.addiw a0, 1")
    expect("a0", model.extend(big, 32), "mv a0, a2", "c.addiw a0, 0")
    expect("a0", 0x1F000, "c.lui a0, 0x1f")
    expect("a0", -0x20000, "c.lui a0, 0xfffe0")
    expect("a0", big >> 33, "mv a0, a2", "c.srli a0, 33")
    expect("a0", model.signed(1 << 63) >> 62, "li a0, -1", "c.slli a0, 63", "c.srai a0, 62")
    expect("a0", 0x0F, "li a0, -1", "c.andi a0, 15")
    expect("a0", big & ~31, "mv a0, a2", "c.andi a0, -32")
    for name in ("sub", "xor", "or", "and", "subw", "addw", "add"):
        expected = model.REGISTER[name](big, 0xFEDCBA9876543210)
        expect("a0", expected, "mv a0, a2", "li a3, 0xfedcba9876543210", f"c.{name} a0, a3")
    expect("a0", big, "c.mv a0, a2")
    expect("a0", model.MASK & (big << 13), "c.slli a0, 13")
    for name, value, taken in (("beqz", 0, 1), ("beqz", 4, 0), ("bnez", 0, 0), ("bnez", -4, 1)):
        expect("a4", taken, f"li a0, {value}", "li a4, 1", f"c.{name} a0, 1f", "li a4, 0", "1:")
    expect("a4", 3, "li a4, 3", "c.j 1f", "li a4, 4", "1:")
    expect("a4", 3, "la a0, 1f", "c.jr a0", "li a4, 4", "1:")
    expect("ra", 0, "la a0, 1f", "la a5, 2f", "c.jalr a0", "2:", "j fail", "1:", "sub ra, ra, a5")
    expect("a0", 0x123, "li a0, 0x100", "j 1f", ".balign 4096", ".skip 4094", "1:", ".option norvc",
           "addi a0, a0, 0x23", ".option rvc")  # fmt: skip
    program.emit(".option pop")
    return program


def programs() -> Iterator[tuple[str, str]]:
    """(name, assembler text) of every program, by extension."""
    for name, operation in model.REGISTER.items():
        yield f"rv64ui-{name}", register_operation(name, operation).text()
    for name, (operation, shift) in model.IMMEDIATE.items():
        yield f"rv64ui-{name}", immediate_operation(name, operation, shift).text()
    for name in model.BRANCH:
        yield f"rv64ui-{name}", branch(name).text()
    for name in model.LOAD:
        yield f"rv64ui-{name}", load(name).text()
    for name in model.STORE:
        yield f"rv64ui-{name}", store(name).text()
    for name in ("lui", "auipc"):
        yield f"rv64ui-{name}", upper(name).text()
    yield "rv64ui-jal", jump_and_link().text()
    yield "rv64ui-jalr", jump_and_link_register().text()
    yield "rv64ui-fence_i", fence_i().text()
    yield "rv64ui-ma_data", misaligned().text()
    yield "rv64ui-st_ld", forwarding(store_first=True).text()
    yield "rv64ui-ld_st", forwarding(store_first=False).text()
    yield "rv64ui-simple", Program().text()
    for name, operation in model.MULTIPLY.items():
        yield f"rv64um-{name}", register_operation(name, operation).text()
    for name, bits in itertools.product(model.ATOMIC, (32, 64)):
        yield f"rv64ua-amo{name}_{'d' if bits == 64 else 'w'}", atomic(name, bits).text()
    yield "rv64ua-lrsc", load_reserved().text()
    yield "rv64uc-rvc", compressed().text()
