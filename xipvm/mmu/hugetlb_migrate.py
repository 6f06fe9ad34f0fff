"""Migration of a page of the hugetlb pool: to another one of the pool, which must not be promised to anybody.

As for any compound page (huge_page.py), with ranges as wide as hugetlb's are. Nothing of what is set aside changes: one
page is taken before, one comes back after. Linux leaves migration entries for pages of files, too; here faults bring
those back.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.address import Pfn
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.frames import HUGE_PAGES, PG_ANON, PG_DIRTY, PG_REFERENCED, HostMemory
from xipvm.mmu.huge_page import move_page, remove_migration_ptes, unmap_huge_page
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.hugetlb_pool import alloc_hugetlb_page
from xipvm.mmu.rmap import reverse_map

if TYPE_CHECKING:
    from xipvm.trace.funnel import Trace

_FOLLOW = PG_ANON | PG_DIRTY | PG_REFERENCED


def migrate_hugetlb_page(host: HostMemory, trace: Trace, head: int) -> Pfn:
    """Moves the page ``head`` of the pool, which the caller has locked; where to.

    Raises OutOfFrames, and MmError EAGAIN for a page that somebody holds, EBUSY for one that nobody has.
    """
    if not host.mapping(head):
        raise MmError(errno.EBUSY, f"frame {head:#x} is no page that can be moved")
    new = alloc_hugetlb_page(host, trace, reserved=False, zero=False)
    if new is None:
        raise OutOfFrames(f"none of {host.huge_pages} huge pages is free and not promised")
    return Pfn(move_page(host, trace, head, new, _move))


def _move(host: HostMemory, head: int, new: int) -> bool:
    file, index = reverse_map(host).file(host.mapping(head)), host.index(head)
    expected = 2 if isinstance(file, HugetlbFile) else 1
    if host.refcount(head) - host.total_mapcount(head) != expected:
        return False
    unmapped = unmap_huge_page(host, head, whole=True)
    point("mm.migrate.unmapped")
    done = unmapped and not host.total_mapcount(head) and host.refcount(head) == expected
    if done:
        for offset in range(HUGE_PAGES):
            host.copy(head + offset, new + offset)
        host.set_flags(new, host.flags(head) & _FOLLOW)
        host.set_rmap(new, host.mapping(head), index)
        if isinstance(file, HugetlbFile):
            host.get(new)
            file.pages[index] = Pfn(new)
            host.put(head)
    remove_migration_ptes(host, head, new if done else head)
    return done
