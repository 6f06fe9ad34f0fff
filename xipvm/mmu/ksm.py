"""KSM: equal anonymous pages of areas that allow it (MADV_MERGEABLE) become one page, which nobody may write.

For a page that has been the same in two scans, and an equal one elsewhere::

    write-protect:  range start (CLEAR, the one page) → entry cleared → TLB flush → any reference that is neither an
                    entry's nor ours? then the old entry back → entry without WRITE → range end
    compare, now that nobody can write
    replace:        range start → entry still that one? cleared → TLB flush → read-only entry of the shared page →
                    range end → the page's reference put

The first page of a kind is only write-protected: it becomes the shared page, which knows by a root of its own
(``KsmRoot``) all places that map it. KSM has no reference to it: it goes with its last entry. A write copies it as
any shared page, even where it has one entry left. MADV_UNMERGEABLE copies every merged page back (a CLEAR range each);
the copies are exclusive, but not writable before the first write.

A part of a huge page is merged if the page can be split, which announces all of it. Pages in the swap cache are left
out. Scans go by mm, area and address, so that what happens follows from the state
alone. mremap takes merged pages along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from zlib import crc32

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.cow import wp_page_copy
from xipvm.mmu.device_private import PG_COHERENT
from xipvm.mmu.frames import HUGE_PAGES, PG_DIRTY, PG_KSM, PG_SWAPCACHE, HostMemory
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DIRTY,
    EXCLUSIVE,
    HUGE,
    MAPPED,
    PFN_SHIFT,
    PRESENT,
    SOFT_DIRTY,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT, KsmRoot, reverse_map
from xipvm.mmu.vma import VM_HUGETLB, VM_MERGEABLE, VM_MIXEDMAP, VM_SHARED
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

UNFIT: Final = VM_SHARED | VM_HUGETLB | VM_MIXEDMAP
_UNFIT_PAGES: Final = PG_KSM | PG_SWAPCACHE | PG_COHERENT
"""Areas with one of these are left as they are by MADV_MERGEABLE."""

Place = tuple["Mm", int]


class Ksm:
    """The state of the scans of one host memory; :func:`ksm_of` finds it."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self._host = host
        self._trace = trace
        self._rmap = reverse_map(host)
        self._stable: dict[bytes, KsmRoot] = {}
        """Shared pages by content. Some may be gone by now."""
        self._unstable: dict[bytes, Place] = {}
        """Pages of this scan that had no equal yet. Their content may have changed since."""
        self._checksums: dict[Place, int] = {}
        """What the last scan saw."""

    # ---- what there is

    def _alive(self, root: KsmRoot) -> bool:
        host, pfn = self._host, root.pfn
        return bool(host.refcount(pfn)) and bool(host.flags(pfn) & PG_KSM) and host.mapping(pfn) == root.id

    def _roots(self) -> list[KsmRoot]:
        return [root for root in self._stable.values() if self._alive(root)]

    @property
    def pages_shared(self) -> int:
        """Shared pages."""
        return len(self._roots())

    @property
    def pages_sharing(self) -> int:
        """Entries that map them beyond the first of each: the frames that were saved."""
        return sum(max(self._host.mapcount(root.pfn) - 1, 0) for root in self._roots())

    # ---- scanning

    def scan(self) -> int:
        """One scan over all mergeable areas; how many pages were merged into another."""
        self._forget()
        self._unstable = {}
        before, self._checksums = self._checksums, {}
        merged = 0
        for mm in tuple(self._rmap.mms):
            for area in [area for area in mm.vmas if area.flags & VM_MERGEABLE]:
                for page, entry in mm.pgd.entries(area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT):
                    if entry & PRESENT and entry & ANON:
                        for each in range(page, page + (HUGE_PAGES if entry & HUGE else 1)):
                            point("ksm.scan")
                            merged += self._consider(mm, each << PAGE_SHIFT, before)
        self._unstable = {}
        return merged

    def _forget(self) -> None:
        """Shared pages that are gone."""
        for content, root in list(self._stable.items()):
            if not self._alive(root):
                del self._stable[content]
                self._rmap.drop_ksm_root(root)

    def _mapped(self, mm: Mm, hva: int) -> int | None:
        """The mergeable page at ``hva``, None if there is none (any more)."""
        area, entry = mm.find_vma(hva), mm.pgd.pte(hva >> PAGE_SHIFT)
        if area is None or mm.dead or not area.flags & VM_MERGEABLE or not entry & PRESENT or not entry & ANON:
            return None
        return pte_pfn(entry)

    def _consider(self, mm: Mm, hva: int, before: dict[Place, int]) -> int:
        host = self._host
        pfn = self._mapped(mm, hva)
        if pfn is None or host.flags(pfn) & _UNFIT_PAGES:
            return 0
        content = host.read(pfn, 0, PAGE_SIZE)
        root = self._stable.get(content)
        if root is not None and self._alive(root):
            return int(self._merge(mm, hva, pfn, root))
        self._checksums[mm, hva] = checksum = crc32(content)
        if before.get((mm, hva)) != checksum:
            return 0
        other = self._unstable.get(content)
        other_pfn = self._mapped(*other) if other else None
        if other is None or other_pfn is None or host.read(other_pfn, 0, PAGE_SIZE) != content:
            self._unstable[content] = mm, hva
            return 0
        if other_pfn == pfn or host.flags(other_pfn) & _UNFIT_PAGES:
            return 0
        if not self._merge(mm, hva, pfn, None):
            return 0
        del self._unstable[content]
        root = self._rmap.ksm_root(host.mapping(pfn))
        if root is None or not self._alive(root):
            return 0
        self._stable[content] = root
        return int(self._merge(*other, other_pfn, root))

    # ---- merging

    def _merge(self, mm: Mm, hva: int, pfn: int, root: KsmRoot | None) -> bool:
        """Makes the page at ``hva`` the shared page, or replaces it by that of ``root``; False if it could not be."""
        with mm.mmap_lock.read:
            # What was found before may have gone while another page was merged, or this one split.
            if self._mapped(mm, hva) != pfn or not split_if_compound(self._host, pfn):
                return False
            if self._mapped(mm, hva) != pfn or (root is not None and not self._alive(root)):
                return False
            page_lock = self._rmap.page_lock.attempt(pfn)
            if page_lock is None:
                return False
            try:
                return self._merge_locked(mm, hva, pfn, root)
            finally:
                page_lock.drop()

    def _merge_locked(self, mm: Mm, hva: int, pfn: int, root: KsmRoot | None) -> bool:
        host = self._host
        held = [pfn] if root is None else [pfn, root.pfn]
        for frame in held:
            host.get(frame)
        try:
            entry = self._write_protect(mm, hva, pfn)
            if not entry:
                return False
            if root is None:
                return self._make_shared(mm, hva, pfn)
            if host.read(pfn, 0, PAGE_SIZE) != host.read(held[1], 0, PAGE_SIZE):
                return False
            return self._replace(mm, hva, entry, root, held[1])
        finally:
            for frame in held:
                mm.put_frame(frame)

    def _write_protect(self, mm: Mm, hva: int, pfn: int) -> int:
        """The entry of ``hva``, which maps ``pfn`` and cannot be written through; 0 if that is not to be had."""
        host = self._host
        with mm.notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
            if self._mapped(mm, hva) != pfn:
                return 0
            entry = mm.pgd.get(hva >> PAGE_SHIFT)
            mm.clear_flush(hva)
            if host.refcount(pfn) != host.mapcount(pfn) + 1:
                mm.set_pte(hva, entry)
                return 0
            if entry & DIRTY:
                host.set_flags(pfn, PG_DIRTY)
            entry &= ~(WRITE | DIRTY | EXCLUSIVE)
            mm.set_pte(hva, entry)
            return entry

    def _make_shared(self, mm: Mm, hva: int, pfn: int) -> bool:
        """Gives ``pfn``, which nobody can write, a root that can lead to many places."""
        host = self._host
        if self._mapped(mm, hva) != pfn or host.flags(pfn) & PG_KSM:
            return False
        root = self._rmap.new_ksm_root(host, pfn)
        host.set_flags(pfn, PG_KSM)
        if self._trace.on:
            self._trace.emit("ksm_merge", mm=mm.name, hva=hva, old=pfn, new=pfn, root=root.id)
        return True

    def _replace(self, mm: Mm, hva: int, entry: int, root: KsmRoot, shared: int) -> bool:
        host, old = self._host, pte_pfn(entry)
        with mm.notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.CLEAR), mm.ptl(hva >> PMD_SHIFT):
            area = mm.find_vma(hva)
            if area is None or area.anon_vma is None or root.pfn != shared or not self._same(mm, area, hva, entry):
                return False
            mm.clear_flush(hva)
            root.places[area.anon_vma, area.page_offset(hva)] = None
            host.get(shared)
            host.add_mapcount(shared, 1)
            mm.set_pte(hva, shared << PFN_SHIFT | area.rights | ANON | entry & (SOFT_DIRTY | UFFD_WP))
            host.add_mapcount(old, -1)
            if self._trace.on:
                self._trace.emit("ksm_merge", mm=mm.name, hva=hva, old=old, new=shared, root=root.id)
        mm.put_frame(old)
        return True

    def _same(self, mm: Mm, area: Vma, hva: int, entry: int) -> bool:
        """Nobody has changed ``entry`` in any way that matters; to have looked at the page does not."""
        return bool(area.flags & VM_MERGEABLE) and (mm.pgd.get(hva >> PAGE_SHIFT) | ACCESSED) == entry | ACCESSED


