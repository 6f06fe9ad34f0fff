"""A vCPU without an engine: loads and stores through the secondary MMU, as the walker and the TLB do them."""

from __future__ import annotations

from typing import Final, NamedTuple

from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.base import FAULT, MMIO, READ, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_MMIO, SPTE_PRESENT, SPTE_WRITE, spte_pfn

_PATIENCE: Final = 100
"""Faults on one access after which it is called a livelock."""
_HUGE_MASK: Final = 511


class Access(NamedTuple):
    """How a guest access went: ``ok`` (and what was loaded), ``mmio``, ``efault``, or ``again``: it is not done yet."""

    exit: str
    value: int | None = None


class Vcpu:
    """The vCPU of ``kvm``. Keeps every translation that it was given until it is told to forget."""

    def __init__(self, kvm: Kvm, host: HostMemory) -> None:
        self.kvm = kvm
        self.host = host
        self.tlb: dict[int, tuple[int, bool]] = {}
        """Frame and writability by gfn."""
        self.faults: list[str] = []
        """Kinds of the faults in this step: ``U``, with ``W+`` before it for a write, ``P+`` where an entry was."""
        self.flushes = 0

    def begin_step(self) -> None:
        """Count anew."""
        self.faults.clear()
        self.flushes = 0

    def flush_tlb(self, reason: str) -> None:
        """Forget every translation."""
        self.flushes += 1
        self.tlb.clear()

    def kick(self, reason: str) -> None:
        """Leave the guest: it is entered for single accesses only, so this one never is inside."""

    def load(self, gfn: int) -> Access:
        """The word at the start of ``gfn``."""
        return self._until_done(gfn, None)

    def store(self, gfn: int, value: int) -> Access:
        """Put ``value`` there."""
        return self._until_done(gfn, value)

    def _until_done(self, gfn: int, value: int | None) -> Access:
        for _ in range(_PATIENCE):
            access = self.attempt(gfn, value)
            if access.exit != "again":
                return access
        return Access("livelock")

    def attempt(self, gfn: int, value: int | None) -> Access:
        """One try: the access is done, or one fault is taken."""
        write = value is not None
        spte = self.kvm.sptes.get(gfn) if gfn < GFN_LIMIT else 0
        found = self.tlb.get(gfn) or self._fill(gfn, spte)
        if found is not None and (found[1] or not write):
            if value is None:
                return Access("ok", int.from_bytes(self.host.read(found[0], 0, 8), "little"))
            self.host.write(found[0], 0, value.to_bytes(8, "little"))
            return Access("ok")
        self.tlb.pop(gfn, None)  # a CPU drops the translation that it faulted on
        self.faults.append(f"{'P+' if spte & SPTE_PRESENT else ''}{'W+' if write else ''}U")
        if spte & SPTE_MMIO:
            return Access("mmio")
        result = self.kvm.fault(gfn, WRITE if write else READ)
        return Access({MMIO: "mmio", FAULT: "efault"}.get(result, "again"))

    def _fill(self, gfn: int, spte: int) -> tuple[int, bool] | None:
        if not spte & SPTE_PRESENT:
            return None
        pfn = spte_pfn(spte) + (gfn & _HUGE_MASK if spte & SPTE_HUGE else 0)
        self.tlb[gfn] = found = (pfn, bool(spte & SPTE_WRITE))
        return found
