"""Assertions over traces: each holds where it should, fails where it should, and says why on a timeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xipvm.errors import BadInput
from xipvm.trace.expect import TraceLog
from xipvm.trace.funnel import Trace

PAGE = 0x1000
HVA = 0x7000_0000
GFN = 0x100


class Story:
    """A log, and the words to fill it."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.log = TraceLog()
        self.trace.attach(self.log)
        self.emit = self.trace.emit

    def by(self, actor: str) -> Story:
        self.trace.actor = actor
        return self

    def set(self, pfn: int, gfn: int = GFN, vm: str = "vm0") -> None:
        self.emit("spte_set", vm=vm, gfn=gfn, pfn=pfn, rights="rw")

    def zap(self, *pfns: int, start: int = GFN, end: int = GFN + 1, vm: str = "vm0") -> None:
        self.emit("spte_zap", vm=vm, start=start, end=end, pages=[(pfn, 1) for pfn in pfns])

    def free(self, first: int, count: int = 1) -> None:
        self.emit("page_free", pages=[(first, count)])

    def slot(self, pages: int = 4, vm: str = "vm0") -> None:
        self.emit("memslot_set", vm=vm, slot=0, gfn=GFN, pages=pages, hva=HVA, flags=0)

    def start(self, id: int, page: int = 0, pages: int = 1, mm: str = "mm0") -> None:
        lo, hi = HVA + page * PAGE, HVA + (page + pages) * PAGE
        self.emit("mmu_notifier_invalidate_range_start", mm=mm, start=lo, end=hi, event="CLEAR", range=id)

    def end(self, id: int, mm: str = "mm0") -> None:
        self.emit("mmu_notifier_invalidate_range_end", mm=mm, start=HVA, end=HVA + PAGE, event="CLEAR", range=id)

    def clear(self, page: int = 0, mm: str = "mm0") -> None:
        self.emit("pte_clear", mm=mm, start=HVA + page * PAGE, end=HVA + (page + 1) * PAGE, pages=[(1, 1)])


@pytest.fixture
def story() -> Story:
    return Story()


def fails(assertion: Callable[[], object], message: str) -> str:
    """What ``assertion`` says; its first line is ``message``."""
    with pytest.raises(AssertionError) as failed:
        assertion()
    text = str(failed.value)
    assert text.splitlines()[0] == message
    return text


def test_after_needs_an_earlier_partner_for_each_page(story: Story) -> None:
    story.zap(1, 2)
    story.free(1, 2)
    story.log.every("page_free").after("spte_zap", same="pfn")
    story.by("other").free(2, 2)  # frame 3 was never removed
    text = fails(
        lambda: story.log.every("page_free").after("spte_zap", same="pfn"),
        "every page_free after spte_zap of the same pfn: #3 does not",
    )
    assert text.splitlines()[1:] == [
        "  host  other",
        "   *      .    0 #1 host spte_zap vm=vm0 gfn 0x100..0x101 (1 page)"
        " pages pfn 0x1..0x2 (1 page), 0x2..0x3 (1 page)",
        "   .      *    0 #3 other page_free pages pfn 0x2..0x4 (2 pages)  <==",
    ]


def test_after_since_counts_from_the_last_one(story: Story) -> None:
    story.free(1)  # was never set: nothing to remove
    story.set(1)
    story.zap(1)
    story.free(1)
    story.log.every("page_free").after("spte_zap", same="pfn", since="spte_set")
    story.set(1)
    story.free(1)  # the frame's second life: the old removal does not count
    fails(
        lambda: story.log.every("page_free").after("spte_zap", same="pfn", since="spte_set"),
        "every page_free after spte_zap of the same pfn since spte_set: #6 does not",
    )


def test_before_until(story: Story) -> None:
    story.set(1)
    story.zap(1)
    story.free(1)
    story.set(2)
    story.log.every("spte_set").before("spte_zap", same="pfn", until="page_free")  # frame 2 is in use
    fails(
        lambda: story.log.every("spte_set").before("spte_zap", same="pfn"),
        "every spte_set before spte_zap of the same pfn: #4 does not",
    )
    story.free(2)
    story.zap(2)
    story.log.every("spte_set").before("spte_zap", same="pfn")
    fails(
        lambda: story.log.every("spte_set").before("spte_zap", same="pfn", until="page_free"),
        "every spte_set before spte_zap of the same pfn until page_free: #4 does not",
    )


def test_between_pairs_by_range_and_by_page(story: Story) -> None:
    story.start(1, 0)
    story.start(2, 1)
    story.clear(0)
    story.end(1)
    story.clear(1)
    story.end(2)
    story.log.every("pte_clear").between("mmu_notifier_invalidate_range", same="hva")
    story.start(3, 0)
    story.clear(1)  # another page than the one that is open
    story.end(3)
    story.log.every("pte_clear").between("mmu_notifier_invalidate_range")
    text = fails(
        lambda: story.log.every("pte_clear").between("mmu_notifier_invalidate_range", same="hva"),
        "every pte_clear between mmu_notifier_invalidate_range_start and mmu_notifier_invalidate_range_end"
        " of the same hva: #8 does not",
    )
    assert "#2 host mmu_notifier_invalidate_range_start" in text
    assert "#1 host" not in text


def test_between_of_kinds_without_a_range(story: Story) -> None:
    story.set(1)
    story.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=1, rights="rw")
    story.zap(1)
    story.log.every("tlb_insert").between("spte_set", "spte_zap", same="pfn")
    story.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=1, rights="rw")
    fails(
        lambda: story.log.every("tlb_insert").between("spte_set", "spte_zap", same="pfn"),
        "every tlb_insert between spte_set and spte_zap of the same pfn: #4 does not",
    )


