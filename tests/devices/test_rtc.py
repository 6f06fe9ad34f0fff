"""The real-time clocks show virtual time."""

from __future__ import annotations

from xipvm.clock import EventClock
from xipvm.devices import goldfish_rtc as gf
from xipvm.devices import pl031
from xipvm.devices.goldfish_rtc import GoldfishRtc
from xipvm.devices.pl031 import EPOCH, SECOND, Pl031


def test_pl031_counts_virtual_seconds_and_can_be_set() -> None:
    clock = EventClock()
    rtc = Pl031(clock)
    assert rtc.read(pl031.DR, 4) == EPOCH
    clock.advance(2 * SECOND + 1)
    assert rtc.read(pl031.DR, 4) == EPOCH + 2
    rtc.write(pl031.LR, 4, 1000)
    clock.advance(SECOND)
    assert rtc.read(pl031.DR, 4) == 1001
    assert [rtc.read(pl031.PERIPH_ID0 + 4 * i, 4) for i in range(8)] == [0x31, 0x10, 0x14, 0, 0x0D, 0xF0, 5, 0xB1]


def test_pl031_alarm_fires_at_its_second_and_is_cleared() -> None:
    clock, levels = EventClock(), [False]
    rtc = Pl031(clock, lambda level: levels.append(level))
    rtc.write(pl031.IMSC, 4, 1)
    rtc.write(pl031.MR, 4, EPOCH + 3)
    clock.advance(3 * SECOND - 1)
    assert not levels[-1]
    clock.advance(1)
    assert levels[-1]
    assert rtc.read(pl031.MIS, 4) == 1
    rtc.write(pl031.ICR, 4, 1)
    assert not levels[-1]
    assert rtc.read(pl031.RIS, 4) == 0


def test_goldfish_time_is_one_instant_and_can_be_set() -> None:
    clock = EventClock()
    rtc = GoldfishRtc(clock)
    clock.advance(123)
    low = rtc.read(gf.TIME_LOW, 4)
    clock.advance(SECOND * 100)
    assert rtc.read(gf.TIME_HIGH, 4) << 32 | low == EPOCH * SECOND + 123
    rtc.write(gf.TIME_HIGH, 4, 5)
    rtc.write(gf.TIME_LOW, 4, 6)
    clock.advance(4)
    assert rtc.read(gf.TIME_LOW, 4) == 10
    assert rtc.read(gf.TIME_HIGH, 4) == 5


def test_goldfish_alarm() -> None:
    clock, levels = EventClock(), [False]
    rtc = GoldfishRtc(clock, lambda level: levels.append(level))
    at = EPOCH * SECOND + 500
    rtc.write(gf.ALARM_HIGH, 4, at >> 32)
    rtc.write(gf.ALARM_LOW, 4, at & 0xFFFF_FFFF)
    rtc.write(gf.IRQ_ENABLED, 4, 1)
    assert rtc.read(gf.ALARM_STATUS, 4) == 1
    clock.advance(499)
    assert not levels[-1]
    clock.advance(1)
    assert levels[-1]
    rtc.write(gf.CLEAR_INTERRUPT, 4, 1)
    assert not levels[-1]
    rtc.write(gf.ALARM_LOW, 4, (at + 900) & 0xFFFF_FFFF)
    rtc.write(gf.CLEAR_ALARM, 4, 1)
    clock.advance(2000)
    assert not levels[-1]
