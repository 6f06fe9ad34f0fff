"""What is announced: the kind of change and the range of one mm that it is about."""

from __future__ import annotations

from enum import IntEnum


class RangeEvent(IntEnum):
    """Why a range is invalidated; numbers and names of Linux's ``enum mmu_notifier_event``."""

    UNMAP = 0
    """munmap, mremap's source, the OOM reaper: mappings go away."""
    CLEAR = 1
    """Entries are cleared or change their page: DONTNEED, truncate, COW, KSM, reclaim, migration, split, collapse."""
    PROTECTION_VMA = 2
    """The protection of (a part of) a VMA changes: mprotect, userfaultfd write-protect."""
    PROTECTION_PAGE = 3
    """Single entries lose the write permission: fork, write-back."""
    SOFT_DIRTY = 4
    """Everything is write-protected to find what gets written."""
    RELEASE = 5
    """The mm goes away; only for users that are told by range."""
    MIGRATE = 6
    """Pages move to or from device memory."""
    EXCLUSIVE = 7
    """A device takes pages for itself."""


class MmuNotifierRange:
    """One announced invalidation: bytes ``[start, end)`` of the mm called ``mm``.

    The same object goes to every ``invalidate_range_start`` and every ``invalidate_range_end``; nobody changes it.
    ``id`` pairs the two in a trace and is unique in its mm. A range that is not ``blockable`` may be declined with
    -EAGAIN. ``owner`` is the device driver on whose behalf pages MIGRATE or become EXCLUSIVE: it may ignore such a
    range, because it tears down by itself.
    """

    __slots__ = ("blockable", "end", "event", "id", "mm", "owner", "start")

    def __init__(
        self,
        mm: str,
        start: int,
        end: int,
        event: RangeEvent,
        blockable: bool = True,
        id: int = 0,
        owner: object = None,
    ) -> None:
        self.mm = mm
        self.start = start
        self.end = end
        self.event = event
        self.blockable = blockable
        self.id = id
        self.owner = owner

    def __repr__(self) -> str:
        return f"<range {self.id} of {self.mm}: {self.event.name} {self.start:#x}..{self.end:#x}>"

    def overlaps(self, start: int, end: int) -> bool:
        """Whether a byte of ``[start, end)`` lies in the range."""
        return self.start < end and start < self.end
