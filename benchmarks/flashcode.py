"""Guests that only benchmarks need: a few AArch64 instructions in flash, as an ELF file."""

from __future__ import annotations

import struct
from pathlib import Path

PAGE = 4096
TOUCHED = 0x4020_0000
"""Where the RAM that :func:`touch` stores to begins."""

_B_NEXT_PAGE = 0x1400_0400
_RET = 0xD65F_03C0

# Copies what comes after `body` to RAM at 0x40200000 and goes on there. Then, `rounds` times: execute the pages
# behind this one, each of which branches to the next; if `switches`, have the bank show its status, look at it, and
# have it show its array again. Ends by SYSTEM_OFF, or hangs when the status is not "ready" of both chips.
_SWITCH = (
    0x580004D5,  # ldr   x21, rounds
    0x580004F6,  # ldr   x22, switches
    0xD2A80409,  # movz  x9, #0x4020, lsl #16
    0xAA0903E0,  # mov   x0, x9
    0x10000141,  # adr   x1, body
    0x10000422,  # adr   x2, rounds
    0xB8404423,  # 1: ldr w3, [x1], #4
    0xB8004403,  # str   w3, [x0], #4
    0xEB02003F,  # cmp   x1, x2
    0x54FFFFA3,  # b.lo  1b
    0xD5033B9F,  # dsb   ish
    0xD508751F,  # ic    iallu
    0xD5033FDF,  # isb
    0xD61F0120,  # br    x9
    0x52800E0B,  # body: movz w11, #0x70
    0x72A00E0B,  # movk  w11, #0x70, lsl #16
    0x52801FEC,  # movz  w12, #0xff
    0x72A01FEC,  # movk  w12, #0xff, lsl #16
    0x52801010,  # movz  w16, #0x80
    0x72A01010,  # movk  w16, #0x80, lsl #16
    0xAA1F03EA,  # mov   x10, xzr
    0xD282000D,  # movz  x13, #0x1000
    0xD63F01A0,  # 2: blr x13
    0xB40000D6,  # cbz   x22, 3f
    0xB900014B,  # str   w11, [x10]
    0xB940014E,  # ldr   w14, [x10]
    0xB900014C,  # str   w12, [x10]
    0x6B1001DF,  # cmp   w14, w16
    0x54000061,  # b.ne  4f
    0xF10006B5,  # 3: subs x21, x21, #1
    0x54FFFF01,  # b.ne  2b
    0xD2B08000,  # 4: movz x0, #0x8400, lsl #16
    0xF2800100,  # movk  x0, #8
    0xB4000055,  # cbz   x21, 5f
    0xAA1F03E0,  # mov   x0, xzr
    0xD4000002,  # 5: hvc #0
    0x14000000,  # b     .
    0xD503201F,  # nop, so that what follows is aligned
)  # rounds: .quad; switches: .quad

_TOUCH = (
    0x58000140,  # ldr   x0, address
    0x58000161,  # ldr   x1, pages
    0xF9000000,  # 1: str x0, [x0]
    0x91400400,  # add   x0, x0, #0x1000
    0xF1000421,  # subs  x1, x1, #1
    0x54FFFFA1,  # b.ne  1b
    0xD2B08000,  # movz  x0, #0x8400, lsl #16
    0xF2800100,  # movk  x0, #8
    0xD4000002,  # hvc   #0
    0x14000000,  # b     .
)


def switch(file: Path, *, pages: int, rounds: int, switches: bool) -> Path:
    """A guest that executes ``pages`` pages of flash in each of ``rounds``, with a mode switch after each or none."""
    code = struct.pack(f"<{len(_SWITCH)}I2Q", *_SWITCH, rounds, switches).ljust(PAGE, b"\0")
    code += struct.pack("<I", _B_NEXT_PAGE).ljust(PAGE, b"\0") * (pages - 1)
    return _elf(file, code + struct.pack("<I", _RET))


def touch(file: Path, *, pages: int) -> Path:
    """A guest that stores once to each of ``pages`` pages of RAM from TOUCHED on."""
    return _elf(file, struct.pack(f"<{len(_TOUCH)}I2Q", *_TOUCH, TOUCHED, pages))


def _elf(file: Path, code: bytes) -> Path:
    """An AArch64 executable of one segment, linked at address 0, entered at its first byte."""
    offset = 64 + 56
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 183, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, offset, 0, 0, len(code), len(code), 8)
    file.write_bytes(header + program + code)
    return file
