"""The pool of huge pages: who may take one, and what is promised to whom.

The pages themselves, and how many are free, are the host memory's (``reserve_huge_pages``, ``free_huge_pages``); a page
comes back with its last reference. ``reserved_huge_pages`` of the free ones are promised to mappings (hugetlb.py): only
a fault that redeems a promise may take them. There are no surplus pages: the pool does not grow by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm.actors import wait
from xipvm.address import Pfn
from xipvm.errors import DeadlockError, MmError
from xipvm.mmu.frames import HUGE_PAGES

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace


def hugetlb_acct_memory(host: HostMemory, delta: int) -> None:
    """Promises ``delta`` huge pages, or takes so many promises back. Raises MmError ENOMEM: so many are not free."""
    if delta > 0 and host.reserved_huge_pages + delta > host.free_huge_pages:
        free = max(host.free_huge_pages - host.reserved_huge_pages, 0)
        raise MmError(errno.ENOMEM, f"{delta} huge pages wanted, {free} of {host.huge_pages} can be had")
    host.reserved_huge_pages += delta


class HugePagesInFlightError(Exception):
    """A page is promised, but all that could redeem the promise wait for the TLB flush behind which they are freed."""


def alloc_hugetlb_page(host: HostMemory, trace: Trace, *, reserved: bool, zero: bool = True) -> Pfn | None:
    """A huge page with one reference, by a promise (``reserved``) or from what is not promised; None without one.

    Raises HugePagesInFlightError: ask again behind :func:`wait_for_huge_page`.
    """
    if reserved and not host.free_huge_pages:
        raise HugePagesInFlightError
    if not reserved and host.free_huge_pages <= host.reserved_huge_pages:
        return None
    host.reserved_huge_pages -= reserved
    pfn = host.alloc_huge_page(zero)
    if trace.on:
        trace.emit("page_alloc_huge", pages=[(pfn, HUGE_PAGES)])
    return pfn


def wait_for_huge_page(host: HostMemory, outdated: Callable[[], bool]) -> bool:
    """Sleeps until a page of the pool is free, or is not wanted any more; False when neither can come about."""
    try:
        wait(
            "a huge page that is on its way back",
            lambda: host.free_huge_pages > 0 or outdated(),
            because="who has it does not go on",
            label="mm.hugetlb.pool",
        )
    except DeadlockError:
        return False
    return True
