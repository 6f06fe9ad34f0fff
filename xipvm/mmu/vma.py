"""One virtual memory area: a range of an mm with one protection, one backing and one set of flags.

Addresses are bytes, half-open and page-aligned. ``pgoff`` is the page offset of ``start`` in the backing: in the
file, or for anonymous memory the page number at which the area was created. It gives every page a place in its
mapping that survives splits and moves, which is what the reverse mapping looks pages up by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, EXCLUSIVE, EXEC, PRESENT, PROTNONE, SOFT_DIRTY, WRITE

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.hugetlb import HugeReserve
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.rmap import AnonVma
    from xipvm.mmu.userfaultfd import Userfaultfd

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_ALL: Final = PROT_READ | PROT_WRITE | PROT_EXEC

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
"""Huge pages are not set aside (hugetlb.py); other mappings set nothing aside anyway."""
MAP_HUGETLB: Final = 0x40000
MAP_FIXED_NOREPLACE: Final = 0x100000
MAP_HUGE_2MB: Final = 21 << 26
"""With MAP_HUGETLB: the size of huge pages, which is this one without it, too."""
MAP_KNOWN: Final = (
    MAP_SHARED
    | MAP_PRIVATE
    | MAP_FIXED
    | MAP_ANONYMOUS
    | MAP_NORESERVE
    | MAP_HUGETLB
    | MAP_FIXED_NOREPLACE
    | MAP_HUGE_2MB
)

TASK_SIZE: Final = (1 << 47) - PAGE_SIZE
"""End of the addresses that can be mapped."""
ADDRESSES: Final = (1 << 64) - 1
"""The last address that can be written down: a range beyond it would come round to 0."""

VM_SHARED: Final = 0x08
VM_UFFD_MISSING: Final = 0x200
VM_UFFD_WP: Final = 0x1000
VM_UFFD_MINOR: Final = 1 << 41
VM_UFFD: Final = VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR
"""Which faults are a userfaultfd's business (userfaultfd.py)."""
VM_LOCKED: Final = 0x2000
"""Its pages are not to be taken away (mlock)."""
VM_DONTCOPY: Final = 0x20000
"""fork leaves the area out (MADV_DONTFORK)."""
VM_NORESERVE: Final = 0x200000
"""No huge pages were set aside for it."""
VM_HUGETLB: Final = 0x400000
"""Made of huge pages of the pool (hugetlb.py)."""
VM_SOFTDIRTY: Final = 0x08000000
"""Newer than the last clear_refs of soft-dirty bits: all of it counts as written."""
VM_HUGEPAGE: Final = 0x20000000
"""Huge pages are wanted (MADV_HUGEPAGE)."""
VM_NOHUGEPAGE: Final = 0x40000000
"""There are to be none (MADV_NOHUGEPAGE)."""
VM_MERGEABLE: Final = 0x80000000
"""KSM may merge its pages (MADV_MERGEABLE)."""
VM_MIXEDMAP: Final = 0x10000000
"""Maps frames that have no reference count."""


class Vma:
    """``[start, end)`` of ``mm``. Operations change one under mmap_lock."""

    __slots__ = (
        "anon_chain",
        "anon_vma",
        "end",
        "file",
        "flags",
        "huge_reserve",
        "mm",
        "new_anon",
        "page_prot",
        "pgoff",
        "prot",
        "rights",
        "start",
        "uffd",
        "upgrade",
    )

    def __init__(
        self, mm: Mm, start: int, end: int, prot: int, flags: int, file: AddressSpace | None, pgoff: int
    ) -> None:
        self.mm = mm
        self.start = start
        self.end = end
        self.flags = flags
        self.file = file
        self.pgoff = pgoff
        self.anon_vma: AnonVma | None = None
        """Where new anonymous pages of this area belong; None until the first one."""
        self.anon_chain: tuple[AnonVma, ...] = ()
        """All anon_vmas that may have pages here: the own one and those of the mms it was forked from."""
        self.huge_reserve: HugeReserve | None = None
        """Which huge pages of a private area are set aside, None for all others."""
        self.uffd: Userfaultfd | None = None
        """Where it is registered, with one of the flags VM_UFFD."""
        self.set_prot(prot)

    def set_prot(self, prot: int) -> None:
        """Change the protection; the entries are the caller's business."""
        self.prot = prot
        self.rights = PROTNONE if prot == PROT_NONE else PRESENT | (EXEC if prot & PROT_EXEC else 0)
        """The permission bits of an entry here, without WRITE."""
        shared, tracked = bool(self.flags & VM_SHARED), self.file is not None and self.file.tracks_writes
        untouched = bool(self.flags & (VM_SOFTDIRTY | VM_HUGETLB))  # huge pages of the pool are not tracked
        writable = WRITE if prot & PROT_WRITE else 0
        self.new_anon = self.rights | writable | DIRTY | SOFT_DIRTY | ACCESSED
        """The flags of an entry whose private page was just written or is about to be, but for ANON and EXCLUSIVE.

        Without WRITE for a page that was forced upon an area without PROT_WRITE.
        """
        watched = bool(self.flags & VM_UFFD_WP)
        self.page_prot = self.rights | (writable if shared and untouched and not tracked and not watched else 0)
        """The permission bits that every new entry gets: WRITE only where nobody has to notice the first write."""
        self.upgrade = 0
        """The bits that earn an entry WRITE without a fault, 0 if nothing does.

        A private page has them when this entry is its only one; a page of a file that tracks writes when its first
        write was announced, which left it dirty; one of a memory file that a userfaultfd watches never. Where
        soft-dirty bits are collected, the page has to have its own.
        """
        if prot & PROT_WRITE and not self.flags & VM_HUGETLB and not (shared and watched and not tracked):
            self.upgrade = (DIRTY if shared else ANON | EXCLUSIVE) | (0 if untouched else SOFT_DIRTY)

    @property
    def shared(self) -> bool:
        """Writes go to the file, not to private copies."""
        return bool(self.flags & VM_SHARED)

    @property
    def kind(self) -> str:
        """What is behind it, for traces: ``anon``, or what its file says."""
        return "anon" if self.file is None else self.file.kind

    def page_offset(self, hva: int) -> int:
        """The offset of the page at ``hva`` in the backing."""
        return self.pgoff + ((hva - self.start) >> PAGE_SHIFT)

    def address_of(self, pgoff: int) -> int | None:
        """Where the page at ``pgoff`` of the backing would be mapped, None when outside."""
        hva = self.start + ((pgoff - self.pgoff) << PAGE_SHIFT)
        return hva if self.start <= hva < self.end else None

    def __repr__(self) -> str:
        rights = "".join(c if self.prot & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
        share = "shared" if self.shared else "private"
        return f"<vma {self.mm.name} {self.start:#x}..{self.end:#x} {rights} {share} {self.kind} +{self.pgoff:#x}>"
