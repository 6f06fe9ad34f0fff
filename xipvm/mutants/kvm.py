"""Faults of the KVM secondary MMU: its retry protocol, what it removes, when it flushes."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.mmu.secondary.kvm import Kvm, KvmBase
from xipvm.mmu.secondary.memslot import Memslot
from xipvm.mmu.secondary.spte import PFN_MASK
from xipvm.mutants.mutant import mutant, replaced
from xipvm.notifier import MmuNotifierRange


@mutant("no-retry-check", "M7", "I4", "I2")
def no_retry_check() -> Iterator[None]:
    """A fault installs what it looked up without asking whether an invalidation came between."""
    with replaced(KvmBase, "mmu_invalidate_retry", lambda self, seq, gfn: ""):
        yield


@mutant("check-only-count", "M8", "I4")
def check_only_count() -> Iterator[None]:
    """A fault asks whether an invalidation is open, not whether one has come and gone."""

    def retry(self: KvmBase, seq: int, gfn: int) -> str:
        return "in progress" if self.mmu_invalidate_in_progress and self._covered(gfn) else ""

    with replaced(KvmBase, "mmu_invalidate_retry", retry):
        yield


@mutant("check-only-seq", "M9", "I2", "I4")
def check_only_seq() -> Iterator[None]:
    """A fault asks whether an invalidation has ended, not whether one is open."""

    def retry(self: KvmBase, seq: int, gfn: int) -> str:
        return "seq" if self.mmu_invalidate_seq != seq else ""

    with replaced(KvmBase, "mmu_invalidate_retry", retry):
        yield


@mutant("seq-read-after-lookup", "M10", "I4")
def seq_read_after_lookup() -> Iterator[None]:
    """The sequence number is read when the page has been looked up, so nothing before that counts."""

    install = KvmBase._install_locked

    def late(self: KvmBase, slot: Memslot, gfn: int, page: object, seq: int) -> None:
        install(self, slot, gfn, page, self.mmu_invalidate_seq)  # type: ignore[arg-type]

    with replaced(KvmBase, "_install_locked", late):
        yield


@mutant("seq-after-count", "M11", "I4", protocol="modern")
def seq_after_count() -> Iterator[None]:
    """At the end the count is lowered first, and the sequence number raised later, without the lock."""

    def end(self: Kvm, range: MmuNotifierRange) -> None:
        if self.memslots.in_hva_range(range.start, range.end):
            self.mmu_invalidate_in_progress -= 1
            point("mutant.count_lowered")
            self.mmu_invalidate_seq += 1
        self.mn_active_invalidate_count -= 1

    with replaced(Kvm, "invalidate_range_end", end):
        yield


@mutant("count-only-what-is-mapped", "M12", "I2", "I4", protocol="modern")
def count_only_what_is_mapped() -> Iterator[None]:
    """A range in which the guest has no entry yet is not counted, as if a fault could not be on its way."""
    start, end = Kvm.invalidate_range_start, Kvm.invalidate_range_end
    ignored: set[tuple[Kvm, int]] = set()

    def started(self: Kvm, range: MmuNotifierRange) -> int:
        hit = self.memslots.in_hva_range(range.start, range.end)
        if not any(self.sptes.next_present(first, last) >= 0 for first, last in hit):
            ignored.add((self, range.id))
            return 0
        return start(self, range)

    def ended(self: Kvm, range: MmuNotifierRange) -> None:
        if (self, range.id) in ignored:
            ignored.remove((self, range.id))
        else:
            end(self, range)

    with replaced(Kvm, "invalidate_range_start", started), replaced(Kvm, "invalidate_range_end", ended):
        yield


@mutant("nested-starts-are-one", "M14", "I2", "I4", protocol="modern")
def nested_starts_are_one() -> Iterator[None]:
    """That an invalidation is open is a flag: the first end of two clears it."""

    def end(self: KvmBase) -> None:
        self.mmu_invalidate_in_progress = 0

    begin = Kvm._invalidate_begin

    def begun(self: Kvm) -> None:
        begin(self)
        self.mmu_invalidate_in_progress = 1

    with replaced(KvmBase, "_invalidate_end", end), replaced(Kvm, "_invalidate_begin", begun):
        yield


@mutant("inner-start-shrinks-the-hull", "M15", "I2", "I4", protocol="modern")
def inner_start_shrinks_the_hull() -> Iterator[None]:
    """Of several open ranges only the last one's guest frames are guarded."""

    def add(self: Kvm, start: int, end: int) -> None:
        self.mmu_invalidate_range_start, self.mmu_invalidate_range_end = start, end

    with replaced(Kvm, "_invalidate_range_add", add):
        yield


@mutant("nothing-removed", "M1", "I3")
def nothing_removed() -> Iterator[None]:
    """The range is counted, and the entries stay."""
    with replaced(KvmBase, "_zap", lambda self, start, end: None):
        yield


@mutant("range-one-page-short", "M2", "I3")
def range_one_page_short() -> Iterator[None]:
    """The last page of what is to be removed stays."""
    zap = KvmBase._zap
    with replaced(KvmBase, "_zap", lambda self, start, end: zap(self, start, end - 1)):
        yield


@mutant("flush-skipped", "M18", "I10", "I5")
def flush_skipped() -> Iterator[None]:
    """Entries are removed, and no TLB is flushed for it."""

    def skip(self: KvmBase, reason: str) -> None:
        self.tlbs_dirty = False

    with replaced(KvmBase, "_flush_and_kick", skip):
        yield


@mutant("flush-left-pending", "20", "I10", "I5")
def flush_left_pending() -> Iterator[None]:
    """mmu_lock is dropped with the flush still to be done; the next one who flushes does it."""
    flush = KvmBase._flush_and_kick

    def pending(self: KvmBase, reason: str) -> None:
        if reason == "mmu_notifier":
            return
        flush(self, reason)

    with replaced(KvmBase, "_flush_and_kick", pending):
        yield


@mutant("entry-changed-in-place", "M21", "I4", "I10")
def entry_changed_in_place() -> Iterator[None]:
    """A fault that finds another entry overwrites it: no removal, no flush."""

    def replace(self: KvmBase, old: int, gfn: int, spte: int) -> bool:
        self.sptes.set(gfn, spte)
        return bool(old & PFN_MASK)

    with replaced(KvmBase, "_replace", lambda self, gfn, old, spte: replace(self, old, gfn, spte)):
        yield


@mutant("slots-change-inside-a-range", "19", "I6", "AssertionError", "InternalError", protocol="modern")
def slots_change_inside_a_range() -> Iterator[None]:
    """A memslot may come, go or move between the start and the end of a range: what began does not end."""
    with replaced(KvmBase, "_wait_for_invalidations", lambda self, what: None):
        yield
