"""The errors of xipvm: one base, one class for each decision a caller can take.

Every class carries its payload in attributes; ``str(error)`` is the one line a person reads.
``BadInput`` and its children end the command line with exit status 2, everything else that is
an ``XipvmError`` with 1.
"""

from __future__ import annotations

import errno as _errno
import os


class XipvmError(Exception):
    """Base of all errors that xipvm raises on purpose."""


class InternalError(XipvmError):
    """An invariant of xipvm itself does not hold: a defect of ours, please report it."""


class BadInput(XipvmError):
    """What the caller handed in cannot be used; nothing was changed. Exit status 2."""


class GuestImageError(BadInput):
    """The guest file is not an ELF that the board can run. ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class FlashImageError(BadInput):
    """The flash image cannot back a bank (size, lock, permissions). ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class TraceFileError(BadInput):
    """The trace file cannot be read or written. ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class BoardError(BadInput):
    """Unknown board, or an option that the board does not have."""


class HostMemoryError(BadInput):
    """The host cannot give the memory that was asked for. ``wanted`` is in bytes."""

    def __init__(self, wanted: int, reason: str) -> None:
        super().__init__(reason)
        self.wanted = wanted


class OutOfFrames(XipvmError):
    """The arena has no free frame left (the model's out-of-memory)."""


class MmError(XipvmError):
    """An operation of the modelled kernel failed; ``errno`` is the Linux number. State is unchanged."""

    def __init__(self, errno: int, what: str) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{what}: {name} ({os.strerror(errno)})")
        self.errno = errno
        self.what = what


class GuestError(XipvmError):
    """The guest did something it cannot be resumed from. Exit status 1."""
