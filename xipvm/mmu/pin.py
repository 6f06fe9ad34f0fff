"""Pages that somebody holds whatever happens to the entries: pin_user_pages.

A frame of the arena has a reference count, which a pin raises. A frame of a device has none; who frees blocks of a
device on which there is a file system asks here whether somebody still reads or writes them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from xipvm.address import Pfn
from xipvm.errors import InternalError

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm

_pins: WeakKeyDictionary[HostMemory, Counter[int]] = WeakKeyDictionary()


def pin_user_page(mm: Mm, hva: int, *, write: bool) -> Pfn:
    """The frame of the page at ``hva``, faulted in as need be, and pinned. Raises MmError EFAULT, ENOMEM."""
    pfn = mm.get_user_pages(hva, write=write).pfn
    if mm.host.is_device(pfn):
        _pins.setdefault(mm.host, Counter())[pfn] += 1
    else:
        mm.host.get(pfn)
    return Pfn(pfn)


def unpin_user_page(mm: Mm, pfn: int) -> None:
    """Gives a pinned frame back."""
    if not mm.host.is_device(pfn):
        mm.put_frame(pfn)
        return
    pins = _pins.get(mm.host, Counter())
    if not pins[pfn]:
        raise InternalError(f"frame {pfn:#x} is unpinned, and was not pinned")
    pins[pfn] -= 1
    if not pins[pfn]:
        del pins[pfn]


def pinned_device_pages(host: HostMemory) -> Counter[int]:
    """How often each device frame is pinned."""
    return _pins.get(host, Counter())
