"""The memory-mapped I/O bus: which device answers at which guest physical address.

Ranges never overlap. A 64-bit access is made as two 32-bit halves, low address first, because that is how
the engine delivers it; devices see 1, 2 and 4 bytes only.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from xipvm.devices.device import Device
from xipvm.errors import XipvmError

_MAX_ACCESS = 4  # what one call of a device carries, bytes


class BusError(XipvmError):
    """No device answers the whole of an access, in a page where one answers some: the guest cannot go on.

    ``gpa`` and ``size`` are the access, ``access`` is ``"read"`` or ``"write"``.
    """

    def __init__(self, gpa: int, size: int, access: str) -> None:
        super().__init__(f"{access} of {size} bytes at {gpa:#x}: no device there")
        self.gpa = gpa
        self.size = size
        self.access = access


class BusRange(NamedTuple):
    """Where a device is mapped: ``[base, end)``."""

    base: int
    end: int
    device: Device


class Bus:
    """Devices by guest physical address."""

    def __init__(self) -> None:
        self._ranges: list[BusRange] = []
        self._bases: list[int] = []
        self._last: BusRange | None = None

    def map(self, base: int, size: int, device: Device) -> None:
        """Let ``device`` answer at ``[base, base + size)``. Raises ValueError when a range is taken or empty."""
        if size <= 0 or base < 0:
            raise ValueError(f"{device.name}: no range of {size} bytes at {base:#x}")
        new = BusRange(base, base + size, device)
        index = bisect_right(self._bases, base)
        for other in self._ranges[max(index - 1, 0) : index + 1]:
            if other.base < new.end and new.base < other.end:
                raise ValueError(
                    f"{device.name} at {base:#x}..{new.end:#x} overlaps "
                    f"{other.device.name} at {other.base:#x}..{other.end:#x}"
                )
        self._ranges.insert(index, new)
        self._bases.insert(index, base)

    def unmap(self, base: int) -> Device:
        """Take the device mapped at exactly ``base`` off the bus and return it. Raises ValueError when none is."""
        index = bisect_right(self._bases, base) - 1
        if index < 0 or self._bases[index] != base:
            raise ValueError(f"nothing is mapped at {base:#x}")
        del self._bases[index]
        self._last = None
        return self._ranges.pop(index).device

    def ranges(self) -> tuple[BusRange, ...]:
        """Every mapped range, ascending."""
        return tuple(self._ranges)

    def find(self, gpa: int) -> tuple[Device, int] | None:
        """The device that answers at ``gpa`` and the offset there, None when nothing does."""
        found = self._lookup(gpa)
        return None if found is None else (found.device, gpa - found.base)

    def covers(self, gpa: int) -> bool:
        """Whether a device answers at ``gpa``."""
        return self._lookup(gpa) is not None

    def read(self, gpa: int, size: int) -> int:
        """Read ``size`` (1, 2, 4 or 8) bytes. Raises BusError where no device answers."""
        if size > _MAX_ACCESS:
            return self.read(gpa, 4) | self.read(gpa + 4, 4) << 32
        found = self._lookup(gpa)
        if found is None or gpa + size > found.end:
            raise BusError(gpa, size, "read")
        return found.device.read(gpa - found.base, size)

    def write(self, gpa: int, size: int, value: int) -> None:
        """Write ``size`` (1, 2, 4 or 8) bytes. Raises BusError where no device answers."""
        if size > _MAX_ACCESS:
            self.write(gpa, 4, value & 0xFFFF_FFFF)
            self.write(gpa + 4, 4, value >> 32)
            return
        found = self._lookup(gpa)
        if found is None or gpa + size > found.end:
            raise BusError(gpa, size, "write")
        found.device.write(gpa - found.base, size, value)

    def _lookup(self, gpa: int) -> BusRange | None:
        last = self._last
        if last is not None and last.base <= gpa < last.end:
            return last
        index = bisect_right(self._bases, gpa) - 1
        if index < 0:
            return None
        found = self._ranges[index]
        if gpa >= found.end:
            return None
        self._last = found
        return found
