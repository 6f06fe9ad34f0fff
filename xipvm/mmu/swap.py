"""Swap: anonymous pages go to slots of a file, and come back when somebody asks for them.

Reclaim of a page::

    young, in the page table or to a secondary MMU (clear_flush_young)? then it stays, this time
    → slot, swap cache → every entry becomes a swap entry (unmap.py: S, clear, flush, E for each)
    → anybody else with a reference? then it stays in the cache → written if dirty → out of the cache, freed

The secondary MMU has to be asked *before* the page is unmapped: the announcement makes it drop what it knows. What it
wrote counts: an entry that it maps writable makes the frame dirty (PG_DIRTY), so a page that came back from swap and
was changed only by a guest is written again.

A slot is in use as long as an entry names it or the cache has a page for it; the cache has one reference to its page. A
page that a read brought back keeps its slot, so that it need not be written again; a write gives the slot up when
nobody else has it. Swapping in and swapoff tell nobody: there is nothing to lose. swapoff maps pages read-only.

A page that was given away (MADV_FREE) and not written since is dropped without a slot. Pages of memory files have no
swap cache: their slot is read once, and given up. What Linux does and this does not: shared pages of KSM stay in
memory, and so do pages of files on disk.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.frames import PG_ANON, PG_DIRTY, PG_KSM, PG_SWAPBACKED, PG_SWAPCACHE, HostMemory
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    EXCLUSIVE,
    MAPPED,
    PFN_SHIFT,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.unmap import unmap_all
from xipvm.mmu.vma import PROT_WRITE, VM_LOCKED

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.page_cache import ShmemFile
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

_TYPE_SHIFT: Final = 32
_MAX_TYPES: Final = 128


class SwapArea:
    """A file with ``pages`` slots. The descriptor ``fd`` is closed with the object, if not before."""

    def __init__(self, fd: int, pages: int) -> None:
        self.fd = fd
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
            self.areas[slot >> _TYPE_SHIFT].used.discard(slot & (1 << _TYPE_SHIFT) - 1)

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

    def forget(self, pfns: Iterable[int]) -> None:
        """Those of ``pfns`` that are cached and nobody has any more are freed."""
        for pfn in pfns:
            slot = self.slots.get(pfn)
            if slot is not None and not self.counts[slot] and self._host.refcount(pfn) == 1:
                self.delete(pfn)

    def give_up_slot(self, pfn: int) -> bool:
        """Takes ``pfn`` out of the cache if no entry names its slot; whether that was so. The slot's data is lost."""
        slot = self.slots.get(pfn)
        if slot is None or self.counts[slot]:
            return False
        self._host.set_flags(pfn, PG_DIRTY)
        self.delete(pfn)
        return True

    # ---- the files

    def write(self, pfn: int, slot: int) -> None:
        """Writes the page to its slot. Raises OSError."""
        fd = self.areas[slot >> _TYPE_SHIFT].fd
        os.pwrite(fd, self._host.read(pfn, 0, PAGE_SIZE), (slot & (1 << _TYPE_SHIFT) - 1) << PAGE_SHIFT)
        if self._trace.on:
            self._trace.emit("swap_out", pfn=pfn, slot=slot)

    def read(self, pfn: int, slot: int) -> None:
        """Fills the new frame ``pfn`` from its slot. Raises OSError."""
        fd = self.areas[slot >> _TYPE_SHIFT].fd
        self._host.write(pfn, 0, os.pread(fd, PAGE_SIZE, (slot & (1 << _TYPE_SHIFT) - 1) << PAGE_SHIFT))
        if self._trace.on:
            self._trace.emit("swap_in", pfn=pfn, slot=slot)


def swapon(mm: Mm, pages: int, path: str | None) -> None:
    """See :meth:`Mm.swapon`."""
    if pages <= 0:
        raise MmError(errno.EINVAL, f"swapon: {pages} pages")
    rmap = reverse_map(mm.host)
    swap = rmap.swap
    if swap is None:
        swap = rmap.swap = Swap(mm.host, mm.trace)
    type_ = next(number for number in range(_MAX_TYPES + 1) if number not in swap.areas)
    if type_ == _MAX_TYPES:
        raise MmError(errno.EPERM, f"swapon: there are {_MAX_TYPES} swap areas already")
    try:
        swap.areas[type_] = SwapArea(_open(path), pages)
        os.ftruncate(swap.areas[type_].fd, pages << PAGE_SHIFT)
    except OSError as error:
        swap.areas.pop(type_, None)
        raise MmError(error.errno or errno.EIO, f"swapon: {path or 'temporary file'}") from None


def _as_shmem(file: AddressSpace | None) -> ShmemFile | None:
    from xipvm.mmu.page_cache import ShmemFile  # which is above the fault handler, and this below

    return file if isinstance(file, ShmemFile) else None


