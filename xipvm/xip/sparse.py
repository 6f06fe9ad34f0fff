"""The sparse page: one page of zeros that stands for every hole of every XIP file (xip_sparse_page).

Not the zero page, whose entries nobody counts: whoever allocates a block has to find the entries of the sparse page
that mapped the hole, and no others. It is made when the first hole is mapped, and stays as long as its host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from xipvm.address import Pfn

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace

_pages: WeakKeyDictionary[HostMemory, Pfn] = WeakKeyDictionary()


def sparse_page(host: HostMemory) -> Pfn | None:
    """The sparse page, None before the first hole was mapped."""
    return _pages.get(host)


def need_sparse_page(host: HostMemory, trace: Trace) -> Pfn:
    """The sparse page, made if need be. Raises OutOfFrames."""
    pfn = _pages.get(host)
    if pfn is None:
        pfn = _pages[host] = Pfn(host.alloc())
        if trace.on:
            trace.emit("page_alloc", pfn=pfn)
            trace.emit("xip_sparse_page", pfn=pfn)
    return pfn
