"""Faults of DMA engines that pin nothing: accesses that are under way, writes that nobody hears of, refusals."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mutants.mutant import inside, mutant, replaced
from xipvm.notifier import IntervalTree


@mutant("dma-not-waited-for", "15", "I10", "I5", protocol="modern")
def dma_not_waited_for() -> Iterator[None]:
    """A driver clears its device's entries and goes on: the hardware is still at work with what it has read of them."""
    with replaced(OdpUmem, "wait_for_hardware", lambda self, start, end: None):
        yield


@mutant("dma-writes-unnoticed", "M16 (dma)", "I8", "AssertionError", protocol="modern")
def dma_writes_unnoticed() -> Iterator[None]:
    """What a device may have written to is not marked dirty when it is unmapped."""

    def unmap(self: OdpUmem, start: int, end: int) -> None:
        gone = [page for page in self.dma if start <= page < end]
        for page in gone:
            del self.dma[page]
        self.zapped(start, end)
        self.wait_for_hardware(start, end)

    with replaced(OdpUmem, "_unmap", unmap):
        yield


@mutant("declined-interval-stays-counted", "4 (interval)", "deadlock", "livelock", protocol="modern")
def declined_interval_stays_counted() -> Iterator[None]:
    """A range that an interval notifier declines is never ended for the others: their readers wait for ever."""
    end = IntervalTree.end
    with inside(IntervalTree, "start") as starting:

        def unless_declined(self: IntervalTree) -> None:
            if not starting():
                end(self)

        with replaced(IntervalTree, "end", unless_declined):
            yield
