"""Other secondary MMUs beside the guest's, and what a storm does with them: the group ``devices`` of its operations.

An RDMA device whose region is all of RAM (ODP), one that shares the page table (SVA), and a mirror with memory of its
own (dmirror) are on the mm at once, from the first of these operations to the end of the storm. What they read has to
be what the CPU reads; what they write is there already. Pages that the mirror takes away come back by faults.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError, MmError
from xipvm.storm.operations import Operation

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.base import SecondaryMmu
    from xipvm.storm.world import World

MIRROR_PAGES: Final = 256
"""Of memory that the mirror has."""
_MOST: Final = 8
"""Pages that it takes at a time."""

DEVICE_OPERATIONS: Final[dict[str, Operation]] = {}


class Devices:
    """The three, on bytes ``[ram, ram + size)`` of ``mm``. Raises ProtocolUnsupported."""

    def __init__(self, mm: Mm, ram: int, size: int) -> None:
        from xipvm.mmu.secondary.dmirror import Dmirror
        from xipvm.mmu.secondary.odp import OdpUmem
        from xipvm.mmu.secondary.sva import Sva

        self.ram = ram
        self.odp = OdpUmem(mm, ram, size, name="storm odp")
        self.sva = Sva(mm, name="storm sva")
        self.mirror = Dmirror(mm, pages=MIRROR_PAGES, name="storm mirror")

    def mmus(self) -> list[SecondaryMmu]:
        """All of them."""
        return [self.odp, self.sva, self.mirror]

    def destroy(self) -> None:
        """They go; what the mirror has it gives back."""
        for mmu in reversed(self.mmus()):
            mmu.destroy()


def _operation(name: str, weight: int) -> Callable[[Callable[[World, Devices], None]], None]:
    def define(run: Callable[[World, Devices], None]) -> None:
        DEVICE_OPERATIONS[name] = Operation(name, weight, lambda world: run(world, devices_of(world)))

    return define


def devices_of(world: World) -> Devices:
    """Those of ``world``, made when they are wanted first."""
    if world.devices is None:
        world.devices = Devices(world.mm, world.machine.ram, world.machine.memory_size)
    return world.devices


def _place(world: World) -> tuple[int, int]:
    """Some bytes of one page: where, and how many."""
    offset = world.choose(PAGE_SIZE, "offset")
    return world.page() + offset, 1 + world.choose(PAGE_SIZE - offset, "size")


def _compare(world: World, name: str, at: int, data: bytes) -> None:
    found = world.mm.read(at, len(data))
    if found != data:
        raise InternalError(f"{name} reads {data[:16].hex()} at {at:#x}, the host {found[:16].hex()}")


@_operation("odp", 32)
def _odp(world: World, devices: Devices) -> None:
    """The RDMA device reads, and writes what it has read."""
    at, size = _place(world)
    page, offset = (at - devices.ram) >> PAGE_SHIFT, at & ~PAGE_MASK
    data = devices.odp.read(page, size, offset)
    _compare(world, devices.odp.name, at, data)
    if world.choose(2, "write"):
        devices.odp.write(page, data, offset)


@_operation("sva", 32)
def _sva(world: World, devices: Devices) -> None:
    """The device that shares the page table does."""
    at, size = _place(world)
    data = devices.sva.load(at, size)
    _compare(world, devices.sva.name, at, data)
    if world.choose(2, "write"):
        devices.sva.store(at, data)


@_operation("mirror", 32)
def _mirror(world: World, devices: Devices) -> None:
    """The mirror does, be the page in its own memory or the host's."""
    at, size = _place(world)
    data, _ = devices.mirror.read(at, size)
    if world.choose(2, "write"):
        devices.mirror.write(at, data)
    if world.choose(2, "compare"):
        _compare(world, devices.mirror.name, at, data)


def _pages(world: World) -> tuple[int, int]:
    start, end = world.target()
    return start, min(end - start >> PAGE_SHIFT, _MOST)


@_operation("mirror-take", 48)
def _mirror_take(world: World, devices: Devices) -> None:
    """Pages go to the mirror's memory."""
    devices.mirror.migrate_to_dev(*_pages(world))


@_operation("mirror-give", 16)
def _mirror_give(world: World, devices: Devices) -> None:
    """It gives pages back that nobody has asked for."""
    if world.choose(2, "all"):
        devices.mirror.evict()
    elif not devices.mirror.migrate_to_sys(*_pages(world)).cpages:
        raise MmError(errno.ENOENT, "none of these pages is in the mirror's memory")


@_operation("mirror-exclusive", 24)
def _mirror_exclusive(world: World, devices: Devices) -> None:
    """It takes a page for itself, and adds nothing to a number in it."""
    devices.mirror.update(world.page() + 8 * world.choose(PAGE_SIZE // 8, "offset"), 0)
