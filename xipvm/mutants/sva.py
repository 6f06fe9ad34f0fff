"""Faults of shared virtual addressing: what the IOTLB is told of, what it forgets, what is left of a process."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.locks.check import might_sleep
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import WRITE
from xipvm.mmu.secondary.sva import Sva
from xipvm.mmu.tables import GupPage
from xipvm.mutants.mutant import inside, mutant, replaced
from xipvm.notifier import MmuNotifiers

_SEEN = ("I4", "I5", "I11", "AssertionError")


@mutant("sva-single-pages-not-told", "13 (pages)", *_SEEN, protocol="modern")
def single_pages_not_told() -> Iterator[None]:
    """The flush of a single page, as a copy on write has it, is not told to the IOMMU."""
    told = MmuNotifiers.arch_invalidate_secondary_tlbs

    def tell(self: MmuNotifiers, start: int, end: int) -> None:
        if end - start > PAGE_SIZE:
            told(self, start, end)

    with replaced(MmuNotifiers, "arch_invalidate_secondary_tlbs", tell):
        yield


@mutant("sva-batches-not-told", "13 (gather)", *_SEEN, protocol="modern")
def batches_not_told() -> Iterator[None]:
    """The flush of a batch, as munmap has it, is not told to the IOMMU."""
    told = MmuNotifiers.arch_invalidate_secondary_tlbs

    def tell(self: MmuNotifiers, start: int, end: int) -> None:
        if end - start == PAGE_SIZE:
            told(self, start, end)

    with replaced(MmuNotifiers, "arch_invalidate_secondary_tlbs", tell):
        yield


@mutant("sva-protection-not-told", "8 (IOTLB)", *_SEEN, protocol="modern")
def protection_not_told() -> Iterator[None]:
    """What a fork write-protects the device may go on writing."""
    told = MmuNotifiers.arch_invalidate_secondary_tlbs

    with inside(Mm, "fork") as forking:

        def tell(self: MmuNotifiers, start: int, end: int) -> None:
            if not forking():
                told(self, start, end)

        with replaced(MmuNotifiers, "arch_invalidate_secondary_tlbs", tell):
            yield


@mutant("sva-last-page-stays", "M2 (IOTLB)", *_SEEN, protocol="modern")
def last_page_stays() -> Iterator[None]:
    """The last page of what is to be forgotten stays in the IOTLB."""
    forget = Sva.arch_invalidate_secondary_tlbs

    def short(self: Sva, start: int, end: int) -> None:
        if end - start > PAGE_SIZE:
            forget(self, start, end - PAGE_SIZE)

    with replaced(Sva, "arch_invalidate_secondary_tlbs", short):
        yield


@mutant("sva-walk-not-waited-for", "M7 (IOTLB)", *_SEEN, protocol="modern")
def walk_not_waited_for() -> Iterator[None]:
    """An invalidation does not wait for a walk under way, which fills the IOTLB with what it had read before."""
    walk = Sva._walk

    def walked(self: Sva, page: int, access: int) -> GupPage | None:
        seen = None if self.released else self.mm.pgd.gup(page, access == WRITE)
        if seen is None:
            return walk(self, page, access)
        point("mutant.walked")
        self.iotlb[page] = seen
        if self.trace.on:
            rights, hva = "rw" if seen.writable else "r", page << PAGE_SHIFT
            self.trace.emit("iotlb_insert", mm=self.mm.name, hva=hva, pfn=seen.pfn, rights=rights, device=self.name)
        return seen

    with replaced(Sva, "_walk", walked):
        yield


@mutant("sva-writes-by-a-read-entry", "16 (IOTLB)", *_SEEN, protocol="modern")
def writes_by_a_read_entry() -> Iterator[None]:
    """The IOTLB does not look at the right to write."""
    walk = Sva._walk

    def walked(self: Sva, page: int, access: int) -> GupPage | None:
        seen = walk(self, page, 0)
        return None if seen is None else GupPage(seen.pfn, True)

    with replaced(Sva, "_walk", walked):
        yield


@mutant("sva-invalidation-sleeps", "42 (IOTLB)", "lock", protocol="modern")
def invalidation_sleeps() -> Iterator[None]:
    """The IOMMU's driver waits for the hardware where it may not sleep."""
    forget = Sva.arch_invalidate_secondary_tlbs

    def slow(self: Sva, start: int, end: int) -> None:
        might_sleep("waiting for the IOMMU")
        forget(self, start, end)

    with replaced(Sva, "arch_invalidate_secondary_tlbs", slow):
        yield


@mutant("sva-release-keeps-the-iotlb", "M25 (IOTLB)", "I5", protocol="modern")
def release_keeps_the_iotlb() -> Iterator[None]:
    """When the process ends its PASID is taken away, and the IOTLB is left as it is."""

    def release(self: Sva, mm: object) -> None:
        self.released = True

    with replaced(Sva, "release", release):
        yield


@mutant("sva-pasid-outlives-the-process", "6 (PASID)", "I4", "I5", protocol="modern")
def pasid_outlives_the_process() -> Iterator[None]:
    """When the process ends the IOTLB is emptied, and the PASID goes on translating."""

    def release(self: Sva, mm: object) -> None:
        self._forget(0, 1 << 47)

    with replaced(Sva, "release", release):
        yield
