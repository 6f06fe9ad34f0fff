"""The callbacks of a secondary MMU that is told of every change of one mm, as they are today.

Those of 2008 are in notifier_2008.py.

What the caller guarantees, and what the callee owes:

* ``invalidate_range_start``: all pages of the range are still mapped and allocated. When it returns, no translation
  of the range exists in this secondary MMU, nor in any TLB behind it, and none is created until the matching end.
  Ranges nest and overlap, so the callee counts them.
* ``invalidate_range_end``: the primary entries are changed. It does not say that the host's TLBs were flushed, and
  not that pages were freed: pages may be freed before it or after it.
* ``clear_flush_young``, ``clear_young``, ``test_young``: whether the secondary MMU used the pages since it was last
  asked to forget that. The caller holds the page-table lock: they are atomic, they may not sleep.
* ``arch_invalidate_secondary_tlbs``: the host's CPUs forget translations, also outside of ranges. Atomic. For a
  secondary MMU that walks the primary page table and has a TLB only: it has neither start nor end.
* ``release``: the mm dies or the notifier is being unregistered. When it returns nothing is mapped any more and
  nothing can be. It runs while the notifier is still linked, so ranges can still be announced meanwhile, and it may
  run twice.
* A callback that raises has undone what it had begun: it gets no end for that range.
* A callback must not register or unregister anything on its mm: that waits for callbacks to return.

Which callbacks a notifier has is a matter of its class: those that it overrides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from xipvm.notifier.mm import NotifiedMm
    from xipvm.notifier.range import MmuNotifierRange
    from xipvm.notifier.registry import MmuNotifiers


class Subscriber:
    """What every notifier is, whichever protocol it speaks."""

    name: str = "notifier"
    """What it is called in traces and errors."""

    subscribed_to: MmuNotifiers | None = None
    """Where it is registered, from ``register`` until ``unregister``, mm dead or alive. The registry sets it."""

    users: int = 0
    """How many have it by ``get`` (1 for one that was registered by itself). The registry sets it."""

    def release(self, mm: NotifiedMm) -> None:
        """Drop every translation, for good."""


class MmuNotifier(Subscriber):
    """Base of everything that registers with an mm. Every callback may be left out; the defaults do nothing."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """Drop every translation of the range and allow no new one. Returns 0.

        -EAGAIN is allowed for a range that is not blockable: then nothing was begun. Whoever may answer that has no
        ``invalidate_range_end``, which cannot know whether its start had failed.
        """
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """Translations of the range may be created again, as far as no other open range covers them."""

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether ``[start, end)`` was used; from now on unused, and the next use is noticed. Atomic."""
        return False

    def clear_young(self, start: int, end: int) -> bool:
        """As ``clear_flush_young``, but uses through what a TLB holds may go unnoticed. Atomic."""
        return False

    def test_young(self, address: int) -> bool:
        """Whether the page at ``address`` was used. Changes nothing. Atomic."""
        return False

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """Forget cached translations of ``[start, end)``; an ``end`` of ULONG_MAX means all. Atomic."""

    @classmethod
    def alloc_notifier(cls, mm: NotifiedMm) -> Self:
        """A notifier for ``mm``, on which :meth:`MmuNotifiers.get` finds none of this class. May sleep and raise."""
        return cls()

    def free_notifier(self) -> None:
        """The last ``put`` was long enough ago that no callback runs. Atomic."""


def implements(notifier: MmuNotifier, callback: str) -> bool:
    """Whether the class of ``notifier`` has a ``callback`` of its own."""
    return getattr(type(notifier), callback) is not getattr(MmuNotifier, callback)
