"""KVM's secondary MMU: shadow entries by guest frame, installed by faults, removed by the notifier.

:class:`KvmBase` is what every age of KVM has; its parts are modules of their own:

    kvm_state.py   the entries, mmu_lock, the retry check, removing and flushing
    kvm_dirty.py   the dirty log: bitmaps, manual protection, rings
    kvm_slots.py   memslots that change while the guest runs; MMIO entries
    kvm_fault.py   faults, fast and slow; ageing
    pfncache.py    translations that KVM itself keeps (gfn_to_pfn caches)

:class:`Kvm` is how it hears of the mm's changes today; kvm_2008.py is how it did in the beginning.

Start: count → caches of KVM itself become invalid → lock → for each slot that is hit: extend the hull, remove the
entries → *if any was removed, flush all TLBs and kick all vCPUs, once* → unlock.

End: lock → seq + 1, then in_progress - 1 → unlock → count. Seq first: whoever sees the count at 0 sees the new seq.

A start that hits no slot touches neither lock nor seq: no fault can reach those addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm import actors
from xipvm.actors import point
from xipvm.errors import InternalError
from xipvm.mmu.secondary.kvm_fault import KvmFaults
from xipvm.mmu.secondary.kvm_state import GfnInfo
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.pfncache import PfnCaches
from xipvm.mmu.secondary.spte import SPTE_ACCESSED, SPTE_PRESENT
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace

__all__ = ["GfnInfo", "Kvm", "KvmBase"]


class KvmBase(KvmFaults):
    """The secondary MMU of one VM, whatever tells it of changes. ``pin_sptes``: nothing does."""


class Kvm(KvmBase, MmuNotifier):
    """KVM as it is today. Registers with ``mm`` at once, and raises what that raises; not with ``pin_sptes``."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0", pin_sptes: bool = False) -> None:
        super().__init__(mm, trace, host, name=name, pin_sptes=pin_sptes)
        self.pfn_caches = PfnCaches(self)
        if not pin_sptes:
            self.max_level = 2
            mm.notifiers.register(self)

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """Remove the entries of the range and keep faults from installing new ones. Never declines."""
        self.mn_active_invalidate_count += 1
        self.invalidations += 1
        begun = False
        try:
            point("kvm.invalidate.counted")
            if self.pfn_caches:
                self.pfn_caches.invalidate_start(range.start, range.end)
            hit = self.memslots.in_hva_range(range.start, range.end)
            if hit:  # otherwise faults cannot reach these addresses
                with self.mmu_lock.write:
                    self._invalidate_begin()
                    begun = True
                    for start, end in hit:
                        self._invalidate_range_add(start, end)
                        self._zap(start, end)
                    if self.tlbs_dirty:
                        self._flush_and_kick("mmu_notifier")
        except BaseException:  # an aborted run, a sink that failed: no end comes, and the next range flushes
            if begun:
                self._invalidate_end()
            self.mn_active_invalidate_count -= 1
            raise
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """Faults may install entries of the range again."""
        if self.memslots.in_hva_range(range.start, range.end):
            with self.mmu_lock.write:
                self._invalidate_end()
        if self.pfn_caches:
            self.pfn_caches.ended += 1
        self.mn_active_invalidate_count -= 1
        if self.mn_active_invalidate_count < 0:
            raise InternalError(f"{self.name}: {range!r} ended, but did not begin")

    def _invalidate_begin(self) -> None:
        self.mmu_invalidate_in_progress += 1
        if self.mmu_invalidate_in_progress == 1:
            self.mmu_invalidate_range_start = GFN_LIMIT
            self.mmu_invalidate_range_end = 0

    def _invalidate_range_add(self, start: int, end: int) -> None:
        if start < self.mmu_invalidate_range_start:
            self.mmu_invalidate_range_start = start
        if end > self.mmu_invalidate_range_end:
            self.mmu_invalidate_range_end = end

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether the guest used bytes ``[start, end)`` of the host; its next use of them misses."""
        return self._age(start, end, "clear_flush_young")

    def clear_young(self, start: int, end: int) -> bool:
        """As :meth:`clear_flush_young`. It could do without a flush, and KVM does.

        Here a vCPU that executes a page by what its TLB still has needs the entry, to count the instructions there.
        """
        return self._age(start, end, "clear_young")

    def test_young(self, address: int) -> bool:
        """Whether the guest used the host's page at ``address``."""
        young = SPTE_PRESENT | SPTE_ACCESSED
        return any(
            self.sptes.get(first) & young == young for first, _ in self.memslots.in_hva_range(address, address + 1)
        )

    def release(self, mm: NotifiedMm) -> None:
        """Drop every entry and let no fault succeed any more. May run twice."""
        reading = self.srcu.read_lock() if actors.hooked() else None  # who changes memslots waits
        try:
            self._release()
        finally:
            if reading is not None:
                self.srcu.read_unlock(reading)

    def destroy(self) -> None:
        """Unregister from the mm, which drops every entry. A second call does nothing."""
        self.pfn_caches.deactivate_all()
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)
        elif self.pin_sptes:
            self._release()
        # Unregistering can cut a start from its end.
        self.mmu_invalidate_in_progress = 0
        self.mn_active_invalidate_count = 0
