"""hmm_range_fault: what it returns, in both modes; and that nothing is held."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator

import pytest

from tests.hmm.world import RW, World
from xipvm.actors import on_point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError, ProtocolUnsupported
from xipvm.mmu.device_file import DeviceFile
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.hmm import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_GUARD_INSTALL, MADV_HUGEPAGE
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.vma import MAP_PRIVATE, PROT_NONE, PROT_READ
from xipvm.notifier import MmuIntervalNotifier

FAULT = HMM_PFN_REQ_FAULT
WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
PAGES = 8
range_of_tries = range(PAGES + 1)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


@pytest.fixture
def notifier(world: World) -> Iterator[MmuIntervalNotifier]:
    made = MmuIntervalNotifier()
    world.mm.notifiers.insert_interval(made, 0, 1 << 47)
    yield made
    world.mm.notifiers.remove_interval(made)


def look(world: World, notifier: MmuIntervalNotifier, hva: int, pages: int, flags: int = 0, **how: object) -> list[int]:
    range = HmmRange(world.mm, notifier, hva, hva + pages * PAGE_SIZE, default_flags=flags, **how)  # type: ignore[arg-type]
    for _ in range_of_tries:
        range.notifier_seq = notifier.read_begin()
        try:
            hmm_range_fault(range)
        except MmError as error:
            if error.errno != errno.EBUSY:  # by a page that it had copied itself
                raise
        else:
            return range.hmm_pfns
    raise AssertionError("it collides with itself for ever")


def code(world: World, notifier: MmuIntervalNotifier, hva: int, pages: int, flags: int) -> int:
    with pytest.raises(MmError) as caught:
        look(world, notifier, hva, pages, flags)
    return caught.value.errno


def test_a_snapshot_faults_nothing_in(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(PAGES)
    world.mm.write(hva, b"x")
    assert world.mm.read(hva + PAGE_SIZE, 1) == b"\0"
    words = look(world, notifier, hva, PAGES)
    assert words[0] == world.mm.get_user_pages(hva, write=False).pfn | HMM_PFN_VALID | HMM_PFN_WRITE
    assert words[1] == ZERO_PFN | HMM_PFN_VALID
    assert words[2:] == [0] * (PAGES - 2)
    assert world.mm.pgd.present == 2


def test_what_is_wanted_is_faulted_in(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(PAGES)
    words = look(world, notifier, hva, PAGES, FAULT)
    assert words == [ZERO_PFN | HMM_PFN_VALID] * PAGES
    words = look(world, notifier, hva, PAGES, WRITE)
    assert all(word & HMM_PFN_WRITE for word in words)
    assert len({hmm_pfn_to_pfn(word) for word in words}) == PAGES
    assert {world.host.refcount(hmm_pfn_to_pfn(word)) for word in words} == {1}


def test_pages_may_be_wanted_one_by_one(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(4)
    words = look(world, notifier, hva, 4, requests=[0, FAULT, WRITE, WRITE], pfn_flags_mask=HMM_PFN_REQ_FAULT)
    assert words == [0, *[ZERO_PFN | HMM_PFN_VALID] * 3]  # the mask leaves nothing of the wish to write
    words = look(world, notifier, hva, 4, requests=[0, FAULT, WRITE, 0], pfn_flags_mask=WRITE)
    assert [bool(word & HMM_PFN_WRITE) for word in words] == [False, False, True, False]


def test_a_collision_is_busy(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(PAGES)
    range = HmmRange(world.mm, notifier, hva, hva + PAGE_SIZE, default_flags=FAULT)
    range.notifier_seq = notifier.read_begin()
    world.mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
    with pytest.raises(MmError) as caught:
        hmm_range_fault(range)
    assert caught.value.errno == errno.EBUSY


def test_a_collision_inside_a_fault_is_busy(world: World, notifier: MmuIntervalNotifier) -> None:
    hva, other = world.map(PAGES), world.map(1)
    seen: list[str] = []

    def invalidate(label: str) -> None:
        seen.append(label)
        if len(seen) == 1:
            world.mm.madvise(other, PAGE_SIZE, MADV_DONTNEED)

    range = HmmRange(world.mm, notifier, hva, hva + PAGE_SIZE, default_flags=FAULT)
    range.notifier_seq = notifier.read_begin()
    with on_point(invalidate), pytest.raises(MmError) as caught:
        hmm_range_fault(range)
    assert caught.value.errno == errno.EBUSY


def test_no_area_is_an_error_only_where_something_is_wanted(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(3)
    world.mm.munmap(hva + PAGE_SIZE, PAGE_SIZE)
    assert look(world, notifier, hva, 3) == [0, HMM_PFN_ERROR, 0]
    assert code(world, notifier, hva, 3, FAULT) == errno.EFAULT
    words = look(world, notifier, hva, 3, requests=[FAULT, 0, FAULT], pfn_flags_mask=FAULT)
    assert words == [ZERO_PFN | HMM_PFN_VALID, HMM_PFN_ERROR, ZERO_PFN | HMM_PFN_VALID]


def test_prot_none(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(2)
    world.mm.write(hva, b"x")
    world.mm.mprotect(hva, PAGE_SIZE, PROT_NONE)
    assert look(world, notifier, hva, 2) == [HMM_PFN_ERROR, 0]
    assert code(world, notifier, hva, 2, FAULT) == errno.EFAULT


def test_a_write_where_none_is_allowed(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(1, PROT_READ)
    assert look(world, notifier, hva, 1, FAULT) == [ZERO_PFN | HMM_PFN_VALID]
    assert code(world, notifier, hva, 1, WRITE) == errno.EPERM
    world.mm.mprotect(hva, PAGE_SIZE, RW)
    assert look(world, notifier, hva, 1, WRITE)[0] & HMM_PFN_WRITE


def test_no_frame(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(1)
    taken = [world.host.alloc() for _ in range(world.host.free_frames)]
    assert code(world, notifier, hva, 1, WRITE) == errno.ENOMEM
    for pfn in taken:
        world.host.put(pfn)


def test_a_guard_is_a_fault(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(2)
    world.mm.madvise(hva, PAGE_SIZE, MADV_GUARD_INSTALL)
    assert look(world, notifier, hva, 2) == [0, 0]
    assert code(world, notifier, hva, 2, FAULT) == errno.EFAULT


def test_what_is_in_swap(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(1)
    world.mm.swapon(8)
    world.mm.write(hva, b"x")
    pageout(world.mm, hva, hva + PAGE_SIZE)
    assert look(world, notifier, hva, 1) == [0]
    pfn = hmm_pfn_to_pfn(look(world, notifier, hva, 1, FAULT)[0])
    assert world.host.read(pfn, 0, 1) == b"x"
    world.mm.munmap(hva, PAGE_SIZE)


def test_a_huge_page_says_so(world: World, notifier: MmuIntervalNotifier) -> None:
    size = 2 << 20
    hva = -(-world.map(2 * size >> PAGE_SHIFT) // size) * size
    world.mm.madvise(hva, size, MADV_HUGEPAGE)
    world.mm.write(hva, b"x")
    words = look(world, notifier, hva, size >> PAGE_SHIFT)
    assert {hmm_pfn_to_map_order(word) for word in words} == {9}
    first = hmm_pfn_to_pfn(words[0])
    assert [hmm_pfn_to_pfn(word) for word in words] == list(range(first, first + 512))
    world.mm.mprotect(hva, PAGE_SIZE, PROT_READ)  # splits it
    words = look(world, notifier, hva, size >> PAGE_SHIFT)
    assert {hmm_pfn_to_map_order(word) for word in words} == {0}
    assert [bool(word & HMM_PFN_WRITE) for word in words[:2]] == [False, True]


def test_frames_without_references(world: World, notifier: MmuIntervalNotifier) -> None:
    memory = mmap.mmap(-1, PAGE_SIZE)
    view = (ctypes.c_char * PAGE_SIZE).from_buffer(memory)
    first = world.host.add_device(ctypes.addressof(view), PAGE_SIZE, view)
    file = DeviceFile(world.host, world.trace, "flash", first, 1)
    hva = world.map(1, PROT_READ, MAP_PRIVATE, file=file)
    world.mm.read(hva, 1)
    assert look(world, notifier, hva, 1) == [HMM_PFN_ERROR]
    assert code(world, notifier, hva, 1, FAULT) == errno.EFAULT
    world.mm.munmap(hva, PAGE_SIZE)
    world.host.remove_device(first)


def test_after_the_end(world: World, notifier: MmuIntervalNotifier) -> None:
    hva = world.map(1)
    world.mm.exit()
    assert code(world, notifier, hva, 1, FAULT) == errno.EFAULT


@pytest.mark.parametrize(("start", "end"), [(0, 0), (4096, 0), (1, 4096), (0, 100), (-4096, 0)])
def test_a_range_of_whole_pages(world: World, notifier: MmuIntervalNotifier, start: int, end: int) -> None:
    with pytest.raises(MmError, match="EINVAL"):
        HmmRange(world.mm, notifier, start, end)


def test_2008_has_no_such_thing(world: World, notifier: MmuIntervalNotifier) -> None:
    old = Mm(world.host, world.trace, name="old", protocol="2008")
    with pytest.raises(ProtocolUnsupported):
        hmm_range_fault(HmmRange(old, notifier, 0, PAGE_SIZE))
    old.exit()
