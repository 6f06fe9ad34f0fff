"""What can be mapped: the interface between the fault handler and a file.

An :class:`AddressSpace` is the mapping side of one file: it knows the areas that map it (Linux's i_mmap) and hands out
the frames of its pages. Page caches (page_cache.py), device memory (device_file.py) and files executed in place are
such.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Final

from xipvm.errors import MmError
from xipvm.locks.lock import RwLock
from xipvm.locks.order import HUGETLB_I_MMAP, I_MMAP
from xipvm.mmu.rmap import reverse_map

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace


class VmFault(IntEnum):
    """How a fault went; names and numbers of Linux's VM_FAULT_*."""

    OK = 0
    """The entry is there now, or somebody changed it meanwhile: look again."""
    OOM = 0x01
    SIGBUS = 0x02
    """There is an area, but no page behind it."""
    SIGSEGV = 0x40
    """No area, or none that allows the access."""
    NOPAGE = 0x100
    """A file says: not this page any more, look again."""
    RETRY = 0x400
    """What was needed could not be had at once: drop the locks, wait for it, look again."""


FaultResult = tuple[int, VmFault]
"""What a file gives the fault handler: a frame, with a reference for the mapping, and OK; or 0 and why not."""


_FALLBACK: Final[AbstractContextManager[int | None]] = nullcontext()


class AddressSpace:
    """Base of everything that mmap takes as ``file``; by itself a file without pages. ``name`` is for errors."""

    kind: ClassVar[str] = "file"
    """What its areas are called in traces."""
    mixed: ClassVar[bool] = False
    """Its frames have no reference count (VM_MIXEDMAP)."""
    devmap: ClassVar[bool] = False
    """Its device frames are pages to everybody else all the same (pte_devmap): those of a file system's device."""
    hugetlb: ClassVar[bool] = False
    """Its pages are huge ones, of hugetlbfs: its i_mmap lock comes before those of other files."""
    closed: bool = False
    """Nobody may use it as a file, or map it, any more."""
    tracks_writes: ClassVar[bool] = False
    """Pages are mapped read-only until ``page_mkwrite`` has heard of the first write."""

    def __init__(self, host: HostMemory, trace: Trace, name: str, *, writable: bool) -> None:
        self.host = host
        self.trace = trace
        self.name = name
        self.writable = writable
        """Shared mappings may be written."""
        self.failed: tuple[int, str] | None = None
        """The page whose fault failed last, and why, until somebody has asked."""
        self.swapped: dict[int, int] = {}
        """Swap slots of pages that are in swap, by page offset."""
        self.areas: dict[Vma, None] = {}
        """Who maps it, in the order of mapping."""
        self.i_mmap = RwLock(f"i_mmap_rwsem of {name}", HUGETLB_I_MMAP if self.hugetlb else I_MMAP)
        """Guards ``areas``: for reading by who walks them to change entries, for writing by who changes them."""
        self.id = reverse_map(host).add_file(self)
        """Its number as a root of the reverse map."""

    def fault(self, area: Vma, pgoff: int, write: bool) -> FaultResult:
        """The frame of page ``pgoff``. May sleep; what it returns is true at the moment of return."""
        return 0, self.sigbus(pgoff, f"{self.name} has no pages")

    def sigbus(self, pgoff: int, why: str) -> VmFault:
        """What a fault on page ``pgoff`` gives that cannot be had, having noted ``why``."""
        self.failed = pgoff, why
        return VmFault.SIGBUS

    def behind_end(self, pgoff: int, size: int) -> VmFault:
        """The same where the file, of ``size`` bytes, does not reach."""
        return self.sigbus(pgoff, f"page {pgoff:#x} is behind the end of {self.name}, which has {size} bytes")

    def why_not(self, pgoff: int) -> str:
        """Why the fault on page ``pgoff`` that failed just now did; empty if nobody knows. Forgets it."""
        failed, self.failed = self.failed, None
        return failed[1] if failed is not None and failed[0] == pgoff else ""

    def page_mkwrite(self, pgoff: int, pfn: int) -> VmFault:
        """A shared entry of page ``pgoff`` is about to become writable. NOPAGE when ``pfn`` is not that page any more.

        May sleep.
        """
        return VmFault.OK

    def cached(self, pgoff: int) -> int | None:
        """The frame of a page that can be mapped without sleeping, None otherwise. No reference is taken."""
        return None

    def huge_fault(self, mm: Mm, pgoff: int, write: bool) -> AbstractContextManager[int | None]:
        """A context in which the 2 MiB from page ``pgoff`` on may be mapped in ``mm`` by one entry: its first frame.

        None: by small entries only (VM_FAULT_FALLBACK). ``write``: in a shared area, where they count as written now.
        May sleep.
        """
        return _FALLBACK

    def has_page(self, pgoff: int) -> bool | None:
        """Whether a memory file has the page, in memory or in swap. None: it has no such page, or is no memory file."""
        return None

    def readahead(self, pgoff: int, count: int) -> None:
        """Pages that will be needed soon. Raises OutOfFrames."""

    def punch_hole(self, pgoff: int, count: int) -> None:
        """Makes the pages read as zero, in every mapping. Raises MmError EOPNOTSUPP where the file cannot."""
        raise MmError(errno.EOPNOTSUPP, f"a hole in {self.name}")

    def can_reclaim(self) -> bool:
        """Whether there is a place for pages that leave memory."""
        return False

    def reclaim(self, pgoff: int, pfn: int) -> bool:
        """Lets go of a page that nobody maps, and to which only the caller refers beside the file; written if need be.

        False when it has to stay. Raises OSError, and it stays.
        """
        return False

    def bring_back(self, pgoff: int) -> None:
        """Reads a page from swap, if it is there. Raises OutOfFrames and OSError."""

    def fsync(self, pgoff: int = 0, count: int | None = None) -> int:
        """Writes back the dirty pages of the range (all by default); how many there were."""
        return 0

    def mmap(self, area: Vma) -> None:
        """``area`` is about to map the file. Raises MmError, having changed nothing."""

    def vma_open(self, area: Vma) -> None:
        """``area`` maps pages where it did not before, as another one did, or more of them (mremap)."""

    def vma_close(self, area: Vma) -> None:
        """``area``, whose entries are gone, does not map the file any more."""

    def unmapped(self) -> None:
        """The last area is gone."""

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"