def ksm_of(host: HostMemory, trace: Trace) -> Ksm:
    """The one KSM of ``host``. It is kept by its reverse map."""
    rmap = reverse_map(host)
    if rmap.ksm is None:
        rmap.ksm = Ksm(host, trace)
    assert isinstance(rmap.ksm, Ksm)
    return rmap.ksm


def ksm_scan(mm: Mm, until_sharing: int | None) -> int:
    """See :meth:`Mm.ksm_scan`."""
    ksm = ksm_of(mm.host, mm.trace)
    idle = 0
    while idle < 2 and (until_sharing is None or ksm.pages_sharing < until_sharing):
        idle = 0 if ksm.scan() else idle + 1  # the first look at a page only remembers it
    return ksm.pages_sharing


def unmerge(mm: Mm, start: int, end: int) -> None:
    """Gives every place in ``[start, end)`` that maps a shared page a page of its own. Raises OutOfFrames.

    mmap_lock is held for reading, and no area of the range is mergeable any more.
    """
    for page, _ in mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        hva = page << PAGE_SHIFT
        while True:
            entry, area = mm.pgd.get(page), mm.find_vma(hva)
            if area is None or not entry & MAPPED or not entry & ANON or not mm.host.flags(pte_pfn(entry)) & PG_KSM:
                break
            wp_page_copy(mm, area, hva, entry, unshare=True, locked=True)
