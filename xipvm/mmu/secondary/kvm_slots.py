"""Changing KVM's memslots under faults and invalidations that go on.

``slots_lock`` keeps those apart who change memslots or read dirty logs. Faults, and whoever else looks a memslot up and
goes on using it, do so in a read section of ``srcu``. A change is published like this::

    no range of the mm is open → the generation is marked as being updated → the memslots are the new ones
    → srcu: everybody who may still use the old ones is done → the next generation begins

A slot that goes or moves is published twice: first with ``invalid`` set, so that faults in it start over; then, when
the entries of all slots have been removed and all TLBs flushed, without it. As no range is open while memslots change,
a range's start and its end hit the same ones.

MMIO entries carry the generation that they were made in, so a new memslot need not look for them: no entry is trusted
while an update is under way, nor one of another generation. A generation's number has 19 bits in an entry; when those
come back to 0, all entries go, lest one that old is believed.

Without a scheduler nobody can wait for a fault on whose stack a change is made: it goes on, and the fault starts over,
as after an invalidation.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, Gfn, Hva
from xipvm.errors import MmError
from xipvm.locks.check import sleep_until
from xipvm.locks.lock import RwLock
from xipvm.locks.order import SLOTS_ARCH_LOCK
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.secondary.kvm_dirty import INITIALLY_SET, KvmDirtyLog
from xipvm.mmu.secondary.memslot import GFN_LIMIT, UPDATE_IN_PROGRESS, Memslot
from xipvm.mmu.secondary.spte import (
    MMIO_GEN_MASK,
    NO_MMIO_GENERATION,
    SPTE_HUGE,
    SPTE_MMIO,
    SPTE_PRESENT,
    make_mmio_spte,
    mmio_generation,
)

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace


class KvmSlots(KvmDirtyLog):
    """The memslots of a VM, and what is remembered of where there are none."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str, pin_sptes: bool) -> None:
        super().__init__(mm, trace, host, name=name, pin_sptes=pin_sptes)
        self.slots_arch_lock = RwLock(f"slots_arch_lock of {name}", SLOTS_ARCH_LOCK)
        self._mmio_made = NO_MMIO_GENERATION
        """The last generation in which an MMIO entry was made: TLBs may have it."""

    # ---- changes

    def set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        """Create memslot ``slot``, move it to another guest frame, or turn its dirty logging on or off.

        Logging begins with every entry write-protected and a clean log, unless that is to be set initially. Raises
        MmError, and nothing is changed: EINVAL and EEXIST as :meth:`Memslots.check` says, EDEADLK when an invalidation
        or a fault is in progress that cannot end meanwhile.
        """
        with self.slots_lock.write:
            self._set_memslot(slot, gfn, pages, hva, flags)

    def _set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int) -> None:
        self._wait_for_invalidations("set_memslot")
        new = Memslot(slot, Gfn(gfn), pages, Hva(hva), flags)
        old = self.memslots.check(new)
        if old is not None:
            if (old.gfn, old.flags) == (gfn, flags):
                return
            if old.gfn != gfn:
                self._retire(old)
        lazily = bool(self.manual_dirty_log_protect & INITIALLY_SET)
        if self.uses_dirty_bitmap:
            new.start_log(old, initially_set=lazily)
        self._swap_memslots(
            "set_memslot",
            lambda: self.memslots.insert(new),
            lambda: self.memslots.remove(slot) if old is None else self._restore(old),
        )
        if old is None or old.gfn != gfn:
            self._forget_mmio()
        elif new.logged and not lazily:
            with self.mmu_lock.write:
                self._write_protect(gfn, new.gfn_end)
                self._flush_tlbs("dirty_log")
        elif old.logged and not new.logged:
            self._zap_collapsible(new)
        if self.trace.on:
            self.trace.emit("memslot_set", vm=self.name, slot=slot, gfn=gfn, pages=pages, hva=hva, flags=flags)

    def delete_memslot(self, slot: int) -> None:
        """Take memslot ``slot`` away; its guest frames have no memory any more.

        Raises MmError, and nothing is changed: EINVAL when there is none, EDEADLK as :meth:`set_memslot`.
        """
        with self.slots_lock.write:
            self._wait_for_invalidations("delete_memslot")
            old = self.memslots.get(slot)
            if old is None:
                raise MmError(errno.EINVAL, f"memslot {slot}: there is none to delete")
            self._retire(old)
            self._swap_memslots("delete_memslot", lambda: self.memslots.remove(slot), lambda: self._restore(old))
            if self.trace.on:
                self.trace.emit("memslot_delete", vm=self.name, slot=slot)

    def _retire(self, slot: Memslot) -> None:
        """Let nobody use ``slot`` any more. As in KVM, the entries of all slots go."""

        def mark(invalid: bool) -> None:
            slot.invalid = invalid
            if invalid:
                point("kvm.memslot.invalid")
                self._wait_for_invalidations("memslot update")

        self._swap_memslots("memslot update", lambda: mark(True), lambda: mark(False))
        with self.mmu_lock.write:
            self._zap_all()
            self._flush_and_kick("memslot")  # also what TLBs know of the slot's MMIO accesses

    def _swap_memslots(self, what: str, publish: Callable[[], None], withdraw: Callable[[], None]) -> None:
        """``publish`` a change and wait until nobody uses what was there before; ``withdraw`` it if that cannot be."""
        memslots = self.memslots
        memslots.generation |= UPDATE_IN_PROGRESS
        self.sptes.mmio_generation = NO_MMIO_GENERATION
        try:
            try:
                with self.slots_arch_lock.write:
                    publish()
                self._wait_for_readers(what)
            except BaseException:
                withdraw()
                raise
        finally:
            memslots.generation = (memslots.generation & ~UPDATE_IN_PROGRESS) + 1
            self._invalidate_mmio_sptes()

    def _restore(self, slot: Memslot) -> None:
        slot.invalid = False
        self.memslots.insert(slot)

    def _wait_for_readers(self, what: str) -> None:
        """Nobody uses memslots any more that are not there; faults that cannot be waited for start over."""
        if actors.can_wait():
            self.srcu.synchronize(what)
        elif self.srcu.read:
            with self.mmu_lock.write:
                self.mmu_invalidate_seq += 1

    def _wait_for_invalidations(self, what: str) -> None:
        because = f"an invalidation of {self.mm.name} is in progress"
        sleep_until(what, self._no_invalidation, because=because, label="kvm.memslot.wait")

    def _no_invalidation(self) -> bool:
        return not self.mn_active_invalidate_count

    def _zap_collapsible(self, slot: Memslot) -> None:
        """The slot is logged no longer: small entries go where the host maps 2 MiB by one, and come back as one."""
        if self.max_level < 2:
            return
        with self.mmu_lock.write:
            for first in range(-(-slot.gfn // HUGE_PAGES) * HUGE_PAGES, slot.gfn_end - HUGE_PAGES + 1, HUGE_PAGES):
                page = (slot.hva >> PAGE_SHIFT) + first - slot.gfn
                if page % HUGE_PAGES or not self.mm.pgd.huge(page) or self.sptes.pmd_none(first):
                    continue
                if not self.sptes.get(first) & SPTE_HUGE:
                    self._zap(first, first + HUGE_PAGES)
            if self.tlbs_dirty:
                self._flush_and_kick("dirty_log")

    # ---- where there is no memslot

    def _mmio_cached(self, spte: int) -> bool:
        """Whether an MMIO entry still says that a device answers."""
        return mmio_generation(spte) == self.sptes.mmio_generation

    def _cache_mmio(self, gfn: int, generation: int) -> None:
        """Remember that there was no memslot at ``gfn`` in ``generation``, which may be over."""
        if gfn >= GFN_LIMIT or generation & UPDATE_IN_PROGRESS:
            return
        with self.mmu_lock.read:
            old = self.sptes.get(gfn)
            if old & SPTE_PRESENT:  # there is memory now; it must not be overwritten in place
                return
            self.sptes.set(gfn, make_mmio_spte(Gfn(gfn), generation))
            self._mmio_made = generation & MMIO_GEN_MASK

    def _forget_mmio(self) -> None:
        """There is memory where there was none: no TLB may send accesses to a device any more."""
        if self._mmio_made != NO_MMIO_GENERATION:
            with self.mmu_lock.write:
                self._mmio_made = NO_MMIO_GENERATION
                self._flush_and_kick("memslot")

    def _invalidate_mmio_sptes(self) -> None:
        """A generation has begun, whose MMIO entries count from now on. When the numbers wrap, all entries go."""
        generation = self.memslots.generation & MMIO_GEN_MASK
        if not generation:
            with self.mmu_lock.write:
                for gfn, spte in self.sptes.entries(0, GFN_LIMIT):
                    if spte & SPTE_MMIO:
                        self._zap(gfn, gfn + 1)
                if self.tlbs_dirty:
                    self._flush_and_kick("mmio generation")
        self.sptes.mmio_generation = generation
