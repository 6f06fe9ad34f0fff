"""What a device on the bus is, and what an interrupt line is.

A device answers reads and writes of 1, 2 or 4 bytes at offsets from its base; the bus hands it nothing
larger. Registers that a model does not have read as zero and ignore writes, as hardware's reserved
registers do. Values are unsigned; a write's value fits its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

IrqLine = Callable[[bool], None]
"""An interrupt line: called with its level on every change, and harmlessly when nothing changed."""


class Device(Protocol):
    """Something that the bus can map."""

    name: str

    def read(self, offset: int, size: int) -> int:
        """The register at ``offset``, ``size`` bytes."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes of ``value`` to the register at ``offset``."""


def no_line(level: bool) -> None:
    """The interrupt line of a device that is wired to nothing."""
