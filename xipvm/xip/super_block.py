"""What the files of a file system have in common: who changes it at the moment, and whether anybody may (FIFREEZE).

**Levels**, each a gate that freezing shuts, in this order::

    sb_writers     outside i_rwsem: write, truncate, a hole punched, a name made or taken away
    sb_pagefaults  inside mmap_lock, outside invalidate_lock: a fault that allocates, or makes a DAX page writable

A write copies from memory that may be a mapping of the same file system. So its faults have a level of their own, which
is shut when no writer is left. Then everything is written back: entries of DAX mappings turn read-only, and the next
store through one waits. Last the file system itself makes its image what an image is that was put away.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm.errors import MmError
from xipvm.locks.gate import Gate
from xipvm.locks.order import SB_PAGEFAULTS, SB_WRITERS

if TYPE_CHECKING:
    from xipvm.xip.filemap import XipFile


class SuperBlock:
    """The file system ``name``. ``freeze_fs`` and ``unfreeze_fs`` are its own part of that; both may raise MmError."""

    def __init__(
        self,
        name: str,
        freeze_fs: Callable[[], object] = lambda: None,
        unfreeze_fs: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = name
        because = f"{name} is frozen, and who froze it would have to thaw it first"
        self.writers = Gate(f"sb_writers of {name}", SB_WRITERS, because)
        self.pagefaults = Gate(f"sb_pagefaults of {name}", SB_PAGEFAULTS, because)
        self.files: list[XipFile] = []
        """Those that are open."""
        self.frozen = False
        """Nothing changes, and the image is consistent."""
        self._freeze_fs = freeze_fs
        self._unfreeze_fs = unfreeze_fs

    def freeze(self) -> None:
        """Waits for whoever is changing something, and keeps everybody from it until :meth:`thaw` (freeze_super).

        Raises MmError: EBUSY (it is frozen, or about to be), EDEADLK, and what writing back does; it is open then.
        """
        if self.writers.shut:
            raise MmError(errno.EBUSY, f"{self.name} is frozen")
        try:
            self.writers.close()
            self.pagefaults.close()
            for file in self.files:
                file.fsync()
            self._freeze_fs()
        except BaseException:
            self._open()
            raise
        self.frozen = True

    def thaw(self) -> None:
        """Who waits goes on (thaw_super). Raises MmError EINVAL when it is not frozen."""
        if not self.frozen:
            raise MmError(errno.EINVAL, f"{self.name} is not frozen")
        self._unfreeze_fs()
        self.frozen = False
        self._open()

    def _open(self) -> None:
        self.pagefaults.open()
        self.writers.open()
