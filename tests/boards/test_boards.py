"""The boards: registry, wiring through the bus, and device trees that agree with the map and with QEMU."""

from __future__ import annotations

import io
import itertools
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xipvm import boards
from xipvm.boards import virt_arm64, virt_riscv64
from xipvm.clock import EventClock
from xipvm.console import Console
from xipvm.devices import clint, gic, ns16550, pl011, plic, psci
from xipvm.devices.bus import Bus
from xipvm.devices.rdma import DmaSpace
from xipvm.errors import BoardError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.odp import OdpContext
from xipvm.trace.funnel import Trace

Properties = dict[str, bytes]


class Vcpu:
    """Remembers its interrupt inputs."""

    def __init__(self) -> None:
        self.irq = False
        self.pending: set[int] = set()

    def set_irq(self, level: bool) -> None:
        self.irq = level

    def set_pending(self, bit: int, level: bool) -> None:
        (self.pending.add if level else self.pending.discard)(bit)


class FakeMachine:
    """Everything a board asks for."""

    def __init__(self, cpus: int = 1, memory_size: int = 128 << 20, script: bytes = b"") -> None:
        self.bus = Bus()
        self.clock = EventClock()
        self.output = io.BytesIO()
        self.console = Console(self.output, script)
        self.memory_size = memory_size
        self.vcpus = [Vcpu() for _ in range(cpus)]
        self.current_vcpu = 0
        self.dma: DmaSpace | None = None
        self.log: list[Any] = []

    def request_exit(self, reason: str, status: int) -> None:
        self.log.append((reason, status))

    def request_reset(self) -> None:
        self.log.append("reset")

    def cpu_is_on(self, cpu: int) -> bool:
        return cpu == 0

    def cpu_on(self, cpu: int, entry: int, context: int) -> None:
        self.log.append((cpu, entry, context))

    def cpu_off(self, cpu: int) -> None:
        self.log.append(("off", cpu))

    def cpu_suspend(self, cpu: int) -> None:
        self.log.append(("suspend", cpu))


def flat(dtb: bytes) -> dict[str, Properties]:
    """Path -> properties."""
    struct_at, strings_at = struct.unpack_from(">2I", dtb, 8)
    nodes: dict[str, Properties] = {}
    path: list[str] = []
    at = struct_at
    while True:
        (token,) = struct.unpack_from(">I", dtb, at)
        at += 4
        if token == 1:
            end = dtb.index(b"\0", at)
            path.append(dtb[at:end].decode())
            nodes["/".join(path) or "/"] = {}
            at = (end + 4) & ~3
        elif token == 2:
            path.pop()
        elif token == 3:
            length, name_at = struct.unpack_from(">2I", dtb, at)
            name_at += strings_at
            name = dtb[name_at : dtb.index(b"\0", name_at)].decode()
            nodes["/".join(path) or "/"][name] = dtb[at + 8 : at + 8 + length]
            at = (at + 8 + length + 3) & ~3
        elif token == 9:
            return nodes


def cells(value: bytes) -> list[int]:
    return list(struct.unpack(f">{len(value) // 4}I", value))


def quads(value: bytes) -> list[int]:
    return list(struct.unpack(f">{len(value) // 8}Q", value))


def test_registry() -> None:
    assert boards.names() == ("virt-arm64", "virt-riscv64")
    assert boards.get("virt-arm64").isa == "arm64"
    assert boards.for_elf(243).name == "virt-riscv64"
    with pytest.raises(BoardError, match="'virt'; known are virt-arm64, virt-riscv64"):
        boards.get("virt")
    with pytest.raises(BoardError, match="32-bit ELF files for e_machine 243; known are arm64"):
        boards.for_elf(243, 32)
    with pytest.raises(BoardError, match="e_machine 62"):
        boards.for_elf(62)
    rows = boards.describe()
    assert [row[0] for row in rows] == list(boards.names())
    assert (0x0900_0000, 0x0900_1000, "pl011") in rows[0][3]
    assert (0x4000_0000, 0x4800_0000, "ram") in rows[0][3]


@pytest.mark.parametrize("name", boards.names())
def test_memory_maps_are_disjoint(name: str) -> None:
    rows = boards.get(name).memory_map()
    for (_, end, _), (base, _, _) in itertools.pairwise(rows):
        assert end <= base


