"""Faults in the protocol of 2008, where single pages are told of when they have gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xipvm.actors import point
from xipvm.address import PAGE_MASK
from xipvm.mmu import unmap
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.kvm_2008 import Kvm2008
from xipvm.mutants.mutant import inside, mutant, replaced


@mutant("page-told-of-when-it-is-put", "1 (2008)", "I1", protocol="2008")
def page_told_of_when_it_is_put() -> Iterator[None]:
    """invalidate_page comes when the reference of the entry is dropped, outside of the page-table lock."""
    notify = Mm.ptep_clear_flush_notify
    with inside(unmap, "_unmap_one") as unmapping:
        unmap_one = unmap.__dict__["_unmap_one"]

        def clear(self: Mm, hva: int) -> None:
            if unmapping():
                self.clear_flush(hva)
            else:
                notify(self, hva)

        def told_late(area: Any, hva: int, pfn: int, replacement: Any) -> bool:
            gone: bool = unmap_one(area, hva, pfn, replacement)
            point("mutant.put")
            area.mm.notifiers.invalidate_page(hva & PAGE_MASK)
            return gone

        with replaced(Mm, "ptep_clear_flush_notify", clear), replaced(unmap, "_unmap_one", told_late):
            yield


@mutant("seq-after-count-2008", "M11 (2008)", "I7", "I4", protocol="2008")
def seq_after_count_2008() -> Iterator[None]:
    """At the end of a range the count is lowered first, and the sequence number raised later, without the lock."""

    def end(self: Kvm2008, mm: Any, start: int, end: int) -> None:
        self.mmu_invalidate_in_progress -= 1
        point("mutant.count_lowered")
        self.mmu_invalidate_seq += 1

    with replaced(Kvm2008, "invalidate_range_end", end):
        yield
