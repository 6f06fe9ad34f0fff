"""What a machine does before its first instruction: flash programmed, RAM mapped and filled, registers set.

Done once when it is built; ``power_on`` again after each reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Gfn, page_up
from xipvm.devices.htif import Htif
from xipvm.errors import GuestImageError
from xipvm.loader.place import Piece

if TYPE_CHECKING:
    from xipvm.machine import Machine

#: The pages that ``tohost`` and ``fromhost`` may take out of RAM, in bytes.
HTIF_LIMIT = 64 << 10


def map_htif(machine: Machine) -> None:
    """A RISC-V test program with a ``tohost`` word talks to the host through it."""
    if machine.image is None or machine.board.isa != "riscv64":
        return
    try:
        tohost = machine.image.address_of("tohost")
    except KeyError:
        return
    try:
        fromhost = machine.image.address_of("fromhost")
    except KeyError:
        fromhost = tohost
    first = min(tohost, fromhost) // PAGE_SIZE * PAGE_SIZE
    end = page_up(max(tohost, fromhost) + 8)
    for name, address in (("tohost", tohost), ("fromhost", fromhost)):
        if address % 8 or not 0 <= address - machine.board.ram_base <= machine.memory_size - 8:
            raise GuestImageError(machine.image.path, f"{name} at {address:#x} is no aligned 64-bit word in RAM")
    if end - first > HTIF_LIMIT:
        raise GuestImageError(
            machine.image.path, f"tohost at {tohost:#x} and fromhost at {fromhost:#x} lie too far apart"
        )
    machine.htif = Htif(
        end - first,
        tohost - first,
        fromhost - first if fromhost != tohost else None,
        clock=machine.clock,
        console=machine.console,
        memory=machine.firmware,
        exit=machine.request_exit,
    )
    machine.bus.map(first, end - first, machine.htif)
    machine.htif_base = first


def map_ram(machine: Machine) -> None:
    """RAM as memslots, around the pages that a device has taken out of it; once more where it has an alias."""
    first = machine.board.ram_base >> PAGE_SHIFT
    end = first + (machine.memory_size >> PAGE_SHIFT)
    holes = [
        gfn
        for taken in machine.bus.ranges()
        for gfn in range(max(taken.base >> PAGE_SHIFT, first), min(page_up(taken.end) >> PAGE_SHIFT, end))
    ]
    windows = [first] if machine.ram_alias is None else [first, machine.ram_alias >> PAGE_SHIFT]
    slot = len(machine.flash)
    at = first
    for hole in [*holes, end]:
        if hole > at:
            hva = machine.ram + ((at - first) << PAGE_SHIFT)
            for window in windows:
                machine.secondary.set_memslot(slot, Gfn(at - first + window), hole - at, hva, 0)
                slot += 1
        at = hole + 1


def program(machine: Machine) -> None:
    """Put the guest's flash segments into their banks, as a flash programmer does."""
    if machine.placement is None:
        return
    for memory in machine.flash:
        for piece in machine.placement.of(memory.bank.name):
            memory.device.place(piece.address - memory.bank.base, piece.data)


def power_on(machine: Machine) -> None:
    """RAM segments and device tree written, vCPU 0 at the entry point, the others off."""
    dtb = machine.platform.dtb if machine.dtb_given is None else machine.dtb_given
    address = _dtb_address(machine, len(dtb))
    machine.write_ram(address, dtb)
    entry = machine.board.flash[0].base
    if machine.placement is not None:
        entry = machine.placement.entry
        for piece in machine.placement.of("ram"):
            _load(machine, piece)
    if machine.htif is not None:
        under = machine.ram + machine.htif_base - machine.board.ram_base
        machine.htif.reset(machine.mm.read(under, len(machine.htif.storage)))
    for vcpu in machine.vcpus:
        vcpu.isa.reset(entry, address)
        # A RISC-V machine starts every hart; the others of an AArch64 one wait for PSCI.
        vcpu.on = vcpu.index == 0 or machine.board.isa == "riscv64"
        vcpu.idle = False


def _dtb_address(machine: Machine, size: int) -> int:
    """Where the board puts the device tree; behind the guest's RAM segments when they take that place."""
    address = machine.platform.dtb_address
    if machine.placement is not None:
        for piece in machine.placement.of("ram"):  # ascending
            if piece.address < address + size and address < piece.address + piece.size:
                address = page_up(piece.address + piece.size)
    return address


def _load(machine: Machine, piece: Piece) -> None:
    """A RAM segment; what it has beyond its file bytes is zeroed; pages that do not exist are zero."""
    machine.write_ram(piece.address, bytes(piece.data))
    at = piece.address + len(piece.data)
    end = piece.address + piece.size
    while at < end:
        size = min(end - at, PAGE_SIZE - at % PAGE_SIZE)
        if machine.mm.pgd.get((machine.ram + at - machine.board.ram_base) >> PAGE_SHIFT):
            machine.write_ram(at, bytes(size))
        at += size
