"""The window between looking a page up and installing it: an invalidation at any point of a fault."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.secondary.base import FAULT, MMIO, READ, RETRY_WALK, WRITE
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from tests.kvm.conftest import World

PAGE = 4096
SEQ_READ, GUP_DONE = "kvm.fault.seq_read", "kvm.fault.gup_done"
POINTS = pytest.mark.parametrize("label", [SEQ_READ, GUP_DONE])
CLEAR = RangeEvent.CLEAR


@pytest.fixture
def hva(world: World) -> int:
    """Four touched pages behind guest frames 0x10 to 0x13."""
    hva = world.slot(4, gfn=0x10)
    for page in range(4):
        world.mm.write(hva + page * PAGE, b"page %d" % page)
    return hva


@POINTS
def test_a_page_that_is_dropped_meanwhile_is_not_installed(world: World, hva: int, label: str) -> None:
    with world.watching():
        assert world.fault_with(label, lambda: world.drop(hva), 0x10, WRITE) == RETRY_WALK
    assert world.retries() == [(0x10, "seq")]
    assert world.kvm.translate(0x10) is None
    assert world.read(0x10) == bytes(8)  # what the next fault finds


@POINTS
def test_a_page_that_is_unmapped_meanwhile(world: World, hva: int, label: str) -> None:
    result = world.fault_with(label, lambda: world.mm.munmap(hva, PAGE), 0x10)
    assert result == (FAULT if label == SEQ_READ else RETRY_WALK)
    assert world.kvm.translate(0x10) is None
    assert world.access(0x10, READ) == "fault"


@POINTS
def test_a_page_that_is_write_protected_meanwhile(world: World, hva: int, label: str) -> None:
    world.fault_with(label, lambda: world.mm.mprotect(hva, PAGE, 1), 0x10)
    assert world.kvm.translate(0x10) is None
    world.read(0x10)
    mapped = world.kvm.translate(0x10)
    assert mapped is not None
    assert not mapped[1]


@POINTS
def test_a_page_that_becomes_shared_with_a_child_meanwhile(world: World, hva: int, label: str) -> None:
    world.fault_with(label, lambda: world.mm.fork("child"), 0x10)
    assert world.kvm.translate(0x10) is None
    world.read(0x10)
    mapped = world.kvm.translate(0x10)
    assert mapped is not None
    assert not mapped[1]


@POINTS
def test_a_range_that_is_still_open(world: World, hva: int, label: str) -> None:
    open = []

    def start() -> None:
        open.append(world.mm.notifiers.invalidate_range_start(hva, hva + PAGE, CLEAR))

    with world.watching():
        world.fault_with(label, start, 0x10)
        assert world.kvm.fault(0x10, WRITE) == RETRY_WALK
        world.mm.notifiers.invalidate_range_end(open.pop())
        assert world.kvm.translate(0x10) is None
        assert world.kvm.fault(0x10, WRITE) == RETRY_WALK
    assert world.retries() == [(0x10, "in progress"), (0x10, "in progress")]
    assert world.kvm.translate(0x10) is not None


def test_an_open_range_saves_the_lookup(world: World, hva: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[int] = []
    monkeypatch.setattr(type(world.mm), "get_user_pages", lambda self, hva, *, write: lookups.append(hva))
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        world.kvm.fault(0x10, READ)
    assert lookups == []


@POINTS
def test_an_open_range_elsewhere_does_not_matter(world: World, hva: int, label: str) -> None:
    """Only the hull of the open ranges is closed to faults while they are open."""
    open = []

    def start() -> None:
        open.append(world.mm.notifiers.invalidate_range_start(hva, hva + PAGE, CLEAR))

    with world.watching():
        world.fault_with(label, start, 0x11)
        world.mm.notifiers.invalidate_range_end(open.pop())
    assert world.retries() == []
    assert world.kvm.translate(0x11) is not None


def test_a_range_that_ended_elsewhere_does(world: World, hva: int) -> None:
    """The sequence does not say where."""
    with world.watching():
        world.fault_with(GUP_DONE, lambda: world.drop(hva), 0x12)
    assert world.retries() == [(0x12, "seq")]


@POINTS
def test_a_range_that_no_slot_shows_does_not_matter(world: World, hva: int, label: str) -> None:
    other = world.ram(1)
    world.mm.write(other, b"x")
    with world.watching():
        world.fault_with(label, lambda: world.mm.munmap(other, PAGE), 0x10)
    assert world.retries() == []
    assert world.kvm.mmu_invalidate_seq == 0
    assert world.kvm.translate(0x10) is not None


@POINTS
def test_gaining_a_right_does_not_matter(world: World, hva: int, label: str) -> None:
    new = world.slot(1, gfn=0x80, slot=1)
    with world.watching():
        world.fault_with(label, lambda: world.mm.write(new, b"first touch"), 0x11)
    assert world.retries() == []


class TestHull:
    def open(self, world: World, hva: int, first: int, end: int) -> object:
        return world.mm.notifiers.invalidate_range_start(hva + first * PAGE, hva + end * PAGE, CLEAR)

    def closed(self, world: World) -> list[int]:
        """Guest frames in which a fault is given up now."""
        frames = []
        for gfn in range(0x10, 0x14):
            world.kvm.fault(gfn, READ)
            if world.kvm.translate(gfn) is None:
                frames.append(gfn)
        return frames

    def test_it_covers_what_lies_between(self, world: World, hva: int) -> None:
        a, b = self.open(world, hva, 0, 1), self.open(world, hva, 2, 3)
        assert self.closed(world) == [0x10, 0x11, 0x12]
        world.mm.notifiers.invalidate_range_end(a)
        world.mm.notifiers.invalidate_range_end(b)

    def test_it_shrinks_only_when_nothing_is_open(self, world: World, hva: int) -> None:
        a, b = self.open(world, hva, 0, 4), self.open(world, hva, 1, 2)
        world.mm.notifiers.invalidate_range_end(a)
        assert self.closed(world) == [0x10, 0x11, 0x12, 0x13]
        world.mm.notifiers.invalidate_range_end(b)
        assert self.closed(world) == []
        c = self.open(world, hva, 3, 4)
        assert (world.kvm.mmu_invalidate_range_start, world.kvm.mmu_invalidate_range_end) == (0x13, 0x14)
        assert self.closed(world) == [0x13]
        world.mm.notifiers.invalidate_range_end(c)

    def test_nested_in_one_another_the_same_range_counts_twice(self, world: World, hva: int) -> None:
        a, b = self.open(world, hva, 0, 1), self.open(world, hva, 0, 1)
        world.mm.notifiers.invalidate_range_end(b)
        assert self.closed(world) == [0x10]
        world.mm.notifiers.invalidate_range_end(a)
        assert self.closed(world) == []
        assert world.kvm.mmu_invalidate_in_progress == 0
        assert world.kvm.mn_active_invalidate_count == 0

    def test_a_range_wider_than_the_slot_closes_the_slot(self, world: World, hva: int) -> None:
        with world.mm.notifiers.invalidate_range(0, (1 << 64) - PAGE, RangeEvent.SOFT_DIRTY):
            assert self.closed(world) == [0x10, 0x11, 0x12, 0x13]
            assert (world.kvm.mmu_invalidate_range_start, world.kvm.mmu_invalidate_range_end) == (0x10, 0x14)


class TestPredicate:
    """Both conditions are needed; each alone lets a stale entry in."""

    def test_what_it_says(self, world: World) -> None:
        kvm = world.kvm
        assert kvm.mmu_invalidate_retry(0, 5) == ""
        kvm.mmu_invalidate_seq = 1
        assert kvm.mmu_invalidate_retry(0, 5) == "seq"
        assert kvm.mmu_invalidate_retry(1, 5) == ""
        kvm.mmu_invalidate_in_progress = 1
        kvm.mmu_invalidate_range_start, kvm.mmu_invalidate_range_end = 5, 6
        assert [kvm.mmu_invalidate_retry(1, gfn) for gfn in (4, 5, 6)] == ["", "in progress", ""]

    @POINTS
    def test_checking_neither_would_install_a_freed_page(
        self, world: World, hva: int, label: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tests above can fail: without the check the guest reads the poison of a freed frame."""
        monkeypatch.setattr(type(world.kvm), "mmu_invalidate_retry", lambda self, seq, gfn: "")
        world.fault_with(label, lambda: world.drop(hva), 0x10)
        stale = world.read(0x10)
        assert stale == (b"\x6b" * 8 if label == GUP_DONE else bytes(8))


