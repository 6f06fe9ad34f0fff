"""An mm as far as notifiers know one, without areas and pages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from xipvm.errors import MmError
from xipvm.locks import RwLock
from xipvm.locks.order import MMAP_LOCK
from xipvm.notifier import notifiers_of
from xipvm.trace import Trace


class Locks:
    """All locks of an mm: writes down that it was taken, and by its rule when not."""

    def __init__(self, log: list[str], signal_pending: Callable[[], bool]) -> None:
        self.log = log
        self.signal_pending = signal_pending

    def __enter__(self) -> None:
        if self.signal_pending():
            raise MmError(4, "mm_take_all_locks")
        self.log.append("locked")

    def __exit__(self, *_: object) -> None:
        self.log.append("unlocked")


class World:
    """The mm."""

    def __init__(self, name: str = "mm0", protocol: str = "modern") -> None:
        self.name = name
        self.trace = Trace()
        self.notifiers = notifiers_of(self, protocol)
        self.mmap_lock = RwLock(name, MMAP_LOCK)
        self.locking: list[str] = []

    def mmap_write_lock(self) -> AbstractContextManager[object]:
        return self.mmap_lock.write

    def take_all_locks(self, signal_pending: Callable[[], bool]) -> AbstractContextManager[object]:
        return Locks(self.locking, signal_pending)


def error_of(function: Callable[[], object]) -> int:
    """The errno with which it fails."""
    with pytest.raises(MmError) as caught:
        function()
    return caught.value.errno
