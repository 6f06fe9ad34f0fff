"""Encoders for the few instructions that tests put together by hand.

``a64`` and ``rv64`` are namespaces of functions that return one encoding; ``join`` makes bytes of them. Branch offsets
are in bytes from the branch itself. AArch64 after DDI 0487 C4 and C6, RISC-V after the unprivileged ISA, chapter 34
("RV32/64G Instruction Set Listings") and 26 ("C" extension). Register 31 is XZR or SP as the instruction has it.
"""

from __future__ import annotations

from collections.abc import Callable


def join(*insns: int) -> bytes:
    """Machine code: 4 bytes an instruction, 2 where the low bits say that it is a compressed one of RISC-V."""
    return b"".join(insn.to_bytes(4 if insn & 3 == 3 or insn > 0xFFFF else 2, "little") for insn in insns)


def words(*insns: int) -> bytes:
    """Machine code of 4 bytes an instruction."""
    return b"".join(insn.to_bytes(4, "little") for insn in insns)


def _field(value: int, bits: int, scale: int = 1) -> int:
    """A signed field of ``bits``, in units of ``scale``."""
    if value % scale or not -(1 << (bits - 1)) <= value // scale < 1 << (bits - 1):
        raise ValueError(f"{value} does not fit in {bits} bits of {scale}")
    return value // scale & ((1 << bits) - 1)


class a64:  # noqa: N801, a namespace
    """AArch64."""

    NOP, WFI, WFE, YIELD, ISB, ERET = 0xD503201F, 0xD503207F, 0xD503205F, 0xD503203F, 0xD5033FDF, 0xD69F03E0
    UDF = 0x00000000
    HLT_SEMIHOST = 0xD45E0000
    # system registers: (op0, op1, CRn, CRm, op2)
    CURRENTEL, VBAR_EL1, SCTLR_EL1 = (3, 0, 4, 2, 2), (3, 0, 12, 0, 0), (3, 0, 1, 0, 0)
    ESR_EL1, ELR_EL1, SPSR_EL1, FAR_EL1 = (3, 0, 5, 2, 0), (3, 0, 4, 0, 1), (3, 0, 4, 0, 0), (3, 0, 6, 0, 0)
    SP_EL0, SP_EL1 = (3, 0, 4, 1, 0), (3, 4, 4, 1, 0)
    CNTVCT_EL0 = (3, 3, 14, 0, 2)

    @staticmethod
    def movz(rd: int, imm: int, shift: int = 0) -> int:
        return 0xD2800000 | shift // 16 << 21 | (imm & 0xFFFF) << 5 | rd

    @staticmethod
    def movk(rd: int, imm: int, shift: int = 0) -> int:
        return 0xF2800000 | shift // 16 << 21 | (imm & 0xFFFF) << 5 | rd

    @staticmethod
    def mov(rd: int, value: int) -> list[int]:
        """Any 32-bit constant, in two instructions."""
        return [a64.movz(rd, value & 0xFFFF), a64.movk(rd, value >> 16 & 0xFFFF, 16)]

    @staticmethod
    def add(rd: int, rn: int, imm: int) -> int:
        return 0x91000000 | imm << 10 | rn << 5 | rd

    @staticmethod
    def sub(rd: int, rn: int, imm: int) -> int:
        return 0xD1000000 | imm << 10 | rn << 5 | rd

    @staticmethod
    def subs(rd: int, rn: int, imm: int) -> int:
        return 0xF1000000 | imm << 10 | rn << 5 | rd

    @staticmethod
    def add_reg(rd: int, rn: int, rm: int) -> int:
        return 0x8B000000 | rm << 16 | rn << 5 | rd

    @staticmethod
    def eor_reg(rd: int, rn: int, rm: int) -> int:
        return 0xCA000000 | rm << 16 | rn << 5 | rd

    @staticmethod
    def madd(rd: int, rn: int, rm: int, ra: int) -> int:
        return 0x9B000000 | rm << 16 | ra << 10 | rn << 5 | rd

    @staticmethod
    def ldr(rt: int, rn: int, offset: int = 0, size: int = 8) -> int:
        scale = size.bit_length() - 1
        return 0x39400000 | scale << 30 | offset // size << 10 | rn << 5 | rt

    @staticmethod
    def str(rt: int, rn: int, offset: int = 0, size: int = 8) -> int:
        scale = size.bit_length() - 1
        return 0x39000000 | scale << 30 | offset // size << 10 | rn << 5 | rt

    @staticmethod
    def ldr_post(rt: int, rn: int, step: int) -> int:
        return 0xF8400400 | _field(step, 9) << 12 | rn << 5 | rt

    @staticmethod
    def str_post(rt: int, rn: int, step: int) -> int:
        return 0xF8000400 | _field(step, 9) << 12 | rn << 5 | rt

    @staticmethod
    def ldp(rt: int, rt2: int, rn: int, offset: int = 0) -> int:
        return 0xA9400000 | _field(offset, 7, 8) << 15 | rt2 << 10 | rn << 5 | rt

    @staticmethod
    def stp(rt: int, rt2: int, rn: int, offset: int = 0) -> int:
        return 0xA9000000 | _field(offset, 7, 8) << 15 | rt2 << 10 | rn << 5 | rt

    @staticmethod
    def ldxr(rt: int, rn: int) -> int:
        return 0xC85F7C00 | rn << 5 | rt

    @staticmethod
    def stxr(rs: int, rt: int, rn: int) -> int:
        return 0xC8007C00 | rs << 16 | rn << 5 | rt

    @staticmethod
    def b(offset: int) -> int:
        return 0x14000000 | _field(offset, 26, 4)

    @staticmethod
    def bl(offset: int) -> int:
        return 0x94000000 | _field(offset, 26, 4)

    @staticmethod
    def cbz(rt: int, offset: int) -> int:
        return 0xB4000000 | _field(offset, 19, 4) << 5 | rt

    @staticmethod
    def cbnz(rt: int, offset: int) -> int:
        return 0xB5000000 | _field(offset, 19, 4) << 5 | rt

    @staticmethod
    def tbz(rt: int, bit: int, offset: int) -> int:
        return 0x36000000 | bit >> 5 << 31 | (bit & 31) << 19 | _field(offset, 14, 4) << 5 | rt

    @staticmethod
    def br(rn: int) -> int:
        return 0xD61F0000 | rn << 5

    @staticmethod
    def blr(rn: int) -> int:
        return 0xD63F0000 | rn << 5

    @staticmethod
    def ret() -> int:
        return 0xD65F03C0

    @staticmethod
    def svc(imm: int = 0) -> int:
        return 0xD4000001 | imm << 5

    @staticmethod
    def hvc(imm: int = 0) -> int:
        return 0xD4000002 | imm << 5

    @staticmethod
    def brk(imm: int = 0) -> int:
        return 0xD4200000 | imm << 5

    @staticmethod
    def mrs(rt: int, register: tuple[int, int, int, int, int]) -> int:
        op0, op1, crn, crm, op2 = register
        return 0xD5200000 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | rt

    @staticmethod
    def msr(register: tuple[int, int, int, int, int], rt: int) -> int:
        op0, op1, crn, crm, op2 = register
        return 0xD5000000 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | rt