@pytest.mark.parametrize("name", boards.names())
def test_everything_in_the_map_is_on_the_bus_and_nothing_else(name: str) -> None:
    board, machine = boards.get(name), FakeMachine()
    platform = board.build(machine)
    on_bus = [(mapped.base, mapped.end, mapped.device.name) for mapped in machine.bus.ranges()]
    assert on_bus == sorted((region.base, region.end, region.name) for region in board.regions)
    assert set(platform.devices) == {region.name for region in board.regions}


@pytest.mark.parametrize("name", boards.names())
def test_impossible_machines_are_refused(name: str) -> None:
    board = boards.get(name)
    with pytest.raises(BoardError, match="1 to 8 CPUs, not 9"):
        board.build(FakeMachine(cpus=9))
    for size in (0, 4097, 1 << 40):
        with pytest.raises(BoardError, match="RAM"):
            board.build(FakeMachine(memory_size=size))


class TestArm64:
    def test_console_interrupt_reaches_the_cpu_that_it_is_aimed_at(self) -> None:
        machine = FakeMachine(cpus=2, script=b"k")
        virt_arm64.BOARD.build(machine)
        uart, dist, iface = 0x0900_0000, 0x0800_0000, 0x0801_0000
        machine.bus.write(dist + gic.GICD_CTLR, 4, 1)
        machine.bus.write(dist + gic.GICD_ISENABLER + 4, 4, 1 << 1)
        machine.bus.write(dist + gic.GICD_ITARGETSR + 33, 1, 0b10)
        machine.current_vcpu = 1
        machine.bus.write(iface + gic.GICC_PMR, 4, 0xFF)
        machine.bus.write(iface + gic.GICC_CTLR, 4, 1)
        machine.bus.write(uart + pl011.IMSC, 4, pl011.INT_RX)
        assert [vcpu.irq for vcpu in machine.vcpus] == [False, True]
        assert machine.bus.read(iface + gic.GICC_IAR, 4) == 33
        assert machine.bus.read(uart + pl011.DR, 4) == ord("k")
        machine.bus.write(iface + gic.GICC_EOIR, 4, 33)
        assert not machine.vcpus[1].irq

    def test_each_cpu_has_its_timer_on_its_own_ppi(self) -> None:
        machine = FakeMachine(cpus=2)
        platform = virt_arm64.BOARD.build(machine)
        machine.current_vcpu = 1
        machine.bus.write(0x0800_0000 + gic.GICD_CTLR, 4, 1)
        machine.bus.write(0x0800_0000 + gic.GICD_ISENABLER, 4, 0xFFFF_0000)
        machine.bus.write(0x0801_0000 + gic.GICC_PMR, 4, 0xFF)
        machine.bus.write(0x0801_0000 + gic.GICC_CTLR, 4, 1)
        for prefix, irq in (("CNTV", 27), ("CNTP", 30)):
            platform.timers[1].write_sysreg(f"{prefix}_TVAL_EL0", 10)
            platform.timers[1].write_sysreg(f"{prefix}_CTL_EL0", 1)
            machine.clock.advance(159)
            assert not machine.vcpus[1].irq
            machine.clock.advance(1)
            assert machine.vcpus[1].irq
            assert machine.bus.read(0x0801_0000 + gic.GICC_IAR, 4) == irq
            platform.timers[1].write_sysreg(f"{prefix}_CTL_EL0", 0)
            machine.bus.write(0x0801_0000 + gic.GICC_EOIR, 4, irq)
            assert not machine.vcpus[1].irq
        assert not machine.vcpus[0].irq

    def test_power(self) -> None:
        machine = FakeMachine(cpus=2)
        firmware = virt_arm64.BOARD.build(machine).psci
        assert firmware is not None
        assert firmware.call(0, [psci.CPU_ON | psci.SMC64, 1, 0x4000_0000, 7]) == 0
        firmware.call(0, [psci.SYSTEM_OFF, 0, 0, 0])
        firmware.call(0, [psci.SYSTEM_RESET, 0, 0, 0])
        assert machine.log == [(1, 0x4000_0000, 7), ("psci system_off", 0), "reset"]

    def test_reset_leaves_nothing_pending(self) -> None:
        machine = FakeMachine(script=b"k")
        platform = virt_arm64.BOARD.build(machine)
        machine.bus.write(0x0900_0000 + pl011.IMSC, 4, pl011.INT_RX)
        platform.timers[0].write_sysreg("CNTV_CTL_EL0", 1)
        platform.reset()
        machine.bus.write(0x0800_0000 + gic.GICD_CTLR, 4, 1)
        assert machine.bus.read(0x0800_0000 + gic.GICD_ISPENDR, 4) == 0
        assert machine.bus.read(0x0800_0000 + gic.GICD_ISPENDR + 4, 4) == 0

    def test_device_tree_stands_at_the_start_of_ram_and_says_where_things_are(self) -> None:
        platform = virt_arm64.BOARD.build(FakeMachine(cpus=4, memory_size=512 << 20))
        assert platform.dtb_address == 0x4000_0000
        nodes = flat(platform.dtb)
        assert quads(nodes["/memory@40000000"]["reg"]) == [0x4000_0000, 512 << 20]
        assert [path for path in nodes if path.startswith("/cpus/cpu@")] == [f"/cpus/cpu@{n}" for n in range(4)]
        assert nodes["/cpus/cpu@3"]["enable-method"] == b"psci\0"
        assert nodes[nodes["/chosen"]["stdout-path"][:-1].decode()]["compatible"].startswith(b"arm,pl011\0")
        assert cells(nodes["/timer"]["interrupts"])[2] == 0xF04


