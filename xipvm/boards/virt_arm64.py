"""virt-arm64: QEMU's AArch64 ``virt`` board with a GICv2, as far as it is modelled here.

The memory map, interrupt numbers and device tree are QEMU's, so firmware built for ``qemu_arm64`` runs.
Left out, and absent from the device tree: PCIe, virtio, fw_cfg, GPIO, PMU, GICv2m and secure devices. The
device tree stands at the start of RAM, where U-Boot looks for it.
"""

from __future__ import annotations

import functools

from xipvm.boards.board import Board, FlashBank, Machine, Platform, Region
from xipvm.boards.fdt import Fdt
from xipvm.devices.arch_timer import ArchTimer
from xipvm.devices.gic import Gic
from xipvm.devices.pl011 import Pl011
from xipvm.devices.pl031 import Pl031
from xipvm.devices.psci import CPU_OFF, CPU_ON, CPU_SUSPEND, SMC64, Psci
from xipvm.devices.rdma import Rdma

UART = Region("pl011", 0x0900_0000, 0x1000)
RTC = Region("pl031", 0x0901_0000, 0x1000)
GIC_DIST = Region("gic-dist", 0x0800_0000, 0x1_0000)
GIC_CPU = Region("gic-cpu", 0x0801_0000, 0x1_0000)
RDMA = Region("rdma", 0x0B10_0000, 0x1000)
"""Where QEMU's board has nothing."""
RAM_BASE = 0x4000_0000

SPIS = 256
UART_SPI, RTC_SPI, RDMA_SPI = 1, 2, 200
PPI_SECURE_TIMER, PPI_PHYSICAL_TIMER, PPI_VIRTUAL_TIMER, PPI_HYP_TIMER = 29, 30, 27, 26
_APB_CLOCK_HZ = 24_000_000
_SPI, _PPI = 0, 1
_LEVEL_HIGH = 4


def build(board: Board, machine: Machine) -> Platform:
    """The devices of one machine."""
    cpus = len(machine.vcpus)
    gic = Gic([vcpu.set_irq for vcpu in machine.vcpus], lambda: machine.current_vcpu, SPIS)
    uart = Pl011(machine.console, gic.spi(UART_SPI))
    rtc = Pl031(machine.clock, gic.spi(RTC_SPI))
    timers = tuple(
        ArchTimer(machine.clock, gic.ppi(cpu, PPI_PHYSICAL_TIMER), gic.ppi(cpu, PPI_VIRTUAL_TIMER))
        for cpu in range(cpus)
    )
    platform = Platform(
        dtb=device_tree(board, machine.memory_size, cpus, rdma=machine.dma is not None),
        dtb_address=RAM_BASE,
        timers=timers,
        psci=Psci(cpus, machine, machine.request_exit, machine.request_reset),
        gic=gic,
        resets=[gic.reset, uart.reset, rtc.reset, *(timer.reset for timer in timers)],
    )
    for region, device in ((GIC_DIST, gic.distributor), (GIC_CPU, gic.cpu_interface), (UART, uart), (RTC, rtc)):
        platform.map(machine.bus, region, device)
    if machine.dma is not None:
        rdma = Rdma(machine.dma, machine.clock, gic.spi(RDMA_SPI))
        platform.map(machine.bus, RDMA, rdma)
        platform.resets.append(rdma.reset)
    return platform


