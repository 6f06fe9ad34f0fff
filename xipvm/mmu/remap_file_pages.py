"""remap_file_pages: pages of a file in another order than the file's, in one area of addresses.

Since 3.16 an area a piece, as everybody else makes them: the reverse map finds all of them. In 2008 the area stayed one
(nonlinear), and only walking its page tables found what was where.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.vma import MAP_FIXED, MAP_SHARED

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


def remap_file_pages(mm: Mm, addr: int, size: int, pgoff: int) -> None:
    """``[addr, addr + size)`` of a shared area shows the pages of its file from ``pgoff`` on.

    Raises MmError EINVAL: not whole pages, or not all in one shared area of a file.
    """
    area = mm.find_vma(addr)
    if (
        addr % PAGE_SIZE
        or size % PAGE_SIZE
        or size <= 0
        or pgoff < 0
        or area is None
        or area.file is None
        or not area.shared
        or addr + size > area.end
    ):
        raise MmError(errno.EINVAL, f"remap_file_pages({addr:#x}, {size:#x}, {pgoff:#x})")
    mm.mmap(size, area.prot, MAP_SHARED | MAP_FIXED, addr=addr, file=area.file, pgoff=pgoff)
