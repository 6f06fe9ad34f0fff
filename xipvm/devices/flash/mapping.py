"""Mappings of host memory for flash arrays.

Erased memory is one small page-cache object full of 0xFF, mapped privately as often as the size takes: an array costs
one mapping a MiB, and no page until somebody writes to it. Such an array that nobody has any more is kept for the next
one of its size, what was written to it forgotten: 64 calls of mmap(2) are most of what it takes to make a machine whose
flash is 64 MiB.

A mapping lives as long as a memoryview of it, so a forgotten view is never a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Callable

from xipvm.host_mapping import MAP_FIXED, MAP_NORESERVE, forget_private, map_memory, unmap_memory

_ERASED_CHUNK = 1 << 20
_KEPT = 8
_PIECE = 16 << 10


class Mapping:
    """``size`` bytes at the host address ``address``, as made by :func:`map_file` or :func:`map_erased`."""

    def __init__(
        self, address: int, size: int, *, writable: bool, give_back: Callable[[int, int], object] = unmap_memory
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
        forget_private(self.address, self.size)

    def close(self) -> None:
        """Release ``bytes``. The memory goes with the last view of it."""
        self.bytes.release()


def map_file(fd: int, size: int, *, shared: bool, writable: bool) -> Mapping:
    """Map the first ``size`` bytes of ``fd``. Raises OSError."""
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return Mapping(
        map_memory(None, size, prot, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, fd), size, writable=writable
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
    if len(_kept) < _KEPT:
        with contextlib.suppress(OSError):
            forget_private(address, size)
            _kept.append((address, size))
            return
    unmap_memory(address, size)


def drop_kept() -> None:
    """Give the host what is kept."""
    while _kept:
        unmap_memory(*_kept.pop())


def _map_erased(size: int) -> int:
    fd = _erased_chunk()
    base = map_memory(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    try:
        for offset in range(0, size, _ERASED_CHUNK):
            length = min(_ERASED_CHUNK, size - offset)
            map_memory(base + offset, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED, fd)
    except OSError:
        unmap_memory(base, size)
        raise
    return base


def in_words(view: memoryview, width: int) -> memoryview:
    """A view of the same bytes in host-endian words of ``width`` (1, 2 or 4) bytes."""
    if width == 1:
        return view.cast("B")
    return view.cast("H") if width == 2 else view.cast("I")


@functools.cache
def _erased_chunk() -> int:
    """The descriptor of the 0xFF-filled object; it lives as long as the process, as mappings of it may."""
    fd = os.memfd_create("xipvm-erased", os.MFD_CLOEXEC)
    os.writev(fd, [b"\xff" * _PIECE] * (_ERASED_CHUNK // _PIECE))  # a buffer that is as large takes thrice the time
    return fd