def _open(path: str | None) -> int:
    """An empty file; without a name if there is no ``path``."""
    if path is not None:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    fd, name = tempfile.mkstemp(prefix="xipvm-swap-")
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
        while any(_unuse(each, type_) for each in tuple(rmap.mms)):  # what a fork copied meanwhile as well
            pass
        for file in [file for file in map(_as_shmem, rmap.files()) if file is not None]:
            for pgoff in [pgoff for pgoff, slot in file.swapped.items() if slot >> _TYPE_SHIFT == type_]:
                file.bring_back(pgoff)
    except OutOfFrames:
        area.closing = False
        raise MmError(errno.ENOMEM, "swapoff: no frames for what is in swap") from None
    if any(count and slot >> _TYPE_SHIFT == type_ for slot, count in swap.counts.items()):
        area.closing = False
        raise MmError(errno.EBUSY, "swapoff: pages of an area that is being unmapped are in swap")
    for slot, pfn in list(swap.cache.items()):
        if slot >> _TYPE_SHIFT == type_:
            mm.host.set_flags(pfn, PG_DIRTY)
            swap.delete(pfn)
    del swap.areas[type_]
    area.close()


def _unuse(mm: Mm, type_: int) -> bool:
    """Brings back what ``mm`` has in an area; whether there was anything."""
    found = False
    for page, entry in mm.pgd.entries(0, 1 << 36):
        area = mm.find_vma(page << PAGE_SHIFT)
        if entry & SWAP and pte_pfn(entry) >> _TYPE_SHIFT == type_ and area is not None:
            found = True
            do_swap_page(mm, area, page << PAGE_SHIFT, entry, write=False, unuse=True)
    return found


# ---- in


def do_swap_page(mm: Mm, area: Vma, hva: int, entry: int, *, write: bool, unuse: bool = False) -> bool:
    """Maps the page of the swap entry ``entry``; False when somebody else changed the entry. Nobody is told.

    A write gets an entry that allows it only if the page is not shared; otherwise the next fault copies. Raises
    OutOfFrames.
    """
    host, page, slot = mm.host, hva >> PAGE_SHIFT, pte_pfn(entry)
    swap = mm.rmap.swap
    assert swap is not None
    pfn = swap.cache.get(slot)
    if pfn is None:
        pfn = mm.alloc_frame(False)
        swap.read(pfn, slot)
        point("mm.swap.read")
        if mm.pgd.get(page) != entry or mm.find_vma(hva) is not area or slot in swap.cache:
            mm.put_frame(pfn)
            return False
        host.set_flags(pfn, PG_ANON | PG_SWAPBACKED)
        swap.add(pfn, slot)
    elif mm.pgd.get(page) != entry:
        return False
    alone = not host.mapcount(pfn) and swap.counts[slot] == 1 and host.refcount(pfn) == 1
    exclusive = bool(entry & EXCLUSIVE) or (write and alone)
    assert area.anon_vma is not None
    if not host.mapping(pfn) or exclusive:
        root = area.anon_vma if exclusive else area.anon_chain[0]  # the oldest one leads to all who share the page
        host.set_rmap(pfn, root.id, area.page_offset(hva))
    host.get(pfn)
    host.add_mapcount(pfn, 1)
    new = pfn << PFN_SHIFT | area.rights | ANON | entry & SOFT_DIRTY
    if exclusive:
        new |= EXCLUSIVE
    if not unuse:
        new |= ACCESSED
        if exclusive and write:
            new |= area.new_anon
        elif exclusive and area.prot & PROT_WRITE and new & area.upgrade == area.upgrade:
            new |= WRITE
    mm.set_pte(hva, new)
    swap.free((slot,))
    if exclusive and write:
        swap.give_up_slot(pfn)
    return True


# ---- out


def _swap_entry(swap: Swap, slot: int, entry: int) -> int:
    swap.duplicate(slot)
    return SWAP | slot << PFN_SHIFT | entry & (EXCLUSIVE | SOFT_DIRTY)


def referenced(host: HostMemory, pfn: int) -> bool:
    """Whether anybody used the page since the last time; all forget it. A page of a locked area always is in use."""
    young = False
    for area, hva in list(reverse_map(host).walk(host, pfn)):
        mm, page = area.mm, hva >> PAGE_SHIFT
        entry = mm.pgd.get(page)
        if area.flags & VM_LOCKED:
            return True
        if not entry & MAPPED or pte_pfn(entry) != pfn:
            continue
        if entry & ACCESSED:
            young = True
            mm.pgd.set(page, entry & ~ACCESSED)
            mm.flush_tlb_range(hva, hva + PAGE_SIZE)
        young |= mm.notifiers.clear_flush_young(hva, hva + PAGE_SIZE)
    return young


