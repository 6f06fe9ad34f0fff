"""Faults of the KVM secondary MMU: its retry protocol, what it removes, when it flushes."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_DIRTY
from xipvm.mmu.pte import PRESENT, WRITE, pte_pfn
from xipvm.mmu.secondary.kvm import Kvm, KvmBase
from xipvm.mmu.secondary.memslot import Memslot, Memslots
from xipvm.mmu.secondary.spte import PFN_MASK, PFN_SHIFT, SPTE_PRESENT, SPTE_READ_ONLY, SPTE_WRITABLE
from xipvm.mmu.tables import GupPage
from xipvm.mutants.mutant import inside, mutant, replaced
from xipvm.notifier import MmuNotifierRange


@mutant("no-retry-check", "M7", "I7", "I4", "I2")
def no_retry_check() -> Iterator[None]:
    """A fault installs what it looked up without asking whether an invalidation came between."""
    with replaced(KvmBase, "mmu_invalidate_retry", lambda self, seq, gfn: ""):
        yield


@mutant("check-only-count", "M8", "I7", "I4")
def check_only_count() -> Iterator[None]:
    """A fault asks whether an invalidation is open, not whether one has come and gone."""

    def retry(self: KvmBase, seq: int, gfn: int) -> str:
        return "in progress" if self.mmu_invalidate_in_progress and self._covered(gfn) else ""

    with replaced(KvmBase, "mmu_invalidate_retry", retry):
        yield


@mutant("check-only-seq", "M9", "I7", "I2", "I4")
def check_only_seq() -> Iterator[None]:
    """A fault asks whether an invalidation has ended, not whether one is open."""

    def retry(self: KvmBase, seq: int, gfn: int) -> str:
        return "seq" if self.mmu_invalidate_seq != seq else ""

    with replaced(KvmBase, "mmu_invalidate_retry", retry):
        yield


@mutant("seq-read-after-lookup", "M10", "I7", "I4")
def seq_read_after_lookup() -> Iterator[None]:
    """The sequence number is read when the page has been looked up, so nothing before that counts."""

    install = KvmBase._install_locked

    def late(self: KvmBase, slot: Memslot, gfn: int, page: object, seq: int) -> None:
        install(self, slot, gfn, page, self.mmu_invalidate_seq)  # type: ignore[arg-type]

    with replaced(KvmBase, "_install_locked", late):
        yield


@mutant("same-entry-taken-for-no-change", "M8 (entry)", "I7")
def same_entry_taken_for_no_change() -> Iterator[None]:
    """A fault that was overtaken installs if the host's entry is the same again; it holds no lock that keeps it so."""
    install = KvmBase._install_locked

    def same(self: KvmBase, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        entry = self.mm.pgd.pte((slot.hva >> PAGE_SHIFT) + gfn - slot.gfn)
        unchanged = entry & PRESENT and pte_pfn(entry) == page.pfn and (entry & WRITE or not page.writable)
        if unchanged and not self.released:
            seq = self.mmu_invalidate_seq
        install(self, slot, gfn, page, seq)

    with replaced(KvmBase, "_install_locked", same):
        yield


@mutant("seq-after-count", "M11", "I7", "I4", protocol="modern")
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


@mutant("count-only-what-is-mapped", "M12", "I7", "I2", "I4", protocol="modern")
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


@mutant("nested-starts-are-one", "M14", "I7", "I2", "I4", protocol="modern")
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


@mutant("inner-start-shrinks-the-hull", "M15", "I7", "I2", "I4", protocol="modern")
def inner_start_shrinks_the_hull() -> Iterator[None]:
    """Of several open ranges only the last one's guest frames are guarded."""

    def add(self: Kvm, start: int, end: int) -> None:
        self.mmu_invalidate_range_start, self.mmu_invalidate_range_end = start, end

    with replaced(Kvm, "_invalidate_range_add", add):
        yield


@mutant("nothing-removed", "M1 (zap)", "I3")
def nothing_removed() -> Iterator[None]:
    """The range is counted, and the entries stay."""
    with replaced(KvmBase, "_zap", lambda self, start, end: None):
        yield


@mutant("range-one-page-short", "M2 (zap)", "I3", "I2")
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


@mutant("flush-at-the-end", "M5", "I10", "I5", protocol="modern")
def flush_at_the_end() -> Iterator[None]:
    """TLBs are flushed when the range ends, as who pins its pages may do; but these entries hold no references."""
    end, flush = Kvm.invalidate_range_end, KvmBase._flush_and_kick

    def pending(self: KvmBase, reason: str) -> None:
        if reason != "mmu_notifier":
            flush(self, reason)

    def flushed(self: Kvm, range: MmuNotifierRange) -> None:
        if self.tlbs_dirty:
            flush(self, "late")
        end(self, range)

    with replaced(KvmBase, "_flush_and_kick", pending), replaced(Kvm, "invalidate_range_end", flushed):
        yield


@mutant("entry-changed-in-place", "M21", "I3", "I2", protocol="modern")
def entry_changed_in_place() -> Iterator[None]:
    """The entry of a single page is not removed, but overwritten with the new page when the range ends."""
    zap, end = KvmBase._zap, Kvm.invalidate_range_end
    with inside(Kvm, "invalidate_range_start", lambda self, range: range.end - range.start == PAGE_SIZE) as single:

        def keep(self: KvmBase, first: int, last: int) -> None:
            if not single():
                zap(self, first, last)

        def overwrite(self: Kvm, range: MmuNotifierRange) -> None:
            end(self, range)
            if range.end - range.start == PAGE_SIZE:
                for gfn, _ in self.memslots.in_hva_range(range.start, range.end):
                    entry, spte = self.mm.pgd.pte(range.start >> PAGE_SHIFT), self.sptes.get(gfn)
                    if spte & SPTE_PRESENT and entry & PRESENT:
                        self.sptes.set(gfn, spte & ~PFN_MASK | pte_pfn(entry) << PFN_SHIFT)

        with replaced(KvmBase, "_zap", keep), replaced(Kvm, "invalidate_range_end", overwrite):
            yield


@mutant(
    "slots-change-inside-a-range", "19", "AssertionError", "InternalError", "livelock", "deadlock", protocol="modern"
)
def slots_change_inside_a_range() -> Iterator[None]:
    """A memslot may come, go or move between the start and the end of a range: what began does not end."""
    with replaced(KvmBase, "_wait_for_invalidations", lambda self, what: None):
        yield


@mutant(
    "slot-goes-without-a-second-look",
    "M34",
    "AssertionError",
    "InternalError",
    "livelock",
    "deadlock",
    protocol="modern",
)
def slot_goes_without_a_second_look() -> Iterator[None]:
    """Whether a range is open is asked before the slot is marked invalid, and not behind that."""
    wait = KvmBase._wait_for_invalidations

    def once(self: KvmBase, what: str) -> None:
        if what != "memslot update":
            wait(self, what)

    with replaced(KvmBase, "_wait_for_invalidations", once):
        yield


@mutant("reloaded-inside-the-range", "2", "I7", "I2", "I4", protocol="modern")
def reloaded_inside_the_range() -> Iterator[None]:
    """What the start took from a vCPU it is asked to look up again, and does at once, without the retry check."""
    zap, retry = KvmBase._zap, KvmBase.mmu_invalidate_retry
    asked: set[tuple[KvmBase, int]] = set()
    with inside(Kvm, "invalidate_range_start") as starting:

        def request(self: KvmBase, first: int, last: int) -> None:
            if starting():
                asked.update((self, gfn) for gfn, _ in self.sptes.entries(first, last))
            zap(self, first, last)

        def reload(self: KvmBase, seq: int, gfn: int) -> str:
            if (self, gfn) in asked:
                asked.remove((self, gfn))
                return ""
            return retry(self, seq, gfn)

        with replaced(KvmBase, "_zap", request), replaced(KvmBase, "mmu_invalidate_retry", reload):
            yield


@mutant("count-read-after-seq", "29", "I7", "I4")
def count_read_after_seq() -> Iterator[None]:
    """The retry check reads seq, and the count only later: a range can end between the two."""
    install = KvmBase._install

    def check(self: KvmBase, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        if self.mmu_invalidate_seq != seq:
            self._give_up(gfn, "seq")
            return
        point("mutant.seq_read")
        install(self, slot, gfn, page, self.mmu_invalidate_seq)

    with replaced(KvmBase, "_install", check):
        yield


@mutant("huge-entry-over-small-ones", "11, M20", "I4", "I2", protocol="modern")
def huge_entry_over_small_ones() -> Iterator[None]:
    """A compound page is mapped by a huge entry although the host maps it by small ones, and not all of it."""

    def compound(self: KvmBase, slot: Memslot, gfn: int, pfn: int) -> bool:
        first = gfn & -HUGE_PAGES
        fits = slot.gfn <= first and first + HUGE_PAGES <= slot.gfn_end
        return fits and self.host.is_compound(pfn) and pfn - self.host.compound_head(pfn) == gfn - first

    with replaced(KvmBase, "_maps_huge", compound):
        yield


@mutant("writes-not-passed-on", "M16", "I8", "AssertionError")
def writes_not_passed_on() -> Iterator[None]:
    """The mm does not learn that a page may be written through an entry."""
    install = KvmBase._install_locked

    def quiet(self: KvmBase, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        before = self.host.flags(page.pfn)
        install(self, slot, gfn, page, seq)
        if not before & PG_DIRTY:
            self.host.clear_flags(page.pfn, PG_DIRTY)

    with replaced(KvmBase, "_install_locked", quiet):
        yield


@mutant("use-not-passed-on", "M17", "I9")
def use_not_passed_on() -> Iterator[None]:
    """Entries are aged, and who asked hears that nobody used the page."""
    age = KvmBase._age

    def unused(self: KvmBase, start: int, end: int, reason: str) -> bool:
        age(self, start, end, reason)
        return False

    with replaced(KvmBase, "_age", unused):
        yield


@mutant("reverse-map-of-another-slot", "M22", "I3")
def reverse_map_of_another_slot() -> Iterator[None]:
    """Where several slots show a page, all its entries are looked for at the first slot's guest frames."""
    ranges = Memslots.in_hva_range

    def wrong(self: Memslots, start: int, end: int) -> list[tuple[int, int]]:
        found = ranges(self, start, end)
        return [found[0]] * len(found) if found else found

    with replaced(Memslots, "in_hva_range", wrong):
        yield


@mutant("dirty-log-without-a-flush", "M31", "I12")
def dirty_log_without_a_flush() -> Iterator[None]:
    """The dirty log is handed out when the entries are write-protected, and TLBs are not flushed for it."""
    flush = KvmBase._flush_tlbs

    def skip(self: KvmBase, reason: str) -> None:
        if reason != "dirty_log":
            flush(self, reason)

    with replaced(KvmBase, "_flush_tlbs", skip):
        yield


@mutant("dirty-log-flushed-when-it-is-out", "M31 (late)", "I12")
def dirty_log_flushed_when_it_is_out() -> Iterator[None]:
    """The dirty log is handed out first, and TLBs are flushed then: whoever copies the pages meanwhile is too early."""
    flush = KvmBase._flush_tlbs
    with inside(KvmBase, "get_dirty_log") as reading:

        def skip(self: KvmBase, reason: str) -> None:
            if not reading():
                flush(self, reason)

        def late(self: KvmBase, slot: int) -> bytes:
            dirty = watched(self, slot)
            flush(self, "dirty_log")
            return dirty

        watched = KvmBase.get_dirty_log
        with replaced(KvmBase, "_flush_tlbs", skip), replaced(KvmBase, "get_dirty_log", late):
            yield


@mutant("rights-lowered-afterwards", "16 (rights)", "I4")
def rights_lowered_afterwards() -> Iterator[None]:
    """A page of the process gets an entry with all rights, lowered before the lock is dropped; walkers take no lock."""
    install = KvmBase._install_locked

    def generous(self: KvmBase, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        flags = self.host.flags(page.pfn)
        dirty, ours = flags & PG_DIRTY, flags & PG_ANON
        install(self, slot, gfn, GupPage(page.pfn, True) if ours else page, seq)
        if ours and not page.writable:
            self.host.clear_flags(page.pfn, PG_DIRTY & ~dirty)
            self._write_protect(gfn, gfn + 1)
            self.sptes.clear_bits(gfn, gfn + 1, SPTE_WRITABLE & ~SPTE_READ_ONLY, SPTE_PRESENT)
            self._flush_tlbs("fault")

    with replaced(KvmBase, "_install_locked", generous):
        yield


@mutant("release-runs-once-only", "M26", "InternalError")
def release_runs_once_only() -> Iterator[None]:
    """What a release needs it takes apart, so that a second one, of who unregisters meanwhile, falls over."""
    released: set[KvmBase] = set()
    release = KvmBase._release

    def once(self: KvmBase) -> None:
        if self in released:
            raise InternalError(f"{self.name}: NULL pointer dereference in its second release")
        released.add(self)
        release(self)

    with replaced(KvmBase, "_release", once):
        yield


@mutant("faults-after-release", "M26 (fault)", "I13")
def faults_after_release() -> Iterator[None]:
    """A release removes every entry, and lets faults install new ones: nobody will ever tell of those."""
    release = KvmBase._release

    def forgets(self: KvmBase) -> None:
        release(self)
        self.released = False

    with replaced(KvmBase, "_release", forgets):
        yield
