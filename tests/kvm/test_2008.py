"""KVM as the client of the 2008 protocol: what it does when it is told, and the faults that run beside that."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kvm.conftest import World
from xipvm.errors import InternalError, MmError, ProtocolUnsupported
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import ACCESSED, MAPPED, pte_pfn
from xipvm.mmu.secondary.base import FAULT, READ, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.kvm_2008 import Kvm2008, kvm_of
from xipvm.mmu.verify import verify
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
R, RW = 1, 3
CLEAR = RangeEvent.CLEAR
START, END, ONE = (
    "mmu_notifier_invalidate_range_start",
    "mmu_notifier_invalidate_range_end",
    "mmu_notifier_invalidate_page",
)
TOLD = ["vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier"]


@pytest.fixture
def world() -> World:
    return World(protocol="2008")


def mapped(world: World) -> list[int]:
    return [gfn for gfn, _ in world.kvm.sptes.entries(0, 1 << 27)]


def counters(world: World) -> tuple[int, int]:
    return world.kvm.mmu_notifier_seq, world.kvm.mmu_notifier_count


# ---- what it is told


def test_order_of_a_range(world: World) -> None:
    hva = world.slot(2)
    world.write(0, b"x")
    with world.watching(START, END, "spte_zap", "pte_clear", "primary_tlb_flush", "page_free") as log:
        world.mm.munmap(hva, 2 * PAGE)
    assert log == [START, "spte_zap", *TOLD, "pte_clear", END, "primary_tlb_flush", "page_free"]


def test_order_of_a_page(world: World) -> None:
    """The entry has gone and the host's TLBs were flushed when it is told; the copy appears when it has finished.

    Here a debugger writes to text that a child shares and the guest has mapped.
    """
    hva = world.ram(1)
    world.mm.write(hva, b"old")
    world.mm.mprotect(hva, PAGE, R)
    world.kvm.set_memslot(0, 8, 1, hva)
    child = world.mm.fork()
    assert world.read(8, 3) == b"old"
    with world.watching(ONE, START, "spte_zap", "pte_clear", "primary_tlb_flush", "pte_set", "page_free") as log:
        assert world.mm.access_remote_vm(hva, b"new") == 3
    assert log == ["pte_clear", "primary_tlb_flush", ONE, "spte_zap", *TOLD, "pte_set"]
    assert (world.read(8, 3), child.read(hva, 3)) == (b"new", b"old")
    child.exit()


def test_order_of_a_page_that_moves(world: World) -> None:
    hva = world.slot(2, gfn=8)
    world.write(8, b"old")
    old = world.kvm.translate(8)[0]
    kinds = (ONE, "spte_zap", "pte_clear", "primary_tlb_flush", "pte_nonpresent", "pte_set", "page_free", START, END)
    with world.watching(*kinds) as log:
        migrate_page(world.host, world.trace, old)
    change = ["pte_clear", "primary_tlb_flush", ONE, "spte_zap", *TOLD, "pte_nonpresent"]
    assert log == [*change, "pte_set", "page_free"]
    assert world.read(8, 3) == world.mm.read(hva, 3) == b"old"
    assert world.kvm.translate(8)[0] != old


def test_nothing_zapped_nothing_flushed(world: World) -> None:
    hva = world.slot(2)
    world.mm.write(hva, b"x")
    with world.watching("spte_zap") as log:
        migrate_page(world.host, world.trace, pte_pfn(world.mm.pgd.get(hva >> 12)))
        world.drop(hva)
    assert log == []
    assert counters(world) == (2, 0)


def test_counters(world: World) -> None:
    """A range counts from start to end, whatever it covers, and raises the number in the end; a page raises it."""
    hva = world.slot(1)
    notifiers = world.mm.notifiers
    with notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        assert counters(world) == (0, 1)
        with notifiers.invalidate_range(0, PAGE, CLEAR):
            assert counters(world) == (0, 2)
        assert counters(world) == (1, 1)
    assert counters(world) == (2, 0)
    notifiers.invalidate_page(hva)
    assert counters(world) == (3, 0)
    assert world.kvm.invalidations == 3


def test_an_end_without_a_start(world: World) -> None:
    with pytest.raises(InternalError, match="ended, but did not begin"):
        world.kvm.invalidate_range_end(world.mm, 0, PAGE)
    assert counters(world) == (0, 0)


def test_a_sink_that_fails(world: World) -> None:
    hva = world.slot(1)
    world.write(0, b"x")

    def sink(event: object) -> None:
        if event.kind == "spte_zap":
            raise OSError("no space")

    world.trace.attach(sink)
    with pytest.raises(OSError, match="no space"):
        world.drop(hva)
    world.trace.detach(sink)
    assert world.kvm.mmu_notifier_count == 0
    assert world.kvm.tlbs_dirty
    world.drop(hva)
    assert not world.kvm.tlbs_dirty


# ---- faults


def test_a_read_gets_a_page_to_write_to(world: World) -> None:
    """Also where a modern KVM would map the zero page, or what a child still shares."""
    hva = world.slot(2)
    assert world.read(0) == bytes(8)
    pfn, writable = world.kvm.translate(0)
    assert (pte_pfn(world.mm.pgd.get(hva >> 12)), writable) == (pfn, True)
    world.write(1, b"mine")
    child = world.mm.fork()
    before = pte_pfn(world.mm.pgd.get((hva >> 12) + 1))
    assert world.read(1, 4) == b"mine"
    assert world.kvm.translate(1)[0] != before
    child.exit()


def test_where_the_host_may_only_read_the_guest_reads(world: World) -> None:
    hva = world.slot(1)
    world.mm.write(hva, b"text")
    world.mm.mprotect(hva, PAGE, R)
    assert world.read(0, 4) == b"text"
    assert not world.kvm.translate(0)[1]
    assert world.kvm.fault(0, WRITE) == FAULT


@pytest.mark.parametrize("how", ["migrate", "drop", "swap"])
def test_a_page_that_goes_while_it_is_looked_up(world: World, how: str) -> None:
    """The fault sees that something was announced, installs nothing, and drops what it held."""
    hva = world.slot(1)
    world.mm.write(hva, b"mine")
    world.mm.swapon(4)
    pfn = pte_pfn(world.mm.pgd.get(hva >> 12))

    def act() -> None:
        if how == "drop":
            world.drop(hva)
        elif how == "migrate":
            with pytest.raises(MmError):  # the fault holds it
                migrate_page(world.host, world.trace, pfn)
        else:
            assert world.mm.memcg_reclaim(2) == 0

    with world.watching("spte_set", "page_free", "kvm_retry") as log:
        world.fault_with("kvm.fault.gup_done", act, 0, READ)
    retried = how != "swap"  # a page that somebody holds is not even tried
    assert [kind for kind in log if kind != "page_free"] == (["kvm_retry"] if retried else ["spte_set"])
    if how == "drop":
        assert log == ["kvm_retry", "page_free"]
        assert world.host.refcount(pfn) == 0
    assert (world.retries() == [(0, "seq")]) is retried
    assert world.read(0, 4) == (bytes(4) if how == "drop" else b"mine")
    verify(world.host)


def shared_text(world: World) -> tuple[int, object]:
    """A page that the guest may read only and a child shares, at guest frame 8: a debugger's write copies it."""
    hva = world.ram(1)
    world.mm.write(hva, b"old")
    world.mm.mprotect(hva, PAGE, R)
    world.kvm.set_memslot(0, 8, 1, hva)
    return hva, world.mm.fork()


