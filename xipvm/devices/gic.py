"""The ARM Generic Interrupt Controller, version 2 (ARM IHI 0048B): distributor and CPU interfaces.

SGIs (ids 0 to 15) and PPIs (16 to 31) are banked for each CPU; SPIs (32 and up) are shared and go to the
CPUs in their target mask, the first to acknowledge has it. Left out: interrupt groups and security (one
group, IGROUPR and the alias registers are zero), FIQ, and virtualization. SGIs are always enabled.

The life of an interrupt: a line or a register makes it *pending*; a CPU that reads IAR makes it *active*;
EOIR (with EOImode, DIR) makes it inactive. While it is active it is signalled to nobody, but it can become
pending again. Invariants: an edge-triggered interrupt is pending because of its latch alone, a level one as
long as its line is high or ISPENDR latched it; each CPU's IRQ output is called on changes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xipvm.devices.device import IrqLine

GICD_CTLR = 0x000
GICD_TYPER = 0x004
GICD_IIDR = 0x008
GICD_ISENABLER = 0x100
GICD_ICENABLER = 0x180
GICD_ISPENDR = 0x200
GICD_ICPENDR = 0x280
GICD_ISACTIVER = 0x300
GICD_IPRIORITYR = 0x400
GICD_ITARGETSR = 0x800
GICD_ICFGR = 0xC00
GICD_SGIR = 0xF00
GICD_CPENDSGIR = 0xF10
GICD_SPENDSGIR = 0xF20
GICD_IDS = 0xFD0

GICC_CTLR = 0x0000
GICC_PMR = 0x0004
GICC_BPR = 0x0008
GICC_IAR = 0x000C
GICC_EOIR = 0x0010
GICC_RPR = 0x0014
GICC_HPPIR = 0x0018
GICC_IIDR = 0x00FC
GICC_DIR = 0x1000
GICC_CTLR_EOIMODE = 1 << 9

SGIS = 16
PRIVATE = 32
SPURIOUS = 1023
MAX_CPUS = 8
_IDLE_PRIORITY = 0xFF
_WORD = 0xFFFF_FFFF
_DISTRIBUTOR_ID = 0x43B
_INTERFACE_ID = 0x2_043B
# Peripheral ids 4 to 7 and 0 to 3 (architecture version 2), and the PrimeCell id; one byte a word.
_IDS = (0x04, 0x00, 0x00, 0x00, 0x90, 0xB4, 0x2B, 0x00, 0x0D, 0xF0, 0x05, 0xB1)


class _Bank:
    """The state of ``count`` interrupts, one bit each; ``line`` is the level of their inputs."""

    __slots__ = ("active", "edge", "enabled", "latch", "line", "priority")

    def __init__(self, count: int, always: int = 0) -> None:
        self.enabled = always
        self.edge = always
        self.latch = self.line = self.active = 0
        self.priority = bytearray(count)

    def pending(self) -> int:
        """The bits of pending interrupts."""
        return self.latch | self.line & ~self.edge

    def set_line(self, bit: int, level: bool) -> bool:
        """Whether the level is a new one."""
        if bool(self.line & bit) == level:
            return False
        self.line ^= bit
        if level:
            self.latch |= self.edge & bit
        return True


class Gic:
    """A GICv2 for up to 8 CPUs with ``spis`` shared interrupts (a multiple of 32).

    ``outputs`` are the CPUs' IRQ inputs; ``current()`` is the number of the CPU that makes the present access.
    """

    def __init__(self, outputs: Sequence[IrqLine], current: Callable[[], int], spis: int = 256) -> None:
        if not 1 <= len(outputs) <= MAX_CPUS or spis % 32:
            raise ValueError(
                f"a GICv2 has 1 to {MAX_CPUS} CPUs and a multiple of 32 SPIs, not {len(outputs)} and {spis}"
            )
        self.current = current
        self.distributor = Distributor(self)
        self.cpu_interface = CpuInterface(self)
        self._outputs = outputs
        self._spis = spis
        self._levels = [False] * len(outputs)
        self._private: list[_Bank] = []
        self._shared = _Bank(spis)
        self.reset()

    def reset(self) -> None:
        """Everything disabled and inactive, every input line low: devices drive theirs anew when they reset."""
        self._private = [_Bank(PRIVATE, always=(1 << SGIS) - 1) for _ in self._outputs]
        self._shared = _Bank(self._spis)
        self.targets = bytearray(self._spis)
        self.sgi_sources = [bytearray(SGIS) for _ in self._outputs]
        self.enabled = 0
        self.interfaces = [_Interface() for _ in self._outputs]
        self.update()

    def spi(self, number: int) -> IrqLine:
        """The input line of SPI ``number`` (0 is interrupt id 32)."""
        bit = 1 << number

        def line(level: bool) -> None:
            if self._shared.set_line(bit, level):
                self.update()

        return line

    def ppi(self, cpu: int, irq: int) -> IrqLine:
        """The input line of private interrupt id ``irq`` (16 to 31) of ``cpu``."""
        bit = 1 << irq

        def line(level: bool) -> None:
            if self._private[cpu].set_line(bit, level):
                self.update()

        return line

    def bank(self, cpu: int, irq: int) -> tuple[_Bank, int]:
        """Where interrupt id ``irq`` of ``cpu`` is kept, and its number there."""
        return (self._private[cpu], irq) if irq < PRIVATE else (self._shared, irq - PRIVATE)

    @property
    def irqs(self) -> int:
        """How many interrupt ids there are."""
        return PRIVATE + self._spis

    @property
    def cpus(self) -> int:
        """How many CPUs there are."""
        return len(self._outputs)

    def targets_of(self, spi: int) -> int:
        """The CPUs that SPI ``spi`` goes to; with one CPU there is no choice."""
        return self.targets[spi] if self.cpus > 1 else 1

    def best(self, cpu: int) -> tuple[int, int]:
        """(id, priority) of the pending interrupt for ``cpu`` that goes first, ``SPURIOUS`` when none is.

        Lowest priority value first, then lowest id. Running priority and priority mask are not looked at.
        """
        found, found_priority = SPURIOUS, _IDLE_PRIORITY + 1
        if not self.enabled:
            return found, found_priority
        for base, bank in ((0, self._private[cpu]), (PRIVATE, self._shared)):
            candidates = bank.pending() & bank.enabled & ~bank.active
            while candidates:
                low = candidates & -candidates
                candidates ^= low
                number = low.bit_length() - 1
                priority = bank.priority[number]
                if priority < found_priority and (not base or self.targets_of(number) >> cpu & 1):
                    found, found_priority = base + number, priority
        return found, found_priority

    def signalled(self, cpu: int) -> int:
        """The interrupt id that ``cpu``'s IRQ output stands for now, ``SPURIOUS`` when it is low."""
        interface = self.interfaces[cpu]
        irq, priority = self.best(cpu)
        if not interface.enabled or priority >= interface.mask:
            return SPURIOUS
        return irq if interface.group(priority) < interface.running_priority() else SPURIOUS

    def update(self) -> None:
        """Drive the IRQ outputs from the present state."""
        for cpu, output in enumerate(self._outputs):
            level = self.signalled(cpu) != SPURIOUS
            if level != self._levels[cpu]:
                self._levels[cpu] = level
                output(level)

    def send_sgi(self, source: int, targets: int, sgi: int) -> None:
        """Make ``sgi`` from CPU ``source`` pending on the CPUs in the mask ``targets``."""
        for cpu in range(self.cpus):
            if targets >> cpu & 1:
                self.sgi_sources[cpu][sgi] |= 1 << source
                self._private[cpu].latch |= 1 << sgi
        self.update()

    def clear_sgi(self, cpu: int, sgi: int, sources: int) -> None:
        """``sgi`` of ``cpu`` is no longer pending from the CPUs in the mask ``sources``."""
        self.sgi_sources[cpu][sgi] &= ~sources
        if not self.sgi_sources[cpu][sgi]:
            self._private[cpu].latch &= ~(1 << sgi)
        self.update()

    def acknowledge(self, cpu: int) -> int:
        """What reading IAR does and returns: id, and for an SGI its source CPU from bit 10."""
        irq = self.signalled(cpu)
        if irq == SPURIOUS:
            return SPURIOUS
        bank, number = self.bank(cpu, irq)
        answer = irq
        bank.active |= 1 << number
        if irq < SGIS:
            sources = self.sgi_sources[cpu][irq]
            source = (sources & -sources).bit_length() - 1
            answer |= source << 10
            self.clear_sgi(cpu, irq, 1 << source)
        else:
            bank.latch &= ~(1 << number)
        interface = self.interfaces[cpu]
        interface.running.append((irq, interface.group(bank.priority[number])))
        self.update()
        return answer

    def drop_priority(self, cpu: int, irq: int) -> bool:
        """End ``irq``'s running priority on ``cpu``; False when the CPU is not running it."""
        running = self.interfaces[cpu].running
        for index in range(len(running) - 1, -1, -1):
            if running[index][0] == irq:
                del running[index]
                self.update()
                return True
        return False

    def deactivate(self, cpu: int, irq: int) -> None:
        """``irq`` is handled: it can be signalled again."""
        if irq < self.irqs:
            bank, number = self.bank(cpu, irq)
            bank.active &= ~(1 << number)
            self.update()


