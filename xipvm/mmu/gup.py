"""get_user_pages: from an address to the frame behind it, faulting where needed; and copies to and from an mm.

No reference is taken for the caller: between two schedule points the frame cannot go away, and whoever keeps a pfn
across one has to be told of changes (a notifier) or hold a reference of its own (``HostMemory.get``).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import DeadlockError, MmError
from xipvm.mmu.fault import handle_mm_fault, why
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import PG_HUGETLB
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, EXCLUSIVE, HUGE, MAPPED, SOFT_DIRTY, UFFD_WP, WRITE, pte_pfn

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.tables import GupPage


def get_user_pages(mm: Mm, hva: int, write: bool) -> GupPage:
    """See :meth:`Mm.get_user_pages`; this is the way for entries that do not allow the access yet."""
    mm.check_running("get_user_pages")
    while True:
        fault = handle_mm_fault(mm, hva, write)
        if fault:
            raise MmError(
                errno.ENOMEM if fault == VmFault.OOM else errno.EFAULT,
                f"get_user_pages({hva:#x}, {'write' if write else 'read'}) in {mm.name}: "
                f"{fault.name}{why(mm, hva, fault)}",
            )
        page = mm.pgd.gup(hva >> PAGE_SHIFT, write)
        if page is not None:
            return page


def pieces(hva: int, size: int) -> list[tuple[int, int, int]]:
    """``[hva, hva + size)`` cut at page boundaries: (address, offset in its page, bytes). EFAULT if one is negative."""
    if hva < 0 or size < 0:
        raise MmError(errno.EFAULT, f"{size} bytes at {hva:#x}")
    cuts = []
    end = hva + size
    while hva < end:
        offset = hva & (PAGE_SIZE - 1)
        length = min(PAGE_SIZE - offset, end - hva)
        cuts.append((hva, offset, length))
        hva += length
    return cuts


def copy_from_user(mm: Mm, hva: int, size: int) -> bytes:
    """See :meth:`Mm.read`."""
    parts = []
    for address, offset, length in pieces(hva, size):
        parts.append(mm.host.read(mm.get_user_pages(address, write=False).pfn, offset, length))
    return b"".join(parts)


def access_remote_vm(mm: Mm, hva: int, data: bytes, force: bool) -> int:
    """See :meth:`Mm.access_remote_vm` (``force``) and :meth:`Mm.process_vm_writev`."""
    mm.check_running("access_remote_vm" if force else "process_vm_writev")
    done = 0
    for address, offset, length in pieces(hva, len(data)):
        try:
            pfn = _get_forced(mm, address) if force else mm.get_user_pages(address, write=True).pfn
        except DeadlockError:
            raise
        except MmError as error:
            if not done:
                raise MmError(errno.EIO if force else errno.EFAULT, error.what) from None
            break
        mm.host.write(pfn, offset, data[done : done + length])
        done += length
    return done


def _get_forced(mm: Mm, hva: int) -> int:
    """The frame to write to: the process's own, also behind an entry that does not allow it. Raises EFAULT, ENOMEM."""
    own = ANON | EXCLUSIVE | SOFT_DIRTY
    while True:
        entry = mm.pgd.pte(hva >> PAGE_SHIFT)
        may = entry & MAPPED and entry & own == own and not entry & UFFD_WP
        if entry & WRITE or (may and not (entry & HUGE and mm.host.flags(pte_pfn(entry)) & PG_HUGETLB)):
            mm.pgd.set_bits(hva >> PAGE_SHIFT, (hva >> PAGE_SHIFT) + 1, ACCESSED | DIRTY)
            return pte_pfn(entry)
        fault = handle_mm_fault(mm, hva, True, True)
        if fault:
            raise MmError(errno.EFAULT, f"write to {hva:#x} in {mm.name}: {fault.name}{why(mm, hva, fault)}")


def copy_to_user(mm: Mm, hva: int, data: bytes | bytearray | memoryview) -> None:
    """See :meth:`Mm.write`. The pages are held until all are there."""
    host, source = mm.host, memoryview(data).cast("B")
    held: list[int] = []
    cuts = pieces(hva, len(source))
    try:
        for address, _, _ in cuts:
            page = mm.get_user_pages(address, write=True)
            host.pin(page.pfn)
            held.append(page.pfn)
        done = 0
        for pfn, (_, offset, length) in zip(held, cuts, strict=True):
            host.write(pfn, offset, source[done : done + length])
            done += length
    finally:
        for pfn in held:
            mm.unpin_frame(pfn)
