"""A gate: many go in and out, until somebody shuts it and goes away (a percpu_rw_semaphore as sb_writers uses it).

It differs from a lock for readers and a writer in two ways. Who shuts it keeps newcomers out at once, also while it
waits for those inside. And it stays shut when its shutter has returned, who holds nothing: anybody may open it.
"""

from __future__ import annotations

from xipvm import actors
from xipvm.errors import InternalError
from xipvm.locks import check
from xipvm.locks.order import LockClass


class Gate:
    """``with gate:`` is to be inside. ``name`` is for errors, ``because`` says who would have to open it.

    To go in raises DeadlockError when it is shut and nobody can open it, and while locks are checked LockError.
    """

    __slots__ = ("because", "cls", "inside", "name", "shut")

    def __init__(self, name: str, cls: LockClass, because: str) -> None:
        self.name = name
        self.cls = cls
        self.because = because
        self.inside = 0
        """How many are."""
        self.shut = False
        """Nobody comes in."""
        actors.made(self)

    def __enter__(self) -> None:
        if check.checker is not None:
            check.checker.before(self, "read", False)
        if actors.watched:
            actors.access(self, write=False)
        if self.shut:
            self._await_opening()
        self.inside += 1
        if check.checker is not None:
            check.checker.acquired(self, "read")

    def __exit__(self, *_: object) -> None:
        if actors.watched:
            actors.access(self, write=False)
        if not self.inside:
            raise InternalError(f"{self.name} is left, and nobody is inside")
        self.inside -= 1
        if check.checker is not None:
            check.checker.released(self)

    def attempt(self) -> bool:
        """Goes in if it is open: ``leave`` it. Any order will do, as nobody waits."""
        actors.access(self, write=False)
        if self.shut:
            return False
        self.inside += 1
        if check.checker is not None:
            check.checker.acquired(self, "read")
        return True

    def leave(self) -> None:
        """One is inside no longer."""
        self.__exit__()

    def wait(self) -> None:
        """Returns when it is open: as if one went in and out at once."""
        with self:
            pass

    def close(self) -> None:
        """Nobody comes in any more; returns when nobody is inside. Raises DeadlockError, and it is shut even so."""
        if check.checker is not None:
            check.checker.before(self, "write", False)
        actors.access(self, write=True)
        self.shut = True
        because = f"who is inside ({self.inside}) would have to go on first"
        actors.wait(f"the last one inside of {self.name}", self._empty, because=because, label="gate.close")

    def open(self) -> None:
        """Everybody may come in again."""
        actors.access(self, write=True)
        self.shut = False

    def _await_opening(self) -> None:
        while self.shut:
            check.sleep_until(self.name, self._opened, because=self.because, label="gate.shut")

    def _opened(self) -> bool:
        actors.access(self, write=False)
        return not self.shut

    def _empty(self) -> bool:
        actors.access(self, write=True)  # who goes in or out changes it, too
        return not self.inside

    def __repr__(self) -> str:
        return f"<{self.name}: {'shut' if self.shut else 'open'}, {self.inside} inside>"