class TestRiscv64:
    def test_hart_interrupts(self) -> None:
        machine = FakeMachine(cpus=2, script=b"k")
        virt_riscv64.BOARD.build(machine)
        base = 0x0200_0000
        machine.bus.write(base + clint.MSIP + 4, 4, 1)
        machine.bus.write(base + clint.MTIMECMP, 8, 20)
        machine.clock.advance(2000)
        assert [vcpu.pending for vcpu in machine.vcpus] == [{7}, {3}]
        assert machine.bus.read(base + clint.MTIME, 8) == 20

    @pytest.mark.parametrize(("context", "hart", "bit"), [(0, 0, 11), (1, 0, 9), (3, 1, 9)])
    def test_console_interrupt_through_the_plic(self, context: int, hart: int, bit: int) -> None:
        machine = FakeMachine(cpus=2, script=b"k")
        virt_riscv64.BOARD.build(machine)
        base, uart = 0x0C00_0000, 0x1000_0000
        machine.bus.write(base + plic.PRIORITY + 40, 4, 1)
        machine.bus.write(base + plic.ENABLE + plic.ENABLE_STRIDE * context, 4, 1 << 10)
        machine.bus.write(uart + ns16550.IER, 1, ns16550.IER_RDI)
        assert machine.vcpus[hart].pending == {bit}
        assert not machine.vcpus[1 - hart].pending
        claim = base + plic.CONTEXT + plic.CONTEXT_STRIDE * context + plic.CONTEXT_CLAIM
        assert machine.bus.read(claim, 4) == 10
        assert machine.bus.read(uart, 1) == ord("k")
        machine.bus.write(claim, 4, 10)
        assert not machine.vcpus[hart].pending

    def test_finisher_and_reset(self) -> None:
        machine = FakeMachine()
        platform = virt_riscv64.BOARD.build(machine)
        machine.bus.write(0x0010_0000, 4, 0x5555)
        machine.bus.write(0x0010_0000, 4, 0x7777)
        assert machine.log == [("finisher pass", 0), "reset"]
        machine.bus.write(0x0200_0000, 4, 1)
        platform.reset()
        assert not machine.vcpus[0].pending

    @pytest.mark.parametrize(
        ("memory", "address"),
        [(128 << 20, 0x87E0_0000), (8 << 30, 0xBFE0_0000), (64 << 10, 0x8000_F000), (1 << 20, 0x800F_F000)],
    )
    def test_device_tree_stands_at_the_top_of_ram(self, memory: int, address: int) -> None:
        platform = virt_riscv64.BOARD.build(FakeMachine(memory_size=memory))
        assert platform.dtb_address == address
        assert platform.dtb_address + len(platform.dtb) <= 0x8000_0000 + memory

    def test_phandles_lead_where_they_should(self) -> None:
        nodes = flat(virt_riscv64.BOARD.build(FakeMachine(cpus=2)).dtb)
        by_handle = {cells(node["phandle"])[0]: path for path, node in nodes.items() if "phandle" in node}
        wires = cells(nodes["/soc/plic@c000000"]["interrupts-extended"])
        assert [by_handle[handle] for handle in wires[::2]] == [
            f"/cpus/cpu@{hart}/interrupt-controller" for hart in (0, 0, 1, 1)
        ]
        assert wires[1::2] == [11, 9, 11, 9]
        assert by_handle[cells(nodes["/soc/serial@10000000"]["interrupt-parent"])[0]] == "/soc/plic@c000000"
        assert by_handle[cells(nodes["/poweroff"]["regmap"])[0]] == "/soc/test@100000"


