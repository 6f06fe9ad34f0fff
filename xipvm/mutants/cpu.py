"""Faults of the CPU: stale walks, code that is both written and run, kicks that do not come, code that is kept."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.actors import point
from xipvm.cpu.vcpu import Vcpu
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.flash_memory import FlashMemory
from xipvm.mmu.secondary.spte import SPTE_PRESENT
from xipvm.mutants.mutant import mutant, replaced

_EXEC = 4


@mutant("walk-not-repeated", "C2", "I10", "I4")
def walk_not_repeated() -> Iterator[None]:
    """What a walk found before somebody else ran is put into the TLB, behind the flush that was to remove it."""
    miss = Vcpu._miss

    def stale(self: Vcpu, gva: int, access: int) -> int:
        answer = miss(self, gva, access)
        sptes, gfn = self.secondary.sptes, gva >> 12
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


@mutant("writable-or-executable-by-entry", "C3", "AssertionError")
def writable_or_executable_by_entry() -> Iterator[None]:
    """No entry is both writable and executable, but nobody knows of a frame that it is executed somewhere."""
    inserted = Vcpu._inserted

    def forget(self: Vcpu, gfn: int, pfn: int, perms: int) -> None:
        inserted(self, gfn, pfn, perms)
        host = self.secondary.mm.host
        if perms & _EXEC and not host.is_device(pfn):
            meta = host.meta_view()
            meta["x_mask"][pfn] = 0
            meta["code_mask"][pfn] = 0
            del meta

    with replaced(Vcpu, "_inserted", forget):
        yield


@mutant("flush-without-a-kick", "C4", "AssertionError")
def flush_without_a_kick() -> Iterator[None]:
    """TLBs are flushed, but a vCPU that goes round in chained code, which does not look at the TLB, stays there."""
    with replaced(Vcpu, "kick", lambda self, reason: None):
        yield


@mutant("code-not-dropped", "C5", "AssertionError")
def code_not_dropped() -> Iterator[None]:
    """Flash is reprogrammed, and what was translated from its old contents is kept."""
    with replaced(FlashMemory, "_change", lambda self, offset, length: None):
        yield
