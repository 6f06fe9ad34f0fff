"""The AArch64 generic timer of one CPU: the EL1 physical and virtual timers (Arm ARM, D11.2).

Both count virtual time at 62.5 MHz, QEMU's rate; the virtual offset is 0. A timer's output line is high
while it is enabled, not masked, and its counter has reached the compare value; the line is a level, so the
handler lowers it by moving the compare value or masking the timer. Registers carry their architectural
names (``CNTV_CTL_EL0``).
"""

from __future__ import annotations

from xipvm.clock import Call, EventClock
from xipvm.devices.device import IrqLine

FREQUENCY = 62_500_000
NS_PER_TICK = 1_000_000_000 // FREQUENCY

CTL_ENABLE = 1 << 0
CTL_IMASK = 1 << 1
CTL_ISTATUS = 1 << 2
_LONG = 0xFFFF_FFFF_FFFF_FFFF
# Compare values that lie centuries ahead are how guests say "never".
_NEVER = 1 << 63


class ArchTimer:
    """The timer registers of one CPU; the lines are the interrupts of its physical and virtual timer."""

    def __init__(self, clock: EventClock, physical: IrqLine, virtual: IrqLine) -> None:
        self._clock = clock
        self._timers = {"CNTP": _Timer(clock, physical), "CNTV": _Timer(clock, virtual)}
        self._frequency = FREQUENCY

    def reset(self) -> None:
        """Both timers off."""
        self._frequency = FREQUENCY
        for timer in self._timers.values():
            timer.reset()

    def read_sysreg(self, name: str, now: int | None = None) -> int:
        """System register ``name`` at virtual time ``now`` (ns; None: the clock's). Raises KeyError."""
        count = (self._clock.now if now is None else now) // NS_PER_TICK & _LONG
        if name in ("CNTPCT_EL0", "CNTVCT_EL0"):
            return count
        if name == "CNTFRQ_EL0":
            return self._frequency
        timer, register = self._timers[name[:4]], name[4:]
        if register == "_CVAL_EL0":
            return timer.compare
        if register == "_TVAL_EL0":
            return (timer.compare - count) & 0xFFFF_FFFF
        if register == "_CTL_EL0":
            return timer.control | (CTL_ISTATUS if timer.control & CTL_ENABLE and count >= timer.compare else 0)
        raise KeyError(name)

    def write_sysreg(self, name: str, value: int, now: int | None = None) -> None:
        """Write ``name``, see ``read_sysreg``; the counters ignore writes.

        CNTFRQ only tells software a number, the rate stays what it is.
        """
        if name in ("CNTPCT_EL0", "CNTVCT_EL0"):
            return
        if name == "CNTFRQ_EL0":
            self._frequency = value & 0xFFFF_FFFF
            return
        timer, register = self._timers[name[:4]], name[4:]
        if register == "_CVAL_EL0":
            timer.compare = value & _LONG
        elif register == "_TVAL_EL0":
            count = (self._clock.now if now is None else now) // NS_PER_TICK
            timer.compare = (count + ((value & 0xFFFF_FFFF) ^ 0x8000_0000) - 0x8000_0000) & _LONG
        elif register == "_CTL_EL0":
            timer.control = value & (CTL_ENABLE | CTL_IMASK)
        else:
            raise KeyError(name)
        timer.update()


class _Timer:
    """One comparator. ``control`` is without ISTATUS, which is computed."""

    __slots__ = ("_call", "_clock", "_line", "compare", "control")

    def __init__(self, clock: EventClock, line: IrqLine) -> None:
        self._clock = clock
        self._line = line
        self._call: Call | None = None
        self.control = self.compare = 0

    def reset(self) -> None:
        self.control = self.compare = 0
        self.update()

    def update(self) -> None:
        """Drive the line, and come back when the compare value is reached."""
        if self._call is not None:
            self._clock.cancel(self._call)
            self._call = None
        if self.control & (CTL_ENABLE | CTL_IMASK) != CTL_ENABLE:
            self._line(False)
            return
        at = self.compare * NS_PER_TICK
        reached = at <= self._clock.now
        if not reached and at < _NEVER:
            self._call = self._clock.call_at(at, self.update)
        self._line(reached)
