"""The dirty log with manual protection: reading forgets nothing, clearing names what; and the sizes of entries."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE
from xipvm.mmu.secondary.base import READ, WRITE
from xipvm.mmu.secondary.kvm_dirty import INITIALLY_SET, MANUAL_PROTECT_ENABLE, dirty_runs
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_PRESENT

PAGE = 4096
GFN = 0x100
PAGES = 200


def logged(log: bytes) -> list[int]:
    return [page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1]


def bits(*pages: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(PAGES // 8 + 8, "little")


def start(world: Any, flags: int, pages: int = PAGES) -> int:
    """A slot whose pages the guest has all written; then logging begins."""
    world.kvm.enable_manual_dirty_log_protect(flags)
    hva: int = world.slot(pages, GFN)
    for page in range(pages):
        world.write(GFN + page, b"old")
    world.kvm.set_memslot(0, GFN, pages, hva, MEM_LOG_DIRTY_PAGES)
    return hva


@given(st.binary(max_size=40), st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12))))
def test_runs_of_a_bitmap(data: bytes, ones: list[tuple[int, int]]) -> None:
    bitmap = bytearray(data + bytes(40 - len(data)))
    for at, count in ones:
        bitmap[at : at + count] = b"\xff" * len(bitmap[at : at + count])
    runs = list(dirty_runs(bytes(bitmap)))
    assert [page for first, count in runs for page in range(first, first + count)] == logged(bytes(bitmap))
    assert all(first + count < following for (first, count), (following, _) in pairwise(runs))


def test_reading_forgets_nothing_and_takes_nothing(world: Any) -> None:
    start(world, MANUAL_PROTECT_ENABLE)
    world.write(GFN + 4, b"new")
    del world.log[:]
    assert logged(world.kvm.get_dirty_log(0)) == [4]
    assert logged(world.kvm.get_dirty_log(0)) == [4]
    assert world.kvm.translate(GFN + 4)[1]
    assert world.log == []


def test_clearing_takes_what_it_names(world: Any) -> None:
    start(world, MANUAL_PROTECT_ENABLE)
    for page in (4, 5, 70, 199):
        world.write(GFN + page, b"new")
    del world.log[:]
    world.kvm.clear_dirty_log(0, 0, 128, bits(4, 9, 70))
    assert world.log == ["vcpu0 flush dirty_log"]
    assert logged(world.kvm.get_dirty_log(0)) == [5, 199]
    assert [world.kvm.translate(GFN + page)[1] for page in (4, 5, 70, 199)] == [False, True, False, True]
    del world.log[:]
    world.kvm.clear_dirty_log(0, 64, PAGES - 64, bits(0, 1, 199 - 64))
    assert logged(world.kvm.get_dirty_log(0)) == [5]
    world.write(GFN + 4, b"again")
    assert logged(world.kvm.get_dirty_log(0)) == [4, 5]


def test_clearing_what_is_clean_flushes_nothing(world: Any) -> None:
    start(world, MANUAL_PROTECT_ENABLE)
    world.write(GFN + 70, b"new")
    del world.log[:]
    world.kvm.clear_dirty_log(0, 0, 64, bits(*range(64)))
    world.kvm.clear_dirty_log(0, 64, 64, bits(5))
    world.kvm.clear_dirty_log(0, 64, 0, b"")
    assert world.log == []
    assert world.kvm.translate(GFN + 70)[1]


@pytest.mark.parametrize(
    ("slot", "first", "count", "error"),
    [
        (7, 0, 64, errno.EINVAL),
        (1, 0, 4, errno.ENOENT),
        (0, 1, 64, errno.EINVAL),
        (0, 63, 64, errno.EINVAL),
        (0, -64, 64, errno.EINVAL),
        (0, 256, 0, errno.EINVAL),
        (0, 128, 73, errno.EINVAL),
        (0, 0, 201, errno.EINVAL),
        (0, 0, -64, errno.EINVAL),
        (0, 0, 63, errno.EINVAL),
        (0, 64, 130, errno.EINVAL),
        (0, 128, 72, 0),
        (0, 0, 200, 0),
        (0, 0, 192, 0),
        (0, 192, 8, 0),
    ],
)
def test_what_may_be_cleared(world: Any, slot: int, first: int, count: int, error: int) -> None:
    start(world, MANUAL_PROTECT_ENABLE)
    world.slot(4, 0x800, slot=1)
    if not error:
        world.kvm.clear_dirty_log(slot, first, count, bits(0))
        return
    with pytest.raises(MmError) as caught:
        world.kvm.clear_dirty_log(slot, first, count, bits(0))
    assert caught.value.errno == error


def test_modes(world: Any) -> None:
    for flags in (INITIALLY_SET, 4, 7):
        with pytest.raises(MmError) as caught:
            world.kvm.enable_manual_dirty_log_protect(flags)
        assert caught.value.errno == errno.EINVAL
    start(world, MANUAL_PROTECT_ENABLE)
    world.write(GFN, b"new")
    world.kvm.enable_manual_dirty_log_protect(0)
    assert logged(world.kvm.get_dirty_log(0)) == [0]
    assert logged(world.kvm.get_dirty_log(0)) == []


def test_initially_all_set(world: Any) -> None:
    """A new log names every page, and nothing is protected: the first clearing does that."""
    del world.log[:]
    start(world, MANUAL_PROTECT_ENABLE | INITIALLY_SET)
    assert "vcpu0 flush dirty_log" not in world.log
    assert world.kvm.translate(GFN + 3)[1]
    assert logged(world.kvm.get_dirty_log(0)) == list(range(PAGES))
    world.kvm.clear_dirty_log(0, 0, 64, bits(*range(64)))
    assert logged(world.kvm.get_dirty_log(0)) == list(range(64, PAGES))
    assert not world.kvm.translate(GFN + 3)[1]
    assert world.kvm.translate(GFN + 64)[1]
    world.write(GFN + 3, b"new")
    assert logged(world.kvm.get_dirty_log(0))[0] == 3


@pytest.mark.parametrize("flags", [0, MANUAL_PROTECT_ENABLE, MANUAL_PROTECT_ENABLE | INITIALLY_SET])
def test_rounds_of_random_writes(world: Any, flags: int) -> None:
    """Bits cleared = bits set = pages written, in every round."""
    hva = start(world, flags)
    chance = random.Random(17)
    if flags & INITIALLY_SET:
        world.kvm.clear_dirty_log(0, 0, PAGES, bits(*range(PAGES)))
    for _ in range(20):
        written = {chance.randrange(PAGES) for _ in range(chance.randrange(40))}
        for page in written:
            world.write(GFN + page, b"new")
        if chance.randrange(3) == 0:
            world.mm.notifiers.clear_young(hva, hva + 32 * PAGE)
        for page in range(0, PAGES, 7):
            world.access(GFN + page, READ)
        log = world.kvm.get_dirty_log(0)
        assert logged(log) == sorted(written)
        if flags:
            world.kvm.clear_dirty_log(0, 0, PAGES, log)


def levels(world: Any) -> tuple[int, int]:
    """Small and huge entries."""
    found = [spte for _, spte in world.kvm.sptes.entries(0, 1 << 27) if spte & SPTE_PRESENT]
    return sum(not spte & SPTE_HUGE for spte in found), sum(bool(spte & SPTE_HUGE) for spte in found)


@pytest.mark.parametrize("flags", [0, MANUAL_PROTECT_ENABLE, MANUAL_PROTECT_ENABLE | INITIALLY_SET])
def test_huge_entries_are_split_and_come_back(world: Any, flags: int) -> None:
    """dirty_log_page_splitting_test: by enabling, or by clearing; after logging they are as many as before."""
    world.kvm.enable_manual_dirty_log_protect(flags)
    hva = -(-world.ram(2 * HUGE_PAGES) // HPAGE_SIZE) * HPAGE_SIZE
    world.mm.write(hva, b"x")
    world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
    world.kvm.set_memslot(0, HUGE_PAGES, HUGE_PAGES, hva)

    def touch() -> None:
        for page in range(0, HUGE_PAGES, 8):
            world.write(HUGE_PAGES + page, b"y")

    touch()
    assert levels(world) == (0, 1)
    world.kvm.set_memslot(0, HUGE_PAGES, HUGE_PAGES, hva, MEM_LOG_DIRTY_PAGES)
    touch()
    if flags & INITIALLY_SET:
        assert levels(world) == (0, 1)
        log = world.kvm.get_dirty_log(0)
        assert logged(log) == list(range(HUGE_PAGES))
        world.kvm.clear_dirty_log(0, 0, HUGE_PAGES, log)
        touch()
    assert levels(world) == (HUGE_PAGES // 8, 0)
    assert logged(world.kvm.get_dirty_log(0)) == list(range(0, HUGE_PAGES, 8))
    world.kvm.set_memslot(0, HUGE_PAGES, HUGE_PAGES, hva)
    touch()
    assert levels(world) == (0, 1)
    assert world.mm.read(hva, 1) == b"y"


def test_what_kvm_writes_itself_is_logged(world: Any) -> None:
    hva = start(world, 0)
    world.kvm.write_guest((GFN + 3) * PAGE + 4090, b"twelve bytes")
    assert world.mm.read(hva + 3 * PAGE + 4090, 12) == b"twelve bytes"
    assert world.read(GFN + 4, 6) == b" bytes"
    assert logged(world.kvm.get_dirty_log(0)) == [3, 4]
    for gpa in (0, (GFN + PAGES) * PAGE - 3):
        with pytest.raises(MmError) as caught:
            world.kvm.write_guest(gpa, b"twelve bytes")
        assert caught.value.errno == errno.EFAULT
    assert world.kvm.fault(GFN, WRITE) == 0
