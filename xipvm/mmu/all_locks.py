"""mm_take_all_locks: keep every path that changes entries of an mm out, for the moment in which a notifier joins.

Changes come through the mm itself, or through the reverse map of a file or of anonymous pages. So every lock that such
a path holds is taken, each once, however many areas share it, in the order

    the areas' own → i_mmap of huge-page files → i_mmap of other files → anon_vmas

and dropped in the reverse order. Two passes that took both kinds of rmap locks area by area could wait for each other.
Before every area of every pass a pending signal ends it: EINTR, everything dropped.

The lock of an area keeps out who faults without mmap_lock in Linux. Nobody does here, so it is only written down.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from xipvm.errors import InternalError, MmError

if TYPE_CHECKING:
    from xipvm.locks.lock import RwLock
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.rmap import AnonVma
    from xipvm.mmu.vma import Vma

    Lock: TypeAlias = Vma | AddressSpace | AnonVma


class AllLocks:
    """A context that holds all locks of ``mm``; entering it raises MmError EINTR when ``signal_pending()``."""

    __slots__ = ("_locks", "_mm", "_signal_pending", "_taken")

    def __init__(self, mm: Mm, signal_pending: Callable[[], bool]) -> None:
        self._mm = mm
        self._signal_pending = signal_pending
        self._taken: dict[Lock, None] = {}
        self._locks: dict[RwLock, None] = {}

    @property
    def taken(self) -> tuple[Lock, ...]:
        """Whose locks are held, in the order in which they were taken."""
        return tuple(self._taken)

    def __enter__(self) -> AllLocks:
        if self._taken:
            raise InternalError(f"all locks of {self._mm.name} are held already")
        try:
            self._take(lambda area: (area,))
            self._take(lambda area: (area.file,) if area.file is not None and area.file.hugetlb else ())
            self._take(lambda area: (area.file,) if area.file is not None and not area.file.hugetlb else ())
            self._take(lambda area: area.anon_chain, anon=True)
        except BaseException:
            self._drop()
            raise
        return self

    def _take(self, locks: Callable[[Vma], tuple[Lock, ...]], *, anon: bool = False) -> None:
        for area in self._mm.vmas:
            if self._signal_pending():
                raise MmError(errno.EINTR, f"mm_take_all_locks: {self._mm.name}")
            for lock in locks(area):
                self._taken[lock] = None  # a second time changes nothing
                rwsem = getattr(lock, "rwsem" if anon else "i_mmap", None)  # an area has none
                if rwsem is not None and rwsem not in self._locks:
                    rwsem.nested.__enter__()
                    self._locks[rwsem] = None

    def _drop(self) -> None:
        while self._locks:
            self._locks.popitem()[0].nested.__exit__()
        self._taken.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._drop()
