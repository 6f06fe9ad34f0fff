"""Pages that somebody holds whatever happens to the entries: pin_user_pages.

Nobody frees or moves a frame that is pinned; who frees blocks of a device on which there is a file system waits until
none of them is (xip/dax.py). What a secondary MMU translates to is not pinned, unless it says so: it is told instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import Pfn

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


def pin_user_page(mm: Mm, hva: int, *, write: bool) -> Pfn:
    """The frame of the page at ``hva``, faulted in as need be, and pinned. Raises MmError EFAULT, ENOMEM."""
    pfn = Pfn(mm.get_user_pages(hva, write=write).pfn)
    mm.host.pin(pfn)
    return pfn


def unpin_user_page(mm: Mm, pfn: int) -> None:
    """Gives a pinned frame back."""
    mm.unpin_frame(pfn)
