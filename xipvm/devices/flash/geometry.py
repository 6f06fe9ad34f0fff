"""Sizes and times of one flash chip."""

from __future__ import annotations

from dataclasses import dataclass

US = 1_000
MS = 1_000_000


@dataclass(frozen=True, slots=True)
class ChipGeometry:
    """One chip. ``size`` and ``block`` are in bytes of the chip; ``width`` is its data bus in bytes (1, 2 or 4).

    Sizes are powers of two, as the query table can say nothing else. Raises ValueError for others.
    """

    size: int
    block: int
    width: int

    def __post_init__(self) -> None:
        for name in ("size", "block", "width"):
            value = getattr(self, name)
            if value <= 0 or value & (value - 1):
                raise ValueError(f"flash chip: {name} is {value}, not a power of two")
        if self.width > 4:
            raise ValueError(f"flash chip: {self.width} bytes wide; chips have 1, 2 or 4")
        if not 256 <= self.block <= min(self.size, 8 << 20) or self.blocks > 1 << 16:
            raise ValueError(f"flash chip: blocks of {self.block} bytes in a chip of {self.size}")

    @property
    def blocks(self) -> int:
        """How many erase blocks it has."""
        return self.size // self.block

    @property
    def buffer(self) -> int:
        """Bytes of the write buffer: QEMU's sizes, but never more than a block."""
        return min(256 if self.width == 1 else 2048, self.block)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a chip is busy, in ns of virtual time. 0: done before the next access."""

    word_program: int = 0
    buffer_program: int = 0
    block_erase: int = 0
    suspend: int = 0


INSTANT = Timing()
"""Every operation is done before the next access, as in QEMU."""

TYPICAL = Timing(word_program=128 * US, buffer_program=128 * US, block_erase=1024 * MS, suspend=20 * US)
"""The typical times that the query table announces; suspending takes the 20 µs of StrataFlash datasheets."""
