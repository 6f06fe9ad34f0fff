"""What a board is: a memory map, flash banks, devices and a device tree.

A board is data plus one function. ``Board.build`` creates the devices of one machine, wires their interrupt
lines, maps them on the machine's bus and returns them as a ``Platform``. Flash banks and RAM are memory,
not devices: the machine lays them out from ``Board.flash`` and ``Board.ram_base``.

``Machine`` and the vCPU protocols are all that a board and its devices ask of the machine. The interrupt
inputs of a vCPU are levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xipvm.address import format_size
from xipvm.clock import EventClock
from xipvm.console import Console
from xipvm.devices.arch_timer import ArchTimer
from xipvm.devices.bus import Bus
from xipvm.devices.clint import Clint
from xipvm.devices.device import Device
from xipvm.devices.gic import Gic
from xipvm.devices.plic import Plic
from xipvm.devices.psci import CpuPower, Psci
from xipvm.devices.rdma import DmaSpace
from xipvm.errors import BoardError


class ArmVcpu(Protocol):
    """What an AArch64 board asks of a vCPU."""

    def set_irq(self, level: bool) -> None:
        """The IRQ input: taken when PSTATE.I allows it, for as long as it is high."""


class RiscvVcpu(Protocol):
    """What a RISC-V board asks of a hart."""

    def set_pending(self, bit: int, level: bool) -> None:
        """Bit ``bit`` of mip: 3 MSIP, 7 MTIP, 9 SEIP, 11 MEIP."""


class Machine(CpuPower, Protocol):
    """What a board asks of the machine it is built into. ``CpuPower`` is asked of AArch64 machines only.

    ``vcpus`` are ``ArmVcpu`` or ``RiscvVcpu`` objects, as the board's ISA says; each vCPU's place in the
    sequence is its number (MPIDR.Aff0, hart id).
    """

    bus: Bus
    clock: EventClock
    console: Console
    dma: DmaSpace | None
    """What the DMA engine reaches, None on a machine without one."""

    @property
    def memory_size(self) -> int:
        """RAM at ``Board.ram_base``, bytes."""

    @property
    def vcpus(self) -> Sequence[Any]:
        """The vCPUs, by number."""

    @property
    def current_vcpu(self) -> int:
        """The number of the vCPU that is making the present device access."""

    def request_exit(self, reason: str, status: int) -> None:
        """End the run; ``status`` is the guest's exit status."""

    def request_reset(self) -> None:
        """Restart the machine as from power-on."""


@dataclass(frozen=True, slots=True)
class FlashBank:
    """One bank of parallel NOR flash: ``width`` bytes wide, of chips ``device_width`` bytes wide side by side.

    ``sector`` is the bank's erase unit in bytes (all chips together); ``ids`` are manufacturer and device.
    """

    name: str
    base: int
    size: int
    sector: int = 256 << 10
    width: int = 4
    device_width: int = 2
    ids: tuple[int, int] = (0x89, 0x18)

    @property
    def end(self) -> int:
        """First address behind the bank."""
        return self.base + self.size


@dataclass(frozen=True, slots=True)
class Region:
    """Where a device is: ``[base, base + size)``."""

    name: str
    base: int
    size: int

    @property
    def end(self) -> int:
        """First address behind the region."""
        return self.base + self.size


@dataclass(slots=True)
class Platform:
    """The devices of one machine, as ``Board.build`` made them.

    The CPU asks ``timers`` (by CPU number) and ``psci`` on AArch64, ``clint`` for the time CSR on RISC-V.
    The machine puts ``dtb`` at ``dtb_address``, in RAM and 8-byte aligned, at start and after a reset.
    """

    dtb: bytes
    dtb_address: int
    devices: dict[str, Device] = field(default_factory=dict)
    """What is on the bus, by region name."""
    timers: tuple[ArchTimer, ...] = ()
    psci: Psci | None = None
    gic: Gic | None = None
    clint: Clint | None = None
    plic: Plic | None = None
    resets: list[Callable[[], None]] = field(default_factory=list)
    """In order: interrupt controllers before the devices that drive their lines."""

    def map(self, bus: Bus, region: Region, device: Device) -> None:
        """Put ``device`` on the bus at ``region``."""
        bus.map(region.base, region.size, device)
        self.devices[region.name] = device

    def reset(self) -> None:
        """Every device as after power-on."""
        for reset in self.resets:
            reset()


@dataclass(frozen=True)
class Board:
    """A kind of machine. ``builder`` is what ``build`` calls; ``machine_type`` is the ELF ``e_machine`` it runs."""

    name: str
    description: str
    isa: str
    machine_type: int
    ram_base: int
    default_memory: int
    max_memory: int
    max_cpus: int
    flash: tuple[FlashBank, ...]
    regions: tuple[Region, ...]
    builder: Callable[[Board, Machine], Platform]
    optional: tuple[Region, ...] = ()
    """Devices that a machine has only when it is asked to: what QEMU's board has not."""

    def check(self, memory_size: int, cpus: int) -> None:
        """Raises BoardError when the board does not come with so much RAM (bytes) or so many vCPUs."""
        if not 1 <= cpus <= self.max_cpus:
            raise BoardError(f"{self.name} has 1 to {self.max_cpus} CPUs, not {cpus}")
        if not 0 < memory_size <= self.max_memory or memory_size % 4096:
            raise BoardError(
                f"{self.name} takes up to {format_size(self.max_memory)} of RAM in units of 4 KiB, "
                f"not {format_size(memory_size)}"
            )

    def build(self, machine: Machine) -> Platform:
        """Create the devices, wire them and map them on ``machine.bus``. Raises BoardError as ``check`` does."""
        self.check(machine.memory_size, len(machine.vcpus))
        return self.builder(self, machine)

    def memory_map(self) -> list[tuple[int, int, str]]:
        """Rows (base, end, what) of flash, devices and RAM at its default size, ascending."""
        rows = [(bank.base, bank.end, f"flash {bank.name}") for bank in self.flash]
        rows += [(region.base, region.end, region.name) for region in self.regions]
        rows.append((self.ram_base, self.ram_base + self.default_memory, "ram"))
        return sorted(rows)
