"""Every invariant is broken here by events that break it, and by nothing that merely looks like it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from xipvm.check import INVARIANTS, Oracle, rules
from xipvm.errors import BadInput
from xipvm.trace import Event, Trace

PAGE = 0x1000
HVA = 0x7000_0000
PFN, OTHER = 0x20, 0x21
GFN = 0x40000
READ, WRITE = 1, 3
"""Flags of a primary entry: present, and writable as well."""


class Story:
    """An mm with one page, behind one guest frame of vm0 that vcpu0 has in its TLB; then whatever a test tells."""

    def __init__(self, invariants: tuple[str, ...] = tuple(INVARIANTS), protocol: str = "modern") -> None:
        self.trace = Trace()
        self.oracle = Oracle(invariants)
        self.trace.attach(self.oracle)
        self.emit = self.trace.emit
        self.emit("mmu_notifier_register", mm="mm0", notifier="vm0", protocol=protocol)
        self.emit("memslot_set", vm="vm0", slot=0, gfn=GFN, pages=16, hva=HVA, flags=0)
        self.emit("page_alloc", pfn=PFN)
        self.set_pte(PFN)
        self.set_spte(PFN)
        self.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=PFN, rights="rw")

    def set_pte(self, pfn: int, flags: int = WRITE, page: int = 0) -> None:
        self.emit("pte_set", mm="mm0", hva=HVA + page * PAGE, pfn=pfn, flags=flags)

    def set_spte(self, pfn: int, rights: str = "rwx", page: int = 0) -> None:
        self.emit("spte_set", vm="vm0", gfn=GFN + page, pfn=pfn, rights=rights)

    def clear(self, pfn: int = PFN) -> None:
        self.emit("pte_clear", mm="mm0", start=HVA, end=HVA + PAGE, pages=[(pfn, 1)])

    def start(self, id: int = 1, pages: int = 1) -> None:
        """A start that has returned: its actor goes on with something else."""
        end = HVA + pages * PAGE
        self.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=end, event="CLEAR", range=id)
        self.emit("host_access", mm="mm0", hva=0, access="read", thread="t")

    def end(self, id: int = 1) -> None:
        end = HVA + PAGE
        self.emit("mmu_notifier_invalidate_range_end", mm="mm0", start=HVA, end=end, event="CLEAR", range=id)

    def zap(self) -> None:
        self.emit("spte_zap", vm="vm0", start=GFN, end=GFN + 1, pages=[(PFN, 1)])

    def flush(self) -> None:
        self.emit("tlb_flush", vcpu=0, reason="mmu_notifier")

    def free(self, pfn: int = PFN) -> None:
        self.emit("page_free", pages=[(pfn, 1)])

    def broken(self) -> list[str]:
        return [violation.invariant for violation in self.oracle.violations]


@pytest.fixture
def story() -> Iterator[Story]:
    told = Story()
    assert told.broken() == []
    yield told
    for violation in told.oracle.violations:
        assert violation.history[-1] is violation.event
        assert violation.render().startswith(f"{violation.invariant} broken at event #{violation.event.seq}: ")


def test_the_right_order_is_not_flagged(story: Story) -> None:
    story.start()
    story.zap()
    story.flush()
    story.clear()
    story.end()
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
    story.free()
    story.oracle.finish()
    assert story.broken() == []
    assert {name for name, count in story.oracle.checks.items() if count} >= {"I1", "I3", "I4", "I5", "I6", "I10"}


def test_a_change_that_nobody_was_told_of(story: Story) -> None:
    story.zap()
    story.flush()
    story.clear()
    assert story.broken() == ["I1"]


def test_a_change_beside_the_range(story: Story) -> None:
    story.set_pte(OTHER, page=1)
    story.start()
    story.emit("pte_clear", mm="mm0", start=HVA + PAGE, end=HVA + 2 * PAGE, pages=[(OTHER, 1)])
    assert story.broken() == ["I1"]


def test_more_rights_need_no_range(story: Story) -> None:
    story.set_pte(OTHER, READ, page=1)
    story.set_pte(OTHER, WRITE, page=1)
    assert story.broken() == []


def test_without_notifiers_nobody_has_to_be_told(story: Story) -> None:
    story.zap()
    story.flush()
    story.emit("mmu_notifier_unregister", mm="mm0", notifier="vm0")
    story.clear()
    story.free()
    assert story.broken() == []


def test_a_shadow_entry_that_stays(story: Story) -> None:
    story.start()
    story.flush()
    story.clear()
    assert story.broken() == ["I3"]


def test_a_shadow_entry_that_stays_writable(story: Story) -> None:
    story.start()
    story.emit("pte_protect", mm="mm0", start=HVA, end=HVA + PAGE, flags=READ)
    assert story.broken() == ["I3", "I10"]


def test_write_protection_is_enough_for_that(story: Story) -> None:
    story.start()
    story.emit("spte_protect", vm="vm0", start=GFN, end=GFN + 1)
    story.flush()
    story.emit("pte_protect", mm="mm0", start=HVA, end=HVA + PAGE, flags=READ)
    story.end()
    assert story.broken() == []


def test_an_entry_installed_inside_of_the_range(story: Story) -> None:
    story.start()
    story.zap()
    story.flush()
    story.set_spte(PFN)
    assert story.broken() == ["I2"]
    story.clear()
    assert story.broken() == ["I2", "I2"], "and it is what goes wrong when the entry changes"


def test_an_entry_installed_while_the_start_is_still_telling(story: Story) -> None:
    seq = story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1)
    with story.trace.because(seq):
        story.set_spte(PFN)
    assert story.broken() == [], "whoever is told will remove it"


def test_a_flush_that_was_forgotten(story: Story) -> None:
    story.start()
    story.zap()
    story.clear()
    assert story.broken() == ["I10"]


def test_a_tlb_that_knows_what_no_entry_says(story: Story) -> None:
    story.zap()
    story.flush()
    story.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=PFN, rights="rx")
    assert story.broken() == ["I10"]


@pytest.mark.parametrize(("pfn", "rights"), [(OTHER, "rx"), (PFN, "rwx")])
def test_an_entry_that_is_not_the_host_s(story: Story, pfn: int, rights: str) -> None:
    story.set_pte(PFN, READ, page=1)
    story.set_spte(pfn, rights, page=1)
    assert story.broken() == ["I4"]


def test_an_entry_of_nothing(story: Story) -> None:
    story.set_spte(OTHER, page=2)
    assert story.broken() == ["I4"]


def test_a_frame_freed_under_a_shadow_entry(story: Story) -> None:
    story.flush()
    story.free()
    assert story.broken() == ["I5"]
    assert "vm0 maps guest frame 0x40000" in story.oracle.violations[0].message


def test_a_frame_freed_under_a_tlb(story: Story) -> None:
    story.zap()
    story.free()
    assert story.broken() == ["I5"]
    assert "vcpu0 has guest frame 0x40000 in its TLB" in story.oracle.violations[0].message


def test_a_frame_freed_under_a_host_s_tlb(story: Story) -> None:
    story.emit("host_tlb_insert", mm="mm0", hva=HVA + PAGE, pfn=OTHER, rights="r", thread="thread0")
    story.free(OTHER)
    assert story.broken() == ["I5"]
    assert "thread0 of mm0" in story.oracle.violations[0].message


def test_a_frame_freed_twice(story: Story) -> None:
    story.free(OTHER)
    story.emit("page_alloc", pfn=OTHER)
    story.free(OTHER)
    assert story.broken() == []
    story.free(OTHER)
    assert story.broken() == ["I5"]


def test_ranges_of_two_mms_may_have_one_number(story: Story) -> None:
    story.start(1)
    other = {"mm": "mm1", "start": HVA, "end": HVA + PAGE, "event": "CLEAR", "range": 1}
    story.emit("mmu_notifier_invalidate_range_start", **other)
    story.emit("mmu_notifier_invalidate_range_end", **other)
    story.zap()
    story.flush()
    story.end(1)
    story.oracle.finish()
    assert story.broken() == []


def test_ranges_that_do_not_pair(story: Story) -> None:
    story.end(7)
    assert story.broken() == ["I6"]
    story.start(8)
    story.start(8)
    assert story.broken() == ["I6", "I6"]
    story.oracle.finish()
    assert story.broken() == ["I6", "I6", "I6"]


def test_a_copy_written_while_the_old_page_is_read(story: Story) -> None:
    story.emit("host_tlb_insert", mm="mm0", hva=HVA, pfn=PFN, rights="r", thread="thread0")
    story.start()
    story.zap()
    story.flush()
    story.clear()
    story.set_pte(OTHER)
    story.emit("mm_cow", mm="mm0", hva=HVA, old=PFN, new=OTHER)
    assert story.broken() == ["I11"]


def test_a_page_of_swap_that_was_not_saved(story: Story) -> None:
    swap = {"mm": "mm0", "hva": HVA, "entry": "swap", "value": 1}
    story.start()
    story.zap()
    story.flush()
    story.clear()
    story.emit("pte_nonpresent", **swap)
    story.end()
    story.free()
    assert story.broken() == ["I8"], "the guest could write to it, and nobody saved it"


@pytest.mark.parametrize("saved", [True, False])
def test_a_page_of_swap_that_was_saved_or_given_up(story: Story, saved: bool) -> None:
    story.start()
    story.zap()
    story.flush()
    story.clear()
    story.emit("pte_nonpresent", mm="mm0", hva=HVA, entry="swap", value=1)
    if saved:
        story.emit("swap_out", pfn=PFN, slot=1)
    else:
        story.emit("vma_unmap", mm="mm0", start=HVA, end=HVA + PAGE)
    story.free()
    assert story.broken() == []


@pytest.mark.parametrize("how", ["clear_flush_young", "clear_young"])
def test_a_use_that_nobody_is_told_of(story: Story, how: str) -> None:
    asked = {"mm": "mm0", "start": HVA, "end": HVA + PAGE}
    story.emit("spte_age", vm="vm0", start=GFN, end=GFN + 1)
    story.emit(f"mmu_notifier_{how}", **asked, young=True)
    story.emit(f"mmu_notifier_{how}", **asked, young=False)
    assert story.broken() == [], "told once, and not used since"
    story.set_spte(PFN)
    story.emit("spte_age", vm="vm0", start=GFN, end=GFN + 1)
    story.emit(f"mmu_notifier_{how}", **asked, young=False)
    assert story.broken() == ["I9"]


def test_a_use_that_nobody_looks_for(story: Story) -> None:
    story.emit("mmu_notifier_test_young", mm="mm0", address=HVA, young=False)
    assert story.broken() == ["I9"]


def test_a_use_that_is_forgotten_before_somebody_asks(story: Story) -> None:
    seq = story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1)
    with story.trace.because(seq):
        story.zap()
        story.flush()
    story.emit("mmu_notifier_clear_flush_young", mm="mm0", start=HVA, end=HVA + PAGE, young=False)
    assert story.broken() == ["I9"]


def test_an_install_of_an_operation_inside_a_callback_of_the_start(story: Story) -> None:
    """The start has not returned: who installs the entry is told of the range later."""
    seq = story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1)
    with story.trace.because(seq):
        with story.trace.because(story.emit("storm", operation="second-vm", where="kvm.invalidate.counted")):
            story.set_spte(PFN)
        story.zap()
        story.flush()
    assert story.broken() == []
    story.set_spte(PFN)
    assert story.broken() == ["I2"]


def test_a_use_that_another_operation_had_forgotten(story: Story) -> None:
    """Reclaim works inside an allocation that some operation makes while its range is open."""
    seq = story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1)
    with story.trace.because(seq):
        story.zap()
        story.flush()
    with story.trace.because(story.emit("storm", operation="reclaim", where="notifier.range_start.done")):
        story.emit("mmu_notifier_clear_flush_young", mm="mm0", start=HVA, end=HVA + PAGE, young=False)
    story.end()
    assert story.broken() == []


def test_a_dirty_log_while_a_tlb_still_writes(story: Story) -> None:
    story.emit("dirty_log", vm="vm0", slot=0)
    assert story.broken() == [], "an entry that may be written was told of when it became so"
    story.emit("spte_protect", vm="vm0", start=GFN, end=GFN + 1)
    story.emit("dirty_log", vm="vm0", slot=0)
    assert story.broken() == ["I12"]
    story.flush()
    story.emit("dirty_log", vm="vm0", slot=0)
    assert story.broken() == ["I12"]


def test_a_device_that_follows_the_host_s_tlbs(story: Story) -> None:
    story.emit("device_tlb_insert", mm="mm0", hva=HVA + PAGE, pfn=OTHER, rights="rw", device="sva0")
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + 2 * PAGE)
    story.free(OTHER)
    assert story.broken() == ["I5"], "nobody told the device"
    assert "sva0 on mm0" in story.oracle.violations[0].message
    story.emit("mmu_notifier_arch_invalidate_secondary_tlbs", mm="mm0", start=HVA, end=HVA + 2 * PAGE)
    assert OTHER not in story.oracle.world.holders


def test_a_notifier_that_goes_on_after_its_time(story: Story) -> None:
    story.emit("mmu_notifier_release", mm="mm0", notifier="vm0")
    story.set_spte(PFN)
    assert story.broken() == ["I13"]


def test_2008_tells_of_a_page_behind_its_flush() -> None:
    story = Story(protocol="2008")
    story.clear()
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
    seq = story.emit("mmu_notifier_invalidate_page", mm="mm0", address=HVA)
    with story.trace.because(seq):
        story.zap()
        story.flush()
    story.free()
    story.oracle.finish()
    assert story.broken() == []


def test_2008_and_nobody_is_told_of_the_page() -> None:
    story = Story(protocol="2008")
    story.clear()
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
    assert story.broken() == []
    story.set_pte(OTHER)
    assert story.broken() == ["I1"]


def test_2008_and_the_run_ends_before_anybody_is_told() -> None:
    story = Story(protocol="2008")
    story.clear()
    story.oracle.finish()
    assert story.broken() == ["I1"]


def test_2008_and_who_is_told_does_nothing() -> None:
    story = Story(protocol="2008")
    story.clear()
    seq = story.emit("mmu_notifier_invalidate_page", mm="mm0", address=HVA)
    with story.trace.because(seq):
        story.emit("host_access", mm="mm0", hva=0, access="read", thread="t")
    assert story.broken() == []
    story.emit("host_access", mm="mm0", hva=0, access="read", thread="t")
    assert story.broken() == ["I3", "I10"]


def test_huge_entries_are_many() -> None:
    story = Story()
    story.emit("page_alloc_huge", pages=[(0x200, 512)])
    base = 0x9000_0000
    story.emit("memslot_set", vm="vm0", slot=1, gfn=0x80000, pages=512, hva=base, flags=0)
    story.emit("pte_set", mm="mm0", hva=base, pfn=0x200, flags=WRITE | 1 << 7)
    story.emit("spte_set_huge", vm="vm0", gfn=0x80000, pages=512, pfn=0x200, rights="rwx")
    assert story.broken() == []
    story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=base, end=base + PAGE, event="CLEAR", range=1)
    story.emit("pmd_split", mm="mm0", start=base, end=base + 512 * PAGE, pfn=0x200, flags=WRITE)
    assert story.broken() == [], "the same pages with the same rights"
    story.emit("pte_clear", mm="mm0", start=base, end=base + PAGE, pages=[(0x200, 1)])
    assert story.broken() == ["I3"]
    story.emit("page_free", pages=[(0x201, 1)])
    assert story.broken() == ["I3", "I5"]
    story.emit("spte_zap", vm="vm0", start=0x80000 + 511, end=0x80000 + 600, pages=[(0x200, 512)])
    assert set(story.oracle.world.vms["vm0"].sptes) == {GFN}, "they go as a whole"


def test_only_the_chosen_invariants_count() -> None:
    story = Story(("I3",))
    story.clear()
    assert story.broken() == ["I3"]
    with pytest.raises(BadInput, match="no invariant is called 'I99'"):
        Oracle(("I99",))


def test_what_it_keeps_is_what_is_mapped(story: Story) -> None:
    story.start()
    story.zap()
    story.flush()
    story.clear()
    story.end()
    world = story.oracle.world
    assert not world.holders
    assert not world.open
    assert not world.mms["mm0"].entries
    assert not world.vms["vm0"].sptes


def test_rules_of_other_modules_are_asked_behind_the_oracle_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rule:
        def __init__(self, oracle: Oracle) -> None:
            self.oracle = oracle
            oracle.on("spte_set", self.installed)
            oracle.on("spte_set", self.late, since_range=True)

        def installed(self, event: Event, fields: dict[str, Any]) -> None:
            seen.append(("installed", event.seq, self.oracle.world.vms["vm0"].sptes[fields["gfn"]].pfn))

        def late(self, event: Event, fields: dict[str, Any]) -> None:
            self.oracle.broken("I4", "late", event, gfn=fields["gfn"])

        def finish(self) -> None:
            seen.append("finish")

    seen: list[object] = []
    monkeypatch.setattr(rules, "RULES", [Rule])
    story = Story()
    assert seen == [("installed", 5, PFN)]
    with story.trace.because(story.trace.seq):
        story.set_spte(PFN)
        assert story.broken() == []
        story.start()
        story.end()
        story.set_spte(PFN)
    assert [violation.message for violation in story.oracle.violations] == ["late"]
    story.oracle.finish()
    assert seen[-1] == "finish"
