"""Page tables: entries at both levels, tables freed when empty, zaps as runs, against a dict."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.errors import InternalError
from xipvm.mmu.frames import PG_DIRTY, PG_REFERENCED, HostMemory
from xipvm.mmu.tables import Gather, PageTable

PRESENT, WRITE, SPECIAL, ACCESSED, DIRTY, HUGE, ANON = 1, 2, 8, 1 << 5, 1 << 6, 1 << 7, 1 << 9
TOP = (1 << 36) - 1


def entry(pfn: int, bits: int = PRESENT) -> int:
    return pfn << 12 | bits


def test_get_set_and_old_value() -> None:
    table = PageTable(4)
    assert table.get(TOP) == 0
    assert table.set(TOP, entry(5)) == 0
    assert table.set(TOP, entry(6)) == entry(5)
    assert table.get(TOP) == entry(6)
    assert (table.present, table.tables) == (1, 4)
    assert table.set(TOP, 0) == entry(6)
    assert (table.present, table.tables) == (0, 1)


def test_clearing_what_is_empty_allocates_nothing() -> None:
    table = PageTable(3)
    assert table.set(12345, 0) == 0
    assert table.tables == 1


def test_cmpxchg() -> None:
    table = PageTable(3)
    table.set(7, entry(1))
    assert not table.cmpxchg(7, entry(2), entry(3))
    assert table.get(7) == entry(1)
    assert table.cmpxchg(7, entry(1), entry(3))
    assert table.cmpxchg(8, 0, entry(4))
    assert (table.get(7), table.get(8)) == (entry(3), entry(4))


@pytest.mark.parametrize(("levels", "bits"), [(3, 27), (4, 36)])
def test_pages_outside(levels: int, bits: int) -> None:
    table = PageTable(levels)
    table.set((1 << bits) - 1, entry(1))
    assert table.get(1 << bits) == 0
    with pytest.raises(IndexError):
        table.set(1 << bits, entry(1))
    for start, end in ((0, (1 << bits) + 1), (5, 4)):
        with pytest.raises(IndexError):
            table.zap(start, end)


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="levels"):
        PageTable(5)


def test_huge_entry_covers_512_pages() -> None:
    table = PageTable(3)
    table.set(1024, entry(2048, PRESENT | HUGE))
    assert table.get(1024) == table.get(1535) == entry(2048, PRESENT | HUGE)
    assert table.get(1536) == 0
    assert (table.present, table.tables) == (1, 2)
    assert table.entries(1100, 1101) == [(1024, entry(2048, PRESENT | HUGE))]
    assert table.next_present(1100, 2000) == 1100
    with pytest.raises(InternalError):
        table.set(1030, entry(1))
    with pytest.raises(InternalError):
        table.set(1025, entry(1, PRESENT | HUGE))
    with pytest.raises(InternalError):
        table.set(1030, 0)
    assert table.zap(1534, 1540) == [(2048, 512)]
    assert (table.present, table.tables) == (0, 1)
    table.set(1024, entry(2048, PRESENT | HUGE))
    assert table.set(1024, 0) == entry(2048, PRESENT | HUGE)
    assert table.tables == 1


def test_huge_entry_does_not_replace_small_ones() -> None:
    table = PageTable(3)
    table.set(1030, entry(1))
    with pytest.raises(InternalError):
        table.set(1024, entry(2048, PRESENT | HUGE))
    table.set(1030, 0)
    table.set(1024, entry(2048, PRESENT | HUGE))
    assert table.get(1030) == entry(2048, PRESENT | HUGE)


def test_zap_gives_runs_in_either_direction() -> None:
    table = PageTable(3)
    for page, pfn in enumerate([10, 11, 12, 30, 29, 28, 5]):
        table.set(page * 700, entry(pfn))
    assert table.zap(0, 1 << 27) == [(10, 3), (28, 3), (5, 1)]
    assert (table.present, table.tables) == (0, 1)


def test_zap_is_half_open_and_mmio_entries_have_no_pfn() -> None:
    table = PageTable(3)
    for page in range(510, 516):
        table.set(page, entry(page))
    table.set(600, 1 << 62)
    assert table.zap(511, 514) == [(511, 3)]
    assert [page for page, _ in table.entries(0, 599)] == [510, 514, 515]
    assert table.zap(600, 601) == []
    assert table.get(600) == 0


def test_bits_of_a_range() -> None:
    table = PageTable(4)
    for page in (1, 2, 513, 5000):
        table.set(page, entry(page, PRESENT | WRITE))
    table.set(3, entry(3))
    assert table.clear_bits(0, 5000, WRITE) == 3
    assert table.get(5000) == entry(5000, PRESENT | WRITE)
    assert table.set_bits(0, 100, DIRTY, where=WRITE) == 0
    assert table.set_bits(0, 1 << 36, DIRTY, where=WRITE) == 1
    assert table.change_bits(1, 3, PRESENT, ACCESSED) == 2
    assert table.get(2) == entry(2, ACCESSED)
    assert table.present == 5


def test_table_view_is_shared() -> None:
    table = PageTable(4)
    assert table.table_view(1000) is None
    table.set(1000, entry(9))
    view = table.table_view(1000)
    assert view is not None
    assert view.shape == (512,)
    assert view[1000 % 512] == entry(9)


def test_zap_mapped_moves_frames_to_the_gather() -> None:
    host = HostMemory(64 * 4096)
    table = PageTable(4)
    frames = [host.alloc() for _ in range(6)]
    for page, pfn in enumerate(frames):
        host.add_mapcount(pfn, 1)
        table.set(page, entry(pfn, PRESENT | DIRTY | ACCESSED | (ANON if page < 3 else 0)))
    table.set(6, entry(0, PRESENT | SPECIAL))
    host.get(frames[4])
    gather = Gather(host)
    assert table.zap_mapped(0, 10, gather, keep_anon=True) == (4, [(4, 3), (0, 1)])
    assert gather.pages() == frames[3:]
    assert table.zap_mapped(0, 10, gather, runs=False) == (3, [])
    assert gather.count == 6
    assert [host.mapcount(pfn) for pfn in frames] == [0] * 6
    assert [bool(host.flags(pfn) & PG_DIRTY) for pfn in frames] == [False] * 3 + [True] * 3
    assert [bool(host.flags(pfn) & PG_REFERENCED) for pfn in frames] == [False] * 3 + [True] * 3
    assert [host.refcount(pfn) for pfn in frames] == [1, 1, 1, 1, 2, 1]
    freed = gather.free_all()
    assert sorted(pfn for first, count in freed for pfn in range(first, first + count)) == [1, 2, 3, 4, 6]
    assert gather.count == 0
    assert [host.refcount(pfn) for pfn in frames] == [0, 0, 0, 0, 1, 0]


def test_gather_frees_so_that_frames_come_back_in_order() -> None:
    host = HostMemory(64 * 4096)
    gather = Gather(host)
    frames = [host.alloc() for _ in range(8)]
    for pfn in frames:
        gather.add_page(pfn)
    assert gather.free_all() == [(1, 8)]
    assert [host.alloc() for _ in range(8)] == frames


def test_gather_refuses_what_is_not_counted() -> None:
    host = HostMemory(64 * 4096)
    gather = Gather(host)
    with pytest.raises(InternalError):
        gather.add_page(64)
    gather.add_page(host.alloc())
    gather.add_page(1)
    with pytest.raises(InternalError):
        gather.free_all()


pages = st.one_of(st.integers(0, 1200), st.integers(0, (1 << 27) - 1))
ops = st.lists(
    st.one_of(
        st.tuples(st.just("set"), pages, st.integers(1, 1 << 30)),
        st.tuples(st.just("clear"), pages, st.just(0)),
        st.tuples(st.just("zap"), pages, st.integers(0, 1500)),
    ),
    max_size=60,
)


@given(ops)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_like_a_dict(sequence: list[tuple[str, int, int]]) -> None:
    table = PageTable(3)
    model: dict[int, int] = {}
    for verb, page, argument in sequence:
        if verb == "set":
            value = entry(argument)
            assert table.set(page, value) == model.get(page, 0)
            model[page] = value
        elif verb == "clear":
            assert table.set(page, 0) == model.pop(page, 0)
        else:
            end = min(page + argument, 1 << 27)
            gone = [p for p in model if page <= p < end]
            assert sum(count for _, count in table.zap(page, end)) == len(gone)
            for p in gone:
                del model[p]
            assert table.next_present(page, end) == -1
        assert table.entries(0, 1 << 27) == sorted(model.items())
        assert table.present == len(model)
        assert table.tables == 1 + len({p >> 9 for p in model}) + len({p >> 18 for p in model})
        assert table.next_present(0, 1 << 27) == min(model, default=-1)


@given(
    st.lists(
        st.tuples(st.integers(0, 259), st.sampled_from([b"\0", b"\x01", b"\x80", b"\xff", b"\xff" * 16])), max_size=30
    ),
    st.integers(0, 70),
    st.integers(1, 260),
    st.sets(st.integers(3584, 5700), max_size=40),
    st.sampled_from([2, 4, 6, 0]),
)
def test_clear_bits_of_a_bitmap(
    pattern: list[tuple[int, bytes]], shift: int, size: int, odd: set[int], mask: int
) -> None:
    """As clear_bits of each page whose bit is set: tables are full, or have gaps, or are none; huge ones as a whole."""
    bitmap = bytearray(size)
    for at, value in pattern:
        bitmap[at : at + len(value)] = value
    del bitmap[size:]
    one, other = PageTable(3), PageTable(3)
    for table in (one, other):
        for page in (*range(3584, 4608), *range(5120, 5632)):
            if page % 5 or page not in odd:
                table.set(page, page << 12 | (1 + page % 4 * 2 if page in odd else 7))
        table.set(4608, 9 << 21 | 0x87)
    first = 4000 + shift
    changed = one.clear_bits_of(first, bytes(bitmap), mask, 1)
    expected = sum(
        other.clear_bits(first + bit, first + bit + 1, mask, 1)
        for bit in range(8 * len(bitmap))
        if bitmap[bit >> 3] >> (bit & 7) & 1
    )
    assert changed == expected
    assert one.entries(0, 1 << 27) == other.entries(0, 1 << 27)
