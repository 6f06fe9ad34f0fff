"""Dirty logging: what the log names, and that nothing is written behind the back of a reader."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.secondary.base import READ, WRITE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY

PAGES = 16


def logged(log: bytes) -> list[int]:
    return [page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1]


def start(world: Any, pages: int = PAGES, gfn: int = 0x100) -> int:
    """A slot whose pages the guest has all written; then logging begins."""
    hva: int = world.slot(pages, gfn)
    for page in range(pages):
        world.write(gfn + page, b"old")
    world.kvm.set_memslot(0, gfn, pages, hva, MEM_LOG_DIRTY_PAGES)
    return hva


def test_only_what_was_written_since(world: Any) -> None:
    start(world)
    assert logged(world.kvm.get_dirty_log(0)) == []
    world.write(0x104, b"new")
    world.write(0x10F, b"new")
    assert logged(world.kvm.get_dirty_log(0)) == [4, 15]
    assert logged(world.kvm.get_dirty_log(0)) == []
    world.write(0x104, b"again")
    assert logged(world.kvm.get_dirty_log(0)) == [4]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 400),
    st.integers(200, 600),
    st.lists(st.lists(st.tuples(st.integers(0, 399), st.sampled_from([1, 2, 64, 300])), max_size=4), max_size=3),
)
def test_harvests_are_those_of_a_log_of_sets(
    make_world: Callable[[], Any], pages: int, gfn: int, rounds: list[list[tuple[int, int]]]
) -> None:
    """Also while a trace is listened to, when each run of pages is protected by itself and told."""
    quiet, heard = make_world(), make_world()
    for world in (quiet, heard):
        start(world, pages, gfn)
    for writes in rounds:
        written = {page for first, count in writes for page in range(first, min(first + count, pages))}
        for world in (quiet, heard):
            for page in written:
                world.access(gfn + page, WRITE)
            assert [page for page in range(pages) if world.kvm.translate(gfn + page)[1]] == sorted(written)
        assert logged(quiet.kvm.get_dirty_log(0)) == sorted(written)
        with heard.watching():
            assert logged(heard.kvm.get_dirty_log(0)) == sorted(written)
            told = [range(e.fields["start"], e.fields["end"]) for e in heard.events if e.kind == "spte_protect"]
        assert [page - gfn for run in told for page in run] == sorted(written)
        for world in (quiet, heard):
            assert not any(world.kvm.translate(gfn + page)[1] for page in range(pages))


def test_reads_do_not_fault_and_writes_do(world: Any) -> None:
    start(world)
    pfn, writable = world.kvm.translate(0x104)
    assert not writable
    with world.watching("kvm_page_fault"):
        assert world.read(0x104, 3) == b"old"
        assert world.log == []
        world.write(0x104, b"new")
        assert world.log == ["kvm_page_fault"]
    assert world.kvm.translate(0x104) == (pfn, True)
    with world.watching("kvm_page_fault"):
        world.write(0x104, b"new")
        assert world.log == []


def test_a_read_that_installs_a_writable_entry_is_logged(world: Any) -> None:
    hva = start(world)
    world.drop(hva + 3 * 4096)
    world.mm.write(hva + 3 * 4096, b"x")
    world.access(0x103, READ)
    assert world.kvm.translate(0x103)[1]
    assert logged(world.kvm.get_dirty_log(0)) == [3]


def test_the_host_is_not_logged(world: Any) -> None:
    hva = start(world)
    world.mm.write(hva, b"host")
    assert logged(world.kvm.get_dirty_log(0)) == []


def test_tlbs_are_flushed_before_the_log_is_handed_out(world: Any) -> None:
    """Also when there is nothing to hand out: another path may have protected without flushing."""
    hva = start(world)
    world.write(0x102, b"new")
    for expected in ([2], []):
        world.log.clear()
        assert logged(world.kvm.get_dirty_log(0)) == expected
        assert world.log == ["vcpu0 flush dirty_log"]
        assert 0x102 not in world.vcpu.tlb
    world.log.clear()
    world.kvm.set_memslot(0, 0x100, PAGES, hva, 0)
    assert world.log == []  # what is still protected faults


def test_a_write_through_an_old_tlb_entry_is_in_the_log_or_faults(world: Any) -> None:
    """Between protection and flush a vCPU still writes: the page is in the log that this call returns."""
    start(world)
    world.write(0x102, b"new")
    seen = []

    def hook(label: str) -> None:
        if label == "kvm.dirty_log.unflushed":
            assert world.vcpu.tlb[0x102][1]
            assert not world.kvm.translate(0x102)[1]
            world.host.write(world.vcpu.tlb[0x102][0], 0, b"late")
            seen.append(label)

    with on_point(hook):
        assert logged(world.kvm.get_dirty_log(0)) == [2]
    assert len(seen) == 1
    assert world.read(0x102, 4) == b"late"


def test_a_write_while_the_log_is_read_is_in_the_next_one(world: Any) -> None:
    start(world)
    world.write(0x102, b"new")

    def hook(label: str) -> None:
        if label == "kvm.dirty_log.unflushed":
            world.kvm.fault(0x102, WRITE)

    with on_point(hook):
        world.kvm.get_dirty_log(0)
    assert logged(world.kvm.get_dirty_log(0)) == [2]


def test_logging_ends(world: Any) -> None:
    hva = start(world)
    world.write(0x102, b"new")
    world.kvm.set_memslot(0, 0x100, PAGES, hva, 0)
    with pytest.raises(MmError) as caught:
        world.kvm.get_dirty_log(0)
    assert caught.value.errno == errno.ENOENT
    world.kvm.set_memslot(0, 0x100, PAGES, hva, MEM_LOG_DIRTY_PAGES)
    assert logged(world.kvm.get_dirty_log(0)) == []


def test_the_log_moves_with_its_slot(world: Any) -> None:
    hva = start(world)
    world.write(0x102, b"new")
    world.kvm.set_memslot(0, 0x800, PAGES, hva, MEM_LOG_DIRTY_PAGES)
    world.write(0x805, b"new")
    assert logged(world.kvm.get_dirty_log(0)) == [2, 5]
    assert world.kvm.translate(0x805) is not None
    assert not world.kvm.translate(0x805)[1]


def test_an_odd_number_of_pages(world: Any) -> None:
    start(world, 11)
    for gfn in (0x100, 0x107, 0x108, 0x10A):
        world.write(gfn, b"new")
    log = world.kvm.get_dirty_log(0)
    assert len(log) == 2
    assert logged(log) == [0, 7, 8, 10]


def test_each_slot_has_a_log_of_its_own(world: Any) -> None:
    """Two slots that show the same bytes: a write through one is in its log only."""
    hva = start(world)
    world.kvm.set_memslot(1, 0x800, PAGES, hva, MEM_LOG_DIRTY_PAGES)
    world.write(0x804, b"new")
    assert logged(world.kvm.get_dirty_log(0)) == []
    assert logged(world.kvm.get_dirty_log(1)) == [4]


def test_errors(world: Any) -> None:
    hva = world.slot(4)
    for slot, error in ((0, errno.ENOENT), (7, errno.EINVAL)):
        with pytest.raises(MmError) as caught:
            world.kvm.get_dirty_log(slot)
        assert caught.value.errno == error
    with pytest.raises(MmError) as caught:
        world.kvm.set_memslot(0, 0, 4, hva, MEM_READONLY)
    assert caught.value.errno == errno.EINVAL


def test_the_trace_tells_of_the_protection(world: Any) -> None:
    start(world)
    with world.watching("spte_protect", "spte_restore"):
        world.write(0x103, b"new")
        world.kvm.get_dirty_log(0)
        assert world.log == ["spte_restore", "spte_protect", "vcpu0 flush dirty_log"]
    (told,) = [event for event in world.events if event.kind == "spte_protect"]
    assert told.fields == {"vm": "vm0", "start": 0x103, "end": 0x104}
