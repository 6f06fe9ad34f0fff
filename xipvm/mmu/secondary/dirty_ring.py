"""The dirty ring of a vCPU: which guest frames it has made writable, in order, until user space resets them.

KVM pushes at ``dirty_index``; user space harvests from there on what is marked dirty, and marks it for reset; a reset
takes what is marked from ``reset_index`` on, write-protects those pages and frees the places. An entry goes
invalid → dirty (KVM) → harvested (user space) → invalid (KVM), and each side only moves it on.

The ring is *soft full* with ``RESERVED`` places left: its vCPU does not enter the guest before there was a reset, and
what it still writes on its way out has room.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final

from xipvm.errors import InternalError, MmError

RESERVED: Final = 64
"""KVM_DIRTY_RING_RSVD_ENTRIES."""
MAX_ENTRIES: Final = 65536
"""KVM_DIRTY_RING_MAX_ENTRIES."""


class Place(Enum):
    """What one place of the ring holds."""

    INVALID = 0
    DIRTY = 1
    HARVESTED = 2


def check_ring_size(entries: int) -> int:
    """``entries`` when a ring can have so many. Raises MmError: EINVAL unless a power of 2 above RESERVED, E2BIG."""
    if entries <= RESERVED or entries & (entries - 1):
        raise MmError(
            errno.EINVAL, f"a dirty ring of {entries} entries: their number is a power of 2 and above {RESERVED}"
        )
    if entries > MAX_ENTRIES:
        raise MmError(errno.E2BIG, f"a dirty ring of {entries} entries: {MAX_ENTRIES} is the most")
    return entries


class DirtyRing:
    """A ring of ``size`` places, see :func:`check_ring_size`. Pages are (memslot, page in it)."""

    __slots__ = ("_marks", "_pages", "dirty_index", "harvest_index", "pushed", "reset_index", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.dirty_index = 0
        """Where the next page comes. Indices only grow; a place is an index modulo the size."""
        self.harvest_index = 0
        """User space's: what it looks at next."""
        self.reset_index = 0
        self.pushed = 0
        self._marks = [Place.INVALID] * size
        self._pages: list[tuple[int, int]] = [(-1, 0)] * size

    @property
    def used(self) -> int:
        """Places that are not free."""
        return self.dirty_index - self.reset_index

    @property
    def soft_full(self) -> bool:
        """The vCPU has to leave the guest."""
        return self.used >= self.size - RESERVED

    def push(self, slot: int, page: int) -> None:
        """KVM: a page of a memslot may be written from now on."""
        if self.used >= self.size:
            raise InternalError("a dirty ring is full: its vCPU did not leave the guest in time")
        at = self.dirty_index % self.size
        self._pages[at] = slot, page
        self._marks[at] = Place.DIRTY
        self.dirty_index += 1
        self.pushed += 1

    def harvest(self) -> list[tuple[int, int]]:
        """User space: what was pushed since the last harvest; it is to be reset."""
        found = []
        while self._marks[self.harvest_index % self.size] is Place.DIRTY and self.harvest_index < self.dirty_index:
            at = self.harvest_index % self.size
            found.append(self._pages[at])
            self._marks[at] = Place.HARVESTED
            self.harvest_index += 1
        return found

    def take_harvested(self) -> list[tuple[int, int]]:
        """KVM: frees the places of what user space has harvested; these pages have to be protected now."""
        found = []
        while self.reset_index < self.dirty_index and self._marks[self.reset_index % self.size] is Place.HARVESTED:
            at = self.reset_index % self.size
            found.append(self._pages[at])
            self._marks[at] = Place.INVALID
            self.reset_index += 1
        return found
