"""What an invalidation does to the entries and to the vCPUs, in which order; registration and teardown."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xipvm.actors import on_point
from xipvm.errors import InternalError, MmError
from xipvm.mmu.secondary.base import FAULT, READ, WRITE
from xipvm.notifier import MmuNotifier, MmuNotifierRange, RangeEvent
from xipvm.trace import Event
from xipvm.trace.recorder import Recorder

if TYPE_CHECKING:
    from tests.kvm.conftest import World

PAGE = 4096
CLEAR = RangeEvent.CLEAR
START, END = "mmu_notifier_invalidate_range_start", "mmu_notifier_invalidate_range_end"


def fill(world: World, gfns: range) -> None:
    for gfn in gfns:
        world.write(gfn, b"%d" % gfn)


def mapped(world: World) -> list[int]:
    return [gfn for gfn, _ in world.kvm.sptes.entries(0, 1 << 27)]


def test_order_of_one_invalidation(world: World) -> None:
    """Zap, flush, kick: all before the start returns, hence before the host changes its entries."""
    hva = world.slot(8, gfn=0x10)
    world.add_vcpu(world.kvm, "vcpu1")
    fill(world, range(0x10, 0x18))
    with world.watching(START, END, "spte_zap", "pte_clear", "primary_tlb_flush", "page_free") as log:
        world.mm.munmap(hva, 8 * PAGE)
    told = [
        "vcpu0 flush mmu_notifier",
        "vcpu1 flush mmu_notifier",
        "vcpu0 kick mmu_notifier",
        "vcpu1 kick mmu_notifier",
    ]
    assert log == [START, "spte_zap", *told, "pte_clear", END, "primary_tlb_flush", "page_free"]


def test_the_trace_says_what_was_zapped_and_why(world: World) -> None:
    hva = world.slot(4, gfn=0x10)
    fill(world, range(0x10, 0x14))
    frames = [world.kvm.translate(gfn)[0] for gfn in range(0x11, 0x13)]
    with world.watching():
        world.drop(hva + PAGE, 2)
    [start] = [e for e in world.events if e.kind == START]
    [zap] = [e for e in world.events if e.kind == "spte_zap"]
    assert zap.cause == start.seq
    assert (zap.fields["vm"], zap.fields["start"], zap.fields["end"]) == ("vm0", 0x11, 0x13)
    assert sorted(p for first, count in zap.fields["pages"] for p in range(first, first + count)) == sorted(frames)
    assert mapped(world) == [0x10, 0x13]


def test_nothing_zapped_nothing_flushed(world: World) -> None:
    hva = world.slot(4)
    with world.watching(START, END, "spte_zap") as log:
        world.drop(hva, 4)
    assert log == [START, END]


def test_a_range_that_no_slot_shows_touches_nothing(world: World) -> None:
    world.slot(4)
    world.write(0, b"x")
    other = world.ram(2)
    world.mm.write(other, b"x")
    with world.watching("spte_zap") as log:
        world.mm.munmap(other, 2 * PAGE)
    assert log == []
    assert world.kvm.mmu_invalidate_seq == 0
    assert world.kvm.mn_active_invalidate_count == 0
    assert mapped(world) == [0]


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        (0, 8 * PAGE, []),
        (0, 1, [1, 2, 3, 4, 5, 6, 7]),
        (PAGE - 1, PAGE + 1, [2, 3, 4, 5, 6, 7]),
        (3 * PAGE, 5 * PAGE, [0, 1, 2, 5, 6, 7]),
        (7 * PAGE, 20 * PAGE, [0, 1, 2, 3, 4, 5, 6]),
        (-PAGE, PAGE, [1, 2, 3, 4, 5, 6, 7]),
        (8 * PAGE, 9 * PAGE, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_exactly_the_pages_that_the_range_touches_go(world: World, start: int, end: int, left: list[int]) -> None:
    hva = world.slot(8)
    fill(world, range(8))
    with world.mm.notifiers.invalidate_range(hva + start, hva + end, CLEAR):
        assert mapped(world) == left


def test_seq_counts_ends(world: World) -> None:
    hva = world.slot(1)
    outer = world.mm.notifiers.invalidate_range_start(hva, hva + PAGE, CLEAR)
    inner = world.mm.notifiers.invalidate_range_start(hva, hva + PAGE, CLEAR)
    assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mmu_invalidate_seq) == (2, 0)
    world.mm.notifiers.invalidate_range_end(outer)
    assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mmu_invalidate_seq) == (1, 1)
    world.mm.notifiers.invalidate_range_end(inner)
    assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mmu_invalidate_seq) == (0, 2)


def test_one_host_range_in_two_slots(world: World) -> None:
    """One call, both ranges of guest frames zapped, one flush."""
    hva = world.slot(4, gfn=0x10)
    world.kvm.set_memslot(1, 0x100, 4, hva)
    fill(world, range(0x10, 0x14))
    for gfn in range(0x100, 0x104):
        assert world.read(gfn, 2) == b"%d" % (gfn - 0xF0)
    with world.watching(START, "spte_zap") as log:
        world.drop(hva + PAGE)
    assert log == [START, "spte_zap", "spte_zap", "vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier"]
    assert mapped(world) == [0x10, 0x12, 0x13, 0x100, 0x102, 0x103]
    assert world.kvm.mmu_invalidate_seq == 1  # one invalidation, however many slots it hits


def test_both_aliases_are_closed_to_faults(world: World) -> None:
    hva = world.slot(4, gfn=0x10)
    world.kvm.set_memslot(1, 0x100, 4, hva)
    world.mm.write(hva, b"x")
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        world.kvm.fault(0x10, READ)
        world.kvm.fault(0x100, READ)
        assert mapped(world) == []


def test_two_vms_on_one_mm(world: World) -> None:
    """Each is told once, the younger first; each flushes its own vCPUs, and only when it had something."""
    hva = world.slot(2)
    second = world.add_vm("vm1")
    world.add_vcpu(second, "other")
    second.set_memslot(0, 0x80, 2, hva)
    world.write(0, b"both")
    assert world.read(0x80, 4, second) == b"both"
    with world.watching(START, END, "spte_zap") as log:
        world.drop(hva)
    flushes = ["spte_zap", "other flush mmu_notifier", "other kick mmu_notifier"]
    assert log == [START, *flushes, "spte_zap", "vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier", END]
    world.read(0x80, 8, second)
    with world.watching("spte_zap") as log:
        world.drop(hva)
    assert log == flushes


def test_no_vcpu_reads_a_freed_page(world: World) -> None:
    """What a TLB still has after the start would be poison after the free."""
    hva = world.slot(1)
    world.write(0, b"guest")
    pfn, _ = world.vcpu.tlb[0]
    world.drop(hva)
    assert world.host.read(pfn, 0, 8) == b"\x6b" * 8
    assert world.vcpu.tlb == {}
    assert world.read(0, 5) == bytes(5)


def test_nothing_can_run_between_zap_and_flush(world: World) -> None:
    """mmu_lock is held: no schedule point between the first zap and the last kick, nor in a fault's install."""
    hva = world.slot(4)
    trace: list[str] = world.log
    with world.watching("spte_zap", "spte_set"), on_point(lambda label: trace.append(f"({label})")):
        world.write(0, b"x")
        world.drop(hva)
    zap = trace.index("spte_zap")
    assert trace[zap : zap + 3] == ["spte_zap", "vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier"]
    install = trace.index("spte_set")
    assert trace[install - 1] == "(kvm.fault.gup_done)"


