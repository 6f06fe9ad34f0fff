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


def os_reason(error: OSError | ValueError) -> str:
    """Why the operating system refused, in its own words, which messages give unchanged: ``No such file or directory``.

    A ValueError is a path that no file can have.
    """
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class FileError(BadInput):
    """A file of the host cannot be used as what it was named for. ``path`` names it, ``reason`` is for a person.

    ``hint`` says what a run can do about it, if anything.
    """

    def __init__(self, path: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{path or repr(path)}: {reason}{hint and f'; {hint}'}")
        self.path = path
        self.reason = reason
        self.hint = hint


class GuestImageError(FileError):
    """The guest file is not an ELF that the board can run."""


class FlashImageError(FileError):
    """The flash image cannot back a bank (size, lock, permissions)."""


class XipImageError(FileError):
    """The image is not one whose files can be used in place (format, size, lock, permissions)."""


class TraceFileError(FileError):
    """The trace file cannot be read or written."""


class SwapFileError(FileError):
    """What was named cannot be swap (size, format, lock, permissions)."""


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


class ProtocolUnsupported(XipvmError):
    """``what`` cannot be announced in the notifier ``protocol`` of the mm. State is unchanged."""

    def __init__(self, what: str, protocol: str) -> None:
        super().__init__(f"{what}: the {protocol} notifier protocol has no such thing")
        self.what = what
        self.protocol = protocol


class GuestError(XipvmError):
    """The guest did something it cannot be resumed from. Exit status 1."""


class GuestAccessError(XipvmError):
    """There is nothing behind guest frame ``gfn``, or page ``gfn`` of a device: MMIO or no memory."""

    def __init__(self, gfn: int, why: str) -> None:
        super().__init__(f"guest frame {gfn:#x}: {why}")
        self.gfn = gfn


class DeadlockError(MmError):
    """Who waits can never go on; errno is EDEADLK. ``waiting``: (actor, what for, the locks that it holds) of each."""

    def __init__(self, what: str, waiting: tuple[tuple[str, str, tuple[str, ...]], ...] = ()) -> None:
        super().__init__(_errno.EDEADLK, what)
        self.waiting = waiting


class LockError(XipvmError):
    """A modelled lock was used against its rules. ``rule`` says which one, in a word; ``actor`` who did it.

    ``first`` and ``second`` are stacks, as text, outermost frame first: where what is at odds with the present use
    began (a lock was taken, an atomic section entered, the other order seen), and the present use.
    """

    rule = "lock"

    def __init__(self, what: str, *, actor: str, first: str, second: str) -> None:
        super().__init__(what)
        self.actor = actor
        self.first = first
        self.second = second

    def report(self) -> str:
        """The message and both stacks, on several lines."""
        return f"{self}\n{self.actor} first, at:\n{self.first}\nand then, at:\n{self.second}"


class LockOrderError(LockError):
    """Two classes of locks are taken in an order that, with the opposite one, can deadlock.

    ``held`` and ``taken`` name the classes.
    """

    rule = "order"

    def __init__(self, what: str, *, actor: str, first: str, second: str, held: str, taken: str) -> None:
        super().__init__(what, actor=actor, first=first, second=second)
        self.held = held
        self.taken = taken


class RecursiveLockError(LockError, DeadlockError):
    """An actor takes a lock that it holds, or waits for a read section of its own. errno is EDEADLK, too."""

    rule = "recursion"

    def __init__(self, what: str, *, actor: str, first: str, second: str) -> None:
        DeadlockError.__init__(self, what)
        self.actor = actor
        self.first = first
        self.second = second


class AtomicSleepError(LockError, InternalError):
    """Something that may sleep was called where nobody may. ``why`` is the atomic section."""

    rule = "atomic"

    def __init__(self, what: str, *, actor: str, first: str, second: str, why: str) -> None:
        super().__init__(what, actor=actor, first=first, second=second)
        self.why = why


class LockLeakError(LockError):
    """An actor ends, or goes back to where no lock may be held, with ``held``: names of locks."""

    rule = "leak"

    def __init__(self, what: str, *, actor: str, first: str, second: str, held: tuple[str, ...]) -> None:
        super().__init__(what, actor=actor, first=first, second=second)
        self.held = held