@pytest.mark.parametrize("where", ["kvm.fault.seq_read", "kvm.fault.gup_done"])
def test_a_page_that_is_copied_while_it_is_looked_up(world: World, where: str) -> None:
    hva, _child = shared_text(world)
    with world.watching():
        world.fault_with(where, lambda: world.mm.access_remote_vm(hva, b"new"), 8, READ)
    assert world.retries() == [(8, "seq")]
    assert world.read(8, 3) == b"new"


def test_the_number_of_announcements_is_what_saves_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No range is ever open for a single page: who looks at the count only installs the page that was replaced."""
    monkeypatch.setattr(
        Kvm2008, "mmu_invalidate_retry", lambda self, seq, gfn: "in progress" if self.mmu_notifier_count else ""
    )
    hva, _child = shared_text(world)
    world.fault_with("kvm.fault.gup_done", lambda: world.mm.access_remote_vm(hva, b"new"), 8, READ)
    assert world.read(8, 3) == b"old"


def test_the_count_is_what_saves_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a range: who looks at the number only installs a page that goes."""
    monkeypatch.setattr(
        Kvm2008, "mmu_invalidate_retry", lambda self, seq, gfn: "seq" if self.mmu_notifier_seq != seq else ""
    )
    hva = world.slot(1)
    world.mm.write(hva, b"mine")
    pfn = pte_pfn(world.mm.pgd.get(hva >> 12))
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        world.kvm.fault(0, READ)
        assert world.kvm.translate(0) == (pfn, True)


