"""Secondary MMUs of devices for scenarios: one that is told of everything, one that watches a range, one that looks.

Each is what a careful driver would be, in as few lines as show where its author could be interrupted.
"""

from __future__ import annotations

from typing import Final

from xipvm.actors import give_way, point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scripted import GuestAccessError
from xipvm.locks import LockClass, RwLock
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import PRESENT, pte_pfn
from xipvm.mmu.secondary.base import FAULT, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.device import DeviceMmu, DeviceTables, IntervalMmu
from xipvm.notifier import MmuNotifierRange, NotifiedMm

MIRROR_LOCK: Final = LockClass("mirror lock", spins=True)
UMEM_MUTEX: Final = LockClass("umem mutex")
_ALL: Final = 1 << 27
Table = dict[int, tuple[int, bool]]
"""Frame and writability by page."""


def _zap(device: DeviceTables, table: Table, start: int, end: int) -> None:
    """Remove what ``device`` has in ``table`` of bytes ``[start, end)`` of its mm, and flush if there was anything."""
    gone = [page for first, last in device.pages_in(start, end) for page in table if first <= page < last]
    for page in gone:
        del table[page]
        device.zapped(page, page + 1)
    if gone:
        device.flush_remote_tlbs("invalidate")


class Mirror(DeviceMmu):
    """``pages`` pages of ``mm`` from ``hva`` on; its faults start over when anything was invalidated meanwhile.

    ``lock``, which spins, keeps its table, ``sequence`` (invalidations that ended) and ``invalidations`` (open ones).
    """

    def __init__(self, mm: Mm, hva: int, pages: int, *, page: int = 0, name: str = "mirror0") -> None:
        super().__init__(mm, name=name)
        self.lock = RwLock(f"lock of {name}", MIRROR_LOCK)
        self.table: Table = {}
        self.sequence = 0
        self.invalidations = 0
        self.closed = False
        self.map_window(hva, pages, page=page)
        self.register()

    def fault(self, page: int, access: int) -> int:
        """See the base."""
        sequence = self.sequence
        self.looking_up(page)
        hva = self.hva_of(page)
        if hva is None or self.closed:
            self.last_error = "outside" if hva is None else "closed"
            return FAULT
        point("mirror.sequence_read")
        try:
            found = self.mm.get_user_pages(hva, write=access == WRITE)
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        point("mirror.looked_up")
        with self.lock.write:
            if not self.overtaken(sequence):
                self.table[page] = found.pfn, access == WRITE
                self.installed(page, found.pfn, write=access == WRITE)
        return RETRY_WALK

    def overtaken(self, sequence: int) -> bool:
        """Whether what was looked up since it was at ``sequence`` must not be installed. Under the lock."""
        return self.invalidations > 0 or self.sequence != sequence

    def translate(self, page: int) -> tuple[int, bool] | None:
        """See the base."""
        return self.table.get(page)

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """See the base."""
        with self.lock.write:
            self.invalidations += 1
            _zap(self, self.table, range.start, range.end)
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """See the base."""
        with self.lock.write:
            self.sequence += 1
            self.invalidations -= 1

    def clear_flush_young(self, start: int, end: int) -> bool:
        """See the base. The device does not say what it uses, so whatever it has counts, and is used no more."""
        with self.lock.write:
            before = len(self.table)
            _zap(self, self.table, start, end)
            return len(self.table) < before

    def release(self, mm: NotifiedMm) -> None:
        """See the base."""
        with self.lock.write:
            self.closed = True
            self.sequence += 1
            self.table.clear()
            self.zapped(0, _ALL)
            self.flush_remote_tlbs("release")