def test_every_event_can_be_recorded(world: World, tmp_path: Path) -> None:
    """The recorder refuses events that their declaration does not allow."""
    with Recorder(tmp_path / "trace") as recorder:
        world.trace.attach(recorder)
        world.add_vm("vm1")
        hva = world.slot(2, gfn=0x10)
        world.write(0x10, b"x")  # the zero page first: one retry
        world.kvm.mmio_lookup = lambda gpa: True
        world.kvm.fault(0x9000, READ)
        world.drop(hva)
        world.read(0x10)
        world.kvm.delete_memslot(0)
        world.mm.exit()
        world.kvm.destroy()
        world.trace.detach(recorder)
    assert recorder.events > 15


class TestDefectsAreReported:
    def test_an_end_without_a_start(self, world: World) -> None:
        hva = world.slot(1)
        with pytest.raises(InternalError, match="more invalidations ended"):
            world.kvm.invalidate_range_end(MmuNotifierRange("mm0", hva, hva + PAGE, CLEAR))
        with pytest.raises(InternalError, match="did not begin"):
            world.add_vm("vm1").invalidate_range_end(MmuNotifierRange("mm0", 0, PAGE, CLEAR))

    @pytest.mark.parametrize("where", ["flush", "kvm.invalidate.counted"])
    def test_an_aborted_start_leaves_nothing_counted(
        self, world: World, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        hva = world.slot(1)
        world.write(0, b"x")

        def abort(label: str) -> None:
            if label == where:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(world.vcpu, "flush_tlb", lambda reason: abort("flush"))
            with on_point(abort), pytest.raises(KeyboardInterrupt):
                world.drop(hva)
        assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mn_active_invalidate_count) == (0, 0)
        assert world.mm.notifiers.open_ranges == ()
        # The entry is gone, the TLB still has it: the next range flushes though it finds nothing to remove.
        assert (world.kvm.sptes.present, 0 in world.vcpu.tlb) == (0 if where == "flush" else 1, True)
        world.drop(hva)
        assert world.vcpu.tlb == {}
        assert world.read(0) == bytes(8)

    @pytest.mark.parametrize("kind", [START, "spte_zap", END])
    def test_a_sink_that_fails_leaves_nothing_counted(self, world: World, kind: str) -> None:
        hva = world.slot(1)
        world.write(0, b"x")

        def sink(event: Event) -> None:
            if event.kind == kind:
                raise OSError("disk full")

        world.trace.attach(sink)
        with pytest.raises(OSError, match="disk full"):
            world.drop(hva)
        world.trace.detach(sink)
        assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mn_active_invalidate_count) == (0, 0)
        assert world.mm.notifiers.open_ranges == ()
        world.drop(hva)
        assert world.vcpu.tlb == {}


