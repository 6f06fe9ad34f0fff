"""Dirty rings: what is pushed, harvested and reset, who has to wait, and the errors."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xipvm.actors import on_point
from xipvm.errors import DeadlockError, InternalError, MmError
from xipvm.mmu.secondary.base import READ
from xipvm.mmu.secondary.dirty_ring import MAX_ENTRIES, RESERVED, DirtyRing
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES

GFN = 0x100
PAGES = 200


def ringed(world: Any, entries: int = 128, *, with_bitmap: bool = False) -> int:
    """Two vCPUs with rings, and a slot whose pages were all written before logging began."""
    world.kvm.vcpus.clear()
    world.kvm.enable_dirty_ring(entries, with_bitmap=with_bitmap)
    world.kvm.vcpus.append(world.vcpu)
    world.second = world.add_vcpu(world.kvm, "vcpu1")
    hva: int = world.slot(PAGES, GFN)
    for page in range(PAGES):
        world.write(GFN + page, b"old")
    world.kvm.set_memslot(0, GFN, PAGES, hva, MEM_LOG_DIRTY_PAGES)
    return hva


def write(world: Any, vcpu: Any, *pages: int) -> None:
    for page in pages:
        world.kvm.vcpu_enter(vcpu)
        world.write(GFN + page, b"new")


def test_each_vcpu_has_its_own_in_order(world: Any) -> None:
    ringed(world)
    write(world, world.vcpu, 9, 3, 9)
    write(world, world.second, 3, 7)
    assert world.kvm.dirty_ring(world.vcpu).harvest() == [(0, 9), (0, 3)]
    assert world.kvm.dirty_ring(world.second).harvest() == [(0, 7)]
    assert world.kvm.dirty_ring(world.vcpu).harvest() == []


def test_reset_protects_what_was_harvested_and_nothing_else(world: Any) -> None:
    ringed(world)
    write(world, world.vcpu, 9, 3)
    ring = world.kvm.dirty_ring(world.vcpu)
    assert world.kvm.reset_dirty_rings() == 0
    assert len(ring.harvest()) == 2
    write(world, world.vcpu, 5)
    del world.log[:]
    assert world.kvm.reset_dirty_rings() == 2
    assert world.log == ["vcpu0 flush dirty_ring", "vcpu1 flush dirty_ring"]
    assert [world.kvm.translate(GFN + page)[1] for page in (3, 5, 9)] == [False, True, False]
    write(world, world.vcpu, 3)
    assert ring.harvest() == [(0, 5), (0, 3)]
    assert (world.kvm.reset_dirty_rings(), ring.used) == (2, 0)


def test_entries_reset_are_entries_collected(world: Any) -> None:
    ringed(world)
    collected = reset = 0
    for number in range(20):
        write(world, world.vcpu, *range(number, PAGES, 7))
        write(world, world.second, *range(number, PAGES, 11))
        collected += sum(len(world.kvm.dirty_ring(vcpu).harvest()) for vcpu in world.kvm.vcpus)
        reset += world.kvm.reset_dirty_rings()
    assert reset == collected == sum(ring.pushed for ring in world.kvm.dirty_rings.values())


def test_a_full_ring_keeps_its_vcpu_out(world: Any) -> None:
    ringed(world)
    room = 128 - RESERVED
    write(world, world.vcpu, *range(room - 1))
    assert "vcpu0 kick dirty ring" not in world.log
    write(world, world.vcpu, room)
    assert world.log[-1] == "vcpu0 kick dirty ring"
    with pytest.raises(DeadlockError, match="ring is full"):
        world.kvm.vcpu_enter(world.vcpu)
    world.kvm.vcpu_enter(world.second)  # the other one may
    exits = []

    def full(vcpu: Any) -> None:
        exits.append(vcpu)
        assert len(world.kvm.dirty_ring(vcpu).harvest()) == room
        assert world.kvm.reset_dirty_rings() == room

    world.kvm.on_dirty_ring_full = full
    world.kvm.vcpu_enter(world.vcpu)
    assert exits == [world.vcpu]
    write(world, world.vcpu, 0)
    world.kvm.on_dirty_ring_full = lambda vcpu: None
    write(world, world.vcpu, *range(1, room))
    with pytest.raises(InternalError, match="as full"):
        world.kvm.vcpu_enter(world.vcpu)


def test_it_waits_for_whoever_resets(world: Any) -> None:
    ringed(world)
    write(world, world.vcpu, *range(128 - RESERVED))

    def reset(label: str) -> None:
        if label == "kvm.ring.full":
            world.kvm.dirty_ring(world.vcpu).harvest()
            world.kvm.reset_dirty_rings()

    with on_point(reset):
        world.kvm.vcpu_enter(world.vcpu)
    assert world.kvm.dirty_ring(world.vcpu).used == 0


def test_a_write_while_a_reset_goes_on(world: Any) -> None:
    """Between harvest and protection the page is still writable: it is not pushed, and loses W behind that."""
    ringed(world)
    write(world, world.vcpu, 9)
    ring = world.kvm.dirty_ring(world.vcpu)
    ring.harvest()

    def late(label: str) -> None:
        if label == "kvm.ring.taken":
            write(world, world.vcpu, 9, 4)

    with on_point(late):
        assert world.kvm.reset_dirty_rings() == 1
    assert not world.kvm.translate(GFN + 9)[1]
    assert world.kvm.translate(GFN + 4)[1]
    assert ring.harvest() == [(0, 4)]


def test_a_slot_that_is_gone_when_its_pages_are_reset(world: Any) -> None:
    hva = ringed(world)
    write(world, world.vcpu, 9, 150)
    world.kvm.dirty_ring(world.vcpu).harvest()
    world.kvm.delete_memslot(0)
    world.kvm.set_memslot(0, GFN, 100, hva, 0)
    world.access(GFN + 9, READ)
    assert world.kvm.reset_dirty_rings() == 2


def test_errors(world: Any) -> None:
    kvm = world.kvm
    for call in (kvm.reset_dirty_rings, lambda: kvm.dirty_ring(world.vcpu), lambda: kvm.enable_dirty_ring(128)):
        with pytest.raises(MmError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    kvm.vcpus.clear()
    for entries, error in (
        (0, errno.EINVAL), (RESERVED, errno.EINVAL), (100, errno.EINVAL), (2 * MAX_ENTRIES, errno.E2BIG)
    ):  # fmt: skip
        with pytest.raises(MmError) as caught:
            kvm.enable_dirty_ring(entries)
        assert caught.value.errno == error
    world.slot(4)
    with pytest.raises(MmError) as caught:
        kvm.enable_dirty_ring(128, with_bitmap=True)
    assert caught.value.errno == errno.EINVAL
    kvm.enable_dirty_ring(MAX_ENTRIES)
    with pytest.raises(MmError) as caught:
        kvm.enable_dirty_ring(128)
    assert caught.value.errno == errno.EINVAL


def test_the_bitmap_is_not_there(world: Any) -> None:
    ringed(world)
    for call in (lambda: world.kvm.get_dirty_log(0), lambda: world.kvm.clear_dirty_log(0, 0, 64, bytes(8))):
        with pytest.raises(MmError) as caught:
            call()
        assert caught.value.errno == errno.ENXIO
    with pytest.raises(InternalError, match="by none of its vCPUs"):
        world.kvm.write_guest(GFN << 12, b"x")


def test_a_ring_with_a_bitmap(world: Any) -> None:
    """What vCPUs write is in their rings, what KVM writes by itself in the bitmap."""
    ringed(world, with_bitmap=True)
    world.kvm.write_guest((GFN + 6) << 12, b"kvm's")
    assert world.kvm.get_dirty_log(0)[0] == 1 << 6
    write(world, world.vcpu, 3)
    assert not any(world.kvm.get_dirty_log(0))
    assert world.kvm.dirty_ring(world.vcpu).harvest() == [(0, 3)]


@given(st.lists(st.one_of(st.integers(0, 300), st.just("harvest"), st.just("reset")), max_size=400))
def test_a_ring_against_a_list(steps: list[int | str]) -> None:
    ring = DirtyRing(128)
    waiting: list[tuple[int, int]] = []
    harvested: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, int) and ring.used < ring.size:
            ring.push(0, step)
            waiting.append((0, step))
        elif step == "harvest":
            assert ring.harvest() == waiting
            harvested, waiting = harvested + waiting, []
        elif step == "reset":
            assert ring.take_harvested() == harvested
            harvested = []
        assert ring.used == len(waiting) + len(harvested)
        assert ring.soft_full == (ring.used >= 128 - RESERVED)


def test_more_than_a_ring_holds() -> None:
    ring = DirtyRing(128)
    for page in range(128):
        ring.push(0, page)
    with pytest.raises(InternalError, match="full"):
        ring.push(0, 128)
