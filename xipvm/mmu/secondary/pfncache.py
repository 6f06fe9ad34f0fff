"""gfn_to_pfn caches: pages of the guest that KVM itself keeps mapped, to read and write them without a lookup.

A cache is one page. It holds no reference: what keeps it right is that an invalidation of its hva makes it *invalid*
before the range's start goes on, and waits meanwhile for whoever uses it. Users hold ``lock`` for reading over
:meth:`PfnCache.check` and the access; where the check fails they drop the lock, refresh, and ask again.

Refresh: invalid → {read seq → unlock → get_user_pages (for writing; may sleep) → lock} → again while *any range of the
mm is open* or seq has changed → valid → the reference of the lookup is dropped. Both count: a start makes caches
invalid before it raises ``mmu_invalidate_in_progress``, and not at all that of another memslot, so it is
``mn_active_invalidate_count`` that says that an invalidation has passed by; and one that has come and gone shows only
in seq. As seq goes up only where a memslot is hit, and the hva of a cache may be in none, ranges that have ended are
counted for the caches as well.

A cache that is gpa-based follows its memslot: it says nothing any more when the memslots' generation has changed. One
that is hva-based knows of no memslot.

Activating: in the list of the VM, then active. Deactivating: not active and invalid, then out of the list: an
invalidation that goes through the list at any time finds every cache that can be valid.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.actors import give_way, hooked, point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Hva, Pfn
from xipvm.errors import DeadlockError, MmError
from xipvm.locks.lock import RwLock
from xipvm.locks.order import GPC_LIST_LOCK, GPC_LOCK, GPC_REFRESH_LOCK
from xipvm.mmu.secondary.memslot import HVA_LIMIT

if TYPE_CHECKING:
    from xipvm.mmu.secondary.kvm import Kvm

TRIES: Final = 1_000
"""Lookups of one refresh that invalidations come between, after which nothing will come of it."""


class PfnCache:
    """One cache of ``kvm``, inactive. ``name`` is what traces call it."""

    def __init__(self, kvm: Kvm, name: str) -> None:
        self.kvm = kvm
        self.name = name
        self.lock = RwLock(f"lock of {name}", GPC_LOCK)
        self.refresh_lock = RwLock(f"refresh_lock of {name}", GPC_REFRESH_LOCK)
        self.active = False
        self.valid = False
        self.gpa: int | None = None
        """What it caches: a guest physical address; None for one that is hva-based."""
        self.uhva = Hva(0)
        """What that is in the host's address space, not only of the page."""
        self.generation = 0
        """Of the memslots that led there."""
        self.pfn: Pfn | None = None
        """The frame that is mapped; what it holds counts only while ``valid``."""

    def __repr__(self) -> str:
        what = f"hva {self.uhva:#x}" if self.gpa is None else f"gpa {self.gpa:#x}"
        return f"<{self.name}: {what}, {'valid' if self.valid else 'invalid'}{'' if self.active else ', inactive'}>"

    # ---- using it

    def check(self, length: int) -> bool:
        """Whether ``length`` bytes from where it points can be used. Under ``lock``, which is kept for the access."""
        return (
            self.active
            and (self.gpa is None or self.generation == self.kvm.memslots.generation)
            and 0 < self.uhva < HVA_LIMIT
            and self.uhva % PAGE_SIZE + length <= PAGE_SIZE
            and self.valid
        )

    def read(self, length: int) -> bytes:
        """``length`` bytes, refreshed as often as it takes. Raises MmError as :meth:`refresh`."""
        while True:
            with self.lock.read:
                if self.check(length):
                    point("kvm.gpc.use")
                    return self.kvm.host.read(self._frame(), self.uhva % PAGE_SIZE, length)
            self.refresh(length)

    def write(self, data: bytes) -> None:
        """Store ``data``; the page is in the dirty log behind that. Raises MmError as :meth:`refresh`."""
        while True:
            with self.lock.read:
                if self.check(len(data)):
                    point("kvm.gpc.use")
                    self.kvm.host.write(self._frame(), self.uhva % PAGE_SIZE, data)
                    if self.gpa is not None:
                        self.kvm.mark_page_dirty(self.gpa >> PAGE_SHIFT)
                    return
            self.refresh(len(data))

    def _frame(self) -> Pfn:
        assert self.pfn is not None
        return self.pfn

    # ---- its life

    def activate(self, gpa: int, length: int) -> None:
        """Cache ``length`` bytes at ``gpa``. Raises MmError as :meth:`refresh`; it is active then, and invalid."""
        self._activate(gpa, Hva(0), length)

    def activate_hva(self, uhva: int, length: int) -> None:
        """Cache ``length`` bytes at ``uhva`` of the host. Raises MmError EINVAL for no address, and as before."""
        if not 0 < uhva < HVA_LIMIT:
            raise MmError(errno.EINVAL, f"{self.name}: {uhva:#x} is no address of the host")
        self._activate(None, Hva(uhva), length)

    def _activate(self, gpa: int | None, uhva: Hva, length: int) -> None:
        at = uhva if gpa is None else gpa
        if at % PAGE_SIZE + length > PAGE_SIZE:
            raise MmError(errno.EINVAL, f"{self.name}: {length} bytes at {at:#x} are not in one page")
        if self.kvm.pin_sptes:
            raise MmError(errno.EINVAL, f"{self.name}: {self.kvm.name} is told of nothing")
        with self.refresh_lock.write:
            self.kvm.pfn_caches.add(self)
            point("kvm.gpc.listed")
            with self.lock.write:
                self.active = True
            self._refresh(gpa, uhva)

    def refresh(self, length: int) -> None:
        """Make it valid again for ``length`` bytes.

        Raises MmError: EINVAL when these are not in one page, or the cache is not active; EFAULT when there is no
        memory, or none that may be written. It is invalid then.
        """
        with self.refresh_lock.write:
            if not self.active:
                raise MmError(errno.EINVAL, f"{self.name} is not active")
            at = self.uhva if self.gpa is None else self.gpa
            if at % PAGE_SIZE + length > PAGE_SIZE:
                raise MmError(errno.EINVAL, f"{self.name}: {length} bytes at {at:#x} are not in one page")
            self._refresh(self.gpa, self.uhva)

    def deactivate(self) -> None:
        """Drop what it has. A second call does nothing."""
        with self.refresh_lock.write:
            with self.lock.write:
                self.active = False
                self.drop()
                self.pfn = None
            point("kvm.gpc.inactive")
            self.kvm.pfn_caches.remove(self)

    def drop(self) -> None:
        """What it has counts no longer. Under ``lock``."""
        if self.valid and self.kvm.trace.on:
            page = self.uhva >> PAGE_SHIFT
            self.kvm.trace.emit("spte_zap", vm=self.name, start=page, end=page + 1, pages=[(self._frame(), 1)])
        self.valid = False

    # ---- looking it up

    def _refresh(self, gpa: int | None, uhva: Hva) -> None:
        kvm = self.kvm
        reading = kvm.srcu.read_lock() if hooked() else None  # memslots stay what they are
        try:
            old = self.uhva >> PAGE_SHIFT
            with self.lock.write:
                self.gpa = gpa
                if gpa is None:
                    self.uhva = uhva
                else:
                    self.generation = kvm.memslots.generation
                    self.uhva = self._uhva_of(gpa)
                if self.valid and self.uhva >> PAGE_SHIFT == old:
                    return
                self.drop()
            self._hva_to_pfn_retry()
        except MmError:
            with self.lock.write:
                self.drop()
                self.pfn = None
            raise
        finally:
            if reading is not None:
                kvm.srcu.read_unlock(reading)

    def _uhva_of(self, gpa: int) -> Hva:
        gfn, offset = divmod(gpa, PAGE_SIZE)
        slot = self.kvm.memslots.find(gfn)
        if slot is None or slot.invalid or slot.readonly:
            raise MmError(errno.EFAULT, f"{self.name}: no memory that may be written at {gpa:#x}")
        return Hva(slot.hva + ((gfn - slot.gfn) << PAGE_SHIFT) + offset)

    def _hva_to_pfn_retry(self) -> None:
        """Look the page up until no invalidation comes between. Raises MmError EFAULT when the host has none."""
        kvm = self.kvm
        hva = Hva(self.uhva & -PAGE_SIZE)
        for _ in range(TRIES):
            seq, ended = kvm.mmu_invalidate_seq, kvm.pfn_caches.ended
            point("kvm.gpc.seq_read")
            pfn = kvm.mm.get_user_pages(hva, write=True).pfn
            kvm.host.pin(pfn)
            try:
                point("kvm.gpc.gup_done")
                with self.lock.write:
                    if not self._must_retry(seq, ended):
                        self._map(pfn)
                        return
            finally:
                kvm.mm.unpin_frame(pfn)
            give_way("kvm.gpc.retry")
        raise DeadlockError(f"{self.name}: its page is invalidated again and again")

    def _must_retry(self, seq: int, ended: int) -> bool:
        """Whether a page looked up since ``seq`` and ``ended`` may be another one by now. Under ``lock``."""
        return self._range_is_open() or self.kvm.mmu_invalidate_seq != seq or self.kvm.pfn_caches.ended != ended

    def _range_is_open(self) -> bool:
        return self.kvm.mn_active_invalidate_count != 0

    def _map(self, pfn: Pfn) -> None:
        self.pfn = pfn
        self.valid = True
        if self.kvm.trace.on:
            page = self.uhva >> PAGE_SHIFT
            self.kvm.trace.emit("spte_set", vm=self.name, gfn=page, pfn=pfn, rights="rw")


