"""Swap: slots of files, and the cache of pages that are on their way out or have come back.

A slot is in use as long as an entry names it or the cache has a page for it; the cache has one reference to its page. A
page that a read brought back keeps its slot, so that it need not be written again; a write gives the slot up when
nobody else has it, and so does everybody while more than half of the slots are in use. Pages of memory files have no
swap cache: their slot is read once, and given up.

A page leaves the cache only when its content is in the slot: what could not be written stays, dirty, and a fault finds
it there. What cannot be read is a SIGBUS for who needs it, and may be there another time.

The way out is pageout.py, the way back swapin.py.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.frames import PG_DIRTY, PG_SWAPCACHE, HostMemory
from xipvm.mmu.pte import SWAP, pte_pfn
from xipvm.mmu.reclaim import make_room, retry
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.swapin import do_swap_page

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace

_TYPE_SHIFT: Final = 32
_OFFSET: Final = (1 << _TYPE_SHIFT) - 1
_MAX_TYPES: Final = 128


class SwapArea:
    """A file with ``pages`` slots from byte ``start`` on. ``fd`` is closed with the object, if not before."""

    def __init__(self, fd: int, pages: int, start: int = 0) -> None:
        self.fd = fd
        self.start = start
        self.close = weakref.finalize(self, os.close, fd)
        self.pages = pages
        self.closing = False
        self.used: set[int] = set()
        self.next = 0
        """Where the search for a free slot begins."""

    def alloc(self) -> int | None:
        """A free slot, None when there is none."""
        if self.closing or len(self.used) == self.pages:
            return None
        while self.next in self.used:
            self.next = (self.next + 1) % self.pages
        self.used.add(self.next)
        return self.next


class Swap:
    """The swap areas of one host memory and its swap cache. A slot is (number of the area << 32) + offset."""

    def __init__(self, host: HostMemory, trace: Trace) -> None:
        self._host = host
        self._trace = trace
        self.areas: dict[int, SwapArea] = {}
        self.counts: dict[int, int] = {}
        """Entries that name a slot, for every slot in use."""
        self.cache: dict[int, int] = {}
        """Frames by slot; each has a reference from here."""
        self.slots: dict[int, int] = {}
        """The other way round."""
        self.shadows: dict[int, int] = {}
        """When what is in a slot was reclaimed (workingset.py)."""
        self.ins = self.outs = self.errors = 0
        """Pages read, pages written, and how often one of both failed."""

    # ---- what there is

    @property
    def total(self) -> int:
        """Slots of all areas."""
        return sum(area.pages for area in self.areas.values())

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self.counts)

    @property
    def has_room(self) -> bool:
        """A slot is free."""
        return any(not area.closing and len(area.used) < area.pages for area in self.areas.values())

    @property
    def nearly_full(self) -> bool:
        """More than half of the slots are in use: a page that is in memory should not keep one (vm_swap_full)."""
        return 2 * self.used > self.total

    def is_closing(self, slot: int) -> bool:
        """The slot's area is being emptied: nothing may go there any more."""
        return self.areas[slot >> _TYPE_SHIFT].closing

    def free_type(self) -> int:
        """The number that the next area gets. Raises MmError EPERM when there are too many."""
        type_ = next(number for number in range(_MAX_TYPES + 1) if number not in self.areas)
        if type_ == _MAX_TYPES:
            raise MmError(errno.EPERM, f"swapon: there are {_MAX_TYPES} swap areas already")
        return type_

    def add_area(self, area: SwapArea) -> None:
        """Raises MmError EPERM when there are too many."""
        self.areas[self.free_type()] = area

    # ---- slots

    def alloc(self) -> int | None:
        """A slot that nobody names yet, None when there is none."""
        for type_, area in self.areas.items():
            offset = area.alloc()
            if offset is not None:
                slot = type_ << _TYPE_SHIFT | offset
                self.counts[slot] = 0
                return slot
        return None

    def duplicate(self, slot: int) -> None:
        """One entry more names ``slot``."""
        self.counts[slot] += 1

    def free(self, slots: Iterable[int]) -> None:
        """Of each slot one entry is gone. What is cached for nobody any more is freed."""
        for slot in slots:
            self.counts[slot] -= 1
            if slot not in self.cache:
                self._free_unused(slot)
            else:
                self.forget((self.cache[slot],))

    def _free_unused(self, slot: int) -> None:
        if not self.counts[slot]:
            del self.counts[slot]
            self.shadows.pop(slot, None)
            self.areas[slot >> _TYPE_SHIFT].used.discard(slot & _OFFSET)

    # ---- the cache

    def add(self, pfn: int, slot: int) -> None:
        """Caches ``pfn`` for ``slot``; takes over a reference."""
        self.cache[slot] = pfn
        self.slots[pfn] = slot
        self._host.set_flags(pfn, PG_SWAPCACHE)

    def delete(self, pfn: int) -> None:
        """Takes a page out of the cache and drops its reference."""
        slot = self.slots.pop(pfn)
        del self.cache[slot]
        self._host.clear_flags(pfn, PG_SWAPCACHE)
        self._free_unused(slot)
        if self._host.put(pfn) and self._trace.on:
            self._trace.emit("page_free", pages=[(pfn, 1)])

    def replace(self, old: int, new: int) -> None:
        """``new`` has what ``old`` had, and takes its place in the cache."""
        self._host.get(new)
        self.add(new, self.slots.pop(old))
        self._host.clear_flags(old, PG_SWAPCACHE)
        self._host.put(old)

    def forget(self, pfns: Iterable[int]) -> None:
        """Those of ``pfns`` that are cached and nobody has any more are freed."""
        for pfn in pfns:
            slot = self.slots.get(pfn)
            if slot is not None and not self.counts[slot] and self._host.refcount(pfn) == 1:
                self.delete(pfn)

    def give_up_slot(self, pfn: int) -> bool:
        """Takes ``pfn`` out of the cache if no entry names its slot; whether that was so. The slot's data is lost.

        Who has locked the page may be about to name it.
        """
        slot = self.slots.get(pfn)
        if slot is None or self.counts[slot] or not reverse_map(self._host).page_lock.free(pfn):
            return False
        self._host.set_flags(pfn, PG_DIRTY)
        self.delete(pfn)
        return True

    # ---- the files

    def _place(self, slot: int) -> tuple[int, int]:
        area = self.areas[slot >> _TYPE_SHIFT]
        return area.fd, area.start + ((slot & _OFFSET) << PAGE_SHIFT)

    def write(self, pfn: int, slot: int) -> None:
        """Writes the page to its slot. Raises OSError; what the slot holds then is undefined."""
        fd, offset = self._place(slot)
        try:
            if os.pwrite(fd, self._host.read(pfn, 0, PAGE_SIZE), offset) != PAGE_SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._failed(slot, error)
            raise
        self.outs += 1
        if self._trace.on:
            self._trace.emit("swap_out", pfn=pfn, slot=slot)

    def read(self, pfn: int, slot: int) -> None:
        """Fills the new frame ``pfn`` from its slot. Raises OSError; the slot is as it was."""
        fd, offset = self._place(slot)
        try:
            data = os.pread(fd, PAGE_SIZE, offset)
            if len(data) != PAGE_SIZE:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            self._failed(slot, error)
            raise
        self._host.write(pfn, 0, data)
        self.ins += 1
        if self._trace.on:
            self._trace.emit("swap_in", pfn=pfn, slot=slot)

    def _failed(self, slot: int, error: OSError) -> None:
        self.errors += 1
        if self._trace.on:
            self._trace.emit("swap_error", slot=slot, errno=error.errno or errno.EIO)


