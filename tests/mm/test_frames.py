"""Host frames: allocation order, reference counts, poison, bytes, device regions."""

from __future__ import annotations

import ctypes

import pytest

from xipvm.errors import HostMemoryError, InternalError, OutOfFrames
from xipvm.mmu.frames import (
    DEVICE_PFN,
    DEVICE_STEP,
    PG_ANON,
    PG_DEVICE,
    PG_DIRTY,
    PG_RESERVED,
    POISON_FREE,
    HostMemory,
)


@pytest.fixture
def host() -> HostMemory:
    return HostMemory(16 * 4096)


def test_new_frames_ascend_and_freed_ones_come_back_last_first(host: HostMemory) -> None:
    assert [host.alloc() for _ in range(4)] == [1, 2, 3, 4]
    for pfn in (2, 4, 3):
        host.put(pfn)
    assert [host.alloc() for _ in range(5)] == [3, 4, 2, 5, 6]


def test_exhaustion_and_recovery(host: HostMemory) -> None:
    frames = [host.alloc() for _ in range(15)]
    assert host.free_frames == 0
    with pytest.raises(OutOfFrames):
        host.alloc()
    host.put(frames[-1])
    assert host.alloc() == frames[-1]


def test_refcount(host: HostMemory) -> None:
    pfn = host.alloc()
    host.get(pfn)
    assert host.refcount(pfn) == 2
    assert host.put(pfn) is False
    assert host.put(pfn) is True
    assert host.refcount(pfn) == 0
    for broken in (host.put, host.get):
        with pytest.raises(InternalError):
            broken(pfn)
    assert host.free_frames == 15


def test_zero_page_is_reserved(host: HostMemory) -> None:
    assert host.flags(0) & PG_RESERVED
    host.get(0)
    assert host.put(0) is False
    assert host.put(0) is False
    assert host.read(0, 0, 8) == bytes(8)
    with pytest.raises(InternalError):
        host.write(0, 0, b"x")


@pytest.mark.parametrize(("poison", "filled"), [("head", 64), ("frame", 4096)])
def test_freed_frame_is_poisoned_and_zeroed_again(poison: str, filled: int) -> None:
    host = HostMemory(16 * 4096, poison=poison)  # type: ignore[arg-type]
    pfn = host.alloc()
    host.write(pfn, 0, b"\xff" * 4096)
    host.put(pfn)
    assert host.read(pfn, 0, 4096) == bytes([POISON_FREE]) * filled + b"\xff" * (4096 - filled)
    assert host.alloc(zero=True) == pfn
    assert host.read(pfn, 0, 4096) == bytes(4096)


def test_alloc_without_zeroing_shows_what_was_there(host: HostMemory) -> None:
    pfn = host.alloc()
    host.write(pfn, 100, b"left over")
    host.put(pfn)
    assert host.alloc(zero=False) == pfn
    assert host.read(pfn, 100, 9) == b"left over"


def test_freeing_forgets_flags_and_rmap(host: HostMemory) -> None:
    pfn = host.alloc()
    host.set_flags(pfn, PG_ANON | PG_DIRTY)
    host.clear_flags(pfn, PG_DIRTY)
    host.set_rmap(pfn, 7, 42)
    assert host.flags(pfn) & (PG_ANON | PG_DIRTY) == PG_ANON
    assert (host.mapping(pfn), host.index(pfn)) == (7, 42)
    host.put(pfn)
    host.alloc()
    assert host.flags(pfn) & (PG_ANON | PG_DIRTY) == 0
    assert (host.mapping(pfn), host.index(pfn)) == (0, 0)


def test_mapcount_never_negative(host: HostMemory) -> None:
    pfn = host.alloc()
    host.add_mapcount(pfn, 2)
    host.add_mapcount(pfn, -1)
    assert host.mapcount(pfn) == 1
    with pytest.raises(InternalError):
        host.add_mapcount(pfn, -2)


