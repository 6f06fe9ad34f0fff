"""Ageing: whether the guest used a page, how it is made to forget, and what that must not break."""

from __future__ import annotations

from typing import Any

import pytest

from xipvm.mmu.secondary.base import FETCH, READ, WRITE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES
from xipvm.mmu.secondary.spte import SPTE_AGED, SPTE_PRESENT, describe_spte
from xipvm.notifier import RangeEvent

PAGE = 4096


@pytest.mark.parametrize("hook", ["clear_flush_young", "clear_young"])
def test_used_pages_are_young_once(world: Any, hook: str) -> None:
    hva = world.slot(4, gfn=0x10)
    world.write(0x11, b"x")
    clear = getattr(world.mm.notifiers, hook)
    assert not clear(hva, hva + PAGE)
    assert clear(hva + PAGE, hva + 2 * PAGE)
    assert not clear(hva, hva + 4 * PAGE)
    world.read(0x11)
    assert clear(hva, hva + 4 * PAGE)


def test_test_young_changes_nothing(world: Any) -> None:
    hva = world.slot(2, gfn=0x10)
    world.write(0x11, b"x")
    before = world.kvm.sptes.get(0x11)
    with world.watching() as log:
        for _ in range(2):
            assert world.mm.notifiers.test_young(hva + PAGE + 17)
            assert not world.mm.notifiers.test_young(hva)
    assert world.kvm.sptes.get(0x11) == before
    assert log == []
    world.mm.notifiers.clear_young(hva, hva + 2 * PAGE)
    assert not world.mm.notifiers.test_young(hva + PAGE)


@pytest.mark.parametrize("access", [READ, WRITE, FETCH])
def test_the_next_access_faults_and_makes_it_young(world: Any, access: int) -> None:
    hva = world.slot(1)
    world.write(0, b"kept")
    pfn, _ = world.kvm.translate(0)
    world.mm.notifiers.clear_flush_young(hva, hva + PAGE)
    assert world.kvm.translate(0) is None
    with world.watching("kvm_page_fault", "spte_set", "spte_restore", "spte_zap") as log:
        assert world.access(0, access) == pfn
    assert log == ["kvm_page_fault", "spte_restore"]
    assert world.mm.notifiers.test_young(hva)
    assert world.read(0, 4) == b"kept"


def test_an_old_entry_gives_no_right_and_names_its_frame(world: Any) -> None:
    """The walker asks for the bit of the access in a present entry."""
    hva = world.slot(1)
    world.write(0, b"x")
    pfn, _ = world.kvm.translate(0)
    world.mm.notifiers.clear_young(hva, hva + PAGE)
    spte = world.kvm.sptes.get(0)
    assert spte & SPTE_PRESENT
    assert not spte & SPTE_AGED
    assert describe_spte(spte) == f"pfn {pfn:#x} old dirty"


@pytest.mark.parametrize("hook", ["clear_flush_young", "clear_young"])
def test_tlbs_forget_it_once(world: Any, hook: str) -> None:
    """Code that a vCPU executes behind the back of the entries could not be counted: hence the kick."""
    hva = world.slot(2)
    world.write(0, b"x")
    with world.watching("spte_age", f"mmu_notifier_{hook}") as log:
        getattr(world.mm.notifiers, hook)(hva, hva + PAGE)
    assert log == ["spte_age", f"vcpu0 flush {hook}", f"vcpu0 kick {hook}", f"mmu_notifier_{hook}"]
    assert world.vcpu.tlb == {}
    with world.watching() as log, world.mm.notifiers.invalidate_range(hva + PAGE, hva + 2 * PAGE, RangeEvent.CLEAR):
        pass
    assert log == []  # not again with the next range that has nothing to remove


def test_nothing_young_nothing_flushed(world: Any) -> None:
    hva = world.slot(2)
    with world.watching("spte_age") as log:
        assert not world.mm.notifiers.clear_flush_young(hva, hva + 2 * PAGE)
    assert log == []


@pytest.mark.parametrize("hook", ["clear_flush_young", "clear_young"])
def test_an_aged_page_is_invalidated_like_any_other(world: Any, hook: str) -> None:
    """An old entry is an entry: its removal flushes before the frame is free, whatever a TLB may have."""
    hva = world.slot(1)
    world.write(0, b"guest")
    pfn, _ = stale = world.vcpu.tlb[0]
    getattr(world.mm.notifiers, hook)(hva, hva + PAGE)
    world.vcpu.tlb[0] = stale
    with world.watching("spte_zap", "page_free") as log:
        world.drop(hva)
    assert log == ["spte_zap", "vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier", "page_free"]
    assert world.vcpu.tlb == {}
    assert world.host.read(pfn, 0, 8) == b"\x6b" * 8
    assert world.read(0, 5) == bytes(5)


def test_the_dirty_log_of_an_aged_page(world: Any) -> None:
    """The entry is not writable any more; what was written before and is written afterwards is named all the same."""
    hva = world.slot(1)
    world.kvm.set_memslot(0, 0, 1, hva, MEM_LOG_DIRTY_PAGES)
    world.write(0, b"one")
    world.mm.notifiers.clear_young(hva, hva + PAGE)
    assert world.kvm.get_dirty_log(0) == b"\1" + bytes(len(world.kvm.memslots.get(0).dirty_bitmap) - 1)
    assert world.vcpu.tlb == {}
    world.write(0, b"two")
    assert world.kvm.get_dirty_log(0)[0] == 1


def test_every_slot_that_shows_the_page_counts(world: Any) -> None:
    hva = world.slot(1, gfn=0x10)
    world.kvm.set_memslot(1, 0x20, 1, hva)
    world.write(0x20, b"x")
    assert world.mm.notifiers.test_young(hva)  # though the first slot's page was never used
    assert world.mm.notifiers.clear_flush_young(hva, hva + PAGE)
    world.write(0x10, b"x")
    world.write(0x20, b"x")
    assert world.mm.notifiers.test_young(hva)
    assert world.mm.notifiers.clear_young(hva, hva + PAGE)
    assert world.kvm.translate(0x10) is None
    assert world.kvm.translate(0x20) is None


def test_all_vms_are_asked(world: Any) -> None:
    """No short cut: the second VM's entry must become old though the first was young already."""
    hva = world.slot(1)
    second = world.add_vm("vm1")
    second.set_memslot(0, 0x80, 1, hva)
    world.write(0, b"x")
    world.read(0x80, 1, second)
    assert world.mm.notifiers.clear_young(hva, hva + PAGE)
    assert world.kvm.translate(0) is None
    assert second.translate(0x80) is None


def test_what_no_slot_shows_is_old(world: Any) -> None:
    world.slot(1)
    world.write(0, b"x")
    other = world.ram(1)
    world.mm.write(other, b"x")
    assert not world.mm.notifiers.clear_flush_young(other, other + PAGE)
    assert not world.mm.notifiers.test_young(other)
    assert world.kvm.translate(0) is not None
