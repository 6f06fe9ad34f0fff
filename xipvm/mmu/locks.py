"""The kernel's sleeping locks, as far as they decide who may run at a schedule point.

An actor is atomic between two points, so a lock matters only to those who hold it across one. ``mmap_lock`` of an mm is
such a lock:

* for writing: whoever changes the list of areas or one of them (mmap, munmap, mprotect, mremap, mlock, brk, fork,
  clear_refs, and the end of the mm). munmap goes on as a reader once its areas are unlinked, as in Linux;
* for reading: madvise, and faults while they notify or ask a file. A fault that only fills an entry passes no point, so
  it looks whether there is a writer and takes nothing. While a file reads a page in, the lock is not held (Linux drops
  it, too): who comes back from there has to look at everything again.

Truncation and write-back come from the file's side and take no mmap_lock.

An actor that has to wait hands itself to whoever schedules (:func:`on_wait`). Without a scheduler nobody else could
ever release the lock, and the wait is an error: EDEADLK.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xipvm.errors import MmError

WaitHook = Callable[[str, Callable[[], bool]], None]

_hook: WaitHook | None = None


@contextmanager
def on_wait(hook: WaitHook) -> Iterator[None]:
    """Call ``hook(what, ready)`` when an actor has to wait; it returns when ``ready()`` holds. The innermost counts."""
    global _hook
    previous = _hook
    _hook = hook
    try:
        yield
    finally:
        _hook = previous


class RwLock:
    """Many readers or one writer: ``with lock.read:``, ``with lock.write:``. Not recursive; readers may nest.

    Taking it raises MmError EDEADLK when that means to wait and nobody schedules.
    """

    __slots__ = ("name", "read", "readers", "write", "writer")

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = 0
        self.writer = False
        self.read = _Reading(self)
        self.write = _Writing(self)

    def wait_for_writer(self) -> None:
        """Returns when nobody holds it for writing."""
        while self.writer:
            self._wait("read", lambda: not self.writer)

    def wait_for_all(self) -> None:
        """Returns when nobody holds it."""
        while self.writer or self.readers:
            self._wait("write", lambda: not self.writer and not self.readers)

    def downgrade(self) -> None:
        """The writer goes on as a reader, until its ``with`` ends."""
        self.writer = False
        self.readers += 1

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        if _hook is None:
            holder = "its writer" if self.writer else f"{self.readers} readers"
            raise MmError(errno.EDEADLK, f"{what} of {self.name}: {holder} would have to go on first")
        _hook(f"{what} of {self.name}", ready)

    def __repr__(self) -> str:
        return f"<{self.name}: {'a writer' if self.writer else f'{self.readers} readers'}>"


class _Reading:
    """The context of a reader; has no state of its own, so one serves all."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        if lock.writer:
            lock.wait_for_writer()
        lock.readers += 1

    def __exit__(self, *_: object) -> None:
        self._lock.readers -= 1


class _Writing:
    """The context of a writer, who may have become a reader."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        if lock.writer or lock.readers:
            lock.wait_for_all()
        lock.writer = True

    def __exit__(self, *_: object) -> None:
        lock = self._lock
        if lock.writer:
            lock.writer = False
        else:
            lock.readers -= 1
