"""The mm as its notifiers see it, who must not know the primary MMU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from xipvm.trace.funnel import Trace


class NotifiedMm(Protocol):
    """What notifiers have to know of an mm."""

    @property
    def name(self) -> str:
        """What it is called in traces."""

    @property
    def trace(self) -> Trace:
        """Where its events go."""

    def mmap_write_lock(self) -> AbstractContextManager[object]:
        """Keeps everybody out who looks at its areas. Entering it raises MmError EDEADLK if nobody can let go."""

    def take_all_locks(self, signal_pending: Callable[[], bool]) -> AbstractContextManager[object]:
        """Keeps every change of its entries out. Entering it raises MmError EINTR when a signal is pending."""
