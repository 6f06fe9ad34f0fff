"""Sleepable read-copy-update, as far as notifiers need it: who still reads the list that somebody left.

Every walk of the list is a read section. :meth:`Srcu.synchronize` returns when the sections that were open at the call
are closed; those that begin later see the list as it is now and do not matter. :meth:`Srcu.call` does not wait: its
callback runs after the same grace period, at the earliest when a section closes or somebody waits, never inside
``call``. Callbacks are atomic.

In Linux all mms share one domain. Here each mm has one, which changes nothing but this: a callback of one mm may wait
for the callbacks of another, where Linux would wait for itself.

Sections tell a search (``actors.access``) that they are looked at: one does not depend on another, only on who waits.
"""

from __future__ import annotations

from collections.abc import Callable

from xipvm import actors
from xipvm.locks import check
from xipvm.locks.check import atomic, sleep_until


class Srcu:
    """One domain. ``name`` is for errors."""

    __slots__ = ("_callbacks", "_last", "_readers", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._readers: set[int] = set()
        self._last = 0
        self._callbacks: list[tuple[frozenset[int], Callable[[], None]]] = []
        actors.made(self)

    @property
    def read(self) -> bool:
        """A read section is open."""
        actors.access(self, write=True)
        return bool(self._readers)

    @property
    def pending(self) -> int:
        """Callbacks that have not run."""
        actors.access(self, write=True)
        return len(self._callbacks)

    def read_lock(self) -> int:
        """Opens a read section; the result closes it."""
        actors.access(self, write=False)
        self._last = index = self._last + 1
        self._readers.add(index)
        if check.checker is not None:
            check.checker.entered(self)
        return index

    def read_unlock(self, index: int) -> None:
        """Closes a read section, and runs what waited for it only."""
        actors.access(self, write=bool(self._callbacks))
        self._readers.remove(index)
        if check.checker is not None:
            check.checker.released(self)
        if self._callbacks:
            self._run_callbacks()

    def synchronize(self, what: str) -> None:
        """Waits for the read sections that are open now; what was handed to :meth:`call` before has run then, too.

        Raises MmError EDEADLK when they do not close: one is the caller's own. ``what`` is who waits.
        """
        if check.checker is not None:
            check.checker.not_in(self, what)
        actors.access(self, write=True)
        before = frozenset(self._readers)
        sleep_until(
            what,
            lambda: self._passed(before),
            because=f"a callback of {self.name} is running",
            label="notifier.synchronize",
        )
        self._run_callbacks()

    def call(self, callback: Callable[[], None]) -> None:
        """Lets ``callback`` run after a grace period. Never sleeps."""
        actors.access(self, write=True)
        self._callbacks.append((frozenset(self._readers), callback))

    def _passed(self, before: frozenset[int]) -> bool:
        actors.access(self, write=True)
        return before.isdisjoint(self._readers)

    def _run_callbacks(self) -> None:
        ready = [entry for entry in self._callbacks if entry[0].isdisjoint(self._readers)]
        with atomic("an SRCU callback"):
            for entry in ready:
                self._callbacks.remove(entry)
                entry[1]()
