"""The ARM PrimeCell real-time clock, PL031 (ARM DDI 0224), on virtual time.

Seconds count from a fixed ``EPOCH``, never from the host's calendar: two runs of one guest see one time.
The alarm fires when the counter equals the match register, and stays raised until it is cleared.
"""

from __future__ import annotations

from xipvm.clock import Call, EventClock
from xipvm.devices.device import IrqLine, no_line

DR = 0x00
MR = 0x04
LR = 0x08
CR = 0x0C
IMSC = 0x10
RIS = 0x14
MIS = 0x18
ICR = 0x1C
PERIPH_ID0 = 0xFE0

EPOCH = 1_704_067_200
"""2024-01-01 00:00:00 UTC, in seconds: what the machine's clocks show at power-on."""

SECOND = 1_000_000_000
_IDS = (0x31, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_WORD = 0xFFFF_FFFF


class Pl031:
    """A PL031; ``irq`` is its interrupt, RTCINTR."""

    name = "pl031"

    def __init__(self, clock: EventClock, irq: IrqLine = no_line) -> None:
        self._clock = clock
        self._irq = irq
        self._alarm: Call | None = None
        self.reset()

    def reset(self) -> None:
        """Power-on: the epoch at virtual time 0, no alarm."""
        self._offset = EPOCH
        self._match = self._load = self._mask = self._raised = 0
        self._disarm()
        self._irq(False)

    def read(self, offset: int, size: int) -> int:
        """Registers are words."""
        if offset == DR:
            return self._seconds()
        if offset == MR:
            return self._match
        if offset == LR:
            return self._load
        if offset == CR:
            return 1
        if offset == IMSC:
            return self._mask
        if offset == RIS:
            return self._raised
        if offset == MIS:
            return self._raised & self._mask
        if offset >= PERIPH_ID0 and offset % 4 == 0:
            return _IDS[(offset - PERIPH_ID0) // 4]
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Writing LR sets the time, MR the alarm; the clock cannot be stopped."""
        if offset == LR:
            self._load = value
            self._offset = (value - self._clock.now // SECOND) & _WORD
            self._arm()
        elif offset == MR:
            self._match = value
            self._arm()
        elif offset == IMSC:
            self._mask = value & 1
        elif offset == ICR and value & 1:
            self._raised = 0
        self._update()

    def _seconds(self) -> int:
        return (self._offset + self._clock.now // SECOND) & _WORD

    def _arm(self) -> None:
        self._disarm()
        now = self._clock.now // SECOND
        left = (self._match - self._offset - now) & _WORD
        if left == 0:
            self._fire()
        else:
            self._alarm = self._clock.call_at((now + left) * SECOND, self._fire)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._clock.cancel(self._alarm)
            self._alarm = None

    def _fire(self) -> None:
        self._raised = 1
        self._update()

    def _update(self) -> None:
        self._irq(bool(self._raised & self._mask))
