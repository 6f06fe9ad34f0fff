"""The callbacks of 2008, with which MMU notifiers began (Linux 2.6.27).

All of them run inside an RCU read section, some under the page-table lock as well: *none may sleep*, and whatever one
calls that may sleep is reported (AtomicSleepError). No range object, no kind of change, no way to fail: what they are
told has happened or is about to.

* ``invalidate_page``: under the page-table lock. The entry is cleared already and the host's TLBs are flushed; the page
  is still allocated, and goes only when all have returned. No start and no end come with it. Who cached that the page
  was written marks it dirty here.
* ``invalidate_range_start``: pages of the range are still mapped. From its return until the end nothing of the range
  may be cached. Ranges nest and overlap, so the callee counts them. Who holds a reference to each page may drop
  translations and references in the end instead, its TLB flush before the last of them; who holds none may not wait.
* ``invalidate_range_end``: the entries are changed, and pages may be gone.
* ``clear_flush_young``: under the page-table lock: whether the page was used; from now on it was not. Who cannot know
  drops the translation and says whether there was one.
* ``release``: the mm dies, or the notifier is being unregistered. It is no longer linked: nothing else will be called.
  When it returns, no translation is left and none can come.

Which callbacks a notifier has is a matter of its class: those that it overrides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.notifier.notifier import Subscriber

if TYPE_CHECKING:
    from xipvm.notifier.mm import NotifiedMm


class MmuNotifier2008(Subscriber):
    """Base of everything that registers with an mm of the 2008 protocol. The defaults do nothing."""

    def clear_flush_young(self, mm: NotifiedMm, address: int) -> bool:
        """Whether the page at ``address`` was used. Atomic."""
        return False

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        """Drop the translation of the page at ``address``, whose entry is gone. Atomic."""

    def invalidate_range_start(self, mm: NotifiedMm, start: int, end: int) -> None:
        """Drop every translation of bytes ``[start, end)`` and allow no new one. Atomic."""

    def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
        """Translations of the range may be created again, as far as no other open range covers them. Atomic."""
