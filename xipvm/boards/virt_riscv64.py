"""virt-riscv64: QEMU's 64-bit RISC-V ``virt`` board, as far as it is modelled here.

The memory map, interrupt numbers and device tree are QEMU's, so firmware built for ``qemu-riscv64`` runs.
Left out, and absent from the device tree: PCIe, virtio, fw_cfg, the platform bus and the boot ROM (the
machine starts harts at the guest's entry with a0 the hart id and a1 the device tree). The device tree stands
at the top of RAM below 3 GiB.
"""

from __future__ import annotations

import functools

from xipvm.address import PAGE_SIZE
from xipvm.boards.board import Board, FlashBank, Machine, Platform, Region, RiscvVcpu
from xipvm.boards.fdt import Fdt
from xipvm.devices.clint import FREQUENCY, Clint
from xipvm.devices.device import IrqLine
from xipvm.devices.finisher import PASS, RESET, Finisher
from xipvm.devices.goldfish_rtc import GoldfishRtc
from xipvm.devices.ns16550 import Ns16550
from xipvm.devices.plic import Plic
from xipvm.devices.rdma import Rdma

FINISHER = Region("finisher", 0x0010_0000, 0x1000)
RTC = Region("goldfish-rtc", 0x0010_1000, 0x1000)
CLINT = Region("clint", 0x0200_0000, 0x1_0000)
PLIC = Region("plic", 0x0C00_0000, 0x60_0000)
UART = Region("ns16550", 0x1000_0000, 0x100)
RDMA = Region("rdma", 0x0B10_0000, 0x1000)
"""Where QEMU's board has nothing."""
RAM_BASE = 0x8000_0000

MSIP, MTIP, SEIP, MEIP = 3, 7, 9, 11
PLIC_SOURCES = 96
UART_SOURCE, RTC_SOURCE, RDMA_SOURCE = 10, 11, 12
ISA_STRING = "rv64imafdc_zicsr_zifencei"
_UART_CLOCK_HZ = 3_686_400
_DTB_LIMIT = 0xC000_0000
_DTB_ALIGN = 2 << 20


def build(board: Board, machine: Machine) -> Platform:
    """The devices of one machine."""
    harts = machine.vcpus
    clint = Clint(machine.clock, [_bit(hart, MSIP) for hart in harts], [_bit(hart, MTIP) for hart in harts])
    plic = Plic(PLIC_SOURCES, [_bit(hart, bit) for hart in harts for bit in (MEIP, SEIP)])
    finisher = Finisher(machine.request_exit, machine.request_reset)
    uart = Ns16550(machine.console, plic.source(UART_SOURCE))
    rtc = GoldfishRtc(machine.clock, plic.source(RTC_SOURCE))
    dtb = device_tree(board, machine.memory_size, len(harts), rdma=machine.dma is not None)
    platform = Platform(
        dtb=dtb,
        dtb_address=dtb_address(machine.memory_size, len(dtb)),
        clint=clint,
        plic=plic,
        resets=[plic.reset, clint.reset, uart.reset, rtc.reset],
    )
    for region, device in ((FINISHER, finisher), (RTC, rtc), (CLINT, clint), (PLIC, plic), (UART, uart)):
        platform.map(machine.bus, region, device)
    if machine.dma is not None:
        rdma = Rdma(machine.dma, machine.clock, plic.source(RDMA_SOURCE))
        platform.map(machine.bus, RDMA, rdma)
        platform.resets.append(rdma.reset)
    return platform


def _bit(hart: RiscvVcpu, bit: int) -> IrqLine:
    """The line that is bit ``bit`` of the hart's mip."""
    return lambda level: hart.set_pending(bit, level)


def dtb_address(memory_size: int, dtb_size: int) -> int:
    """Where the device tree goes: as high in RAM as it fits below 3 GiB.

    Aligned to 2 MiB, a huge page that nothing else need share; in little RAM, to a page.
    """
    align = _DTB_ALIGN if memory_size >= 8 * _DTB_ALIGN else PAGE_SIZE
    return (min(RAM_BASE + memory_size, _DTB_LIMIT) - dtb_size) // align * align