def test_while_a_range_is_open_nothing_is_installed(world: World) -> None:
    """Whatever the range covers: there is one count."""
    world.slot(2)
    with world.watching(), world.mm.notifiers.invalidate_range(0, PAGE, CLEAR):
        assert world.kvm.fault(1, READ) == 0
        assert world.kvm.describe(1).invalidating
    assert world.retries() == [(1, "in progress")]
    assert mapped(world) == []
    assert world.read(1) == bytes(8)
    assert not world.kvm.describe(1).invalidating


def test_a_range_that_passes_during_the_lookup(world: World) -> None:
    hva = world.slot(2)
    with world.watching():
        world.fault_with("kvm.fault.seq_read", lambda: world.drop(hva), 0, READ)
    assert world.retries() == [(0, "seq")]


def test_memslots_change_while_a_range_is_open(world: World) -> None:
    """The count does not depend on them."""
    hva = world.slot(1)
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        world.kvm.delete_memslot(0)
        world.slot(1, gfn=9, slot=3)
    assert world.kvm.mmu_notifier_count == 0
    assert world.read(9) == bytes(8)


# ---- young pages, and swap


def test_young(world: World) -> None:
    hva = world.slot(2, gfn=4)
    world.write(4, b"x")
    young = world.mm.notifiers.clear_flush_young
    with world.watching("spte_age") as log:
        assert young(hva, hva + PAGE)
        assert not young(hva, hva + 2 * PAGE)
    assert log == ["spte_age", "vcpu0 flush clear_flush_young", "vcpu0 kick clear_flush_young"]
    assert world.read(4, 1) == b"x"
    assert young(hva, hva + PAGE)


def test_what_the_guest_wrote_goes_to_swap_and_comes_back(world: World) -> None:
    hva = world.slot(8)
    world.mm.swapon(16)
    for turn in range(3):
        for gfn in range(8):
            world.write(gfn, b"%d.%d" % (turn, gfn))
        for page in range(8):  # the host has not used them, the guest has
            world.mm.pgd.set((hva >> 12) + page, world.mm.pgd.get((hva >> 12) + page) & ~ACCESSED)
        assert world.mm.memcg_reclaim(1) == 0
        assert world.mm.memcg_reclaim(1) == 8
        assert mapped(world) == []
        assert [world.read(gfn, 3) for gfn in range(8)] == [b"%d.%d" % (turn, gfn) for gfn in range(8)]
    verify(world.host)


# ---- the end


def test_the_mm_ends(world: World) -> None:
    world.slot(2)
    world.write(0, b"x")
    with world.watching("mmu_notifier_release", "spte_zap", "pte_clear") as log:
        world.mm.exit()
    assert log == ["mmu_notifier_release", "spte_zap", "vcpu0 flush release", "vcpu0 kick release", "pte_clear"]
    assert world.kvm.fault(0, READ) == FAULT
    world.kvm.destroy()
    world.kvm.destroy()


def test_the_vm_ends_in_the_middle_of_a_range(world: World) -> None:
    hva = world.slot(1)
    other = world.add_vm("vm1")
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, CLEAR):
        world.kvm.destroy()
    assert (world.kvm.mmu_notifier_count, other.mmu_notifier_count) == (0, 0)
    assert list(world.mm.notifiers) == [other]


