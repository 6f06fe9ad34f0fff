"""Memory of devices as pages of an mm, and entries that stand for a page which the CPU must not touch now.

Two kinds of entries, both as swap entries are, so that fork, munmap, mremap and all who skip swap take them along:

* **device-private**: the page is in memory that only a device reaches. The entry counts as a mapping of it, and as a
  reference. A CPU that comes here has the page brought back first (``migrate_to_ram``);
* **device-exclusive**: the page is where it was, but a device wants to be alone with it. The entry has the reference
  that the mapping had, and does not count as a mapping. A CPU that comes here gets the old entry back, behind a range
  (``EXCLUSIVE``) in which the device gives it up.

Both keep WRITE, EXCLUSIVE, SOFT_DIRTY and UFFD_WP of the entry they stand for. Traces show them as entries
(``pte_set`` with flags that have no PRESENT), for that is what a device may translate by.

*Device-coherent* memory the CPU reaches, too: frames of the arena, set aside one by one, whose entries are ordinary
ones. Nothing distinguishes them but the flag PG_COHERENT, and who asks for device pages.

What others have to do for these entries is done here, called from their places: zap and fork (:func:`zap_entries`,
:func:`before_fork`, :func:`after_fork`), mprotect (:func:`protect_entries`), faults (:func:`do_device_entry`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError, MmError, OutOfFrames
from xipvm.locks.check import sleep_until
from xipvm.mmu.file import VmFault
from xipvm.mmu.pte import (
    ANON,
    DEVICE,
    DEVICE_EXCLUSIVE,
    EXCLUSIVE,
    PFN_SHIFT,
    SOFT_DIRTY,
    SWAP,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.vma import PROT_WRITE
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.rmap import ReverseMap
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

DEVICE_PRIVATE_PFN: Final = DEVICE >> PFN_SHIFT
"""Frame numbers from here on are pages of devices that the CPU cannot reach."""
PG_COHERENT: Final = 1 << 24
"""Flag of a frame that a device has handed out as its memory, which the CPU reaches, too."""
_KEPT: Final = WRITE | EXCLUSIVE | SOFT_DIRTY | UFFD_WP
_NUMBER: Final = (DEVICE_EXCLUSIVE >> PFN_SHIFT) - 1
"""The frame of a device-exclusive entry, in what stands in place of the pfn."""


class DeviceFault(NamedTuple):
    """A CPU wants the page that ``entry``, a device-private one of ``area``, stands for. Its fault has locked it."""

    mm: Mm
    area: Vma
    hva: int
    entry: int
    page: DevicePage


MigrateToRam = Callable[[DeviceFault], VmFault]
"""Brings the page back to system memory; OK also when it had to give up for now, SIGBUS when it is lost."""


class DevicePage:
    """One page of device-private memory. ``data`` is its content, none before it is used; the rest as a frame's."""

    __slots__ = ("data", "index", "mapcount", "mapping", "pagemap", "pfn", "refcount")

    def __init__(self, pagemap: PageMap, pfn: int) -> None:
        self.pagemap = pagemap
        self.pfn = pfn
        self.data = bytearray()
        self.refcount = self.mapcount = 0
        self.mapping = self.index = 0
        """Its anon_vma, 0 for none, and its place in it."""


