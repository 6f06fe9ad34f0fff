"""The state of a VM's memory: its entries, the invalidations that are open, and the flush that removed entries owe.

``mmu_lock`` protects it; a fault takes the lock for reading, everybody else for writing. It spins: nothing under it
sleeps. The state:

* ``mmu_invalidate_seq``: how many invalidations have ended, and whatever else makes faults that are under way start
  over;
* ``mmu_invalidate_in_progress``: how many are open, and ``mmu_invalidate_range_start``/``_end``: the hull of their
  guest frames. It grows, and is only forgotten when the count comes back to 0;
* ``mn_active_invalidate_count``: open ranges of the mm, also those that hit no memslot. Memslots do not change while
  there are any, so that a start and its end hit the same slots.

A VM has one root, which is never replaced: where Linux tells faults that their root is obsolete, ``mmu_invalidate_seq``
goes up here. Memslots lead from the host's addresses to guest frames, and an entry is found by its guest frame alone,
so there is no reverse map beside them.

**Flushes.** Removing or protecting entries sets ``tlbs_dirty``. Whoever did it flushes once for all of a batch, before
mmu_lock is dropped: what others decide by the entries must hold for the TLBs, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xipvm.address import Gfn, Hva, Pfn
from xipvm.errors import InternalError
from xipvm.locks.lock import RwLock
from xipvm.locks.order import MMU_LOCK
from xipvm.mmu.frames import HUGE_PAGES, PG_DEVICE, PG_RESERVED, HostMemory
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import (
    SPTE_HUGE,
    SPTE_PRESENT,
    SPTE_READ,
    SPTE_WRITE,
    describe_spte,
    spte_pfn,
)
from xipvm.notifier.srcu import Srcu

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace


@dataclass(frozen=True, slots=True)
class GfnInfo:
    """What the secondary MMU knows of one guest frame."""

    gfn: Gfn
    spte: int
    """The raw entry, 0 when there is none."""
    slot: int | None
    flags: int
    hva: Hva | None
    """Where the memslot puts it in the host's address space."""
    invalidating: bool
    """An open invalidation covers it."""

    def __str__(self) -> str:
        where = "no memslot" if self.slot is None else f"memslot {self.slot}, hva {self.hva:#x}"
        open = ", being invalidated" if self.invalidating else ""
        return f"gfn {self.gfn:#x}: spte {describe_spte(self.spte)}; {where}{open}"


