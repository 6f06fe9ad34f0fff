"""hmm_range_fault: what the primary page table has for a range, for a device that mirrors it; faulting where asked to.

Nothing is pinned and no reference is taken. What is returned is true only as long as the device's interval notifier
says so, so the way to use it is the collision scheme of :mod:`xipvm.notifier.interval`::

    range.notifier_seq = notifier.read_begin()
    hmm_range_fault(range)                  # may sleep; EBUSY: begin again
    # take the lock that invalidate() takes
    if notifier.read_retry(range.notifier_seq): begin again
    # use range.hmm_pfns, and drop the lock

Every page gets a word: the frame, and bits that say what may be done with it. On the way in its bits VALID and WRITE
ask for a page to be faulted in, and to be writable; ``default_flags`` ask that of all, and ``pfn_flags_mask`` says
which bits of the words count. Without either the call is a snapshot, which faults nothing in and never fails for a
page: what is not there is 0, and what cannot be, behind no area or one without PROT_READ, is ERROR.

A present page of device memory that the CPU can reach is a page like any other. One that it cannot reach is given to
``dev_private_owner`` alone; everybody else has it brought back by a fault. (Linux gives the owner a read-only one even
when it wants to write; here that is a fault, too, as for every page that cannot be written.)

mmap_lock is not held for the caller: the walk is atomic between two faults, and a fault waits for writers by itself.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.errors import MmError
from xipvm.locks.check import might_sleep
from xipvm.mmu.device_private import device_private_page
from xipvm.mmu.fault import handle_mm_fault, why
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.pte import HUGE, PRESENT, SPECIAL, WRITE, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.notifier import MmuIntervalNotifier

HMM_PFN_VALID: Final = 1 << 63
"""The frame can be read."""
HMM_PFN_WRITE: Final = 1 << 62
HMM_PFN_ERROR: Final = 1 << 61
"""No page, and none to be had."""
HMM_PFN_REQ_FAULT: Final = HMM_PFN_VALID
"""Asks for the page."""
HMM_PFN_REQ_WRITE: Final = HMM_PFN_WRITE
"""Together with REQ_FAULT: to write to."""
_ORDER_SHIFT: Final = 56
_ORDER: Final = 0x1F << _ORDER_SHIFT
_PFN: Final = (1 << _ORDER_SHIFT) - 1
_PMD_ORDER: Final = PMD_SHIFT - PAGE_SHIFT

_end = attrgetter("end")


class HmmRange:
    """Bytes ``[start, end)`` of ``mm``, whole pages, as ``notifier`` watches them.

    ``hmm_pfns`` has a word a page, requests first and answers afterwards. Raises MmError EINVAL for a range that is
    empty or not aligned.
    """

    __slots__ = (
        "default_flags",
        "dev_private_owner",
        "end",
        "hmm_pfns",
        "mm",
        "notifier",
        "notifier_seq",
        "pfn_flags_mask",
        "start",
    )

    def __init__(
        self,
        mm: Mm,
        notifier: MmuIntervalNotifier,
        start: int,
        end: int,
        *,
        default_flags: int = 0,
        pfn_flags_mask: int = 0,
        requests: Sequence[int] = (),
        dev_private_owner: object = None,
    ) -> None:
        if start >= end or (start | end) & ~PAGE_MASK or start < 0:
            raise MmError(errno.EINVAL, f"hmm range {start:#x}..{end:#x}")
        self.mm = mm
        self.notifier = notifier
        self.notifier_seq = 0
        """What ``read_begin`` said."""
        self.start = start
        self.end = end
        self.default_flags = default_flags
        self.pfn_flags_mask = pfn_flags_mask
        self.dev_private_owner = dev_private_owner
        pages = (end - start) >> PAGE_SHIFT
        self.hmm_pfns: list[int] = [*requests, *[0] * (pages - len(requests))]

    def wanted(self, index: int) -> int:
        """What is asked for page ``index``: REQ_* bits."""
        return self.hmm_pfns[index] & self.pfn_flags_mask | self.default_flags


def hmm_pfn_to_pfn(word: int) -> int:
    """The frame of a VALID word."""
    return word & _PFN


def hmm_pfn_to_map_order(word: int) -> int:
    """How big the entry is that maps the page: 2 to the power of this pages, naturally aligned."""
    return (word & _ORDER) >> _ORDER_SHIFT


def hmm_range_fault(range: HmmRange) -> None:
    """Fills ``range.hmm_pfns``.

    Raises MmError: EBUSY when the range was invalidated since ``notifier_seq`` was taken, which a fault does by itself
    that copies a page, so that a range of n pages may take n + 1 tries with nobody else about; EFAULT for a page that
    is wanted and is not to be had, EPERM for one that is wanted to write to in an area that must not be written, ENOMEM
    when there was no frame, EDEADLK.
    """
    mm = range.mm
    mm.notifiers.needs_modern("hmm_range_fault")
    might_sleep("hmm_range_fault")
    at = range.start
    while at < range.end:
        if range.notifier.check_retry(range.notifier_seq):
            raise MmError(errno.EBUSY, f"hmm_range_fault: {range.notifier.name} was invalidated")
        missing = _walk(range, at)
        if missing is None:
            return
        at = missing
        _fault(range, at)


def _walk(range: HmmRange, at: int) -> int | None:
    """Answers from ``at`` on; the address of the first page that has to be faulted in, None when there is none."""
    mm = range.mm
    while at < range.end:
        area = mm.find_vma(at)
        if area is None or not area.prot & PROT_READ:
            end = min(range.end, _next_area(mm, at) if area is None else area.end)
            _no_access(range, at, end, area)
        else:
            end = min(range.end, area.end)
            for hva in _pages(at, end):
                index = (hva - range.start) >> PAGE_SHIFT
                word = _answer(range, hva)
                if _must_fault(range.wanted(index), word):
                    return hva
                range.hmm_pfns[index] = word
        at = end
    return None


def _pages(start: int, end: int) -> range:
    return range(start, end, 1 << PAGE_SHIFT)


def _next_area(mm: Mm, at: int) -> int:
    after = bisect_right(mm.vmas, at, key=_end)
    return mm.vmas[after].start if after < len(mm.vmas) else 1 << 64


def _no_access(range: HmmRange, start: int, end: int, area: Vma | None) -> None:
    """Nobody can read ``[start, end)``."""
    for hva in _pages(start, end):
        index = (hva - range.start) >> PAGE_SHIFT
        if range.wanted(index) & HMM_PFN_REQ_FAULT:
            why = "nothing is mapped there" if area is None else f"{area!r} cannot be read"
            raise MmError(errno.EFAULT, f"hmm_range_fault({hva:#x}): {why}")
        range.hmm_pfns[index] = HMM_PFN_ERROR


def _answer(range: HmmRange, hva: int) -> int:
    """What the entry of ``hva`` gives."""
    mm = range.mm
    entry = mm.pgd.pte(hva >> PAGE_SHIFT)
    writable = HMM_PFN_WRITE if entry & WRITE else 0
    if not entry & PRESENT:
        page = device_private_page(mm, entry)
        if page is None or range.dev_private_owner is None or page.pagemap.owner is not range.dev_private_owner:
            return 0
        return page.pfn | HMM_PFN_VALID | writable
    pfn = pte_pfn(entry)
    if entry & HUGE:
        writable |= _PMD_ORDER << _ORDER_SHIFT
    elif entry & SPECIAL and pfn != ZERO_PFN and not _devmap(mm.find_vma(hva)):
        return HMM_PFN_ERROR  # no page that anybody could hold on to
    return pfn | HMM_PFN_VALID | writable


def _devmap(area: Vma | None) -> bool:
    return area is not None and area.file is not None and area.file.devmap


def _must_fault(wanted: int, word: int) -> bool:
    if not wanted & HMM_PFN_REQ_FAULT:
        return False
    return not word & HMM_PFN_VALID or bool(wanted & HMM_PFN_REQ_WRITE and not word & HMM_PFN_WRITE)


def _fault(range: HmmRange, hva: int) -> None:
    """Faults one page in, as it is wanted; who comes back has to look again."""
    mm = range.mm
    index = (hva - range.start) >> PAGE_SHIFT
    write = bool(range.wanted(index) & HMM_PFN_REQ_WRITE)
    area = mm.find_vma(hva)
    if mm.dead or mm.oom is not None or area is None or _answer(range, hva) & HMM_PFN_ERROR:
        raise MmError(errno.EFAULT, f"hmm_range_fault({hva:#x}) in {mm.name}")
    if write and not area.prot & PROT_WRITE:
        raise MmError(errno.EPERM, f"hmm_range_fault({hva:#x}): {area!r} cannot be written")
    fault = handle_mm_fault(mm, hva, write)
    if fault:
        code = errno.ENOMEM if fault == VmFault.OOM else errno.EFAULT
        raise MmError(code, f"hmm_range_fault({hva:#x}) in {mm.name}: {fault.name}{why(mm, hva, fault)}")