def swap_of(mm: Mm) -> Swap:
    """The swap of the mm's host, made if there was none."""
    rmap = reverse_map(mm.host)
    if rmap.swap is None:
        rmap.swap = Swap(mm.host, mm.trace)
    return rmap.swap


def close_swap(host: HostMemory) -> None:
    """Closes the files of all swap areas: nobody will use the memory ``host`` any more."""
    swap = reverse_map(host).swap
    for area in () if swap is None else swap.areas.values():
        area.close()


def swapon(mm: Mm, pages: int, path: str | None) -> None:
    """See :meth:`Mm.swapon`."""
    if pages <= 0:
        raise MmError(errno.EINVAL, f"swapon: {pages} pages")
    swap = swap_of(mm)
    swap.free_type()  # before the file is emptied
    fd, made = -1, path is not None and not os.path.lexists(path)
    try:
        fd = temporary_file() if path is None else os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, pages << PAGE_SHIFT)  # if this cannot be, the file is as it was
        os.ftruncate(fd, 0)
        os.ftruncate(fd, pages << PAGE_SHIFT)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
            if made and path is not None:
                os.unlink(path)
        raise MmError(error.errno or errno.EIO, f"swapon: {path or 'temporary file'}") from None
    swap.add_area(SwapArea(fd, pages))