class KvmState(GuestMmu):
    """What the parts of KVM share."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str, pin_sptes: bool) -> None:
        GuestMmu.__init__(self, mm, trace, name)
        self.host = host
        self.pin_sptes = pin_sptes
        self._unpinned: list[tuple[int, int]] = []
        """Runs of frames whose entries are gone; the references go behind the next flush."""
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.mmu_invalidate_range_start = 0
        self.mmu_invalidate_range_end = 0
        self.mn_active_invalidate_count = 0
        self.watched: AbstractSet[int] = frozenset()
        """Guest frames that the guest does not write to unseen: with shadow paging, its tables."""
        self.tlbs_dirty = False
        """Entries were removed that a TLB may still have: flush before mmu_lock is dropped."""
        self.remote_tlb_flushes = 0
        """How often all TLBs were flushed."""
        self.max_level = 1
        """2: where the host maps 2 MiB by one entry, so does the guest."""
        self.released = False
        """The mm is gone or the VM destroyed: every fault fails."""
        self.mmu_lock = RwLock(f"mmu_lock of {name}", MMU_LOCK)
        self.srcu = Srcu(f"memslots of {name}")

    # ---- the retry protocol

    def mmu_invalidate_retry(self, seq: int, gfn: int) -> str:
        """Why a fault that read ``seq`` must not install an entry for ``gfn``; empty when it may. Under mmu_lock."""
        if self.mmu_invalidate_in_progress and self._covered(gfn):
            return "in progress"
        return "seq" if self.mmu_invalidate_seq != seq else ""

    def _covered(self, gfn: int) -> bool:
        """Whether an open invalidation covers ``gfn``."""
        return (
            self.mmu_invalidate_in_progress > 0
            and self.mmu_invalidate_range_start <= gfn < self.mmu_invalidate_range_end
        )

    def _invalidate_end(self) -> None:
        self.mmu_invalidate_seq += 1
        self.mmu_invalidate_in_progress -= 1
        if self.mmu_invalidate_in_progress < 0:
            raise InternalError(f"{self.name}: more invalidations ended than began")

    # ---- removing

    def _zap(self, start: int, end: int) -> None:
        """Remove the entries of guest frames ``[start, end)``. The caller flushes if that made ``tlbs_dirty``."""
        sptes = self.sptes
        before = sptes.present
        trace = self.trace
        runs = sptes.zap(start, end, trace.on or self.pin_sptes)
        if sptes.present != before:
            self.tlbs_dirty = True
            if self.pin_sptes:
                self._unpinned += runs
            if runs and trace.on:  # MMIO entries have no frames
                trace.emit("spte_zap", vm=self.name, start=start, end=end, pages=runs)

    def _flush_and_kick(self, reason: str) -> None:
        self.flush_remote_tlbs(reason)
        self.kick(reason)
        self.tlbs_dirty = False
        if self._unpinned:
            self._unpin()

    def _flush_tlbs(self, reason: str) -> None:
        """Make every vCPU look up its rights again. No kick: only code that is chained does without the TLB."""
        self.flush_remote_tlbs(reason)
        self.tlbs_dirty = False

    def flush_remote_tlbs(self, reason: str) -> None:
        """See the base."""
        self.remote_tlb_flushes += 1
        super().flush_remote_tlbs(reason)

    def _unpin(self) -> None:
        """Drop the references of entries that are gone, which no TLB has any more."""
        runs, self._unpinned = self._unpinned, []
        for first, count in runs:
            for pfn in range(first, first + count):
                self.mm.unpin_frame(pfn)

    def zap_gfn_range(self, start: int, end: int, reason: str) -> None:
        """Remove the entries of guest frames ``[start, end)``, MMIO ones included; the guest faults them in again.

        With ``pin_sptes`` this is what lets go of their pages.
        """
        with self.mmu_lock.write:
            self.mmu_invalidate_seq += 1  # faults that are under way start over
            self._zap(start, end)
            if self.tlbs_dirty:
                self._flush_and_kick(reason)

    def _zap_all(self) -> None:
        """Remove every entry, MMIO ones included, and make faults that are under way start over. Under mmu_lock."""
        self.mmu_invalidate_seq += 1
        self._zap(0, GFN_LIMIT)

    def _release(self) -> None:
        """Drop every entry and let no fault succeed any more."""
        with self.mmu_lock.write:
            self.released = True
            self._zap_all()
            if self.tlbs_dirty:
                self._flush_and_kick("release")

    # ---- questions

    def pins(self) -> dict[int, int]:
        """The references that entries hold, by frame; none without ``pin_sptes``."""
        held: Counter[int] = Counter()
        if self.pin_sptes:
            for _, spte in self.sptes.entries(0, GFN_LIMIT):
                if spte & SPTE_PRESENT and not self.host.flags(spte_pfn(spte)) & (PG_RESERVED | PG_DEVICE):
                    held[spte_pfn(spte)] += 1
        return dict(held)

    def translate(self, gfn: int) -> tuple[Pfn, bool] | None:
        """Frame and writability of the entry of ``gfn``, None without one that a guest can use."""
        spte = self.sptes.get(gfn)
        if not spte & SPTE_PRESENT or not spte & SPTE_READ:
            return None
        pfn = spte_pfn(spte) + (gfn & HUGE_PAGES - 1 if spte & SPTE_HUGE else 0)
        return Pfn(pfn), bool(spte & SPTE_WRITE)

    def held(self) -> Iterator[tuple[int, Hva]]:
        """See the base: guest frames of memslots that have an entry."""
        for slot in self.memslots:
            for first, spte in self.sptes.entries(slot.gfn, slot.gfn_end):
                for gfn in range(first, first + (HUGE_PAGES if spte & SPTE_HUGE else 1)):
                    yield gfn, slot.hva_of(Gfn(gfn))

    def describe(self, gfn: int) -> GfnInfo:
        """What is known of ``gfn``, for a report."""
        slot = self.memslots.find(gfn)
        return GfnInfo(
            gfn=Gfn(gfn),
            spte=self.sptes.get(gfn) if gfn < GFN_LIMIT else 0,
            slot=None if slot is None else slot.id,
            flags=0 if slot is None else slot.flags,
            hva=None if slot is None else slot.hva_of(Gfn(gfn)),
            invalidating=self._covered(gfn),
        )
