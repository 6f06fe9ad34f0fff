"""Shared virtual addressing: a device that uses the host's own page table, by an IOMMU that has a TLB and nothing else.

Binding gives an mm a PASID, under which a device's accesses are translated: by the IOTLB, else by a walk of the mm's
page table, which is the hardware's own and marks entries used and written as a CPU's does. Where the table does not
allow the access the device asks for the page (a *page request*): the host's fault handler runs for it, and it walks
again.

There is no entry of its own that could be late, so it needs no ranges. What it must hear of is that the host's CPUs
forget translations: ``arch_invalidate_secondary_tlbs`` comes with each of their TLB flushes, often under the page table
lock, so **it may not sleep**; when it returns the IOTLB has forgotten the range. A walk and the filling of the TLB are
one step for an invalidation: it waits for walks that are under way.

``release``, when the mm dies: the PASID translates nothing any more, and the IOTLB is empty, before a page is freed.

An access that is not possible is an error of the device's, not of the process: nobody gets a signal.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, Hva
from xipvm.errors import DeadlockError, MmError
from xipvm.mmu.fault import handle_mm_fault, why
from xipvm.mmu.file import VmFault
from xipvm.mmu.gup import pieces
from xipvm.mmu.secondary.base import ACCESS_NAMES, FAULT, READ, RETRY_WALK, WRITE, SecondaryMmu
from xipvm.mmu.tables import GupPage
from xipvm.notifier import MmuNotifier, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

_ADDRESS_BITS: Final = 47


class SvaError(MmError):
    """A device's access of ``hva`` is not possible; errno is EFAULT, or ESRCH when its PASID translates nothing."""

    def __init__(self, number: int, hva: int, what: str) -> None:
        super().__init__(number, what)
        self.hva = hva


class Sva(SecondaryMmu, MmuNotifier):
    """``mm`` bound to a device; ``name`` is what traces call it. Registers at once, and raises what that raises.

    Its pages are the host's: numbers of pages of the mm.
    """

    def __init__(self, mm: Mm, name: str = "sva0") -> None:
        SecondaryMmu.__init__(self, mm, mm.trace, name)
        self.iotlb: dict[int, GupPage] = {}
        """Frame and writability by page."""
        self.released = False
        """The PASID translates nothing any more."""
        self.invalidations = 0
        """How often it was told that the host's CPUs forget something."""
        self.requests = 0
        """Pages that it asked for."""
        mm.notifiers.register(self)

    # ---- the device's accesses

    def load(self, hva: int, size: int) -> bytes:
        """DMA from the process. Raises SvaError."""
        return b"".join(
            self.mm.host.read(self._translate(address, READ), offset, length)
            for address, offset, length in pieces(hva, size)
        )

    def store(self, hva: int, data: bytes) -> None:
        """DMA into the process, page by page: what was written before an error stays. Raises SvaError."""
        for address, offset, length in pieces(hva, len(data)):
            done = address - hva
            self.mm.host.write(self._translate(address, WRITE), offset, data[done : done + length])

    def fetch_add(self, hva: int, value: int) -> int:
        """Add to the 64-bit number at ``hva``, which is aligned, atomically; what it was. Raises SvaError."""
        pfn, offset = self._translate(hva, WRITE), hva & ~PAGE_MASK
        before = int.from_bytes(self.mm.host.read(pfn, offset, 8), "little")
        self.mm.host.write(pfn, offset, ((before + value) % (1 << 64)).to_bytes(8, "little"))
        return before

    def _translate(self, hva: int, access: int) -> int:
        """The frame of an access, which follows with no schedule point in between."""
        point("sva.access")
        page = hva >> PAGE_SHIFT
        while True:
            seen = self.iotlb.get(page)
            if seen is None or (access == WRITE and not seen.writable):
                seen = self._walk(page, access)
            if seen is not None:
                return seen.pfn
            if self.fault(page, access) == FAULT:
                raise SvaError(errno.ESRCH if self.released else errno.EFAULT, hva, self.last_error)

    def _walk(self, page: int, access: int) -> GupPage | None:
        """The hardware's walk of the host's page table, None where that does not allow the access."""
        if self.released or page >> _ADDRESS_BITS - PAGE_SHIFT:
            return None
        found = self.mm.pgd.gup(page, access == WRITE)
        if found is None:
            self._forget(page << PAGE_SHIFT, page + 1 << PAGE_SHIFT)  # the translation it faulted on
            return None
        self.iotlb[page] = found
        if self.trace.on:
            rights, hva = "rw" if found.writable else "r", page << PAGE_SHIFT
            self.trace.emit("iotlb_insert", mm=self.mm.name, hva=hva, pfn=found.pfn, rights=rights, device=self.name)
        return found

    def fault(self, page: int, access: int) -> int:
        """A page request: have the host's fault handler make ``page`` accessible, then walk again."""
        self.requests += 1
        hva = page << PAGE_SHIFT
        trace = self.trace
        if not trace.on:
            return self._page_request(hva, access)
        kind = ACCESS_NAMES[access]
        with trace.because(trace.emit("page_request", mm=self.mm.name, hva=hva, access=kind, device=self.name)):
            return self._page_request(hva, access)

    def _page_request(self, hva: int, access: int) -> int:
        if self.released:
            self.last_error = f"{self.name} is not bound to {self.mm.name} any more"
            return FAULT
        point("sva.page_request")
        try:
            self.mm.check_running("page request")
            fault = handle_mm_fault(self.mm, hva, access == WRITE)
        except DeadlockError:
            raise
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        if fault:
            reason = "no memory left" if fault == VmFault.OOM else f"{fault.name}{why(self.mm, hva, fault)}"
            self.last_error = f"{self.name} {ACCESS_NAMES[access]}s {hva:#x} of {self.mm.name}: {reason}"
            return FAULT
        point("sva.page_response")
        return RETRY_WALK

    # ---- what it is told

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """Forget bytes ``[start, end)``; an ``end`` of ULONG_MAX means everything behind ``start``."""
        self.invalidations += 1
        self._forget(start, min(end, 1 << _ADDRESS_BITS))

    def _forget(self, start: int, end: int) -> None:
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        if last - first > len(self.iotlb):
            gone = [page for page in self.iotlb if first <= page < last]
        else:
            gone = [page for page in range(first, last) if page in self.iotlb]
        for page in gone:
            del self.iotlb[page]
        if gone and self.trace.on:
            self.trace.emit("iotlb_drop", mm=self.mm.name, start=start, end=end, device=self.name)

    def release(self, mm: NotifiedMm) -> None:
        """Translate nothing any more."""
        self.released = True
        self._forget(0, 1 << _ADDRESS_BITS)

    # ---- questions

    def translate(self, page: int) -> tuple[int, bool] | None:
        """What its IOTLB has for ``page``."""
        seen = self.iotlb.get(page)
        return None if seen is None else (seen.pfn, seen.writable)

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """The pages that its IOTLB has."""
        for page in self.iotlb:
            yield page, Hva(page << PAGE_SHIFT)

    def describe(self, page: int) -> str:
        """What is known of ``page``, on one line."""
        seen = self.translate(page)
        entry = "nothing" if seen is None else f"frame {seen[0]:#x} {'rw' if seen[1] else 'r'}"
        bound = f"no longer bound to {self.mm.name}" if self.released else f"bound to {self.mm.name}"
        return f"hva {page << PAGE_SHIFT & PAGE_MASK:#x}: IOTLB of {self.name} has {entry}; {bound}"

    def destroy(self) -> None:
        """Unbind, which releases. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)
