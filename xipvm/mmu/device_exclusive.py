"""make_device_exclusive: a device wants pages for itself for a while, as for atomic accesses that the CPU cannot see.

::

    page faulted in to write to, referenced, locked → range start (EXCLUSIVE, the owner's) → entry cleared, flushed →
    device-exclusive entry → range end → *the device maps the page* → unlocked, put

The entry has the reference that the mapping had. A CPU that comes there takes the page lock first, hence waits for the
device's driver, and gets its entry back (device_private.py) behind a range without an owner, in which the device has
given the page up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.device_private import device_memory, set_device_entry
from xipvm.mmu.frames import PG_DIRTY
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.huge_pmd import split_huge_pmd
from xipvm.mmu.pte import (
    ANON,
    DEVICE,
    DEVICE_EXCLUSIVE,
    EXCLUSIVE,
    HUGE,
    PFN_SHIFT,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.locks.lock import Keyed
    from xipvm.mmu.mm import Mm

_KEPT: Final = WRITE | EXCLUSIVE | SOFT_DIRTY | UFFD_WP


class DeviceExclusive(AbstractContextManager["DeviceExclusive"]):
    """A context in which pages of bytes ``[start, end)`` are ``owner``'s alone, and locked: the driver maps them.

    ``pages`` has the frame of each page, None for one that could not be had: shared, or locked by somebody. Entering
    it raises MmError EFAULT for an address where nothing can be written, EDEADLK. Behind it the pages stay the
    device's until a CPU wants one.
    """

    def __init__(self, mm: Mm, start: int, end: int, *, owner: object) -> None:
        mm.notifiers.needs_modern("make_device_exclusive")
        self.pages: list[int | None] = []
        self._mm = mm
        self._start, self._end, self._owner = start, end, owner
        self._locks: list[Keyed] = []
        self._held: list[int] = []

    def __enter__(self) -> DeviceExclusive:
        mm = self._mm
        device_memory(mm.host, mm.trace, mm.rmap)
        try:
            found = [self._get(hva) for hva in range(self._start, self._end, PAGE_SIZE)]
            with mm.mmap_lock.read:
                for at, pfn in enumerate(found):
                    self.pages.append(pfn if self._take(self._start + at * PAGE_SIZE, pfn) else None)
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def _drop(self) -> None:
        for lock in self._locks:
            lock.drop()
        for pfn in self._held:
            self._mm.put_frame(pfn)
        self._locks.clear()
        self._held.clear()

    def _get(self, hva: int) -> int:
        """The frame of ``hva``, faulted in to write to, with a reference, small."""
        mm = self._mm
        pfn: int = mm.get_user_pages(hva, write=True).pfn
        if mm.host.is_compound(pfn):
            if mm.pgd.pte(hva >> PAGE_SHIFT) & HUGE:
                with mm.mmap_lock.read:
                    split_huge_pmd(mm, hva)
            if mm.host.is_compound(pfn):
                split_if_compound(mm.host, pfn)
            pfn = mm.get_user_pages(hva, write=True).pfn
        mm.host.get(pfn)
        self._held.append(pfn)
        return pfn

    def _take(self, hva: int, pfn: int) -> bool:
        mm = self._mm
        lock = None if mm.host.is_compound(pfn) else mm.rmap.page_lock.attempt(pfn)
        if lock is None:
            return False
        self._locks.append(lock)
        return self._replace(hva, pfn)

    def _replace(self, hva: int, pfn: int) -> bool:
        """The entry of ``hva``, if it still maps ``pfn`` alone, to write to."""
        mm, page = self._mm, hva >> PAGE_SHIFT
        wanted = PRESENT | WRITE | ANON | EXCLUSIVE
        notifiers = mm.notifiers
        with (
            notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.EXCLUSIVE, owner=self._owner),
            mm.ptl(hva >> PMD_SHIFT),
        ):
            entry = mm.pgd.get(page)
            if entry & wanted != wanted or entry & HUGE or pte_pfn(entry) != pfn:
                return False
            mm.clear_flush(hva)
            mm.host.set_flags(pfn, PG_DIRTY)
            marker = SWAP | DEVICE | DEVICE_EXCLUSIVE | pfn << PFN_SHIFT | entry & _KEPT
            set_device_entry(mm, hva, marker)
            mm.host.add_mapcount(pfn, -1)
        point("mm.exclusive.taken")
        return True
