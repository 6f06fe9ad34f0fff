"""2 MiB of a DAX file as one entry: written in place, written back as a whole, holes, and what takes it apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import DeadlockError
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_NOHUGEPAGE
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.pte import DIRTY, HUGE, SPECIAL, WRITE, pte_pfn
from xipvm.mmu.secondary.gru_2008 import gru_of
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.mappers import Mappers
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume

RW = PROT_READ | PROT_WRITE
HVA = 0x2000_0000_0000
ELSEWHERE = 0x3000_0000_0000
DATA = b"new data"
HOLE = bytes(8)
MIB = 1 << 20


class World:
    """A file of 4 MiB, ``filled`` or a hole, on a device of ``blocks``, judged by the oracle."""

    def __init__(self, *, filled: bool = True, blocks: int = 3 * HUGE_PAGES, memory: int = 10 * MIB) -> None:
        self.host = HostMemory(memory)
        self.trace = Trace()
        self.oracle = Oracle()
        self.events: list[Event] = []
        self.trace.attach(self.oracle)
        self.trace.attach(self.events.append)
        self.mm = Mm(self.host, self.trace)
        self.mms = [self.mm]
        self.kvms: list[KvmBase] = []
        self.volume = RamVolume(self.host, blocks)
        self.inode = self.volume.file(2 * HPAGE_SIZE)
        self.file = DaxFile(self.host, self.trace, self.inode)
        if filled:
            self.inode.create_huge(0)
            self.inode.create_huge(HUGE_PAGES)
            for page in range(2 * HUGE_PAGES):
                self.put(page, word(page))

    def map(
        self,
        flags: int = MAP_SHARED,
        prot: int = RW,
        *,
        mm: Mm | None = None,
        addr: int = HVA,
        pages: int = 1024,
        pgoff: int = 0,
    ) -> int:
        return (mm or self.mm).mmap(pages * PAGE_SIZE, prot, flags, addr=addr, file=self.file, pgoff=pgoff)

    def another(self) -> Mm:
        self.mms.append(Mm(self.host, self.trace, name=f"mm{len(self.mms)}"))
        return self.mms[-1]

    def guest(self, mm: Mm | None = None, hva: int = HVA, pages: int = 2 * HUGE_PAGES) -> ScriptedVcpu:
        kvm = kvm_of(mm or self.mm, self.trace, self.host, name=f"vm{len(self.kvms)}")
        kvm.set_memslot(0, 0, pages, hva)
        vcpu = ScriptedVcpu(kvm.port(0), self.host, self.trace, len(self.kvms))
        kvm.vcpus.append(vcpu)
        self.kvms.append(kvm)
        return vcpu

    def put(self, page: int, data: bytes) -> None:
        handle = OpenFile(self.file)
        handle.lseek(page * PAGE_SIZE)
        assert handle.put(data) == len(data)

    def get(self, page: int) -> bytes:
        handle = OpenFile(self.file)
        handle.lseek(page * PAGE_SIZE)
        return handle.get(8)

    def entry(self, hva: int = HVA, mm: Mm | None = None) -> int:
        """The huge entry around ``hva``, 0 if there is none."""
        return (mm or self.mm).pgd.huge(hva >> PAGE_SHIFT)

    def said(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of ``kinds`` since the last time."""
        found = [event.fields for event in self.events if event.kind in kinds]
        self.events.clear()
        return found

    def close(self) -> None:
        verify(self.host)
        for kvm in self.kvms:
            kvm.destroy()
        for mm in self.mms:
            mm.exit()
        self.oracle.finish()
        assert not self.oracle.violations
        self.volume.close()
        self.host.close()


def word(page: int) -> bytes:
    return page.to_bytes(8, "little")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def hole() -> Iterator[World]:
    world = World(filled=False)
    yield world
    world.close()


# ---- written


