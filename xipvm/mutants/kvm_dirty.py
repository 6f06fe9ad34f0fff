"""Faults of what KVM does beside the retry protocol: rights given back without a lock, dirty logs, memslots."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.address import Gfn
from xipvm.mmu.secondary import kvm_fault
from xipvm.mmu.secondary.dirty_ring import DirtyRing
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.memslot import GFN_LIMIT, Memslot
from xipvm.mmu.secondary.spte import (
    MMIO_GEN_MASK,
    SPTE_PRESENT,
    SPTE_WRITE,
    fast_restored,
    make_mmio_spte,
    spte_pfn,
    spte_rights,
)
from xipvm.mutants.mutant import inside, mutant, replaced

# ---- rights that come back


@mutant("fast-fault-marks-first", "M31 (fast)", "AssertionError")
def fast_fault_marks_first() -> Iterator[None]:
    """A fault that gives W back puts the page into the dirty log before its cmpxchg."""
    fast = KvmBase._fast_set

    def early(self: KvmBase, slot: Memslot, gfn: int, old: int, new: int) -> bool:
        if not (slot.logged and new & ~old & SPTE_WRITE):
            return fast(self, slot, gfn, old, new)
        self._mark_dirty(slot, gfn)
        point("mutant.marked")
        return _set_only(self, gfn, old, new)

    with replaced(KvmBase, "_fast_set", early):
        yield


def _set_only(kvm: KvmBase, gfn: int, old: int, new: int) -> bool:
    """The cmpxchg of a small entry, and what the trace is told of it."""
    if not kvm.sptes.cmpxchg(gfn, old, new):
        return False
    if kvm.trace.on:
        kvm.trace.emit("spte_restore", vm=kvm.name, gfn=gfn, pages=1, pfn=spte_pfn(new), rights=spte_rights(new))
    return True


@mutant("fast-fault-never-marks", "M16 (fast)", "AssertionError")
def fast_fault_never_marks() -> Iterator[None]:
    """A fault that gives W back leaves the dirty log alone."""
    fast = KvmBase._fast_set

    def quiet(self: KvmBase, slot: Memslot, gfn: int, old: int, new: int) -> bool:
        if slot.logged:
            return _set_only(self, gfn, old, new)
        return fast(self, slot, gfn, old, new)

    with replaced(KvmBase, "_fast_set", quiet):
        yield


@mutant("fast-fault-stores-blindly", "M21 (fast)", "I2", "I3", "I4", "I5", "I10", "InternalError", "AssertionError")
def fast_fault_stores_blindly() -> Iterator[None]:
    """Rights are given back by a plain store: what an invalidation has removed meanwhile is there again."""

    def store(self: KvmBase, slot: Memslot, gfn: int, old: int, new: int) -> bool:
        self.sptes.set(gfn, old)
        _set_only(self, gfn, old, new)
        if slot.logged:
            self._mark_dirty(slot, gfn)
        return True

    with replaced(KvmBase, "_fast_set", store):
        yield


@mutant("fast-fault-forgets-who-may-write", "16 (fast)", "I4", "InternalError", "AssertionError")
def fast_fault_forgets_who_may_write() -> Iterator[None]:
    """W is given to every entry that lacks it, also where the host may only read."""
    restored = fast_restored

    def all_rights(spte: int, right: int, *, small_writes: bool) -> int:
        return restored(spte, right, small_writes=small_writes) or (spte | right if spte & SPTE_PRESENT else 0)

    with replaced(kvm_fault, "fast_restored", all_rights):
        yield


@mutant("huge-entry-written-while-logged", "M16 (huge)", "AssertionError", protocol="modern")
def huge_entry_written_while_logged() -> Iterator[None]:
    """W is given back to a huge entry of a logged slot: of its pages, the log has the one that faulted."""
    restored = fast_restored

    def whole(spte: int, right: int, *, small_writes: bool) -> int:
        return restored(spte, right, small_writes=False)

    with replaced(kvm_fault, "fast_restored", whole):
        yield


@mutant("old-entry-keeps-w", "M17 (W)", "AssertionError", protocol="modern")
def old_entry_keeps_w() -> Iterator[None]:
    """Ageing saves W with the other rights, and the next access of any kind gets it back."""
    age, restored = KvmBase._age, fast_restored
    saved = 1 << 55

    def save(self: KvmBase, start: int, end: int, reason: str) -> bool:
        for first, last in self.memslots.in_hva_range(start, end):
            self.sptes.set_bits(first, last, saved, SPTE_PRESENT | SPTE_WRITE)
        return age(self, start, end, reason)

    def restore(spte: int, right: int, *, small_writes: bool) -> int:
        new = restored(spte, right, small_writes=small_writes)
        return new & ~saved | SPTE_WRITE if new and spte & saved else new

    fast = KvmBase._fast_set

    def unmarked(self: KvmBase, slot: Memslot, gfn: int, old: int, new: int) -> bool:
        return _set_only(self, gfn, old, new) if old & saved else fast(self, slot, gfn, old, new)

    with (
        replaced(KvmBase, "_age", save),
        replaced(kvm_fault, "fast_restored", restore),
        replaced(KvmBase, "_fast_set", unmarked),
    ):
        yield


# ---- dirty logs


@mutant("cleared-log-not-flushed", "M31 (clear)", "I12", "AssertionError")
def cleared_log_not_flushed() -> Iterator[None]:
    """Clearing a dirty log by hand protects the entries, and flushes no TLB."""
    flush = KvmBase._flush_tlbs
    with inside(KvmBase, "clear_dirty_log") as clearing:

        def skip(self: KvmBase, reason: str) -> None:
            if not clearing():
                flush(self, reason)

        with replaced(KvmBase, "_flush_tlbs", skip):
            yield


@mutant("log-cleared-when-it-is-flushed", "M31 (order)", "AssertionError")
def log_cleared_when_it_is_flushed() -> Iterator[None]:
    """The bits are cleared when the TLBs are flushed, with those that were set since they were read."""
    read = KvmBase.get_dirty_log

    def late(self: KvmBase, slot: int) -> bytes:
        dirty = read(self, slot)
        point("mutant.flushed")
        found = self.memslots.get(slot)
        if found is not None and found.dirty_bitmap is not None and not self.manual_dirty_log_protect:
            found.dirty_bitmap[:] = bytes(len(found.dirty_bitmap))
        return dirty

    with replaced(KvmBase, "get_dirty_log", late):
        yield


@mutant("ring-reset-not-flushed", "M31 (ring)", "I12", "AssertionError")
def ring_reset_not_flushed() -> Iterator[None]:
    """Resetting dirty rings protects the entries, and flushes no TLB."""
    flush = KvmBase._flush_tlbs

    def skip(self: KvmBase, reason: str) -> None:
        if reason != "dirty_ring":
            flush(self, reason)

    with replaced(KvmBase, "_flush_tlbs", skip):
        yield


@mutant("ring-reset-protects-nothing", "M16 (ring)", "AssertionError")
def ring_reset_protects_nothing() -> Iterator[None]:
    """Resetting dirty rings frees their places, and what was harvested stays writable."""

    def free(self: KvmBase) -> int:
        return sum(len(ring.take_harvested()) for ring in self.dirty_rings.values())

    with replaced(KvmBase, "reset_dirty_rings", free):
        yield


@mutant("ring-harvested-without-a-reset", "M16 (harvest)", "AssertionError")
def ring_harvested_without_a_reset() -> Iterator[None]:
    """A reset frees what was pushed, whether or not it was harvested."""

    def all_of_it(self: DirtyRing) -> list[tuple[int, int]]:
        found = [self._pages[index % self.size] for index in range(self.reset_index, self.dirty_index)]
        self.reset_index = self.harvest_index = self.dirty_index
        return found

    with replaced(DirtyRing, "take_harvested", all_of_it):
        yield


# ---- memslots


@mutant("slots-change-under-readers", "31", "AssertionError")
def slots_change_under_readers() -> Iterator[None]:
    """Who changes memslots does not wait for faults that still use the old ones."""
    with replaced(KvmBase, "_wait_for_readers", lambda self, what: None):
        yield


@mutant("zap-all-keeps-seq", "17", "I13", "I5", "InternalError")
def zap_all_keeps_seq() -> Iterator[None]:
    """All entries go, and a fault that is under way does not see that what it installs into is obsolete."""
    with replaced(KvmBase, "_zap_all", lambda self: self._zap(0, GFN_LIMIT)):
        yield


@mutant("mmio-generation-not-checked", "24 (generation)", "AssertionError")
def mmio_generation_not_checked() -> Iterator[None]:
    """An entry that says 'a device answers' is believed, whatever memslots came since."""
    with replaced(KvmBase, "_mmio_cached", lambda self, spte: True):
        yield


@mutant("mmio-generations-wrap", "24 (wrap)", "AssertionError")
def mmio_generations_wrap() -> Iterator[None]:
    """When the generation's number comes back to 0, entries of the first time it had a number stay."""

    def keep(self: KvmBase) -> None:
        self.sptes.mmio_generation = self.memslots.generation & MMIO_GEN_MASK

    with replaced(KvmBase, "_invalidate_mmio_sptes", keep):
        yield


@mutant("mmio-entry-over-memory", "24", "I3", "I5")
def mmio_entry_over_memory() -> Iterator[None]:
    """An entry that says 'a device answers' is put over one that maps a page by now."""

    def over(self: KvmBase, gfn: int, generation: int) -> None:
        with self.mmu_lock.read:
            self.sptes.set(gfn, make_mmio_spte(Gfn(gfn), generation))

    with replaced(KvmBase, "_cache_mmio", over):
        yield


@mutant("flush-of-one-vcpu", "M19", "I10", "I5", "I12")
def flush_of_one_vcpu() -> Iterator[None]:
    """A flush reaches the first vCPU only."""

    def first(self: KvmBase, reason: str) -> None:
        for vcpu in self.vcpus[:1]:
            vcpu.flush_tlb(reason)

    with replaced(KvmBase, "flush_remote_tlbs", first):
        yield
