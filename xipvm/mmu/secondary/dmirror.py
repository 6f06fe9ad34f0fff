"""A device with memory of its own that mirrors an address space: Linux's lib/test_hmm, with its commands.

The device has a table of the pages of one mm, whose lock is a mutex, and follows the mm by one interval notifier over
all of it. What it does not have it looks up by hmm_range_fault; a page that it does not reach in its own memory it is
given where it is. Its commands::

    read, write         bytes of the mm, page by page through the mirror, faulting where nothing is there
    migrate_to_dev      pages go to the device's memory; a CPU that wants one back gets it by a fault (migrate_to_ram)
    migrate_to_sys      they come back
    snapshot            what there is, without faulting
    exclusive           pages that only the device touches, until a CPU does
    check_exclusive     whether it has any of those
    evict               all of its memory is given back

``coherent``: the CPU reaches the device's memory, too. Then nothing has to come back, and pages that are there are
mapped as any others.

Whose invalidations may be ignored. test_hmm ignores MIGRATE ranges that are its own, without a new sequence number, and
mends its table behind the migration. An access of the device that comes in between goes to the old page and is lost.
Here such ranges are as all others. Its own EXCLUSIVE ranges get no new sequence number either, because the device asks
``read_retry`` itself before it maps what they gave it; its entries go all the same.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from enum import IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.actors import give_way, point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Hva
from xipvm.errors import DeadlockError, MmError, OutOfFrames
from xipvm.locks.lock import RwLock
from xipvm.locks.order import DEVICE_MUTEX
from xipvm.mmu.device_exclusive import DeviceExclusive
from xipvm.mmu.device_private import (
    DEVICE_PRIVATE_PFN,
    DeviceFault,
    PageMap,
    device_private_page,
    exclusive_pfn,
    is_device_entry,
    is_device_exclusive,
)
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.hmm import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from xipvm.mmu.migrate_device import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from xipvm.mmu.pte import PRESENT, pte_pfn
from xipvm.mmu.pte import WRITE as PTE_WRITE
from xipvm.mmu.secondary.base import FAULT, RETRY_WALK, WRITE
from xipvm.mmu.secondary.device import IntervalMmu, pages_of
from xipvm.mmu.secondary.odp import point_if_others_wait
from xipvm.mmu.vma import PROT_READ, TASK_SIZE, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.notifier import MmuNotifierRange

TRIES: Final = 1000
"""How often a lookup begins again before it gives up."""
_CHUNK: Final = 64
"""Pages that are migrated at a time."""
_Access = Callable[[int, int, int], object]
"""Of a frame, from an offset, so many bytes."""


class Snapshot(IntFlag):
    """What ``snapshot`` says of a page, as test_hmm's HMM_DMIRROR_PROT_* call it: rights, and kind of page."""

    NONE = 0x00
    READ = 0x01
    WRITE = 0x02
    PMD = 0x04
    """Mapped by a huge entry."""
    ZERO = 0x10
    DEV_PRIVATE_LOCAL = 0x20
    DEV_COHERENT_LOCAL = 0x40
    DEV_COHERENT_REMOTE = 0x80
    ERROR = 0x100


class Done(NamedTuple):
    """What a command reports."""

    cpages: int
    """Pages that it has done."""
    faults: int = 0
    """How often it had to fault."""


