"""Faults of gfn_to_pfn caches: what a refresh overlooks, and what an invalidation does not find."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.address import Hva
from xipvm.mmu.secondary.pfncache import PfnCache, PfnCaches
from xipvm.mutants.mutant import inside, mutant, replaced

_SEEN = ("I5", "AssertionError")


@mutant("pfncache-not-invalidated", "M33", *_SEEN, protocol="modern")
def pfncache_not_invalidated() -> Iterator[None]:
    """Invalidations leave the caches of KVM itself alone."""
    with replaced(PfnCaches, "invalidate_start", lambda self, start, end: None):
        yield


@mutant("pfncache-asks-only-for-seq", "18", *_SEEN, protocol="modern")
def pfncache_asks_only_for_seq() -> Iterator[None]:
    """A refresh looks whether a range has ended, not whether one is open that has passed it by."""
    with replaced(PfnCache, "_range_is_open", lambda self: False):
        yield


@mutant("pfncache-asks-what-is-in-progress", "18 (hull)", *_SEEN, protocol="modern")
def pfncache_asks_what_is_in_progress() -> Iterator[None]:
    """A refresh asks what faults ask, which an invalidation raises only when the caches are behind it."""
    with replaced(PfnCache, "_range_is_open", lambda self: self.kvm.mmu_invalidate_in_progress != 0):
        yield


@mutant("pfncache-asks-only-for-open-ranges", "18 (seq)", *_SEEN, protocol="modern")
def pfncache_asks_only_for_open_ranges() -> Iterator[None]:
    """A refresh looks whether a range is open, not whether one has come and gone."""
    with replaced(PfnCache, "_must_retry", lambda self, seq, ended: self._range_is_open()):
        yield


@mutant("pfncache-valid-outside-the-lock", "M33 (lock)", *_SEEN, protocol="modern")
def pfncache_valid_outside_the_lock() -> Iterator[None]:
    """A refresh asks under the lock, drops it, and makes the cache valid then."""
    retry = PfnCache._must_retry

    def asked(self: PfnCache, seq: int, ended: int) -> bool:
        found = retry(self, seq, ended)
        if not found:
            self.lock.writer -= 1
            point("mutant.unlocked")
            self.lock.writer += 1
        return found

    with replaced(PfnCache, "_must_retry", asked):
        yield


@mutant("pfncache-used-while-invalidated", "M33 (use)", *_SEEN, protocol="modern")
def pfncache_used_while_invalidated() -> Iterator[None]:
    """An invalidation does not wait for who uses the cache at the moment."""

    def unlocked(self: PfnCaches, start: int, end: int) -> None:
        for cache in self._all:
            if cache.valid and start <= cache.uhva < end:
                cache.drop()

    with replaced(PfnCaches, "invalidate_start", unlocked):
        yield


@mutant("pfncache-active-before-it-is-listed", "M33 (list)", *_SEEN, protocol="modern")
def pfncache_active_before_it_is_listed() -> Iterator[None]:
    """Activating looks the page up first, and then puts the cache where invalidations find it."""
    add = PfnCaches.add
    with inside(PfnCache, "_activate") as activating:
        activate = PfnCache._activate

        def unless(self: PfnCaches, cache: PfnCache) -> None:
            if not activating():
                add(self, cache)

        def late(self: PfnCache, gpa: int | None, uhva: Hva, length: int) -> None:
            activate(self, gpa, uhva, length)
            point("mutant.unlisted")
            self.kvm.pfn_caches.add(self)

        with replaced(PfnCaches, "add", unless), replaced(PfnCache, "_activate", late):
            yield


@mutant("pfncache-unlisted-while-valid", "M25 (cache)", *_SEEN, protocol="modern")
def pfncache_unlisted_while_valid() -> Iterator[None]:
    """Deactivating takes the cache from the list first, and makes it invalid then."""
    deactivate = PfnCache.deactivate

    def early(self: PfnCache) -> None:
        self.kvm.pfn_caches.remove(self)
        point("mutant.unlisted")
        deactivate(self)

    with replaced(PfnCache, "deactivate", early):
        yield
