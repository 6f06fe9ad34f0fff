"""What all secondary MMUs have in common.

A secondary MMU caches translations of one mm for somebody else than its threads: vCPUs, a device, a remote node. It has
page numbers of its own (guest frames for KVM, offsets into a registered region for an RDMA device) and gets at the mm
by ``Mm.get_user_pages``. How it hears of changes is its own business: KVM and GRU are an ``MmuNotifier`` with start and
end, XPMEM pins its pages and needs only the end, ODP watches an interval.

What every one of them must do is abstract here: fault in a page, say what it has for a page, and go away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from xipvm.address import Hva
from xipvm.mmu.tables import PageTable

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.shadow import ShadowPaging
    from xipvm.trace.funnel import Trace

# Kinds of access; the numbers are the positions of the rights in an spte.
READ = 0
WRITE = 1
FETCH = 2
ACCESS_NAMES = ("read", "write", "fetch")

# What a fault says to the walker that had missed.
RETRY_WALK = 0
"""Walk again: an entry was installed, or has to be asked for again."""
MMIO = 1
"""The access goes to the device bus."""
FAULT = 2
"""There is nothing at that address; ``last_error`` says why."""

_LEVELS = 3


class TlbOwner(Protocol):
    """Who uses the translations, and keeps some of them in a TLB: a vCPU, a device context."""

    def flush_tlb(self, reason: str) -> None:
        """Forget every cached translation. When it returns, none is used any more."""

    def kick(self, reason: str) -> None:
        """Leave the guest at the next possible moment: what runs chained does not look at the TLB."""


class SecondaryMmu(ABC):
    """Base of secondary MMUs. ``vcpus`` is filled by whoever builds the machine; a flush reaches all of them."""

    keeps_entries: bool = True
    """Walkers find in ``sptes`` what a fault has put there, until it is removed; otherwise once, see :meth:`again`."""

    shadow: ShadowPaging | None = None
    """What engines are to ask for what the guest's own tables translate; None when they walk those themselves."""

    def __init__(self, mm: Mm, trace: Trace, name: str) -> None:
        self.mm = mm
        self.trace = trace
        self.name = name
        self.sptes = PageTable(_LEVELS)
        """Its entries by its own page numbers, for walkers; empty for one that has only a TLB."""
        self.vcpus: list[TlbOwner] = []
        self.last_error = ""
        """Why the last FAULT was one, a phrase for a person."""
        self.host_failed = False
        """The last FAULT was the host's fault: there is memory, but its page was not to be had."""

    @abstractmethod
    def fault(self, page: int, access: int) -> int:
        """Make ``page`` accessible by ``access`` (READ, WRITE, FETCH). Returns RETRY_WALK, MMIO or FAULT.

        An entry may be installed only if no invalidation of the page is open then, nor began since the primary entry
        was looked up.
        """

    @abstractmethod
    def translate(self, page: int) -> tuple[int, bool] | None:
        """Frame and writability of the entry that it has for ``page`` now, None without one. Changes nothing."""

    def port(self, index: int) -> SecondaryMmu:
        """What user ``index`` of its translations (a vCPU, a device context) faults and walks by; ``vcpus[index]``.

        The same for all, unless each user has a TLB that the secondary MMU fills.
        """
        return self

    def ports(self) -> Iterator[SecondaryMmu]:
        """All that have been given out, each once; for checks when everything is at rest."""
        yield self

    def vcpu_enter(self, vcpu: TlbOwner) -> None:  # noqa: B027, most have nothing to do
        """The current actor is about to run ``vcpu`` in the guest: may be held up, or do what has to be done before."""

    def again(self, page: int, access: int) -> bool:
        """Where entries are not kept: put the one that was given for ``page`` back, which an engine has evicted.

        False when there is none any more, or none that allows ``access``: then it is a fault.
        """
        return False

    @abstractmethod
    def describe(self, page: int) -> object:
        """What is known of ``page``, for a report: ``str()`` of the result is one line."""

    @abstractmethod
    def destroy(self) -> None:
        """Stop hearing of the mm and drop every translation. A second call does nothing."""

    def inconsistency(self) -> str:
        """What does not agree within it when everything is at rest, in words; empty when all does."""
        return ""

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """Its pages that are memory of the mm, each with its address there; for checks when everything is at rest."""
        return iter(())

    def held(self) -> Iterator[tuple[int, Hva]]:
        """Of :meth:`backing` at least those that it has a translation of: all, for one that cannot tell."""
        return self.backing()

    def flush_remote_tlbs(self, reason: str) -> None:
        """Empty every TLB; each has acknowledged when this returns."""
        for vcpu in self.vcpus:
            vcpu.flush_tlb(reason)

    def kick(self, reason: str) -> None:
        """Have every vCPU leave the guest."""
        for vcpu in self.vcpus:
            vcpu.kick(reason)