def test_bytes_stay_inside_the_frame(host: HostMemory) -> None:
    pfn = host.alloc()
    host.write(pfn, 4090, b"abcdef")
    assert host.read(pfn, 4090, 6) == b"abcdef"
    for offset, size in ((4090, 7), (-1, 1), (4097, 0)):
        with pytest.raises(IndexError):
            host.read(pfn, offset, size)
    with pytest.raises(IndexError):
        host.write(pfn, 4095, b"ab")
    with pytest.raises(IndexError):
        host.read(16, 0, 1)


def test_view_is_the_memory_at_its_address(host: HostMemory) -> None:
    pfn = host.alloc()
    view = host.view(pfn)
    view[10:14] = b"data"
    assert len(view) == 4096
    assert host.read(pfn, 10, 4) == b"data"
    assert ctypes.string_at(host.arena_address + pfn * 4096 + 10, 4) == b"data"
    assert host.address(pfn) == host.arena_address + pfn * 4096


def test_close_waits_for_views(host: HostMemory) -> None:
    view = host.view(1)
    with pytest.raises(BufferError):
        host.close()
    view.release()
    host.close()
    host.close()
    with pytest.raises(IndexError):
        host.read(1, 0, 1)


def test_meta_view_shares_the_metadata(host: HostMemory) -> None:
    pfn = host.alloc()
    meta = host.meta_view()
    assert meta.shape == (16,)
    assert meta.dtype.itemsize <= 64
    assert meta["refcount"][pfn] == 1
    meta["code_mask"][pfn] = 1
    seen: list[int] = []
    host.watch_code(seen.append)
    host.write(pfn, 0, b"x")
    assert seen == [pfn]


def test_code_hook_runs_before_the_bytes_change(host: HostMemory) -> None:
    pfn, other = host.alloc(), host.alloc()
    host.write(pfn, 0, b"code")
    host.meta_view()["x_mask"][pfn] = 2
    seen: list[bytes] = []
    host.watch_code(lambda frame: seen.append(host.read(frame, 0, 4)))
    host.write(other, 0, b"data")
    assert seen == []
    host.write(pfn, 0, b"new.")
    host.touch(pfn)
    host.copy(other, pfn)
    host.put(pfn)
    assert seen == [b"code", b"new.", b"new.", b"data"]
    host.watch_code(None)
    host.alloc()
    assert len(seen) == 4


def test_device_frames(host: HostMemory) -> None:
    array = ctypes.create_string_buffer(3 * 4096 + 4096)
    address = (ctypes.addressof(array) + 4095) & ~4095
    first = host.add_device(address, 2 * 4096, array)
    second = host.add_device(address + 2 * 4096, 4096, array)
    assert (first, second) == (DEVICE_PFN, DEVICE_PFN + DEVICE_STEP)
    assert host.is_device(first + 1)
    assert not host.is_device(1)
    assert host.flags(first) & PG_DEVICE
    host.write(first + 1, 4, b"flash")
    assert ctypes.string_at(address + 4096 + 4, 5) == b"flash"
    host.get(first)
    assert host.put(first) is False
    assert host.put(first) is False
    with pytest.raises(IndexError):
        host.read(first + 2, 0, 1)
    host.remove_device(first)
    with pytest.raises(IndexError):
        host.read(first, 0, 1)
    host.write(second, 0, b"x")
    with pytest.raises(IndexError):
        host.remove_device(first)


def test_device_regions_are_limited_and_aligned(host: HostMemory) -> None:
    array = ctypes.create_string_buffer(2 * 4096)
    address = (ctypes.addressof(array) + 4095) & ~4095
    for _ in range(16):
        host.add_device(address, 4096, array)
    with pytest.raises(HostMemoryError):
        host.add_device(address, 4096, array)
    for bad in ((address + 1, 4096), (address, 100), (address, 0)):
        with pytest.raises(ValueError, match="whole pages"):
            host.add_device(*bad, array)


@pytest.mark.parametrize("size", [0, -4096, 4096, 5000, 1 << 40])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(HostMemoryError) as error:
        HostMemory(size)
    assert error.value.wanted == size


def test_unknown_poison() -> None:
    with pytest.raises(ValueError, match="poison"):
        HostMemory(1 << 20, poison="tail")  # type: ignore[arg-type]