def test_each_protocol_has_its_kvm(world: World, make_world: type[World]) -> None:
    modern = make_world()
    assert (type(world.kvm), type(modern.kvm)) == (Kvm2008, Kvm)
    assert type(kvm_of(world.mm, world.trace, world.host, pin_sptes=True)) is Kvm
    for kind, other in ((Kvm, world), (Kvm2008, modern)):
        with pytest.raises(ProtocolUnsupported):
            kind(other.mm, other.trace, other.host)
    assert list(world.mm.notifiers) == [world.kvm]


# ---- both protocols lead to the same


PAGES = 6
page = st.integers(0, PAGES - 1)
value = st.binary(min_size=1, max_size=4)
OPERATIONS = st.one_of(
    st.tuples(st.just("guest_write"), page, value),
    st.tuples(st.just("guest_read"), page),
    st.tuples(st.just("host_write"), page, value),
    st.tuples(st.just("host_read"), page),
    st.tuples(st.just("drop"), page),
    st.tuples(st.just("protect"), page),
    st.tuples(st.just("fork")),
    st.tuples(st.just("child_write"), page, value),
    st.tuples(st.just("child_exit")),
    st.tuples(st.just("migrate"), page),
    st.tuples(st.just("reclaim"), st.integers(1, 2)),
    st.tuples(st.just("unmap"), page),
)


class Run:
    """A world of one protocol, and what an operation of the test does there."""

    def __init__(self, protocol: str) -> None:
        self.world = World(protocol=protocol)
        self.hva = self.world.slot(PAGES)
        self.world.mm.swapon(64)
        self.children: list[object] = []

    def at(self, page: int) -> int:
        return self.hva + page * PAGE

    def guest_write(self, page: int, data: bytes) -> object:
        if self.world.access(page, WRITE) == "fault":
            return "fault"
        return self.world.write(page, data)

    def guest_read(self, page: int) -> object:
        return "fault" if self.world.access(page, READ) == "fault" else self.world.read(page)

    def host_write(self, page: int, data: bytes) -> object:
        return self.world.mm.write(self.at(page), data)

    def host_read(self, page: int) -> object:
        return self.world.mm.read(self.at(page), 8)

    def drop(self, page: int) -> object:
        return self.world.drop(self.at(page))

    def protect(self, page: int) -> object:
        area = self.world.mm.find_vma(self.at(page))
        return self.world.mm.mprotect(self.at(page), PAGE, R if area is not None and area.prot == RW else RW)

    def fork(self) -> object:
        self.children.append(self.world.mm.fork())
        return None

    def child_write(self, page: int, data: bytes) -> object:
        return self.children[-1].write(self.at(page), data) if self.children else None

    def child_exit(self) -> object:
        return self.children.pop().exit() if self.children else None

    def migrate(self, page: int) -> object:
        entry = self.world.mm.pgd.get(self.at(page) >> 12)
        if entry & MAPPED and pte_pfn(entry):
            migrate_page(self.world.host, self.world.trace, pte_pfn(entry))
        return None

    def reclaim(self, passes: int) -> object:
        self.world.mm.memcg_reclaim(passes)
        return None

    def unmap(self, page: int) -> object:
        return self.world.mm.munmap(self.at(page), PAGE)

    def do(self, name: str, *arguments: object) -> object:
        function: Callable[..., object] = getattr(self, name)
        try:
            return function(*arguments)
        except MmError as error:
            return errno.errorcode[error.errno]


@settings(deadline=None, max_examples=60)
@given(st.lists(OPERATIONS, max_size=40))
def test_both_protocols_give_the_same_memory(operations: list[tuple[object, ...]]) -> None:
    runs = [Run("2008"), Run("modern")]
    for operation in operations:
        results = [run.do(*operation) for run in runs]
        assert results[0] == results[1], operation
        for run in runs:
            verify(run.world.host)
            assert run.world.kvm.mmu_invalidate_in_progress == 0
    for page in range(PAGES):
        assert runs[0].do("guest_read", page) == runs[1].do("guest_read", page)
        assert runs[0].do("host_read", page) == runs[1].do("host_read", page)
