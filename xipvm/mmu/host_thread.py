"""A thread of the host: its CPU reaches memory through the primary page table and a TLB of its own.

The TLB keeps what it has seen until it is told to forget: between the change of an entry and the flush an access goes
to the old frame, whatever that holds by then. As on x86, a store through a translation without WRITE or without the
dirty bit walks the table again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.errors import MmError
from xipvm.mmu.fault import handle_mm_fault, why
from xipvm.mmu.file import VmFault
from xipvm.mmu.gup import pieces
from xipvm.mmu.pte import ACCESSED, DIRTY, PRESENT, WRITE, pte_pfn

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


class HostAccessError(MmError):
    """A host thread's access cannot be done; ``signal`` is SIGSEGV, SIGBUS or SIGKILL (no frame left)."""

    def __init__(self, signal: str, what: str, why: str = "") -> None:
        super().__init__(errno.EFAULT, f"{what}: {signal}{why}")
        self.signal = signal


_SIGNALS = {VmFault.SIGSEGV: "SIGSEGV", VmFault.SIGBUS: "SIGBUS", VmFault.OOM: "SIGKILL"}


class HostThread:
    """A thread that runs in ``mm`` from now until :meth:`exit`."""

    __slots__ = ("mm", "name", "tlb")

    def __init__(self, mm: Mm, name: str = "thread0") -> None:
        mm.check_alive("thread")
        self.mm = mm
        self.name = name
        self.tlb: dict[int, int] = {}
        """Entries as they were seen, by page number."""
        mm.threads.append(self)

    def exit(self) -> None:
        """The thread ends; its CPU forgets everything."""
        self.tlb.clear()
        if self.mm.trace.on:
            self.mm.trace.emit("host_tlb_drop", mm=self.mm.name, hva=None, thread=self.name)
        if self in self.mm.threads:
            self.mm.threads.remove(self)

    def load(self, hva: int, size: int) -> bytes:
        """Reads ``size`` bytes. Raises HostAccessError."""
        return b"".join(
            self.mm.host.read(pte_pfn(self._translate(address, False)), offset, length)
            for address, offset, length in pieces(hva, size)
        )

    def store(self, hva: int, data: bytes) -> None:
        """Writes ``data``, page by page: what was written before a signal stays. Raises HostAccessError."""
        for address, offset, length in pieces(hva, len(data)):
            done = address - hva
            self.mm.host.write(pte_pfn(self._translate(address, True)), offset, data[done : done + length])

    def flush_tlb(self, start: int, end: int) -> None:
        """Forgets the translations of bytes ``[start, end)``."""
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        for page in [page for page in self.tlb if first <= page < last]:
            del self.tlb[page]

    def _translate(self, hva: int, write: bool) -> int:
        """The entry through which the access goes."""
        trace = self.mm.trace
        if trace.on:
            access = "write" if write else "read"
            trace.emit("host_access", mm=self.mm.name, hva=hva, access=access, thread=self.name)
        entry = self.tlb.get(hva >> PAGE_SHIFT, 0)
        wanted = PRESENT | WRITE | DIRTY if write else PRESENT
        if entry & wanted == wanted:
            return entry
        return self._walk(hva, write)

    def _walk(self, hva: int, write: bool) -> int:
        mm, page = self.mm, hva >> PAGE_SHIFT
        wanted = PRESENT | WRITE if write else PRESENT
        while True:
            entry = mm.pgd.pte(page)
            if entry & wanted == wanted:
                used = ACCESSED | (DIRTY if write else 0)
                entry |= used
                mm.pgd.set_bits(page, page + 1, used)
                self.tlb[page] = entry
                if mm.trace.on:
                    rights, thread = "rw" if entry & WRITE else "r", self.name
                    mm.trace.emit(
                        "host_tlb_insert",
                        mm=mm.name,
                        hva=hva & PAGE_MASK,
                        pfn=pte_pfn(entry),
                        rights=rights,
                        thread=thread,
                    )
                return entry
            if self.tlb.pop(page, None) is not None and mm.trace.on:  # a CPU drops the translation it faulted on
                mm.trace.emit("host_tlb_drop", mm=mm.name, hva=hva & PAGE_MASK, thread=self.name)
            mm.check_running(f"access of {self.name}")
            fault = handle_mm_fault(mm, hva, write)
            if fault:
                raise HostAccessError(_SIGNALS[fault], f"{self.name} at {hva:#x} in {mm.name}", why(mm, hva, fault))
