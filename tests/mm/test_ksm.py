"""KSM: what is announced, what is merged and what is not, writes to merged pages, and the way back."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.ksm import Ksm, ksm_of
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_MERGEABLE, MADV_UNMERGEABLE
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import EXCLUSIVE, WRITE, pte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
RW = 3
Steps = Callable[[], list[str]]


@pytest.fixture
def ksm(host: HostMemory, trace: Trace) -> Ksm:
    return ksm_of(host, trace)


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """6 mergeable pages: the first four are equal, the others differ."""
    start = mm.mmap(6 * PAGE, RW)
    for page, byte in enumerate(b"aaaabc"):
        mm.write(start + page * PAGE, bytes([byte]) * 8)
    mm.madvise(start, 6 * PAGE, MADV_MERGEABLE)
    steps()
    return start


def frames(mm: Mm, hva: int, count: int = 6) -> list[int]:
    return [pte_pfn(mm.pgd.get((hva >> 12) + page)) for page in range(count)]


def content(mm: Mm, hva: int, count: int = 6) -> bytes:
    return b"".join(mm.read(hva + page * PAGE, 1) for page in range(count))


def protected(page: int) -> list[str]:
    return [f"S CLEAR {page}-{page + 1}", "clear 1", "tlb", "set", "E"]


def test_the_order(mm: Mm, host: HostMemory, ksm: Ksm, area: int, steps: Steps) -> None:
    before = frames(mm, area)
    assert ksm.scan() == 0  # remembers
    assert steps() == []
    assert ksm.scan() == 3
    assert steps() == [
        *protected(1),  # becomes the shared page
        *protected(0),
        *protected(0),
        "free 1",
        *protected(2),
        *protected(2),
        "free 1",
        *protected(3),
        *protected(3),
        "free 1",
    ]
    assert frames(mm, area) == [before[1]] * 4 + before[4:]
    assert (ksm.pages_shared, ksm.pages_sharing) == (1, 3)
    assert (host.refcount(before[1]), host.mapcount(before[1])) == (4, 4)
    verify(host)
    assert content(mm, area) == b"aaaabc"
    assert ksm.scan() == 0


def test_a_write_copies(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    assert mm.ksm_scan() == 3
    steps()
    mm.write(area + 2 * PAGE, b"new")
    assert steps() == ["alloc", "S CLEAR 2-3", "clear 1", "tlb", "set", "E"]
    assert content(mm, area) == b"aanabc"
    verify(host)


def test_the_last_place_copies_too(mm: Mm, host: HostMemory, area: int) -> None:
    mm.ksm_scan()
    shared = frames(mm, area)[0]
    for page in range(4):
        mm.write(area + page * PAGE, b"n")
        assert frames(mm, area)[page] != shared
    assert host.refcount(shared) == 0
    assert content(mm, area) == b"nnnnbc"


def test_threads_and_get_user_pages_see_a_read_only_page(mm: Mm, area: int) -> None:
    thread = HostThread(mm)
    thread.store(area, b"a")
    mm.ksm_scan()
    assert not thread.tlb
    assert not mm.get_user_pages(area, write=False).writable
    thread.store(area, b"z")
    assert content(mm, area) == b"zaaabc"


def test_unmergeable_gives_every_place_its_own(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    mm.ksm_scan()
    steps()
    mm.madvise(area, 6 * PAGE, MADV_UNMERGEABLE)
    copies = [it for n in range(4) for it in ("alloc", f"S CLEAR {n}-{n + 1}", "clear 1", "tlb", "set", "E")]
    assert steps() == [*copies, "free 1"]
    assert len(set(frames(mm, area))) == 6
    assert content(mm, area) == b"aaaabc"
    for page in range(4):
        entry = mm.pgd.get((area >> 12) + page)
        assert entry & EXCLUSIVE
        assert not entry & WRITE
    steps()
    mm.write(area, b"x")  # no copy
    assert steps() == ["set"]
    assert mm.ksm_scan() == 0


def test_the_way_back_keeps_soft_dirty_bits(mm: Mm, area: int) -> None:
    mm.clear_refs(4)
    mm.write(area, b"a")
    mm.ksm_scan()
    mm.madvise(area, 6 * PAGE, MADV_UNMERGEABLE)
    assert mm.soft_dirty(area, area + 6 * PAGE) == [(area, area + PAGE)]


def test_scanning_stops_when_enough_is_shared(mm: Mm, area: int) -> None:
    assert mm.ksm_scan(until_sharing=1) >= 1
    assert mm.ksm_scan(until_sharing=1000) == 3  # and does not go on for ever


def test_pages_that_change_are_left_alone(mm: Mm, ksm: Ksm, area: int) -> None:
    for round in range(4):
        for page in range(6):
            mm.write(area + page * PAGE, bytes([round]))
        assert ksm.scan() == 0


def test_a_page_that_changes_before_it_is_protected(mm: Mm, host: HostMemory, ksm: Ksm, area: int) -> None:
    ksm.scan()

    scanned: list[str] = []

    def hook(label: str) -> None:
        if label == "ksm.scan":
            scanned.append(label)
            if len(scanned) == 3:
                mm.write(area + 2 * PAGE + 100, b"!")

    with on_point(hook):
        ksm.scan()
    assert mm.read(area + 2 * PAGE + 100, 1) == b"!"
    assert content(mm, area) == b"aaaabc"
    verify(host)


@pytest.mark.parametrize("when", range(12))
def test_the_other_page_goes_while_one_is_merged(when: int, mm: Mm, host: HostMemory, ksm: Ksm, area: int) -> None:
    ksm.scan()
    left = [when]

    def drop(label: str) -> None:
        left[0] -= 1
        if left[0] == -1:
            mm.madvise(area, PAGE, MADV_DONTNEED)

    with on_point(drop):
        ksm.scan()
    assert left[0] < 0
    verify(host)
    assert content(mm, area)[1:] == b"aaabc"


def test_a_held_page_is_not_merged(mm: Mm, host: HostMemory, ksm: Ksm, area: int, steps: Steps) -> None:
    """Whoever has it may write to it without an entry."""
    held = frames(mm, area)[1]
    host.get(held)
    entry = mm.pgd.get((area >> 12) + 1)
    ksm.scan()
    ksm.scan()
    assert frames(mm, area)[1] == held
    assert mm.pgd.get((area >> 12) + 1) == entry
    verify(host, held={held: 1})
    host.put(held)


def test_only_areas_that_allow_it(mm: Mm, area: int) -> None:
    other = mm.mmap(2 * PAGE, RW)
    mm.write(other, b"a" * 8)
    mm.ksm_scan()
    assert frames(mm, other, 1)[0] not in frames(mm, area)
    mm.madvise(area, 2 * PAGE, MADV_UNMERGEABLE)
    assert len(set(frames(mm, area, 3))) == 3


def test_shared_memory_is_left_as_it_is(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", 2 * PAGE)
    start = mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x" * 2 * PAGE)
    mm.madvise(start, 2 * PAGE, MADV_MERGEABLE)
    assert mm.ksm_scan() == 0
    mm.exit()
    file.close()


def test_private_copies_of_file_pages(mm: Mm, host: HostMemory, trace: Trace) -> None:
    file = ShmemFile(host, trace, "file", 3 * PAGE)
    start = mm.mmap(3 * PAGE, RW, MAP_PRIVATE, file=file)
    mm.write(start, b"x" * 2 * PAGE)
    mm.read(start + 2 * PAGE, 1)
    mm.madvise(start, 3 * PAGE, MADV_MERGEABLE)
    assert mm.ksm_scan() == 1
    verify(host)
    mm.exit()
    file.close()


def test_several_processes(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    other = Mm(host, trace, name="other")
    far = other.mmap(2 * PAGE, RW)
    other.write(far, b"a" * 8)
    other.madvise(far, PAGE, MADV_MERGEABLE)
    assert mm.ksm_scan() == 4
    assert frames(other, far, 1)[0] == frames(mm, area)[0]
    child = mm.fork()
    verify(host)
    mm.exit()
    other.write(far, b"other")
    assert content(child, area) == b"aaaabc"
    verify(host)


@pytest.mark.parametrize("last", [0, 1])
def test_forked_pages(mm: Mm, host: HostMemory, area: int, last: int) -> None:
    """Parent and child map the same frames before KSM comes."""
    child = mm.fork()
    mm.ksm_scan()
    verify(host)
    assert len(set(frames(mm, area, 4) + frames(child, area, 4))) == 1
    first, second = (mm, child) if last else (child, mm)
    first.write(area, b"x")
    first.exit()
    verify(host)
    assert content(second, area) == b"aaaabc"


def test_moves_and_holes(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    mm.ksm_scan()
    far = area + 512 * PAGE
    mm.mremap(area + PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, far)
    verify(host)
    mm.madvise(far, PAGE, MADV_DONTNEED)
    verify(host)
    shared = frames(mm, area, 1)[0]
    moved = migrate_page(host, trace, shared)
    verify(host)
    assert moved == frames(mm, area, 1)[0] == frames(mm, far, 2)[1] != shared
    assert mm.ksm_scan() == 2


def test_a_shared_page_that_is_gone_is_forgotten(mm: Mm, host: HostMemory, ksm: Ksm, area: int) -> None:
    mm.ksm_scan()
    mm.madvise(area, 4 * PAGE, MADV_DONTNEED)
    assert (ksm.pages_shared, ksm.pages_sharing) == (0, 0)
    for page in range(4):
        mm.write(area + page * PAGE, b"a" * 8)
    assert mm.ksm_scan() == 3
    verify(host)


def test_unmerging_without_frames(mm: Mm, host: HostMemory, area: int) -> None:
    mm.ksm_scan()
    taken = [host.alloc() for _ in range(host.free_frames - 1)]
    with pytest.raises(MmError) as error:
        mm.madvise(area, 6 * PAGE, MADV_UNMERGEABLE)
    assert error.value.errno == errno.ENOMEM
    assert content(mm, area) == b"aaaabc"
    for pfn in taken:
        host.put(pfn)


def test_every_merge_is_told(mm: Mm, area: int, events: list[Event]) -> None:
    mm.ksm_scan()
    merges = [event.fields for event in events if event.kind == "ksm_merge"]
    assert [((fields["hva"] - area) // PAGE, fields["old"] == fields["new"]) for fields in merges] == [
        (1, True),
        (0, False),
        (2, False),
        (3, False),
    ]
