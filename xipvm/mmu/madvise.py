"""madvise: pages that are not needed any more, and areas that fork leaves out."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from xipvm.errors import MmError
from xipvm.mmu.mapping import merge, split
from xipvm.mmu.vma import VM_DONTCOPY, Vma
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

MADV_DONTNEED: Final = 4
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11

_NAMES: Final = {MADV_DONTNEED: "DONTNEED", MADV_DONTFORK: "DONTFORK", MADV_DOFORK: "DOFORK"}


def madvise(mm: Mm, addr: int, length: int, advice: int) -> None:
    """See :meth:`Mm.madvise`."""
    if advice not in _NAMES:
        raise MmError(errno.EINVAL, f"madvise: advice {advice}")
    with mm.mmap_lock.read if advice == MADV_DONTNEED else mm.mmap_lock.write:
        start, end = mm.check_range("madvise", addr, length)
        _madvise(mm, start, end, advice)


def _madvise(mm: Mm, start: int, end: int, advice: int) -> None:
    areas = mm.covered("madvise", start, end)
    if not areas:
        return
    with mm.because("mm_madvise", start=start, end=end, advice=_NAMES[advice]):
        if advice == MADV_DONTNEED:
            _dontneed(mm, areas, start, end)
        else:
            _set_flag(mm, start, end, VM_DONTCOPY, advice == MADV_DONTFORK)


def _dontneed(mm: Mm, areas: list[Vma], start: int, end: int) -> None:
    """One range per area, then one flush and the free for all of them."""
    gather = MmuGather(mm)
    for area in areas:
        lo, hi = max(area.start, start), min(area.end, end)
        with mm.notifiers.invalidate_range(lo, hi, RangeEvent.CLEAR):
            gather.zap(lo, hi)
    gather.finish()


def _set_flag(mm: Mm, start: int, end: int, flag: int, on: bool) -> None:
    split(mm, start)
    split(mm, end)
    for area in mm.areas_in(start, end):
        area.flags = area.flags | flag if on else area.flags & ~flag
    merge(mm, start, end)
