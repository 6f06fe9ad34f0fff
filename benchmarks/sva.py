"""SVA for the benchmark of secondary MMUs: a fault is a walk of the host's table; it hears of TLB flushes only."""

from __future__ import annotations

from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import RETRY_WALK, SecondaryMmu
from xipvm.mmu.secondary.sva import Sva


class _FromZero(Sva):
    """Its pages count from ``first``, where a device's are those of addresses."""

    first = 0
    inside = False

    def fault(self, page: int, access: int) -> int:
        """The device uses ``page``: a walk, and a page request where that finds nothing."""
        if self.inside:
            return super().fault(page, access)
        self.inside = True
        try:
            self._translate((self.first + page) << PAGE_SHIFT, access)
        finally:
            self.inside = False
        return RETRY_WALK


def make(mm: Mm, host: HostMemory, hva: int, pages: int) -> SecondaryMmu:
    """A device whose pages from 0 on are the bytes from ``hva`` on."""
    device = _FromZero(mm)
    device.first = hva >> PAGE_SHIFT
    return device
