"""The sparse page: one page of zeros that stands for every hole of every XIP file (xip_sparse_page).

Not the zero page, whose entries nobody counts: whoever allocates a block has to find the entries of the sparse page
that mapped the hole, and no others. It is made when the first hole is mapped, and stays as long as its host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import Pfn
from xipvm.mmu.rmap import reverse_map

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace


def sparse_page(host: HostMemory) -> Pfn | None:
    """The sparse page, None before the first hole was mapped."""
    pfn = reverse_map(host).sparse_page
    return Pfn(pfn) if pfn else None


def need_sparse_page(host: HostMemory, trace: Trace) -> Pfn:
    """The sparse page, made if need be. Raises OutOfFrames."""
    rmap = reverse_map(host)
    if not rmap.sparse_page:
        rmap.sparse_page = host.alloc()
        if trace.on:
            trace.emit("page_alloc", pfn=rmap.sparse_page)
            trace.emit("xip_sparse_page", pfn=rmap.sparse_page)
    return Pfn(rmap.sparse_page)
