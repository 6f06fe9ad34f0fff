"""Image files of the host: opened so that nothing else than a regular file gets in, and locked while they are in use.

The lock is flock(2)'s: exclusive, or shared for those who only read, so that no two runs write one image and none sees
bytes change that it did not change. The kernel drops it when the process dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final

from xipvm.errors import FileError, os_reason

READ_IT: Final = "snapshot=on or readonly=on only read it"
"""What helps where an image may not be written."""
SHARE_IT: Final = "only runs with snapshot=on or readonly=on share an image"
"""What helps where somebody else has it."""


def open_image(path: str, error: type[FileError], *, writable: bool, shared: bool) -> int:
    """A descriptor of the regular file ``path``, to read, or ``writable`` to read and write; locked. Raises ``error``.

    ``shared``: others may have it open, too, if they share it. Give it back by :func:`close_image`.
    """
    fd = _open(path, error, writable=writable)
    try:
        _lock(fd, path, error, shared=shared)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_head(path: str, error: type[FileError], size: int) -> bytes:
    """The first bytes of the regular file ``path``, ``size`` if it has so many. Raises ``error``."""
    fd = _open(path, error, writable=False)
    try:
        return os.pread(fd, size, 0)
    except OSError as why:
        raise error(path, os_reason(why)) from None
    finally:
        os.close(fd)


def close_image(fd: int) -> None:
    """Unlocks and closes an image."""
    fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone does not unlock while a forgotten mapping is left
    os.close(fd)


def _open(path: str, error: type[FileError], *, writable: bool) -> int:
    try:
        # Without O_NONBLOCK a FIFO would wait here for somebody to open its other end.
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as why:
        refused = isinstance(why, OSError) and why.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        raise error(path, os_reason(why), READ_IT if refused and writable else "") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise error(path, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "is not a regular file")
    return fd


def _lock(fd: int, path: str, error: type[FileError], *, shared: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(path, "in use by another run", "" if shared else SHARE_IT) from None
    except OSError as why:
        raise error(path, f"cannot be locked: {os_reason(why)}") from None
