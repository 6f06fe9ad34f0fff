"""Transparent huge pages of one host memory: where they are wanted, the huge zero page, what khugepaged puts up with.

``enabled`` is /sys/kernel/mm/transparent_hugepage/enabled: ``always``; ``madvise``, only in areas with MADV_HUGEPAGE;
``never``. MADV_COLLAPSE asks only whether an area forbids it (MADV_NOHUGEPAGE).

The huge zero page is a compound page of zeros, ``PG_RESERVED`` like the zero page. It is made for the first read of a
huge page that is not there, and goes with the last mm that used it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.errors import OutOfFrames
from xipvm.mmu.frames import HUGE_PAGES, PG_RESERVED, HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.vma import VM_HUGEPAGE, VM_HUGETLB, VM_MIXEDMAP, VM_NOHUGEPAGE, Vma

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace

ENABLED: Final = ("always", "madvise", "never")
_UNFIT: Final = VM_HUGETLB | VM_MIXEDMAP | VM_NOHUGEPAGE


class Thp:
    """The settings and the huge zero page of one host memory; :func:`thp_of` finds them."""

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        self._enabled = "madvise"
        self.use_zero_page = True
        """A read of a huge page that is not there maps the huge zero page."""
        self.max_ptes_none = HUGE_PAGES - 1
        """How many pages may be missing where khugepaged collapses."""
        self.max_ptes_shared = HUGE_PAGES // 2
        """How many may be mapped elsewhere, too."""
        self.max_ptes_swap = HUGE_PAGES // 8
        """How many may be in swap."""
        self.zero_pfn = 0
        """The huge zero page, 0 while there is none."""
        self._zero_users: set[Mm] = set()

    @property
    def enabled(self) -> str:
        """Where faults and khugepaged make huge pages: one of ``ENABLED``. Raises ValueError for anything else."""
        return self._enabled

    @enabled.setter
    def enabled(self, where: str) -> None:
        if where not in ENABLED:
            raise ValueError(f"transparent huge pages are enabled {', '.join(ENABLED)}, not {where!r}")
        self._enabled = where
        reverse_map(self._host).thp_always = where == "always"

    def wanted(self, area: Vma) -> bool:
        """Whether faults and khugepaged make huge pages in ``area``."""
        if not area.mm.notifiers.huge_entries:
            return False
        return not area.flags & _UNFIT and (
            self._enabled == "always" or (self._enabled == "madvise" and bool(area.flags & VM_HUGEPAGE))
        )

    def get_zero(self, mm: Mm) -> int | None:
        """The huge zero page for ``mm``; None when there is none to be had."""
        if not self.zero_pfn:
            pfn = alloc_huge_or_none(mm)
            if pfn is None:
                return None
            self.zero_pfn = pfn
            self._host.set_flags(pfn, PG_RESERVED)
        self._zero_users.add(mm)
        return self.zero_pfn

    def share_zero(self, mm: Mm, child: Mm) -> None:
        """``child`` has got the huge entries of ``mm``."""
        if mm in self._zero_users:
            self._zero_users.add(child)

    def leave(self, mm: Mm) -> None:
        """``mm`` has no entries any more."""
        if mm in self._zero_users:
            self._zero_users.remove(mm)
            if not self._zero_users:
                pfn, self.zero_pfn = self.zero_pfn, 0
                self._host.clear_flags(pfn, PG_RESERVED)
                mm.put_frame(pfn)


def suitable(area: Vma, start: int) -> bool:
    """Whether the 2 MiB from ``start`` on lie in ``area``; the pages of a file also have to be one of its own 2 MiB."""
    if start < area.start or start + HPAGE_SIZE > area.end:
        return False
    return area.file is None or not (area.page_offset(start)) % HUGE_PAGES


def forbidden(area: Vma) -> bool:
    """Whether no huge page may be made in ``area``, whoever asks."""
    return bool(area.flags & _UNFIT)


def alloc_huge(host: HostMemory, trace: Trace, zero: bool = True) -> int:
    """A new compound page; its first frame. Raises OutOfFrames."""
    head = host.alloc_huge(zero)
    if trace.on:
        trace.emit("page_alloc_huge", pages=[(head, HUGE_PAGES)])
    return head


def alloc_huge_or_none(mm: Mm, zero: bool = True) -> int | None:
    """As :func:`alloc_huge`; None when there is none to be had."""
    try:
        return alloc_huge(mm.host, mm.trace, zero)
    except OutOfFrames:
        return None


def thp_of(host: HostMemory) -> Thp:
    """The one :class:`Thp` of ``host``. It is kept by its reverse map."""
    rmap = reverse_map(host)
    if rmap.thp is None:
        rmap.thp = Thp(host)
    assert isinstance(rmap.thp, Thp)
    return rmap.thp
