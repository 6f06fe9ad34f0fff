"""Shadow paging: watched and unsync tables, the reverse map, roots; with a guest whose accesses are calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from xipvm.actors import on_point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import GuestAccessError, ProtocolUnsupported
from xipvm.explore.paged import DIRTY, WRITABLE, GuestPageFaultError, PagedVcpu, page_entry, table_entry
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.secondary.base import READ
from xipvm.mmu.secondary.memslot import GFN_LIMIT, MEM_LOG_DIRTY_PAGES
from xipvm.mmu.secondary.shadow import AnyKvmShadow, ShadowPaging, kvm_shadow_of
from xipvm.mmu.secondary.shadow_table import INDEX_LIMIT, Root, ShadowPage
from xipvm.mmu.secondary.spte import SPTE_HOST_WRITABLE, SPTE_MMU_WRITABLE, SPTE_WRITE
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.trace import Event, Trace

RW = PROT_READ | PROT_WRITE
ROOT, LEAF, OTHER_LEAF, SECOND_ROOT, DATA = 0x10, 0x11, 0x12, 0x13, 0x20
PAGES = 8
W_BITS = SPTE_WRITE | SPTE_MMU_WRITABLE


def at(index: int, offset: int = 0) -> int:
    """The virtual address that entry ``index`` of the table below the root's first entry is for."""
    return index << PAGE_SHIFT | offset


