"""Faults of the primary MMU: flushed too late, freed too early, shared where it should not be, asked too late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, page_up
from xipvm.mmu import cow, mremap, pageout
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.ksm import Ksm
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import PageCache
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_PRESENT, SPTE_READ_ONLY, spte_rights
from xipvm.mmu.zap import MmuGather, unmap_mapping_range
from xipvm.mutants.mutant import inside, mutant, replaced
from xipvm.notifier import RangeEvent

_ALL_PAGES = 1 << 36


@mutant("freed-before-the-tlb-flush", "M6", "I5")
def freed_before_the_tlb_flush() -> Iterator[None]:
    """The gathered frames are freed, then the host's TLBs are flushed."""

    def finish(self: MmuGather) -> None:
        mm = self._mm
        freed = self._frames.free_all(mm.trace.on)
        if freed:
            mm.trace.emit("page_free", pages=freed)
        if self._end:
            mm.flush_tlb_range(self._start, self._end)

    with replaced(MmuGather, "finish", finish):
        yield


@mutant("mremap-flushes-without-the-lock", "14", "I5", protocol="modern")
def mremap_flushes_without_the_lock() -> Iterator[None]:
    """mremap drops the page-table locks before it flushes: the page can go by way of its new address meanwhile."""
    flush = Mm.flush_tlb_range
    with inside(mremap, "_move_page_tables") as moving:

        def later(self: Mm, start: int, end: int) -> None:
            if moving():
                point("mutant.unlocked")
            flush(self, start, end)

        with replaced(Mm, "flush_tlb_range", later):
            yield


@mutant("mremap-leaves-the-old-address-in-tlbs", "M32", "I5", protocol="modern")
def mremap_leaves_the_old_address_in_tlbs() -> Iterator[None]:
    """mremap moves the entries, and nobody forgets the old addresses."""
    flush = Mm.flush_tlb_range
    with inside(mremap, "_move_page_tables") as moving:

        def skip(self: Mm, start: int, end: int) -> None:
            if not moving():
                flush(self, start, end)

        with replaced(Mm, "flush_tlb_range", skip):
            yield


@mutant("copy-without-a-flush", "M30 (host)", "I11", "I5")
def copy_without_a_flush() -> Iterator[None]:
    """Copy on write maps the new page while threads of the host still read the old one."""
    flush = Mm.flush_tlb_range
    with inside(cow, "wp_page_copy") as copying:

        def skip(self: Mm, start: int, end: int) -> None:
            if not copying():
                flush(self, start, end)

        with replaced(Mm, "flush_tlb_range", skip):
            yield


@mutant("copy-flushed-when-the-old-page-goes", "M30 (late)", "I11")
def copy_flushed_when_the_old_page_goes() -> Iterator[None]:
    """Copy on write leaves the flush to when the old page is let go of: until then some read that."""
    flush, put = Mm.flush_tlb_range, Mm.put_frame
    late: list[tuple[Mm, int, int]] = []
    with inside(cow, "wp_page_copy") as copying:

        def flush_later(self: Mm, start: int, end: int) -> None:
            if copying():
                late.append((self, start, end))
            else:
                flush(self, start, end)

        def flush_first(self: Mm, pfn: int) -> None:
            while late:
                flush(*late.pop())
            put(self, pfn)

        with replaced(Mm, "flush_tlb_range", flush_later), replaced(Mm, "put_frame", flush_first):
            yield


@mutant("shared-page-reused", "M35", "AssertionError", "InternalError")
def shared_page_reused() -> Iterator[None]:
    """A write to a page that others share makes it writable where it is."""
    with replaced(cow, "_ours_alone", lambda mm, pfn: True):
        yield


@mutant("truncated-once", "M38", "AssertionError")
def truncated_once() -> Iterator[None]:
    """Truncation unmaps while the file is still long, and not again: what is copied meanwhile stays."""

    def truncate(self: PageCache, size: int) -> None:
        with self.i_rwsem.write, self.invalidate_lock.write:
            first = page_up(size) >> PAGE_SHIFT
            unmap_mapping_range(self, first, _ALL_PAGES)
            point("mm.truncate.unmapped")
            self.size = size
            self._zero_tail()
            self._evict(first, _ALL_PAGES)

    with replaced(PageCache, "truncate", truncate):
        yield


@mutant("asked-when-it-was-forgotten", "3", "I9")
def asked_when_it_was_forgotten() -> Iterator[None]:
    """Reclaim announces a page, and asks then whether it was used: secondary MMUs do not know any more."""
    referenced = pageout.referenced

    def late(host: HostMemory, pfn: int) -> pageout.Used:
        with ExitStack() as ranges:
            for area, hva in list(reverse_map(host).walk(host, pfn)):
                ranges.enter_context(area.mm.notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.CLEAR))
            return referenced(host, pfn)

    with replaced(pageout, "referenced", late):
        yield


@mutant("change-pte-inside-the-range", "32", "I2", protocol="modern")
def change_pte_inside_the_range() -> Iterator[None]:
    """KSM tells secondary MMUs of the shared page (change_pte) before the range around the change has ended."""
    set_pte = Mm.set_pte
    with inside(Ksm, "_replace") as merging:

        def change(self: Mm, hva: int, entry: int) -> None:
            set_pte(self, hva, entry)
            for kvm in tuple(self.notifiers) if merging() else ():
                if isinstance(kvm, KvmBase):
                    _change_pte(kvm, hva, entry)

        with replaced(Mm, "set_pte", change):
            yield


def _change_pte(kvm: KvmBase, hva: int, entry: int) -> None:
    spte = pte_pfn(entry) << PFN_SHIFT | SPTE_READ_ONLY | SPTE_PRESENT
    for first, _ in kvm.memslots.in_hva_range(hva, hva + PAGE_SIZE):
        kvm.sptes.set(first, spte)
        kvm.trace.emit("spte_set", vm=kvm.name, gfn=first, pfn=pte_pfn(entry), rights=spte_rights(spte))