class Dmirror(IntervalMmu):
    """The device ``name`` on ``mm``, with ``pages`` pages of memory. A page's number is that of its address.

    Several mms may be mirrored by one device (``of``: another mirror whose memory this one shares), as by a file
    descriptor that fork duplicates; ``open`` a mirror of its own for the child, then.
    Raises MmError as ``MmuNotifiers.insert_interval``; ProtocolUnsupported.
    """

    def __init__(
        self,
        mm: Mm,
        *,
        pages: int = 1 << 12,
        coherent: bool = False,
        name: str = "dmirror0",
        of: Dmirror | None = None,
    ) -> None:
        super().__init__(mm, name=name)
        mm.notifiers.needs_modern("a device that mirrors memory")
        self.mutex = RwLock(f"mutex of {name}", DEVICE_MUTEX)
        self.table: dict[int, tuple[int, bool]] = {}
        """Frame and writability of every page that the mirror has."""
        self.atomic: set[int] = set()
        """Those of them that are the device's alone."""
        if of is None:
            self.owner: object = self
            self.memory = PageMap(mm, pages, owner=self, migrate_to_ram=self._migrate_to_ram, coherent=coherent)
        else:
            self.owner, self.memory = of.owner, of.memory
        self.owns_memory = of is None
        mm.notifiers.insert_interval(self, 0, TASK_SIZE)
        if self.trace.on:
            pages = TASK_SIZE >> PAGE_SHIFT
            self.trace.emit("memslot_set", vm=self.name, slot=0, gfn=0, pages=pages, hva=0, flags=0)

    # ---- what the bases want

    def hva_of(self, page: int) -> Hva | None:
        """See the base."""
        return Hva(page << PAGE_SHIFT)

    def pages_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """See the base."""
        return [(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))]

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """The pages it has that are mapped by the CPU, too."""
        for page in self.table:
            if self.mm.pgd.pte(page) & PRESENT:
                yield page, Hva(page << PAGE_SHIFT)

    def translate(self, page: int) -> tuple[int, bool] | None:
        """See the base."""
        return self.table.get(page)

    def inconsistency(self) -> str:
        """Of the pages that the CPU does not reach: entries stand for them."""
        for page, (pfn, write) in self.table.items():
            entry = self.mm.pgd.get(page)
            if entry & PRESENT and page not in self.atomic:
                continue
            its = exclusive_pfn(entry) if is_device_exclusive(entry) else pte_pfn(entry)
            alone = is_device_exclusive(entry) == (page in self.atomic)
            if not is_device_entry(entry) or its != pfn or not alone or (write and not entry & PTE_WRITE):
                return f"{self.name} maps page {page:#x} to {(pfn, write)}, the host has {entry:#x}"
        return ""

    def fault(self, page: int, access: int) -> int:
        """See the base: RETRY_WALK or FAULT."""
        try:
            self._fault(page, page + 1, access == WRITE)
        except DeadlockError:
            raise
        except MmError as error:
            self.last_error = error.what
            return FAULT
        return RETRY_WALK

    def destroy(self) -> None:
        """Gives its memory back to who has pages there, mirrors nothing any more. A second call does nothing."""
        if self.subscribed_to is None:
            return
        if self.owns_memory and not self.mm.dead:
            self.evict()
        with self.mutex.write:
            self._erase(0, TASK_SIZE)
        super().destroy()
        if self.owns_memory and not self.memory.used():
            self.memory.close()

    # ---- the mirror

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        """See the base."""
        if not range.blockable:  # a trylock, and nobody comes between
            return not self.mutex.taken and self._invalidate(range, cur_seq)
        with self.mutex.write:
            return self._invalidate(range, cur_seq)

    def _invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        if range.event is not RangeEvent.EXCLUSIVE or range.owner is not self.owner:
            self.set_seq(cur_seq)
        self._erase(range.start, range.end)
        return True

    def _erase(self, start: int, end: int) -> None:
        """Bytes ``[start, end)`` are not mirrored any more. Under the mutex."""
        gone = pages_of(self.table, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        for page in gone:
            pfn, write = self.table.pop(page)
            self.atomic.discard(page)
            if write and pfn < DEVICE_PRIVATE_PFN:
                self.set_page_dirty(pfn)
        if gone:
            self.zapped(gone[0], gone[-1] + 1)

    def _fault(self, first: int, last: int, write: bool) -> None:
        """Pages ``[first, last)`` into the mirror. Raises MmError as hmm_range_fault, and EBUSY for too many tries."""
        wanted = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        self.mm.check_alive(f"fault of {self.name}")
        for _ in range(TRIES + last - first):  # a fault that copies a page invalidates, too
            span = HmmRange(
                self.mm,
                self,
                first << PAGE_SHIFT,
                last << PAGE_SHIFT,
                default_flags=wanted,
                dev_private_owner=self.owner,
            )
            span.notifier_seq = self.read_begin()
            point("dmirror.fault.begin")
            try:
                hmm_range_fault(span)
            except MmError as error:
                if error.errno != errno.EBUSY:
                    raise
                give_way("dmirror.fault.collided")
                continue
            point("dmirror.fault.looked_up")
            with self.mutex.write:
                if not self.read_retry(span.notifier_seq):
                    for page, word in enumerate(span.hmm_pfns, first):
                        self._map(page, hmm_pfn_to_pfn(word), write=bool(word & HMM_PFN_WRITE))
                    return
            give_way("dmirror.fault.overtaken")
        raise MmError(errno.EBUSY, f"{self.name}: {first << PAGE_SHIFT:#x} was invalidated {TRIES} times")

    def _map(self, page: int, pfn: int, *, write: bool) -> None:
        self.table[page] = pfn, write
        self.atomic.discard(page)
        self.installed(page, pfn, write=write)

    # ---- read and write

    def read(self, hva: int, size: int) -> tuple[bytes, Done]:
        """``size`` bytes. Raises MmError: EFAULT, ENOMEM, EBUSY."""
        parts: list[bytes] = []
        faults = self._through(hva, size, False, lambda pfn, at, n: parts.append(self._load(pfn, at, n)))
        return b"".join(parts), Done(len(parts), faults)

    def write(self, hva: int, data: bytes) -> Done:
        """Puts ``data`` there. Raises MmError: EFAULT, EPERM, ENOMEM, EBUSY. Pages before the failing one are done."""
        done = 0
        pages = 0

        def put(pfn: int, at: int, size: int) -> None:
            nonlocal done, pages
            self._store(pfn, at, data[done : done + size])
            done, pages = done + size, pages + 1

        faults = self._through(hva, len(data), True, put)
        return Done(pages, faults)

    def update(self, hva: int, value: int) -> int:
        """Adds ``value`` to the aligned 64-bit number at ``hva``, in one step; what it was. The page is its alone.

        Raises MmError: EFAULT, EPERM, ENOMEM, EBUSY.
        """
        page = hva >> PAGE_SHIFT
        for _ in range(TRIES):
            with self.mutex.write:
                if page in self.atomic:
                    pfn, _ = self.table[page]
                    at = hva & ~PAGE_MASK
                    found = int.from_bytes(self._load(pfn, at, 8), "little")
                    point_if_others_wait("dmirror.atomic")
                    self._store(pfn, at, ((found + value) % (1 << 64)).to_bytes(8, "little"))
                    return found
            self._exclusive(page, page + 1)
            give_way("dmirror.atomic.again")
        raise MmError(errno.EBUSY, f"{self.name}: {hva:#x} was wanted by the CPU {TRIES} times")

    def _through(self, hva: int, size: int, write: bool, access: _Access) -> int:
        """``access`` for every piece of ``[hva, hva + size)`` in one page; how many rounds of faults that took."""
        if hva < 0 or size <= 0:
            raise MmError(errno.EINVAL, f"{self.name}: {size} bytes at {hva:#x}")
        at, end, faults = hva, hva + size, 0
        while at < end:
            page = at >> PAGE_SHIFT
            point("dmirror.access")
            with self.mutex.write:
                entry = self.table.get(page)
                if entry is not None and (entry[1] or not write):
                    here = min(PAGE_SIZE - (at & ~PAGE_MASK), end - at)
                    access(entry[0], at & ~PAGE_MASK, here)
                    at += here
                    continue
            self._fault(page, (end - 1 >> PAGE_SHIFT) + 1, write)
            faults += 1
        return faults

    def _load(self, pfn: int, offset: int, size: int) -> bytes:
        if pfn < DEVICE_PRIVATE_PFN:
            return self.dma_read(pfn, size, offset)
        return bytes(self.memory.memory.pages[pfn].data[offset : offset + size])

    def _store(self, pfn: int, offset: int, data: bytes) -> None:
        if pfn < DEVICE_PRIVATE_PFN:
            self.dma_write(pfn, data, offset)
        else:
            self.memory.memory.pages[pfn].data[offset : offset + len(data)] = data

    # ---- migration

    def migrate_to_dev(self, hva: int, pages: int) -> tuple[bytes, Done]:
        """Pages from ``hva`` on go to the device's memory; their content there.

        Raises MmError: EINVAL for a range that is not mapped as a whole and readable, or not aligned, ENOENT when one
        of the pages did not go.
        """
        moved = self._migrate(hva, pages, to_device=True)
        if moved != pages:
            raise MmError(errno.ENOENT, f"{self.name}: {moved} of {pages} pages at {hva:#x} are in the device's memory")
        data, _ = self.read(hva, pages << PAGE_SHIFT)
        return data, Done(moved)

    def migrate_to_sys(self, hva: int, pages: int) -> Done:
        """Pages of the device's memory come back; how many did. Raises MmError EINVAL."""
        return Done(self._migrate(hva, pages, to_device=False))

    def _migrate(self, hva: int, pages: int, *, to_device: bool) -> int:
        mm, done = self.mm, 0
        if pages <= 0 or hva & ~PAGE_MASK:
            raise MmError(errno.EINVAL, f"{self.name}: {pages} pages at {hva:#x}")
        select = MIGRATE_VMA_SELECT_SYSTEM if to_device else self._of_ours()
        with mm.mmap_lock.read:
            at, end = hva, hva + (pages << PAGE_SHIFT)
            while at < end:
                area = mm.find_vma(at)
                if area is None or not area.prot & PROT_READ:
                    raise MmError(errno.EINVAL, f"{self.name}: nothing readable is mapped at {at:#x}")
                stop = min(end, area.end, at + (_CHUNK << PAGE_SHIFT))
                done += self._migrate_vma(area, at, stop, select, to_device=to_device)
                at = stop
        return done

    def _of_ours(self) -> int:
        return MIGRATE_VMA_SELECT_DEVICE_COHERENT if self.memory.coherent else MIGRATE_VMA_SELECT_DEVICE_PRIVATE

    def _migrate_vma(
        self, area: Vma, start: int, end: int, select: int, *, to_device: bool, faulted: int | None = None
    ) -> int:
        """One round of the three steps; how many pages have moved."""
        args = MigrateVma(area, start, end, owner=self.owner, flags=select, faulted=faulted)
        migrate_vma_setup(args)
        try:
            point("dmirror.migrate.collected")
            room = self._alloc_and_copy(args, to_device)
            point("dmirror.migrate.copied")
            migrate_vma_pages(args)
            moved = sum(bool(word & MIGRATE_PFN_MIGRATE) for word in args.src)
        finally:
            migrate_vma_finalize(args)
        if faulted is not None and not room:
            raise OutOfFrames(f"no frame to spare for a page of {self.name}")
        return moved

    def _alloc_and_copy(self, args: MigrateVma, to_device: bool) -> bool:
        """False when there was no room for one; it stays where it is."""
        room = True
        for index, _, pfn in args.moving():
            try:
                new = self.memory.alloc() if to_device else args.mm.alloc_frame(True)
            except OutOfFrames:
                room = False
                continue
            args.dst[index] = migrate_pfn(new)
            if pfn is not None:
                self._store(new, 0, self._load(pfn, 0, PAGE_SIZE))
        return room

    def _migrate_to_ram(self, fault: DeviceFault) -> VmFault:
        """A CPU wants a page of the device's memory."""
        select, end = MIGRATE_VMA_SELECT_DEVICE_PRIVATE, fault.hva + PAGE_SIZE
        self._migrate_vma(fault.area, fault.hva, end, select, to_device=False, faulted=fault.page.pfn)
        return VmFault.OK

    def evict(self) -> None:
        """Every page of the device's memory goes back to where the CPU reaches it, in whatever mm it is mapped.

        Raises MmError EBUSY when one cannot: there is no room, or somebody holds it.
        """
        for _ in range(TRIES):
            places = [place for pfn in self.memory.used() for place in self._places(pfn)]
            if not places:
                return
            for area, hva in places:
                with area.mm.mmap_lock.read:
                    if area.mm.find_vma(hva) is area:
                        self._migrate_vma(area, hva, hva + PAGE_SIZE, self._of_ours(), to_device=False)
            give_way("dmirror.evict.again")
        raise MmError(errno.EBUSY, f"{self.name}: {len(self.memory.used())} pages cannot be given back")

    def _places(self, pfn: int) -> list[tuple[Vma, int]]:
        """Where a page of the device's memory is mapped now."""
        rmap = self.mm.rmap
        if pfn < DEVICE_PRIVATE_PFN:
            return list(rmap.walk(self.mm.host, pfn))
        page = self.memory.memory.pages[pfn]
        found = ((area, area.address_of(page.index)) for area in rmap.areas(page.mapping))
        return [
            (area, hva)
            for area, hva in found
            if hva is not None and device_private_page(area.mm, area.mm.pgd.get(hva >> PAGE_SHIFT)) is page
        ]

    # ---- the rest

    def snapshot(self, hva: int, pages: int) -> list[Snapshot]:
        """What there is of each page; faults nothing in, and puts nothing into the mirror. Raises MmError EBUSY."""
        for _ in range(TRIES):
            span = HmmRange(self.mm, self, hva, hva + (pages << PAGE_SHIFT), dev_private_owner=self.owner)
            span.notifier_seq = self.read_begin()
            try:
                hmm_range_fault(span)
            except MmError as error:
                if error.errno != errno.EBUSY:
                    raise
                give_way("dmirror.snapshot.collided")
                continue
            with self.mutex.write:
                if not self.read_retry(span.notifier_seq):
                    return [self._describe(word) for word in span.hmm_pfns]
        raise MmError(errno.EBUSY, f"{self.name}: {hva:#x} was invalidated {TRIES} times")

    def _describe(self, word: int) -> Snapshot:
        if word & HMM_PFN_ERROR:
            return Snapshot.ERROR
        if not word & HMM_PFN_VALID:
            return Snapshot.NONE
        pfn = hmm_pfn_to_pfn(word)
        found = Snapshot.WRITE if word & HMM_PFN_WRITE else Snapshot.READ
        if pfn >= DEVICE_PRIVATE_PFN:
            return found | Snapshot.DEV_PRIVATE_LOCAL
        if pfn == ZERO_PFN:
            return found | Snapshot.ZERO
        pagemap = self.memory.memory.pagemap_of(pfn)
        if pagemap is not None:
            ours = pagemap is self.memory
            return found | (Snapshot.DEV_COHERENT_LOCAL if ours else Snapshot.DEV_COHERENT_REMOTE)
        return found | (Snapshot.PMD if hmm_pfn_to_map_order(word) else Snapshot.NONE)

    def exclusive(self, hva: int, pages: int) -> tuple[bytes, Done]:
        """Pages from ``hva`` on are the device's alone; their content. Raises MmError EFAULT, EBUSY."""
        first = hva >> PAGE_SHIFT
        for _ in range(TRIES):
            if self._exclusive(first, first + pages) == pages:
                with self.mutex.write:
                    found = [self.table[page] for page in range(first, first + pages) if page in self.atomic]
                    if len(found) == pages:
                        return b"".join(self._load(pfn, 0, PAGE_SIZE) for pfn, _ in found), Done(pages)
            give_way("dmirror.exclusive.again")
        raise MmError(errno.EBUSY, f"{self.name}: {hva:#x} was wanted by the CPU {TRIES} times")

    def _exclusive(self, first: int, last: int) -> int:
        """One try; how many of the pages the mirror has for itself now.

        They are faulted in before it begins: what it had taken in a try that came to nothing has to be given back, and
        that is an invalidation of its own, which would end every further try the same way.
        """
        for page in range(first, last):
            self.mm.get_user_pages(page << PAGE_SHIFT, write=True)
        seq = self.read_begin()
        point("dmirror.exclusive.begin")
        with (
            DeviceExclusive(self.mm, first << PAGE_SHIFT, last << PAGE_SHIFT, owner=self.owner) as taken,
            self.mutex.write,
        ):
            if self.read_retry(seq):
                return 0
            for page, pfn in enumerate(taken.pages, first):
                if pfn is not None:
                    self._map(page, pfn, write=True)
                    self.atomic.add(page)
            return sum(pfn is not None for pfn in taken.pages)

    def check_exclusive(self, hva: int, pages: int) -> None:
        """Raises MmError EPERM when the device has one of the pages for itself."""
        first = hva >> PAGE_SHIFT
        with self.mutex.write:
            if any(first <= page < first + pages for page in self.atomic):
                raise MmError(errno.EPERM, f"{self.name} has pages at {hva:#x} for itself")
