"""The bytes behind flash banks: erased memory, or an image file.

==============  =====================================  ====================================
source          mapping                                what a run changes
==============  =====================================  ====================================
no file         private, reads 0xFF                    is gone with the run
a file          shared                                 is in the file at once
``snapshot``    private                                is gone with the run
``readonly``    private, not writable                  nothing: chips report a locked block
==============  =====================================  ====================================

A file is locked while it is open: exclusively, or shared for snapshot and readonly runs (image_file.py). What is
stored through a shared mapping survives the death of the process.

Everything that can go wrong goes wrong when the image is opened, as :class:`FlashImageError`: a file with
holes gets its blocks there and then, because a full disk shows only as SIGBUS once it is mapped.
"""

from __future__ import annotations

import errno
import os
from types import TracebackType

from xipvm.address import format_size
from xipvm.devices.flash.mapping import Mapping, in_words, map_erased, map_file
from xipvm.errors import FlashImageError, os_reason
from xipvm.image_file import close_image, open_image


class FlashImage:
    """Flash bytes at a fixed host address; several banks may lie behind one another in one image."""

    def __init__(self, memory: Mapping, *, path: str | None, fd: int, private: bool, readonly: bool) -> None:
        self.address = memory.address
        """Host pointer to the first byte; fixed until :meth:`close`."""
        self.size = memory.size
        """Bytes."""
        self.path = path
        """The file, None for erased memory."""
        self.private = private
        """Changes do not reach the file."""
        self.readonly = readonly
        """No cell can change."""
        self._memory = memory
        self._fd = fd
        self._views: list[memoryview] = []
        self._closed = False

    @classmethod
    def erased(cls, size: int) -> FlashImage:
        """Private memory, all 0xFF. Raises FlashImageError when the host has no room."""
        try:
            memory = map_erased(size)
        except OSError as error:
            raise FlashImageError("erased flash", f"no room for {format_size(size)}: {os_reason(error)}") from None
        return cls(memory, path=None, fd=-1, private=True, readonly=False)

    @classmethod
    def open(cls, path: str, size: int, *, snapshot: bool = False, readonly: bool = False) -> FlashImage:
        """Map the file ``path`` of exactly ``size`` bytes and lock it. Raises FlashImageError."""
        private = snapshot or readonly
        fd = open_image(path, FlashImageError, writable=not private, shared=private)
        try:
            length = os.fstat(fd).st_size
            if length != size:
                raise FlashImageError(path, f"has {length} bytes, the flash has {size} ({format_size(size)})")
            if not private:
                _fill_holes(fd, path, size)
            try:
                memory = map_file(fd, size, shared=not private, writable=not readonly)
            except OSError as error:
                raise FlashImageError(path, f"cannot be mapped: {os_reason(error)}") from None
        except BaseException:
            close_image(fd)
            raise
        return cls(memory, path=path, fd=fd, private=private, readonly=readonly)

    def view(self, offset: int = 0, size: int | None = None, width: int = 1) -> memoryview:
        """``size`` bytes from ``offset`` in units of ``width`` (1, 2 or 4) bytes; :meth:`close` releases it.

        Not writable when the image is readonly. Whoever writes through it tells whoever executes from it.
        """
        end = self.size if size is None else offset + size
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"[{offset:#x}, {end:#x}) is outside a flash image of {self.size:#x} bytes")
        view = self._memory.bytes[offset:end]
        self._views.append(in_words(view, width))
        return self._views[-1]

    def revert(self) -> None:
        """Forget every change since the image was opened. Raises ValueError for a persistent one.

        Whoever executes from it has to be told by the caller.
        """
        if not self.private:
            raise ValueError(f"{self.path} is written to at once; only a private image can be reverted")
        self._memory.drop_private()

    def close(self) -> None:
        """Unmap and unlock; the views that were given out raise ValueError from now on. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for view in self._views:
            view.release()
        self._memory.close()
        if self._fd >= 0:
            close_image(self._fd)

    def __enter__(self) -> FlashImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _fill_holes(fd: int, path: str, size: int) -> None:
    """Give a sparse file its blocks. Raises FlashImageError when the disk has none left."""
    if os.fstat(fd).st_blocks * 512 >= size:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # Compressing file systems make every file look sparse, and cannot allocate ahead.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise FlashImageError(path, f"no room for its {format_size(size)}: {os_reason(error)}") from None