@functools.lru_cache(maxsize=64)
def device_tree(board: Board, memory_size: int, cpus: int, *, rdma: bool = False) -> bytes:
    """The DTB of a board with ``memory_size`` bytes of RAM and ``cpus`` harts; ``rdma``: and the DMA engine."""
    fdt = Fdt()
    root = fdt.root
    root.strings("compatible", "riscv-virtio").strings("model", "riscv-virtio,qemu")
    root.cells("#address-cells", 2).cells("#size-cells", 2)
    root.child("chosen").strings("stdout-path", f"/soc/serial@{UART.base:x}")
    root.child(f"memory@{RAM_BASE:x}").strings("device_type", "memory").quads("reg", RAM_BASE, memory_size)

    cpu_nodes = root.child("cpus").cells("#address-cells", 1).cells("#size-cells", 0)
    cpu_nodes.cells("timebase-frequency", FREQUENCY)
    harts = []
    for number in range(cpus):
        cpu = cpu_nodes.child(f"cpu@{number:x}").strings("device_type", "cpu").cells("reg", number)
        cpu.strings("status", "okay").strings("compatible", "riscv").strings("riscv,isa", ISA_STRING)
        cpu.strings("mmu-type", "riscv,sv39")
        local = cpu.child("interrupt-controller").strings("compatible", "riscv,cpu-intc")
        local.cells("#interrupt-cells", 1).flag("interrupt-controller")
        harts.append(local.phandle())

    if board.flash:
        flash = root.child(f"flash@{board.flash[0].base:x}").strings("compatible", "cfi-flash")
        flash.quads("reg", *(number for bank in board.flash for number in (bank.base, bank.size)))
        flash.cells("bank-width", board.flash[0].width)

    soc = root.child("soc").cells("#address-cells", 2).cells("#size-cells", 2)
    soc.strings("compatible", "simple-bus").flag("ranges")
    plic = soc.child(f"plic@{PLIC.base:x}").strings("compatible", "sifive,plic-1.0.0", "riscv,plic0")
    plic.quads("reg", PLIC.base, PLIC.size).cells("riscv,ndev", PLIC_SOURCES)
    plic.flag("interrupt-controller").cells("#interrupt-cells", 1).cells("#address-cells", 0)
    plic.cells("interrupts-extended", *(cell for hart in harts for cell in (hart, MEIP, hart, SEIP)))
    clint = soc.child(f"clint@{CLINT.base:x}").strings("compatible", "sifive,clint0", "riscv,clint0")
    clint.quads("reg", CLINT.base, CLINT.size)
    clint.cells("interrupts-extended", *(cell for hart in harts for cell in (hart, MSIP, hart, MTIP)))

    serial = soc.child(f"serial@{UART.base:x}").strings("compatible", "ns16550a").quads("reg", UART.base, UART.size)
    serial.cells("clock-frequency", _UART_CLOCK_HZ)
    rtc = soc.child(f"rtc@{RTC.base:x}").strings("compatible", "google,goldfish-rtc").quads("reg", RTC.base, RTC.size)
    for node, source in ((serial, UART_SOURCE), (rtc, RTC_SOURCE)):
        node.cells("interrupts", source).cells("interrupt-parent", plic.phandle())
    if rdma:
        node = soc.child(f"{RDMA.name}@{RDMA.base:x}").strings("compatible", "xipvm,rdma")
        node.quads("reg", RDMA.base, RDMA.size)
        node.cells("interrupts", RDMA_SOURCE).cells("interrupt-parent", plic.phandle())

    test = soc.child(f"test@{FINISHER.base:x}").strings("compatible", "sifive,test1", "sifive,test0", "syscon")
    test.quads("reg", FINISHER.base, FINISHER.size)
    for name, value in (("poweroff", PASS), ("reboot", RESET)):
        node = root.child(name).strings("compatible", f"syscon-{name}").cells("regmap", test.phandle())
        node.cells("offset", 0).cells("value", value)
    return fdt.to_bytes()


BOARD = Board(
    name="virt-riscv64",
    description="RISC-V rv64gc, QEMU's virt: 16550A, CLINT, PLIC, test finisher, two CFI flash banks",
    isa="riscv64",
    machine_type=243,
    ram_base=RAM_BASE,
    default_memory=128 << 20,
    max_memory=64 << 30,
    max_cpus=8,
    flash=(FlashBank("flash0", 0x2000_0000, 32 << 20), FlashBank("flash1", 0x2200_0000, 32 << 20)),
    regions=(FINISHER, RTC, CLINT, PLIC, UART),
    builder=build,
    optional=(RDMA,),
)
