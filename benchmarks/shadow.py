"""Shadow paging for the benchmark of secondary MMUs: a fault is by virtual address, with the guest's tables walked."""

from __future__ import annotations

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.explore.paged import PagedVcpu, page_entry, table_entry
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.shadow import KvmShadow
from xipvm.mmu.vma import PROT_READ, PROT_WRITE

_ENTRIES = 512


class _ByAddress(KvmShadow):
    """Guest frame n is at virtual page n, by tables that begin in ``guest.root``."""

    guest: PagedVcpu | None = None

    def fault(self, page: int, access: int) -> int:
        """The guest uses virtual ``page``; within that, by guest frame."""
        guest, self.guest = self.guest, None
        if guest is None:
            return super().fault(page, access)
        try:
            return self.fault_gva(guest, guest.role, page << PAGE_SHIFT, access) & 15
        finally:
            self.guest = guest


def make(mm: Mm, host: HostMemory, hva: int, pages: int) -> KvmShadow:
    """A VM whose pages from 0 on are the bytes from ``hva`` on."""
    kvm = _ByAddress(mm, mm.trace, host)
    kvm.set_memslot(0, 0, pages, hva)
    leaves = -(-pages // _ENTRIES)
    tables = mm.mmap((1 + leaves) * PAGE_SIZE, PROT_READ | PROT_WRITE)
    kvm.set_memslot(1, pages, 1 + leaves, tables)
    mm.write(tables, b"".join(table_entry(pages + 1 + leaf) for leaf in range(leaves)))
    mm.write(tables + PAGE_SIZE, b"".join(page_entry(page) for page in range(pages)))
    kvm.guest = PagedVcpu(kvm, host, mm.trace, 0, pages)
    return kvm
