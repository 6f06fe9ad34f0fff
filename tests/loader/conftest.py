"""Builds small ELF files, so that tests say what matters in them and the rest is sound."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

R, W, X = 4, 2, 1


def write_elf(
    *parts: dict[str, Any],
    entry: int = 0,
    machine: int = 183,
    type: int = 2,
    bits: int = 64,
    symbols: dict[str, tuple[int, int]] | None = None,
) -> bytes:
    """The bytes of an ELF file.

    A part is a program header: paddr, data (b""), memsz (of the data), vaddr (the paddr), flags (r-x), type (PT_LOAD).
    Symbols are functions: name -> (address, size).
    """
    wide = bits == 64
    header_size, part_size, section_size = (64, 56, 64) if wide else (52, 32, 40)
    offset = header_size + part_size * len(parts)
    table = body = b""
    for part in parts:
        paddr, data = part["paddr"], part.get("data", b"")
        vaddr, memsz = part.get("vaddr", paddr), part.get("memsz", len(data))
        kind, flags, start = part.get("type", 1), part.get("flags", R | X), offset + len(body)
        if wide:
            table += struct.pack("<2I6Q", kind, flags, start, vaddr, paddr, len(data), memsz, 16)
        else:
            table += struct.pack("<8I", kind, start, vaddr, paddr, len(data), memsz, flags, 16)
        body += data
    sections = b""
    if symbols:
        names = b"\0"
        entries = bytes(24 if wide else 16)
        for name, (address, size) in symbols.items():
            if wide:
                entries += struct.pack("<I2BH2Q", len(names), 0x12, 0, 1, address, size)
            else:
                entries += struct.pack("<3I2BH", len(names), address, size, 0x12, 0, 1)
            names += name.encode() + b"\0"
        at = offset + len(body)
        body += entries + names
        head = "<2I4Q2I2Q" if wide else "<10I"
        sections = struct.pack(head, *[0] * 10)
        sections += struct.pack(head, 0, 2, 0, 0, at, len(entries), 2, 1, 8, 24 if wide else 16)
        sections += struct.pack(head, 0, 3, 0, 0, at + len(entries), len(names), 0, 0, 1, 0)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH" if wide else "<16sHHIIIIIHHHHHH",
        ident, type, machine, 1, entry, header_size, offset + len(body) if sections else 0, 0,
        header_size, part_size, len(parts), section_size, len(sections) // section_size, 0,
    )  # fmt: skip
    return header + table + body + sections


@pytest.fixture(scope="session")
def build_elf() -> Callable[..., bytes]:
    """``write_elf``."""
    return write_elf