class TestLifetime:
    def test_a_vm_on_a_dead_mm(self, world: World) -> None:
        world.mm.exit()
        with pytest.raises(MmError) as caught:
            world.add_vm("late")
        assert caught.value.errno == errno.ESRCH

    def test_a_vm_is_not_born_in_an_open_range(self, world: World) -> None:
        with world.mm.notifiers.invalidate_range(0, PAGE, CLEAR), pytest.raises(MmError):
            world.add_vm("late")
        assert len(world.mm.notifiers) == 1
        world.add_vm("later")

    def test_exit_with_the_vm_open(self, world: World) -> None:
        """release, with everything zapped, before any unmapping; then nothing is announced any more."""
        world.slot(4)
        fill(world, range(4))
        kinds = ("mmu_notifier_release", START, "spte_zap", "pte_clear", "page_free")
        with world.watching(*kinds) as log:
            world.mm.exit()
        assert log[:4] == ["mmu_notifier_release", "spte_zap", "vcpu0 flush release", "vcpu0 kick release"]
        assert "page_free" in log
        assert START not in log
        assert log.count("spte_zap") == 1
        assert world.kvm.sptes.present == 0
        assert world.kvm.fault(0, READ) == FAULT
        world.kvm.destroy()

    def test_closing_the_vm(self, world: World) -> None:
        hva = world.slot(4)
        fill(world, range(4))
        with world.watching("mmu_notifier_release", "mmu_notifier_unregister", "spte_zap") as log:
            world.kvm.destroy()
            world.kvm.destroy()
        flushed = ["spte_zap", "vcpu0 flush release", "vcpu0 kick release"]
        assert log == ["mmu_notifier_release", *flushed, "mmu_notifier_unregister"]
        with world.watching(START) as log:
            world.drop(hva, 4)
        assert log == []
        assert world.kvm.fault(0, WRITE) == FAULT

    def test_closing_the_vm_in_the_middle_of_a_range(self, world: World) -> None:
        hva = world.slot(1)
        with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
            world.kvm.destroy()
        assert (world.kvm.mmu_invalidate_in_progress, world.kvm.mn_active_invalidate_count) == (0, 0)

    def test_release_may_run_twice(self, world: World) -> None:
        world.slot(1)
        world.write(0, b"x")
        world.kvm.release(world.mm)
        with world.watching("spte_zap") as log:
            world.kvm.release(world.mm)
        assert log == []

    def test_other_users_of_the_mm_go_on(self, world: World) -> None:
        calls: list[int] = []

        class Other(MmuNotifier):
            def invalidate_range_start(self, range: MmuNotifierRange) -> int:
                calls.append(range.start)
                return 0

        world.mm.notifiers.register(Other())
        hva = world.slot(1)
        world.kvm.destroy()
        world.drop(hva)
        assert calls == [hva]
