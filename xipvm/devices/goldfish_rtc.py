"""The Goldfish real-time clock that QEMU's RISC-V board has, on virtual time.

Nanoseconds since the same fixed epoch as the PL031's. Reading TIME_LOW latches the upper half for
TIME_HIGH, so the pair is one instant; writes take the upper half first, likewise.
"""

from __future__ import annotations

from xipvm.clock import Call, EventClock
from xipvm.devices.device import IrqLine, no_line
from xipvm.devices.pl031 import EPOCH, SECOND

TIME_LOW = 0x00
TIME_HIGH = 0x04
ALARM_LOW = 0x08
ALARM_HIGH = 0x0C
IRQ_ENABLED = 0x10
CLEAR_ALARM = 0x14
ALARM_STATUS = 0x18
CLEAR_INTERRUPT = 0x1C

_LOW = 0xFFFF_FFFF
_HIGH = _LOW << 32


class GoldfishRtc:
    """A Goldfish RTC; ``irq`` is its interrupt."""

    name = "goldfish-rtc"

    def __init__(self, clock: EventClock, irq: IrqLine = no_line) -> None:
        self._clock = clock
        self._irq = irq
        self._call: Call | None = None
        self.reset()

    def reset(self) -> None:
        """Power-on: the epoch at virtual time 0, no alarm."""
        self._offset = EPOCH * SECOND
        self._time_high = self._alarm = 0
        self._enabled = self._pending = False
        self._disarm()
        self._irq(False)

    def read(self, offset: int, size: int) -> int:
        """Registers are words."""
        if offset == TIME_LOW:
            now = self._offset + self._clock.now
            self._time_high = now >> 32 & _LOW
            return now & _LOW
        if offset == TIME_HIGH:
            return self._time_high
        if offset == ALARM_LOW:
            return self._alarm & _LOW
        if offset == ALARM_HIGH:
            return self._alarm >> 32
        if offset == IRQ_ENABLED:
            return int(self._enabled)
        return int(self._call is not None) if offset == ALARM_STATUS else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Writing a low half makes the pair count."""
        if offset == TIME_LOW:
            self._offset = (self._time_high << 32 | value) - self._clock.now
        elif offset == TIME_HIGH:
            self._time_high = value
        elif offset == ALARM_LOW:
            self._alarm = self._alarm & _HIGH | value
            self._arm()
        elif offset == ALARM_HIGH:
            self._alarm = self._alarm & _LOW | value << 32
        elif offset == IRQ_ENABLED:
            self._enabled = bool(value & 1)
        elif offset == CLEAR_ALARM:
            self._disarm()
        elif offset == CLEAR_INTERRUPT:
            self._pending = False
        self._update()

    def _arm(self) -> None:
        self._disarm()
        at = self._alarm - self._offset
        if at <= self._clock.now:
            self._fire()
        else:
            self._call = self._clock.call_at(at, self._fire)

    def _disarm(self) -> None:
        if self._call is not None:
            self._clock.cancel(self._call)
            self._call = None

    def _fire(self) -> None:
        self._call = None
        self._pending = True
        self._update()

    def _update(self) -> None:
        self._irq(self._pending and self._enabled)
