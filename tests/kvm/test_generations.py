"""Memslot generations: MMIO entries of another one, updates under way, and who waits for whom."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.secondary import spte as s
from xipvm.mmu.secondary.base import FETCH, MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, UPDATE_IN_PROGRESS

PAGE = 4096
UART = 0x9000


@pytest.fixture(autouse=True)
def uart(world: Any) -> None:
    world.kvm.mmio_lookup = lambda gpa: gpa == UART * PAGE


def current(world: Any) -> bool:
    """Whether a walker believes the UART's entry."""
    spte = world.kvm.sptes.get(UART)
    assert spte & s.SPTE_MMIO
    return bool(s.mmio_generation(spte) == world.kvm.sptes.mmio_generation)


def test_encoding() -> None:
    for gfn in (0, 1, (1 << 27) - 1):
        for generation in (0, 1, s.MMIO_GEN_MASK, s.MMIO_GEN_MASK + 5):
            entry = s.make_mmio_spte(gfn, generation)
            assert s.mmio_generation(entry) == generation & s.MMIO_GEN_MASK
            assert not entry & s.SPTE_PRESENT
            assert entry >> 12 & (1 << 27) - 1 == gfn


def test_every_change_begins_a_generation(world: Any) -> None:
    memslots = world.kvm.memslots
    seen = [memslots.generation]
    hva = world.slot(4, 0x10)
    seen.append(memslots.generation)
    world.kvm.set_memslot(0, 0x10, 4, hva, MEM_LOG_DIRTY_PAGES)
    seen.append(memslots.generation)
    world.kvm.set_memslot(0, 0x20, 4, hva, MEM_LOG_DIRTY_PAGES)
    seen.append(memslots.generation)
    world.kvm.delete_memslot(0)
    seen.append(memslots.generation)
    assert seen == [0, 1, 2, 4, 6]  # what goes or moves is invalid first
    with pytest.raises(MmError):
        world.kvm.delete_memslot(0)
    assert memslots.generation == 6


def test_an_entry_of_another_generation_is_asked_for_again(world: Any) -> None:
    world.kvm.fault(UART, READ)
    assert current(world)
    asked = []
    world.kvm.mmio_lookup = lambda gpa: asked.append(gpa) is None
    assert world.kvm.fault(UART, WRITE) == MMIO
    assert asked == []
    world.slot(4, 0x10)
    assert not current(world)
    assert world.kvm.fault(UART, WRITE) == MMIO
    assert asked == [UART * PAGE]
    assert current(world)


def test_memory_in_place_of_a_device_and_back(world: Any) -> None:
    world.kvm.fault(UART, READ)
    hva = world.slot(1, UART)
    world.mm.write(hva, b"memory")
    assert world.read(UART, 6) == b"memory"
    world.kvm.delete_memslot(0)
    assert world.access(UART, READ) == "mmio"
    assert current(world)


def test_while_an_update_is_under_way_none_is_trusted(world: Any) -> None:
    hva = world.slot(4, 0x10)
    world.kvm.fault(UART, READ)
    seen = []

    def hook(label: str) -> None:
        if label == "kvm.memslot.invalid":
            assert world.kvm.memslots.generation & UPDATE_IN_PROGRESS
            seen.append((world.kvm.fault(UART, READ), current(world)))

    with on_point(hook):
        world.kvm.set_memslot(0, 0x40, 4, hva)
    assert seen == [(MMIO, False)]
    assert world.kvm.sptes.get(UART) == 0  # moving a slot takes all entries away


def test_a_fault_that_saw_no_slot_before_there_was_one(world: Any) -> None:
    """It puts an entry of the generation that it looked in, and nobody believes that."""
    pending = [True]

    def appear(gpa: int) -> bool:
        if pending:
            pending.pop()
            world.slot(1, UART)
        return True

    world.kvm.mmio_lookup = appear
    assert world.kvm.fault(UART, READ) == MMIO
    assert not current(world)
    assert world.read(UART) == bytes(8)


def test_a_present_entry_is_not_overwritten(world: Any) -> None:
    pending = [True]

    def appear(gpa: int) -> bool:
        if pending:
            pending.pop()
            world.slot(1, UART)
            world.write(UART, b"x")
        return True

    world.kvm.mmio_lookup = appear
    assert world.kvm.fault(UART, READ) == MMIO
    assert world.kvm.sptes.get(UART) & s.SPTE_PRESENT


def test_when_the_number_wraps_all_entries_go(world: Any) -> None:
    world.slot(4, 0x10)
    world.read(0x10)
    world.kvm.fault(UART, READ)  # in generation 1
    world.kvm.memslots.generation = s.MMIO_GEN_MASK
    del world.log[:]
    world.slot(4, 0x20, slot=1)
    assert world.kvm.memslots.generation & s.MMIO_GEN_MASK == 0
    assert world.kvm.sptes.get(UART) == 0
    assert world.kvm.translate(0x10) is not None
    assert world.log == [
        "vcpu0 flush mmio generation",
        "vcpu0 kick mmio generation",
        "vcpu0 flush memslot",
        "vcpu0 kick memslot",
    ]
    world.slot(4, 0x30, slot=2)  # generation 1 again
    assert world.access(UART, READ) == "mmio"


def test_fetching_from_a_device(world: Any) -> None:
    world.kvm.fault(UART, READ)
    assert world.access(UART, FETCH) == "fault"


def test_invalidations_have_nothing_to_do_with_them(world: Any) -> None:
    hva = world.slot(1)
    world.read(0)
    world.kvm.fault(UART, READ)
    world.drop(hva)
    assert current(world)


def test_logging_begins_under_a_fault(world: Any) -> None:
    """The fault that looked the slot up before starts over: what it lets the guest write, the log has."""
    hva = world.slot(4, 0x10)
    with on_point_once("kvm.fault.gup_done", lambda: world.kvm.set_memslot(0, 0x10, 4, hva, MEM_LOG_DIRTY_PAGES)):
        assert world.kvm.fault(0x11, WRITE) == RETRY_WALK
    assert world.kvm.translate(0x11) is None
    world.write(0x11, b"x")
    assert world.kvm.get_dirty_log(0)[0] == 2


def on_point_once(label: str, action: Any) -> Any:
    pending = [action]

    def hook(at: str) -> None:
        if at == label and pending:
            pending.pop()()

    return on_point(hook)


def test_a_change_that_cannot_be_made_is_withdrawn(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hva = world.slot(4, 0x10)
    world.write(0x10, b"x")
    before = world.kvm.memslots.get(0)

    def refuse(what: str) -> None:
        raise MmError(errno.EDEADLK, what)

    monkeypatch.setattr(world.kvm, "_wait_for_readers", refuse)
    for change in (
        lambda: world.kvm.delete_memslot(0),
        lambda: world.kvm.set_memslot(0, 0x40, 4, hva),
        lambda: world.kvm.set_memslot(0, 0x10, 4, hva, MEM_LOG_DIRTY_PAGES),
        lambda: world.kvm.set_memslot(1, 0x40, 4, hva),
    ):
        with pytest.raises(MmError):
            change()
        assert list(world.kvm.memslots) == [before]
        assert not before.invalid
        assert not world.kvm.memslots.generation & UPDATE_IN_PROGRESS
        assert world.read(0x10, 1) == b"x"
        assert world.access(UART, READ) == "mmio"