def test_the_same_address_in_another_mm_is_another_page(story: Story) -> None:
    story.start(1, mm="mm0")
    story.clear(mm="child")
    story.end(1)
    with pytest.raises(AssertionError):
        story.log.every("pte_clear").between("mmu_notifier_invalidate_range", same="hva")
    story.set(1, vm="vm0")
    story.zap(1, vm="vm1")
    with pytest.raises(AssertionError):
        story.log.every("spte_zap").after("spte_set", same="gfn")
    story.log.every("spte_zap").after("spte_set", same="pfn")


def test_a_guest_frame_is_an_address_by_its_memslot(story: Story) -> None:
    story.slot()
    story.start(1, page=2)
    story.set(7, gfn=GFN + 1)
    story.log.never("spte_set", within="mmu_notifier_invalidate_range", same="hva")
    story.set(7, gfn=GFN + 2)
    text = fails(
        lambda: story.log.never("spte_set", within="mmu_notifier_invalidate_range", same="hva"),
        "never spte_set within mmu_notifier_invalidate_range_start and mmu_notifier_invalidate_range_end"
        " of the same hva: there are 1",
    )
    assert text.splitlines()[2].endswith("event=CLEAR range=1")
    assert story.log.count("spte_set", hva=HVA + 2 * PAGE + 5) == 1
    story.emit("memslot_delete", vm="vm0", slot=0)
    story.set(7, gfn=GFN + 2)
    assert story.log.count("spte_set", hva=HVA + 2 * PAGE) == 1


def test_never(story: Story) -> None:
    story.by("vcpu0").set(1)
    story.log.never("spte_zap")
    story.log.never("spte_set", actor="host")
    story.log.never("spte_set", pfn=2)
    fails(lambda: story.log.never("spte_set", actor="vcpu*"), "never spte_set(actor=vcpu*): there are 1")


def test_count_and_select(story: Story) -> None:
    story.set(1)
    story.by("vcpu1").set(2, GFN + 1)
    story.zap(1, 2, end=GFN + 2)
    log = story.log
    assert log.count("spte_*") == 3
    assert log.count("spte_set", gfn=GFN) == 1
    assert log.count("spte_*", gfn=GFN) == 2
    assert log.count("spte_*", pfn=2, actor="vcpu1") == 2
    assert log.count("spte_set", rights="rw") == 2
    assert log.count("spte_set", pfn=lambda pfn: pfn > 1) == 1
    assert [event.seq for event in log.select("spte_set")] == [1, 2]
    assert (len(log), [event.seq for event in log]) == (3, [1, 2, 3])
    log.clear()
    assert len(log) == 0


def test_order(story: Story) -> None:
    story.zap(1)
    story.set(1)
    story.zap(1)
    story.free(1)
    assert [event.seq for event in story.log.order("spte_set", "spte_zap", "page_free")] == [2, 3, 4]
    fails(
        lambda: story.log.order("page_free", "spte_set"),
        "in order page_free, spte_set: there is no spte_set behind #4 page_free",
    )


def test_same_of_several(story: Story) -> None:
    story.set(1, GFN)
    story.set(2, GFN + 1)
    story.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=1, rights="rw")
    story.log.every("tlb_insert").after("spte_set", same=("gfn", "pfn", "rights"))
    story.emit("tlb_insert", vcpu=0, gfn=GFN, pfn=2, rights="rw")
    story.log.every("tlb_insert").after("spte_set", same="gfn").after("spte_set", same="pfn")
    with pytest.raises(AssertionError, match="of the same gfn and pfn: #4 does not"):
        story.log.every("tlb_insert").after("spte_set", same=("gfn", "pfn"))


def test_about_nothing_nothing_is_said(story: Story) -> None:
    fails(lambda: story.log.every("page_free"), "page_free: 0 of them, at least 1 wanted")
    story.log.every("page_free", at_least=0).after("spte_zap", same="pfn")
    story.free(1)
    fails(lambda: story.log.every("page_free", pfn=2), "page_free(pfn=0x2): 0 of them, at least 1 wanted")


def test_a_typing_error_does_not_hold(story: Story) -> None:
    story.free(1)
    with pytest.raises(BadInput, match="there are no events 'spte_zapp'; there are spte_zap"):
        story.log.never("spte_zapp")
    with pytest.raises(BadInput, match="there are no events 'range_start'"):
        story.log.never("page_free", within="range")
    with pytest.raises(BadInput, match="page_free has no field 'frame'; it has pages"):
        story.log.count("page_free", frame=1)
    with pytest.raises(BadInput, match="page_free names no gfn"):
        story.log.every("page_free").after("spte_zap", same="gfn")


def test_a_long_run_shows_what_is_around_the_first_offence(story: Story) -> None:
    for pfn in range(1, 100):
        story.zap(pfn)
        story.free(pfn)
    story.free(500)
    text = fails(lambda: story.log.never("page_free"), "never page_free: there are 100")
    assert len(text.splitlines()) == 2 + 16 + 1
    assert text.endswith("and 84 more")
    assert "pfn 0x1..0x2" in text


def test_a_timeline_has_a_column_for_each_actor(story: Story) -> None:
    story.set(1)
    story.by("vcpu0").zap(1)
    assert story.log.show(["spte_*"]).splitlines() == [
        "  host  vcpu0",
        "   *      .    0 #1 host spte_set vm=vm0 gfn=0x100 pfn=0x1 rights=rw",
        "   .      *    0 #2 vcpu0 spte_zap vm=vm0 gfn 0x100..0x101 (1 page) pages pfn 0x1..0x2 (1 page)",
    ]