def temporary_file() -> int:
    """A descriptor of an empty file that has no name, so that nothing is left of it however we end. Raises OSError."""
    import tempfile

    folder = tempfile.gettempdir()
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError:  # not every file system can
        fd, name = tempfile.mkstemp(prefix="xipvm-swap-", dir=folder)
        os.unlink(name)
        return fd


def swapoff(mm: Mm) -> None:
    """See :meth:`Mm.swapoff`."""
    rmap = reverse_map(mm.host)
    swap = rmap.swap
    if swap is None or not swap.areas:
        raise MmError(errno.EINVAL, "swapoff: there is no swap")
    type_ = max(swap.areas)
    area = swap.areas[type_]
    area.closing = True
    try:
        while any(slot >> _TYPE_SHIFT == type_ for slot in swap.counts):  # what went out while we waited as well
            _try_to_unuse(mm, swap, type_)
            for slot, pfn in list(swap.cache.items()):
                if slot >> _TYPE_SHIFT == type_:
                    if not rmap.page_lock.wait(pfn):
                        raise MmError(errno.EBUSY, f"swapoff: frame {pfn:#x} is on its way to swap")
                    with rmap.page_lock(pfn):  # somebody may be about to name the slot in an entry
                        if swap.cache.get(slot) == pfn:
                            mm.host.set_flags(pfn, PG_DIRTY)
                            swap.delete(pfn)
    except OutOfFrames:
        raise MmError(errno.ENOMEM, "swapoff: no frames for what is in swap") from None
    except OSError as error:
        raise MmError(error.errno or errno.EIO, "swapoff: what is in swap cannot be read") from None
    finally:
        area.closing = False
    del swap.areas[type_]
    area.close()


def _try_to_unuse(mm: Mm, swap: Swap, type_: int) -> None:
    """Brings back whatever is in an area. Raises OutOfFrames, OSError, and MmError EBUSY; nothing is lost then."""
    rmap = reverse_map(mm.host)
    while any(_unuse(each, type_) for each in tuple(rmap.mms)):  # what a fork copied meanwhile as well
        pass
    for file in rmap.files():
        for pgoff in [pgoff for pgoff, slot in file.swapped.items() if slot >> _TYPE_SHIFT == type_]:
            retry(mm.host, lambda file=file, pgoff=pgoff: file.bring_back(pgoff), oom=False)  # type: ignore[misc]
    if any(count and slot >> _TYPE_SHIFT == type_ for slot, count in swap.counts.items()):
        raise MmError(errno.EBUSY, "swapoff: pages of an area that is being unmapped are in swap")


def _unuse(mm: Mm, type_: int) -> bool:
    """Brings back what ``mm`` has in an area; whether there was anything."""
    found = False
    for page, _ in mm.pgd.entries(0, 1 << 36):
        hva = page << PAGE_SHIFT
        while True:
            entry, area = mm.pgd.get(page), mm.find_vma(hva)  # making room may change both
            if not entry & SWAP or pte_pfn(entry) >> _TYPE_SHIFT != type_ or area is None:
                break
            found = True
            try:
                do_swap_page(mm, area, hva, entry, write=False, unuse=True)
            except OutOfFrames:
                if not make_room(mm.host, mm, oom=False):
                    raise
    return found
