"""Entries that pin their pages, as before there were notifiers: what the guest uses stays, whatever the host does."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from xipvm.errors import MmError
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import MAPPED, pte_pfn
from xipvm.mmu.secondary.base import FAULT, READ, WRITE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED

if TYPE_CHECKING:
    from tests.kvm.conftest import World

PAGE = 4096
PROT_READ, RW = 1, 3
GFN = 0x10


@pytest.fixture
def world(make_world: type[World]) -> Iterator[World]:
    """What pins are held is right all the time, also in the end."""
    world = make_world(pin_sptes=True)
    yield world
    check(world)
    world.kvm.destroy()
    assert world.kvm.pins() == {}
    verify(world.host)


def check(world: World) -> None:
    verify(world.host, held=world.kvm.pins())


def frame(world: World, gfn: int = GFN) -> int:
    mapped = world.kvm.translate(gfn)
    assert mapped is not None
    return mapped[0]


def entries(world: World, hva: int, pages: int) -> list[int]:
    return [world.mm.pgd.get((hva >> 12) + page) for page in range(pages)]


def test_nobody_tells_it_of_anything(world: World) -> None:
    hva = world.slot(2, GFN)
    world.write(GFN, b"mine")
    assert list(world.mm.notifiers) == []
    with world.watching() as log:
        world.drop(hva, 2)
    assert log == []
    assert not [event for event in world.events if event.kind.startswith("mmu_notifier")]


def test_each_entry_holds_one_reference(world: World) -> None:
    world.slot(2, GFN)
    world.write(GFN, b"mine")
    pfn = frame(world)
    assert (world.host.refcount(pfn), world.host.mapcount(pfn)) == (2, 1)
    for _ in range(3):  # faults that change nothing take none
        assert world.kvm.fault(GFN, WRITE) == 0
    assert world.host.refcount(pfn) == 2
    assert world.kvm.pins() == {pfn: 1}
    hva = world.mm.find_vma(world.kvm.memslots.find(GFN).hva)
    world.kvm.set_memslot(1, 0x100, 1, hva.start)
    world.write(0x100, b"same")
    assert world.kvm.pins() == {pfn: 2}
    assert world.host.refcount(pfn) == 3


def test_a_read_breaks_copy_on_write(world: World) -> None:
    """The zero page would be replaced at the host's first write, and the guest would go on reading zeros."""
    hva = world.slot(1, GFN)
    assert world.read(GFN) == bytes(8)
    world.mm.write(hva, b"host")
    assert world.read(GFN, 4) == b"host"


def test_where_the_host_may_only_read_the_guest_reads(world: World) -> None:
    hva = world.ram(1)
    world.mm.write(hva, b"text")
    world.mm.mprotect(hva, PAGE, PROT_READ)
    world.kvm.set_memslot(0, GFN, 1, hva)
    assert world.read(GFN, 4) == b"text"
    assert world.kvm.translate(GFN) == (pte_pfn(entries(world, hva, 1)[0]), False)
    assert world.kvm.fault(GFN, WRITE) == FAULT
    world.mm.mprotect(hva, PAGE, RW)
    pfn = frame(world)
    world.write(GFN, b"more")
    assert (frame(world), world.kvm.pins()) == (pfn, {pfn: 1})


@pytest.mark.parametrize("how", ["munmap", "dontneed"])
def test_an_unmapped_page_lives_on(world: World, how: str) -> None:
    hva = world.slot(2, GFN)
    world.write(GFN, b"mine")
    pfn = frame(world)
    if how == "munmap":
        world.mm.munmap(hva, PAGE)
    else:
        world.mm.madvise(hva, PAGE, MADV_DONTNEED)
    assert (world.host.refcount(pfn), world.host.mapcount(pfn)) == (1, 0)
    assert world.read(GFN, 4) == b"mine"
    if how == "dontneed":
        assert world.mm.read(hva, 4) == bytes(4)  # the host has another page by now


def test_a_copied_page_is_what_the_guest_goes_on_with(world: World) -> None:
    hva = world.slot(1, GFN)
    world.write(GFN, b"old")
    pfn = frame(world)
    child = world.mm.fork()
    world.mm.write(hva, b"new")
    child.exit()
    assert world.host.refcount(pfn) == 1
    assert (world.read(GFN, 3), world.mm.read(hva, 3)) == (b"old", b"new")


