"""The DAX form: huge entries, dirty entries and write-back, pinned pages that keep their blocks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from xipvm.actors import on_point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import DeadlockError, MmError
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_NOHUGEPAGE
from xipvm.mmu.migrate_device import pin_longterm
from xipvm.mmu.mm import Mm
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.pte import DIRTY, HUGE, WRITE
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.secondary.xpmem import Xpmem
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import XpmemNode

RW = PROT_READ | PROT_WRITE
HVA = 0x2000_0000_0000


class World:
    """A file of 4 MiB without holes, on a device of a few blocks more, judged by the oracle."""

    def __init__(self) -> None:
        self.host = HostMemory(4 << 20)
        self.trace = Trace()
        self.oracle = Oracle()
        self.events: list[Event] = []
        self.trace.attach(self.oracle)
        self.trace.attach(self.events.append)
        self.mm = Mm(self.host, self.trace)
        self.volume = RamVolume(self.host, 2 * HUGE_PAGES + 8)
        self.file = DaxFile(self.host, self.trace, self.volume.file(2 * HPAGE_SIZE))
        self.handle = OpenFile(self.file)
        for page in range(2 * HUGE_PAGES):
            self.handle.lseek(page * PAGE_SIZE)
            self.handle.put(page.to_bytes(8, "little"))

    def map(self, flags: int, prot: int = RW) -> int:
        return self.mm.mmap(2 * HPAGE_SIZE, prot, flags, addr=HVA, file=self.file)

    def close(self) -> None:
        verify(self.host)
        assert not self.oracle.violations
        self.mm.exit()
        self.volume.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def word(page: int) -> bytes:
    return page.to_bytes(8, "little")


def test_two_mebibytes_in_one_piece_are_one_entry_also_of_a_guest(world: World) -> None:
    hva = world.map(MAP_SHARED)
    assert world.mm.read(hva + 5 * PAGE_SIZE, 8) == word(5)
    assert world.mm.pgd.huge(hva >> PAGE_SHIFT) & HUGE
    kvm = kvm_of(world.mm, world.trace, world.host)
    kvm.set_memslot(0, 0, 2 * HUGE_PAGES, hva)
    vcpu = ScriptedVcpu(kvm.port(0), world.host, world.trace, 0)
    kvm.vcpus.append(vcpu)
    assert vcpu.load(7) == word(7)
    assert any(event.kind == "spte_set_huge" for event in world.events)
    vcpu.store(7, b"written!")
    assert vcpu.load(8) == word(8)
    assert world.mm.read(hva + 7 * PAGE_SIZE, 8) == b"written!"
    kvm.destroy()


@pytest.mark.parametrize("flags", [MAP_SHARED, MAP_PRIVATE])
def test_a_store_is_the_file_s_or_takes_the_huge_entry_away(world: World, flags: int) -> None:
    hva = world.map(flags)
    world.mm.read(hva, 8)
    world.mm.write(hva + PAGE_SIZE, b"new word")
    assert bool(world.mm.pgd.huge(hva >> PAGE_SHIFT)) == (flags == MAP_SHARED)
    assert world.mm.read(hva, 8) == word(0)
    assert world.mm.read(hva + PAGE_SIZE, 8) == b"new word"
    world.handle.lseek(PAGE_SIZE)
    assert world.handle.get(8) == (b"new word" if flags == MAP_SHARED else word(1))


def test_a_file_in_pieces_has_small_entries(world: World) -> None:
    world.file.punch_hole(3, 1)
    hva = world.map(MAP_SHARED)
    assert world.mm.read(hva + 3 * PAGE_SIZE, 8) == bytes(8)
    assert not world.mm.pgd.huge(hva >> PAGE_SHIFT)
    assert world.mm.read(hva + HPAGE_SIZE, 8) == word(HUGE_PAGES)
    assert world.mm.pgd.huge((hva + HPAGE_SIZE) >> PAGE_SHIFT)


def test_truncation_in_the_middle_of_a_huge_entry(world: World) -> None:
    hva = world.map(MAP_SHARED)
    world.mm.read(hva, 8)
    world.file.truncate(3 * PAGE_SIZE)
    assert world.mm.read(hva + 2 * PAGE_SIZE, 8) == word(2)
    assert len(world.volume.free) == 2 * HUGE_PAGES + 8 - 3


def test_write_back_makes_entries_clean_and_a_store_makes_them_dirty_again(world: World) -> None:
    hva = world.map(MAP_SHARED)
    world.mm.madvise(hva, 2 * HPAGE_SIZE, MADV_NOHUGEPAGE)
    world.mm.write(hva, b"first...")
    world.mm.write(hva + PAGE_SIZE, b"second..")
    assert world.file.fsync() == 2
    assert not world.mm.pgd.get(hva >> PAGE_SHIFT) & (WRITE | DIRTY)
    assert world.file.fsync() == 0
    world.mm.write(hva, b"again...")
    assert world.file.dirty == {0}


def test_a_pinned_block_is_not_freed(world: World) -> None:
    hva = world.map(MAP_SHARED)
    pfn = pin_user_page(world.mm, hva + 2 * PAGE_SIZE, write=True)
    with pytest.raises(DeadlockError, match="pinned"):
        world.file.punch_hole(0, 4)
    assert len(world.volume.free) == 8
    let_go = [lambda: unpin_user_page(world.mm, pfn)]
    with on_point(lambda label: let_go.pop()() if label == "dax.busy" and let_go else None):
        world.file.punch_hole(0, 4)
    assert len(world.volume.free) == 12


def test_who_has_a_page_pinned_may_need_another_of_the_file_to_get_on(world: World) -> None:
    """As a copy to user space does. What it faults in while a hole is waited for is not left mapped."""
    hva = world.map(MAP_SHARED)
    pfn = pin_user_page(world.mm, hva, write=True)

    def get_on(label: str) -> None:
        if label == "dax.busy" and world.host.refcount(pfn):
            world.mm.write(hva + PAGE_SIZE, b"last one")
            unpin_user_page(world.mm, pfn)

    with on_point(get_on):
        world.file.punch_hole(0, 2)
    assert len(world.volume.free) == 10
    assert world.mm.read(hva + PAGE_SIZE, 8) == bytes(8)


def test_a_guest_that_pins_what_it_maps_keeps_its_blocks(world: World) -> None:
    hva = world.map(MAP_SHARED)
    kvm = kvm_of(world.mm, world.trace, world.host, pin_sptes=True)
    kvm.set_memslot(0, 0, 4, hva)
    vcpu = ScriptedVcpu(kvm.port(0), world.host, world.trace, 0)
    kvm.vcpus.append(vcpu)
    assert vcpu.load(2) == word(2)
    with pytest.raises(DeadlockError, match="pinned pages"):
        world.file.truncate(0)
    assert world.file.size == 2 * HPAGE_SIZE
    kvm.zap_gfn_range(0, 4, "tests")
    world.file.truncate(0)
    assert len(world.volume.free) == 2 * HUGE_PAGES + 8
    kvm.destroy()


def test_a_remote_node_is_recalled_before_blocks_are_freed(world: World) -> None:
    hva = world.map(MAP_SHARED)
    owner = Xpmem(world.mm)
    owner.register()
    owner.make("file", hva, 4 * PAGE_SIZE)
    owner_end, node_end = ActorLink.pair("owner", "node0")
    remote = owner.connect(owner_end)
    node = XpmemNode(node_end, "node0", memory=world.mm)
    owner_end.serve = lambda: owner.serve(remote)
    node_end.serve = node.serve
    node.hello()
    permit, _ = node.get("file")
    at = node.attach(permit, 0, 4 * PAGE_SIZE)
    assert node.load(at, PAGE_SIZE, 8) == word(1)
    (pfn,) = owner.pins()
    assert world.host.refcount(pfn) == 1
    del world.events[:]
    world.file.punch_hole(0, 4)
    kinds = [event.kind for event in world.events]
    assert kinds.index("xpmem_recall") < kinds.index("page_unpin") < kinds.index("xip_free")
    assert not world.host.refcount(pfn)
    assert node.load(at, PAGE_SIZE, 8) == bytes(8)
    owner.destroy()


def test_no_page_of_a_file_is_pinned_for_long(world: World) -> None:
    hva = world.map(MAP_SHARED)
    with pytest.raises(MmError) as refused:
        pin_longterm(world.mm, hva)
    assert refused.value.errno == errno.EOPNOTSUPP


FREED = "xip_free", {"file": "file", "first": 0, "end": 1, "pages": [(0x1000000, 1)]}


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (("pte_set", {"mm": "mm0", "hva": HVA, "pfn": 0x1000000, "flags": 3}), None, "maps it at 0x200000000000"),
        (("spte_set", {"vm": "vm0", "gfn": 7, "pfn": 0x1000000, "rights": "rw"}), None, "guest frame 0x7"),
        (("page_pin", {"vm": "remote", "gfn": 7, "pfn": 0x1000000}), None, "remote has it pinned as guest frame 0x7"),
        (None, ("pte_set", {"mm": "mm0", "hva": HVA, "pfn": 0x1000000, "flags": 3}), "is no file's since"),
    ],
)
def test_the_oracle_sees_who_has_a_freed_block(
    before: tuple[str, dict[str, Any]] | None, after: tuple[str, dict[str, Any]] | None, complaint: str
) -> None:
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    trace.emit("xip_map", file="file", mm="mm0", start=HVA, end=HVA + PAGE_SIZE, pgoff=0)
    for kind, fields in filter(None, (before, FREED, after)):
        trace.emit(kind, **fields)
    (violation,) = oracle.violations
    assert violation.invariant == "I5"
    assert complaint in violation.message
