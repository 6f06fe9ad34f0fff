"""Memslots: lookup by guest frame and by host address, and the errors of setting one."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xipvm.address import Gfn, Hva
from xipvm.errors import MmError
from xipvm.mmu.secondary.memslot import GFN_LIMIT, HVA_LIMIT, MAX_SLOTS, MEM_READONLY, MEM_ROMD, Memslot, Memslots

HVA = 0x7000_0000_0000


def slot(id: int, gfn: int, pages: int, hva: int = HVA, flags: int = 0) -> Memslot:
    return Memslot(id, Gfn(gfn), pages, Hva(hva), flags)


def slots(*them: Memslot) -> Memslots:
    result = Memslots()
    for each in them:
        assert result.check(each) is None
        result.insert(each)
    return result


def test_find_by_guest_frame() -> None:
    a, b, c = slot(5, 0x100, 0x10), slot(1, 0x110, 1), slot(2, 0x10, 4)
    memslots = slots(a, b, c)
    assert list(memslots) == [c, a, b]
    expected = {0xF: None, 0x10: c, 0x13: c, 0x14: None, 0xFF: None, 0x100: a, 0x10F: a, 0x110: b, 0x111: None}
    for gfn, want in [*expected.items(), *reversed(expected.items())]:
        assert memslots.find(gfn) is want, hex(gfn)


def test_the_cached_slot_is_forgotten_with_its_slot() -> None:
    memslots = slots(slot(1, 0, 4))
    assert memslots.find(2) is not None
    memslots.remove(1)
    assert memslots.find(2) is None
    moved = slot(2, 0x100, 4)
    memslots.insert(moved)
    assert memslots.find(0x102) is moved
    memslots.insert(slot(2, 0x200, 4))
    assert memslots.find(0x102) is None
    assert len(memslots) == 1


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (HVA - 0x1000, HVA, []),
        (HVA + 0x4000, HVA + 0x5000, []),
        (HVA - 0x1000, HVA + 1, [(0x10, 0x11)]),
        (HVA, HVA + 0x1000, [(0x10, 0x11)]),
        (HVA + 0x1800, HVA + 0x1801, [(0x11, 0x12)]),
        (HVA + 0xFFF, HVA + 0x1001, [(0x10, 0x12)]),
        (HVA + 0x3000, HVA + 0x9000, [(0x13, 0x14)]),
        (0, (1 << 64) - 1, [(0x10, 0x14)]),
    ],
)
def test_guest_frames_of_a_host_range(start: int, end: int, expected: list[tuple[int, int]]) -> None:
    """Parts of a page count as the page; the range is cut to the slot."""
    assert slots(slot(0, 0x10, 4)).in_hva_range(start, end) == expected


def test_one_host_range_in_several_slots() -> None:
    memslots = slots(slot(0, 0x10, 4), slot(1, 0x80, 8, HVA - 0x2000), slot(2, 0x100, 1, HVA + 0x10000))
    assert memslots.in_hva_range(HVA + 0x1000, HVA + 0x2000) == [(0x11, 0x12), (0x83, 0x84)]


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (slot(1, 0x20, 0), errno.EINVAL),
        (slot(1, 0x20, -1), errno.EINVAL),
        (slot(1, 0x20, 4, HVA + 0x800), errno.EINVAL),
        (slot(1, 0x20, 4, HVA_LIMIT - 0x3000), errno.EINVAL),
        (slot(1, 0x20, 4, -0x1000), errno.EINVAL),
        (slot(1, GFN_LIMIT - 3, 4), errno.EINVAL),
        (slot(1, -1, 4), errno.EINVAL),
        (slot(1, 0x20, 4, HVA, 1 << 5), errno.EINVAL),
        (slot(-1, 0x20, 4), errno.EINVAL),
        (slot(MAX_SLOTS, 0x20, 4), errno.EINVAL),
        (slot(1, 0x13, 4), errno.EEXIST),
        (slot(1, 0xF, 2), errno.EEXIST),
        (slot(1, 0xF, 100), errno.EEXIST),
        (slot(1, 0x11, 1), errno.EEXIST),
        (slot(0, 0x10, 5), errno.EINVAL),
        (slot(0, 0x10, 4, HVA + 0x1000), errno.EINVAL),
        (slot(0, 0x10, 4, HVA, MEM_READONLY), errno.EINVAL),
    ],
)
def test_errors(new: Memslot, error: int) -> None:
    memslots = slots(slot(0, 0x10, 4))
    with pytest.raises(MmError) as caught:
        memslots.check(new)
    assert caught.value.errno == error
    assert len(memslots) == 1


@pytest.mark.parametrize(
    "new", [slot(1, 0xC, 4), slot(1, 0x14, 4), slot(1, GFN_LIMIT - 4, 4), slot(1, 0x20, 4, HVA_LIMIT - 0x4000)]
)
def test_the_limits_themselves_are_allowed(new: Memslot) -> None:
    assert slots(slot(0, 0x10, 4)).check(new) is None


def test_a_slot_may_move_onto_its_own_frames() -> None:
    old = slot(0, 0x10, 4)
    assert slots(old).check(slot(0, 0x12, 4)) is old


@pytest.mark.parametrize(("flags", "readonly", "romd"), [(0, 0, 0), (MEM_READONLY, 1, 0), (MEM_ROMD, 1, 1)])
def test_flags(flags: int, readonly: bool, romd: bool) -> None:
    assert (slot(0, 0, 1, HVA, flags).readonly, slot(0, 0, 1, HVA, flags).romd) == (readonly, romd)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(0, 40), st.booleans()), max_size=12),
    st.lists(st.integers(0, 80), max_size=20),
    st.integers(0, 200),
    st.integers(1, 200),
)
def test_lookups_agree_with_a_search_of_all_slots(
    them: list[tuple[int, int, int, bool]], gfns: list[int], start: int, length: int
) -> None:
    memslots = Memslots()
    for id, (gfn, pages, hva, remove) in enumerate(them):
        new = slot(id, gfn, pages, hva << 12)
        try:
            memslots.check(new)
        except MmError:
            assert any(s.gfn < new.gfn_end and new.gfn < s.gfn_end for s in memslots)
            continue
        memslots.insert(new)
        memslots.find(gfn)
        if remove:
            memslots.remove(id)
    for gfn in gfns:
        assert memslots.find(gfn) is next((s for s in memslots if s.gfn <= gfn < s.gfn_end), None)
    shown = {
        g for first, last in memslots.in_hva_range(start << 10, (start + length) << 10) for g in range(first, last)
    }
    assert shown == {
        g
        for s in memslots
        for g in range(s.gfn, s.gfn_end)
        if s.hva_of(Gfn(g)) < (start + length) << 10 and start << 10 < s.hva_of(Gfn(g)) + 4096
    }
