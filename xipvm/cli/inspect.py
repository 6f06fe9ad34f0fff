"""``xipvm inspect``: what of a guest would be placed where."""

from __future__ import annotations

from xipvm import boards
from xipvm.cli.output import print_json, print_table
from xipvm.loader import ElfImage, Placement, board_for, place
from xipvm.loader.elf import rwx
from xipvm.loader.place import machine_name


def inspect_guest(path: str, board_name: str | None, memory: int | None, *, as_json: bool) -> None:
    """Print where the segments of the guest ``path`` go. Raises BadInput as a run would."""
    elf = ElfImage.open(path)
    board = board_for(elf) if board_name is None else boards.get(board_name)
    size = board.default_memory if memory is None else memory
    board.check(size, 1)
    placement = place(elf, board, size)
    if as_json:
        print_json(_as_json(elf, placement))
        return
    start = elf.describe(elf.entry)
    rows = [
        (
            str(piece.segment),
            piece.where,
            f"{piece.address:#x}",
            f"{piece.address + piece.size:#x}",
            str(len(piece.data)),
            str(piece.size),
            rwx(piece.flags),
        )
        for piece in placement.pieces
    ]
    print(f"{path}: {machine_name(elf)} on {board.name}")
    print(f"entry {placement.entry:#x}{f' ({start})' if start else ''}, {len(elf.symbols)} symbols\n")
    print_table(("segment", "where", "from", "to", "in file", "in memory", "flags"), rows)
    if placement.notes:
        print()
    for note in placement.notes:
        print(f"note: {note}")


def _as_json(elf: ElfImage, placement: Placement) -> dict[str, object]:
    return {
        "guest": elf.path,
        "machine": machine_name(elf),
        "board": placement.board,
        "entry": placement.entry,
        "entry_symbol": elf.describe(elf.entry),
        "pieces": [
            {
                "segment": piece.segment,
                "where": piece.where,
                "address": piece.address,
                "file_size": len(piece.data),
                "size": piece.size,
                "flags": rwx(piece.flags),
            }
            for piece in placement.pieces
        ],
        "notes": list(placement.notes),
    }
