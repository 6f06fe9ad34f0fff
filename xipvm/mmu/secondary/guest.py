"""What a machine asks of the secondary MMU behind which its guest runs, whichever that is.

It has memslots, which say what guest frames are backed by; everything else there is a device's or nothing. Each vCPU
gets a *port* (``SecondaryMmu.port``): the object that its misses go to and whose entries its engine walks.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from xipvm.address import Gfn, Hva
from xipvm.errors import MmError
from xipvm.mmu.secondary.base import SecondaryMmu
from xipvm.mmu.secondary.memslot import Memslots

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace


class PageInfo(Protocol):
    """What is known of a guest frame; ``str()`` of it is one line."""

    @property
    def hva(self) -> Hva | None:
        """The first byte behind it, None without a memslot."""


def no_devices(gpa: int) -> bool:
    """There is none at ``gpa``."""
    return False


class GuestMmu(SecondaryMmu):
    """The secondary MMU of a guest."""

    pin_sptes: bool = False
    """It is told of nothing, and holds the pages it maps instead."""

    def __init__(self, mm: Mm, trace: Trace, name: str) -> None:
        SecondaryMmu.__init__(self, mm, trace, name)
        self.memslots = Memslots()
        self.mmio_lookup: Callable[[int], bool] = no_devices
        """Whether a device answers in the page at this gpa."""
        self.invalidations = 0
        """Changes that were announced so far."""

    @abstractmethod
    def set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        """Create memslot ``slot``, or change it. Raises MmError as :meth:`Memslots.check` says; nothing is changed."""

    @abstractmethod
    def delete_memslot(self, slot: int) -> None:
        """Take memslot ``slot`` away; its guest frames have no memory any more. Raises MmError EINVAL without one."""

    @abstractmethod
    def zap_gfn_range(self, start: int, end: int, reason: str) -> None:
        """Drop the translations of guest frames ``[start, end)``; the guest faults them in again."""

    @abstractmethod
    def describe(self, page: int) -> PageInfo:
        """See the base."""

    def get_dirty_log(self, slot: int) -> bytes:
        """The pages that were written since the last call. Raises MmError EINVAL where no such log is kept."""
        raise MmError(errno.EINVAL, f"get_dirty_log: {self.name} keeps none")

    def pins(self) -> dict[int, int]:
        """The references that its translations hold, by frame."""
        return {}

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """The guest frames of all memslots."""
        for slot in self.memslots:
            for gfn in range(slot.gfn, slot.gfn_end):
                yield gfn, slot.hva_of(Gfn(gfn))