def test_a_first_store_maps_two_mebibytes_to_be_written(world: World) -> None:
    world.map()
    world.events.clear()
    world.mm.write(HVA + 5 * PAGE_SIZE, DATA)
    assert world.entry() & (HUGE | WRITE | DIRTY | SPECIAL) == HUGE | WRITE | DIRTY | SPECIAL
    assert world.file.dirty == set(range(HUGE_PAGES))
    assert world.get(5) == DATA
    assert not world.entry(HVA + HPAGE_SIZE)


def test_a_store_makes_the_entry_writable_where_it_is_and_nobody_is_told(world: World) -> None:
    world.map()
    vcpu = world.guest()
    assert vcpu.load(7) == word(7)
    before = world.entry()
    assert not before & WRITE
    world.said()
    world.mm.write(HVA, DATA)
    assert pte_pfn(world.entry()) == pte_pfn(before)
    assert world.entry() & WRITE
    assert not world.said("mmu_notifier_invalidate_range_start", "pte_clear", "spte_zap")
    vcpu.store(7, b"guest...")
    assert world.said("spte_set_huge")[0]["rights"].count("w")
    assert world.get(7) == b"guest..."


def test_a_private_store_copies_a_page_and_the_file_stays(world: World) -> None:
    world.map(MAP_PRIVATE)
    assert world.mm.read(HVA, 8) == word(0)
    assert world.entry()
    world.mm.write(HVA + PAGE_SIZE, DATA)
    assert not world.entry()
    assert world.get(1) == word(1)
    assert world.mm.read(HVA + 2 * PAGE_SIZE, 8) == word(2)
    assert not world.file.dirty


# ---- written back


def test_write_back_is_one_range_an_area_and_takes_the_right_to_write(world: World) -> None:
    world.map()
    other = world.another()
    part = world.map(mm=other, addr=ELSEWHERE, pages=4, pgoff=2)
    vcpu = world.guest()
    vcpu.store(3, DATA)
    other.write(part, DATA)
    world.guest(other, part, 4).load(0)
    world.said()
    assert world.file.fsync() == HUGE_PAGES
    ranges = world.said("mmu_notifier_invalidate_range_start")
    assert [(each["mm"], each["start"], each["end"]) for each in ranges] == [
        ("mm0", HVA, HVA + HPAGE_SIZE),
        ("mm1", part, part + 4 * PAGE_SIZE),
    ]
    assert {each["event"] for each in ranges} == {"PROTECTION_PAGE"}
    assert not world.entry() & (WRITE | DIRTY)
    assert not other.pgd.get(part >> PAGE_SHIFT) & (WRITE | DIRTY)
    assert world.file.fsync() == 0


@pytest.mark.parametrize("who", ["process", "guest", "thread"])
def test_what_is_stored_after_it_is_dirty_again(world: World, who: str) -> None:
    world.map()
    vcpu, thread = world.guest(), HostThread(world.mm)
    stores: dict[str, Callable[[bytes], None]] = {
        "process": lambda data: world.mm.write(HVA + 9 * PAGE_SIZE, data),
        "guest": lambda data: vcpu.store(9, data),
        "thread": lambda data: thread.store(HVA + 9 * PAGE_SIZE, data),
    }
    store = stores[who]
    store(DATA)
    assert world.file.fsync() == HUGE_PAGES
    store(b"later...")
    assert world.get(9) == b"later..."
    assert world.file.fsync() == HUGE_PAGES


def test_msync_of_a_page_writes_back_what_its_entry_is_for(world: World) -> None:
    world.map()
    world.mm.write(HVA, DATA)
    world.mm.write(HVA + HPAGE_SIZE, DATA)
    world.mm.msync(HVA + 5 * PAGE_SIZE, PAGE_SIZE)
    assert world.file.dirty == set(range(HUGE_PAGES, 2 * HUGE_PAGES))


def test_a_small_store_into_a_huge_entry_dirties_all_of_it(world: World) -> None:
    world.map()
    world.mm.read(HVA, 1)
    other = world.another()
    part = world.map(mm=other, addr=ELSEWHERE, pages=1, pgoff=2)
    other.write(part, DATA)
    assert world.entry()
    assert world.mm.read(HVA + 2 * PAGE_SIZE, 8) == DATA
    assert world.file.fsync() == HUGE_PAGES
    assert not other.pgd.get(part >> PAGE_SHIFT) & WRITE


