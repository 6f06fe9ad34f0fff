"""mmap(2) and its like at addresses that native code can be given.

``mmap.mmap`` gives out no address of a read-only mapping and cannot place one mapping behind another, so the calls are
made directly. Whoever maps unmaps; a memoryview over such memory keeps nothing alive. Constants beside those here are
those of the standard library's ``mmap``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
_MS_SYNC: Final = 4
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def map_memory(address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): the host address of ``size`` bytes; ``address`` None: wherever there is room. Raises OSError."""
    result = _libc.mmap(address, size, prot, flags, fd, offset)
    if result is None or result == _FAILED:
        raise _os_error()
    return int(result)


def unmap_memory(address: int, size: int) -> None:
    """munmap(2) of what :func:`map_memory` gave. Nothing may look there any more."""
    _libc.munmap(address, size)


def forget_private(address: int, size: int) -> None:
    """MADV_DONTNEED: a private mapping shows what it is a mapping of again. Raises OSError."""
    if _libc.madvise(address, size, mmap.MADV_DONTNEED):
        raise _os_error()


def sync_memory(address: int, size: int) -> None:
    """MS_SYNC: waits until the host's kernel has written a shared mapping to its file. Raises OSError."""
    if _libc.msync(address, size, _MS_SYNC):
        raise _os_error()


def allocate(fd: int, mode: int, start: int, size: int) -> None:
    """fallocate(2) with ``FALLOC_FL_*`` as ``mode``, bytes. Raises OSError."""
    if _libc.fallocate(fd, mode, start, size):
        raise _os_error()


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
