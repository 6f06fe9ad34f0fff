"""The oracle over TLBs that have no table behind them: chiplets filled by drop-ins, IOTLBs that follow the host's."""

from __future__ import annotations

import pytest

from tests.check.test_oracle import GFN, HVA, OTHER, PAGE, PFN, Story


@pytest.fixture
def story() -> Story:
    return Story()


def dropin(story: Story, chiplet: int = 0, pfn: int = PFN, rights: str = "rwx") -> None:
    story.emit("tlb_dropin", vm="vm0", chiplet=chiplet, gfn=GFN, pfn=pfn, rights=rights)


def test_a_dropin_while_a_range_is_open(story: Story) -> None:
    story.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=HVA, end=HVA + PAGE, event="CLEAR", range=1)
    story.trace.actor = "gru0"
    dropin(story)
    assert story.broken() == [], "the start is still telling"
    story.trace.actor = "host"
    story.emit("mm_madvise", mm="mm0", start=HVA, end=HVA + PAGE, advice="DONTNEED")
    dropin(story, 1)
    assert story.broken() == ["I2"]


@pytest.mark.parametrize(("pfn", "rights"), [(OTHER, "rx"), (OTHER, "rwx")])
def test_a_dropin_of_another_page(story: Story, pfn: int, rights: str) -> None:
    dropin(story, pfn=pfn, rights=rights)
    assert story.broken() == ["I4"]


def test_each_chiplet_has_to_be_invalidated(story: Story) -> None:
    dropin(story, 0)
    dropin(story, 1)
    assert story.broken() == []
    story.emit("tlb_invalidate", vm="vm0", chiplet=0, start=GFN, end=GFN + 1, pages=[(PFN, 1)])
    assert PFN in story.oracle.world.holders
    story.free(PFN)
    assert "I5" in story.broken()
    assert "vm0 maps guest frame" in story.oracle.violations[-1].message


def test_a_translation_that_no_chiplet_gave(story: Story) -> None:
    story.emit("tlb_insert", vcpu=3, gfn=GFN + 7, pfn=PFN, rights="rx")
    assert story.broken() == ["I10"]


def iotlb(story: Story, pfn: int, rights: str = "rw") -> None:
    story.emit("iotlb_insert", mm="mm0", hva=HVA, pfn=pfn, rights=rights, device="sva0")


def test_an_iommu_finds_what_the_host_s_table_has(story: Story) -> None:
    iotlb(story, PFN)
    assert story.broken() == []
    iotlb(story, OTHER)
    assert story.broken() == ["I4"]
    assert "sva0 gets frame" in story.oracle.violations[0].message


def test_an_iotlb_has_forgotten_when_it_says_so(story: Story) -> None:
    iotlb(story, PFN)
    span = {"mm": "mm0", "start": HVA, "end": HVA + PAGE}
    story.emit("mmu_notifier_arch_invalidate_secondary_tlbs", **span)
    assert PFN in story.oracle.world.holders
    story.emit("iotlb_drop", **span, device="sva0")
    assert story.broken() == []


def test_a_copy_while_an_iotlb_reads_the_old_page(story: Story) -> None:
    iotlb(story, PFN)
    story.emit("mm_cow", mm="mm0", hva=HVA, old=PFN, new=OTHER)
    assert story.broken() == ["I11"]
