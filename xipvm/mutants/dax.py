"""Faults of DAX entries of 2 MiB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xipvm.locks.lock import Keyed
from xipvm.mmu import mkclean
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.pte import HUGE
from xipvm.mutants.mutant import mutant, replaced
from xipvm.xip.dax import DaxFile

if TYPE_CHECKING:
    from xipvm.mmu.vma import Vma


@mutant("dax-huge-entry-stays-writable", "D3", "AssertionError", protocol="modern")
def huge_entry_stays_writable() -> Iterator[None]:
    """Write-back makes small entries clean and read-only, huge ones not: what is stored then is never written back."""
    clean = mkclean._clean

    def cleaned(area: Vma, hva: int, entry: int) -> None:
        if not entry & HUGE:
            clean(area, hva, entry)

    with replaced(mkclean, "_clean", cleaned):
        yield


@mutant("dax-huge-hole-stays-mapped", "41", "I16", "AssertionError", protocol="modern")
def huge_hole_stays_mapped() -> Iterator[None]:
    """A page of a huge hole gets a block, and nobody unmaps the huge zero page."""

    def forget(self: DaxFile, first: int) -> None:
        self._drop(range(first, first + HUGE_PAGES))
        self.huge.discard(first)

    with replaced(DaxFile, "_forget_huge_hole", forget):
        yield


@mutant("dax-huge-entry-over-small-ones", "D4", "I16", "AssertionError", protocol="modern")
def huge_entry_over_small_ones() -> Iterator[None]:
    """A fault that wants 2 MiB does not look whether pages of them are mapped as small holes already."""

    def grab(self: DaxFile, first: int) -> Keyed:
        self.huge.add(first)
        return self._locked(first)

    with replaced(DaxFile, "_grab_huge", grab):
        yield


@mutant("dax-huge-entry-has-many-locks", "D5", "AssertionError", protocol="modern")
def huge_entry_has_many_locks() -> Iterator[None]:
    """Who works on a page of a huge entry locks that page, and not the entry, which others are at work on."""
    with replaced(DaxFile, "_locked", lambda self, pgoff: self.entry_lock(pgoff)):
        yield
