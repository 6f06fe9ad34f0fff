"""Compound pages: allocation, counts, splitting, and huge entries of page tables over them."""

from __future__ import annotations

import pytest

from xipvm.errors import InternalError, OutOfFrames
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_DIRTY, POISON_FREE, HostMemory
from xipvm.mmu.pte import ANON, DIRTY, EXCLUSIVE, HUGE, PFN_SHIFT, PRESENT, WRITE
from xipvm.mmu.tables import Gather, PageTable

MAPPED = PRESENT | WRITE | ANON | EXCLUSIVE


@pytest.fixture
def host() -> HostMemory:
    return HostMemory(4 * HUGE_PAGES * 4096, poison="frame")


def mapped(host: HostMemory, table: PageTable, page: int) -> int:
    """A huge anonymous page at ``page``."""
    head = host.alloc_huge()
    host.add_entire_mapcount(head, 1)
    table.set(page, head << PFN_SHIFT | MAPPED | HUGE)
    return head


# ---- allocation


def test_compound_pages_are_aligned_and_what_was_skipped_is_used_first(host: HostMemory) -> None:
    assert host.alloc() == 1
    assert host.alloc_huge() == HUGE_PAGES
    assert [host.alloc() for _ in range(HUGE_PAGES - 2)] == list(range(2, HUGE_PAGES))
    assert host.alloc() == 2 * HUGE_PAGES
    assert host.free_frames == 2 * HUGE_PAGES - 1


def test_a_freed_compound_page_is_used_again_whole_or_frame_by_frame(host: HostMemory) -> None:
    first = host.alloc_huge()
    host.write(first + 7, 0, b"old")
    assert host.put_page(first + 3) == [(first, HUGE_PAGES)]
    assert host.read(first + 7, 0, 4) == bytes([POISON_FREE] * 4)
    assert host.alloc_huge() == first
    assert host.read(first + 7, 0, 4) == bytes(4)
    host.put(first)
    small = [host.alloc() for _ in range(HUGE_PAGES - 1)]  # what had been skipped
    assert max(small) < first
    assert [host.alloc() for _ in range(3)] == [first, first + 1, first + 2]


def test_a_block_is_put_together_from_freed_frames(host: HostMemory) -> None:
    frames = [host.alloc() for _ in range(host.free_frames)]
    for pfn in frames[2 * HUGE_PAGES - 1 : 3 * HUGE_PAGES]:  # the third block, and a frame too much
        host.put(pfn)
    assert host.alloc_huge() == 2 * HUGE_PAGES
    with pytest.raises(OutOfFrames):
        host.alloc_huge()
    assert host.alloc() == 3 * HUGE_PAGES
    assert host.free_frames == 0


def test_scattered_frames_are_no_block(host: HostMemory) -> None:
    frames = [host.alloc() for _ in range(host.free_frames)]
    for pfn in frames[::2]:
        host.put(pfn)
    assert host.free_frames > HUGE_PAGES
    with pytest.raises(OutOfFrames):
        host.alloc_huge()
    assert host.alloc() == frames[-1]


# ---- counts


def test_every_frame_speaks_for_the_page(host: HostMemory) -> None:
    head = host.alloc_huge()
    tail = head + 17
    host.set_flags(tail, PG_ANON)
    host.set_rmap(tail, 5, 1017)
    host.get(tail)
    assert host.flags(head) & PG_ANON
    assert host.refcount(head) == host.refcount(tail) == 2
    assert (host.mapping(head), host.index(head), host.index(tail + 1)) == (5, 1000, 1018)
    assert host.compound_head(tail) == head
    assert host.is_compound(tail)
    assert not host.put(head)
    assert host.put(tail)
    assert not host.is_compound(tail)


def test_mapcounts_of_the_page_and_of_its_frames(host: HostMemory) -> None:
    head = host.alloc_huge()
    host.add_entire_mapcount(head, 2)
    host.add_mapcount(head + 1, 1)
    assert [host.mapcount(head + i) for i in range(3)] == [2, 3, 2]
    assert (host.total_mapcount(head + 9), host.entire_mapcount(head + 9)) == (3, 2)
    host.get(head)
    host.split_mapping(head)
    assert [host.mapcount(head + i) for i in range(3)] == [2, 3, 2]
    assert host.total_mapcount(head) == 2 + HUGE_PAGES
    assert host.refcount(head) == 2 + HUGE_PAGES - 1
    with pytest.raises(InternalError):
        host.add_entire_mapcount(head, -2)
    with pytest.raises(InternalError):
        host.entire_mapcount(1)


def test_a_page_of_which_a_part_is_mapped(host: HostMemory) -> None:
    head = host.alloc_huge()
    host.add_entire_mapcount(head, 1)
    assert host.partially_mapped() == []
    host.split_mapping(head)
    assert host.partially_mapped() == []
    host.add_mapcount(head + 5, -1)
    assert host.partially_mapped() == [head]


