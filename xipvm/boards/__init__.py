"""Boards: memory maps, devices and device trees, and the registry that finds them by name."""

from __future__ import annotations

from xipvm.boards import virt_arm64, virt_riscv64
from xipvm.boards.board import Board, FlashBank, Machine, Platform, Region
from xipvm.errors import BoardError

__all__ = ["Board", "FlashBank", "Machine", "Platform", "Region", "describe", "for_elf", "get", "names"]

_BOARDS = {board.name: board for board in (virt_arm64.BOARD, virt_riscv64.BOARD)}


def names() -> tuple[str, ...]:
    """The names of all boards."""
    return tuple(_BOARDS)


def get(name: str) -> Board:
    """The board ``name``. Raises BoardError, which lists the known ones."""
    board = _BOARDS.get(name)
    if board is None:
        raise BoardError(f"no board is called {name!r}; known are {', '.join(_BOARDS)}")
    return board


def for_elf(machine_type: int, bits: int = 64) -> Board:
    """The board that runs ELF files of ``e_machine`` and class ``bits`` by default. Raises BoardError."""
    for board in _BOARDS.values():
        if board.machine_type == machine_type and bits == 64:
            return board
    known = ", ".join(f"{board.isa} (e_machine {board.machine_type})" for board in _BOARDS.values())
    raise BoardError(f"no board runs {bits}-bit ELF files for e_machine {machine_type}; known are {known}")


def describe() -> list[tuple[str, str, str, list[tuple[int, int, str]]]]:
    """Rows (name, isa, description, memory map) of all boards; see ``Board.memory_map``."""
    return [(board.name, board.isa, board.description, board.memory_map()) for board in _BOARDS.values()]
