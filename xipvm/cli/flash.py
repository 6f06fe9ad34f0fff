"""``xipvm flash``: making and padding images."""

from __future__ import annotations

import os

from xipvm import boards
from xipvm.address import format_size
from xipvm.devices.flash.files import create, pad, wanted_size


def create_image(path: str, board_name: str, bank: int | None, *, force: bool) -> None:
    """Write an erased image of bank ``bank`` (None: of all banks). Raises FlashImageError, BoardError."""
    sizes = _sizes(board_name)
    size = sum(sizes) if bank is None else wanted_size(path, 0, sizes, bank)
    create(path, size, force=force)
    print(f"{path}: {format_size(size)}, erased")


def pad_image(path: str, board_name: str, bank: int | None) -> None:
    """Append erased bytes to ``path`` up to the size of its bank, or of all. Raises FlashImageError, BoardError."""
    try:
        length = os.stat(path).st_size
    except (OSError, ValueError):
        length = 0  # pad says what is wrong with it
    size = wanted_size(path, length, _sizes(board_name), bank)
    added = pad(path, size)
    print(f"{path}: {format_size(size)}, {format_size(added)} of them added")


def _sizes(board_name: str) -> list[int]:
    return [bank.size for bank in boards.get(board_name).flash]
