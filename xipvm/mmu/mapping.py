"""mmap and munmap: the areas of an mm, split and merged so that neighbours of one kind are one area.

Merging follows Linux: neighbours with the same protection, flags and file, whose page offsets continue and whose
anonymous pages have compatible roots; areas of huge pages of the pool (hugetlb.py) stay as they are. It is not
cosmetic: fork and MADV_DONTNEED announce one range per area.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT, Hva, page_up
from xipvm.errors import DeadlockError, MmError, RecursiveLockError
from xipvm.mmu.huge_pmd import huge_up, vma_adjust_trans_huge
from xipvm.mmu.hugetlb import check_mmap, check_split, hugetlb_split
from xipvm.mmu.rmap import AreaLocks
from xipvm.mmu.uffd_reach import unmapping
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_HUGE_2MB,
    MAP_HUGETLB,
    MAP_KNOWN,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_ALL,
    PROT_READ,
    PROT_WRITE,
    TASK_SIZE,
    VM_HUGETLB,
    VM_MIXEDMAP,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    Vma,
)
from xipvm.mmu.zap import check_unlocked, unmap_vmas

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.rmap import AnonVma

MMAP_TOP: Final = 0x7FFF_F7FF_F000
"""Areas without a wish for an address are put below this one, downwards."""
_HUGE: Final = 2 << 20
_MAX_PGOFF: Final = 1 << 51

_start = attrgetter("start")


# ---- mmap and munmap


def mmap(mm: Mm, length: int, prot: int, flags: int, addr: int | None, file: AddressSpace | None, pgoff: int) -> Hva:
    """See :meth:`Mm.mmap`."""
    size = huge_up(length) if file is not None and file.hugetlb else page_up(length)
    start = _check(mm, size, prot, flags, addr, file, pgoff)
    vm_flags = VM_SOFTDIRTY | (VM_SHARED if flags & MAP_SHARED else 0)
    if file is None:
        pgoff = start >> PAGE_SHIFT
    elif file.mixed:
        vm_flags |= VM_MIXEDMAP
    elif file.hugetlb:
        vm_flags |= VM_HUGETLB | (VM_NORESERVE if flags & MAP_NORESERVE else 0)
    area = Vma(mm, start, start + size, prot, vm_flags, file, pgoff)
    if flags & MAP_FIXED:
        check_split(mm, "mmap", start, start + size)
    if file is not None:
        file.mmap(area)
    if flags & MAP_FIXED and mm.areas_in(start, start + size):
        munmap(mm, start, size)
    insert(mm, area)
    if mm.trace.on:
        mm.trace.emit("vma_map", mm=mm.name, start=start, end=start + size, prot=prot, kind=area.kind)
    merge(mm, start, start + size)
    return Hva(start)


def _check(mm: Mm, size: int, prot: int, flags: int, addr: int | None, file: AddressSpace | None, pgoff: int) -> int:
    """The arguments of mmap; returns the address."""
    call = f"mmap({size:#x} bytes at {'any address' if addr is None else hex(addr)})"
    sharing = flags & (MAP_SHARED | MAP_PRIVATE)
    fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)
    if (
        size <= 0
        or prot & ~PROT_ALL
        or flags & ~MAP_KNOWN
        or sharing not in (MAP_SHARED, MAP_PRIVATE)
        or pgoff < 0
        or (fixed and (addr is None or addr & ~PAGE_MASK or addr < 0))
        or (file is not None and flags & MAP_ANONYMOUS)
    ):
        raise MmError(errno.EINVAL, call)
    if (file is None and not flags & MAP_ANONYMOUS) or (file is not None and file.closed):
        raise MmError(errno.EBADF, call)
    if size > TASK_SIZE:
        raise MmError(errno.ENOMEM, call)
    if flags & MAP_HUGE_2MB not in (0, MAP_HUGE_2MB):
        raise MmError(errno.EINVAL, f"{call}: huge pages have 2 MiB")
    check_mmap(call, file, bool(flags & MAP_HUGETLB), addr if fixed and addr is not None else 0, pgoff)
    if pgoff + (size >> PAGE_SHIFT) > _MAX_PGOFF:
        raise MmError(errno.EOVERFLOW, call)
    if file is not None and flags & MAP_SHARED and prot & PROT_WRITE and not file.writable:
        raise MmError(errno.EACCES, f"{call}: {file.name} is not writable")
    if addr is not None:
        start = page_up(addr)
        if fixed:
            if start + size > TASK_SIZE:
                raise MmError(errno.ENOMEM, call)
            if flags & MAP_FIXED_NOREPLACE and mm.areas_in(start, start + size):
                raise MmError(errno.EEXIST, call)
            return start
        if file is not None and file.hugetlb:
            addr = huge_up(addr)
    start = unmapped_area(mm, size, addr)
    if not start:
        raise MmError(errno.ENOMEM, call)
    return start


def unmapped_area(mm: Mm, size: int, wish: int | None) -> int:
    """A free place for ``size`` bytes: at ``wish``, if that is free; 0 if there is none."""
    if wish is not None:
        start = page_up(wish)
        if start > 0 and start + size <= TASK_SIZE and not mm.areas_in(start, start + size):
            return start
    return _find_gap(mm, size)


def _find_gap(mm: Mm, size: int) -> int:
    """The highest free place below MMAP_TOP, on a huge-page boundary if that is worth it; 0 if there is none."""
    mask = ~(_HUGE - 1) if size >= _HUGE else PAGE_MASK
    top = MMAP_TOP
    for area in reversed(mm.vmas):
        if area.start >= MMAP_TOP:
            continue
        start = (top - size) & mask
        if start >= area.end:
            return start
        top = area.start
    return max((top - size) & mask, 0)


def munmap(mm: Mm, addr: int, length: int, *, downgrade: bool = False) -> None:
    """See :meth:`Mm.munmap`. One range for all areas, as long as any is in it; as a reader with ``downgrade``."""
    start, end = mm.check_range("munmap", addr, length)
    if start == end or end > TASK_SIZE:
        raise MmError(errno.EINVAL, f"munmap({addr:#x}, {length:#x})")
    if not mm.areas_in(start, end):
        return
    check_split(mm, "munmap", start, end)
    split(mm, start)
    split(mm, end)
    areas = mm.areas_in(start, end)
    check_unlocked(mm, areas)
    for area in areas:
        if area.uffd is not None:
            unmapping(area, start, end)
        remove(mm, area)
    if downgrade:
        mm.mmap_lock.downgrade()
    with mm.because("vma_unmap", start=start, end=end):
        unmap_vmas(mm, areas, start, end)


def brk(mm: Mm, addr: int) -> Hva:
    """See :meth:`Mm.brk`."""
    mm.check_alive("brk")
    old, new = page_up(mm.end_brk), page_up(addr)
    if addr < mm.start_brk or new > TASK_SIZE or (new > old and mm.areas_in(old, new)):
        return Hva(mm.end_brk)
    if new > old:
        mmap(mm, new - old, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, old, None, 0)
    elif new < old:
        munmap(mm, new, old - new, downgrade=True)
    mm.end_brk = addr
    return Hva(addr)


# ---- the list of areas


def insert(mm: Mm, area: Vma) -> None:
    """Links a new area, which overlaps nothing."""
    with AreaLocks(area, anon=False):
        _link(mm, area)


def _link(mm: Mm, area: Vma) -> None:
    mm.vmas.insert(bisect_left(mm.vmas, area.start, key=_start), area)
    mm.rmap.enter(area)


def remove(mm: Mm, area: Vma) -> None:
    """Unlinks an area from its mm. The reverse map still finds its entries, until ``rmap.leave``."""
    del mm.vmas[bisect_left(mm.vmas, area.start, key=_start)]
    mm.cached_vma = None


def split(mm: Mm, hva: int) -> None:
    """Makes ``hva`` a boundary between areas; entries stay where they are."""
    area = mm.find_vma(hva)
    if area is None or area.start == hva:
        return
    if area.flags & VM_HUGETLB:
        hugetlb_split(area, hva)
    vma_adjust_trans_huge(area, hva)
    upper = Vma(mm, hva, area.end, area.prot, area.flags, area.file, area.page_offset(hva))
    upper.huge_reserve = area.huge_reserve
    upper.uffd = area.uffd
    with AreaLocks(area):
        area.end = hva
        mm.rmap.clone(area, upper)
        _link(mm, upper)


def merge(mm: Mm, start: int, end: int) -> None:
    """Makes one of neighbours that touch or lie in ``[start, end)`` and may be one.

    Nothing is refused here, since the operation has been done: where their locks are held further up the stack they
    stay two, which means the same, and the next operation on them makes them one.
    """
    at = max(bisect_left(mm.vmas, start, key=_start) - 1, 0)
    while at + 1 < len(mm.vmas) and mm.vmas[at].start < end:
        lower, upper = mm.vmas[at], mm.vmas[at + 1]
        same = lower.prot == upper.prot and _adjoin(lower, upper) and _compatible(lower, upper)
        if not same or not _join(mm, lower, upper):
            at += 1


def _join(mm: Mm, lower: Vma, upper: Vma) -> bool:
    """Makes ``upper`` a part of ``lower``; False if somebody further up the stack has their locks."""
    try:
        with AreaLocks(lower if lower.anon_chain else upper):
            remove(mm, upper)
            lower.end = upper.end
            if lower.flags != upper.flags:
                lower.flags |= VM_SOFTDIRTY
                lower.set_prot(lower.prot)
            if lower.anon_vma is None:
                mm.rmap.clone(upper, lower)
    except RecursiveLockError:
        raise  # nobody else's, but a defect of the caller's
    except DeadlockError:
        return False
    mm.rmap.leave(upper)
    return True


def _adjoin(lower: Vma, upper: Vma) -> bool:
    """They would be one area but for the protection and the roots of their pages."""
    return (
        lower.end == upper.start
        and not lower.flags & VM_HUGETLB
        and not (lower.flags ^ upper.flags) & ~VM_SOFTDIRTY
        and lower.file is upper.file
        and lower.uffd is upper.uffd
        and lower.page_offset(lower.end) == upper.pgoff
    )


def _compatible(lower: Vma, upper: Vma) -> bool:
    """Their anonymous pages can have one chain of roots."""
    if lower.anon_vma is None or upper.anon_vma is None:
        # A forked area has its parents' roots too, which it must not hand to one that has not.
        return len(lower.anon_chain or upper.anon_chain) <= 1
    return lower.anon_vma is upper.anon_vma and lower.anon_chain == upper.anon_chain


def anon_vma_prepare(area: Vma) -> AnonVma:
    """Before an anonymous page is mapped: the anon_vma of ``area``, a neighbour's if the two may be merged later."""
    return area.anon_vma or area.mm.rmap.prepare(area, _reusable_anon_vma(area))


def _reusable_anon_vma(area: Vma) -> AnonVma | None:
    areas = area.mm.vmas
    at = bisect_left(areas, area.start, key=_start)
    for lower, upper in ((at, at + 1), (at - 1, at)):
        if lower >= 0 and upper < len(areas) and _adjoin(areas[lower], areas[upper]):
            other = areas[upper if lower == at else lower]
            if other.anon_vma is not None and len(other.anon_chain) == 1:
                return other.anon_vma
    return None
