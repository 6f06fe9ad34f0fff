"""RISC-V's core-local interruptor (SiFive FU540 manual, chapter 9): software interrupts and the timer.

``mtime`` counts virtual time at 10 MHz. A hart's timer interrupt is pending while mtime >= its mtimecmp;
its software interrupt while its msip is 1. At reset mtimecmp is the largest number, which is never.
"""

from __future__ import annotations

from collections.abc import Sequence

from xipvm.clock import Call, EventClock
from xipvm.devices.device import IrqLine

MSIP = 0x0000
MTIMECMP = 0x4000
MTIME = 0xBFF8

FREQUENCY = 10_000_000
NS_PER_TICK = 1_000_000_000 // FREQUENCY
_LONG = 0xFFFF_FFFF_FFFF_FFFF
_NEVER = 1 << 63


class Clint:
    """The CLINT of as many harts as there are lines: ``msip`` and ``mtip`` drive the bits of each hart's mip."""

    name = "clint"

    def __init__(self, clock: EventClock, msip: Sequence[IrqLine], mtip: Sequence[IrqLine]) -> None:
        self._clock = clock
        self._msip_lines = msip
        self._mtip_lines = mtip
        self._calls: list[Call | None] = [None] * len(mtip)
        self._msip = [0] * len(msip)
        self._mtimecmp = [_LONG] * len(mtip)
        self._offset = 0

    def reset(self) -> None:
        """No interrupt pending; time is the clock's again."""
        self._offset = 0
        for hart, line in enumerate(self._msip_lines):
            self._msip[hart] = 0
            self._mtimecmp[hart] = _LONG
            line(False)
            self._update(hart)

    def time(self, now: int | None = None) -> int:
        """mtime, also what the ``time`` CSR shows, at virtual time ``now`` (ns; None: the clock's)."""
        return ((self._clock.now if now is None else now) // NS_PER_TICK + self._offset) & _LONG

    def read(self, offset: int, size: int) -> int:
        """msip is a word; mtimecmp and mtime are 64 bits, read in halves of any size up to a word."""
        if offset < MTIMECMP:
            hart = offset // 4
            return self._msip[hart] if offset % 4 == 0 and hart < len(self._msip) else 0
        if offset < MTIME:
            hart, at = divmod(offset - MTIMECMP, 8)
            return _part(self._mtimecmp[hart], at, size) if hart < len(self._mtimecmp) else 0
        return _part(self.time(self._clock.look()), offset - MTIME, size) if offset < MTIME + 8 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """See ``read``."""
        if offset < MTIMECMP:
            hart = offset // 4
            if offset % 4 == 0 and hart < len(self._msip):
                self._msip[hart] = value & 1
                self._msip_lines[hart](bool(value & 1))
        elif offset < MTIME:
            hart, at = divmod(offset - MTIMECMP, 8)
            if hart < len(self._mtimecmp):
                self._mtimecmp[hart] = _with_part(self._mtimecmp[hart], at, size, value)
                self._update(hart)
        elif offset < MTIME + 8:
            time = self.time()
            self._offset += _with_part(time, offset - MTIME, size, value) - time
            for hart in range(len(self._mtimecmp)):
                self._update(hart)

    def _update(self, hart: int) -> None:
        call = self._calls[hart]
        if call is not None:
            self._clock.cancel(call)
            self._calls[hart] = None
        compare = self._mtimecmp[hart]
        reached = self.time() >= compare
        if not reached:
            at = (compare - self._offset) * NS_PER_TICK
            if at < _NEVER:
                self._calls[hart] = self._clock.call_at(at, lambda: self._update(hart))
        self._mtip_lines[hart](reached)


def _part(value: int, at: int, size: int) -> int:
    return value >> 8 * at & ((1 << 8 * size) - 1)


def _with_part(value: int, at: int, size: int, part: int) -> int:
    mask = ((1 << 8 * size) - 1) << 8 * at
    return (value & ~mask | part << 8 * at) & _LONG
