"""What a userfaultfd tells its monitor: page faults that wait for it, and changes of the address space.

A **page fault** waits. The fault handler raises :class:`Userfault` before it has changed anything; outside of every
lock the message is delivered and the wait begins (:func:`handle_userfault`), and when somebody has woken the address
the access starts over: what it finds then is up to it. Nobody has to fill the page for the wake, as in Linux.

An **event** (fork, mremap, unmap, and what madvise is about to drop) is told behind the operation, when its locks are
dropped; REMOVE is told before. Until it has been read the layout counts as changing, and filling pages is EAGAIN.

A monitor is a handler, which is called with every message where it comes up, or none: then messages queue, and another
actor reads them. A fault that nobody resolves and nobody else can is an error, EDEADLK; an event that nobody reads
stays in the queue.
"""

from __future__ import annotations

import errno
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xipvm.actors import wait
from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.errors import MmError
from xipvm.mmu.file import VmFault

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.userfaultfd import Userfaultfd
    from xipvm.mmu.vma import Vma

UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

UFFD_PAGEFAULT_FLAG_WRITE: Final = 1
UFFD_PAGEFAULT_FLAG_WP: Final = 2
UFFD_PAGEFAULT_FLAG_MINOR: Final = 4

UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11

_PATIENCE: Final = 1000
"""Wakes in a row that left an entry as it was, after which nothing else is to be expected of them."""

_EVENT_NAMES: Final = {
    UFFD_EVENT_FORK: "fork",
    UFFD_EVENT_REMAP: "remap",
    UFFD_EVENT_REMOVE: "remove",
    UFFD_EVENT_UNMAP: "unmap",
}


@dataclass(frozen=True, slots=True)
class UffdMsg:
    """One message. ``event`` is one of ``UFFD_EVENT_*`` and says which other fields mean something."""

    event: int
    address: int = 0
    """PAGEFAULT: the byte address, cut down to its page unless EXACT_ADDRESS was asked for. REMAP: the new place."""
    flags: int = 0
    """PAGEFAULT: ``UFFD_PAGEFAULT_FLAG_*``."""
    actor: str = ""
    """PAGEFAULT: who faulted, as traces call it."""
    start: int = 0
    end: int = 0
    """REMOVE, UNMAP: what goes. REMAP: what moved. In bytes."""
    ufd: Userfaultfd | None = None
    """FORK: the userfaultfd of the child."""


class Userfault(Exception):
    """A fault in ``area`` is the monitor's business; ``flags`` are those of its message. Nothing was changed."""

    def __init__(self, area: Vma, hva: int, flags: int) -> None:
        super().__init__(hex(hva))
        self.area = area
        self.hva = hva
        self.flags = flags


class Waiter:
    """A fault that waits."""

    __slots__ = ("hva", "woken")

    def __init__(self, hva: int) -> None:
        self.hva = hva
        self.woken = False


def handle_userfault(mm: Mm, fault: Userfault) -> tuple[VmFault, str]:
    """Has the fault resolved; how it went and the word for it in traces. No lock is held.

    Raises MmError EDEADLK when nobody resolves it, and what the handler raises.
    """
    uffd = fault.area.uffd
    if uffd is None:
        return VmFault.OK, "retry"
    if uffd.features & UFFD_FEATURE_SIGBUS:
        return VmFault.SIGBUS, "sigbus"
    address = fault.hva if uffd.features & UFFD_FEATURE_EXACT_ADDRESS else fault.hva & PAGE_MASK
    message = UffdMsg(UFFD_EVENT_PAGEFAULT, address, fault.flags, mm.trace.actor)
    waiter = Waiter(address)
    uffd.waiters.append(waiter)
    before = mm.pgd.get(fault.hva >> PAGE_SHIFT)
    try:
        seq = 0
        if mm.trace.on:
            access = "write" if fault.flags & UFFD_PAGEFAULT_FLAG_WRITE else "read"
            seq = mm.trace.emit("uffd_pagefault", mm=mm.name, hva=address, access=access, reason=_reason(fault.flags))
        _tell(uffd, message, seq)
        wait(
            f"{mm.name} at {address:#x}",
            lambda: waiter.woken or uffd.closed,
            because=f"the monitor of {uffd!r} does not resolve the fault, and nobody else can go on",
            label="mm.userfault.wait",
        )
    finally:
        uffd.waiters.remove(waiter)
        if _unread(uffd, message):
            uffd.queue = deque(other for other in uffd.queue if other is not message)
    _count_wakes(mm, uffd, address, mm.pgd.get(fault.hva >> PAGE_SHIFT) == before)
    return VmFault.OK, "userfault"


def _unread(uffd: Userfaultfd, message: UffdMsg) -> bool:
    return any(other is message for other in uffd.queue)


def _reason(flags: int) -> str:
    return "wp" if flags & UFFD_PAGEFAULT_FLAG_WP else "minor" if flags & UFFD_PAGEFAULT_FLAG_MINOR else "missing"


def _count_wakes(mm: Mm, uffd: Userfaultfd, address: int, unchanged: bool) -> None:
    """Raises EDEADLK when an address is woken again and again without any effect: the access would never end."""
    count = uffd.idle_wakes[1] + 1 if unchanged and uffd.idle_wakes[0] == address else 0
    uffd.idle_wakes = address, count
    if count > _PATIENCE:
        uffd.idle_wakes = 0, 0
        raise MmError(errno.EDEADLK, f"{mm.name} at {address:#x}: {uffd!r} wakes the fault and never resolves it")


def _tell(uffd: Userfaultfd, message: UffdMsg, seq: int) -> None:
    """Hands a message to the monitor; what the handler does is caused by the event ``seq``.

    It has a thread for everybody who may have to wait for it: two of them can be at work at once.
    """
    if uffd.handler is None:
        uffd.queue.append(message)
        return
    trace = uffd.mm.trace
    actor = trace.actor
    trace.actor = "monitor" if actor == "host" else f"monitor of {actor}"
    try:
        with trace.because(seq) if seq else nullcontext():
            uffd.handler(uffd, message)
    finally:
        trace.actor = actor


class UffdReports:
    """The events that an operation on ``mm`` gives rise to, as a context around the one that holds its locks."""

    __slots__ = ("_mm", "_pending")

    def __init__(self, mm: Mm) -> None:
        self._mm = mm
        self._pending: list[tuple[Userfaultfd, UffdMsg]] = []

    def add(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        """To be told when the operation has dropped its locks. From now on the layout is changing."""
        if any(other is uffd and known == message for other, known in self._pending):
            return
        self._pending.append((uffd, message))
        uffd.changing += 1

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            for uffd, message in pending:
                self._report(uffd, message)

    def tell(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        """Tells of something that is about to happen. No lock is held."""
        uffd.changing += 1
        self._report(uffd, message)

    def _report(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        trace, seq = uffd.mm.trace, 0
        if trace.on:
            name, to = _EVENT_NAMES[message.event], message.address or None
            seq = trace.emit("uffd_event", mm=uffd.mm.name, event=name, start=message.start, end=message.end, to=to)
        try:
            _tell(uffd, message, seq)
        finally:
            if uffd.handler is not None:
                uffd.changing -= 1
        with suppress(MmError):  # who could read it is the one that would wait
            wait(f"{uffd!r}", lambda: not _unread(uffd, message), label="mm.userfaultfd.event")