def test_a_store_waits_while_the_file_system_is_frozen(world: World) -> None:
    world.map()
    world.mm.write(HVA, DATA)
    world.volume.sb.freeze()
    assert not world.entry() & WRITE
    assert world.mm.read(HVA, 8) == DATA
    with pytest.raises(DeadlockError, match="frozen"):
        world.mm.write(HVA, b"not yet.")
    world.volume.sb.thaw()
    world.mm.write(HVA, b"now.....")
    assert world.get(0) == b"now....."


# ---- holes


def test_a_hole_is_the_huge_zero_page_also_to_a_guest(hole: World) -> None:
    hole.map()
    vcpu = hole.guest()
    assert vcpu.load(7) == HOLE
    assert pte_pfn(hole.entry()) == hole.mm.thp.zero_pfn != 0
    assert not hole.inode.blocks
    assert [each["pages"] for each in hole.said("spte_set_huge")] == [HUGE_PAGES]
    hole.mm.exit()
    hole.kvms.clear()
    assert not hole.mm.thp.zero_pfn


def test_all_see_what_is_written_into_a_hole(hole: World) -> None:
    """KVM, the GRU, an RDMA device and another process, which map it by huge entries."""
    hole.map()
    vcpu = hole.guest()
    gru = gru_of(hole.mm, hole.trace, hole.host)
    gru.set_memslot(0, 0, HUGE_PAGES, HVA)
    context = ScriptedVcpu(gru.port(0), hole.host, hole.trace, 1)
    gru.vcpus.append(context)
    umem = OdpUmem(hole.mm, HVA, HPAGE_SIZE, write=False)
    other = hole.another()
    hole.map(MAP_PRIVATE, PROT_READ, mm=other)
    views: list[Callable[[int], bytes]] = [
        vcpu.load,
        context.load,
        lambda page: umem.read(page, 8),
        lambda page: other.read(HVA + page * PAGE_SIZE, 8),
    ]
    for page in (3, 4):
        assert [view(page) for view in views] == [HOLE] * len(views)
    assert hole.entry(mm=other)
    hole.said()
    hole.put(3, DATA)
    kinds = [event.kind for event in hole.events]
    assert kinds.index("xip_allocate") < kinds.index("spte_zap") < kinds.index("xip_unmapped")
    cleared = hole.said("pte_clear")
    assert {(each["mm"], each["end"] - each["start"]) for each in cleared} == {("mm0", HPAGE_SIZE), ("mm1", HPAGE_SIZE)}
    assert [view(3) for view in views] == [DATA] * len(views)
    assert [view(4) for view in views] == [HOLE] * len(views)
    assert not hole.entry()
    umem.destroy()
    gru.destroy()


def test_a_store_into_a_hole_takes_one_piece_of_the_device(hole: World) -> None:
    hole.map()
    other = hole.another()
    hole.map(MAP_PRIVATE, PROT_READ, mm=other)
    vcpu = hole.guest(other)
    assert vcpu.load(3) == HOLE
    assert hole.mm.read(HVA, 8) == HOLE
    hole.mm.write(HVA + 3 * PAGE_SIZE, DATA)
    assert hole.entry() & WRITE
    assert len(hole.inode.blocks) == HUGE_PAGES
    assert vcpu.load(3) == DATA
    assert vcpu.load(4) == HOLE
    assert hole.entry(mm=other)
    assert pte_pfn(hole.entry(mm=other)) == pte_pfn(hole.entry())
    assert hole.file.fsync() == HUGE_PAGES


def test_without_such_a_piece_pages_of_a_hole_are_filled_one_by_one() -> None:
    hole = World(filled=False, blocks=HUGE_PAGES - 1)
    hole.map()
    vcpu = hole.guest()
    assert vcpu.load(3) == HOLE
    assert hole.entry()
    vcpu.store(3, DATA)
    assert hole.inode.blocks.keys() == {3}
    assert not hole.entry()
    assert (vcpu.load(3), vcpu.load(4)) == (DATA, HOLE)
    assert hole.file.fsync() == 1
    hole.close()


