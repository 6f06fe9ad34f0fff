"""A file as a process has it open: a position, flags, and the calls read, write, ftruncate and lseek."""

from __future__ import annotations

import errno
import os
from resource import RLIM_INFINITY
from typing import TYPE_CHECKING

from xipvm.errors import MmError
from xipvm.xip.buffer import Bytes, MmBuffer, UserBuffer

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.xip.filemap import XipFile


class OpenFile:
    """``file``, opened with ``flags`` (``os.O_*``). ``pos`` is the file position, bytes.

    ``fsize`` is RLIMIT_FSIZE of the process, bytes, as ``resource.getrlimit`` has it; it may change. The process
    ignores SIGXFSZ, and gets EFBIG; it is one of 64 bits, which has O_LARGEFILE in any case.
    """

    def __init__(self, file: XipFile, flags: int = os.O_RDWR, *, fsize: int = RLIM_INFINITY) -> None:
        self.file = file
        self.flags = flags
        self.fsize = fsize
        self.pos = 0

    def read(self, mm: Mm, hva: int, count: int) -> int:
        """read(2) into the memory of ``mm``. Raises MmError."""
        self._may(os.O_WRONLY)
        done = self.file.read(MmBuffer(mm, hva), count, self.pos)
        self.pos += done
        return done

    def write(self, mm: Mm, hva: int, count: int) -> int:
        """write(2) from the memory of ``mm``. Raises MmError."""
        return self._write(MmBuffer(mm, hva), count)

    def get(self, count: int) -> bytes:
        """read(2) into bytes of our own. Raises MmError."""
        self._may(os.O_WRONLY)
        buffer = Bytes()
        self.pos += self.file.read(buffer, count, self.pos)
        return bytes(buffer.data)

    def put(self, data: bytes) -> int:
        """write(2) of ``data``. Raises MmError."""
        return self._write(Bytes(data), len(data))

    def _write(self, buffer: UserBuffer, count: int) -> int:
        self._may(os.O_RDONLY)
        append = bool(self.flags & os.O_APPEND)
        done, self.pos = self.file.write(buffer, count, self.pos, append=append, limit=self.fsize)
        return done

    def truncate(self, size: int) -> None:
        """ftruncate(2) to ``size`` bytes. Raises MmError, EINVAL where it is not open for writing."""
        if self.flags & os.O_ACCMODE == os.O_RDONLY:
            raise MmError(errno.EINVAL, f"{self.file.name} is not open for that")
        self.file.truncate(size, limit=self.fsize)

    def lseek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """lseek(2) to ``offset`` from the beginning, the position or the end. Raises MmError EINVAL."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.pos, os.SEEK_END: self.file.size}.get(whence)
        if base is None or base + offset < 0:
            raise MmError(errno.EINVAL, f"lseek({offset}, {whence}) of {self.file.name}")
        self.pos = base + offset
        return self.pos

    def _may(self, wrong: int) -> None:
        if self.flags & os.O_ACCMODE == wrong:
            raise MmError(errno.EBADF, f"{self.file.name} is not open for that")
