"""Regions for DMA that are not pinned: what they map, when they give it up, and what the hardware may still do."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.hmm.world import World
from xipvm.address import PAGE_SIZE
from xipvm.errors import DeadlockError, MmError, ProtocolUnsupported
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.odp import OdpContext, OdpUmem
from xipvm.mmu.vma import PROT_READ
from xipvm.notifier import RangeEvent
from xipvm.scheduler import Scheduler

PAGES = 4
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


@pytest.fixture
def hva(world: World) -> int:
    return world.map(PAGES)


@pytest.fixture
def umem(world: World, hva: int) -> Iterator[OdpUmem]:
    made = OdpUmem(world.mm, hva, SIZE, page=0x10)
    yield made
    made.destroy()


def test_a_region_is_of_whole_pages(world: World, hva: int) -> None:
    umem = OdpUmem(world.mm, hva + 100, PAGE_SIZE)
    assert (umem.pages, umem.hva_of(0), umem.hva_of(2)) == (2, hva, None)
    umem.destroy()
    umem.destroy()


def test_pages_are_mapped_when_the_hardware_comes_there(world: World, umem: OdpUmem, hva: int) -> None:
    world.mm.write(hva, b"hello")
    assert umem.dma == {}
    assert umem.read(0x10, 5) == b"hello"
    assert umem.faults == 1
    assert umem.read(0x10, 5) == b"hello"
    umem.write(0x11, b"there", 7)
    assert umem.faults == 2
    assert sorted(umem.dma) == [0x10, 0x11]
    assert world.mm.read(hva + PAGE_SIZE + 7, 5) == b"there"
    assert {world.host.refcount(pfn) for pfn, _ in umem.dma.values()} == {1}


def test_a_write_to_what_was_read(umem: OdpUmem) -> None:
    assert umem.read(0x10, 1) == b"\0"
    assert umem.translate(0x10) == (0, False)
    umem.write(0x10, b"x")
    assert umem.read(0x10, 1) == b"x"


@pytest.mark.parametrize(
    "change",
    [
        lambda world, hva: world.mm.madvise(hva, SIZE, MADV_DONTNEED),
        lambda world, hva: world.mm.munmap(hva, SIZE),
        lambda world, hva: world.mm.mprotect(hva, SIZE, PROT_READ),
        lambda world, hva: world.fork(),
        lambda world, hva: compact_memory(world.host, world.trace),
        lambda world, hva: world.mm.exit(),
    ],
    ids=["dontneed", "munmap", "mprotect", "fork", "migrate", "exit"],
)
def test_what_changes_is_given_up_and_dirty(
    world: World, umem: OdpUmem, hva: int, change: Callable[[World, int], object]
) -> None:
    umem.write(0x10, b"x")
    umem.read(0x11, 1)
    pfn = umem.dma[0x10][0]
    world.host.get(pfn)
    world.host.clear_flags(pfn, PG_DIRTY)
    change(world, hva)
    assert 0x10 not in umem.dma
    assert world.host.flags(pfn) & PG_DIRTY
    world.mm.put_frame(pfn)


def test_swapped_pages_come_back(world: World, umem: OdpUmem, hva: int) -> None:
    world.mm.swapon(16)
    for page in range(PAGES):
        umem.write(0x10 + page, bytes([page + 1]) * 8)
    assert pageout(world.mm, hva, hva + SIZE) == PAGES
    assert umem.dma == {}
    assert [umem.read(0x10 + page, 8) for page in range(PAGES)] == [bytes([page + 1]) * 8 for page in range(PAGES)]
    world.mm.munmap(hva, SIZE)


def test_what_cannot_wait_is_declined(world: World, umem: OdpUmem, hva: int) -> None:
    umem.read(0x10, 1)
    with pytest.raises(MmError, match="EAGAIN"):
        world.mm.notifiers.invalidate_range_start(hva, hva + SIZE, RangeEvent.UNMAP, blockable=False)
    assert 0x10 in umem.dma
    assert umem.read(0x11, 1) == b"\0"  # nobody waits for that range


def test_an_invalidation_waits_for_the_hardware(world: World, umem: OdpUmem, hva: int) -> None:
    umem.write(0x10, b"old")
    told: list[str] = []
    world.trace.attach(lambda event: told.append(event.kind))
    scheduler = Scheduler(lambda n, label: n - 1 if label == "odp.dma" else 0, trace=world.trace)
    scheduler.spawn("engine", umem.write, 0x10, b"new")
    scheduler.spawn("host", world.mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
    scheduler.run()
    assert world.mm.read(hva, 3) == bytes(3)
    order = [told.index(kind) for kind in ("tlb_insert", "spte_zap", "tlb_flush", "pte_clear")]
    assert order == sorted(order)


def test_a_deadlock_loses_no_write(world: World, umem: OdpUmem) -> None:
    """The hardware never gets done: an error, and what it has written is known to be dirty."""
    umem.write(0x10, b"x")
    pfn = umem.dma[0x10][0]
    world.host.clear_flags(pfn, PG_DIRTY)
    number = umem._flights.begin(umem, 0x10)
    with pytest.raises(DeadlockError, match="finish its accesses"):
        compact_memory(world.host, world.trace)
    assert world.host.flags(pfn) & PG_DIRTY
    del umem._flights.taken[number]


def test_errors(world: World, umem: OdpUmem, hva: int) -> None:
    for page in (0xF, 0x10 + PAGES):
        with pytest.raises(MmError, match="EFAULT"):
            umem.read(page, 1)
    world.mm.mprotect(hva, PAGE_SIZE, PROT_READ)
    with pytest.raises(MmError, match="EPERM"):
        umem.write(0x10, b"x")
    world.mm.munmap(hva + PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(MmError, match="EFAULT"):
        umem.read(0x11, 1)
    with pytest.raises(IndexError):
        umem.read(0x12, 8, PAGE_SIZE - 4)
    assert umem._flights.taken == {}


def test_a_region_that_is_only_read(world: World, hva: int) -> None:
    umem = OdpUmem(world.mm, hva, SIZE, write=False)
    world.mm.write(hva, b"x")
    assert umem.read(0, 1) == b"x"
    assert umem.dma[0][1] is False
    with pytest.raises(MmError, match="EPERM"):
        umem.write(0, b"y")
    umem.destroy()


def test_2008_has_no_such_thing(world: World) -> None:
    old = Mm(world.host, world.trace, name="old", protocol="2008")
    hva = old.mmap(PAGE_SIZE, PROT_READ)
    with pytest.raises(ProtocolUnsupported):
        OdpUmem(old, hva, PAGE_SIZE)
    old.exit()


def test_keys(world: World, hva: int) -> None:
    context = OdpContext(world.mm, lambda at, size: hva + at if at + size <= SIZE else None)
    first = context.register(0, PAGE_SIZE, write=False)
    second = context.register(PAGE_SIZE + 8, 8, write=True)
    assert context.fetch_add(second, PAGE_SIZE + 8, 5) == 0
    assert context.fetch_add(second, PAGE_SIZE + 8, -6) == 5
    assert context.read(second, PAGE_SIZE + 8, 8) == b"\xff" * 8
    with pytest.raises(MmError, match="EINVAL"):
        context.fetch_add(second, PAGE_SIZE + 4, 1)
    with pytest.raises(MmError, match="EPERM"):
        context.write(first, 0, b"x")
    for wrong, address, length in ((errno.EFAULT, SIZE, 1), (errno.EINVAL, 0, 0), (errno.EINVAL, -1, 5)):
        with pytest.raises(MmError) as caught:
            context.register(address, length, write=True)
        assert caught.value.errno == wrong
    context.deregister(first)
    with pytest.raises(MmError, match="EINVAL"):
        context.deregister(first)
    faults = context.faults
    assert faults == 1
    context.close()
    assert (context.regions, context.faults) == ({}, faults)
