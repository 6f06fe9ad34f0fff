"""GICv2 through its registers, as an operating system drives it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xipvm.devices import gic as g
from xipvm.devices.gic import SPURIOUS, Gic


class Machine:
    """A GIC, the IRQ levels of its CPUs, and whose turn it is."""

    def __init__(self, cpus: int = 1, spis: int = 64) -> None:
        self.cpu = 0
        self.levels = [False] * cpus
        self.changes = 0
        self.gic = Gic([self._line(cpu) for cpu in range(cpus)], lambda: self.cpu, spis)

    def _line(self, cpu: int):  # type: ignore[no-untyped-def]
        def line(level: bool) -> None:
            assert level != self.levels[cpu], "outputs are called on changes only"
            self.levels[cpu] = level
            self.changes += 1

        return line

    def enable_everything(self, mask: int = 0xFF) -> None:
        self.dist(g.GICD_CTLR, 1)
        for cpu in range(len(self.levels)):
            self.cpu = cpu
            for irq in range(0, self.gic.irqs, 32):
                self.dist(g.GICD_ISENABLER + irq // 8, 0xFFFF_FFFF)
            for irq in range(0, self.gic.irqs, 4):
                self.dist(g.GICD_IPRIORITYR + irq, 0x8080_8080)
            self.iface(g.GICC_PMR, mask)
            self.iface(g.GICC_CTLR, 1)
        self.cpu = 0

    def dist(self, offset: int, value: int | None = None, size: int = 4) -> int:
        if value is None:
            return self.gic.distributor.read(offset, size)
        self.gic.distributor.write(offset, size, value)
        return 0

    def iface(self, offset: int, value: int | None = None) -> int:
        if value is None:
            return self.gic.cpu_interface.read(offset, 4)
        self.gic.cpu_interface.write(offset, 4, value)
        return 0

    def ack(self, cpu: int = 0) -> int:
        self.cpu = cpu
        return self.iface(g.GICC_IAR)

    def end(self, value: int, cpu: int = 0) -> None:
        self.cpu = cpu
        self.iface(g.GICC_EOIR, value)


def test_what_it_says_it_is() -> None:
    machine = Machine(cpus=3, spis=256)
    assert machine.dist(g.GICD_TYPER) == 8 | 2 << 5
    assert machine.dist(g.GICD_IIDR) & 0xFFF == 0x43B
    assert machine.dist(0xFE8) >> 4 & 0xF == 2
    assert machine.iface(g.GICC_IIDR) >> 16 & 0xF == 2
    assert machine.dist(g.GICD_ICFGR) == 0xAAAA_AAAA
    assert machine.iface(g.GICC_RPR) == 0xFF
    for cpu in range(3):
        machine.cpu = cpu
        assert machine.dist(g.GICD_ITARGETSR) == 0x0101_0101 << cpu
    with pytest.raises(ValueError, match="1 to 8 CPUs"):
        Machine(cpus=9)


def test_a_level_interrupt_stays_until_its_line_falls() -> None:
    machine = Machine()
    line = machine.gic.spi(1)
    line(True)
    assert not machine.levels[0]
    machine.enable_everything()
    assert machine.levels[0]
    assert machine.ack() == 33
    assert not machine.levels[0]
    assert machine.iface(g.GICC_RPR) == 0x80
    machine.end(33)
    assert machine.levels[0]
    assert machine.ack() == 33
    line(False)
    machine.end(33)
    assert not machine.levels[0]
    assert machine.ack() == SPURIOUS
    line(True)
    line(False)
    assert not machine.levels[0], "a level that fell again is forgotten"


def test_an_edge_is_remembered_once() -> None:
    machine = Machine()
    machine.dist(g.GICD_ICFGR + 8, 2 << 2 * 5)
    assert machine.dist(g.GICD_ICFGR + 8) == 2 << 10
    machine.enable_everything()
    line = machine.gic.spi(5)
    line(True)
    line(False)
    assert machine.ack() == 37
    assert machine.ack() == SPURIOUS
    line(True)
    line(False)
    line(True)
    assert not machine.levels[0]
    machine.end(37)
    assert machine.ack() == 37
    machine.end(37)
    assert machine.ack() == SPURIOUS


def test_priorities_order_mask_and_preempt() -> None:
    machine = Machine()
    machine.enable_everything(mask=0xF0)
    machine.dist(g.GICD_IPRIORITYR + 40, 0x40, size=1)
    machine.dist(g.GICD_IPRIORITYR + 41, 0xF0, size=1)
    low, high, masked = machine.gic.spi(0), machine.gic.spi(8), machine.gic.spi(9)
    masked(True)
    assert not machine.levels[0]
    assert machine.iface(g.GICC_HPPIR) == 41
    low(True)
    assert machine.ack() == 32
    machine.gic.spi(1)(True)
    assert not machine.levels[0], "equal priority does not preempt"
    high(True)
    assert machine.levels[0]
    assert machine.ack() == 40
    assert machine.iface(g.GICC_RPR) == 0x40
    machine.end(40)
    assert machine.iface(g.GICC_RPR) == 0x80


def test_the_binary_point_groups_priorities() -> None:
    machine = Machine()
    machine.enable_everything()
    machine.dist(g.GICD_IPRIORITYR + 40, 0x70, size=1)
    machine.gic.spi(0)(True)
    machine.iface(g.GICC_BPR, 7)
    machine.ack()
    machine.gic.spi(8)(True)
    assert not machine.levels[0]
    machine.end(32)
    assert machine.ack() == 40


def test_sgis_carry_their_source_and_are_banked() -> None:
    machine = Machine(cpus=4)
    machine.enable_everything()
    machine.cpu = 2
    machine.dist(g.GICD_SGIR, 0b0011 << 16 | 7)
    machine.cpu = 3
    machine.dist(g.GICD_SGIR, 1 << 24 | 7)
    assert machine.levels == [True, True, True, False]
    assert machine.ack(0) == 7 | 2 << 10
    machine.end(7 | 2 << 10, 0)
    assert machine.ack(0) == 7 | 3 << 10
    machine.end(7 | 3 << 10, 0)
    assert machine.ack(0) == SPURIOUS
    assert machine.ack(2) == 7 | 3 << 10
    machine.cpu = 1
    assert machine.dist(g.GICD_SPENDSGIR + 7, size=1) == 0b1100
    machine.dist(g.GICD_CPENDSGIR + 7, 0b0100, size=1)
    assert machine.ack(1) == 7 | 3 << 10
    machine.cpu = 3
    machine.dist(g.GICD_SGIR, 2 << 24 | 1)
    assert machine.ack(3) == 1 | 3 << 10
    machine.dist(g.GICD_ICENABLER, 0xFFFF_FFFF)
    assert machine.dist(g.GICD_ISENABLER) == 0xFFFF


def test_ppis_are_each_cpus_own() -> None:
    machine = Machine(cpus=2)
    machine.enable_everything()
    machine.gic.ppi(1, 27)(True)
    assert machine.levels == [False, True]
    assert machine.ack(0) == SPURIOUS
    assert machine.ack(1) == 27
    machine.cpu = 1
    assert machine.dist(g.GICD_ISACTIVER) == 1 << 27
    machine.cpu = 0
    assert machine.dist(g.GICD_ISACTIVER) == 0


def test_an_spi_goes_to_its_targets_and_to_one_of_them() -> None:
    machine = Machine(cpus=3)
    machine.enable_everything()
    line = machine.gic.spi(4)
    line(True)
    assert machine.levels == [False] * 3
    machine.dist(g.GICD_ITARGETSR + 36, 0b110, size=1)
    assert machine.levels == [False, True, True]
    assert machine.ack(2) == 36
    assert machine.levels == [False] * 3
    assert machine.ack(1) == SPURIOUS
    line(False)
    machine.end(36, 2)
    assert machine.levels == [False] * 3


def test_eoi_mode_splits_drop_and_deactivation() -> None:
    machine = Machine()
    machine.enable_everything()
    machine.iface(g.GICC_CTLR, 1 | g.GICC_CTLR_EOIMODE)
    machine.gic.spi(0)(True)
    assert machine.ack() == 32
    machine.end(32)
    assert machine.iface(g.GICC_RPR) == 0xFF
    assert not machine.levels[0]
    machine.iface(g.GICC_DIR, 32)
    assert machine.levels[0]


def test_software_pending_and_disable() -> None:
    machine = Machine()
    machine.enable_everything()
    machine.dist(g.GICD_ISPENDR + 4, 1 << 3)
    assert machine.levels[0]
    machine.dist(g.GICD_ICENABLER + 4, 1 << 3)
    assert not machine.levels[0]
    assert machine.dist(g.GICD_ISPENDR + 4) == 1 << 3
    machine.dist(g.GICD_ICPENDR + 4, 1 << 3)
    machine.dist(g.GICD_ISENABLER + 4, 1 << 3)
    assert not machine.levels[0]


def test_reset_silences_everything() -> None:
    machine = Machine()
    machine.enable_everything()
    machine.gic.spi(0)(True)
    machine.gic.reset()
    assert not machine.levels[0]
    machine.enable_everything()
    assert machine.ack() == SPURIOUS


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 0xFFC // 4), st.integers(0, 0xFFFF_FFFF), st.sampled_from([1, 2, 4]))
def test_any_register_takes_any_access(word: int, value: int, size: int) -> None:
    machine = Machine(cpus=2)
    for offset in (word * 4, word * 4 + 4 - size):
        machine.dist(offset, value & ((1 << 8 * size) - 1), size)
        assert 0 <= machine.dist(offset, size=size) < 1 << 8 * size
    machine.iface(word * 4, value)
    assert 0 <= machine.iface(word * 4) <= 0xFFFF_FFFF


class GicInvariants(RuleBasedStateMachine):
    """Two CPUs, eight SPIs of either kind, and every handler in any order.

    The model is each interrupt's own life: who has it, and whether it must come again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(cpus=2, spis=32)
        self.machine.enable_everything()
        self.machine.dist(g.GICD_ICFGR + 8, 0xAA << 8)  # SPIs 4 to 7: edge
        self.lines = [self.machine.gic.spi(spi) for spi in range(8)]
        self.high = [False] * 8
        self.owed = [False] * 8  # an edge came that nobody acknowledged
        self.owner: dict[int, int] = {}
        self.target = [0] * 8

    @rule(spi=st.integers(0, 7), level=st.booleans())
    def drive(self, spi: int, level: bool) -> None:
        self.owed[spi] |= spi >= 4 and level and not self.high[spi]
        self.high[spi] = level
        self.lines[spi](level)

    @rule(spi=st.integers(0, 7), cpus=st.integers(0, 3))
    def aim(self, spi: int, cpus: int) -> None:
        self.target[spi] = cpus
        self.machine.dist(g.GICD_ITARGETSR + 32 + spi, cpus, size=1)

    @rule(cpu=st.integers(0, 1))
    def acknowledge(self, cpu: int) -> None:
        expected = self.expected(cpu)
        irq = self.machine.ack(cpu)
        assert irq == (32 + min(expected) if expected else SPURIOUS)
        if irq != SPURIOUS:
            self.owner[irq - 32] = cpu
            self.owed[irq - 32] = False

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        spi = data.draw(st.sampled_from(sorted(self.owner)))
        self.machine.end(32 + spi, self.owner.pop(spi))

    def expected(self, cpu: int) -> list[int]:
        if cpu in self.owner.values():
            return []  # all have one priority: nothing preempts
        return [
            spi
            for spi in range(8)
            if spi not in self.owner
            and self.target[spi] >> cpu & 1
            and (self.owed[spi] if spi >= 4 else self.high[spi])
        ]

    @invariant()
    def outputs_say_what_acknowledging_would_give(self) -> None:
        assert self.machine.levels == [bool(self.expected(cpu)) for cpu in range(2)]

    @invariant()
    def active_bits_are_the_owned_ones(self) -> None:
        assert self.machine.dist(g.GICD_ISACTIVER + 4) == sum(1 << spi for spi in self.owner)


GicInvariants.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestGicInvariants = GicInvariants.TestCase
