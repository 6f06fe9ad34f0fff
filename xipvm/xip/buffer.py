"""Where a read puts its bytes and a write takes them from: memory of an mm, or bytes of our own.

A copy may stop in the middle, as copy_to_user and copy_from_user do: both say how far they came.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from xipvm.errors import DeadlockError, MmError
from xipvm.mmu.gup import pieces
from xipvm.mmu.vma import TASK_SIZE

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm


class UserBuffer(Protocol):
    """Somebody's buffer. Offsets are bytes from its beginning."""

    def access_ok(self, size: int) -> bool:
        """Whether ``size`` bytes of it can be addresses of a user at all."""

    def put(self, offset: int, data: bytes) -> int:
        """Store ``data``; how many bytes of it could be stored."""

    def take(self, offset: int, size: int) -> bytes:
        """``size`` bytes, or fewer when the rest cannot be read."""


class MmBuffer:
    """The memory of ``mm`` from ``hva`` on."""

    def __init__(self, mm: Mm, hva: int) -> None:
        self.mm = mm
        self.hva = hva

    def access_ok(self, size: int) -> bool:
        """See UserBuffer."""
        return self.hva >= 0 and self.hva + size <= TASK_SIZE

    def put(self, offset: int, data: bytes) -> int:
        """See UserBuffer."""
        done = 0
        for address, _, length in pieces(self.hva + offset, len(data)):
            try:
                self.mm.write(address, data[done : done + length])
            except DeadlockError:
                raise
            except MmError as error:
                if error.errno != errno.EFAULT:
                    raise
                break
            done += length
        return done

    def take(self, offset: int, size: int) -> bytes:
        """See UserBuffer."""
        parts = []
        for address, _, length in pieces(self.hva + offset, size):
            try:
                parts.append(self.mm.read(address, length))
            except DeadlockError:
                raise
            except MmError as error:
                if error.errno != errno.EFAULT:
                    raise
                break
        return b"".join(parts)


class Bytes:
    """A buffer of our own, for tools: ``data`` is what it holds."""

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self.data = bytearray(data)

    def access_ok(self, size: int) -> bool:
        """Always."""
        return True

    def put(self, offset: int, data: bytes) -> int:
        """See UserBuffer."""
        self.data[offset : offset + len(data)] = data
        return len(data)

    def take(self, offset: int, size: int) -> bytes:
        """See UserBuffer."""
        return bytes(self.data[offset : offset + size])
