"""KVM's page faults: without mmu_lock where only a right is missing, else by the retry protocol.

**Fast.** An entry that is there may lack a right that dirty logging or ageing took. It is given back by a cmpxchg,
without mmu_lock and without the retry check: the frame stays the one it was, and had an invalidation removed the entry,
the cmpxchg would fail. Who gets W by it is put into the dirty log *behind* the cmpxchg: a reader of the log that comes
between finds W, and takes it; one that came before has not cleared the bit yet. Where the right is there by now, the
fault was spurious.

**Slow.** Read seq → memslot → get_user_pages (may sleep, and may itself announce invalidations) → lock → give up when
an open invalidation covers the gfn or seq has changed → install → unlock. Giving up means that the guest faults again.

The entries hold no reference to their frames. What keeps a frame from being reused under an entry is this protocol.

``pin_sptes`` is what KVM did before there were notifiers: the reference that get_user_pages took is kept for as long as
the entry exists, and nobody is told of anything. So a page that the guest has used cannot be swapped or moved; one that
the host unmaps or copies stays what the guest sees. Entries go, and their references behind the flush, only when the
VM says so itself: a memslot goes, ``zap_gfn_range``, the end of the VM. As KVM did then, every fault asks for a page
that may be written, so that no guest keeps a page that the host's next write would replace.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Pfn
from xipvm.errors import DeadlockError, MmError
from xipvm.locks import check
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.secondary.base import ACCESS_NAMES, FAULT, FETCH, MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.kvm_slots import KvmSlots
from xipvm.mmu.secondary.memslot import GFN_LIMIT, Memslot
from xipvm.mmu.secondary.spte import (
    PFN_MASK,
    PFN_SHIFT,
    SPTE_AGED,
    SPTE_HOST_WRITABLE,
    SPTE_HUGE,
    SPTE_MMIO,
    SPTE_PRESENT,
    SPTE_READ_ONLY,
    SPTE_SAVED,
    SPTE_WRITABLE,
    SPTE_WRITE,
    fast_restored,
    spte_pfn,
    spte_rights,
)

if TYPE_CHECKING:
    from xipvm.mmu.tables import GupPage

FAST_TRIES: Final = 4
"""How often a fast fault tries its cmpxchg before it takes the slow way."""
PREFAULT_TRIES: Final = 1_000
"""Retries of one page after which a pre-fault says that nothing will come of it."""


class KvmFaults(KvmSlots):
    """The faults of a VM, and the ageing that they undo."""

    asks_for_write: ClassVar[bool] = False
    """Faults for reading ask for a writable page, too, where the slot and the host allow one."""
    holds_lookups: ClassVar[bool] = False
    """A fault holds the page that it looked up until it has installed it or given up."""

    def fault(self, gfn: int, access: int) -> int:
        """Install an entry for ``gfn`` that allows ``access``. See :meth:`SecondaryMmu.fault`."""
        trace = self.trace
        if not trace.on:
            return self._fault(gfn, access)
        with trace.because(trace.emit("kvm_page_fault", vm=self.name, gfn=gfn, access=ACCESS_NAMES[access])):
            return self._fault(gfn, access)

    def _fault(self, gfn: int, access: int) -> int:
        if not actors.hooked():  # nobody can come between
            return self._handle(gfn, access)
        reading = self.srcu.read_lock()
        try:
            return self._handle(gfn, access)
        finally:
            self.srcu.read_unlock(reading)

    def _handle(self, gfn: int, access: int) -> int:
        seq = self.mmu_invalidate_seq
        point("kvm.fault.seq_read")
        spte = self.sptes.get(gfn) if 0 <= gfn < GFN_LIMIT else 0
        if spte & SPTE_MMIO and access != FETCH and self._mmio_cached(spte):
            return MMIO
        generation = self.memslots.generation
        slot = self.memslots.find(gfn)
        if slot is None:
            return self._fault_without_slot(gfn, access, generation)
        if slot.invalid:
            return self._give_up(gfn, "memslot")
        write = access == WRITE
        if write and slot.readonly:
            return MMIO
        if spte & SPTE_PRESENT and self._fast_fault(slot, gfn, access):
            return RETRY_WALK
        if self.released:
            self.last_error = f"{self.name} has lost its address space"
            self.host_failed = True
            return FAULT
        if self.mmu_invalidate_in_progress:  # only saves the lookup; what counts is the check below
            reason = self.mmu_invalidate_retry(seq, gfn)
            if reason:
                return self._give_up(gfn, reason)
        hva = slot.hva + ((gfn - slot.gfn) << PAGE_SHIFT)
        try:
            if self.pin_sptes or self.holds_lookups:
                return self._fault_holding(slot, gfn, hva, seq, write)
            page = self.mm.get_user_pages(hva, write=write)
        except MmError as error:
            return self._lookup_failed(slot, gfn, access, error)
        point("kvm.fault.gup_done")
        if self.mmu_lock.writer or check.checker is not None:
            self._install(slot, gfn, page, seq)
        else:  # nobody can come between, and most faults come this way
            self._install_locked(slot, gfn, page, seq)
        return RETRY_WALK

    # ---- fast

    def _fast_fault(self, slot: Memslot, gfn: int, access: int) -> bool:
        """Whether the entry of ``gfn``, as it is or with rights that it may have back, allows ``access``."""
        for _ in range(FAST_TRIES):
            spte = self.sptes.get(gfn)
            if not spte & SPTE_PRESENT:
                return False
            new = fast_restored(spte, 1 << access, small_writes=slot.logged)
            if not new:
                return False
            if new == spte:
                return True
            point("kvm.fast_fault.read")
            if self._fast_set(slot, gfn, spte, new):
                return True
        return False

    def _fast_set(self, slot: Memslot, gfn: int, old: int, new: int) -> bool:
        """Puts ``new`` where ``old`` is, which has fewer rights; whether it was still there."""
        first = gfn & -HUGE_PAGES if new & SPTE_HUGE else gfn
        if not self.sptes.cmpxchg(first, old, new):
            return False
        writable = bool(new & ~old & SPTE_WRITE)
        if writable:
            self.host.set_flags(spte_pfn(new), PG_DIRTY)
        trace = self.trace
        if trace.on:
            pages = HUGE_PAGES if new & SPTE_HUGE else 1
            pfn, rights = spte_pfn(new), spte_rights(new)
            trace.emit("spte_restore", vm=self.name, gfn=first, pages=pages, pfn=pfn, rights=rights)
        if writable and slot.logged:
            point("kvm.fast_fault.set")
            self._mark_dirty(slot, gfn)
        return True

    # ---- slow

    def _fault_holding(self, slot: Memslot, gfn: int, hva: int, seq: int, write: bool) -> int:
        """The rest of a fault whose lookup takes a reference. Raises MmError when there is no page."""
        page = self._look_up(slot, hva, write)
        self.host.pin(page.pfn)
        try:
            point("kvm.fault.gup_done")
            self._install(slot, gfn, page, seq)
        finally:
            self.mm.unpin_frame(page.pfn)
        return RETRY_WALK

    def _look_up(self, slot: Memslot, hva: int, write: bool) -> GupPage:
        if (self.pin_sptes or self.asks_for_write) and not write and not slot.readonly:
            with suppress(MmError):  # EFAULT, where the host may only read
                return self.mm.get_user_pages(hva, write=True)
        return self.mm.get_user_pages(hva, write=write)

    def _install(self, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        """Puts an entry of ``page``, looked up since ``seq``, unless that must not be."""
        with self.mmu_lock.read:
            self._install_locked(slot, gfn, page, seq)

    def _install_locked(self, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        reason = self.mmu_invalidate_retry(seq, gfn)
        if reason:
            self._give_up(gfn, reason)
            return
        pfn = page.pfn
        writable = page.writable and not slot.readonly
        spte = pfn << PFN_SHIFT | (SPTE_WRITABLE if writable else SPTE_READ_ONLY)
        if writable and gfn in self.watched:
            writable = False
            spte = pfn << PFN_SHIFT | SPTE_READ_ONLY | SPTE_HOST_WRITABLE
        huge = self.max_level > 1 and self._maps_huge(slot, gfn, pfn)
        if huge:
            pfn, gfn = Pfn(pfn - (gfn & HUGE_PAGES - 1)), gfn & -HUGE_PAGES
            spte = pfn << PFN_SHIFT | spte & ~PFN_MASK | SPTE_HUGE
        if self.max_level > 1:
            self._make_way(gfn, huge)
        new = True
        if not self.sptes.cmpxchg(gfn, 0, spte):
            old = self.sptes.get(gfn)
            if old == spte:  # another vCPU was faster
                return
            new = self._replace(gfn, old, spte)
        if new and self.pin_sptes:
            self.host.pin(pfn)
        if writable:
            # The guest writes without telling anybody: to the mm the frame is dirty from now on.
            self.host.set_flags(pfn, PG_DIRTY)
            if slot.logged:
                self._mark_dirty(slot, gfn)  # small, for it is logged
        trace = self.trace
        if trace.on and huge:
            rights = spte_rights(spte)
            trace.emit("spte_set_huge", vm=self.name, gfn=gfn, pages=HUGE_PAGES, pfn=pfn, rights=rights)
        elif trace.on:
            trace.emit("spte_set", vm=self.name, gfn=gfn, pfn=pfn, rights=spte_rights(spte))

    def _maps_huge(self, slot: Memslot, gfn: int, pfn: int) -> bool:
        """Whether one entry may map the 2 MiB around ``gfn``: the host does, and all of it lies in the slot.

        Where a dirty log is kept, or an invalidation covers a part, entries stay small. Under mmu_lock, behind the
        check: who splits or takes away the host's huge entry announces all of the 2 MiB.
        """
        first = gfn & -HUGE_PAGES
        page = (slot.hva >> PAGE_SHIFT) + gfn - slot.gfn
        if (page ^ gfn) & (HUGE_PAGES - 1) or first < slot.gfn or first + HUGE_PAGES > slot.gfn_end:
            return False
        entry = self.mm.pgd.huge(page)
        if not entry or pte_pfn(entry) + (gfn - first) != pfn or slot.logged:
            return False
        return not (
            self.mmu_invalidate_in_progress
            and self.mmu_invalidate_range_start < first + HUGE_PAGES
            and first < self.mmu_invalidate_range_end
        )

    def _make_way(self, gfn: int, huge: bool) -> None:
        """Removes what is of the other size where an entry for ``gfn`` is to be put."""
        if not self.sptes.pmd_none(gfn) and bool(self.sptes.huge(gfn)) != huge:
            if huge:
                self._zap(gfn, gfn + HUGE_PAGES)
            elif self.sptes.huge(gfn):
                self._zap(gfn, gfn + 1)
            if self.tlbs_dirty:
                self._flush_and_kick("level")

    def _replace(self, gfn: int, old: int, spte: int) -> bool:
        """Put ``spte`` where ``old`` is, another entry; False when that was present and only gets other rights."""
        stale = bool(old & SPTE_PRESENT) and bool((old ^ spte) & PFN_MASK or old & ~spte & SPTE_WRITE)
        if stale:
            # The notifier should have removed it. A TLB may hold it, so it is never changed in place.
            self._zap(gfn, gfn + 1)
            self._flush_and_kick("stale spte")
        self.sptes.set(gfn, spte)
        return stale or not old & SPTE_PRESENT

    def _give_up(self, gfn: int, reason: str) -> int:
        if self.trace.on:
            self.trace.emit("kvm_retry", vm=self.name, gfn=gfn, reason=reason)
        return RETRY_WALK

    def _fault_without_slot(self, gfn: int, access: int, generation: int) -> int:
        if access != FETCH and self.mmio_lookup(gfn << PAGE_SHIFT):
            point("kvm.fault.no_slot")
            self._cache_mmio(gfn, generation)
            return MMIO
        self.last_error = f"no memory at guest physical page {gfn << PAGE_SHIFT:#x}"
        self.host_failed = False
        return FAULT

    def _lookup_failed(self, slot: Memslot, gfn: int, access: int, error: MmError) -> int:
        if slot.romd and access != FETCH and error.errno == errno.EFAULT:
            return MMIO  # the ROM does not show its array: the device answers
        self.last_error = f"no page behind guest frame {gfn:#x} ({slot!r}): {error}"
        self.host_failed = not slot.romd
        return FAULT

    # ---- ahead of time

    def pre_fault_memory(self, gpa: int, size: int) -> tuple[int, int]:
        """KVM_PRE_FAULT_MEMORY: map ``[gpa, gpa + size)`` for reading; the address and size of what is left.

        It ends early where there is no memory; that is an error only when nothing was mapped. Raises MmError: EINVAL
        for what is not whole pages or nothing, ENOENT without memory, EFAULT when the host has no page, EAGAIN when
        invalidations do not let it.
        """
        end = gpa + size
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or gpa < 0:
            raise MmError(errno.EINVAL, f"pre-fault of {size:#x} bytes at {gpa:#x}: not whole pages")
        at = gpa
        while at < end:
            try:
                at = min(end, self._pre_fault(at >> PAGE_SHIFT) << PAGE_SHIFT)
            except MmError:
                if at == gpa:
                    raise
                break
        return at, end - at

    def _pre_fault(self, gfn: int) -> int:
        """Map guest frame ``gfn``; the first one behind what is mapped by its entry."""
        for _ in range(PREFAULT_TRIES):
            spte = self.sptes.get(gfn)
            if spte & SPTE_PRESENT and spte & (1 << READ):
                return (gfn & -HUGE_PAGES) + HUGE_PAGES if spte & SPTE_HUGE else gfn + 1
            result = self.fault(gfn, READ)
            if result == MMIO or (result == FAULT and not self.host_failed):
                raise MmError(errno.ENOENT, f"pre-fault: there is no memory at guest frame {gfn:#x}")
            if result == FAULT:
                raise MmError(errno.EFAULT, f"pre-fault: {self.last_error}")
            actors.give_way("kvm.prefault.retry")
        raise DeadlockError(f"pre-fault of guest frame {gfn:#x} is retried for ever")

    # ---- ageing

    def _age(self, start: int, end: int, reason: str) -> bool:
        """Whether the guest used bytes ``[start, end)`` of the host since it was last asked; its next use misses.

        As KVM does it without accessed bits that hardware sets: the entries are access-tracked, which takes all rights.
        Writes need no harvest: the frame was marked dirty when the entry became writable.
        """
        young = False
        with self.mmu_lock.write:
            for first, last in self.memslots.in_hva_range(start, end):
                if self.sptes.change_bits(first, last, SPTE_AGED, SPTE_SAVED, SPTE_PRESENT | SPTE_READ_ONLY):
                    young = True
                    if self.trace.on:
                        self.trace.emit("spte_age", vm=self.name, start=first, end=last)
            if young:
                self._flush_and_kick(reason)
        return young
