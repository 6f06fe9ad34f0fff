"""gfn_to_pfn caches: when they may be used, what makes them invalid, and what a refresh does not overlook."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from xipvm.actors import on_point, on_wait
from xipvm.errors import DeadlockError, MmError
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.notifier import RangeEvent

PAGE = 4096
GFN = 0x10


@pytest.fixture
def hva(world: Any) -> int:
    hva: int = world.slot(4, GFN)
    for page in range(4):
        world.mm.write(hva + page * PAGE, b"page %d" % page)
    return hva


def active(world: Any, gpa: int = GFN * PAGE + 8, length: int = 16) -> Any:
    cache = world.kvm.pfn_caches.new()
    cache.activate(gpa, length)
    return cache


def at_host(world: Any, hva: int) -> int:
    pfn: int = pte_pfn(world.mm.pgd.get(hva >> 12))
    return pfn


def test_read_and_write(world: Any, hva: int) -> None:
    cache = active(world)
    assert cache.check(16)
    cache.write(b"by kvm")
    assert world.mm.read(hva + 8, 6) == b"by kvm"
    world.write(GFN, b"this is guest, all")
    assert cache.read(9) == b"guest, al"
    assert cache.pfn == at_host(world, hva)


def test_it_holds_no_reference(world: Any, hva: int) -> None:
    before = world.host.refcount(at_host(world, hva))
    cache = active(world)
    assert world.host.refcount(cache.pfn) == before


@pytest.mark.parametrize(
    "operation",
    [
        lambda world, hva: world.drop(hva),
        lambda world, hva: migrate_page(world.host, world.trace, at_host(world, hva)),
        lambda world, hva: world.mm.mprotect(hva, PAGE, 1),
        lambda world, hva: world.mm.fork().exit(),
    ],
    ids=["drop", "migrate", "mprotect", "fork"],
)
def test_an_invalidation_makes_it_invalid(world: Any, hva: int, operation: Any) -> None:
    cache, other = active(world), active(world, (GFN + 1) * PAGE)
    operation(world, hva)
    assert not cache.check(16)
    if operation.__code__.co_names[:1] == ("drop",):
        assert other.check(16)
        assert cache.read(4) == bytes(4)
        assert cache.pfn == at_host(world, hva)


def test_a_range_beside_it(world: Any, hva: int) -> None:
    cache = active(world, (GFN + 1) * PAGE)
    for start, end in ((hva, hva + PAGE), (hva + 2 * PAGE, hva + 3 * PAGE)):
        with world.mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
            assert cache.check(16)
    with world.mm.notifiers.invalidate_range(hva + PAGE, hva + 2 * PAGE, RangeEvent.CLEAR):
        assert not cache.check(16)


def test_it_follows_its_memslot(world: Any, hva: int) -> None:
    cache, by_hva = active(world), world.kvm.pfn_caches.new()
    by_hva.activate_hva(hva + 8, 16)
    world.kvm.set_memslot(3, 0x800, 4, world.ram(4))
    assert not cache.check(16)  # the generation says so, whichever slot it was
    assert by_hva.check(16)
    cache.refresh(16)
    assert cache.check(16)
    world.kvm.set_memslot(0, 0x40, 4, hva)
    with pytest.raises(MmError) as caught:
        cache.refresh(16)
    assert caught.value.errno == errno.EFAULT
    assert not cache.check(16)
    assert by_hva.read(4) == world.mm.read(hva + 8, 4)


def test_the_page_is_logged(world: Any, hva: int) -> None:
    world.kvm.set_memslot(0, GFN, 4, hva, MEM_LOG_DIRTY_PAGES)
    cache = active(world, (GFN + 2) * PAGE)
    assert world.kvm.get_dirty_log(0)[0] == 0
    cache.write(b"x")
    assert world.kvm.get_dirty_log(0)[0] == 1 << 2


def test_errors(world: Any, hva: int) -> None:
    cache = world.kvm.pfn_caches.new()
    read_only = world.ram(1)
    world.kvm.set_memslot(1, 0x100, 1, read_only, MEM_READONLY)
    nothing = world.ram(1, 0)
    world.kvm.set_memslot(2, 0x200, 1, nothing)
    for call, error in (
        (lambda: cache.refresh(1), errno.EINVAL),
        (lambda: cache.activate(GFN * PAGE + 4090, 7), errno.EINVAL),
        (lambda: cache.activate_hva(0, 8), errno.EINVAL),
        (lambda: cache.activate_hva(1 << 48, 8), errno.EINVAL),
        (lambda: cache.activate(0x100 * PAGE, 8), errno.EFAULT),
        (lambda: cache.activate(0x200 * PAGE, 8), errno.EFAULT),
        (lambda: cache.activate(0x900 * PAGE, 8), errno.EFAULT),
    ):
        with pytest.raises(MmError) as caught:
            call()
        assert caught.value.errno == error
        assert not cache.check(1)
    cache.activate(GFN * PAGE + 4090, 6)
    assert cache.check(6)
    assert not cache.check(7)
    with pytest.raises(MmError) as caught:
        cache.refresh(7)
    assert caught.value.errno == errno.EINVAL
    cache.deactivate()
    cache.deactivate()
    assert not cache.check(1)
    assert not world.kvm.pfn_caches
    with pytest.raises(MmError) as caught:
        cache.read(1)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("label", ["kvm.gpc.seq_read", "kvm.gpc.gup_done"])
def test_an_invalidation_that_comes_and_goes_during_a_refresh(world: Any, hva: int, label: str) -> None:
    pending = [True]

    def hook(at: str) -> None:
        if at == label and pending:
            pending.pop()
            world.drop(hva)

    with on_point(hook):
        cache = active(world)
    assert not pending
    assert cache.pfn == at_host(world, hva)
    assert cache.read(8) == bytes(8)


def test_an_invalidation_that_is_open_during_a_refresh(world: Any, hva: int) -> None:
    """seq has not changed, and nothing is in progress for any memslot: only the count of active ranges says it."""
    other = world.ram(1)
    cache = world.kvm.pfn_caches.new()
    opened = world.mm.notifiers.invalidate_range_start(other, other + PAGE, RangeEvent.CLEAR)
    looked_up = []

    def hook(at: str) -> None:
        if at == "kvm.gpc.gup_done":
            looked_up.append(cache.valid)
            if len(looked_up) == 3:
                world.mm.notifiers.invalidate_range_end(opened)

    with on_point(hook):
        cache.activate_hva(other, 8)
    assert looked_up == [False] * 4  # once more when it has ended
    assert cache.check(8)
    assert world.kvm.mmu_invalidate_seq == 0


def test_a_range_that_never_ends(world: Any, hva: int) -> None:
    cache = world.kvm.pfn_caches.new()
    with world.mm.notifiers.invalidate_range(0, PAGE, RangeEvent.CLEAR), pytest.raises(DeadlockError):
        cache.activate(GFN * PAGE, 8)
    assert not cache.check(8)
    cache.refresh(8)
    assert cache.check(8)


def test_an_invalidation_waits_for_who_uses_it(world: Any, hva: int) -> None:
    cache = active(world)
    waited = []

    def hook(at: str) -> None:
        if at == "kvm.gpc.use":
            world.kvm.pfn_caches.invalidate_start(hva, hva + PAGE)

    def wait(what: str, ready: object) -> None:
        waited.append((what, cache.valid))
        raise DeadlockError(what)

    with on_point(hook), on_wait(wait), pytest.raises(DeadlockError):
        cache.read(8)
    assert waited == [("write of lock of vm0.gpc0", True)]
    world.drop(hva)
    assert not cache.valid


def test_activate_against_invalidate(world: Any, hva: int) -> None:
    """Between being listed and being active, and behind being inactive: nothing valid is overlooked."""
    seen = []

    def hook(at: str) -> None:
        if at in ("kvm.gpc.listed", "kvm.gpc.inactive"):
            world.drop(hva)
            seen.append((at, [cache.valid for cache in world.kvm.pfn_caches._all]))

    with on_point(hook):
        cache = active(world)
        assert cache.check(16)
        cache.deactivate()
    assert seen == [("kvm.gpc.listed", [False]), ("kvm.gpc.inactive", [False])]


def test_the_trace_knows_of_it(world: Any, hva: int) -> None:
    with world.watching("spte_set", "spte_zap", "page_free") as log:
        active(world)
        world.drop(hva)
    assert log == ["spte_set", "spte_zap", "page_free"]
    assert world.events[0].fields["vm"] == "vm0.gpc0"


def test_destroying_the_vm(world: Any, hva: int) -> None:
    cache = active(world)
    world.kvm.destroy()
    assert not cache.active
    assert not cache.valid