@functools.lru_cache(maxsize=64)
def device_tree(board: Board, memory_size: int, cpus: int, *, rdma: bool = False) -> bytes:
    """The DTB of a board with ``memory_size`` bytes of RAM and ``cpus`` vCPUs; ``rdma``: and the DMA engine."""
    fdt = Fdt()
    root = fdt.root
    root.strings("compatible", "linux,dummy-virt").strings("model", "linux,dummy-virt")
    root.cells("#address-cells", 2).cells("#size-cells", 2)
    root.child("chosen").strings("stdout-path", f"/pl011@{UART.base:x}")
    root.child(f"memory@{RAM_BASE:x}").strings("device_type", "memory").quads("reg", RAM_BASE, memory_size)

    psci = root.child("psci").strings("compatible", "arm,psci-1.0", "arm,psci-0.2", "arm,psci")
    psci.strings("method", "hvc").cells("cpu_suspend", CPU_SUSPEND | SMC64)
    psci.cells("cpu_off", CPU_OFF).cells("cpu_on", CPU_ON | SMC64)

    cpu_nodes = root.child("cpus").cells("#address-cells", 1).cells("#size-cells", 0)
    for number in range(cpus):
        cpu = cpu_nodes.child(f"cpu@{number:x}").strings("device_type", "cpu")
        cpu.strings("compatible", "arm,cortex-a57").cells("reg", number)
        if cpus > 1:
            cpu.strings("enable-method", "psci")

    if board.flash:
        flash = root.child(f"flash@{board.flash[0].base:x}").strings("compatible", "cfi-flash")
        flash.quads("reg", *(number for bank in board.flash for number in (bank.base, bank.size)))
        flash.cells("bank-width", board.flash[0].width)

    gic = root.child(f"intc@{GIC_DIST.base:x}").strings("compatible", "arm,cortex-a15-gic")
    gic.quads("reg", GIC_DIST.base, GIC_DIST.size, GIC_CPU.base, GIC_CPU.size)
    gic.flag("interrupt-controller").cells("#interrupt-cells", 3)
    gic.cells("#address-cells", 2).cells("#size-cells", 2).flag("ranges")
    root.cells("interrupt-parent", gic.phandle())

    # Flags of a private interrupt: level, active high, and the mask of CPUs it is wired to.
    private = ((1 << cpus) - 1) << 8 | _LEVEL_HIGH
    timer = root.child("timer").strings("compatible", "arm,armv8-timer", "arm,armv7-timer").flag("always-on")
    order = (PPI_SECURE_TIMER, PPI_PHYSICAL_TIMER, PPI_VIRTUAL_TIMER, PPI_HYP_TIMER)
    timer.cells("interrupts", *(cell for ppi in order for cell in (_PPI, ppi - 16, private)))

    clock = root.child("apb-pclk").strings("compatible", "fixed-clock").cells("#clock-cells", 0)
    clock.cells("clock-frequency", _APB_CLOCK_HZ).strings("clock-output-names", "clk24mhz")
    for region, compatible, spi, clocks in (
        (UART, "arm,pl011", UART_SPI, ("uartclk", "apb_pclk")),
        (RTC, "arm,pl031", RTC_SPI, ("apb_pclk",)),
    ):
        node = root.child(f"{region.name}@{region.base:x}").strings("compatible", compatible, "arm,primecell")
        node.quads("reg", region.base, region.size).cells("interrupts", _SPI, spi, _LEVEL_HIGH)
        node.cells("clocks", *[clock.phandle()] * len(clocks)).strings("clock-names", *clocks)
    if rdma:
        node = root.child(f"{RDMA.name}@{RDMA.base:x}").strings("compatible", "xipvm,rdma")
        node.quads("reg", RDMA.base, RDMA.size).cells("interrupts", _SPI, RDMA_SPI, _LEVEL_HIGH)
    return fdt.to_bytes()


BOARD = Board(
    name="virt-arm64",
    description="AArch64, QEMU's virt: PL011, GICv2, generic timer, PSCI, two CFI flash banks",
    isa="arm64",
    machine_type=183,
    ram_base=RAM_BASE,
    default_memory=128 << 20,
    max_memory=64 << 30,
    max_cpus=8,
    flash=(FlashBank("flash0", 0x0000_0000, 64 << 20), FlashBank("flash1", 0x0400_0000, 64 << 20)),
    regions=(GIC_DIST, GIC_CPU, UART, RTC),
    builder=build,
    optional=(RDMA,),
)
