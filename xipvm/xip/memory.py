"""Memory that the CPU can address, behind a file of the host: where XIP file systems live.

The device has room for ``reserve`` bytes of addresses, and its frames have their numbers for good. What of it the file
does not fill is memory of zeros that nobody keeps: a translation that should have been dropped hits that, and not the
end of the process. ``resize`` follows the file's size.

Stores are in the file at once, also when the process dies; the host's kernel writes them to its disk when it likes, or
at ``sync``. ``private``: they are gone with the run, and the file is never resized.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Pfn, page_up
from xipvm.host_mapping import MAP_FIXED, MAP_NORESERVE, map_memory, sync_memory, unmap_memory

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory


class XipMemory:
    """The device behind the open file ``fd``, in ``host``. ``size`` and ``reserve`` are bytes, whole pages.

    Raises OSError. :meth:`close` it when nothing maps its frames any more; ``fd`` stays the caller's.
    """

    def __init__(self, host: HostMemory, fd: int, size: int, *, reserve: int = 0, private: bool = False) -> None:
        self.host = host
        self.reserve = page_up(max(reserve, size, PAGE_SIZE))
        self.size = 0
        self.private = private
        self._fd = fd
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.address = map_memory(None, self.reserve, mmap.PROT_READ | mmap.PROT_WRITE, anonymous)
        """Host pointer to the first byte."""
        self.first = Pfn(-1)
        """Its first frame."""
        try:
            self.resize(size)
            self.first = Pfn(host.add_device(self.address, self.reserve, self))
        except BaseException:
            self._unmap()
            raise

    def resize(self, size: int) -> None:
        """The file has ``size`` bytes, or will have none behind them when the caller is done. Raises OSError."""
        size = page_up(size)
        if size > self.reserve:
            raise ValueError(f"a device with room for {self.reserve:#x} bytes cannot have {size:#x}")
        prot, keep = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE if self.private else mmap.MAP_SHARED
        if size > self.size:
            at = self.size
            map_memory(self.address + at, size - at, prot, keep | MAP_FIXED | MAP_NORESERVE, self._fd, at)
        elif size < self.size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
            map_memory(self.address + size, self.size - size, prot, flags)
        self.size = size

    def pfn(self, page: int) -> Pfn:
        """The frame of page ``page`` of the device."""
        return Pfn(self.first + page)

    def page(self, pfn: int) -> int:
        """The page of the device that frame ``pfn`` is."""
        return pfn - self.first

    @property
    def pages(self) -> int:
        """How many pages the file fills."""
        return self.size >> PAGE_SHIFT

    def sync(self) -> None:
        """Waits until the host's kernel has written the file. Raises OSError."""
        if self.size and not self.private:
            sync_memory(self.address, self.size)

    def close(self) -> None:
        """Gives the frames back. A second call does nothing."""
        if self.address:
            self.host.remove_device(self.first)
            self._unmap()

    def _unmap(self) -> None:
        address, self.address = self.address, 0
        unmap_memory(address, self.reserve)
