"""A walk of a guest's own page tables, as shadow paging asks for it: made by who knows the guest's ISA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

NO_FAULT: Final = -1

# What a shadow fault answers to an engine, beside RETRY_WALK, MMIO and FAULT, in bits 0 to 3. The page of the guest
# physical address is in bits 12 and up (MMIO, FAULT), or a fault of the guest's: kind in bits 4 to 7, level from 8 on.
GUEST_FAULT: Final = 3
"""The guest's tables do not allow the access."""
TABLE_FAULT: Final = 4
"""A bit would have to be set in a table that cannot be written."""
NOT_SHADOWED: Final = 5
"""No entry says it: walk the guest's tables for this access."""

Role = tuple[int, int, int, int, int]
"""What entries of one root depend on: the root of the guest's tables with its ASID, what else rules how they are read
(TCR; WXN, or SUM and MXR), the privilege, and bits 48 and up of the address."""

ReadEntry = Callable[[int, int], bytes | None]
"""(gpa, size) -> bytes of the guest's memory, None where there is none."""


@dataclass(slots=True)
class GuestWalk:
    """Where the guest's tables lead for one access."""

    gpa: int
    """Of the page."""
    rights: int
    """Bits 0 to 2: read, write, execute. No writing before the tables say that the page is dirty."""
    entries: list[tuple[int, int]]
    """gpa and value of each entry that was read, from the root down."""
    fault: int = NO_FAULT
    """What the guest is told, by the number that its engine gives it."""
    level: int = 0
    """The ISA's number of the last entry's level."""
    shift: int = 12
    """Of the address by the last entry: it maps ``1 << shift`` bytes."""
    set_bits: int = 0
    """To be set in the last entry before anything is made of it: accessed, dirty."""
    cacheable: bool = True
    """Nothing but the role and the tables had a say in it."""


class GuestWalker(Protocol):
    """Who faults: a vCPU."""

    def walk_guest(self, gva: int, access: int, read: ReadEntry) -> GuestWalk:
        """Walk its tables for an access of ``gva``, changing nothing."""

    def sends_to_device(self, gfn: int, access: int) -> bool:
        """Whether it knows that accesses of that kind are a device's; it forgets that with its TLB."""
