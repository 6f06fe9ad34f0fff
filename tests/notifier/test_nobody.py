"""Without a notifier an operation does no work for notifiers. Shown by the calls that are made, not by time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import pytest

from xipvm.address import PAGE_SIZE
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.ksm import ksm_of
from xipvm.mmu.madvise import (
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
)
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.notifier import PROTOCOLS, MmuNotifier, MmuNotifier2008, MmuNotifierRange, NotifiedMm
from xipvm.trace.funnel import Trace

RW = PROT_READ | PROT_WRITE
PLACE = 1 << 40
HUGE = 2 << 20

LOOKS = {
    "MmuNotifiers.around_entry",
    "MmuNotifiers.arch_invalidate_secondary_tlbs",
    "MmuNotifiers.clear_flush_young",
    "MmuNotifiers.invalidate_page",
    "MmuNotifiers.invalidate_range",
    "MmuNotifiers.needs_modern",
    "MmuNotifiers.test_young",
    "MmuNotifiers2008.around_entry",
    "MmuNotifiers2008.clear_flush_young",
    "MmuNotifiers2008.invalidate_page",
    "MmuNotifiers2008.invalidate_range",
    "Unobserved.__enter__",
    "Unobserved.__exit__",
}
"""Whoever asks whether anybody listens, and counts that it is at it: none of them has anything to go through."""
MAKING = (
    "notifiers_of",
    "MmuNotifiers.__init__",
    "MmuNotifiers._link",
    "MmuNotifiers2008._link",
    "Unobserved.__init__",
    "Srcu.__init__",
)
"""What a child of fork is made with."""

Operation = Callable[[Mm, int, int], object]


def _ksm(mm: Mm, hva: int, length: int) -> None:
    mm.madvise(hva, length, MADV_MERGEABLE)
    for _ in range(3):
        ksm_of(mm.host, mm.trace).scan()


class Told(MmuNotifier):
    """Wants everything."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        return 0


class Told2008(MmuNotifier2008):
    """Wants everything."""

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        pass


OLD: dict[str, Operation] = {
    "munmap": lambda mm, hva, length: mm.munmap(hva, length),
    "mprotect": lambda mm, hva, length: mm.mprotect(hva, length, PROT_READ),
    "dontneed": lambda mm, hva, length: mm.madvise(hva, length, MADV_DONTNEED),
    "mremap": lambda mm, hva, length: mm.mremap(hva, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, PLACE),
    "fork": lambda mm, hva, length: mm.fork("child"),
    "copy on write": lambda mm, hva, length: mm.write(hva, bytes(length)),
    "swap-out": lambda mm, hva, length: mm.memcg_reclaim(2),
}
NEW: dict[str, Operation] = {
    "free": lambda mm, hva, length: mm.madvise(hva, length, MADV_FREE),
    "pageout": lambda mm, hva, length: mm.madvise(hva, length, MADV_PAGEOUT),
    "guard": lambda mm, hva, length: mm.madvise(hva, length, MADV_GUARD_INSTALL),
    "dontunmap": lambda mm, hva, length: mm.mremap(hva, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP),
    "soft-dirty": lambda mm, hva, length: mm.clear_refs(4),
    "migration": lambda mm, hva, length: compact_memory(mm.host, mm.trace),
    "ksm": _ksm,
    "collapse": lambda mm, hva, length: mm.madvise(hva, HUGE, MADV_COLLAPSE),
}


def calls(operation: Operation, protocol: str, pages: int, *notifiers: MmuNotifier | MmuNotifier2008) -> Counter[str]:
    """The functions of the notifier package that ``operation`` on ``pages`` written pages calls."""
    host = HostMemory(32 << 20)
    mm = Mm(host, Trace(), protocol=protocol)
    mm.swapon(1024)
    hva = mm.mmap(HUGE, RW, addr=PLACE - HUGE)
    length = pages * PAGE_SIZE
    mm.write(hva, bytes(length))
    if operation is OLD["copy on write"]:
        mm.fork("child")
    for notifier in notifiers:
        mm.notifiers.register(notifier)
    made: Counter[str] = Counter()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("xipvm.notifier"):
            made[frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        operation(mm, hva, length)
    finally:
        sys.setprofile(before)
    host.close()
    return made


@pytest.mark.parametrize(
    ("protocol", "name"),
    [*((protocol, name) for protocol in PROTOCOLS for name in OLD), *(("modern", name) for name in NEW)],
)
def test_an_operation_only_asks_whether_anybody_listens(protocol: str, name: str) -> None:
    operation = {**OLD, **NEW}[name]
    nobody = calls(operation, protocol, 16)
    assert not {call for call in nobody if not call.startswith(MAKING)} - LOOKS
    somebody = calls(operation, protocol, 16, Told() if protocol == "modern" else Told2008())
    assert sum(somebody.values()) > sum(nobody.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["munmap", "mprotect", "dontneed"])
def test_what_is_announced_as_a_whole_asks_as_often_for_many_pages(protocol: str, name: str) -> None:
    assert calls(OLD[name], protocol, 4) == calls(OLD[name], protocol, 256)
