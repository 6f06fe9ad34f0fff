"""KVM as it was when MMU notifiers began (Linux 2.6.27): the client of the 2008 protocol.

Its state, under ``mmu_lock``, is ``mmu_notifier_count``, how many ranges are open, whatever they cover, and
``mmu_notifier_seq``, how many changes have been announced: it goes up with every ``invalidate_page`` and at the end of
every range.

Fault: read seq → memslot → get_user_pages, which takes a reference → lock → give up when a range is open or seq has
changed → install → unlock → drop the reference.

invalidate_page: lock → seq + 1, entries removed → unlock; *when it returns all TLBs are flushed*. The primary entry is
gone already, so a fault that comes later does not find the page, and one that found it before sees the new seq.

Start: lock → count + 1, entries removed → unlock, flushed likewise. End: lock → seq + 1, then count - 1 → unlock: who
sees the count at 0 sees the new seq.

As then, every fault asks for a page that may be written, and memslots may change while a range is open: the count does
not depend on them. Entries hold no references, which is KVM from 2.6.32 on; before, each held one that went with it, so
that a mistake in this protocol did not show as one. That a page was written is recorded when its entry becomes
writable, not when it goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from xipvm.address import PAGE_SIZE
from xipvm.errors import InternalError
from xipvm.mmu.secondary.kvm import Kvm, KvmBase
from xipvm.notifier import MmuNotifier2008, MmuNotifiers2008, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace


class Kvm2008(KvmBase, MmuNotifier2008):
    """The secondary MMU of one VM on an mm of the 2008 protocol. Registers at once, and raises what that raises."""

    asks_for_write: ClassVar[bool] = True
    holds_lookups: ClassVar[bool] = True

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0") -> None:
        super().__init__(mm, trace, host, name=name, pin_sptes=False)
        mm.notifiers.register(self)

    @property
    def mmu_notifier_seq(self) -> int:
        """Changes that were announced."""
        return self.mmu_invalidate_seq

    @property
    def mmu_notifier_count(self) -> int:
        """Ranges that are open."""
        return self.mmu_invalidate_in_progress

    def _covered(self, gfn: int) -> bool:
        return self.mmu_invalidate_in_progress > 0

    def _unmap_hva(self, start: int, end: int) -> None:
        """Remove the entries of bytes ``[start, end)`` of the host, and have every vCPU forget them. Under mmu_lock."""
        for first, last in self.memslots.in_hva_range(start, end):
            self._zap(first, last)
        if self.tlbs_dirty:
            self._flush_and_kick("mmu_notifier")

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        """Remove the entries of the page; faults that looked it up before start over."""
        self.invalidations += 1
        with self.mmu_lock.write:
            self.mmu_invalidate_seq += 1
            self._unmap_hva(address, address + PAGE_SIZE)

    def invalidate_range_start(self, mm: NotifiedMm, start: int, end: int) -> None:
        """Remove the entries of the range and keep faults from installing any."""
        self.invalidations += 1
        with self.mmu_lock.write:
            self.mmu_invalidate_in_progress += 1
            try:
                self._unmap_hva(start, end)
            except BaseException:  # an aborted run, a sink that failed: no end comes, and the next change flushes
                self._invalidate_end()
                raise

    def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
        """Faults may install entries again."""
        if not self.mmu_invalidate_in_progress:
            raise InternalError(f"{self.name}: range {start:#x}..{end:#x} ended, but did not begin")
        with self.mmu_lock.write:
            self._invalidate_end()

    def clear_flush_young(self, mm: NotifiedMm, address: int) -> bool:
        """Whether the guest used the page; its next use misses."""
        return self._age(address, address + PAGE_SIZE, "clear_flush_young")

    def release(self, mm: NotifiedMm) -> None:
        """Drop every entry and let no fault succeed any more."""
        self._release()

    def destroy(self) -> None:
        """Unregister from the mm, which drops every entry. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)
        self.mmu_invalidate_in_progress = 0  # unregistering can cut a start from its end


def kvm_of(mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0", pin_sptes: bool = False) -> KvmBase:
    """The KVM that speaks the protocol of ``mm``; with ``pin_sptes`` one that needs none."""
    if pin_sptes or mm.protocol != MmuNotifiers2008.protocol:
        return Kvm(mm, trace, host, name=name, pin_sptes=pin_sptes)
    return Kvm2008(mm, trace, host, name=name)
