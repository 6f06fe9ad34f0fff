"""Decides where each segment of a guest goes on a board.

A segment goes to its physical address. In a flash bank it is programmed there and executed in place; nothing
of it is copied to RAM. In RAM it is loaded. Anywhere else it is an error, and so is a segment that leaves the
memory it begins in.

What is zero-initialised (p_memsz beyond p_filesz) needs memory that can be written:

- In RAM the rest is zeroed.
- A segment that is stored in flash but runs elsewhere (p_vaddr outside the flash: initialised data that the
  guest copies to RAM) has only its file bytes in flash; the guest's own start-up code deals with the rest.
- A segment that runs in flash and ends in zeros is a linking mistake, and an error, in an ET_EXEC file. In an
  ET_DYN one it is accepted with a note, and only its file bytes are programmed: such images move themselves
  to RAM before they use their .bss (U-Boot, where .bss is not part of the file).

A writable segment that runs in flash is accepted with a note for the same reason: stores to it are flash
commands. The entry must lie in a placed executable segment, or anywhere in flash (its image may hold the code).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from xipvm.address import Gpa, format_size
from xipvm.errors import BoardError, GuestImageError
from xipvm.loader.elf import MACHINES, PF_W, PF_X, ElfImage, Segment

if TYPE_CHECKING:
    from xipvm.boards import Board, FlashBank


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that go to one place: ``data``, and in RAM zeros behind it up to ``size`` bytes."""

    where: str
    """``ram`` or the name of a flash bank."""
    address: Gpa
    data: memoryview
    size: int
    flags: int
    """``PF_R | PF_W | PF_X`` of the segment."""
    segment: int
    """Number of the program header."""
    offset: int
    """Where ``data`` begins in the file."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What goes where, by ascending address; ``entry`` is physical. ``notes`` are lines for the user."""

    board: str
    pieces: tuple[Piece, ...]
    entry: Gpa
    notes: tuple[str, ...]

    def of(self, where: str) -> tuple[Piece, ...]:
        """The pieces of one memory: ``ram`` or a flash bank's name."""
        return tuple(piece for piece in self.pieces if piece.where == where)


def board_for(elf: ElfImage) -> Board:
    """The board that runs ``elf`` when none was named. Raises GuestImageError."""
    from xipvm import boards

    try:
        return boards.for_elf(elf.machine, elf.bits)
    except BoardError as error:
        known = ", ".join(f"{name} runs {_machine_of(boards.get(name))}" for name in boards.names())
        raise GuestImageError(elf.path, f"is for {machine_name(elf)}, which no board runs ({known})") from error


def machine_name(elf: ElfImage) -> str:
    """The processor of ``elf`` for a reader: ``AArch64``, ``32-bit RISC-V``, ``e_machine 94``."""
    name = MACHINES.get(elf.machine, f"e_machine {elf.machine}")
    return f"32-bit {name}" if elf.bits == 32 else name


def _machine_of(board: Board) -> str:
    return MACHINES.get(board.machine_type, board.isa)


def place(elf: ElfImage, board: Board, memory_size: int) -> Placement:
    """Where the segments of ``elf`` go on ``board`` with ``memory_size`` bytes of RAM. Raises GuestImageError."""
    if elf.machine != board.machine_type or elf.bits != 64:
        raise GuestImageError(elf.path, f"is for {machine_name(elf)}; {board.name} runs {_machine_of(board)}")
    pieces = []
    notes: list[str] = []
    for segment in elf.segments:
        piece = _place_segment(elf, segment, board, memory_size, notes)
        if piece is not None:
            pieces.append(piece)
    if not pieces:
        raise GuestImageError(elf.path, "has nothing to load: all of its segments are empty in the file")
    pieces.sort(key=lambda piece: piece.address)
    for low, high in pairwise(pieces):
        if low.address + low.size > high.address:
            first, second = sorted((low.segment, high.segment))
            raise GuestImageError(elf.path, f"segments {first} and {second} overlap at {high.address:#x}")
    return Placement(board.name, tuple(pieces), _entry(elf, board, pieces), tuple(notes))


def _bank_at(board: Board, address: int) -> FlashBank | None:
    for bank in board.flash:
        if bank.base <= address < bank.end:
            return bank
    return None


def _place_segment(elf: ElfImage, segment: Segment, board: Board, memory_size: int, notes: list[str]) -> Piece | None:
    """Where ``segment`` goes; None when nothing of it is stored anywhere."""
    bank = _bank_at(board, segment.paddr)
    size = segment.memsz
    name = f"segment {segment.number} at {segment.paddr:#x} ({size} bytes)"
    if bank is None:
        ram_end = board.ram_base + memory_size
        if not board.ram_base <= segment.paddr < ram_end:
            ram = f"{format_size(memory_size)} of RAM at {board.ram_base:#x}"
            raise GuestImageError(elf.path, f"{name} lies in no memory of {board.name} (with {ram})")
        if segment.paddr + size > ram_end:
            ram = f"{format_size(memory_size)} of RAM at {board.ram_base:#x}"
            raise GuestImageError(elf.path, f"{name} reaches beyond the {ram}")
        return Piece("ram", Gpa(segment.paddr), segment.data, size, segment.flags, segment.number, segment.offset)
    in_place = _bank_at(board, segment.vaddr) is not None
    if not in_place:
        size = len(segment.data)  # stored here, used elsewhere
    if segment.paddr + size > bank.end:
        raise GuestImageError(elf.path, f"{name} reaches beyond the end of flash bank {bank.name} at {bank.end:#x}")
    if size > len(segment.data):
        zeros = f"ends in {size - len(segment.data)} bytes of zero-initialised data in flash bank {bank.name}"
        if not elf.position_independent:
            raise GuestImageError(
                elf.path, f"{name} {zeros}, which cannot be written; link .bss to RAM at {board.ram_base:#x}"
            )
        notes.append(f"segment {segment.number} {zeros}: it has to move itself to RAM before it uses them")
    if in_place and segment.flags & PF_W:
        notes.append(
            f"segment {segment.number} is writable and lies in flash bank {bank.name}: stores are flash commands"
        )
    if not segment.data:
        return None
    stored = len(segment.data)
    return Piece(bank.name, Gpa(segment.paddr), segment.data, stored, segment.flags, segment.number, segment.offset)


def _entry(elf: ElfImage, board: Board, pieces: list[Piece]) -> Gpa:
    """The physical address at which the guest starts."""
    entry = elf.entry
    for segment in elf.segments:
        if segment.flags & PF_X and segment.vaddr <= entry < segment.vaddr + segment.memsz:
            entry += segment.paddr - segment.vaddr
            break
    if any(c.flags & PF_X and c.address <= entry < c.address + c.size for c in pieces) or _bank_at(board, entry):
        return Gpa(entry)
    raise GuestImageError(elf.path, f"starts at {elf.entry:#x}, which is in none of its executable segments")
