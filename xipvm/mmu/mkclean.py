"""Write-back looks at a page while nobody can write it without being noticed (page_mkclean).

For every shared area that maps the page::

    range start (PROTECTION_PAGE) → entry cleared → TLB flush → same page, clean and read-only → range end

so that a write during or after the write-back faults, and makes the page dirty again for the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.pte import DIRTY, MAPPED, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.vma import Vma


def page_mkclean(file: AddressSpace, pgoff: int, pfn: int) -> None:
    """No shared entry that maps ``pfn`` as page ``pgoff`` of ``file`` is writable or dirty any more."""
    with file.i_mmap.read:
        for area in tuple(file.areas):
            hva = area.address_of(pgoff)
            if area.shared and hva is not None:
                _mkclean_one(area, hva, pfn)


def _mkclean_one(area: Vma, hva: int, pfn: int) -> None:
    mm = area.mm
    protecting = mm.notifiers.around_entry(hva, hva + PAGE_SIZE, RangeEvent.PROTECTION_PAGE)
    with protecting, mm.ptl(hva >> PMD_SHIFT):
        entry = mm.pgd.get(hva >> PAGE_SHIFT)
        if not entry & MAPPED or not entry & (WRITE | DIRTY) or pte_pfn(entry) != pfn:
            return
        mm.ptep_clear_flush_notify(hva)
        mm.set_pte(hva, entry & ~(WRITE | DIRTY))
