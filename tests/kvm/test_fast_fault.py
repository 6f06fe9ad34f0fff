"""Faults that only give rights back: by a cmpxchg, without mmu_lock, and never the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xipvm.actors import on_point
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE
from xipvm.mmu.secondary import spte as s
from xipvm.mmu.secondary.base import FETCH, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES

PAGE = 4096
READ_FAST, SET_FAST = "kvm.fast_fault.read", "kvm.fast_fault.set"


def logged(world: Any, pages: int = 4, gfn: int = 0x10) -> int:
    """A slot whose pages the guest has written; then logging begins."""
    hva: int = world.slot(pages, gfn)
    for page in range(pages):
        world.write(gfn + page, b"old")
    world.kvm.set_memslot(0, gfn, pages, hva, MEM_LOG_DIRTY_PAGES)
    return hva


def at(label: str, action: Callable[[], object]) -> Callable[[str], None]:
    pending = [action]

    def hook(seen: str) -> None:
        if seen == label and pending:
            pending.pop()()

    return hook


@pytest.mark.parametrize("access", [READ, WRITE, FETCH])
def test_what_an_entry_may_have_back(access: int) -> None:
    right = 1 << access
    old = s.SPTE_WRITABLE & ~s.SPTE_AGED | s.SPTE_SAVED | 7 << s.PFN_SHIFT
    back = s.fast_restored(old, right, small_writes=False)
    assert back & ~s.SPTE_WRITE == 7 << s.PFN_SHIFT | s.SPTE_WRITABLE & ~s.SPTE_WRITE
    assert bool(back & s.SPTE_WRITE) == (access == WRITE)  # W is not saved: who writes has to say so
    assert s.fast_restored(s.SPTE_WRITABLE, right, small_writes=True) == s.SPTE_WRITABLE
    read_only = s.SPTE_READ_ONLY
    assert s.fast_restored(read_only, right, small_writes=False) == (0 if access == WRITE else read_only)


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        (s.SPTE_WRITABLE & ~s.SPTE_WRITE, True),
        (s.SPTE_WRITABLE & ~(s.SPTE_WRITE | s.SPTE_MMU_WRITABLE), False),
        (s.SPTE_READ_ONLY, False),
        ((s.SPTE_WRITABLE | s.SPTE_HUGE) & ~s.SPTE_WRITE, False),
    ],
    ids=["1 1 0", "1 0 0", "0 0 0", "huge, logged"],
)
def test_who_may_write_again(entry: int, allowed: bool) -> None:
    assert bool(s.fast_restored(entry, s.SPTE_WRITE, small_writes=True)) == allowed


def test_a_protected_page_needs_no_lookup(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged(world)
    pfn, _ = world.kvm.translate(0x11)
    monkeypatch.setattr(type(world.mm), "get_user_pages", lambda *a, **k: pytest.fail("looked up"))
    with world.watching("spte_restore") as log:
        world.write(0x11, b"new")
    assert log == ["spte_restore"]
    assert world.kvm.translate(0x11) == (pfn, True)
    assert world.kvm.get_dirty_log(0)[0] == 1 << 1


def test_it_goes_on_inside_an_open_range_elsewhere_and_while_mmu_lock_is_held(world: Any) -> None:
    hva = logged(world)
    with world.mm.notifiers.invalidate_range(hva, hva + PAGE, 1), world.kvm.mmu_lock.write:
        assert world.kvm.fault(0x12, WRITE) == RETRY_WALK
        assert world.kvm.translate(0x12)[1]


def test_an_access_that_is_allowed_by_now_is_spurious(world: Any) -> None:
    world.slot(1)
    world.write(0, b"x")
    before = world.kvm.sptes.get(0)
    with world.watching("spte_set", "spte_restore", "spte_zap") as log:
        assert [world.kvm.fault(0, access) for access in (READ, WRITE, FETCH)] == [RETRY_WALK] * 3
    assert log == []
    assert world.kvm.sptes.get(0) == before


def test_an_entry_that_goes_meanwhile_stays_gone(world: Any) -> None:
    """The cmpxchg fails; nobody asks whether an invalidation came between, and nobody has to."""
    hva = logged(world)
    seen: list[int] = []

    def drop() -> None:
        world.drop(hva + PAGE)
        seen.append(world.kvm.sptes.get(0x11))

    with on_point(at(READ_FAST, drop)), world.watching("spte_restore") as log:
        world.kvm.fault(0x11, WRITE)
    assert seen == [0]
    assert log == ["vcpu0 flush mmu_notifier", "vcpu0 kick mmu_notifier"]
    assert world.read(0x11, 3) == bytes(3)


def test_another_vcpu_was_faster(world: Any) -> None:
    logged(world)
    with (
        world.watching("spte_restore") as log,
        on_point(at(READ_FAST, lambda: world.kvm.fault(0x11, WRITE))),
    ):
        assert world.kvm.fault(0x11, WRITE) == RETRY_WALK
    assert log == ["spte_restore"]


def test_it_gives_up_after_four_tries(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged(world)
    tries = []
    monkeypatch.setattr(world.kvm, "_fast_set", lambda *a: bool(tries.append(a)))
    with world.watching("spte_set") as log:
        world.kvm.fault(0x11, WRITE)
    assert len(tries) == 4
    assert log == ["spte_set"]
    assert world.kvm.get_dirty_log(0)[0] == 1 << 1


def test_the_log_has_it_in_this_round_or_the_next(world: Any) -> None:
    """The log is read between W and the mark: it finds nothing, and the next round has the page."""
    logged(world)
    logs = []
    with on_point(at(SET_FAST, lambda: logs.append(world.kvm.get_dirty_log(0)[0]))):
        world.kvm.fault(0x11, WRITE)
    assert logs == [0]
    world.write(0x11, b"new")
    assert world.kvm.get_dirty_log(0)[0] == 1 << 1
    assert not world.kvm.translate(0x11)[1]


def test_a_read_of_an_old_page_restores_no_w(world: Any) -> None:
    hva = world.slot(1)
    world.write(0, b"x")
    world.mm.notifiers.clear_young(hva, hva + PAGE)
    assert world.kvm.sptes.get(0) & s.SPTE_SAVED == s.SPTE_SAVED
    world.access(0, READ)
    assert s.spte_rights(world.kvm.sptes.get(0)) == "rx"
    world.access(0, WRITE)
    assert s.spte_rights(world.kvm.sptes.get(0)) == "rwx"
    assert not world.kvm.sptes.get(0) & s.SPTE_SAVED


def test_an_old_page_the_host_may_only_read(world: Any) -> None:
    hva = world.slot(1)
    world.read(0)  # the zero page
    world.mm.notifiers.clear_young(hva, hva + PAGE)
    world.write(0, b"x")
    assert world.mm.read(hva, 1) == b"x"
    assert world.host.read(0, 0, 1) == b"\0"


def test_old_and_protected(world: Any) -> None:
    hva = logged(world)
    world.mm.notifiers.clear_young(hva, hva + PAGE)
    world.access(0x10, READ)
    assert world.kvm.get_dirty_log(0)[0] == 0
    world.write(0x10, b"new")
    assert world.kvm.get_dirty_log(0)[0] == 1


def test_a_huge_page_that_is_old(world: Any) -> None:
    base = 2 * HUGE_PAGES
    hva = world.ram(2 * HUGE_PAGES)
    hva = -(-hva // HPAGE_SIZE) * HPAGE_SIZE
    world.mm.write(hva, b"x")
    world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
    world.kvm.set_memslot(0, base, HUGE_PAGES, hva)
    world.access(base + 3, WRITE)
    world.mm.notifiers.clear_young(hva, hva + HPAGE_SIZE)
    with world.watching("spte_restore") as log:
        world.access(base + 9, READ)
        world.access(base + 11, WRITE)
    assert log == ["spte_restore", "spte_restore"]
    assert world.kvm.translate(base + 5)[1]
    assert world.kvm.sptes.present == 1