def test_a_pinned_page_is_not_swapped(world: World) -> None:
    hva = world.slot(4, GFN)
    for gfn in range(GFN, GFN + 2):
        world.write(gfn, b"%d" % gfn)
    for page in range(4):
        world.mm.write(hva + page * PAGE + 8, b"host")
    before = entries(world, hva, 2)
    world.mm.swapon(16)
    with world.watching():
        assert world.mm.memcg_reclaim(4) == 2
    kinds = [event.kind for event in world.events]
    assert kinds.count("swap_out") == 2
    assert [entry & ~0x20 for entry in entries(world, hva, 2)] == [entry & ~0x20 for entry in before]
    assert not any(entry & MAPPED for entry in entries(world, hva + 2 * PAGE, 2))
    check(world)
    world.kvm.zap_gfn_range(GFN, GFN + 4, "shrink")
    assert world.mm.memcg_reclaim(4) == 2
    assert world.read(GFN, 2) == b"16"


def test_a_pinned_page_of_a_memory_file_is_not_swapped(world: World) -> None:
    file = ShmemFile(world.host, world.trace, "memfd", 2 * PAGE)
    hva = world.mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    world.kvm.set_memslot(0, GFN, 2, hva)
    world.write(GFN, b"mine")
    world.mm.write(hva + PAGE, b"host")
    world.mm.swapon(16)
    before = entries(world, hva, 1)
    world.mm.madvise(hva, 2 * PAGE, 21)  # MADV_PAGEOUT
    assert entries(world, hva, 2) == [*before, 0]
    assert sorted(file.pages) == [0]
    file.close()


def test_a_pinned_page_does_not_move(world: World) -> None:
    hva = world.slot(2, GFN)
    world.write(GFN, b"mine")
    world.mm.write(hva + PAGE, b"host")
    pfn, before = frame(world), entries(world, hva, 1)
    with pytest.raises(MmError) as caught:
        migrate_page(world.host, world.trace, pfn)
    assert caught.value.errno == errno.EAGAIN
    assert entries(world, hva, 1) == before
    assert compact_memory(world.host, world.trace) == 1
    assert frame(world) == pfn


def test_references_go_behind_the_flush(world: World) -> None:
    """The last reference to an unmapped page is the entry's: it may be reused as soon as that is gone."""
    hva = world.slot(2, GFN)
    world.write(GFN, b"mine")
    world.mm.munmap(hva, 2 * PAGE)
    with world.watching("spte_zap", "page_free") as log:
        world.kvm.delete_memslot(0)
    assert log == ["spte_zap", "vcpu0 flush memslot", "vcpu0 kick memslot", "page_free"]


def test_references_go_with_the_vm(world: World) -> None:
    world.slot(3, GFN)
    for gfn in range(GFN, GFN + 3):
        world.write(gfn, b"x")
    pfns = [frame(world, gfn) for gfn in range(GFN, GFN + 3)]
    world.kvm.destroy()
    assert [world.host.refcount(pfn) for pfn in pfns] == [1, 1, 1]
    assert world.kvm.fault(GFN, READ) == FAULT
    world.kvm.destroy()


def test_the_mm_may_go_first(world: World) -> None:
    world.slot(1, GFN)
    world.write(GFN, b"mine")
    pfn = frame(world)
    world.mm.exit()
    assert world.host.refcount(pfn) == 1
    assert world.read(GFN, 4) == b"mine"
    world.kvm.destroy()
    assert world.host.refcount(pfn) == 0


def test_a_fault_that_lost_a_race_holds_nothing(world: World) -> None:
    """The slot moves away while the page is looked up, and the host drops it: the fault's own reference is the last."""
    hva = world.slot(1, GFN)

    def gone() -> None:
        world.kvm.delete_memslot(0)
        world.drop(hva)

    with world.watching("page_free", "spte_set") as log:
        world.fault_with("kvm.fault.gup_done", gone, GFN, WRITE)
    assert log[-1] == "page_free"
    assert "spte_set" not in log
    assert world.retries() == [(GFN, "seq")]


def test_a_sink_that_fails_leaves_the_count_right(world: World) -> None:
    world.slot(1, GFN)

    def sink(event: object) -> None:
        if event.kind == "spte_set":
            raise OSError("no space")

    world.trace.attach(sink)
    with pytest.raises(OSError, match="no space"):
        world.kvm.fault(GFN, WRITE)
    world.trace.detach(sink)
    check(world)