def reclaim_page(mm: Mm, pfn: int, *, ignore_references: bool = False) -> bool:
    """Takes a mapped page out of memory; whether it could be. ``mm`` is whose trace tells of it."""
    host = mm.host
    shmem = _as_shmem(mm.rmap.file(host.mapping(pfn)))
    if not host.mapcount(pfn) or host.flags(pfn) & PG_KSM:
        return False
    if not host.flags(pfn) & PG_ANON and shmem is None:
        return False
    host.get(pfn)
    try:
        if not ignore_references and referenced(host, pfn):
            return False
        if host.flags(pfn) & (PG_SWAPBACKED | PG_SWAPCACHE) and pinned(host, pfn, shmem):
            return False
        if shmem is not None:
            return _swap_out_shmem(mm.rmap.swap, host, pfn, shmem)
        if host.flags(pfn) & (PG_SWAPBACKED | PG_SWAPCACHE):
            return _swap_out(mm.rmap.swap, host, pfn)
        return _drop_lazyfree(host, pfn)
    finally:
        mm.put_frame(pfn)


def pinned(host: HostMemory, pfn: int, file: ShmemFile | None) -> bool:
    """Whether somebody besides the caller, entries and caches has a reference. Unmapping such a page frees nothing."""
    caches = bool(host.flags(pfn) & PG_SWAPCACHE) + (file is not None and file.pages.get(host.index(pfn)) == pfn)
    return host.refcount(pfn) > host.mapcount(pfn) + caches + 1


def _swap_out(swap: Swap | None, host: HostMemory, pfn: int) -> bool:
    """Unmaps, writes and uncaches ``pfn``, to which the caller has a reference."""
    if swap is None:
        return False
    slot = swap.slots.get(pfn)
    if slot is None:
        slot = swap.alloc()
        if slot is None:
            return False
        host.get(pfn)
        swap.add(pfn, slot)
        host.set_flags(pfn, PG_DIRTY)
    place: int = slot
    gone = unmap_all(host, pfn, lambda area, entry: _swap_entry(swap, place, entry), skip=VM_LOCKED)
    point("mm.swap.unmapped")
    if not gone or host.mapcount(pfn) or swap.slots.get(pfn) != slot or host.refcount(pfn) != 2:
        return False
    if host.flags(pfn) & PG_DIRTY and swap.counts[slot]:
        host.clear_flags(pfn, PG_DIRTY)
        swap.write(pfn, slot)
    swap.delete(pfn)
    return True


def _swap_out_shmem(swap: Swap | None, host: HostMemory, pfn: int, file: ShmemFile) -> bool:
    """Unmaps the page of a memory file, to which the caller has a reference, and moves it to a slot."""
    slot = swap.alloc() if swap is not None else None
    if swap is None or slot is None:
        return False
    gone = unmap_all(host, pfn, lambda area, entry: 0, skip=VM_LOCKED)
    point("mm.swap.unmapped")
    pgoff = host.index(pfn)
    swap.duplicate(slot)  # the file's
    if not gone or host.refcount(pfn) != 2 or file.pages.get(pgoff) != pfn:
        swap.free((slot,))
        return False
    swap.write(pfn, slot)
    del file.pages[pgoff]
    file.swapped[pgoff] = slot
    host.set_rmap(pfn, 0, 0)
    host.put(pfn)
    return True


def _drop_lazyfree(host: HostMemory, pfn: int) -> bool:
    """Drops a page that was given away, unless somebody has written to it since or holds it."""

    def replacement(area: Vma, entry: int) -> int | None:
        if host.flags(pfn) & PG_DIRTY or host.refcount(pfn) != host.mapcount(pfn) + 1:
            host.set_flags(pfn, PG_SWAPBACKED)
            return None
        return 0

    return unmap_all(host, pfn, replacement, skip=VM_LOCKED)


def pageout(mm: Mm, start: int, end: int) -> int:
    """MADV_PAGEOUT: takes the pages of ``[start, end)`` that nobody else maps out of memory; how many went."""
    return sum(
        reclaim_page(mm, pfn, ignore_references=True)
        for pfn in _pages(mm, start >> PAGE_SHIFT, end >> PAGE_SHIFT, files=True)
        if mm.host.mapcount(pfn) == 1
    )


def _pages(mm: Mm, first: int, end: int, *, files: bool = False) -> list[int]:
    kinds = 0 if files else ANON
    entries = mm.pgd.entries(first, end)
    return [pte_pfn(entry) for _, entry in entries if entry & MAPPED and not entry & SPECIAL and entry & kinds == kinds]


def memcg_reclaim(mm: Mm, passes: int) -> int:
    """See :meth:`Mm.memcg_reclaim`."""
    gone = 0
    for _ in range(passes):
        pages = dict.fromkeys(pfn for each in mm.rmap.mms if each.memcg == mm.memcg for pfn in _pages(each, 0, 1 << 36))
        if not pages:
            break
        gone += sum(reclaim_page(mm, pfn) for pfn in pages)
    return gone
