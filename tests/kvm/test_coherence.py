"""The shadow entries against the host's page table, after and in the middle of whatever the host does.

Random operations of the host and accesses of two VMs; at every schedule point that they pass another vCPU may fault,
and where no lock of a real kernel forbids it the host does something else. At each of these points and after each step:

* an entry outside all open ranges names the frame that the host's entry names, and is writable only if that one is;
* an entry inside an open range, once all notifiers have been told, does not exist;
* what the guest reads is what the host reads.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import PRESENT as PTE_PRESENT
from xipvm.mmu.pte import WRITE as PTE_WRITE
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.secondary.base import FETCH, READ, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.spte import SPTE_WRITE, describe_spte, spte_pfn
from xipvm.notifier import MmuNotifiers

if TYPE_CHECKING:
    from tests.kvm.conftest import World

PAGE = 4096
PAGES = 6
BASE = 0x7000_0000
MAP_PRIVATE_ANONYMOUS_FIXED = 0x32
MADV_DONTNEED = 4

page = st.integers(0, PAGES - 1)
extent = st.tuples(page, st.integers(1, PAGES)).map(lambda at: (at[0], min(PAGES, at[0] + at[1])))
host_operation = st.one_of(
    st.tuples(st.just("host_write"), page),
    st.tuples(st.just("host_read"), page),
    st.tuples(st.just("drop"), extent),
    st.tuples(st.just("munmap"), extent),
    st.tuples(st.just("mmap"), extent),
    st.tuples(st.just("mprotect"), extent, st.sampled_from([0, 1, 3])),
    st.tuples(st.just("fork")),
    st.tuples(st.just("child_write"), page),
    st.tuples(st.just("child_exit")),
)
guest = st.tuples(st.just("guest"), st.integers(0, 1), page, st.sampled_from([READ, WRITE, WRITE, FETCH]))
operation = st.one_of(guest, host_operation)
meddling = st.one_of(st.none(), guest, host_operation)

Operation = tuple[object, ...]


class Coherence:
    """The checks, and the vCPU and the host threads that act at schedule points."""

    def __init__(self, world: World, meddlers: list[Operation | None]) -> None:
        self.world = world
        self.meddlers = meddlers
        self.told: set[int] = set()
        self.meddling = False
        self.seen = 0
        self.retried = 0
        self.children: list[Mm] = []
        world.mm.mmap(PAGES * PAGE, 3, MAP_PRIVATE_ANONYMOUS_FIXED, addr=BASE)
        world.kvm.set_memslot(0, 0, PAGES, BASE)
        world.kvm.set_memslot(1, 0x100, 2, BASE + 2 * PAGE)
        world.add_vm("vm1").set_memslot(0, 0x40, PAGES, BASE)
        self.gfns = [(world.vms[0], 0), (world.vms[1], 0x40)]
        world.trace.attach(self.count_retry)

    def count_retry(self, event: object) -> None:
        self.retried += getattr(event, "kind", "") == "kvm_retry"

    def at_point(self, label: str) -> None:
        open = {range.id for range in self.world.mm.notifiers.open_ranges}
        if label == "notifier.range_start.done":
            self.told.add(max(open))
        self.told &= open
        self.check()
        if not self.meddling and self.meddlers:
            operation = self.meddlers.pop()
            if operation is not None:
                self.meddling = True
                with suppress(MmError):
                    self.meddle(operation)
                self.meddling = False
                self.check()

    def meddle(self, operation: Operation) -> None:
        match operation:
            case "guest", int(vm), int(page), int(access):  # one fault, which may well be given up
                kvm, base = self.gfns[vm]
                kvm.fault(base + page, access)
            case _:
                self.step(operation, 99)

    def check(self) -> None:
        ranges = [range for range in self.world.mm.notifiers.open_ranges if range.id in self.told]
        for vm in self.world.vms:
            for gfn, spte in vm.sptes.entries(0, 0x1000):
                slot = vm.memslots.find(gfn)
                assert slot is not None
                hva = slot.hva_of(gfn)
                what = f"{vm.name} gfn {gfn:#x} {describe_spte(spte)}"
                for range in ranges:
                    assert not range.overlaps(hva, hva + PAGE), f"{what} exists in {range!r}"
                pte = self.world.mm.pgd.get(hva >> 12)
                assert pte & PTE_PRESENT, f"{what}, but the host has no page"
                assert pte_pfn(pte) == spte_pfn(spte), f"{what}, but the host has pfn {pte_pfn(pte):#x}"
                assert not spte & SPTE_WRITE or pte & PTE_WRITE, f"{what}, but the host may not write"
                self.seen += 1

    def step(self, operation: Operation, number: int) -> None:
        mm = self.world.mm
        data = number.to_bytes(8, "little")
        match operation:
            case "guest", int(vm), int(page), int(access):
                self.guest(*self.gfns[vm], page, access, data)
            case "host_write", int(page):
                mm.write(BASE + page * PAGE, data)
            case "host_read", int(page):
                mm.read(BASE + page * PAGE, 8)
            case "drop", (int(first), int(end)):
                mm.madvise(BASE + first * PAGE, (end - first) * PAGE, MADV_DONTNEED)
            case "munmap", (int(first), int(end)):
                mm.munmap(BASE + first * PAGE, (end - first) * PAGE)
            case "mmap", (int(first), int(end)):
                mm.mmap((end - first) * PAGE, 3, MAP_PRIVATE_ANONYMOUS_FIXED, addr=BASE + first * PAGE)
            case "mprotect", (int(first), int(end)), int(prot):
                mm.mprotect(BASE + first * PAGE, (end - first) * PAGE, prot)
            case ("fork",):
                self.children.append(mm.fork())
            case "child_write", int(page) if self.children:
                self.children[-1].write(BASE + page * PAGE, b"child!!!")
            case ("child_exit",) if self.children:
                self.children.pop().exit()

    def guest(self, vm: Kvm, base: int, page: int, access: int, data: bytes) -> None:
        pfn = self.world.access(base + page, access, vm)
        if pfn == "fault":
            return
        assert isinstance(pfn, int)
        if access == WRITE:
            self.world.host.write(pfn, 0, data)
        assert self.world.mm.read(BASE + page * PAGE, PAGE) == self.world.host.read(pfn, 0, PAGE)


def run(world: World, operations: list[Operation], meddlers: list[Operation | None]) -> Coherence:
    checker = Coherence(world, meddlers)
    with on_point(checker.at_point):
        for number, operation in enumerate(operations):
            with suppress(MmError):  # memory that is not there: allowed, but it must leave things coherent
                checker.step(operation, number)
            checker.check()
    assert world.mm.notifiers.open_ranges == ()
    for vm in world.vms:
        assert (vm.mmu_invalidate_in_progress, vm.mn_active_invalidate_count) == (0, 0)
    return checker


anything = given(operations=st.lists(operation, max_size=25), meddlers=st.lists(meddling, max_size=60))


def explore(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@explore(60)
@anything
def test_entries_agree_with_the_host(
    make_world: type[World], operations: list[Operation], meddlers: list[Operation | None]
) -> None:
    world = make_world()
    run(world, operations, meddlers)
    world.mm.exit()
    assert all(vm.sptes.present == 0 for vm in world.vms)


@pytest.mark.slow
@explore(2000)
@anything
def test_entries_agree_with_the_host_at_length(
    make_world: type[World], operations: list[Operation], meddlers: list[Operation | None]
) -> None:
    run(make_world(), operations, meddlers)


SCRIPT: list[Operation] = [
    ("host_write", 0),
    ("guest", 0, 0, WRITE),
    ("guest", 1, 0, READ),
    ("fork",),
    ("guest", 0, 0, WRITE),
    ("guest", 1, 2, WRITE),
    ("drop", (0, 4)),
    ("guest", 0, 0, READ),
    ("mprotect", (0, 6), 1),
    ("guest", 0, 1, WRITE),
    ("munmap", (1, 3)),
]


def test_the_check_sees_entries_and_faults_race_with_invalidations(world: World) -> None:
    """A fixed run of the above, so that it cannot pass by having nothing to look at."""
    checker = run(world, SCRIPT, [("guest", n % 2, n % 3, WRITE) for n in range(60)])
    assert checker.seen > 100
    assert checker.retried > 5


BREAKAGES: dict[str, tuple[type, str, object]] = {
    "no retry check": (Kvm, "mmu_invalidate_retry", lambda self, seq, gfn: ""),
    "no zap": (Kvm, "_zap", lambda self, start, end: None),
    "seq stands still": (Kvm, "_invalidate_end", lambda self: vars(self).__setitem__("mmu_invalidate_in_progress", 0)),
    "nobody is told": (MmuNotifiers, "invalidate_range", lambda self, start, end, event: nullcontext()),
}


@pytest.mark.parametrize("broken", BREAKAGES)
def test_a_broken_protocol_is_caught(world: World, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BREAKAGES[broken])
    meddlers: list[Operation | None] = [("guest", n % 2, n % 3, WRITE) for n in range(30)]
    meddlers += [("drop", (0, 6)), ("guest", 0, 0, WRITE)] * 15
    with pytest.raises(AssertionError, match=r"but the host|exists in"):
        run(world, SCRIPT, meddlers)