def test_without_memory_for_the_huge_zero_page_a_hole_is_mapped_by_small_entries() -> None:
    hole = World(filled=False, memory=MIB)
    hole.map()
    assert hole.mm.read(HVA + PAGE_SIZE, 8) == HOLE
    assert not hole.entry()
    assert not hole.file.huge
    hole.close()


def test_who_maps_a_page_of_a_huge_hole_takes_it_apart(hole: World) -> None:
    hole.map()
    vcpu = hole.guest()
    vcpu.load(3)
    other = hole.another()
    part = hole.map(mm=other, addr=ELSEWHERE, pages=1, pgoff=3)
    hole.said()
    assert other.read(part, 8) == HOLE
    (told,) = hole.said("mmu_notifier_invalidate_range_start")
    assert (told["start"], told["end"]) == (HVA, HVA + HPAGE_SIZE)
    assert not hole.entry()
    assert vcpu.load(4) == HOLE
    assert not hole.entry()  # where a page has an entry of its own, all have
    other.write(part, DATA)
    assert vcpu.load(3) == DATA


def test_a_hole_of_less_than_two_mebibytes_has_small_entries(world: World) -> None:
    world.file.punch_hole(3, 1)
    world.map()
    assert world.mm.read(HVA + 3 * PAGE_SIZE, 8) == HOLE
    world.mm.write(HVA, DATA)
    assert not world.entry()
    assert world.file.fsync() == 1


# ---- what is not huge


def test_small_entries_stay_as_they_are(world: World) -> None:
    other = world.another()
    other.read(world.map(mm=other, addr=ELSEWHERE, pages=1, pgoff=2), 8)
    world.map()
    world.mm.write(HVA, DATA)
    assert not world.entry()
    assert world.file.dirty == {0}
    world.file.truncate(0)
    world.file.truncate(2 * HPAGE_SIZE)
    assert world.mm.read(HVA, 8) == HOLE
    assert world.entry()


@pytest.mark.parametrize(
    ("addr", "pages", "pgoff"),
    [(HVA, HUGE_PAGES - 1, 0), (HVA, HUGE_PAGES, 1), (HVA + PAGE_SIZE, HUGE_PAGES, 0)],
    ids=["too short", "another part of the file", "not aligned"],
)
def test_an_area_that_does_not_fit_has_small_entries(world: World, addr: int, pages: int, pgoff: int) -> None:
    world.map(addr=addr, pages=pages, pgoff=pgoff)
    world.mm.write(addr, DATA)
    assert not world.entry(addr)
    assert world.file.fsync() == 1


def test_an_area_that_wants_none_has_small_entries(world: World) -> None:
    world.map()
    world.mm.madvise(HVA, HPAGE_SIZE, MADV_NOHUGEPAGE)
    world.mm.write(HVA, DATA)
    world.mm.write(HVA + HPAGE_SIZE, DATA)
    assert not world.entry()
    assert world.entry(HVA + HPAGE_SIZE)


def test_the_last_page_of_a_file_may_be_used_in_part(world: World) -> None:
    world.map()
    world.file.truncate(HPAGE_SIZE - 100)
    world.mm.write(HVA, DATA)
    assert world.entry() & WRITE
    world.file.truncate(HPAGE_SIZE - PAGE_SIZE)
    world.mm.write(HVA, DATA)
    assert not world.entry()


def test_in_2008_there_are_none() -> None:
    host, trace = HostMemory(10 * MIB), Trace()
    mm, volume = Mm(host, trace, protocol="2008"), RamVolume(host, HUGE_PAGES)
    file = DaxFile(host, trace, volume.file(HPAGE_SIZE))
    file.inode.create_huge(0)
    mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, addr=HVA, file=file)
    mm.read(HVA, 8)
    mm.write(HVA + PAGE_SIZE, DATA)
    assert not mm.pgd.huge(HVA >> PAGE_SHIFT)
    assert file.fsync() == 1
    mm.exit()
    volume.close()


