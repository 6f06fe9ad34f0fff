"""On-demand paging: memory that an RDMA device reaches without pinning it, as Linux's ib_umem_odp and mlx5 do it.

A memory region (:class:`OdpUmem`) watches its range by an interval notifier. It has the list of frames that are mapped
for DMA, and the translation table that the device's hardware walks; here they are one dictionary. The mutex of the
region, ``umem_mutex``, is the lock of the collision scheme, and is held while the hardware's table changes.

The way of one access: entry there → in flight, by what the hardware has read → bytes → no longer in flight. Entry not
there: the hardware stops and asks for the page::

    read_begin → hmm_range_fault (EBUSY: begin again) → umem_mutex → read_retry (begin again) → entries → unlock

The way of one invalidation::

    may not block? declined → umem_mutex → set_seq → entries cleared → *wait until the hardware is done with what it has
    read from them* → DMA unmapped, pages marked dirty that could be written → unlock

Without the wait an access that is under way would reach a frame that belongs to somebody else by then.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm import actors
from xipvm.actors import give_way, point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, page_up
from xipvm.errors import DeadlockError, MmError
from xipvm.locks.check import sleep_until
from xipvm.locks.lock import RwLock
from xipvm.locks.order import DEVICE_MUTEX
from xipvm.mmu.hmm import (
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from xipvm.mmu.secondary.base import FAULT, RETRY_WALK, WRITE
from xipvm.mmu.secondary.device import IntervalMmu, pages_of

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.notifier import MmuNotifierRange

TRIES: Final = 1000
"""How often a fault begins again before it gives up: what Linux does for a second."""
FIRST_TLB: Final = 0x4000
"""Numbers of what the hardware has in flight, in traces, begin here."""


def point_if_others_wait(label: str) -> None:
    """A point where a lock is held, or an access is in flight, for which an invalidation has to wait.

    Only for actors of a scheduler. What a hook does stands on the stack of what it interrupts, so it cannot wait; and a
    start that raises leaves the operation that it was for half done.
    """
    if actors.current.greenlet is not None:
        point(label)


class Flights:
    """What the hardware of one device has in flight: numbers that no two accesses have at a time."""

    __slots__ = ("first", "taken")

    def __init__(self, first: int = FIRST_TLB) -> None:
        self.first = first
        self.taken: dict[int, tuple[OdpUmem, int]] = {}
        """Region and page by number."""

    def begin(self, umem: OdpUmem, page: int) -> int:
        """An access to ``page``; its number."""
        number = self.first
        while number in self.taken:
            number += 1
        self.taken[number] = umem, page
        return number

    def hit(self, umem: OdpUmem, start: int, end: int) -> bool:
        """Whether one is to a page of ``[start, end)``."""
        return any(whose is umem and start <= page < end for whose, page in self.taken.values())


class OdpUmem(IntervalMmu):
    """Bytes ``[hva, hva + length)`` of ``mm``, rounded to pages, for DMA. Its pages count from ``page``.

    ``write``: the device may write. ``flights``: of the device that it belongs to. Raises MmError as
    ``MmuNotifiers.insert_interval``, ESRCH when the mm has exited.
    """

    def __init__(
        self,
        mm: Mm,
        hva: int,
        length: int,
        *,
        write: bool = True,
        page: int = 0,
        name: str = "odp0",
        flights: Flights | None = None,
    ) -> None:
        super().__init__(mm, name=name)
        mm.check_alive("ib_umem_odp_get")
        mm.notifiers.needs_modern("on-demand paging")
        self.writable = write
        self.umem_mutex = RwLock(f"umem_mutex of {name}", DEVICE_MUTEX)
        self.dma: dict[int, tuple[int, bool]] = {}
        """Frame and writability of every page that is mapped for DMA."""
        self.faults = 0
        """How often the hardware asked."""
        self._flights = Flights() if flights is None else flights
        base = hva & PAGE_MASK
        self.first, self.pages = page, (page_up(hva + length) - base) >> PAGE_SHIFT
        self.watch(base, self.pages, page=page)

    # ---- invalidation

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        """See the base."""
        if not range.blockable:
            return False
        with self.umem_mutex.write:
            self.set_seq(cur_seq)
            for start, end in self.pages_in(range.start, range.end):
                self._unmap(start, end)
        return True

    def _unmap(self, start: int, end: int) -> None:
        """Pages ``[start, end)`` are not mapped for DMA any more when this returns. Under the mutex."""
        gone = {page: self.dma.pop(page) for page in pages_of(self.dma, start, end)}
        if not gone:
            return
        self.zapped(start, end)
        try:
            self.wait_for_hardware(start, end)
        finally:
            for pfn, write in gone.values():
                if write:
                    self.set_page_dirty(pfn)

    def wait_for_hardware(self, start: int, end: int) -> None:
        """Returns when no access to ``[start, end)`` is in flight."""
        flights = self._flights
        sleep_until(
            f"{self.name} to finish its accesses",
            lambda: not flights.hit(self, start, end),
            because="whose access would have to go on first",
            label="odp.hardware",
        )

    # ---- faults

    def fault(self, page: int, access: int) -> int:
        """See the base: RETRY_WALK or FAULT."""
        try:
            self.map_dma(page, 1, write=access == WRITE)
        except DeadlockError:
            raise
        except MmError as error:
            self.last_error = error.what
            return FAULT
        return RETRY_WALK

    def map_dma(self, page: int, pages: int, *, write: bool) -> None:
        """Map ``[page, page + pages)`` for DMA.

        Raises MmError: EFAULT, EPERM, ENOMEM as hmm_range_fault, EPERM for a region that is only read, EBUSY when it
        was invalidated every time, ESRCH when the mm has exited.
        """
        if page < self.first or page + pages > self.first + self.pages:
            raise MmError(errno.EFAULT, f"{self.name}: page {page:#x} is outside of the region")
        if write and not self.writable:
            raise MmError(errno.EPERM, f"{self.name} is only read")
        self.mm.check_alive(f"fault of {self.name}")
        self.faults += 1
        hva = self.hva_of(page)
        assert hva is not None
        wanted = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        span = HmmRange(self.mm, self, hva, hva + (pages << PAGE_SHIFT), default_flags=wanted)
        for _ in range(TRIES + pages):  # a fault that copies a page invalidates, too
            span.notifier_seq = self.read_begin()
            point("odp.fault.begin")
            try:
                hmm_range_fault(span)
            except MmError as error:
                if error.errno != errno.EBUSY:
                    raise
                give_way("odp.fault.collided")
                continue
            point("odp.fault.looked_up")
            with self.umem_mutex.write:
                if not self.read_retry(span.notifier_seq):
                    self._map(page, span.hmm_pfns)
                    return
            give_way("odp.fault.overtaken")
        raise MmError(errno.EBUSY, f"{self.name}: page {page:#x} was invalidated {TRIES} times")

    def _map(self, page: int, words: list[int]) -> None:
        """Entries for what was looked up. Under the mutex, behind the last look at the sequence number."""
        for at, word in enumerate(words, page):
            entry = hmm_pfn_to_pfn(word), bool(word & HMM_PFN_WRITE) and self.writable
            point_if_others_wait("odp.fault.mapping")
            self.dma[at] = entry
            self.installed(at, entry[0], write=entry[1])

    # ---- DMA

    def read(self, page: int, size: int, offset: int = 0) -> bytes:
        """What the device reads: ``size`` bytes of one page. Raises MmError as :meth:`map_dma`."""
        return self._fly(page, False, lambda pfn: self.dma_read(pfn, size, offset))

    def write(self, page: int, data: bytes, offset: int = 0) -> None:
        """What it writes."""

        def put(pfn: int) -> bytes:
            self.dma_write(pfn, data, offset)
            return b""

        self._fly(page, True, put)

    def update(self, page: int, size: int, change: Callable[[bytes], bytes], offset: int = 0) -> bytes:
        """A read and a write that nobody comes between; returns what was there."""

        def exchange(pfn: int) -> bytes:
            old = self.dma_read(pfn, size, offset)
            self.dma_write(pfn, change(old), offset)
            return old

        return self._fly(page, True, exchange)

    def _fly(self, page: int, write: bool, access: Callable[[int], bytes]) -> bytes:
        while True:
            entry = self.dma.get(page)
            if entry is not None and (entry[1] or not write):
                break
            self.map_dma(page, 1, write=write)
        number = self._flights.begin(self, page)
        self.tlb_filled(number, page, entry[0], write=write)
        try:
            point_if_others_wait("odp.dma")
            return access(entry[0])
        finally:
            del self._flights.taken[number]
            self.tlb_flushed(number, "done")

    # ---- the rest

    def translate(self, page: int) -> tuple[int, bool] | None:
        """See the base."""
        return self.dma.get(page)

    def destroy(self) -> None:
        """Nothing is mapped for DMA any more, and nothing is watched. A second call does nothing."""
        if self.subscribed_to is not None:
            with self.umem_mutex.write:
                self._unmap(self.first, self.first + self.pages)
        super().destroy()


class OdpContext:
    """What a device has registered of ``mm``: regions by key.

    The device calls bytes by addresses of its own; ``resolve(address, length)`` says which bytes of the mm they are,
    None when they are none.
    """

    def __init__(self, mm: Mm, resolve: Callable[[int, int], int | None], *, name: str = "odp") -> None:
        self.mm = mm
        self.name = name
        self.regions: dict[int, OdpUmem] = {}
        self._resolve = resolve
        self._flights = Flights()
        self._last = 0
        self._faults = 0

    @property
    def faults(self) -> int:
        """How often the hardware asked for a page."""
        return self._faults + sum(umem.faults for umem in self.regions.values())

    def register(self, address: int, length: int, *, write: bool) -> int:
        """A region of bytes ``[address, address + length)``; its key. Raises MmError: EINVAL, EFAULT, ESRCH."""
        if length <= 0 or address < 0:
            raise MmError(errno.EINVAL, f"{self.name}: {length} bytes at {address:#x}")
        base = address & PAGE_MASK
        hva = self._resolve(base, page_up(address + length) - base)
        if hva is None:
            raise MmError(errno.EFAULT, f"{self.name}: {length:#x} bytes at {address:#x} are no memory")
        self._last = key = self._last + 1
        self.regions[key] = OdpUmem(
            self.mm,
            hva + (address - base),
            length,
            write=write,
            page=address >> PAGE_SHIFT,
            name=f"{self.name}.{key}",
            flights=self._flights,
        )
        return key

    def deregister(self, key: int) -> None:
        """Raises MmError EINVAL for a key that is none."""
        umem = self._region(key)
        del self.regions[key]
        self._faults += umem.faults
        umem.destroy()

    def _region(self, key: int) -> OdpUmem:
        umem = self.regions.get(key)
        if umem is None:
            raise MmError(errno.EINVAL, f"{self.name}: {key} is the key of no region")
        return umem

    def read(self, key: int, address: int, size: int) -> bytes:
        """``size`` bytes, all of one page. Raises MmError as :meth:`OdpUmem.map_dma`, and EINVAL."""
        return self._region(key).read(address >> PAGE_SHIFT, size, address & ~PAGE_MASK)

    def write(self, key: int, address: int, data: bytes) -> None:
        """Put ``data`` into one page. Raises as :meth:`read`."""
        self._region(key).write(address >> PAGE_SHIFT, data, address & ~PAGE_MASK)

    def fetch_add(self, key: int, address: int, value: int) -> int:
        """Adds to the aligned 64-bit number at ``address``; what it was. Raises as :meth:`read`."""

        def add(old: bytes) -> bytes:
            return ((int.from_bytes(old, "little") + value) % (1 << 64)).to_bytes(8, "little")

        if address % 8:
            raise MmError(errno.EINVAL, f"{self.name}: {address:#x} is not aligned")
        found = self._region(key).update(address >> PAGE_SHIFT, 8, add, address & ~PAGE_MASK)
        return int.from_bytes(found, "little")

    def close(self) -> None:
        """Deregister everything."""
        for key in list(self.regions):
            self.deregister(key)
