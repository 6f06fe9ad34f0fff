"""What a guest writes, kept track of by KVM's dirty log: what a VMM does with it, for a machine.

Every memslot that may be written is logged from the start. With rings their pages are harvested and reset whenever one
is full, as on KVM_EXIT_DIRTY_RING_FULL; without, the bitmaps are read when somebody asks.
"""

from __future__ import annotations

from xipvm.errors import BadInput, MmError
from xipvm.mmu.secondary.dirty_ring import check_ring_size
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.kvm_dirty import dirty_runs
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES


class DirtyLog:
    """The dirty log of ``secondary``; ``ring``: entries of each vCPU's ring, 0 for bitmaps. Before there are vCPUs.

    Raises BadInput for a secondary MMU that has none, and for a number of entries that no ring can have.
    """

    def __init__(self, secondary: GuestMmu, ring: int) -> None:
        if not isinstance(secondary, KvmBase):
            raise BadInput("only the secondary MMU kvm keeps a dirty log")
        self.kvm = secondary
        self.pages: set[tuple[int, int]] = set()
        """Memslot and page in it, of what was written so far."""
        if ring:
            try:
                check_ring_size(ring)
            except MmError as error:
                raise BadInput(str(error)) from None
            secondary.enable_dirty_ring(ring)
            secondary.on_dirty_ring_full = self._full

    def start(self) -> None:
        """Log every memslot that there is and that may be written."""
        for slot in tuple(self.kvm.memslots):
            if not slot.readonly:
                flags = slot.flags | MEM_LOG_DIRTY_PAGES
                self.kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, flags)

    def collect(self) -> int:
        """Take what was written since; how many pages it is in all."""
        kvm = self.kvm
        if kvm.dirty_ring_size:
            for ring in kvm.dirty_rings.values():
                self.pages.update(ring.harvest())
            kvm.reset_dirty_rings()
        else:
            for slot in kvm.memslots:
                if slot.logged:
                    for first, count in dirty_runs(kvm.get_dirty_log(slot.id)):
                        self.pages.update((slot.id, page) for page in range(first, first + count))
        return len(self.pages)

    def _full(self, vcpu: object) -> None:
        self.collect()