class PfnCaches:
    """The caches of a VM that are active, or about to be."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._all: list[PfnCache] = []
        self._made = 0
        self.ended = 0
        """Ranges that have ended while there were caches."""
        self._lock = RwLock(f"gpc_lock of {kvm.name}", GPC_LIST_LOCK)

    def __bool__(self) -> bool:
        return bool(self._all)

    def new(self) -> PfnCache:
        """A cache, inactive."""
        self._made += 1
        return PfnCache(self._kvm, f"{self._kvm.name}.gpc{self._made - 1}")

    def add(self, cache: PfnCache) -> None:
        """Have invalidations find ``cache``."""
        with self._lock.write:
            if cache not in self._all:
                self._all.append(cache)

    def remove(self, cache: PfnCache) -> None:
        """Have them find it no more."""
        with self._lock.write:
            if cache in self._all:
                self._all.remove(cache)

    def invalidate_start(self, start: int, end: int) -> None:
        """Bytes ``[start, end)`` of the host change: no cache of them is used when this returns."""
        with self._lock.write:
            for cache in self._all:
                if cache.valid and start <= cache.uhva < end:
                    with cache.lock.write:
                        if cache.valid and start <= cache.uhva < end:
                            cache.drop()

    def deactivate_all(self) -> None:
        """Of a VM that goes."""
        for cache in tuple(self._all):
            cache.deactivate()