@pytest.mark.parametrize(
    ("name", "node", "source"),
    [("virt-arm64", "/rdma@b100000", [0, 200, 4]), ("virt-riscv64", "/soc/rdma@b100000", [12])],
)
def test_the_dma_engine_is_there_when_it_is_asked_for(name: str, node: str, source: list[int]) -> None:
    board = boards.get(name)
    assert node not in flat(board.build(FakeMachine()).dtb)
    machine = FakeMachine()
    machine.dma = OdpContext(Mm(HostMemory(1 << 20), Trace()), lambda gpa, size: None)
    platform = board.build(machine)
    found = flat(platform.dtb)[node]
    assert found["compatible"] == b"xipvm,rdma\0"
    assert quads(found["reg"]) == [0xB10_0000, 0x1000]
    assert cells(found["interrupts"]) == source
    assert machine.bus.read(0xB10_0000, 4) == 0x4D44_4150
    assert [(region.base, region.end) for region in board.optional] == [(0xB10_0000, 0xB10_1000)]
    assert all(end <= 0xB10_0000 or base >= 0xB10_1000 for base, end, _ in board.memory_map())
    platform.reset()


@pytest.mark.parametrize("rdma", [False, True])
@pytest.mark.parametrize("name", boards.names())
def test_dtc_finds_no_fault(name: str, rdma: bool, tmp_path: Path) -> None:
    dtc = shutil.which("dtc")
    if dtc is None:
        pytest.skip("dtc is missing: apt-get install device-tree-compiler")
    path = tmp_path / "board.dtb"
    machine = FakeMachine(cpus=2)
    if rdma:
        machine.dma = OdpContext(Mm(HostMemory(1 << 20), Trace()), lambda gpa, size: None)
    path.write_bytes(boards.get(name).build(machine).dtb)
    # The harts' local controllers have no #address-cells, in QEMU's tree neither; nothing maps interrupts to them.
    command = [dtc, "-W", "no-interrupt_provider", "-I", "dtb", "-O", "dts", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


# Properties that are QEMU's to choose: what they say is not about the hardware, or we model another part of it.
_OURS = {
    "phandle",
    "interrupt-parent",
    "interrupts-extended",
    "regmap",
    "clocks",
    "rng-seed",
    "kaslr-seed",
    "riscv,isa",
    "mmu-type",
    "migrate",
}


@pytest.mark.parametrize(
    ("name", "qemu", "package"),
    [
        ("virt-arm64", ["qemu-system-aarch64", "-cpu", "cortex-a57"], "qemu-system-arm"),
        ("virt-riscv64", ["qemu-system-riscv64"], "qemu-system-misc"),
    ],
)
def test_what_the_device_tree_says_is_what_qemu_says(name: str, qemu: list[str], package: str, tmp_path: Path) -> None:
    program = shutil.which(qemu[0])
    if program is None:
        pytest.skip(f"{qemu[0]} is missing: apt-get install {package}")
    path = tmp_path / "qemu.dtb"
    options = [*qemu[1:], "-M", f"virt,dumpdtb={path}", "-smp", "2", "-m", "256", "-nodefaults", "-display", "none"]
    subprocess.run([program, *options], capture_output=True, check=True)
    theirs = flat(path.read_bytes())
    ours = flat(boards.get(name).build(FakeMachine(cpus=2, memory_size=256 << 20)).dtb)
    assert ours.keys() <= theirs.keys()
    for node, properties in ours.items():
        expected = {key: value for key, value in theirs[node].items() if key not in _OURS}
        assert {key: value for key, value in properties.items() if key not in _OURS} == expected, node
