"""A device that shares the host's address space: it walks the primary page table and has a TLB, and nothing else.

It is told when the host's CPUs forget translations (``arch_invalidate_secondary_tlbs``), and forgets them, too.
"""

from __future__ import annotations

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.mmu.mm import Mm
from xipvm.notifier import MmuNotifier, NotifiedMm


class FollowingDevice(MmuNotifier):
    """Registers with ``mm`` at once; ``name`` is what traces call it. :meth:`close` it."""

    def __init__(self, mm: Mm, name: str) -> None:
        self.mm = mm
        self.name = name
        self.tlb: dict[int, tuple[int, bool]] = {}
        """Frame and writability by page."""
        mm.notifiers.register(self)

    def close(self) -> None:
        """Leave the mm. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)

    def load(self, hva: int, size: int) -> bytes:
        """``size`` bytes of one page. Raises MmError."""
        return self.mm.host.read(self._translate(hva, False), hva & ~PAGE_MASK, size)

    def store(self, hva: int, data: bytes) -> None:
        """Put ``data`` into one page. Raises MmError."""
        self.mm.host.write(self._translate(hva, True), hva & ~PAGE_MASK, data)

    def _translate(self, hva: int, write: bool) -> int:
        point("device.access")
        seen = self.tlb.get(hva >> PAGE_SHIFT)
        if seen is None or (write and not seen[1]):
            page = self.mm.get_user_pages(hva, write=write)  # and no schedule point behind its last look
            seen = self.tlb[hva >> PAGE_SHIFT] = page.pfn, page.writable
            trace = self.mm.trace
            if trace.on:
                rights = "rw" if page.writable else "r"
                trace.emit(
                    "device_tlb_insert",
                    mm=self.mm.name, hva=hva & PAGE_MASK, pfn=page.pfn, rights=rights, device=self.name,
                )  # fmt: skip
        return seen[0]

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """Forget bytes ``[start, end)``."""
        for page in [page for page in self.tlb if start >> PAGE_SHIFT <= page < end >> PAGE_SHIFT]:
            del self.tlb[page]

    def release(self, mm: NotifiedMm) -> None:
        """Forget everything."""
        self.tlb.clear()
