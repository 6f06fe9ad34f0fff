"""Where swap is, as a person says it: a size, or a file; and the file's format.

``128M`` is a temporary file without a name: nothing is left of it, however the run ends. ``FILE,size=128M`` makes a
swap file or makes one anew, ``FILE`` takes one that is there. A file that has other content is never touched: the first
page has to be the header that mkswap writes, which is what is written here, too. It is locked while it is in use, and
its blocks are allocated before, so that it does not run out of them.

Nothing in a swap file outlives the run that wrote it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from typing import Final

from xipvm.address import PAGE_SIZE, format_size, parse_size
from xipvm.errors import SwapFileError, os_reason
from xipvm.file_option import split_option
from xipvm.mmu.swap import SwapArea, temporary_file

_MAGIC: Final = b"SWAPSPACE2"
_HEADER: Final = struct.Struct("<1024xIII16s16s")
"""Boot bits, version, last page, bad pages, UUID, label."""
LIMIT: Final = 1 << 40


@dataclass(frozen=True)
class SwapOption:
    """Swap of ``size`` bytes; in the file ``path``, or without one a temporary file."""

    path: str | None
    size: int | None
    """Bytes, header included; None: those of the file that is there."""


def parse_swap(text: str) -> SwapOption:
    """What ``SIZE`` or ``FILE[,size=SIZE]`` says. A doubled comma is one of the name. Raises SwapFileError."""
    path, settings = split_option(text)
    if not path:
        raise SwapFileError(text or '""', "no swap is named; write SIZE or FILE[,size=SIZE]")
    if not settings:
        try:
            return SwapOption(None, _checked(path, parse_size(path)))
        except ValueError:
            return SwapOption(path, None)
    size = None
    for setting, key, value in settings:
        if key != "size":
            raise SwapFileError(path, f"{setting!r} is no setting of a swap file; there is size=SIZE")
        try:
            size = _checked(path, parse_size(value))
        except ValueError as error:
            raise SwapFileError(path, str(error)) from None
    return SwapOption(path, size)


def _checked(path: str, size: int) -> int:
    if not 2 * PAGE_SIZE <= size <= LIMIT or size % PAGE_SIZE:
        raise SwapFileError(path, f"swap of {format_size(size)}: give 8 KiB to 1 TiB, whole pages of 4 KiB")
    return size


def open_swap(option: SwapOption) -> SwapArea:
    """The swap area of an option. Raises SwapFileError."""
    if option.path is None:
        assert option.size is not None
        return _open_temporary(option.size)
    fd, made = _open_file(option.path, option.size)
    try:
        pages = _prepare(fd, option.path, option.size)
    except BaseException as error:
        if made and not isinstance(error, SwapFileError):  # that is another run's by now
            os.unlink(option.path)
        os.close(fd)
        if isinstance(error, OSError):
            raise SwapFileError(option.path, os_reason(error)) from None
        raise
    return SwapArea(fd, pages - 1, PAGE_SIZE)


def _open_file(path: str, size: int | None) -> tuple[int, bool]:
    """A descriptor of the file, and whether that was made: with a ``size`` only. Raises SwapFileError."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            return os.open(path, flags), False
        except FileNotFoundError:
            if size is None:
                raise
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except OSError as error:
        reason = os_reason(error)
        if isinstance(error, FileNotFoundError) and size is None:
            reason = f"there is no such swap file; {path},size=128M makes one, of that size"
        raise SwapFileError(path, reason) from None


def _open_temporary(size: int) -> SwapArea:
    fd = -1
    try:
        fd = temporary_file()
        os.ftruncate(fd, size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise SwapFileError("temporary swap file", os_reason(error)) from None
    return SwapArea(fd, size // PAGE_SIZE)


def _prepare(fd: int, path: str, size: int | None) -> int:
    """Makes the file a swap file of ``size`` bytes, or of those that it has; pages. Raises OSError, SwapFileError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise SwapFileError(path, "is not a file")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise SwapFileError(path, "is in use by another run") from None
    if status.st_size and os.pread(fd, len(_MAGIC), PAGE_SIZE - len(_MAGIC)) != _MAGIC:
        raise SwapFileError(path, "is not a swap file, and has content; name one that does not exist yet")
    if size is None:
        size = _checked(path, status.st_size & -PAGE_SIZE)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError:  # no room for it: an empty file stays one that can be made a swap file
        os.ftruncate(fd, min(size, status.st_size))
        raise
    pages = size // PAGE_SIZE
    header = _HEADER.pack(1, pages - 1, 0, os.urandom(16), b"xipvm")
    os.pwrite(fd, header.ljust(PAGE_SIZE - len(_MAGIC), b"\0") + _MAGIC, 0)
    return pages
