"""What a guest access finds: rights, kinds of slots, devices, and addresses with nothing behind them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.secondary import spte as s
from xipvm.mmu.secondary.base import ACCESS_NAMES, FAULT, FETCH, MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.memslot import GFN_LIMIT, MEM_READONLY, MEM_ROMD

if TYPE_CHECKING:
    from tests.kvm.conftest import World

PAGE = 4096
ACCESSES = pytest.mark.parametrize("access", [READ, WRITE, FETCH], ids=ACCESS_NAMES)


def test_a_write_installs_a_writable_entry_for_the_page_of_the_host(world: World) -> None:
    hva = world.slot(4, gfn=0x100)
    assert world.kvm.fault(0x102, WRITE) == RETRY_WALK
    page = world.mm.get_user_pages(hva + 2 * PAGE, write=True)
    assert world.kvm.translate(0x102) == (page.pfn, True)
    assert world.kvm.sptes.present == 1
    assert world.host.flags(page.pfn) & PG_DIRTY


def test_a_read_of_a_page_that_is_writable_installs_a_writable_entry(world: World) -> None:
    hva = world.slot(1)
    world.mm.write(hva, b"host")
    assert world.read(0, 4) == b"host"
    assert s.spte_rights(world.kvm.sptes.get(0)) == "rwx"


def test_a_read_of_an_untouched_page_shows_the_zero_page_and_a_write_replaces_it(world: World) -> None:
    hva = world.slot(1)
    assert world.read(0, PAGE) == bytes(PAGE)
    zero = world.kvm.translate(0)
    assert zero == (0, False)
    with world.watching():
        world.write(0, b"guest")
    assert world.mm.read(hva, 5) == b"guest"
    assert world.kvm.translate(0) != zero
    # The copy that the fault itself provokes announces an invalidation, so that it has to be done again.
    assert world.retries() == [(0, "seq")]


@ACCESSES
def test_the_host_decides_what_is_allowed(world: World, access: int) -> None:
    hva = world.mm.mmap(PAGE, 1)
    world.kvm.set_memslot(0, 0, 1, hva)
    assert world.kvm.fault(0, access) == (FAULT if access == WRITE else RETRY_WALK)
    assert world.kvm.translate(0) == (None if access == WRITE else (0, False))


@ACCESSES
def test_nothing_behind_a_slot(world: World, access: int) -> None:
    hva = world.slot(2)
    world.mm.munmap(hva + PAGE, PAGE)
    assert world.kvm.fault(1, access) == FAULT
    assert "EFAULT" in world.kvm.last_error
    assert "gfn 0x0..0x2" in world.kvm.last_error
    assert world.kvm.sptes.present == 0
    assert world.kvm.fault(0, access) == RETRY_WALK


def test_a_mapping_larger_than_its_slot_is_not_reachable_beyond_it(world: World) -> None:
    hva = world.ram(4)
    world.kvm.set_memslot(0, 0x10, 2, hva + PAGE)
    assert [world.access(gfn, READ) == "fault" for gfn in (0xF, 0x10, 0x11, 0x12)] == [True, False, False, True]
    world.write(0x10, b"second")
    assert world.mm.read(hva + PAGE, 6) == b"second"


def test_a_present_entry_is_left_alone_by_a_second_fault(world: World) -> None:
    world.slot(1)
    world.write(0, b"x")
    with world.watching("spte_set", "spte_zap", "kvm_retry") as log:
        assert world.kvm.fault(0, READ) == RETRY_WALK
    assert log == []


def test_a_stale_entry_is_zapped_and_flushed_before_it_is_replaced(world: World) -> None:
    """It needs a defect of the mm to get there: an entry whose page the host has taken away without a word."""
    hva = world.slot(1)
    world.write(0, b"x")
    frame = world.host.alloc()
    world.kvm.sptes.set(0, frame << s.PFN_SHIFT | s.SPTE_READ_ONLY)
    with world.watching("spte_set", "spte_zap") as log:
        world.kvm.fault(0, WRITE)
    assert log == ["spte_zap", "vcpu0 flush stale spte", "vcpu0 kick stale spte", "spte_set"]
    assert world.kvm.translate(0) == (world.mm.get_user_pages(hva, write=False).pfn, True)


class TestReadonly:
    def test_reads_map_without_the_right_to_write(self, world: World) -> None:
        hva = world.slot(1, flags=MEM_READONLY)
        world.mm.write(hva, b"rom")
        assert world.read(0, 3) == b"rom"
        assert s.spte_rights(world.kvm.sptes.get(0)) == "rx"

    def test_a_write_is_a_device_access_and_changes_nothing(self, world: World) -> None:
        world.slot(1, flags=MEM_READONLY)
        assert world.kvm.fault(0, WRITE) == MMIO
        assert world.kvm.sptes.present == 0
        world.read(0)
        before = world.kvm.sptes.get(0)
        assert world.kvm.fault(0, WRITE) == MMIO
        assert world.kvm.sptes.get(0) == before

    def test_nothing_behind_it_is_a_fault(self, world: World) -> None:
        hva = world.slot(1, flags=MEM_READONLY)
        world.mm.munmap(hva, PAGE)
        assert world.kvm.fault(0, READ) == FAULT


class TestRomd:
    @pytest.mark.parametrize(("access", "result"), [(READ, MMIO), (WRITE, MMIO), (FETCH, FAULT)])
    def test_a_rom_that_does_not_show_its_array(self, world: World, access: int, result: int) -> None:
        hva = world.slot(1, flags=MEM_ROMD)
        world.mm.munmap(hva, PAGE)
        assert world.kvm.fault(0, access) == result
        assert world.kvm.sptes.present == 0

    def test_a_rom_that_does(self, world: World) -> None:
        hva = world.slot(1, flags=MEM_ROMD)
        world.mm.write(hva, b"array")
        assert world.read(0, 5) == b"array"
        assert world.kvm.translate(0) == (world.mm.get_user_pages(hva, write=False).pfn, False)
        assert world.access(0, WRITE) == "mmio"


class TestDevices:
    @pytest.fixture(autouse=True)
    def uart(self, world: World) -> None:
        world.kvm.mmio_lookup = lambda gpa: gpa in (0x9000 * PAGE, GFN_LIMIT * PAGE)

    @pytest.mark.parametrize(("access", "result"), [(READ, MMIO), (WRITE, MMIO), (FETCH, FAULT)])
    def test_access(self, world: World, access: int, result: int) -> None:
        assert world.kvm.fault(0x9000, access) == result
        expected = s.make_mmio_spte(0x9000) if result == MMIO else 0
        assert world.kvm.sptes.get(0x9000) == expected
        assert world.kvm.translate(0x9000) is None

    @ACCESSES
    def test_no_device(self, world: World, access: int) -> None:
        assert world.kvm.fault(0x9001, access) == FAULT
        assert "0x9001000" in world.kvm.last_error
        assert world.kvm.sptes.present == 0

    def test_beyond_what_entries_can_map(self, world: World) -> None:
        assert world.kvm.fault(GFN_LIMIT, READ) == MMIO
        assert world.kvm.fault(GFN_LIMIT + 1, READ) == FAULT
        assert world.kvm.sptes.present == 0

    def test_memory_that_appears_where_a_device_was(self, world: World) -> None:
        world.kvm.fault(0x9000, READ)
        del world.log[:]
        world.slot(1, gfn=0x9000)
        assert world.log == ["vcpu0 flush memslot", "vcpu0 kick memslot"]
        assert s.mmio_generation(world.kvm.sptes.get(0x9000)) != world.kvm.sptes.mmio_generation
        assert world.read(0x9000) == bytes(8)

    def test_invalidations_leave_them_alone(self, world: World) -> None:
        hva = world.slot(1)
        world.read(0)
        world.kvm.fault(0x9000, READ)
        world.mm.munmap(hva, PAGE)
        assert world.kvm.sptes.get(0x9000)


class TestSlotChanges:
    def test_deleting_one_drops_the_entries_of_all(self, world: World) -> None:
        """KVM zaps the whole VM when a slot goes, and no notifier is involved."""
        world.slot(2, gfn=0)
        world.slot(2, gfn=0x10, slot=1)
        for gfn in (0, 1, 0x10):
            world.write(gfn, b"x")
        with world.watching("spte_zap", "memslot_delete", "mmu_notifier_invalidate_range_start") as log:
            world.kvm.delete_memslot(1)
        assert log == ["spte_zap", "vcpu0 flush memslot", "vcpu0 kick memslot", "memslot_delete"]
        assert world.kvm.sptes.present == 0
        assert world.access(0x10, READ) == "fault"
        assert world.read(0, 1) == b"x"

    def test_moving_one(self, world: World) -> None:
        hva = world.slot(2)
        world.write(1, b"moved")
        world.kvm.set_memslot(0, 0x40, 2, hva)
        assert world.kvm.sptes.present == 0
        assert world.access(1, READ) == "fault"
        assert world.read(0x41, 5) == b"moved"

    def test_setting_the_same_again_changes_nothing(self, world: World) -> None:
        hva = world.slot(2)
        world.write(1, b"x")
        with world.watching("memslot_set") as log:
            world.kvm.set_memslot(0, 0, 2, hva)
        assert log == []
        assert world.kvm.sptes.present == 1

    def test_errors_change_nothing(self, world: World) -> None:
        hva = world.slot(2)
        world.write(1, b"x")
        for arguments, error in (
            ((1, 1, 4, hva), errno.EEXIST),
            ((1, 4, 0, hva), errno.EINVAL),
            ((1, 4, 1, hva + 1), errno.EINVAL),
        ):
            with pytest.raises(MmError) as caught:
                world.kvm.set_memslot(*arguments)
            assert caught.value.errno == error
        with pytest.raises(MmError) as caught:
            world.kvm.delete_memslot(1)
        assert caught.value.errno == errno.EINVAL
        assert len(world.kvm.memslots) == 1
        assert world.kvm.sptes.present == 1


def test_description(world: World) -> None:
    hva = world.slot(2, gfn=0x10)
    world.write(0x11, b"x")
    pfn, _ = world.kvm.translate(0x11) or (0, False)
    info = world.kvm.describe(0x11)
    assert (info.slot, info.hva, info.invalidating) == (0, hva + PAGE, False)
    text = f"gfn 0x11: spte pfn {pfn:#x} rwx accessed dirty; memslot 0, hva {hva + PAGE:#x}"
    assert str(info) == text
    range = world.mm.notifiers.invalidate_range_start(hva + PAGE, hva + 2 * PAGE, 1)
    assert str(world.kvm.describe(0x11)) == f"gfn 0x11: spte none; memslot 0, hva {hva + PAGE:#x}, being invalidated"
    world.mm.notifiers.invalidate_range_end(range)
    assert str(world.kvm.describe(0x12)) == "gfn 0x12: spte none; no memslot"
    assert str(world.kvm.describe(GFN_LIMIT)) == f"gfn {GFN_LIMIT:#x}: spte none; no memslot"


def test_trace_of_a_fault(world: World) -> None:
    hva = world.ram(1)
    world.mm.write(hva, b"x")
    with world.watching():
        world.kvm.set_memslot(7, 0x10, 1, hva)
        world.kvm.fault(0x10, FETCH)
        world.kvm.delete_memslot(7)
    mapped = world.mm.get_user_pages(hva, write=False).pfn
    ours = [e for e in world.events if e.kind.startswith(("kvm", "spte", "memslot"))]
    assert [(e.kind, e.fields) for e in ours] == [
        ("memslot_set", {"vm": "vm0", "slot": 7, "gfn": 0x10, "pages": 1, "hva": hva, "flags": 0}),
        ("kvm_page_fault", {"vm": "vm0", "gfn": 0x10, "access": "fetch"}),
        ("spte_set", {"vm": "vm0", "gfn": 0x10, "pfn": mapped, "rights": "rwx"}),
        ("spte_zap", {"vm": "vm0", "start": 0, "end": GFN_LIMIT, "pages": [(mapped, 1)]}),
        ("memslot_delete", {"vm": "vm0", "slot": 7}),
    ]
    assert ours[2].cause == ours[1].seq
