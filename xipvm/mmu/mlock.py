"""mlock and munlock: areas whose pages are not to be taken away, and are there from the beginning.

Locking is a flag of the area. Nobody is told of it; pages that were missing are faulted in, for writing where the area
is private and writable, so that none has to be copied later. A copy announces itself, as ever.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_MASK, page_up
from xipvm.errors import MmError
from xipvm.mmu.madvise import change_flags, fault_in
from xipvm.mmu.vma import ADDRESSES, PROT_WRITE, VM_HUGETLB, VM_LOCKED

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


def mlock(mm: Mm, addr: int, length: int, on: bool) -> None:
    """See :meth:`Mm.mlock`; ``on`` is False for munlock."""
    what = "mlock" if on else "munlock"
    if addr < 0 or length < 0 or addr + length > ADDRESSES:
        raise MmError(errno.EINVAL, f"{what}({addr:#x}, {length:#x})")
    start, end = addr & PAGE_MASK, page_up(addr + length)
    with mm.mmap_lock.write:
        mm.check_alive(what)
        mm.covered(what, start, end)
        if mm.trace.on:
            mm.trace.emit("mm_mlock", mm=mm.name, start=start, end=end, on=on)
        # Huge pages of the pool stay anyway, and areas of them cannot be cut everywhere.
        areas = mm.areas_in(start, end) if start < end else []
        for lo, hi in [(max(a.start, start), min(a.end, end)) for a in areas if not a.flags & VM_HUGETLB]:
            change_flags(mm, lo, hi, VM_LOCKED, on)
    if on:
        populate(mm, start, end)


def populate(mm: Mm, start: int, end: int) -> None:
    """Faults in what the locked areas in ``[start, end)`` lack. Raises ENOMEM, and EAGAIN when there is no frame."""
    at = start
    while at < end:
        area = mm.find_vma(at)
        if area is None:
            raise MmError(errno.ENOMEM, f"mlock: nothing is mapped at {at:#x} in {mm.name}")
        last = min(area.end, end)
        try:
            fault_in(mm, at, last, bool(area.prot & PROT_WRITE) and not area.shared)
        except MmError as error:
            if error.errno == errno.EDEADLK:
                raise
            raise MmError(errno.EAGAIN if error.errno == errno.ENOMEM else errno.ENOMEM, error.what) from None
        at = last
