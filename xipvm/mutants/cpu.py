"""Faults of the CPU: walks that are not repeated, code that is kept."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.address import Pfn
from xipvm.cpu.vcpu import Vcpu
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.flash_memory import FlashMemory
from xipvm.mmu.secondary.spte import SPTE_PRESENT
from xipvm.mutants.mutant import mutant, replaced


@mutant("walk-not-repeated", "C2", "I10", "I4")
def walk_not_repeated() -> Iterator[None]:
    """What a walk found before somebody else ran is put into the TLB, behind the flush that was to remove it."""
    miss = Vcpu._miss

    def stale(self: Vcpu, gpa: int, access: int) -> int:
        answer = miss(self, gpa, access)
        sptes, gfn = self.secondary.sptes, gpa >> 12
        spte = sptes.get(gfn)
        point("mutant.walked")
        if spte & SPTE_PRESENT and sptes.get(gfn) != spte:
            sptes.set(gfn, spte)
        return answer

    def walk(self: ScriptedVcpu, gfn: int) -> tuple[int, bool] | None:
        mapped = self.mmu.translate(gfn)
        if mapped is None:
            return None
        point("mutant.walked")
        self.tlb[gfn] = mapped
        rights = "rw" if mapped[1] else "r"
        self.trace.emit("tlb_insert", vcpu=self.index, gfn=gfn, pfn=mapped[0], rights=rights)
        return mapped

    with replaced(Vcpu, "_miss", stale), replaced(ScriptedVcpu, "_walk", walk):
        yield


@mutant("code-not-dropped", "C5", "AssertionError")
def code_not_dropped() -> Iterator[None]:
    """Flash is reprogrammed, and what was translated from its old contents is kept."""
    with replaced(FlashMemory, "_change", lambda self, offset, length: None):
        yield


@mutant("flush-without-a-kick", "C4", "AssertionError")
def flush_without_a_kick() -> Iterator[None]:
    """TLBs are flushed, but a vCPU that goes round in chained code, which does not look at the TLB, stays there."""

    def flush(self: Vcpu, reason: str) -> None:
        self._mmio.clear()
        self.engine.flush_tlb(reason)

    with replaced(Vcpu, "flush_tlb", flush), replaced(Vcpu, "kick", lambda self, reason: None):
        yield


@mutant("writable-or-executable-by-entry", "C3", "AssertionError")
def writable_or_executable_by_entry() -> Iterator[None]:
    """No entry is both writable and executable, but a frame may be: written by one address, executed by another."""
    inserted = Vcpu._inserted

    def forget(self: Vcpu, gfn: int, pfn: int, perms: int) -> None:
        inserted(self, gfn, pfn, perms)
        host = self.secondary.mm.host
        if not host.is_device(Pfn(pfn)):
            meta = host.meta_view()
            for mask in ("w_mask", "x_mask", "code_mask"):
                meta[mask][pfn] = 0

    with replaced(Vcpu, "_inserted", forget):
        yield