class DeviceMemory:
    """All device pages of one host memory; kept by its reverse map."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self.host = host
        self.trace = trace
        self.pages: dict[int, DevicePage] = {}
        """Every page of every device, by frame number."""
        self.coherent: dict[int, PageMap] = {}
        """Frames that were handed out as coherent memory, and by whom; true as long as they have PG_COHERENT."""
        self.next = DEVICE_PRIVATE_PFN

    def put(self, pfn: int) -> None:
        """Drops a reference to a device-private page; the last one gives it back to its device."""
        page = self.pages[pfn]
        if page.refcount <= 0:
            raise InternalError(f"put of the free device page {pfn:#x}")
        page.refcount -= 1
        if not page.refcount:
            page.mapping = page.index = 0
            if self.trace.on:
                self.trace.emit("page_free", pages=[(pfn, 1)])
            page.pagemap.free.append(page)

    def pagemap_of(self, pfn: int) -> PageMap | None:
        """The device whose memory ``pfn`` is, of either kind; None for system memory."""
        page = self.pages.get(pfn)
        if page is not None:
            return page.pagemap
        found = self.coherent.get(pfn)
        return found if found is not None and self.host.refcount(pfn) and self.host.flags(pfn) & PG_COHERENT else None


def device_memory(host: HostMemory, trace: Trace, rmap: ReverseMap) -> DeviceMemory:
    """What there is of it in ``host``; from the first call on others look for such entries."""
    if rmap.devices is None:
        rmap.devices = DeviceMemory(host, trace)
    return rmap.devices


class PageMap:
    """``pages`` pages of memory of a device (Linux's dev_pagemap), which belong to ``owner``.

    ``coherent``: the CPU reaches them, too. ``migrate_to_ram`` is what a CPU's fault on a private one calls.
    """

    def __init__(
        self, mm: Mm, pages: int, *, owner: object, migrate_to_ram: MigrateToRam, coherent: bool = False
    ) -> None:
        self.memory = device_memory(mm.host, mm.trace, mm.rmap)
        self.owner = owner
        self.coherent = coherent
        self.migrate_to_ram = migrate_to_ram
        self.size = pages
        self.free: list[DevicePage] = []
        self._frames: set[int] = set()
        if not coherent:
            first = self.memory.next
            self.memory.next += pages
            self.free = [DevicePage(self, pfn) for pfn in range(first + pages - 1, first - 1, -1)]
            self.memory.pages.update((page.pfn, page) for page in self.free)

    def alloc(self) -> int:
        """A page with one reference, zeroed; its frame number. Raises OutOfFrames."""
        memory = self.memory
        if self.coherent:
            if len(self._frames) >= self.size and len(self.used()) >= self.size:
                raise OutOfFrames(f"no page to spare of the {self.size} of a device")
            pfn: int = memory.host.alloc(True)
            memory.host.set_flags(pfn, PG_COHERENT)
            memory.coherent[pfn] = self
            self._frames.add(pfn)
        else:
            if not self.free:
                raise OutOfFrames(f"no page to spare of the {self.size} of a device")
            page = self.free.pop()
            page.refcount, pfn = 1, page.pfn
            page.data = bytearray(PAGE_SIZE)
        if memory.trace.on:
            memory.trace.emit("page_alloc", pfn=pfn)
        return pfn

    def used(self) -> list[int]:
        """The pages that somebody has, ascending."""
        memory = self.memory
        if not self.coherent:
            return sorted(pfn for pfn, page in memory.pages.items() if page.pagemap is self and page.refcount)
        for pfn in [pfn for pfn in self._frames if memory.pagemap_of(pfn) is not self]:
            self._frames.discard(pfn)
        return sorted(self._frames)

    def close(self) -> None:
        """Its memory goes away. Raises MmError EBUSY while somebody has a page of it."""
        if self.used():
            raise MmError(errno.EBUSY, f"{len(self.used())} pages of a device are in use")
        for page in self.free:
            del self.memory.pages[page.pfn]
        self.free.clear()


# ---- entries


def device_private_entry(pfn: int, kept: int) -> int:
    """The entry of device-private page ``pfn``, with those flags of ``kept`` that such an entry can have."""
    return SWAP | pfn << PFN_SHIFT | kept & _KEPT


def is_device_entry(entry: int) -> bool:
    """It is one of the two kinds."""
    return bool(entry & SWAP and entry & DEVICE)


def is_device_exclusive(entry: int) -> bool:
    """A device is alone with the page."""
    return is_device_entry(entry) and bool(entry & DEVICE_EXCLUSIVE)


def exclusive_pfn(entry: int) -> int:
    """The frame behind a device-exclusive entry."""
    return pte_pfn(entry) & _NUMBER


def device_private_page(mm: Mm, entry: int) -> DevicePage | None:
    """The page of a device-private entry, None for any other."""
    if not entry & SWAP or not entry & DEVICE or entry & DEVICE_EXCLUSIVE:
        return None
    assert mm.rmap.devices is not None
    return mm.rmap.devices.pages[pte_pfn(entry)]


def set_device_entry(mm: Mm, hva: int, entry: int) -> None:
    """Writes an entry of one of the two kinds into an empty place."""
    mm.pgd.set(hva >> PAGE_SHIFT, entry)
    emit_device_entry(mm, hva, entry)


def emit_device_entry(mm: Mm, hva: int, entry: int) -> None:
    """Tells the trace of such an entry."""
    if mm.trace.on:
        pfn = exclusive_pfn(entry) if entry & DEVICE_EXCLUSIVE else pte_pfn(entry)
        mm.trace.emit("pte_set", mm=mm.name, hva=hva & PAGE_MASK, pfn=pfn, flags=entry & (WRITE | EXCLUSIVE | UFFD_WP))


def _entries(mm: Mm, start: int, end: int) -> list[tuple[int, int]]:
    """(address, entry) of all device entries of bytes ``[start, end)``."""
    found = mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    return [(page << PAGE_SHIFT, entry) for page, entry in found if entry & SWAP and entry & DEVICE]


# ---- what zap, fork and mprotect do with them


def is_device_slot(slot: int) -> bool:
    """What was found in place of a swap slot is one of these entries'."""
    return bool(slot & DEVICE_PRIVATE_PFN)


def zap_entries(mm: Mm, slots: Iterable[int]) -> list[tuple[int, int]]:
    """Entries with these in place of a swap slot were cleared, not yet put; the runs of their pages."""
    devices = mm.rmap.devices
    assert devices is not None
    runs = []
    for slot in slots:
        if slot & DEVICE_EXCLUSIVE >> PFN_SHIFT:
            runs.append((slot & _NUMBER, 1))
        else:
            devices.pages[slot].mapcount -= 1
            runs.append((slot, 1))
    return runs


def put_entries(mm: Mm, slots: Iterable[int]) -> None:
    """Drops the references that these had."""
    devices = mm.rmap.devices
    assert devices is not None
    for slot in slots:
        if slot & DEVICE_EXCLUSIVE >> PFN_SHIFT:
            mm.put_frame(slot & _NUMBER)
        else:
            devices.put(slot)


def before_fork(mm: Mm, area: Vma) -> None:
    """A page that a device is alone with is mapped again, for a child can only share what is mapped.

    Inside the range that fork has announced: the devices have given the page up.
    """
    if mm.rmap.devices is None:
        return
    for hva, entry in _entries(mm, area.start, area.end):
        if entry & DEVICE_EXCLUSIVE:
            _restore(mm, area, hva, entry)


def after_fork(mm: Mm, area: Vma, slots: Iterable[int]) -> None:
    """The child has copies of these device-private entries, and neither may be written through any more."""
    devices = mm.rmap.devices
    assert devices is not None
    for slot in slots:
        devices.pages[slot].refcount += 1
        devices.pages[slot].mapcount += 1
    if mm.trace.on:
        for hva, entry in _entries(mm, area.start, area.end):
            emit_device_entry(mm, hva, entry)


def protect_entries(mm: Mm, start: int, end: int) -> None:
    """The protection of bytes ``[start, end)`` changes: a fault, or a device's, will raise what it may."""
    if mm.rmap.devices is None:
        return
    for hva, entry in _entries(mm, start, end):
        if entry & WRITE:
            mm.pgd.set(hva >> PAGE_SHIFT, entry & ~WRITE)
            emit_device_entry(mm, hva, entry & ~WRITE)


# ---- faults


def do_device_entry(mm: Mm, area: Vma, hva: int, entry: int) -> tuple[VmFault, str]:
    """A CPU comes upon ``entry``. What is there afterwards it has to see for itself."""
    hva &= PAGE_MASK
    if entry & DEVICE_EXCLUSIVE:
        with mm.mmap_lock.read:
            return VmFault.OK, "device exclusive" if remove_device_exclusive_entry(mm, area, hva, entry) else "retry"
    page = device_private_page(mm, entry)
    assert page is not None
    devices = mm.rmap.devices
    assert devices is not None
    with mm.mmap_lock.read:
        if mm.pgd.get(hva >> PAGE_SHIFT) != entry or mm.find_vma(hva) is not area:
            return VmFault.OK, "retry"
        lock = mm.rmap.page_lock.attempt(page.pfn)
        if lock is not None:
            page.refcount += 1
            try:
                return page.pagemap.migrate_to_ram(DeviceFault(mm, area, hva, entry, page)), "device private"
            finally:
                lock.drop()
                devices.put(page.pfn)
    # Somebody brings it back already. Whoever had a reference while waiting would keep him from it.
    sleep_until(
        f"device page {page.pfn:#x}",
        lambda: mm.rmap.page_lock.free(page.pfn),
        because="who has locked it would have to go on first",
        label="mm.device_private_wait",
    )
    return VmFault.OK, "retry"


def remove_device_exclusive_entry(mm: Mm, area: Vma, hva: int, entry: int) -> bool:
    """The CPU gets the page back that a device was alone with; False when somebody else was faster."""
    pfn = exclusive_pfn(entry)
    mm.host.get(pfn)
    try:
        with mm.rmap.page_lock(pfn):
            if mm.pgd.get(hva >> PAGE_SHIFT) != entry:
                return False
            with mm.notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.EXCLUSIVE), mm.ptl(hva >> PMD_SHIFT):
                if mm.pgd.get(hva >> PAGE_SHIFT) != entry or mm.find_vma(hva) is not area:
                    return False
                _restore(mm, area, hva, entry)
        point("mm.exclusive.restored")
        return True
    finally:
        mm.put_frame(pfn)


def _restore(mm: Mm, area: Vma, hva: int, entry: int) -> None:
    """An ordinary entry in place of a device-exclusive one, whose reference it takes over."""
    pfn = exclusive_pfn(entry)
    mm.pgd.set(hva >> PAGE_SHIFT, 0)
    if mm.trace.on:
        mm.trace.emit("pte_clear", mm=mm.name, start=hva, end=hva + PAGE_SIZE, pages=[(pfn, 1)])
    flags = area.rights | ANON | entry & (EXCLUSIVE | SOFT_DIRTY | UFFD_WP)
    if entry & WRITE and area.prot & PROT_WRITE:
        flags |= area.new_anon
    mm.host.add_mapcount(pfn, 1)
    mm.set_pte(hva, pfn << PFN_SHIFT | flags)


def places(mm_rmap: ReverseMap, page: DevicePage) -> Iterator[tuple[Vma, int]]:
    """(area, hva) wherever ``page`` may be mapped, whether it is or not."""
    for area in mm_rmap.areas(page.mapping):
        hva = area.address_of(page.index)
        if hva is not None:
            yield area, hva