@pytest.mark.parametrize("cached", [False, True])
def test_split_into_small_pages(host: HostMemory, cached: bool) -> None:
    head = host.alloc_huge()
    host.set_flags(head, PG_ANON | PG_DIRTY)
    host.set_rmap(head, 9, 100)
    for _ in range(HUGE_PAGES if cached else 0):
        host.get(head)
    host.split_compound(head + 1, cached)
    for i in (0, 1, HUGE_PAGES - 1):
        assert not host.is_compound(head + i)
        assert host.refcount(head + i) == 1 + cached
        assert (host.mapping(head + i), host.index(head + i)) == (9, 100 + i)
        assert host.flags(head + i) & (PG_ANON | PG_DIRTY) == PG_ANON | PG_DIRTY
    if not cached:
        assert host.put_page(head + 3) == [(head + 3, 1)]
        assert host.alloc() == head + 3


def test_a_page_in_use_is_not_split(host: HostMemory) -> None:
    head = host.alloc_huge()
    host.get(head)
    with pytest.raises(InternalError, match="refcount 2"):
        host.split_compound(head)
    host.put(head)
    host.add_entire_mapcount(head, 1)
    with pytest.raises(InternalError, match="mapcount 1"):
        host.split_compound(head)


# ---- huge entries


def test_gup_resolves_a_huge_entry(host: HostMemory) -> None:
    table = PageTable(4)
    head = mapped(host, table, 1024)
    page = table.gup(1024 + 33, True)
    assert page is not None
    assert page.pfn == head + 33
    assert table.huge(1024) & DIRTY
    assert table.pte(1024 + 33) >> PFN_SHIFT == head + 33
    assert table.pmd_none(1536)
    assert not table.pmd_none(1535)


def test_zap_takes_a_huge_entry_whole_or_not_at_all(host: HostMemory) -> None:
    table, gather = PageTable(4), Gather(host)
    head = mapped(host, table, 1024)
    for start, end in ((1024, 1535), (1025, 1536), (1100, 1101)):
        with pytest.raises(InternalError, match="split it first"):
            table.zap_mapped(start, end, gather)
        with pytest.raises(InternalError, match="split it first"):
            table.protect(start, end, PRESENT)
        with pytest.raises(InternalError, match="split it first"):
            table.copy_to(PageTable(4), start, end, host, True)
    assert table.zap_mapped(0, 4096, gather) == (1, [(head, HUGE_PAGES)])
    assert host.total_mapcount(head) == 0
    assert gather.count == 1
    assert gather.free_all() == [(head, HUGE_PAGES)]
    assert table.tables == 1


def test_split_entry_maps_the_same_frames(host: HostMemory) -> None:
    table, gather = PageTable(4), Gather(host)
    head = mapped(host, table, 1024)
    with pytest.raises(InternalError):
        table.split_huge(1024, 0)
    table.split_huge(1100, head << PFN_SHIFT | MAPPED)
    host.split_mapping(head)
    assert table.entries(1024, 1536) == [(1024 + i, (head + i) << PFN_SHIFT | MAPPED) for i in range(HUGE_PAGES)]
    assert (table.present, table.tables) == (HUGE_PAGES, 4)
    with pytest.raises(InternalError):
        table.split_huge(1100, head << PFN_SHIFT | MAPPED)
    assert table.zap_mapped(1024, 1534, gather) == (510, [(head, 510)])
    assert gather.free_all() == []
    assert host.refcount(head) == 2
    table.zap_mapped(1534, 1536, gather)
    assert gather.free_all() == [(head, HUGE_PAGES)]


def test_a_table_is_taken_away_and_put_back() -> None:
    table = PageTable(4)
    assert table.detach(1024) == []
    table.set(1030, 7 << PFN_SHIFT | PRESENT)
    entries = table.detach(1024)
    assert [i for i, entry in enumerate(entries) if entry] == [6]
    assert table.pmd_none(1024)
    assert (table.present, table.tables) == (0, 1)
    table.attach(1024, entries)
    assert table.entries(0, 4096) == [(1030, 7 << PFN_SHIFT | PRESENT)]
    with pytest.raises(InternalError):
        table.attach(1024, entries)
    table.attach(2048, [])
    assert table.pmd_none(2048)


def test_protect_and_fork_change_a_huge_entry_as_one(host: HostMemory) -> None:
    table, child = PageTable(4), PageTable(4)
    head = mapped(host, table, 1024)
    changed = table.copy_to(child, 0, 4096, host, True, True)
    assert changed == [(1024, 1536, PRESENT | ANON | HUGE)]
    assert child.huge(1024) == table.huge(1024) == head << PFN_SHIFT | PRESENT | ANON | HUGE
    assert (host.refcount(head), host.entire_mapcount(head)) == (2, 2)
    assert table.protect(1024, 1536, 0, 0, True) == (1, [(1024, 1536, ANON | HUGE)])
    assert table.clear_bits(1024, 1536, ANON) == 1


def test_a_huge_entry_of_a_file_is_left_to_faults_by_fork(host: HostMemory) -> None:
    table, child = PageTable(4), PageTable(4)
    head = host.alloc_huge()
    table.set(1024, head << PFN_SHIFT | PRESENT | HUGE)
    table.copy_to(child, 0, 4096, host, True)
    assert child.present == 0
    assert host.refcount(head) == 1
