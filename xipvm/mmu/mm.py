"""The address space of one process: its areas, its page table, its notifiers and the threads that run in it.

What the operations do stands in modules of their own; :class:`Mm` holds the state and is the way in:

======================  ==========================================================
mapping.py              mmap, munmap, splitting and merging of areas
mremap.py               mremap
protect.py              mprotect
madvise.py              madvise
mlock.py                mlock, munlock
clear_refs.py           young and soft-dirty bits
zap.py                  taking entries away: the gather, truncation, exit
fault.py, cow.py        what a missing or a read-only entry leads to
gup.py                  get_user_pages, and copies to and from the address space
unmap.py, migrate.py    a page out of all its entries; to another frame
swap*.py                swap: slots and their cache, and the way back
pageout.py, lru.py      a page out of memory; which ones
reclaim.py, oom.py      memory pressure, and when there is no way out
huge_fault.py           transparent huge pages: faults; huge_pmd.py, huge_page.py: their splits; collapse.py; thp.py
ksm.py                  equal pages become one
hugetlb*.py             huge pages of a pool
fork.py                 a child that shares pages until somebody writes
userfaultfd.py, uffd_*  faults that somebody else resolves
pagemap.py              scans for pages that were written
======================  ==========================================================

Which operations exclude each other is said in :mod:`xipvm.mmu.locking`.

Every operation that lowers a right or changes a page keeps one order: range start to the notifiers → entries change →
range end → TLB flush → frames are freed. COW flushes inside the range instead. Nothing may be assumed across a
schedule point; a fault that lost a race leaves things as they are and is simply repeated.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Hva, Pfn, page_up
from xipvm.errors import HostMemoryError, MmError
from xipvm.locks import check
from xipvm.locks.lock import KeyedLocks, RwLock
from xipvm.locks.order import MMAP_LOCK, PTL
from xipvm.mmu import (
    clear_refs,
    collapse,
    fork,
    gup,
    ksm,
    madvise,
    mapping,
    migrate,
    mlock,
    mremap,
    pageout,
    protect,
    swap,
    zap,
)
from xipvm.mmu.all_locks import AllLocks
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import huge_up
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ACCESSED, FLAGS, UFFD_WP, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT, reverse_map
from xipvm.mmu.tables import GupPage, PageTable
from xipvm.mmu.thp import Thp, thp_of
from xipvm.mmu.uffd_message import UffdReports
from xipvm.mmu.userfaultfd import Handler, Userfaultfd
from xipvm.mmu.vma import ADDRESSES, MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, MAP_SHARED, PROT_WRITE, VM_LOCKED, Vma
from xipvm.notifier import notifiers_of

if TYPE_CHECKING:
    from typing import Unpack

    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.host_thread import HostThread
    from xipvm.mmu.oom import OomKill
    from xipvm.mmu.pagemap import PagemapLimits, PagemapScan
    from xipvm.trace.funnel import Trace

_end = attrgetter("end")

MS_ASYNC: Final = 1
MS_INVALIDATE: Final = 2
MS_SYNC: Final = 4

START_BRK: Final = 0x5555_5600_0000
"""Where the heap begins."""


class Mm:
    """An empty address space over ``host``, which is not closed (HostMemoryError). ``name`` is what traces call it.

    ``protocol`` says how its notifiers are told of changes (xipvm.notifier): as today, or as in ``2008``, when much of
    what is here did not exist: that raises ProtocolUnsupported, and has changed nothing. Children speak it, too.

    Operations raise MmError with Linux's errno and then have changed nothing; ESRCH when the mm has exited, EDEADLK
    when one would have to wait for another that nobody lets go on (locking.py). Where Linux does a part of the work and
    then reports ENOMEM for a hole, as mprotect and madvise do, nothing is done.
    """

    __slots__ = (
        "__weakref__",
        "_gup_fast",
        "cached_vma",
        "children",
        "dead",
        "end_brk",
        "host",
        "memcg",
        "mmap_lock",
        "name",
        "notifiers",
        "oom",
        "oom_score_adj",
        "oom_skip",
        "pgd",
        "ptl",
        "rmap",
        "start_brk",
        "threads",
        "trace",
        "uffd_reports",
        "uffd_used",
        "vmas",
    )

    def __init__(self, host: HostMemory, trace: Trace, *, name: str = "mm0", protocol: str = "modern") -> None:
        if not host.nr_frames:
            raise HostMemoryError(0, f"the memory for {name} is closed")
        self.host = host
        self.trace = trace
        self.name = name
        self.pgd = PageTable(4)
        self.vmas: list[Vma] = []
        """All areas, ascending."""
        self.threads: list[HostThread] = []
        self.notifiers = notifiers_of(self, protocol)
        self.rmap = reverse_map(host)
        self.rmap.mms[self] = None
        self.mmap_lock = RwLock(f"mmap_lock of {name}", MMAP_LOCK)
        self.ptl = KeyedLocks(f"page table lock {{:#x}} of {name}", PTL)
        """One a page table of 2 MiB; its number is the address without the bits of ``PMD_SHIFT``."""
        self.dead = False
        self.oom: OomKill | None = None
        """Why the OOM killer has killed it, if it has."""
        self.oom_skip = False
        """The OOM killer has had all from it that it could get."""
        self.oom_score_adj = 0
        """Added to the OOM killer's idea of it, in thousandths of all memory; -1000: never kill it."""
        self.memcg: Mm | None = None
        """The mm for which its memory cgroup was made, None for the one that everybody begins in."""
        self.children = 0
        self.start_brk = self.end_brk = START_BRK
        self.cached_vma: Vma | None = None
        self.uffd_used = False
        """There was a userfaultfd: entries may be markers of its, or protected."""
        self.uffd_reports = UffdReports(self)
        self._gup_fast = self.pgd.gup

    # ---- areas

    def mmap(
        self,
        length: int,
        prot: int,
        flags: int = MAP_PRIVATE | MAP_ANONYMOUS,
        *,
        addr: int | None = None,
        file: AddressSpace | None = None,
        pgoff: int = 0,
    ) -> Hva:
        """Maps ``length`` bytes (rounded up to pages) of ``file`` from page ``pgoff``, or of anonymous memory.

        ``addr`` is a wish unless ``flags`` say MAP_FIXED (replaces what is there) or MAP_FIXED_NOREPLACE (EEXIST).
        MAP_HUGETLB: huge pages of the pool (hugetlb.py), set aside now unless MAP_NORESERVE; lengths are rounded up to
        one, as for a :class:`~xipvm.mmu.hugetlb_file.HugetlbFile`.
        Errors: EINVAL, EOVERFLOW, EBADF (no file, or a closed one), ENOMEM (no room, or not so many huge pages), EACCES
        (shared and writable, the file is not).
        """
        unnamed: HugetlbFile | ShmemFile | None = None
        if file is None and flags & MAP_HUGETLB and flags & MAP_ANONYMOUS:
            size = huge_up(max(length, 0))
            unnamed = HugetlbFile(self.host, self.trace, "/anon_hugepage", size)
        elif file is None and flags & MAP_SHARED and flags & MAP_ANONYMOUS:
            # As in Linux: a memory file that nobody else has, and that goes with its last mapping.
            unnamed = ShmemFile(self.host, self.trace, "/dev/zero", page_up(length))
        if unnamed is not None:
            file, pgoff, flags = unnamed, 0, flags ^ MAP_ANONYMOUS
        try:
            with self.uffd_reports, self.mmap_lock.write:
                self.check_alive("mmap")
                return mapping.mmap(self, length, prot, flags, addr, file, pgoff)
        finally:
            if unnamed is not None:
                unnamed.close()

    def munmap(self, addr: int, length: int) -> None:
        """Unmaps what is mapped in the range; areas are split where needed. Errors: EINVAL."""
        with self.uffd_reports, self.mmap_lock.write:
            mapping.munmap(self, addr, length, downgrade=True)

    def mremap(self, addr: int, old_len: int, new_len: int, flags: int = 0, new_addr: int | None = None) -> Hva:
        """Gives the mapping ``[addr, addr + old_len)`` another length and, if ``flags`` allow it, another place.

        MREMAP_FIXED: to ``new_addr``, replacing what is there. MREMAP_DONTUNMAP: the pages move, an empty area stays.
        An ``old_len`` of 0 maps shared memory a second time. Lengths are rounded up to pages. Returns the place.
        Errors: EINVAL, EFAULT (not one area), ENOMEM (no room, or it may not move).
        """
        with self.uffd_reports, self.mmap_lock.write:
            place = mremap.mremap(self, addr, old_len, new_len, flags, new_addr)
            area = self.find_vma(place)
        if area is not None and area.flags & VM_LOCKED and new_len > old_len:
            with suppress(MmError):  # as in Linux, who will notice when it is used
                mlock.populate(self, place + page_up(old_len), place + page_up(new_len))
        return place

    def brk(self, addr: int = 0) -> Hva:
        """Moves the end of the heap to ``addr``. Returns where it is then: where it was, if it cannot be moved there.

        The heap is private anonymous memory from ``start_brk`` on. Errors: none.
        """
        with self.uffd_reports, self.mmap_lock.write:
            return mapping.brk(self, addr)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """Changes the protection. Errors: EINVAL, ENOMEM (a hole), EACCES (shared, and the file is not writable)."""
        with self.mmap_lock.write:
            protect.mprotect(self, addr, length, prot)

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """What will be done with the range; madvise.py has the kinds of advice.

        Errors: EINVAL (also for areas that the advice does not fit), ENOMEM (a hole), EACCES (REMOVE), EFAULT
        (POPULATE: no page to be had; those before it stay).
        """
        madvise.madvise(self, addr, length, advice)

    def mlock(self, addr: int, length: int) -> None:
        """Faults the range in and keeps its pages. Pages that ``addr`` and the end lie in count whole.

        Errors: EINVAL, ENOMEM for a hole; ENOMEM for a page that cannot be had and EAGAIN without a frame for it: as in
        Linux the range is locked nevertheless.
        """
        mlock.mlock(self, addr, length, True)

    def munlock(self, addr: int, length: int) -> None:
        """Takes :meth:`mlock` back. Errors: EINVAL, ENOMEM for a hole."""
        mlock.mlock(self, addr, length, False)

    def clear_refs(self, mode: int) -> None:
        """Forgets what was used (1: all, 2: anonymous, 3: file mappings), or what was written (4: soft-dirty bits).

        Errors: EINVAL.
        """
        with self.mmap_lock.write:
            clear_refs.clear_refs(self, mode)

    def soft_dirty(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of ``[start, end)`` was written or mapped since the last ``clear_refs(4)``, in bytes, ascending."""
        self.notifiers.needs_modern("soft-dirty bits")
        return clear_refs.soft_dirty(self, start, end)

    def msync(self, addr: int, length: int, flags: int = MS_SYNC) -> None:
        """Writes back the dirty pages of the shared file mappings in the range.

        MS_ASYNC, or none of the two, checks the range and leaves that to whoever writes back anyway; MS_INVALIDATE asks
        whether caches of the pages could be dropped, and nothing else. Errors: EINVAL, ENOMEM (a hole), EBUSY
        (MS_INVALIDATE of a locked area).
        """
        start, end = self.check_range("msync", addr, length, errno.ENOMEM)
        if flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or (flags & MS_ASYNC and flags & MS_SYNC):
            raise MmError(errno.EINVAL, f"msync: flags {flags:#x}")
        for area in self.covered("msync", start, end):
            if flags & MS_INVALIDATE and area.flags & VM_LOCKED:
                raise MmError(errno.EBUSY, f"msync: {area!r} is locked")
            if flags & MS_SYNC and area.file is not None and area.shared:
                lo, hi = max(area.start, start), min(area.end, end)
                area.file.fsync(area.page_offset(lo), (hi - lo) >> PAGE_SHIFT)

    def find_vma(self, hva: int) -> Vma | None:
        """The area that ``hva`` lies in, None if it is not mapped."""
        area = self.cached_vma
        if area is not None and area.start <= hva < area.end:
            return area
        areas = self.vmas
        at = bisect_right(areas, hva, key=_end)
        if at < len(areas) and areas[at].start <= hva:
            self.cached_vma = areas[at]
            return areas[at]
        return None

    def still_writable(self, area: Vma, hva: int) -> bool:
        """Whether ``area``, which was found for ``hva`` before a schedule point, is still there and may be written."""
        return bool(area.prot & PROT_WRITE) and self.find_vma(hva) is area

    def areas_in(self, start: int, end: int) -> list[Vma]:
        """The areas that overlap ``[start, end)``, ascending."""
        first = bisect_right(self.vmas, start, key=_end)
        last = first
        while last < len(self.vmas) and self.vmas[last].start < end:
            last += 1
        return self.vmas[first:last]

    def userfaultfd(self, handler: Handler | None = None, features: int = 0) -> Userfaultfd:
        """A userfaultfd, whose ``handler`` is called with every message; without one they queue for ``read``.

        ``features``: UFFD_FEATURE_*. Errors: EINVAL (a feature that there is not).
        """
        self.notifiers.needs_modern("userfaultfd")
        return Userfaultfd(self, handler, features)

    def pagemap_scan(self, start: int, end: int, **limits: Unpack[PagemapLimits]) -> PagemapScan:
        """PAGEMAP_SCAN: the pages of ``[start, end)``, in bytes, of some categories, protected again if asked for.

        :func:`xipvm.mmu.pagemap.pagemap_scan` says what can be asked for, and the errors.
        """
        self.notifiers.needs_modern("PAGEMAP_SCAN")
        from xipvm.mmu.pagemap import pagemap_scan

        return pagemap_scan(self, start, end, **limits)

    def move_pages(self, addr: int, length: int, node: int) -> list[int]:
        """Moves the pages of the range to a NUMA node; a status a page: 0, or a negative errno.

        There is one node, number 0, so every page that is mapped is there: nothing happens. Errors: EINVAL, ENODEV.
        """
        return migrate.move_pages(self, addr, length, node)

    def mbind(self, addr: int, length: int, node: int) -> None:
        """Lets the pages of the range be on one NUMA node (MPOL_BIND). Errors: EINVAL (also the node), EFAULT."""
        migrate.mbind(self, addr, length, node)

    def ksm_scan(self, until_sharing: int | None = None) -> int:
        """Lets KSM scan, all mms, until it shares so many pages, or finds no more to merge; how many it shares.

        A page is merged when two scans have found it unchanged, or when it equals one that is shared already.
        """
        self.notifiers.needs_modern("KSM")
        return ksm.ksm_scan(self, until_sharing)

    @property
    def thp(self) -> Thp:
        """The settings of transparent huge pages, of the whole host: where they are wanted (``enabled``), for one."""
        return thp_of(self.host)

    def khugepaged_scan(self) -> int:
        """Lets khugepaged look at all mms once and make huge pages where they are wanted; how many it made."""
        self.notifiers.needs_modern("khugepaged")
        return collapse.khugepaged_scan(self.host)

    def swapon(self, pages: int, path: str | None = None) -> None:
        """Gives the host ``pages`` more slots of swap, in the file ``path``, which is emptied, or a temporary one.

        Errors: EINVAL, EPERM (too many areas), those of the file.
        """
        swap.swapon(self, pages, path)

    def swapoff(self) -> None:
        """Brings back what is in the swap area that came last, read-only, and closes it. Nobody is told.

        Errors: EINVAL (there is none), ENOMEM (no frames, and nothing to reclaim), EIO and others of the file, EBUSY
        (an area that is being unmapped has pages there). What did not come back is in swap as before.
        """
        swap.swapoff(self)

    def memcg_enter(self) -> None:
        """From now on the mm is alone in a memory cgroup; children that it forks join it."""
        self.memcg = self

    def memcg_reclaim(self, passes: int = 1) -> int:
        """Reclaims the anonymous pages of the memory cgroup (all mms that never entered one are in one); how many went.

        Each pass asks every page once whether somebody used it, and takes those that nobody did.
        """
        return pageout.memcg_reclaim(self, passes)

    # ---- pages

    def get_user_pages(self, hva: int, *, write: bool) -> GupPage:
        """The frame at ``hva`` and whether the primary entry allows writing, faulting it in as ``write`` needs it.

        No reference is taken. Errors: EFAULT, ENOMEM (no frame).
        """
        try:
            page = self._gup_fast(hva >> PAGE_SHIFT, write)
        except OverflowError:
            raise MmError(errno.EFAULT, f"get_user_pages({hva:#x}): no address") from None
        return page if page is not None else gup.get_user_pages(self, hva, write)

    def read(self, hva: int, size: int) -> bytes:
        """Copies ``size`` bytes from the address space, as copy_from_user does. Errors: EFAULT."""
        return gup.copy_from_user(self, hva, size)

    def write(self, hva: int, data: bytes | bytearray | memoryview) -> None:
        """Copies ``data`` to the address space, as copy_to_user does. Errors: EFAULT; nothing is written then."""
        gup.copy_to_user(self, hva, data)

    def access_remote_vm(self, addr: int, data: bytes) -> int:
        """Writes as through /proc/pid/mem (FOLL_FORCE): also to private memory without PROT_WRITE.

        Returns how many bytes were written, fewer when it comes to a page that cannot be. Errors: EIO when none was.
        """
        return gup.access_remote_vm(self, addr, data, True)

    def process_vm_writev(self, addr: int, data: bytes) -> int:
        """Writes as another process does. Returns as :meth:`access_remote_vm`. Errors: EFAULT when nothing was."""
        self.notifiers.needs_modern("process_vm_writev")
        return gup.access_remote_vm(self, addr, data, False)

    def alloc_frame(self, zero: bool) -> Pfn:
        """A new frame. Raises OutOfFrames. May sleep."""
        if check.checker is not None:
            check.might_sleep("alloc_frame")
        pfn = self.host.alloc(zero)
        if self.trace.on:
            self.trace.emit("page_alloc", pfn=pfn)
        return pfn

    def put_frame(self, pfn: int) -> None:
        """Drops a reference to ``pfn``; the last one frees it, with all of the compound page that it belongs to."""
        freed = self.host.put_page(pfn)
        if freed and self.trace.on:
            self.trace.emit("page_free", pages=freed)

    def unpin_frame(self, pfn: int) -> None:
        """Lets go of ``pfn``, which was pinned (HostMemory.pin)."""
        freed = self.host.unpin(pfn)
        if freed and self.trace.on:
            self.trace.emit("page_free", pages=freed)

    def set_pte(self, hva: int, entry: int) -> None:
        """Writes the entry of ``hva``."""
        if self.ptl.held:
            self.ptl.not_others(hva >> PMD_SHIFT)
        self.pgd.set(hva >> PAGE_SHIFT, entry)
        if self.trace.on:
            self.emit_pte_set(hva, entry)

    def emit_pte_set(self, hva: int, entry: int) -> None:
        """Tells the trace of an entry that was written."""
        pfn, flags = pte_pfn(entry), entry & (FLAGS | UFFD_WP)
        self.trace.emit("pte_set", mm=self.name, hva=hva & PAGE_MASK, pfn=pfn, flags=flags)

    def clear_flush(self, hva: int) -> None:
        """Clears the entry of ``hva``, which maps a page, and makes every CPU forget it. Under its page table lock."""
        old = self.pgd.set(hva >> PAGE_SHIFT, 0)
        start = hva & PAGE_MASK
        if self.trace.on:
            self.trace.emit("pte_clear", mm=self.name, start=start, end=start + PAGE_SIZE, pages=[(pte_pfn(old), 1)])
        self.flush_tlb_range(start, start + PAGE_SIZE)

    def ptep_clear_flush_notify(self, hva: int) -> None:
        """:meth:`clear_flush` of an entry that gets another page, or loses its own. Inside ``notifiers.around_entry``.

        The one step in which the notifier protocols differ: today the range around it has told everybody, in 2008 they
        are told now. A callback that raises leaves the entry as it was.
        """
        entry = self.pgd.get(hva >> PAGE_SHIFT)
        self.clear_flush(hva)
        try:
            self.notifiers.invalidate_page(hva & PAGE_MASK)
        except BaseException:
            self.set_pte(hva, entry)
            raise

    def ptep_clear_flush_young_notify(self, hva: int) -> bool:
        """Whether the page at ``hva``, a mapped one, was used by the host or by a secondary MMU; all forget it."""
        page, start = hva >> PAGE_SHIFT, hva & PAGE_MASK
        entry = self.pgd.get(page)
        young = bool(entry & ACCESSED)
        if young:
            self.pgd.set(page, entry & ~ACCESSED)
            self.flush_tlb_range(start, start + PAGE_SIZE)
        return self.notifiers.clear_flush_young(start, start + PAGE_SIZE) or young

    def lock_tables(self, start: int, end: int) -> None:
        """Before entries of ``[start, end)`` are changed by what passes no point until it is done."""
        self.ptl.wait_range(start >> PMD_SHIFT, (end - 1 >> PMD_SHIFT) + 1)

    def flush_tlb_range(self, start: int, end: int) -> None:
        """Makes every CPU that runs a thread of this mm forget its translations of ``[start, end)``."""
        for thread in self.threads:
            thread.flush_tlb(start, end)
        if self.trace.on:
            self.trace.emit("primary_tlb_flush", mm=self.name, start=start, end=end)
        self.notifiers.arch_invalidate_secondary_tlbs(start, end)

    # ---- life

    def mmap_write_lock(self) -> AbstractContextManager[None]:
        """mmap_lock, for writing."""
        return self.mmap_lock.write

    def take_all_locks(self, signal_pending: Callable[[], bool]) -> AllLocks:
        """A context in which nobody else changes entries. Entering it raises EINTR when ``signal_pending()``."""
        return AllLocks(self, signal_pending)

    def fork(self, name: str | None = None) -> Mm:
        """A child with the same mappings; private pages are shared until one side writes."""
        with self.uffd_reports, self.mmap_lock.write:
            return fork.fork(self, name)

    def exit(self) -> None:
        """Releases the notifiers, then unmaps everything. A second call does nothing."""
        zap.exit_mmap(self)

    def because(self, kind: str, **fields: Any) -> AbstractContextManager[None]:
        """A context for what an operation does: its events are caused by an event ``kind`` of this mm."""
        if not self.trace.on:
            return nullcontext()
        return self.trace.because(self.trace.emit(kind, mm=self.name, **fields))

    @property
    def protocol(self) -> str:
        """How its notifiers are told of changes: ``modern`` or ``2008``."""
        return self.notifiers.protocol

    def check_alive(self, what: str) -> None:
        """Raises MmError ESRCH when the mm has exited, or its memory is closed."""
        if not self.host.nr_frames:
            raise MmError(errno.ESRCH, f"{what}: the memory of {self.name} is closed")
        if self.dead:
            raise MmError(errno.ESRCH, f"{what}: {self.name} has exited")

    def check_running(self, what: str) -> None:
        """Raises MmError ESRCH when the mm has exited, or was killed: its memory is not what it was."""
        if self.dead or not self.host.nr_frames:
            self.check_alive(what)
        if self.oom is not None:
            raise MmError(errno.ESRCH, f"{what}: {self.name} was killed: out of memory")

    def check_range(self, what: str, addr: int, length: int, wraps: int = errno.EINVAL) -> tuple[int, int]:
        """``[addr, addr + length)`` with the length rounded up to pages.

        Raises ESRCH, EINVAL, and ``wraps`` for a range that comes round to 0.
        """
        self.check_alive(what)
        if addr & ~PAGE_MASK or addr < 0 or length < 0:
            raise MmError(errno.EINVAL, f"{what}({addr:#x}, {length:#x})")
        if addr + length > ADDRESSES:
            raise MmError(wraps, f"{what}({addr:#x}, {length:#x})")
        return addr, addr + page_up(length)

    def covered(self, what: str, start: int, end: int) -> list[Vma]:
        """The areas of ``[start, end)``. Raises ENOMEM when there is a hole."""
        areas = self.areas_in(start, end)
        at = start
        for area in areas:
            if area.start > at:
                break
            at = area.end
        if at < end:
            raise MmError(errno.ENOMEM, f"{what}: nothing is mapped at {at:#x} in {self.name}")
        return areas

    def __repr__(self) -> str:
        return f"<mm {self.name}: {len(self.vmas)} areas, {self.pgd.present} pages{', exited' if self.dead else ''}>"
