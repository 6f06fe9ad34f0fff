"""Taking a page out of every entry that maps it, wherever that is: what migration and reclaim begin with.

For each entry that the reverse map finds::

    range start (CLEAR, the one page) → entry cleared → TLB flush → entry that says where the page is → mapcount and
    reference of the entry dropped → range end

The caller holds a reference of its own, so the frame outlives its last entry, and it names what takes the place of an
entry. Nothing is assumed across a range start, which is a schedule point: the entry is looked at again behind it, and
when all that were found are done, the walk begins anew, until it finds none. While it goes on, a fault may map the page
again only by way of the entry that was left; a caller that must know that nobody has the page any more compares the
reference count afterwards. (2008: no range; the notifiers are told of the page behind the TLB flush.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.locks.check import sleep_until
from xipvm.mmu.frames import PG_DIRTY, PG_REFERENCED, HostMemory
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DIRTY,
    EXCLUSIVE,
    MAPPED,
    MIGRATION,
    PFN_SHIFT,
    SOFT_DIRTY,
    SWAP,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT, reverse_map
from xipvm.mmu.uffd_wp import uses_markers
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma

Replacement = Callable[["Vma", int], int | None]
"""What takes the place of an entry of an area; 0 for an empty one, None to leave the entry as it was."""

_MOVES: Final = WRITE | ACCESSED | DIRTY | SOFT_DIRTY | ANON | EXCLUSIVE | UFFD_WP


def migration_entry(area: Vma, entry: int) -> int:
    """What stands for ``entry`` while its page is moved."""
    return MIGRATION | pte_pfn(entry) << PFN_SHIFT | entry & _MOVES


def try_to_migrate(host: HostMemory, pfn: int) -> bool:
    """Replaces all entries of ``pfn`` by migration entries; whether none maps it now. The caller holds a reference."""
    return unmap_all(host, pfn, migration_entry)


def unmap_all(host: HostMemory, pfn: int, replacement: Replacement, *, skip: int = 0) -> bool:
    """Replaces all entries of ``pfn``, but those of areas with a flag of ``skip``; whether none maps it now.

    Ends when ``replacement`` declines. The caller holds a reference, and has locked the page.
    """
    rmap = reverse_map(host)
    with rmap.walk_lock(host, pfn):
        while True:
            found = [place for place in rmap.walk(host, pfn) if not place[0].flags & skip]
            if not found:
                return host.mapcount(pfn) == 0
            for area, hva in found:
                with rmap.place_lock(host, pfn, area):
                    # Others may have run: a place of a page that KSM shares can have gone before its lock was taken.
                    there = area.start <= hva < area.end and (area.anon_vma is not None or area.file is not None)
                    if there and not area.flags & skip and not _unmap_one(area, hva, pfn, replacement):
                        return False


def _unmap_one(area: Vma, hva: int, pfn: int, replacement: Replacement) -> bool:
    """False when ``replacement`` has declined, or in 2008 somebody has used the page a moment ago."""
    mm = area.mm
    host, page = mm.host, hva >> PAGE_SHIFT
    with mm.notifiers.around_entry(hva, hva + PAGE_SIZE, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
        entry = mm.pgd.get(page)
        if not entry & MAPPED or pte_pfn(entry) != pfn:
            return True
        if mm.notifiers.unmap_asks_young and replacement is not migration_entry:
            if mm.ptep_clear_flush_young_notify(hva):
                return False
            entry = mm.pgd.get(page)
        mm.ptep_clear_flush_notify(hva)
        if entry & DIRTY:
            host.set_flags(pfn, PG_DIRTY)
        if entry & ACCESSED:
            host.set_flags(pfn, PG_REFERENCED)
        new = replacement(area, entry)
        if new is None:
            mm.set_pte(hva, entry)
            return False
        if not new and entry & UFFD_WP and uses_markers(area) and area.file is not None:
            new = UFFD_WP
        if new:
            set_nonpresent(mm, hva, new)
        host.add_mapcount(pfn, -1)
        host.put(pfn)
    return True


def set_nonpresent(mm: Mm, hva: int, entry: int) -> None:
    """Writes a swap or migration entry, or a marker."""
    mm.pgd.set(hva >> PAGE_SHIFT, entry)
    if mm.trace.on:
        kind = "swap" if entry & SWAP else "migration" if entry & MIGRATION else "uffd-wp"
        mm.trace.emit("pte_nonpresent", mm=mm.name, hva=hva, entry=kind, value=pte_pfn(entry))


def migration_entry_wait(mm: Mm, hva: int, entry: int) -> None:
    """Returns when ``entry``, a migration entry, is not there any more. Raises MmError EDEADLK."""
    page = hva >> PAGE_SHIFT
    sleep_until(
        "migration_entry_wait",
        lambda: mm.pgd.get(page) != entry,
        because=f"the page at {hva:#x} in {mm.name} is being migrated, and nobody goes on with it",
        label="mm.migration_entry_wait",
    )
