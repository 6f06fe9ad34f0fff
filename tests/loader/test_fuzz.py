"""Whatever the file holds, reading and placing it gives a placement or one line."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm import boards
from xipvm.errors import GuestImageError
from xipvm.loader import ElfImage, board_for, place

Build = Callable[..., bytes]
GUESTS = Path(__file__).parents[2] / "guests" / "bin"
EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x38, 0x40, 1 << 30, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]
BOARDS = [boards.get(name) for name in boards.names()]


def seeds(build_elf: Build) -> list[bytes]:
    code = bytes(range(96))
    parts = [
        {"paddr": 0, "data": code},
        {"paddr": 96, "vaddr": 0x4000_0000, "data": code, "memsz": 400, "flags": 6},
        {"paddr": 0x4000_1000, "memsz": 4096, "flags": 6},
    ]
    symbols = {"_start": (0, 4), "main": (4, 60)}
    made = [build_elf(*parts[:n], bits=bits, symbols=symbols) for n in (1, 2, 3) for bits in (32, 64)]
    riscv = [{**part, "paddr": part["paddr"] + 0x2000_0000} for part in parts[:2]]
    made.append(build_elf(*riscv, entry=0x2000_0000, machine=243, symbols=symbols))
    return made + [path.read_bytes() for path in sorted(GUESTS.rglob("hello-*.elf"))]


def mutate(data: bytearray, chance: random.Random) -> None:
    """Change one thing: mostly in the headers, where it matters."""
    where = min(len(data), 232 if chance.random() < 0.8 else len(data))
    at = chance.randrange(where)
    choice = chance.randrange(5)
    if choice == 0:
        data[at] = chance.randrange(256)
    elif choice == 1:
        data[at] ^= 1 << chance.randrange(8)
    elif choice == 2:
        size = chance.choice((2, 4, 8))
        at &= -size
        data[at : at + size] = struct.pack("<Q", chance.choice(EDGES))[:size]
    elif choice == 3:
        size = chance.choice((4, 8))
        at &= -size
        data[at : at + size] = struct.pack("<Q", chance.randrange(len(data) + 64))[:size]
    else:
        del data[at:]


def storm(build_elf: Build, count: int, seed: int) -> tuple[int, int]:
    """Read and place ``count`` mutated files; how many were placed and refused."""
    chance = random.Random(seed)
    originals = seeds(build_elf)
    outcomes = [0, 0]
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        for _ in range(chance.randrange(1, 4)):
            if data:
                mutate(data, chance)
        try:
            elf = ElfImage(bytes(data), "guest.elf")
            for board in BOARDS:
                if board.machine_type == elf.machine:
                    place(elf, board, 16 << 20)
            board_for(elf)
            elf.describe(elf.entry)
        except GuestImageError as error:
            line = str(error)
            assert "\n" not in line, line
            assert len(line) < 300, line
            outcomes[1] += 1
        else:
            outcomes[0] += 1
    return outcomes[0], outcomes[1]


def test_mutated_files_give_a_placement_or_one_line(build_elf: Build) -> None:
    placed, refused = storm(build_elf, 3000, seed=1)
    assert placed > 300
    assert refused > 300


@pytest.mark.slow
def test_many_mutated_files_give_a_placement_or_one_line(build_elf: Build) -> None:
    placed, refused = storm(build_elf, 100_000, seed=2)
    assert placed > 10_000
    assert refused > 10_000