def _r(opcode: int, funct3: int, funct7: int) -> Callable[[int, int, int], int]:
    def encode(rd: int, rs1: int, rs2: int) -> int:
        return funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode

    return encode


def _i(opcode: int, funct3: int) -> Callable[[int, int, int], int]:
    def encode(rd: int, rs1: int, imm: int) -> int:
        return _field(imm, 12) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode

    return encode


def _s(funct3: int) -> Callable[[int, int, int], int]:
    def encode(rs2: int, rs1: int, imm: int) -> int:
        field = _field(imm, 12)
        return field >> 5 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (field & 31) << 7 | 0x23

    return encode


def _b(funct3: int) -> Callable[[int, int, int], int]:
    def encode(rs1: int, rs2: int, offset: int) -> int:
        f = _field(offset, 12, 2) << 1
        return (
            (f >> 12 & 1) << 31 | (f >> 5 & 0x3F) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12
            | (f >> 1 & 0xF) << 8 | (f >> 11 & 1) << 7 | 0x63
        )  # fmt: skip

    return encode


def _csr(funct3: int) -> Callable[[int, int, int], int]:
    def encode(rd: int, csr: int, source: int) -> int:
        return csr << 20 | source << 15 | funct3 << 12 | rd << 7 | 0x73

    return encode


