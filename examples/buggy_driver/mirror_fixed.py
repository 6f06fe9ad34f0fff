"""Driver of a copy engine whose queues work on a buffer of a process, by its own page table.

A queue translates a page of the buffer by its TLB, else by the mirror's page table, else it faults: the driver looks
the page up in the process and enters it. The process may unmap, copy or protect its memory whenever it likes; the MMU
notifier tells the driver, which removes what it has of that range.

``lock`` protects the page table and what is beside it. A fault sleeps while it looks the page up, so it cannot hold the
lock meanwhile. Instead ``sequence`` counts invalidations: a fault that sees another count when it comes back starts
over.

Writing: a page is entered writable only for a queue that writes. It is dirty from then on, until somebody collects the
dirty pages, which makes their entries read-only again.
"""

from __future__ import annotations

from dataclasses import dataclass

from xipvm.testing import (
    FAULT,
    READ,
    RETRY_WALK,
    WRITE,
    DeviceMmu,
    LockClass,
    Mm,
    MmError,
    MmuNotifierRange,
    RwLock,
    give_way,
    point,
)

MIRROR_LOCK = LockClass("mirror lock", spins=True)


class TranslationError(Exception):
    """A queue's access to ``page`` went nowhere: the process has no such memory, or the mirror is closed."""

    def __init__(self, page: int, why: str) -> None:
        super().__init__(f"page {page:#x}: {why}")
        self.page = page


@dataclass
class Entry:
    """One page of the buffer."""

    pfn: int
    writable: bool


class Queue:
    """One queue of the engine. Its TLB keeps every translation until it is flushed."""

    def __init__(self, mirror: Mirror, number: int) -> None:
        self.mirror = mirror
        self.number = number
        self.tlb: dict[int, Entry] = {}

    def read(self, page: int, size: int = 8, offset: int = 0) -> bytes:
        """DMA from the buffer. Raises TranslationError."""
        return self.mirror.dma_read(self._translate(page, READ).pfn, size, offset)

    def write(self, page: int, data: bytes, offset: int = 0) -> None:
        """DMA into the buffer. Raises TranslationError."""
        self.mirror.dma_write(self._translate(page, WRITE).pfn, data, offset)

    def copy(self, source: int, target: int, size: int = 4096) -> None:
        """What the engine is for: page to page. Raises TranslationError."""
        self.write(target, self.read(source, size))

    def prefetch(self, page: int) -> bool:
        """Load the TLB for a job that comes later; True when there was something to load. Never faults."""
        point("queue.prefetch")
        entry = self.mirror.table.get(page)
        if entry is not None:
            self._fill(page, entry)
        return entry is not None

    def flush_tlb(self, reason: str) -> None:
        """Forget every translation."""
        self.tlb.clear()
        self.mirror.tlb_flushed(self.number, reason)

    def kick(self, reason: str) -> None:
        """An access is over before anybody could interrupt it."""

    def _translate(self, page: int, access: int) -> Entry:
        point("queue.access")
        while True:
            entry = self.tlb.get(page)
            if entry is None or (access == WRITE and not entry.writable):
                entry = self.mirror.table.get(page)
            if entry is not None and (entry.writable or access == READ):
                self._fill(page, entry)
                return entry
            if self.mirror.fault(page, access) == FAULT:
                raise TranslationError(page, self.mirror.last_error)
            give_way("queue.retry")

    def _fill(self, page: int, entry: Entry) -> None:
        held = self.tlb.get(page)
        if held is None or (held.pfn, held.writable) != (entry.pfn, entry.writable):
            self.tlb[page] = Entry(entry.pfn, entry.writable)
            self.mirror.tlb_filled(self.number, page, entry.pfn, write=entry.writable)


class Mirror(DeviceMmu):
    """The engine's page table of ``pages`` pages of ``mm`` from ``hva`` on. Close it with ``destroy``."""

    def __init__(self, mm: Mm, hva: int, pages: int, *, name: str = "mirror0") -> None:
        super().__init__(mm, name=name)
        self.lock = RwLock(f"lock of {name}", MIRROR_LOCK)
        self.table: dict[int, Entry] = {}
        self.dirty: set[int] = set()
        self.sequence = 0
        self.invalidations = 0
        self.closed = False
        self.map_window(hva, pages)
        mm.notifiers.register(self)

    def queue(self) -> Queue:
        """Another queue."""
        queue = Queue(self, len(self.vcpus))
        self.vcpus.append(queue)
        return queue

    # ---- faults

    def fault(self, page: int, access: int) -> int:
        """Enter ``page`` into the table, so that ``access`` is possible."""
        hva = self.hva_of(page)
        if hva is None or self.closed:
            self.last_error = "the mirror is closed" if self.closed else "outside of the buffer"
            return FAULT
        sequence = self.sequence
        try:
            found = self.mm.get_user_pages(hva, write=access == WRITE)
        except MmError as error:
            self.last_error = str(error)
            return FAULT
        point("mirror.fault.looked_up")
        # A level of the device's table may have to be allocated here, which sleeps.
        point("mirror.fault.prepared")
        with self.lock.write:
            if self.closed or self.invalidations or self.sequence != sequence:
                return RETRY_WALK
            self._enter(page, Entry(found.pfn, access == WRITE))
        return RETRY_WALK

    def prefault(self, first: int, pages: int, access: int = READ) -> None:
        """Enter ``pages`` pages from ``first`` on, before a job needs them. What cannot be had is left out."""
        for page in range(first, first + pages):
            self.fault(page, access)

    def _enter(self, page: int, entry: Entry) -> None:
        before = self.table.get(page)
        if before is not None and before.writable:
            return
        self.table[page] = entry
        self.installed(page, entry.pfn, write=entry.writable)
        if entry.writable:
            self.dirty.add(page)
            self.set_page_dirty(entry.pfn)

    def translate(self, page: int) -> tuple[int, bool] | None:
        """What the engine's table has for ``page``."""
        entry = self.table.get(page)
        return None if entry is None else (entry.pfn, entry.writable)

    # ---- dirty pages

    def collect_dirty(self) -> set[int]:
        """The pages that may have been written since the last call."""
        with self.lock.write:
            dirty, self.dirty = self.dirty, set()
            for page in dirty & self.table.keys():
                self.table[page].writable = False
                self.protected(page, page + 1)
            if dirty:
                self.flush_remote_tlbs("dirty")
        return dirty

    # ---- the notifier

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """The process is about to change ``range``: nothing of it may be used any more."""
        with self.lock.write:
            self.invalidations += 1
            for first, last in self.pages_in(range.start, range.end):
                self._remove(first, last)
            point("mirror.invalidate.removed")
            self.flush_remote_tlbs("invalidate")
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """The process has changed it."""
        with self.lock.write:
            self.sequence += 1
            self.invalidations -= 1

    def release(self, mm: object) -> None:
        """The process is gone, or the mirror is closed."""
        self.closed = True
        with self.lock.write:
            self._remove(0, max((window.gfn_end for window in self.windows), default=0))
            self.flush_remote_tlbs("release")

    def _remove(self, first: int, last: int) -> None:
        for page in [page for page in self.table if first <= page < last]:
            del self.table[page]
        self.zapped(first, last)
