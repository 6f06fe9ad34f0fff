"""Shadow entries of 2 MiB: where they are made, and that they go whenever the host's does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kvm.conftest import PAGE, PROT_READ, RW, World
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE, MADV_DONTNEED, MADV_HUGEPAGE, MADV_PAGEOUT
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.secondary.base import READ, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_PRESENT, SPTE_WRITE, spte_pfn

FIRST = 3 * HUGE_PAGES
"""The guest frame that the memory begins at."""


@pytest.fixture
def ram(world: World) -> int:
    """Two huge pages of the host in a memslot at FIRST."""
    return back(world)


def back(world: World, *, gfn: int = FIRST, pages: int = 2 * HUGE_PAGES, offset: int = 0, flags: int = 0) -> int:
    hva = world.ram(2 * HUGE_PAGES)
    assert hva % HPAGE_SIZE == 0
    world.mm.madvise(hva, 2 * HPAGE_SIZE, MADV_HUGEPAGE)
    world.mm.write(hva, b"first")
    world.mm.write(hva + HPAGE_SIZE, b"second")
    world.kvm.set_memslot(0, gfn, pages, hva + offset * PAGE, flags)
    return hva


def level(world: World, gfn: int) -> int:
    """0 without an entry."""
    spte = world.kvm.sptes.get(gfn)
    return 0 if not spte & SPTE_PRESENT else 2 if spte & SPTE_HUGE else 1


def test_one_entry_for_512_pages(world: World, ram: int) -> None:
    with world.watching("kvm_page_fault", "spte_set", "spte_set_huge") as log:
        assert world.read(FIRST, 5) == b"first"
        for gfn in (FIRST + 7, FIRST + HUGE_PAGES - 1):
            world.write(gfn, b"guest")
    assert log == ["kvm_page_fault", "spte_set_huge"]
    assert world.kvm.sptes.present == 1
    assert level(world, FIRST + 100) == 2
    assert world.mm.read(ram + 7 * PAGE, 5) == b"guest"
    pfn = pte_pfn(world.mm.pgd.huge(ram >> 12))
    assert world.kvm.translate(FIRST + 7) == (pfn + 7, True)


def test_a_fault_in_the_middle_installs_all_of_it(world: World, ram: int) -> None:
    world.access(FIRST + 300, READ)
    assert spte_pfn(world.kvm.sptes.get(FIRST)) == pte_pfn(world.mm.pgd.huge(ram >> 12))


@pytest.mark.parametrize(
    "where",
    [{"gfn": FIRST + 1}, {"offset": 1, "pages": 600}, {"pages": HUGE_PAGES - 1}, {"flags": MEM_LOG_DIRTY_PAGES}],
    ids=["gfn not aligned", "hva not aligned", "slot too short", "dirty log"],
)
def test_where_entries_stay_small(world: World, where: dict[str, int]) -> None:
    back(world, **where)
    gfn = where.get("gfn", FIRST)
    assert isinstance(world.access(gfn + 5, WRITE), int)
    assert level(world, gfn + 5) == 1
    assert level(world, gfn + 6) == 0


def test_a_slot_that_begins_inside_a_huge_page(world: World) -> None:
    back(world, gfn=FIRST + 4, offset=4, pages=2 * HUGE_PAGES - 4)
    world.access(FIRST + 5, READ)
    world.access(FIRST + HUGE_PAGES + 5, READ)
    assert (level(world, FIRST + 5), level(world, FIRST + HUGE_PAGES + 5)) == (1, 2)


def test_a_vm_that_wants_small_ones(world: World, ram: int) -> None:
    world.kvm.max_level = 1
    world.access(FIRST, READ)
    assert level(world, FIRST) == 1


def test_pins_and_2008_are_small(make_world: type[World]) -> None:
    for world in (make_world(pin_sptes=True), make_world(protocol="2008")):
        hva = world.ram(HUGE_PAGES)
        world.mm.thp.enabled = "always"
        world.kvm.set_memslot(0, FIRST, HUGE_PAGES, hva)
        world.access(FIRST, WRITE)
        assert level(world, FIRST) == 1


def test_a_read_only_slot(world: World) -> None:
    back(world, flags=MEM_READONLY)
    world.access(FIRST + 9, READ)
    assert level(world, FIRST) == 2
    assert not world.kvm.sptes.get(FIRST) & SPTE_WRITE
    assert world.access(FIRST + 9, WRITE) == "mmio"


def test_the_huge_zero_page(world: World) -> None:
    hva = world.ram(HUGE_PAGES)
    world.mm.madvise(hva, HPAGE_SIZE, MADV_HUGEPAGE)
    world.kvm.set_memslot(0, FIRST, HUGE_PAGES, hva)
    assert world.read(FIRST + 3) == bytes(8)
    assert level(world, FIRST) == 2
    world.write(FIRST + 3, b"three")
    assert level(world, FIRST) == 2
    assert world.read(FIRST + 3, 5) == b"three"
    assert world.mm.read(hva + 3 * PAGE, 5) == b"three"


@pytest.mark.parametrize(
    "operation",
    [
        lambda world, hva: world.mm.madvise(hva + 4 * PAGE, PAGE, MADV_DONTNEED),
        lambda world, hva: world.mm.munmap(hva + 4 * PAGE, PAGE),
        lambda world, hva: world.mm.mprotect(hva + 4 * PAGE, PAGE, PROT_READ),
        lambda world, hva: (world.mm.swapon(64), world.mm.madvise(hva + 4 * PAGE, PAGE, MADV_PAGEOUT)),
    ],
    ids=["dontneed", "munmap", "mprotect", "pageout"],
)
def test_a_change_of_a_part_takes_all_of_it(world: World, ram: int, operation: Callable[[World, int], object]) -> None:
    world.access(FIRST + 5, WRITE)
    world.access(FIRST + HUGE_PAGES, READ)
    with world.watching("spte_zap") as log:
        operation(world, ram)
    assert log[:3] == ["spte_zap", "vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier"]
    assert level(world, FIRST + 5) == 0
    assert level(world, FIRST + HUGE_PAGES) == 2
    assert world.read(FIRST, 5) == b"first"
    assert level(world, FIRST) == 1


def test_copy_on_write_under_a_huge_entry(world: World, ram: int) -> None:
    child = world.mm.fork()
    world.access(FIRST, READ)
    assert level(world, FIRST) == 2
    world.write(FIRST, b"guest")
    assert level(world, FIRST) == 1
    assert level(world, FIRST + 1) == 0
    assert child.read(ram, 5) == b"first"


def test_reuse_makes_the_entry_writable(world: World, ram: int) -> None:
    world.mm.fork().exit()
    world.access(FIRST, READ)
    world.write(FIRST + 3, b"x")
    assert level(world, FIRST) == 2
    assert world.kvm.sptes.get(FIRST) & SPTE_WRITE


def test_collapse_under_small_entries(world: World) -> None:
    hva = world.ram(HUGE_PAGES)
    world.kvm.set_memslot(0, FIRST, HUGE_PAGES, hva)
    for page in range(16):
        world.write(FIRST + page, bytes([page]) * 8)
    world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
    assert level(world, FIRST) == 0
    assert [world.read(FIRST + page, 1)[0] for page in range(16)] == list(range(16))
    assert level(world, FIRST + 400) == 2


def test_small_entries_make_way(world: World, ram: int) -> None:
    world.kvm.max_level = 1
    world.access(FIRST + 5, READ)
    world.kvm.max_level = 2
    with world.watching("spte_zap", "spte_set_huge") as log:
        world.access(FIRST + 6, READ)
    assert log == ["spte_zap", "vcpu0 flush level", "vcpu0 kick level", "spte_set_huge"]
    assert level(world, FIRST + 5) == 2


def test_a_huge_entry_makes_way(world: World, ram: int) -> None:
    world.access(FIRST, READ)
    hva = world.kvm.memslots.find(FIRST)
    assert hva is not None
    world.kvm.set_memslot(0, FIRST, 2 * HUGE_PAGES, ram, MEM_LOG_DIRTY_PAGES)
    assert not world.kvm.sptes.get(FIRST) & SPTE_WRITE
    with world.watching("spte_zap", "spte_set") as log:
        world.write(FIRST + 3, b"x")
    assert log == ["spte_zap", "vcpu0 flush level", "vcpu0 kick level", "spte_set"]
    log_bits = world.kvm.get_dirty_log(0)
    assert [bit for bit in range(2 * HUGE_PAGES) if log_bits[bit >> 3] >> (bit & 7) & 1] == [3]


def test_ageing_is_of_all_of_it(world: World, ram: int) -> None:
    world.access(FIRST, WRITE)
    assert isinstance(world.kvm, Kvm)
    assert world.kvm.test_young(ram + 5 * PAGE)
    assert world.kvm.clear_flush_young(ram, ram + HPAGE_SIZE)
    assert not world.kvm.clear_flush_young(ram, ram + HPAGE_SIZE)
    assert world.kvm.translate(FIRST + 5) is None
    world.access(FIRST + 5, READ)
    assert level(world, FIRST) == 2
    assert world.kvm.test_young(ram)


def test_a_huge_page_that_moves(world: World, ram: int) -> None:
    world.write(FIRST + 3, b"three")
    old = pte_pfn(world.mm.pgd.huge(ram >> 12))
    new = migrate_page(world.host, world.trace, old)
    assert level(world, FIRST) == 0
    assert world.read(FIRST + 3, 5) == b"three"
    assert spte_pfn(world.kvm.sptes.get(FIRST)) == new


def test_no_huge_entry_over_an_open_range(world: World, ram: int) -> None:
    with world.mm.notifiers.invalidate_range(ram + 100 * PAGE, ram + 101 * PAGE, 1):  # type: ignore[arg-type]
        assert isinstance(world.access(FIRST + 5, READ), int)
        assert level(world, FIRST + 5) == 1
    world.access(FIRST + 6, READ)
    assert level(world, FIRST + 6) == 2


@pytest.mark.parametrize("label", ["kvm.fault.seq_read", "kvm.fault.gup_done"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda world, hva: world.mm.madvise(hva + 4 * PAGE, PAGE, MADV_DONTNEED),
        lambda world, hva: world.mm.madvise(hva, HPAGE_SIZE, MADV_DONTNEED),
    ],
    ids=["split", "drop"],
)
def test_a_split_during_a_fault(world: World, ram: int, label: str, operation: Callable[[World, int], object]) -> None:
    world.fault_with(label, lambda: operation(world, ram), FIRST + 5)
    assert level(world, FIRST + 5) == 0
    world.access(FIRST + 5, READ)
    huge = world.mm.pgd.huge(ram >> 12) != 0
    assert level(world, FIRST + 5) == (2 if huge else 1)


def test_a_collapse_during_a_fault(world: World) -> None:
    hva = world.ram(HUGE_PAGES)
    world.kvm.set_memslot(0, FIRST, HUGE_PAGES, hva)
    world.mm.write(hva, b"first")
    world.fault_with("kvm.fault.gup_done", lambda: world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE), FIRST)
    assert level(world, FIRST) == 0
    assert world.read(FIRST, 5) == b"first"
    assert level(world, FIRST) == 2


def test_a_huge_entry_of_a_memory_file(world: World) -> None:
    hva = world.mm.mmap(HPAGE_SIZE, RW, 0x21)  # shared, anonymous
    world.mm.write(hva, b"first")
    world.kvm.set_memslot(0, FIRST, HUGE_PAGES, hva)
    world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
    assert world.read(FIRST, 5) == b"first"
    assert level(world, FIRST) == 2
    world.write(FIRST + 1, b"guest")
    assert world.mm.read(hva + PAGE, 5) == b"guest"
    assert world.kvm.sptes.present == 1
