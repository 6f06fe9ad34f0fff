"""What the oracle says of who pins its pages: they may stay until the end has returned, and not without a pin."""

from __future__ import annotations

import pytest

from xipvm.check import Oracle
from xipvm.trace.funnel import Trace

HVA, GFN, PFN = 0x7000_0000, 5, 0x10
PAGE = 0x1000


class Story:
    def __init__(self) -> None:
        self.trace = Trace()
        self.oracle = Oracle()
        self.trace.attach(self.oracle)
        self.emit = self.trace.emit
        self.emit("page_alloc", pfn=PFN)
        self.emit("pte_set", mm="mm0", hva=HVA, pfn=PFN, flags=0x63)
        self.emit("mmu_notifier_register", mm="mm0", notifier="xpmem0", protocol="modern")
        self.emit("memslot_set", vm="xpmem0", slot=0, gfn=GFN, pages=1, hva=HVA, flags=0)

    def grant(self, *, pin: bool = True) -> None:
        if pin:
            self.emit("page_pin", vm="xpmem0", gfn=GFN, pfn=PFN)
        self.emit("spte_set", vm="xpmem0", gfn=GFN, pfn=PFN, rights="r")
        self.emit("device_tlb_insert", mm="mm0", hva=HVA, pfn=PFN, rights="r", device="node0")

    def start(self) -> int:
        return self.emit(
            "mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1
        )

    def end(self) -> int:
        return self.emit(
            "mmu_notifier_invalidate_range_end", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1
        )

    def clear(self) -> None:
        self.emit("pte_clear", mm="mm0", start=HVA, end=HVA + PAGE, pages=[(PFN, 1)])

    def recall(self, *, wait: bool = True) -> None:
        self.emit("xpmem_recall", vm="xpmem0", start=GFN, end=GFN + 1, node="node0", wait=wait)

    def dropped(self, *, node: bool = True) -> None:
        if node:
            self.emit("device_tlb_drop", mm="mm0", start=HVA, end=HVA + PAGE, device="node0")
        self.emit("spte_zap", vm="xpmem0", start=GFN, end=GFN + 1, pages=[(PFN, 1)])
        self.emit("page_unpin", vm="xpmem0", gfn=GFN, pfn=PFN)

    def free(self) -> None:
        self.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
        self.emit("page_free", pages=[(PFN, 1)])

    def broken(self) -> list[str]:
        self.oracle.finish()
        return [violation.invariant for violation in self.oracle.violations]


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_pinned_page_may_stay_until_the_end_has_returned(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    with story.trace.because(story.end()):
        story.recall()
        story.dropped()
    story.free()
    assert story.broken() == []


def test_but_no_longer(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    story.end()
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
    assert story.broken() == ["I3"]
    assert "range 1 has ended" in story.oracle.violations[0].message


def test_also_when_nothing_comes_behind_it(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    story.end()
    assert story.broken() == ["I3"]


def test_without_a_pin_it_had_to_go_at_the_start(story: Story) -> None:
    story.grant(pin=False)
    story.start()
    story.clear()
    story.end()
    assert story.broken() == ["I3"]
    assert "was not removed" in story.oracle.violations[0].message


def test_who_lets_go_of_it_first_is_told(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    with story.trace.because(story.end()):
        story.emit("page_unpin", vm="xpmem0", gfn=GFN, pfn=PFN)
        assert [violation.invariant for violation in story.oracle.violations] == ["I3"]


def test_a_grant_inside_the_range_is_no_error(story: Story) -> None:
    story.start()
    story.grant()
    story.clear()
    with story.trace.because(story.end()):
        story.dropped()
    assert story.broken() == []


def test_where_nobody_may_wait_it_may_stay(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    with story.trace.because(story.end()):
        story.recall(wait=False)
    story.emit("primary_tlb_flush", mm="mm0", start=HVA, end=HVA + PAGE)
    story.dropped()
    story.emit("page_free", pages=[(PFN, 1)])
    assert story.broken() == []


def test_a_node_that_lies_is_seen_when_the_frame_goes(story: Story) -> None:
    story.grant()
    story.start()
    story.clear()
    with story.trace.because(story.end()):
        story.recall()
        story.dropped(node=False)
    story.free()
    assert story.broken() == ["I5"]
    assert "node0 on mm0" in story.oracle.violations[0].message