# ---- a part of it


@pytest.mark.parametrize("filled", [True, False], ids=["blocks", "hole"])
@pytest.mark.parametrize("what", ["mprotect", "munmap", "madvise", "mremap"])
def test_who_changes_a_part_takes_all_of_it_away(what: str, filled: bool) -> None:
    world = World(filled=filled)
    world.map()
    vcpu = world.guest()
    expected = word if filled else lambda page: HOLE
    if filled:
        vcpu.store(0, word(0))
    else:
        vcpu.load(0)
    assert world.entry()
    world.said()
    at = HVA + 8 * PAGE_SIZE
    if what == "mprotect":
        world.mm.mprotect(at, PAGE_SIZE, PROT_READ)
    elif what == "munmap":
        world.mm.munmap(at, PAGE_SIZE)
    elif what == "madvise":
        world.mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    else:
        world.mm.mremap(at, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE)
        assert world.mm.read(ELSEWHERE, 8) == expected(8)
    ranges = world.said("mmu_notifier_invalidate_range_start")
    assert (HVA, HVA + HPAGE_SIZE, "CLEAR") in [(each["start"], each["end"], each["event"]) for each in ranges]
    assert [vcpu.load(page) for page in (0, 7, 9)] == [expected(page) for page in (0, 7, 9)]
    if filled:
        vcpu.store(9, DATA)
        assert world.get(9) == DATA
        assert world.file.fsync() == HUGE_PAGES
    else:
        world.put(8, DATA)
        if what == "mremap":
            assert world.mm.read(ELSEWHERE, 8) == DATA
    world.close()


def test_a_huge_hole_that_is_moved_is_still_one(hole: World) -> None:
    hole.map()
    hole.mm.read(HVA, 8)
    hole.mm.mremap(HVA, HPAGE_SIZE, HPAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE)
    assert hole.entry(ELSEWHERE)
    mappers = Mappers()
    mappers.feed(hole.events)
    assert [*map(str, mappers.of(hole.file.label)[HUGE_PAGES - 1])] == [
        f"mm0 at {ELSEWHERE + HPAGE_SIZE - PAGE_SIZE:#x} r-- 2 MiB"
    ]
    assert len(mappers.of(hole.file.label)) == HUGE_PAGES
    hole.put(3, DATA)
    assert hole.mm.read(ELSEWHERE + 3 * PAGE_SIZE, 8) == DATA


def test_a_child_sees_what_its_parent_stores(world: World) -> None:
    world.map()
    world.mm.write(HVA, DATA)
    child = world.mm.fork()
    world.mms.append(child)
    assert child.pgd.pmd_none(HVA >> PAGE_SHIFT)  # a fault will map it
    world.mm.write(HVA + PAGE_SIZE, b"parent..")
    assert child.read(HVA + PAGE_SIZE, 8) == b"parent.."
    assert world.file.fsync() == HUGE_PAGES
    child.write(HVA + 2 * PAGE_SIZE, b"child...")
    assert world.mm.read(HVA + 2 * PAGE_SIZE, 8) == b"child..."
    assert world.file.fsync() == HUGE_PAGES


def test_what_is_left_when_a_part_is_cut_off_is_still_dirty(world: World) -> None:
    world.map()
    vcpu = world.guest()
    vcpu.store(1, DATA)
    world.file.truncate(3 * PAGE_SIZE)
    assert world.file.dirty == {0, 1, 2}
    assert vcpu.load(1) == DATA
    assert world.file.fsync() == 3
    assert len(world.volume.free) == 3 * HUGE_PAGES - 3


def test_a_pinned_page_in_the_middle_is_not_freed(world: World) -> None:
    world.map()
    pfn = pin_user_page(world.mm, HVA + 9 * PAGE_SIZE, write=True)
    world.file.punch_hole(0, 4)
    with pytest.raises(DeadlockError, match="pinned"):
        world.file.punch_hole(4, 8)
    unpin_user_page(world.mm, pfn)
    world.file.punch_hole(4, 8)
    assert len(world.volume.free) == HUGE_PAGES + 12


