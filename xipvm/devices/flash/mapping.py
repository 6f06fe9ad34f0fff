"""Mappings of host memory for flash arrays: mmap(2) at addresses that native code can be given.

``mmap.mmap`` gives out no address of a read-only mapping and cannot place one mapping behind another, so
the calls are made directly. Erased memory is one small page-cache object full of 0xFF, mapped privately as
often as the size takes: an array costs one mapping a MiB, and no page until somebody writes to it. Such an array that
nobody has any more is kept for the next one of its size, what was written to it forgotten: 64 calls of mmap(2) are most
of what it takes to make a machine whose flash is 64 MiB.

A mapping lives as long as a memoryview of it, so a forgotten view is never a crash.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Callable

_ERASED_CHUNK = 1 << 20
_KEPT = 8
_PIECE = 16 << 10
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """``size`` bytes at the host address ``address``, as made by :func:`map_file` or :func:`map_erased`."""

    def __init__(
        self, address: int, size: int, *, writable: bool, give_back: Callable[[int, int], object] = _libc.munmap
    ) -> None:
        self.address = address
        self.size = size
        array = (ctypes.c_ubyte * size).from_address(address)
        # At exit the kernel unmaps; doing it earlier would pull memory from under native code that still runs.
        weakref.finalize(array, give_back, address, size).atexit = False
        whole = memoryview(array).cast("B")
        self.bytes = whole if writable else whole.toreadonly()
        """All of it; slices and casts keep the mapping alive."""

    def drop_private(self) -> None:
        """Forget what was written to a private mapping: it shows its file again. Raises OSError."""
        if _libc.madvise(self.address, self.size, _MADV_DONTNEED):
            raise _os_error()

    def close(self) -> None:
        """Release ``bytes``. The memory goes with the last view of it."""
        self.bytes.release()


def map_file(fd: int, size: int, *, shared: bool, writable: bool) -> Mapping:
    """Map the first ``size`` bytes of ``fd``. Raises OSError."""
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return Mapping(
        _mmap(None, size, prot, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, fd), size, writable=writable
    )


def map_erased(size: int) -> Mapping:
    """Map ``size`` bytes of private memory that reads 0xFF. Raises OSError."""
    address = min((address for address, length in _kept if length == size), default=0)
    if address:
        _kept.remove((address, size))
    return Mapping(address or _map_erased(size), size, writable=True, give_back=_keep)


_kept: list[tuple[int, int]] = []
"""Erased memory that nobody has: address and size."""


def _keep(address: int, size: int) -> None:
    """Nobody has these bytes any more."""
    if len(_kept) < _KEPT and not _libc.madvise(address, size, _MADV_DONTNEED):
        _kept.append((address, size))
    else:
        _libc.munmap(address, size)


def drop_kept() -> None:
    """Give the host what is kept."""
    while _kept:
        _libc.munmap(*_kept.pop())


def _map_erased(size: int) -> int:
    fd = _erased_chunk()
    base = _mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    try:
        for offset in range(0, size, _ERASED_CHUNK):
            length = min(_ERASED_CHUNK, size - offset)
            _mmap(base + offset, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(base, size)
        raise
    return base


def in_words(view: memoryview, width: int) -> memoryview:
    """A view of the same bytes in host-endian words of ``width`` (1, 2 or 4) bytes."""
    if width == 1:
        return view.cast("B")
    return view.cast("H") if width == 2 else view.cast("I")


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size, prot, flags, fd, 0)
    if result is None or result == _FAILED:
        raise _os_error()
    return int(result)


def _os_error() -> OSError:
    errno = ctypes.get_errno()
    return OSError(errno, os.strerror(errno))


@functools.cache
def _erased_chunk() -> int:
    """The descriptor of the 0xFF-filled object; it lives as long as the process, as mappings of it may."""
    fd = os.memfd_create("xipvm-erased", os.MFD_CLOEXEC)
    os.writev(fd, [b"\xff" * _PIECE] * (_ERASED_CHUNK // _PIECE))  # a buffer that is as large takes thrice the time
    return fd
