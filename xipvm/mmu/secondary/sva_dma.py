"""The memory of a DMA engine by shared virtual addressing: what the guest registers is bounds and rights, no more.

Nothing is mapped, pinned or watched for a region: an access in its bounds is an access of the host process, by the
IOTLB of :class:`~xipvm.mmu.secondary.sva.Sva`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from xipvm.errors import MmError
from xipvm.mmu.secondary.sva import Sva


class Region(NamedTuple):
    """Bytes ``[address, address + length)`` of the engine, which are the process's from ``hva`` on."""

    address: int
    length: int
    hva: int
    write: bool


class SvaSpace:
    """Regions by key, for an engine (DmaSpace of devices/rdma.py).

    ``resolve(address, length)`` says which bytes of the process the engine's are, None when they are none.
    """

    def __init__(self, sva: Sva, resolve: Callable[[int, int], int | None]) -> None:
        self.sva = sva
        self.regions: dict[int, Region] = {}
        self._resolve = resolve
        self._last = 0

    @property
    def faults(self) -> int:
        """Page requests."""
        return self.sva.requests

    def register(self, address: int, length: int, *, write: bool) -> int:
        """A region; its key. Raises MmError: EINVAL for nothing, EFAULT for what is no memory."""
        if length <= 0 or address < 0:
            raise MmError(errno.EINVAL, f"{self.sva.name}: {length} bytes at {address:#x}")
        hva = self._resolve(address, length)
        if hva is None:
            raise MmError(errno.EFAULT, f"{self.sva.name}: {length:#x} bytes at {address:#x} are no memory")
        self._last = key = self._last + 1
        self.regions[key] = Region(address, length, hva, write)
        return key

    def deregister(self, key: int) -> None:
        """Forget the region. Raises MmError EINVAL for a key that is none."""
        self._region(key)
        del self.regions[key]

    def _region(self, key: int) -> Region:
        region = self.regions.get(key)
        if region is None:
            raise MmError(errno.EINVAL, f"{self.sva.name}: {key} is the key of no region")
        return region

    def _hva(self, key: int, address: int, size: int, *, write: bool) -> int:
        region = self._region(key)
        offset = address - region.address
        if offset < 0 or offset + size > region.length:
            raise MmError(errno.EFAULT, f"{self.sva.name}: {size} bytes at {address:#x} are not in region {key}")
        if write and not region.write:
            raise MmError(errno.EPERM, f"{self.sva.name}: region {key} is only read")
        return region.hva + offset

    def read(self, key: int, address: int, size: int) -> bytes:
        """``size`` bytes. Raises MmError: EINVAL, EFAULT, ESRCH."""
        return self.sva.load(self._hva(key, address, size, write=False), size)

    def write(self, key: int, address: int, data: bytes) -> None:
        """Put ``data`` there. Raises MmError: as :meth:`read`, and EPERM."""
        self.sva.store(self._hva(key, address, len(data), write=True), data)

    def fetch_add(self, key: int, address: int, value: int) -> int:
        """Add to the aligned 64-bit number at ``address``; what it was. Raises MmError as :meth:`write`."""
        if address % 8:
            raise MmError(errno.EINVAL, f"{self.sva.name}: {address:#x} is not aligned")
        return self.sva.fetch_add(self._hva(key, address, 8, write=True), value)

    def close(self) -> None:
        """Forget all regions. The process stays bound."""
        self.regions.clear()