# ---- a file of the host


def test_a_sparse_file_of_the_host_is_filled_two_mebibytes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 4 * MIB)
    host, trace = HostMemory(10 * MIB), Trace()
    inode = HostInode(host, str(path))
    file, mm = DaxFile(host, trace, inode), Mm(host, trace)
    mm.mmap(4 * MIB, RW, MAP_SHARED, addr=HVA, file=file)
    assert mm.read(HVA, 8) == HOLE
    assert mm.pgd.huge(HVA >> PAGE_SHIFT)
    assert path.stat().st_blocks == 0
    mm.write(HVA + HPAGE_SIZE + PAGE_SIZE, DATA)
    assert mm.pgd.huge((HVA + HPAGE_SIZE) >> PAGE_SHIFT) & WRITE
    assert path.stat().st_blocks * 512 >= HPAGE_SIZE
    assert file.fsync() == HUGE_PAGES
    mm.exit()
    inode.close()
    assert path.read_bytes()[HPAGE_SIZE + PAGE_SIZE :].startswith(DATA)
    assert path.stat().st_size == 4 * MIB


def test_a_write_behind_the_end_of_a_file_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")
    host, trace = HostMemory(10 * MIB), Trace()
    kinds: list[str] = []
    trace.attach(lambda event: kinds.append(event.kind))
    inode = HostInode(host, str(path))
    handle = OpenFile(DaxFile(host, trace, inode))
    handle.lseek(MIB)
    data = bytes(range(1, 251)) * 24_000  # 6 MB
    assert handle.put(data) == len(data)
    assert kinds.count("xip_allocate_huge") == 2
    inode.close()
    assert path.read_bytes() == b"first".ljust(MIB, b"\0") + data


# ---- judged

MAPPED = "xip_map", {"file": "file", "mm": "mm0", "start": HVA, "end": HVA + HPAGE_SIZE, "pgoff": 512}
ZEROS = "dax_entry_huge", {"file": "file", "pgoff": 512, "count": 512, "pfn": 0x200, "hole": True}
SHOWN = "pte_set", {"mm": "mm0", "hva": HVA, "pfn": 0x200, "flags": 1 | SPECIAL | HUGE}
FILLED = "xip_allocate", {"file": "file", "pgoff": 515, "pfn": 0x1000003}
UNMAPPED = "xip_unmapped", {"file": "file", "pgoff": 515}
WRITTEN = "spte_set", {"vm": "vm0", "gfn": 9, "pfn": 0x207, "rights": "rw"}
FREED = "xip_free", {"file": "file", "first": 515, "end": 516, "pages": [(0x1000203, 1)]}


@pytest.mark.parametrize(
    ("said", "invariant", "complaint"),
    [
        ([ZEROS, SHOWN, FILLED, UNMAPPED], "I16", "still maps the hole at 0x200000003000"),
        ([ZEROS, FILLED, SHOWN], "I16", "page 0x203 of file is mapped as a hole"),
        ([ZEROS, ("pte_set", {**SHOWN[1], "flags": 3 | SPECIAL | HUGE})], "I17", "an entry may write"),
        ([ZEROS, WRITTEN], "I17", "a secondary MMU may write"),
        ([FREED, ("pte_set", {**SHOWN[1], "pfn": 0x1000200})], "I5", "block 0x1000203 is mapped"),
    ],
)
def test_the_oracle_sees(said: list[tuple[str, dict[str, Any]]], invariant: str, complaint: str) -> None:
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    for kind, fields in (MAPPED, *said):
        trace.emit(kind, **fields)
    (violation,) = oracle.violations
    assert violation.invariant == invariant
    assert complaint in violation.message


def test_frames_of_the_huge_zero_page_are_others_when_it_is_gone() -> None:
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    free = "page_free", {"pages": [(0x200, 512)]}
    taken = "pte_set", {**SHOWN[1], "hva": ELSEWHERE, "flags": 3 | HUGE}
    for kind, fields in (MAPPED, ZEROS, free, taken):
        trace.emit(kind, **fields)
    assert not oracle.violations