class Engine(Mirror):
    """A DMA engine without a TLB: every access looks at the table. A page that may be written is entered so at once."""

    def fault(self, page: int, access: int) -> int:
        """See the base."""
        sequence = self.sequence
        self.looking_up(page)
        hva = self.hva_of(page)
        if hva is None or self.closed:
            self.last_error = "outside" if hva is None else "closed"
            return FAULT
        try:
            found = self.mm.get_user_pages(hva, write=access == WRITE)
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        point("engine.looked_up")
        with self.lock.write:
            if not self.overtaken(sequence):
                if found.writable:  # it writes without telling anybody
                    self.set_page_dirty(found.pfn)
                self.table[page] = found.pfn, found.writable
                self.installed(page, found.pfn, write=found.writable)
        return RETRY_WALK

    def read(self, page: int, size: int = 8) -> bytes:
        """DMA from ``page``. Raises GuestAccessError."""
        return self.dma_read(self._frame(page, READ), size)

    def write(self, page: int, data: bytes) -> None:
        """DMA into ``page``. Raises GuestAccessError."""
        self.dma_write(self._frame(page, WRITE), data)

    def _frame(self, page: int, access: int) -> int:
        point("engine.access")
        while True:
            entry = self.table.get(page)
            if entry is not None and (entry[1] or access == READ):
                return entry[0]
            if self.fault(page, access) == FAULT:
                raise GuestAccessError(page, self.last_error)
            give_way("engine.retry")


class Odp(IntervalMmu):
    """A memory region of an RDMA device with on-demand paging: ``pages`` pages of ``mm`` from ``hva`` on.

    ``umem_mutex``, which sleeps, keeps the table; readers ask under it whether their lookup counts.
    """

    def __init__(self, mm: Mm, hva: int, pages: int, *, page: int = 0, name: str = "odp0") -> None:
        super().__init__(mm, name=name)
        self.umem_mutex = RwLock(f"umem_mutex of {name}", UMEM_MUTEX)
        self.table: Table = {}
        self.gone = False
        """Its memory is given back: nobody may call it any more."""
        self.watch(hva, pages, page=page)

    def fault(self, page: int, access: int) -> int:
        """See the base."""
        hva = self.hva_of(page)
        try:
            seq = self.read_begin()
            if hva is None:
                self.last_error = "outside"
                return FAULT
            point("odp.begun")
            found = self.mm.get_user_pages(hva, write=access == WRITE)
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        point("odp.looked_up")
        with self.umem_mutex.write:
            if not self.read_retry(seq) and not self.gone:
                self.table[page] = found.pfn, access == WRITE
                self.installed(page, found.pfn, write=access == WRITE)
        return RETRY_WALK

    def translate(self, page: int) -> tuple[int, bool] | None:
        """See the base."""
        return self.table.get(page)

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        """See the base."""
        if self.gone:
            raise AssertionError(f"{self.name} is called for {range!r}, but it is gone")
        if not range.blockable:  # the mutex sleeps
            return False
        with self.umem_mutex.write:
            self.set_seq(cur_seq)
            _zap(self, self.table, range.start, range.end)
            point("odp.invalidated")
        if self.gone:
            raise AssertionError(f"{self.name} goes while it is at work on {range!r}")
        return True

    def destroy(self) -> None:
        """See the base. Drops what it has when nobody calls it any more."""
        super().destroy()
        self.gone = True
        self.table.clear()
        self.zapped(0, _ALL)
        self.flush_remote_tlbs("destroy")


class Watcher(IntervalMmu):
    """Translates nothing; looks at ``pages`` pages from ``hva`` on, and wants to know whether what it saw was so."""

    def __init__(self, mm: Mm, hva: int, pages: int, *, name: str = "watcher0") -> None:
        super().__init__(mm, name=name)
        self.lock = RwLock(f"lock of {name}", UMEM_MUTEX)
        self._pages = pages
        self.watch(hva, pages)

    def fault(self, page: int, access: int) -> int:
        """Never."""
        return FAULT

    def translate(self, page: int) -> None:
        """Nothing."""

    def snapshot(self) -> list[int | None]:
        """The frames of its pages, all at one moment; None where nothing is. Raises MmError as ``read_begin``."""
        first = self.start >> PAGE_SHIFT
        while True:
            seq = self.read_begin()
            seen = []
            for page in range(first, first + self._pages):
                entry = self.mm.pgd.pte(page)
                seen.append(pte_pfn(entry) if entry & PRESENT else None)
                point("watcher.looked")
            with self.lock.write:
                if not self.read_retry(seq):
                    return seen
            give_way("watcher.retry")


PAGES: Final = 2
SIZE: Final = PAGES * PAGE_SIZE
"""What the scenarios' devices see of a process."""
