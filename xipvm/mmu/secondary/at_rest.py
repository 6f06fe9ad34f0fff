"""What every secondary MMU has to look like when nothing is under way: its view is the host's.

A translation that it holds is the one that the primary page table has now, with no more rights. (That it holds none
says nothing: the next access faults.) Pages that are pinned instead of watched are not looked at here.
"""

from __future__ import annotations

from xipvm.address import PAGE_SHIFT
from xipvm.mmu.pte import PRESENT, WRITE, pte_pfn
from xipvm.mmu.secondary.base import SecondaryMmu


def difference(mmu: SecondaryMmu) -> str:
    """The first translation of ``mmu`` that is not the host's, in words; empty when there is none."""
    for port in mmu.ports():
        for page, hva in port.held():
            seen = port.translate(page)
            if seen is None:
                continue
            entry = port.mm.pgd.pte(hva >> PAGE_SHIFT)
            if not entry & PRESENT or pte_pfn(entry) != seen[0] or (seen[1] and not entry & WRITE):
                return f"{port.name} maps guest frame {page:#x} to {seen}, the host has {entry:#x}"
    return mmu.inconsistency()
