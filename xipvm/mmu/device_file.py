"""Device memory as a file: a flash array whose own bytes are mapped, executed and read without a copy.

Its frames lie outside the arena (``HostMemory.add_device``), and entries name them without a reference, as
VM_MIXEDMAP does. What makes the device unmappable for a while (a chip that leaves read-array mode) first makes
``ready`` say no and then calls :meth:`DeviceFile.unmap`: from then on a fault gives SIGBUS, EFAULT to get_user_pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm.mmu.file import AddressSpace, FaultResult, VmFault
from xipvm.mmu.zap import unmap_mapping_range

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace


_OK = VmFault.OK  # attributes of enumerations are slow


def _always() -> bool:
    return True


class DeviceFile(AddressSpace):
    """``pages`` device frames from ``first`` on. ``ready()`` says whether they can be mapped now."""

    kind = "device"
    mixed = True

    def __init__(
        self,
        host: HostMemory,
        trace: Trace,
        name: str,
        first: int,
        pages: int,
        *,
        ready: Callable[[], bool] = _always,
        writable: bool = False,
    ) -> None:
        super().__init__(host, trace, name, writable=writable)
        self.first = first
        self.pages = pages
        self.ready = ready

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """The frame itself."""
        if pgoff >= self.pages or not self.ready():
            return 0, VmFault.SIGBUS
        return self.first + pgoff, _OK

    def unmap(self, pgoff: int = 0, count: int | None = None) -> None:
        """Takes the pages (all by default) out of every mapping; private copies stay."""
        unmap_mapping_range(self, pgoff, self.pages - pgoff if count is None else count, even_cows=False)