class Shadowed:
    """A guest with tables in slot 0 and data, ``b"data <n>."`` each, in slot 1."""

    def __init__(self, protocol: str) -> None:
        self.trace = Trace()
        self.events: list[Event] = []
        self.oracle = Oracle()
        self.trace.attach(self.oracle)
        self.trace.attach(self.events.append)
        self.host = HostMemory(4 << 20, poison="frame")
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.tables = self.mm.mmap(4 * PAGE_SIZE, RW)
        self.data = self.mm.mmap(PAGES * PAGE_SIZE, RW)
        self.kvm: AnyKvmShadow = kvm_shadow_of(self.mm, self.trace, self.host)
        self.kvm.set_memslot(0, ROOT, 4, self.tables)
        self.kvm.set_memslot(1, DATA, PAGES, self.data)
        self.vcpu = self.add_vcpu()
        for page in range(PAGES):
            self.vcpu.store(DATA + page, b"data %d.." % page)
        for root in (ROOT, SECOND_ROOT):
            self.vcpu.set_entry(root, 0, table_entry(LEAF))

    def add_vcpu(self, root: int = ROOT, asid: int = 0) -> PagedVcpu:
        vcpu = PagedVcpu(self.kvm, self.host, self.trace, len(self.kvm.vcpus), root, asid)
        self.kvm.vcpus.append(vcpu)
        return vcpu

    def kinds(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def root(self, vcpu: PagedVcpu) -> Root:
        return self.kvm._roots[vcpu.role]


@pytest.fixture(params=["modern", "2008"])
def guest(request: pytest.FixtureRequest) -> Iterator[Shadowed]:
    made = Shadowed(request.param)
    yield made
    assert made.kvm.inconsistency() == ""
    assert at_rest.difference(made.kvm) == ""
    assert made.oracle.violations == []
    made.kvm.destroy()
    made.mm.exit()
    made.host.close()


def word(page: int) -> bytes:
    return b"data %d.." % page


# ---- what a fault makes


def test_an_entry_has_the_rights_of_both_sides(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(LEAF, 2, page_entry(DATA, writable=False))
    assert vcpu.load_gva(at(1)) == vcpu.load_gva(at(2)) == word(0)
    sptes = guest.root(vcpu).sptes
    assert not sptes.get(1) & SPTE_WRITE  # not dirty yet: the first write has to be seen
    vcpu.store_gva(at(1), b"written!")
    assert sptes.get(1) & SPTE_WRITE
    assert vcpu.load_gva(at(2)) == b"written!"
    with pytest.raises(GuestPageFaultError):
        vcpu.store_gva(at(2), b"never")
    with pytest.raises(GuestPageFaultError):
        vcpu.load_gva(at(3))
    vcpu.set_entry(LEAF, 4, page_entry(DATA + 0x100))
    with pytest.raises(GuestAccessError, match="no memory at guest physical page 0x120000"):
        vcpu.load_gva(at(4))


def test_accessed_and_dirty_bits_are_set_in_the_guest_s_table(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))

    def bits() -> int:
        return int.from_bytes(guest.mm.read(guest.tables + PAGE_SIZE + 8, 8), "little") & 0xC0

    assert bits() == 0
    vcpu.load_gva(at(1))
    assert bits() == 0x40
    vcpu.load_gva(at(1, 8))
    vcpu.store_gva(at(1), b"x")
    assert bits() == 0xC0
    vcpu.set_entry(LEAF, 1, page_entry(DATA))  # cleared
    vcpu.fence()
    vcpu.load_gva(at(1))
    assert bits() == 0x40  # and set again


def test_without_translation_it_maps_directly(guest: Shadowed) -> None:
    assert guest.vcpu.load(DATA + 3) == word(3)
    assert guest.kvm.roots == {}
    assert guest.kvm.translate(DATA + 3) is not None
    assert guest.kvm.watched == set()


# ---- watched tables


def test_tables_are_watched_from_their_first_walk_on(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    assert kvm.sptes.get(LEAF) & W_BITS == W_BITS
    vcpu.load_gva(at(1))
    assert kvm.watched == {ROOT, LEAF}
    for table in (ROOT, LEAF):
        assert kvm.sptes.get(table) & (W_BITS | SPTE_HOST_WRITABLE) == SPTE_HOST_WRITABLE
    assert kvm.sptes.get(OTHER_LEAF) & W_BITS in (0, W_BITS)
    assert {event.fields["start"] for event in guest.kinds("spte_protect")} == {ROOT, LEAF}


def test_a_table_that_comes_back_is_not_writable(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    kvm.zap_gfn_range(LEAF, LEAF + 1, "test")
    assert vcpu.load(LEAF, 8, 8) != bytes(8)
    assert kvm.sptes.get(LEAF) & (W_BITS | SPTE_HOST_WRITABLE) == SPTE_HOST_WRITABLE


def test_what_maps_a_table_loses_w_when_it_becomes_one(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(OTHER_LEAF))
    vcpu.store_gva(at(1, 16), page_entry(DATA))  # the table to be, by its virtual address
    assert guest.root(vcpu).sptes.get(1) & SPTE_WRITE
    vcpu.set_entry(ROOT, 1, table_entry(OTHER_LEAF))
    assert vcpu.load_gva(1 << 21 | at(2)) == word(0)
    assert not guest.root(vcpu).sptes.get(1) & SPTE_WRITE
    vcpu.store_gva(at(1, 16), page_entry(DATA + 1))
    vcpu.fence()
    assert vcpu.load_gva(1 << 21 | at(2)) == word(1)


def test_a_table_that_maps_itself_can_be_written_through_that(guest: Shadowed) -> None:
    """The last-level table by unsync, the root by emulation: neither takes W and the walk from each other for ever."""
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(LEAF))
    vcpu.set_entry(LEAF, 2, page_entry(ROOT))
    vcpu.set_entry(OTHER_LEAF, 1, page_entry(DATA + 1))
    vcpu.store_gva(at(1, 8 * 5), page_entry(DATA + 5))
    assert vcpu.load_gva(at(5)) == word(5)
    with pytest.raises(GuestAccessError, match="MMIO"):
        vcpu.store_gva(at(2, 8), table_entry(OTHER_LEAF))
    guest.kvm.emulate_write(ROOT << PAGE_SHIFT | 8, table_entry(OTHER_LEAF))  # what an engine does then
    assert vcpu.load_gva(1 << 21 | at(1)) == word(1)


# ---- unsync


def test_before_its_flush_a_guest_may_see_the_old_page_and_behind_it_never(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(LEAF, 2, page_entry(DATA + 2))
    assert (vcpu.load_gva(at(1)), vcpu.load_gva(at(2))) == (word(0), word(2))
    vcpu.set_entry(LEAF, 1, page_entry(DATA + 1))
    assert [event.fields["gfn"] for event in guest.kinds("shadow_unsync")] == [LEAF]
    assert kvm.sptes.get(LEAF) & W_BITS == W_BITS
    vcpu.known.clear()  # whatever an engine's TLB may have lost
    assert vcpu.load_gva(at(1)) == word(0)
    vcpu.fence()
    assert vcpu.load_gva(at(1)) == word(1)
    assert LEAF in kvm.watched
    assert not kvm.sptes.get(LEAF) & W_BITS
    assert [event.fields["gva"] for event in guest.kinds("shadow_zap")] == [at(1)]  # only what had changed


@pytest.mark.parametrize("entry", [page_entry(DATA), page_entry(DATA, writable=False), bytes(8)])
def test_rights_that_the_guest_takes_are_gone_behind_its_flush(guest: Shadowed, entry: bytes) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.store_gva(at(1), b"before")
    vcpu.set_entry(LEAF, 1, entry)
    vcpu.fence()
    if int.from_bytes(entry, "little") & WRITABLE:
        vcpu.store_gva(at(1), b"behind")
        assert int.from_bytes(vcpu.load(LEAF, 8, 8), "little") & DIRTY
    else:
        with pytest.raises(GuestPageFaultError):
            vcpu.store_gva(at(1), b"behind")


def test_an_entry_that_was_invalid_needs_no_flush(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    with pytest.raises(GuestPageFaultError):
        vcpu.load_gva(at(2))
    vcpu.set_entry(LEAF, 2, page_entry(DATA + 2))
    assert vcpu.load_gva(at(2)) == word(2)


def test_a_second_write_to_an_unsync_table_is_no_fault(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    vcpu.set_entry(LEAF, 1, page_entry(DATA + 1))
    faults = len(guest.kinds("kvm_page_fault"))
    for index in range(100, 110):
        vcpu.set_entry(LEAF, index, page_entry(DATA + 3))
    assert len(guest.kinds("kvm_page_fault")) == faults


def test_a_table_of_which_nothing_is_left_is_forgotten(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    vcpu.set_entry(LEAF, 1, bytes(8))
    vcpu.fence()
    assert kvm.watched == {ROOT}
    assert kvm.sptes.get(LEAF) & SPTE_MMU_WRITABLE  # one cmpxchg and it can be written
    protected = len(guest.kinds("spte_protect"))
    vcpu.store(LEAF, b"data now", 0x800)
    vcpu.fence()
    assert len(guest.kinds("spte_protect")) == protected


def test_every_vcpu_loses_w_when_a_table_is_synced(guest: Shadowed) -> None:
    first, second = guest.vcpu, guest.add_vcpu()
    for index in (1, 2):
        first.set_entry(LEAF, index, page_entry(DATA))
        first.load_gva(at(index))
    second.set_entry(LEAF, 1, page_entry(DATA + 1))
    first.fence()
    assert LEAF not in second.tlb
    second.set_entry(LEAF, 1, page_entry(DATA + 2))
    second.fence()
    assert first.load_gva(at(1)) == word(2)


# ---- upper tables


def test_a_store_to_an_upper_table_counts_at_once(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(OTHER_LEAF, 1, page_entry(DATA + 1))
    vcpu.set_entry(ROOT, 1, table_entry(OTHER_LEAF))
    assert (vcpu.load_gva(at(1)), vcpu.load_gva(1 << 21 | at(1))) == (word(0), word(1))
    vcpu.set_entry(ROOT, 0, table_entry(OTHER_LEAF))
    assert ROOT in kvm.watched
    assert LEAF not in kvm.watched
    assert [event.fields["gva"] for event in guest.kinds("shadow_zap")] == [at(1)]  # the other 2 MiB stay
    assert vcpu.load_gva(at(1)) == word(1)


def test_a_page_that_is_a_table_no_more_is_given_up(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    root = guest.root(vcpu)
    for index in range(100, 100 + ShadowPaging.flooding):
        vcpu.set_entry(ROOT, index, b"not now.")
        assert not root.obsolete
    vcpu.set_entry(ROOT, 110, b"not now.")
    assert root.obsolete
    assert kvm.watched == set()
    assert kvm.roots == {}
    faults = len(guest.kinds("kvm_page_fault"))
    for index in range(111, 120):
        vcpu.set_entry(ROOT, index, b"not now.")
    assert len(guest.kinds("kvm_page_fault")) == faults + 1  # it has W from the first on
    assert vcpu.load_gva(at(1)) == word(0)


def test_a_walk_between_shows_that_it_still_is_a_table(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    for index in range(2 * ShadowPaging.flooding):
        vcpu.set_entry(LEAF, index, page_entry(DATA))
    vcpu.load_gva(at(0))
    root = guest.root(vcpu)
    for index in range(2 * ShadowPaging.flooding):
        vcpu.set_entry(ROOT, 100 + index, bytes(8))
        vcpu.load_gva(at(index))
    assert not root.obsolete


def test_a_table_of_both_kinds_is_never_unsync(guest: Shadowed) -> None:
    """The root is a last-level table of itself."""
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    vcpu.set_entry(ROOT, 3, table_entry(ROOT))
    assert vcpu.walk_guest(3 << 21, READ, kvm._read_entry).gpa == LEAF << PAGE_SHIFT
    with pytest.raises(GuestPageFaultError):
        vcpu.load_gva(3 << 21 | at(9))
    vcpu.load_gva(3 << 21)
    vcpu.set_entry(ROOT, 4, table_entry(OTHER_LEAF))
    assert guest.kinds("shadow_unsync") == []


def test_an_unsync_table_that_becomes_an_upper_one_is_synced(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    vcpu.set_entry(LEAF, 1, page_entry(OTHER_LEAF))
    vcpu.set_entry(OTHER_LEAF, 0, page_entry(DATA + 4))
    other = guest.add_vcpu(root=LEAF)
    assert other.load_gva(1 << 21) == word(4)  # entry 1 of LEAF leads to OTHER_LEAF as a table
    assert LEAF in kvm.watched
    assert len(guest.kinds("shadow_sync")) == 1
    assert int.from_bytes(vcpu.load_gva(at(1)), "little") >> 10 == DATA + 4


# ---- the reverse map


def test_an_invalidation_finds_every_address_in_every_root(guest: Shadowed) -> None:
    first, second = guest.vcpu, guest.add_vcpu(root=SECOND_ROOT)
    for index in (1, 2, 3):
        first.set_entry(LEAF, index, page_entry(DATA))
    first.set_entry(LEAF, 4, page_entry(DATA + 4))
    for vcpu in (first, second):
        for index in (1, 2, 3, 4):
            vcpu.load_gva(at(index))
    guest.mm.madvise(guest.data, PAGE_SIZE, MADV_DONTNEED)
    for vcpu in (first, second):
        root = guest.root(vcpu)
        assert [index for index, _ in root.sptes.entries(0, INDEX_LIMIT)] == [4]
        assert sorted(root.made_of) == [4]
        assert vcpu.load_gva(at(3)) == bytes(8)


@pytest.mark.parametrize("taken", ["log", "age", "protect"])
def test_rights_are_taken_at_every_address(guest: Shadowed, taken: str) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    for index in (1, 2):
        vcpu.set_entry(LEAF, index, page_entry(DATA))
        vcpu.store_gva(at(index), b"x" * 8)
    if taken == "log":
        kvm.set_memslot(1, DATA, PAGES, guest.data, MEM_LOG_DIRTY_PAGES)
    elif taken == "age":
        assert kvm._age(guest.data, guest.data + PAGE_SIZE, "test")
    else:
        guest.mm.mprotect(guest.data, PAGE_SIZE, PROT_READ)
    root = guest.root(vcpu)
    for index in (1, 2):
        assert not root.sptes.get(index) & SPTE_WRITE
    if taken == "log":
        vcpu.store_gva(at(2), b"logged..")
        assert kvm.get_dirty_log(1)[0] == 1
        assert not root.sptes.get(2) & SPTE_WRITE
        vcpu.store_gva(at(1), b"again...")
        assert kvm.get_dirty_log(1)[0] == 1
    assert vcpu.load_gva(at(1)) == vcpu.load_gva(at(2))


def test_tables_are_logged_when_bits_are_set_in_them(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    kvm.set_memslot(0, ROOT, 4, guest.tables, MEM_LOG_DIRTY_PAGES)
    vcpu.load_gva(at(1))
    assert kvm.get_dirty_log(0)[0] == 1 << LEAF - ROOT
    vcpu.set_entry(ROOT, 7, bytes(8))  # emulated
    assert kvm.get_dirty_log(0)[0] == 1 << 0
    vcpu.set_entry(LEAF, 2, page_entry(DATA + 2))  # unsync
    assert kvm.get_dirty_log(0)[0] == 1 << LEAF - ROOT
    vcpu.set_entry(LEAF, 3, page_entry(DATA + 3))  # it was protected
    assert kvm.get_dirty_log(0)[0] == 1 << LEAF - ROOT


def test_tables_move_and_nobody_notices(guest: Shadowed) -> None:
    if guest.mm.protocol == "2008":
        with pytest.raises(ProtocolUnsupported):
            compact_memory(guest.host, guest.trace)
        return
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.store_gva(at(1), b"stays...")
    compact_memory(guest.host, guest.trace)
    assert vcpu.load_gva(at(1)) == b"stays..."
    vcpu.set_entry(LEAF, 1, page_entry(DATA + 1))
    vcpu.fence()
    assert vcpu.load_gva(at(1)) == word(1)


# ---- roots


def test_roots_are_by_root_page_and_asid(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(OTHER_LEAF, 1, page_entry(DATA + 1))
    vcpu.set_entry(SECOND_ROOT, 0, table_entry(OTHER_LEAF))
    for _ in range(2):
        for root, asid, page in ((ROOT, 1, 0), (SECOND_ROOT, 2, 1), (ROOT, 3, 0)):
            vcpu.switch(root, asid)
            assert vcpu.load_gva(at(1)) == word(page)
    assert len(guest.kvm.roots or {}) == 3
    assert len(guest.kinds("shadow_set")) == 3  # the second round found all of them


def test_a_table_of_two_processes_is_synced_for_both(guest: Shadowed) -> None:
    first, second = guest.vcpu, guest.add_vcpu(root=SECOND_ROOT)
    first.set_entry(LEAF, 1, page_entry(DATA))
    assert first.load_gva(at(1)) == second.load_gva(at(1)) == word(0)
    first.set_entry(LEAF, 1, page_entry(DATA + 1))
    first.fence()
    second.fence()
    assert first.load_gva(at(1)) == second.load_gva(at(1)) == word(1)


def test_the_oldest_roots_go_when_there_is_no_room(guest: Shadowed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShadowPaging, "max_shadow_pages", 5)
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    for asid in range(8):
        vcpu.switch(ROOT, asid)
        assert vcpu.load_gva(at(1)) == word(0)
    assert [event.fields["root"] for event in guest.kinds("shadow_root_gone")] == [1, 2, 3, 4, 5]
    assert [role[0] >> 44 for role in guest.kvm.roots or {}] == [5, 6, 7]


def test_room_is_made_before_the_root_is_looked_at(guest: Shadowed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the fault's own root that goes."""
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(LEAF, 2, page_entry(DATA + 2))
    vcpu.load_gva(at(1))
    monkeypatch.setattr(ShadowPaging, "max_shadow_pages", 1)
    root = guest.root(vcpu)
    guest.kvm.fault_gva(vcpu, vcpu.role, at(2), READ)
    assert root.obsolete
    assert guest.kvm.roots == {}
    monkeypatch.undo()
    assert vcpu.load_gva(at(2)) == word(2)


def test_a_memslot_goes_and_all_roots_are_obsolete(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    root = guest.root(vcpu)
    kvm.delete_memslot(1)
    assert root.obsolete
    assert kvm.roots == {}
    assert kvm.watched == set()
    with pytest.raises(GuestAccessError, match="no memory"):
        vcpu.load_gva(at(1))
    kvm.set_memslot(1, DATA, PAGES, guest.data)
    assert vcpu.load_gva(at(1)) == word(0)


def test_a_fault_whose_root_became_obsolete_starts_over(guest: Shadowed) -> None:
    vcpu, kvm = guest.vcpu, guest.kvm
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.set_entry(LEAF, 2, page_entry(DATA + 2))
    vcpu.load_gva(at(1))
    root = guest.root(vcpu)
    with once("kvm.shadow.mapping", kvm.vcpu_reset):
        assert vcpu.load_gva(at(2)) == word(2)
    assert root.obsolete
    assert root.sptes.present == 0


def test_an_entry_that_changes_under_a_fault_is_walked_again(guest: Shadowed) -> None:
    vcpu, other = guest.vcpu, guest.add_vcpu()
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    with once("kvm.shadow.mapping", lambda: other.set_entry(LEAF, 1, page_entry(DATA + 1))) as seen:
        assert vcpu.load_gva(at(1)) == word(1)
    assert seen.count("kvm.shadow.mapping") == 2


def test_a_reset_forgets_what_the_last_guest_had(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    guest.kvm.vcpu_reset()
    guest.mm.write(guest.tables + PAGE_SIZE + 8, page_entry(DATA + 1))  # a loader writes by the host's addresses
    assert vcpu.load_gva(at(1)) == word(1)


def test_kvm_s_own_writes_to_a_table_are_seen(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    guest.kvm.write_guest(LEAF << PAGE_SHIFT | 8, page_entry(DATA + 1))
    assert vcpu.load_gva(at(1)) == word(1)


def test_it_ends_with_the_mm(guest: Shadowed) -> None:
    vcpu = guest.vcpu
    vcpu.set_entry(LEAF, 1, page_entry(DATA))
    vcpu.load_gva(at(1))
    guest.kvm.release(guest.mm)
    assert guest.kvm.roots == {}
    assert guest.kvm.sptes.next_present(0, GFN_LIMIT) == -1
    with pytest.raises(GuestAccessError, match="has lost its address space"):
        vcpu.load_gva(at(1))


@pytest.mark.parametrize(
    ("shift", "base", "bytes_", "pages"),
    [
        (12, 0x200, (0, 8), (0x200, 0x201)),
        (12, 0x200, (4, 8), (0x200, 0x202)),
        (21, 0, (8, 4), (0x200, 0x400)),
        (39, -8 << 27, (64, 16), (0, 2 << 27)),  # a table of two entries further up in its page
        (39, -8 << 27, (0, 64), (0, 0)),
        (48, 0, (0, 4096), (0, INDEX_LIMIT)),
    ],
)
def test_which_addresses_bytes_of_a_table_are_for(
    shift: int, base: int, bytes_: tuple[int, int], pages: tuple[int, int]
) -> None:
    page = ShadowPage(Root(1, (0, 0, 0, 0, 0)), 0, shift, base, top=False)
    assert page.pages_of(*bytes_) == pages


@contextmanager
def once(label: str, action: Callable[[], object]) -> Iterator[list[str]]:
    """Does ``action`` when ``label`` is first passed; the labels that are."""
    seen: list[str] = []

    def hook(passed: str) -> None:
        seen.append(passed)
        if passed == label and seen.count(label) == 1:
            action()

    with on_point(hook):
        yield seen
