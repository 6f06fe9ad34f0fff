"""A vCPU without code whose guest has page tables, behind a KVM with shadow paging.

Its tables have two levels of Sv39's entries: a root page whose entries are for 2 MiB each, and last-level tables. They
lie in the guest's memory, which it writes by guest frame, as a kernel does by a linear map. What it knows of an address
it keeps, as a TLB may, until it runs :meth:`PagedVcpu.fence` or is told to forget.
"""

from __future__ import annotations

from typing import Final

from xipvm.actors import give_way, point
from xipvm.address import PAGE_SHIFT
from xipvm.errors import DeadlockError, GuestAccessError
from xipvm.explore.scripted import RETRIES, ScriptedVcpu
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.base import MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.guest_walk import GUEST_FAULT, GuestWalk, ReadEntry, Role
from xipvm.mmu.secondary.shadow import ShadowPaging
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_READ, SPTE_WRITE, spte_pfn
from xipvm.trace.funnel import Trace

VALID: Final = 1 << 0
WRITABLE: Final = 1 << 2
ACCESSED: Final = 1 << 6
DIRTY: Final = 1 << 7
_LEAF_READ: Final = 1 << 1
_PPN_SHIFT: Final = 10
_NO_ENTRY, _NO_RIGHT, _NO_TABLE = 1, 3, 5
_LEVELS: Final = (21, 12)


class GuestPageFaultError(GuestAccessError):
    """The guest's own tables do not allow an access of virtual page ``gfn``."""


def table_entry(gfn: int) -> bytes:
    """The entry of a root for the last-level table in ``gfn``."""
    return (gfn << _PPN_SHIFT | VALID).to_bytes(8, "little")


def page_entry(gfn: int, *, writable: bool = True) -> bytes:
    """The entry of a last-level table for a page, neither accessed nor dirty yet."""
    return (gfn << _PPN_SHIFT | VALID | _LEAF_READ | (WRITABLE if writable else 0)).to_bytes(8, "little")


class PagedVcpu(ScriptedVcpu):
    """vCPU ``index`` of ``mmu``; ``load``, ``store`` are by guest frame, ``load_gva``, ``store_gva`` by its tables."""

    def __init__(self, mmu: ShadowPaging, host: HostMemory, trace: Trace, index: int, root: int, asid: int = 0) -> None:
        ScriptedVcpu.__init__(self, mmu, host, trace, index)
        self.kvm = mmu
        self.root = root
        """Guest frame of the root of its tables."""
        self.asid = asid
        self.known: dict[tuple[Role, int], tuple[int, bool]] = {}
        """Frame and writability, by role and virtual page."""
        self._told: set[tuple[int, int, bool]] = set()

    @property
    def role(self) -> Role:
        """Of what it does now."""
        return (self.asid << 44 | self.root, 0, 0, 1, 0)

    # ---- what the guest does about its tables

    def set_entry(self, table: int, index: int, entry: bytes) -> None:
        """Store an entry of the table in guest frame ``table``."""
        self.store(table, entry, 8 * index)

    def fence(self) -> None:
        """SFENCE.VMA: what its tables said before counts no more."""
        point("vcpu.fence")
        self.known.clear()
        self.kvm.guest_flush()

    def switch(self, root: int, asid: int = 0) -> None:
        """Write satp."""
        self.kvm.guest_flush()
        self.root, self.asid = root, asid

    # ---- what the secondary MMU calls

    def flush_tlb(self, reason: str) -> None:
        """See ScriptedVcpu."""
        self.known.clear()
        self._told.clear()
        super().flush_tlb(reason)

    def walk_guest(self, gva: int, access: int, read: ReadEntry) -> GuestWalk:
        """See GuestWalker."""
        walk = GuestWalk(gpa=0, rights=0, entries=[])
        table, value = self.root, 0
        for level, shift in enumerate(_LEVELS):
            walk.level = len(_LEVELS) - 1 - level
            at = table << PAGE_SHIFT | (gva >> shift & 511) * 8
            data = read(at, 8)
            if data is None:
                walk.fault = _NO_TABLE
                return walk
            value = int.from_bytes(data, "little")
            walk.entries.append((at, value))
            if not value & VALID:
                walk.fault = _NO_ENTRY
                return walk
            table = value >> _PPN_SHIFT
        walk.gpa = table << PAGE_SHIFT
        if access == WRITE and not value & WRITABLE:
            walk.fault = _NO_RIGHT
            return walk
        walk.set_bits = (ACCESSED | DIRTY if access == WRITE else ACCESSED) & ~value
        dirty = (value | walk.set_bits) & DIRTY
        walk.rights = SPTE_READ | (SPTE_WRITE if value & WRITABLE and dirty else 0)
        return walk

    def sends_to_device(self, gfn: int, access: int) -> bool:
        """See GuestWalker: it keeps nothing of that kind."""
        return False

    # ---- accesses

    def store(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """See ScriptedVcpu. A store to a table that is watched is emulated."""
        try:
            super().store(gfn, data, offset)
        except GuestAccessError:
            if not self.kvm.emulates(gfn << PAGE_SHIFT):
                raise
            self.kvm.emulate_write(gfn << PAGE_SHIFT | offset, data)

    def load_gva(self, gva: int, size: int = 8) -> bytes:
        """``size`` bytes at virtual address ``gva``. Raises GuestAccessError, GuestPageFaultError."""
        return self.host.read(self._look_up(gva, READ), gva & (1 << PAGE_SHIFT) - 1, size)

    def store_gva(self, gva: int, data: bytes) -> None:
        """Put ``data`` there. Raises as :meth:`load_gva`."""
        self.host.write(self._look_up(gva, WRITE), gva & (1 << PAGE_SHIFT) - 1, data)

    def _look_up(self, gva: int, access: int) -> int:
        point("vcpu.access")
        self.kvm.vcpu_enter(self)
        for attempt in range(RETRIES):
            role, page = self.role, gva >> PAGE_SHIFT
            seen = self.known.get((role, page)) or self._shadow(role, page)
            if seen is not None and (seen[1] or access != WRITE):
                return seen[0]
            self.known.pop((role, page), None)
            seen = self._shadow(role, page)
            if seen is not None and (seen[1] or access != WRITE):
                return seen[0]
            answer = self.kvm.fault_gva(self, role, gva, access)
            kind = answer & 15
            if kind == GUEST_FAULT:
                raise GuestPageFaultError(page, f"the guest's tables do not allow it ({answer >> 4 & 15})")
            if kind != RETRY_WALK:
                raise GuestAccessError(answer >> PAGE_SHIFT, "MMIO" if kind == MMIO else self.kvm.last_error)
            (give_way if attempt else point)("vcpu.retry")
        raise DeadlockError(f"vcpu{self.index} faults on virtual page {gva >> PAGE_SHIFT:#x} again and again")

    def _shadow(self, role: Role, page: int) -> tuple[int, bool] | None:
        """The walk of a shadow root, which fills the TLB."""
        found = (self.kvm.roots or {}).get(role)
        spte = 0 if found is None else found[0].get(page)
        if found is None or not spte & SPTE_PRESENT or not spte & SPTE_READ:
            return None
        gfn, pfn, writable = found[1].get(page) >> PAGE_SHIFT, spte_pfn(spte), bool(spte & SPTE_WRITE)
        self.known[role, page] = pfn, writable
        if self.trace.on and (gfn, pfn, writable) not in self._told:
            self._told.add((gfn, pfn, writable))
            self.trace.emit("tlb_insert", vcpu=self.index, gfn=gfn, pfn=pfn, rights="rw" if writable else "r")
        return pfn, writable