class TestSlotsChangingMeanwhile:
    @POINTS
    def test_a_slot_that_is_deleted(self, world: World, hva: int, label: str) -> None:
        result = world.fault_with(label, lambda: world.kvm.delete_memslot(0), 0x10)
        assert result == (FAULT if label == SEQ_READ else RETRY_WALK)
        assert world.kvm.sptes.present == 0
        assert world.access(0x10, READ) == "fault"

    @POINTS
    def test_a_slot_that_moves(self, world: World, hva: int, label: str) -> None:
        world.fault_with(label, lambda: world.kvm.set_memslot(0, 0x40, 4, hva), 0x10)
        assert world.kvm.sptes.present == 0
        assert world.read(0x40, 6) == b"page 0"

    def test_a_fault_in_a_slot_that_is_going_is_retried(self, world: World, hva: int) -> None:
        seen = []

        def hook(label: str) -> None:
            if label == "kvm.memslot.invalid":
                seen.append(world.kvm.fault(0x10, READ))

        with world.watching(), on_point(hook):
            world.kvm.delete_memslot(0)
        assert seen == [RETRY_WALK]
        assert world.retries() == [(0x10, "memslot")]
        assert world.kvm.sptes.present == 0

    def test_slots_wait_for_open_ranges(self, world: World, hva: int) -> None:
        """Otherwise a start and its end would hit different slots, and the count would never come back to 0."""
        unrelated = world.mm.notifiers.invalidate_range_start(0x1000, 0x2000, CLEAR)
        for change in (
            lambda: world.kvm.delete_memslot(0),
            lambda: world.kvm.set_memslot(1, 0x80, 1, hva),
            lambda: world.kvm.set_memslot(0, 0x80, 4, hva),
        ):
            with pytest.raises(MmError) as caught:
                change()
            assert caught.value.errno == errno.EDEADLK
        assert [slot.gfn for slot in world.kvm.memslots] == [0x10]

        def end(label: str) -> None:
            if label == "kvm.memslot.wait":
                world.mm.notifiers.invalidate_range_end(unrelated)

        with on_point(end):
            world.kvm.delete_memslot(0)
        assert len(world.kvm.memslots) == 0

    def test_a_range_that_opens_while_a_slot_is_going_keeps_the_slot(self, world: World, hva: int) -> None:
        open = []

        def hook(label: str) -> None:
            if label == "kvm.memslot.invalid":
                open.append(world.mm.notifiers.invalidate_range_start(hva, hva + PAGE, CLEAR))

        with on_point(hook), pytest.raises(MmError):
            world.kvm.delete_memslot(0)
        world.mm.notifiers.invalidate_range_end(open.pop())
        assert world.kvm.mmu_invalidate_in_progress == 0
        assert world.read(0x10, 6) == b"page 0"


class TestDeathMeanwhile:
    @POINTS
    def test_the_mm_exits(self, world: World, hva: int, label: str) -> None:
        world.fault_with(label, lambda: world.mm.exit(), 0x10)
        assert world.kvm.sptes.present == 0
        assert world.kvm.fault(0x10, READ) == FAULT
        assert world.kvm.last_error == "vm0 has lost its address space"

    @POINTS
    def test_the_vm_is_destroyed(self, world: World, hva: int, label: str) -> None:
        world.fault_with(label, world.kvm.destroy, 0x10)
        assert world.kvm.sptes.present == 0
        assert world.kvm.fault(0x10, READ) == FAULT


def test_a_device_access_is_not_held_up_by_an_invalidation(world: World, hva: int) -> None:
    world.kvm.mmio_lookup = lambda gpa: gpa == 0x9000 * PAGE
    with world.mm.notifiers.invalidate_range(0, 1 << 47, CLEAR):
        assert world.kvm.fault(0x9000, READ) == MMIO