class rv64:  # noqa: N801, a namespace
    """RV64GC."""

    ECALL, EBREAK, WFI, MRET, SRET, FENCE_I = 0x00000073, 0x00100073, 0x10500073, 0x30200073, 0x10200073, 0x0000100F
    NOP, C_NOP, C_EBREAK = 0x00000013, 0x0001, 0x9002
    MSTATUS, MTVEC, MEPC, MCAUSE, MTVAL, MIP, SATP = 0x300, 0x305, 0x341, 0x342, 0x343, 0x344, 0x180
    CYCLE, TIME, INSTRET, MCYCLE, MINSTRET = 0xC00, 0xC01, 0xC02, 0xB00, 0xB02

    add, sub, xor = staticmethod(_r(0x33, 0, 0)), staticmethod(_r(0x33, 0, 0x20)), staticmethod(_r(0x33, 4, 0))
    mul, amoadd_d = staticmethod(_r(0x33, 0, 1)), staticmethod(_r(0x2F, 3, 0))
    addi, xori = staticmethod(_i(0x13, 0)), staticmethod(_i(0x13, 4))
    lb, lw, ld = staticmethod(_i(0x03, 0)), staticmethod(_i(0x03, 2)), staticmethod(_i(0x03, 3))
    jalr = staticmethod(_i(0x67, 0))
    sb, sw, sd = staticmethod(_s(0)), staticmethod(_s(2)), staticmethod(_s(3))
    beq, bne, blt = staticmethod(_b(0)), staticmethod(_b(1)), staticmethod(_b(4))
    csrrw, csrrs, csrrc = staticmethod(_csr(1)), staticmethod(_csr(2)), staticmethod(_csr(3))

    @staticmethod
    def slli(rd: int, rs1: int, shift: int) -> int:
        return shift << 20 | rs1 << 15 | 1 << 12 | rd << 7 | 0x13

    @staticmethod
    def lui(rd: int, value: int) -> int:
        """``value`` is the constant itself; its low 12 bits are lost."""
        return value & 0xFFFFF000 | rd << 7 | 0x37

    @staticmethod
    def jal(rd: int, offset: int) -> int:
        f = _field(offset, 20, 2) << 1
        return (
            (f >> 20 & 1) << 31 | (f >> 1 & 0x3FF) << 21 | (f >> 11 & 1) << 20 | (f >> 12 & 0xFF) << 12 | rd << 7 | 0x6F
        )

    # compressed

    @staticmethod
    def c_addi(rd: int, imm: int) -> int:
        f = _field(imm, 6)
        return (f >> 5) << 12 | rd << 7 | (f & 31) << 2 | 1

    @staticmethod
    def c_li(rd: int, imm: int) -> int:
        f = _field(imm, 6)
        return 0b010 << 13 | (f >> 5) << 12 | rd << 7 | (f & 31) << 2 | 1

    @staticmethod
    def c_mv(rd: int, rs: int) -> int:
        return 0x8002 | rd << 7 | rs << 2

    @staticmethod
    def c_add(rd: int, rs: int) -> int:
        return 0x9002 | rd << 7 | rs << 2

    @staticmethod
    def c_ld(rd: int, rs1: int, offset: int = 0) -> int:
        """Registers x8 to x15."""
        return 0x6000 | (offset >> 3 & 7) << 10 | (rs1 - 8) << 7 | (offset >> 6 & 3) << 5 | (rd - 8) << 2

    @staticmethod
    def c_sd(rs2: int, rs1: int, offset: int = 0) -> int:
        """Registers x8 to x15."""
        return 0xE000 | (offset >> 3 & 7) << 10 | (rs1 - 8) << 7 | (offset >> 6 & 3) << 5 | (rs2 - 8) << 2

    @staticmethod
    def c_j(offset: int) -> int:
        f = _field(offset, 11, 2) << 1
        return (
            0xA001 | (f >> 11 & 1) << 12 | (f >> 4 & 1) << 11 | (f >> 8 & 3) << 9 | (f >> 10 & 1) << 8
            | (f >> 6 & 1) << 7 | (f >> 7 & 1) << 6 | (f >> 1 & 7) << 3 | (f >> 5 & 1) << 2
        )  # fmt: skip

    @staticmethod
    def c_bnez(rs1: int, offset: int) -> int:
        """Register x8 to x15."""
        f = _field(offset, 8, 2) << 1
        return (
            0xE001 | (f >> 8 & 1) << 12 | (f >> 3 & 3) << 10 | (rs1 - 8) << 7 | (f >> 6 & 3) << 5
            | (f >> 1 & 3) << 3 | (f >> 5 & 1) << 2
        )  # fmt: skip
