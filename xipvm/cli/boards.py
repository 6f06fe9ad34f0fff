"""``xipvm boards``."""

from __future__ import annotations

from typing import Any

from xipvm import boards
from xipvm.address import format_size
from xipvm.cli.output import print_json, print_table


def list_boards(*, as_json: bool) -> None:
    """Print every board with its memory map."""
    known = [boards.get(name) for name in boards.names()]
    if as_json:
        print_json([_describe(board) for board in known])
        return
    for number, board in enumerate(known):
        if number:
            print()
        print(f"{board.name}: {board.description}")
        print(f"{board.isa}, 1 to {board.max_cpus} CPUs, {format_size(board.default_memory)} of RAM by default\n")
        rows = [(f"{base:#x}", f"{end:#x}", format_size(end - base), what) for base, end, what in board.memory_map()]
        print_table(("from", "to", "size", "what"), rows)


def _describe(board: boards.Board) -> dict[str, Any]:
    return {
        "name": board.name,
        "description": board.description,
        "isa": board.isa,
        "max_cpus": board.max_cpus,
        "default_memory": board.default_memory,
        "max_memory": board.max_memory,
        "memory_map": [{"base": base, "end": end, "what": what} for base, end, what in board.memory_map()],
    }