class _Interface:
    """One CPU's interface; ``running`` are the acknowledged (id, group priority) pairs, oldest first."""

    __slots__ = ("binary_point", "control", "mask", "running")

    def __init__(self) -> None:
        self.control = 0
        self.mask = 0
        self.binary_point = 0
        self.running: list[tuple[int, int]] = []

    @property
    def enabled(self) -> int:
        return self.control & 1

    def group(self, priority: int) -> int:
        """The part of a priority that decides preemption."""
        return priority & (_IDLE_PRIORITY << (self.binary_point + 1) & _IDLE_PRIORITY)

    def running_priority(self) -> int:
        return min((priority for _, priority in self.running), default=_IDLE_PRIORITY)


class Distributor:
    """The distributor's registers; the map calls it ``gic-dist``. Words, and bytes where the manual allows."""

    name = "gic-dist"

    def __init__(self, gic: Gic) -> None:
        self._gic = gic

    def read(self, offset: int, size: int) -> int:
        """Private interrupts show as those of the CPU that reads."""
        if self._by_byte(offset):
            return sum(self._read_byte(offset + i) << 8 * i for i in range(size))
        return self._read_word(offset & ~3) >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """See ``read``."""
        if self._by_byte(offset):
            for i in range(size):
                self._write_byte(offset + i, value >> 8 * i & 0xFF)
        else:
            self._write_word(offset & ~3, value << 8 * (offset & 3))
        self._gic.update()

    @staticmethod
    def _by_byte(offset: int) -> bool:
        return GICD_IPRIORITYR <= offset < GICD_ICFGR or GICD_CPENDSGIR <= offset < GICD_SPENDSGIR + SGIS

    def _read_byte(self, offset: int) -> int:
        gic, cpu = self._gic, self._gic.current()
        if offset >= GICD_CPENDSGIR:
            return gic.sgi_sources[cpu][offset % SGIS]
        irq = offset % GICD_IPRIORITYR
        if irq >= gic.irqs:
            return 0
        if offset < GICD_ITARGETSR:
            bank, number = gic.bank(cpu, irq)
            return bank.priority[number]
        if gic.cpus == 1:
            return 0
        return 1 << cpu if irq < PRIVATE else gic.targets[irq - PRIVATE]

    def _write_byte(self, offset: int, value: int) -> None:
        gic, cpu = self._gic, self._gic.current()
        if offset >= GICD_SPENDSGIR:
            for source in range(gic.cpus):
                if value >> source & 1:
                    gic.send_sgi(source, 1 << cpu, offset % SGIS)
            return
        if offset >= GICD_CPENDSGIR:
            gic.clear_sgi(cpu, offset % SGIS, value)
            return
        irq = offset % GICD_IPRIORITYR
        if irq >= gic.irqs:
            return
        if offset < GICD_ITARGETSR:
            bank, number = gic.bank(cpu, irq)
            bank.priority[number] = value
        elif irq >= PRIVATE and gic.cpus > 1:
            gic.targets[irq - PRIVATE] = value & ((1 << gic.cpus) - 1)

    def _read_word(self, offset: int) -> int:
        gic = self._gic
        if offset == GICD_CTLR:
            return gic.enabled
        if offset == GICD_TYPER:
            return gic.irqs // 32 - 1 | (gic.cpus - 1) << 5
        if offset == GICD_IIDR:
            return _DISTRIBUTOR_ID
        if offset >= GICD_IDS:
            return _IDS[(offset - GICD_IDS) // 4] if offset < GICD_IDS + 4 * len(_IDS) else 0
        if GICD_ICFGR <= offset < GICD_ICFGR + 0x100:
            return self._read_config((offset - GICD_ICFGR) * 4)
        found = self._bits(offset)
        if found is None:
            return 0
        bank, shift = found
        block = offset & ~0x7F
        if block in (GICD_ISENABLER, GICD_ICENABLER):
            return bank.enabled >> shift & _WORD
        if block in (GICD_ISPENDR, GICD_ICPENDR):
            return bank.pending() >> shift & _WORD
        return bank.active >> shift & _WORD

    def _write_word(self, offset: int, value: int) -> None:
        gic = self._gic
        if offset == GICD_CTLR:
            gic.enabled = value & 1
            return
        if offset == GICD_SGIR:
            self._send_sgi(value)
            return
        if GICD_ICFGR <= offset < GICD_ICFGR + 0x100:
            self._write_config((offset - GICD_ICFGR) * 4, value)
            return
        found = self._bits(offset)
        if found is None:
            return
        bank, shift = found
        value <<= shift
        block = offset & ~0x7F
        # SGIs cannot be disabled, nor made pending here: that takes a source CPU.
        changeable = value if offset & 0x7F else value & ~((1 << SGIS) - 1)
        if block == GICD_ISENABLER:
            bank.enabled |= value
        elif block == GICD_ICENABLER:
            bank.enabled &= ~changeable
        elif block == GICD_ISPENDR:
            bank.latch |= changeable
        elif block == GICD_ICPENDR:
            bank.latch &= ~changeable
        elif block == GICD_ISACTIVER:
            bank.active |= value
        else:  # GICD_ICACTIVER, the last of them
            bank.active &= ~value

    def _bits(self, offset: int) -> tuple[_Bank, int] | None:
        """The bank and the first bit of a one-bit-per-interrupt register, None for other offsets."""
        if not GICD_ISENABLER <= offset < GICD_IPRIORITYR:
            return None
        irq = (offset & 0x7F) * 8
        return self._gic.bank(self._gic.current(), irq) if irq < self._gic.irqs else None

    def _read_config(self, irq: int) -> int:
        if irq >= self._gic.irqs:
            return 0
        bank, shift = self._gic.bank(self._gic.current(), irq)
        return sum(2 << 2 * i for i in range(16) if bank.edge >> (shift + i) & 1)

    def _write_config(self, irq: int, value: int) -> None:
        if not SGIS <= irq < self._gic.irqs:
            return
        bank, shift = self._gic.bank(self._gic.current(), irq)
        edges = sum(1 << i for i in range(16) if value >> (2 * i + 1) & 1)
        bank.edge = bank.edge & ~(0xFFFF << shift) | edges << shift

    def _send_sgi(self, value: int) -> None:
        gic, cpu = self._gic, self._gic.current()
        everyone = (1 << gic.cpus) - 1
        chosen = (value >> 16 & 0xFF, everyone & ~(1 << cpu), 1 << cpu, 0)[value >> 24 & 3]
        gic.send_sgi(cpu, chosen, value & 0xF)


class CpuInterface:
    """The CPU interfaces' registers, each CPU's own at the same place; the map calls it ``gic-cpu``."""

    name = "gic-cpu"

    def __init__(self, gic: Gic) -> None:
        self._gic = gic

    def read(self, offset: int, size: int) -> int:
        """Registers are words. Reading IAR acknowledges."""
        gic, cpu = self._gic, self._gic.current()
        interface = gic.interfaces[cpu]
        if offset == GICC_IAR:
            return gic.acknowledge(cpu)
        if offset == GICC_CTLR:
            return interface.control
        if offset == GICC_PMR:
            return interface.mask
        if offset == GICC_BPR:
            return interface.binary_point
        if offset == GICC_RPR:
            return interface.running_priority()
        if offset == GICC_HPPIR:
            irq, _ = gic.best(cpu)
            if irq >= SGIS:
                return irq
            sources = gic.sgi_sources[cpu][irq]
            return irq | ((sources & -sources).bit_length() - 1) << 10
        return _INTERFACE_ID if offset == GICC_IIDR else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are words. EOIR ends an interrupt; an id that is not running is ignored."""
        gic, cpu = self._gic, self._gic.current()
        interface = gic.interfaces[cpu]
        irq = value & 0x3FF
        if offset == GICC_EOIR:
            if gic.drop_priority(cpu, irq) and not interface.control & GICC_CTLR_EOIMODE:
                gic.deactivate(cpu, irq)
            return
        if offset == GICC_DIR:
            if interface.control & GICC_CTLR_EOIMODE:
                gic.deactivate(cpu, irq)
            return
        if offset == GICC_CTLR:
            interface.control = value & (GICC_CTLR_EOIMODE | 1)
        elif offset == GICC_PMR:
            interface.mask = value & 0xFF
        elif offset == GICC_BPR:
            interface.binary_point = value & 7
        gic.update()
