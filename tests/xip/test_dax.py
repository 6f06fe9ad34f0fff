"""The DAX form: huge entries, dirty entries and write-back, pinned pages that keep their blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xipvm.actors import on_point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import DeadlockError
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mm import Mm
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.pte import DIRTY, HUGE, WRITE
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume

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
def test_a_store_takes_the_huge_entry_away_and_nothing_else(world: World, flags: int) -> None:
    hva = world.map(flags)
    world.mm.read(hva, 8)
    world.mm.write(hva + PAGE_SIZE, b"new word")
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
