"""The callbacks of a secondary MMU that is told of every change of one mm.

What the caller guarantees, and what the callee owes:

* ``invalidate_range_start``: all pages of the range are still mapped and allocated. When it returns, no translation
  of the range exists in this secondary MMU, nor in any TLB behind it, and none is created until the matching end.
  Ranges nest and overlap, so the callee counts them.
* ``invalidate_range_end``: the primary entries are changed. It does not say that the host's TLBs were flushed, and
  not that pages were freed: pages may be freed before it or after it.
* ``release``: the mm dies or the notifier is being unregistered. When it returns nothing is mapped any more and
  nothing can be. It runs while the notifier is still linked, so ranges can still be announced meanwhile, and it may
  run twice.
* A callback that raises has undone what it had begun: it gets no end for that range.
* A callback must not register or unregister anything on its mm: that waits for callbacks to return.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xipvm.notifier.range import MmuNotifierRange
    from xipvm.notifier.registry import MmuNotifiers, NotifiedMm


class MmuNotifier:
    """Base of everything that registers with an mm. Every callback may be left out; the defaults do nothing."""

    name: str = "notifier"
    """What it is called in traces and errors."""

    subscribed_to: MmuNotifiers | None = None
    """Where it is registered, from ``register`` until ``unregister``, mm dead or alive. The registry sets it."""

    def release(self, mm: NotifiedMm) -> None:
        """Drop every translation, for good."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """Drop every translation of the range and allow no new one. Returns 0.

        -EAGAIN is allowed for a range that is not blockable: then nothing was begun and no end comes.
        """
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """Translations of the range may be created again, as far as no other open range covers them."""
