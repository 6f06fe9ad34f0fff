"""The AArch64 generic timer and the CLINT on virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.clock import EventClock
from xipvm.devices import clint as c
from xipvm.devices.arch_timer import ArchTimer
from xipvm.devices.clint import Clint


class Line:
    level = False

    def __call__(self, level: bool) -> None:
        self.level = level


class TestArchTimer:
    def make(self) -> tuple[EventClock, ArchTimer, Line, Line]:
        clock, physical, virtual = EventClock(), Line(), Line()
        return clock, ArchTimer(clock, physical, virtual), physical, virtual

    def test_counts_at_62_5_mhz(self) -> None:
        clock, timer, _, _ = self.make()
        assert timer.read_sysreg("CNTFRQ_EL0") == 62_500_000
        clock.advance(1_000_000_000)
        assert timer.read_sysreg("CNTVCT_EL0") == timer.read_sysreg("CNTPCT_EL0") == 62_500_000
        assert timer.read_sysreg("CNTVCT_EL0", now=32) == 2

    def test_fires_at_the_compare_value_and_not_before(self) -> None:
        clock, timer, physical, virtual = self.make()
        timer.write_sysreg("CNTV_CVAL_EL0", 10)
        timer.write_sysreg("CNTV_CTL_EL0", 1)
        assert clock.next_deadline() == 160
        clock.advance(159)
        assert not virtual.level
        assert timer.read_sysreg("CNTV_CTL_EL0") == 1
        clock.advance(1)
        assert virtual.level
        assert not physical.level
        assert timer.read_sysreg("CNTV_CTL_EL0") == 5

    def test_the_handler_lowers_it_by_value_or_by_mask(self) -> None:
        clock, timer, physical, _ = self.make()
        timer.write_sysreg("CNTP_TVAL_EL0", 5)
        timer.write_sysreg("CNTP_CTL_EL0", 1)
        clock.advance(100)
        assert physical.level
        timer.write_sysreg("CNTP_CTL_EL0", 3)
        assert not physical.level
        assert timer.read_sysreg("CNTP_CTL_EL0") == 7
        timer.write_sysreg("CNTP_CTL_EL0", 1)
        assert physical.level
        timer.write_sysreg("CNTP_TVAL_EL0", 100)
        assert not physical.level
        assert timer.read_sysreg("CNTP_CVAL_EL0") == 106
        clock.advance(1700)
        assert physical.level

    def test_tval_is_signed(self) -> None:
        clock, timer, physical, _ = self.make()
        clock.advance(1600)
        timer.write_sysreg("CNTP_TVAL_EL0", 0xFFFF_FFFF)
        assert timer.read_sysreg("CNTP_CVAL_EL0") == 99
        assert timer.read_sysreg("CNTP_TVAL_EL0") == 0xFFFF_FFFF
        timer.write_sysreg("CNTP_CTL_EL0", 1)
        assert physical.level

    def test_never_leaves_no_deadline(self) -> None:
        clock, timer, _, virtual = self.make()
        timer.write_sysreg("CNTV_CVAL_EL0", (1 << 64) - 1)
        timer.write_sysreg("CNTV_CTL_EL0", 1)
        assert clock.next_deadline() is None
        assert not virtual.level

    def test_a_timer_turned_off_leaves_no_deadline(self) -> None:
        clock, timer, _, _ = self.make()
        timer.write_sysreg("CNTV_CVAL_EL0", 10)
        timer.write_sysreg("CNTV_CTL_EL0", 1)
        timer.write_sysreg("CNTV_CVAL_EL0", 20)
        assert clock.next_deadline() == 320
        timer.write_sysreg("CNTV_CTL_EL0", 0)
        assert clock.next_deadline() is None

    def test_reset_turns_both_off(self) -> None:
        clock, timer, physical, virtual = self.make()
        for name in ("CNTP", "CNTV"):
            timer.write_sysreg(f"{name}_CTL_EL0", 1)
        assert (physical.level, virtual.level) == (True, True)
        timer.reset()
        assert (physical.level, virtual.level) == (False, False)
        assert clock.next_deadline() is None

    def test_unknown_registers_are_the_callers_error(self) -> None:
        _, timer, _, _ = self.make()
        for name in ("CNTHP_CTL_EL2", "CNTV_OFF_EL0"):
            with pytest.raises(KeyError):
                timer.read_sysreg(name)
            with pytest.raises(KeyError):
                timer.write_sysreg(name, 0)

    @settings(deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60), st.integers(0, 3)), max_size=12))
    def test_the_line_is_always_the_condition(self, steps: list[tuple[int, int, int]]) -> None:
        clock, timer, _, virtual = self.make()
        for ns, compare, control in steps:
            timer.write_sysreg("CNTV_CVAL_EL0", compare)
            timer.write_sysreg("CNTV_CTL_EL0", control)
            clock.advance(ns)
            assert virtual.level == (control == 1 and timer.read_sysreg("CNTVCT_EL0") >= compare)


class TestClint:
    def make(self, harts: int = 2) -> tuple[EventClock, Clint, list[Line], list[Line]]:
        clock = EventClock()
        msip, mtip = [Line() for _ in range(harts)], [Line() for _ in range(harts)]
        return clock, Clint(clock, msip, mtip), msip, mtip

    def test_software_interrupts(self) -> None:
        _, clint, msip, _ = self.make()
        clint.write(c.MSIP + 4, 4, 0xFFFF_FFFF)
        assert [line.level for line in msip] == [False, True]
        assert clint.read(c.MSIP + 4, 4) == 1
        clint.write(c.MSIP + 4, 4, 0)
        assert not msip[1].level

    def test_timer_compares_all_64_bits(self) -> None:
        clock, clint, _, mtip = self.make()
        clint.write(c.MTIMECMP + 8, 4, 50)
        assert not mtip[1].level
        clint.write(c.MTIMECMP + 12, 4, 0)
        clock.advance(4999)
        assert not mtip[1].level
        clock.advance(1)
        assert mtip[1].level
        assert not mtip[0].level
        assert clint.read(c.MTIME, 4) == 50
        clint.write(c.MTIMECMP + 12, 4, 1)
        assert not mtip[1].level
        assert clint.read(c.MTIMECMP + 8, 4) | clint.read(c.MTIMECMP + 12, 4) << 32 == 1 << 32 | 50

    def test_mtime_can_be_set_and_pulls_the_timers_along(self) -> None:
        clock, clint, _, mtip = self.make()
        clint.write(c.MTIMECMP, 4, 1000)
        clint.write(c.MTIMECMP + 4, 4, 0)
        clint.write(c.MTIME, 4, 999)
        assert clint.time() == 999
        assert not mtip[0].level
        clock.advance(100)
        assert mtip[0].level
        clint.reset()
        assert clint.time() == 1
        assert not mtip[0].level
        assert clock.next_deadline() is None

    def test_absent_harts_read_as_zero(self) -> None:
        _, clint, _, _ = self.make(1)
        for offset in (c.MSIP + 4, c.MTIMECMP + 8, 0xC000):
            clint.write(offset, 4, 1)
            assert clint.read(offset, 4) == 0
