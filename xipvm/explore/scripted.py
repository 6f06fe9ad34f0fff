"""A vCPU whose accesses are calls: it walks, faults and keeps translations as the engine's walker and TLB do.

An access is: TLB, else the shadow entry, else ``SecondaryMmu.fault`` and *the walk starts over*. Between the last look
at an entry and the access there is no schedule point: a flush waits until every vCPU has acknowledged it, so it never
comes in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xipvm.actors import give_way, point
from xipvm.errors import DeadlockError
from xipvm.errors import GuestAccessError as GuestAccessError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.base import READ, RETRY_WALK, WRITE, SecondaryMmu
from xipvm.trace.funnel import Trace

RETRIES: Final = 2_000
"""Faults of one access after which nothing will come of it: the others have gone on meanwhile, as far as they can."""


class ScriptedVcpu:
    """vCPU ``index`` of ``mmu``. Keeps every translation that it was given until it is told to forget."""

    def __init__(self, mmu: SecondaryMmu, host: HostMemory, trace: Trace, index: int) -> None:
        self.mmu = mmu
        self.host = host
        self.trace = trace
        self.index = index
        self.tlb: dict[int, tuple[int, bool]] = {}
        """Frame and writability by gfn."""
        self.heard: Callable[[ScriptedVcpu, int, int, bytes, bool], None] | None = None
        """Is told of every access: the guest frame, the frame, the bytes, whether they were written."""

    def flush_tlb(self, reason: str) -> None:
        """Forget every translation."""
        self.tlb.clear()
        if self.trace.on:
            self.trace.emit("tlb_flush", vcpu=self.index, reason=reason)

    def kick(self, reason: str) -> None:
        """It is in the guest for single accesses only."""

    def load(self, gfn: int, size: int = 8, offset: int = 0) -> bytes:
        """``size`` bytes at ``offset`` of guest frame ``gfn``. Raises GuestAccessError."""
        pfn = self._translate(gfn, False)
        data = self.host.read(pfn, offset, size)
        if self.heard is not None:
            self.heard(self, gfn, pfn, data, False)
        return data

    def store(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """Put ``data`` there. Raises GuestAccessError."""
        pfn = self._translate(gfn, True)
        self.host.write(pfn, offset, data)
        if self.heard is not None:
            self.heard(self, gfn, pfn, data, True)

    def _translate(self, gfn: int, write: bool) -> int:
        point("vcpu.access")
        self.mmu.vcpu_enter(self)
        for attempt in range(RETRIES):
            seen = self.tlb.get(gfn)
            if seen is None or (write and not seen[1]):
                seen = self._walk(gfn)
            if seen is not None and (seen[1] or not write):
                return seen[0]
            self.tlb.pop(gfn, None)  # a CPU drops the translation that it faulted on
            if self.mmu.fault(gfn, WRITE if write else READ) != RETRY_WALK:
                raise GuestAccessError(gfn, self.mmu.last_error or "MMIO")
            (give_way if attempt else point)("vcpu.retry")
        raise DeadlockError(f"vcpu{self.index} faults on guest frame {gfn:#x} again and again")

    def _walk(self, gfn: int) -> tuple[int, bool] | None:
        mapped = self.mmu.translate(gfn)
        if mapped is None:
            return None
        pfn, writable = mapped
        self.tlb[gfn] = (pfn, writable)
        if self.trace.on:
            self.trace.emit("tlb_insert", vcpu=self.index, gfn=gfn, pfn=pfn, rights="rw" if writable else "r")
        return pfn, writable
