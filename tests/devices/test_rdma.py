"""The DMA engine's registers: what a transfer does, how long it takes, how it ends."""

from __future__ import annotations

import errno

import pytest

from xipvm.clock import EventClock
from xipvm.devices import rdma
from xipvm.devices.bus import Bus
from xipvm.devices.rdma import Rdma
from xipvm.errors import MmError

BASE = 0x1000_0000
SIZE = 0x4000


class Space:
    """Bytes without pages; region n begins at n * SIZE."""

    def __init__(self) -> None:
        self.memory = bytearray(8 * SIZE)
        self.regions: dict[int, tuple[int, int, bool]] = {}
        self.faults = 7
        self.refuse: list[int] = []
        """Errors of the next accesses."""

    def register(self, address: int, length: int, *, write: bool) -> int:
        if not length:
            raise MmError(errno.EINVAL, "empty")
        key = len(self.regions) + 1
        self.regions[key] = address, length, write
        return key

    def deregister(self, key: int) -> None:
        if key not in self.regions:
            raise MmError(errno.EINVAL, "no key")
        del self.regions[key]

    def _check(self, key: int, address: int, size: int, write: bool) -> None:
        if self.refuse:
            raise MmError(self.refuse.pop(), "refused")
        start, length, may = self.regions.get(key, (0, 0, False))
        assert address // 4096 == (address + size - 1) // 4096
        if key not in self.regions:
            raise MmError(errno.EINVAL, "no key")
        if address < start or address + size > start + length:
            raise MmError(errno.EFAULT, "outside")
        if write and not may:
            raise MmError(errno.EPERM, "read only")

    def read(self, key: int, address: int, size: int) -> bytes:
        self._check(key, address, size, False)
        return bytes(self.memory[address : address + size])

    def write(self, key: int, address: int, data: bytes) -> None:
        self._check(key, address, len(data), True)
        self.faults += 1
        self.memory[address : address + len(data)] = data

    def fetch_add(self, key: int, address: int, value: int) -> int:
        old = int.from_bytes(self.read(key, address, 8), "little")
        self.write(key, address, (old + value).to_bytes(8, "little"))
        return old

    def close(self) -> None:
        self.regions.clear()


class World:
    def __init__(self) -> None:
        self.space, self.clock, self.bus = Space(), EventClock(), Bus()
        self.levels: list[bool] = []
        self.device = Rdma(self.space, self.clock, self.levels.append)
        self.bus.map(BASE, 0x1000, self.device)

    def set(self, register: int, value: int) -> None:
        self.bus.write(BASE + register, 4, value)

    def get(self, register: int) -> int:
        return self.bus.read(BASE + register, 4)

    def register(self, address: int, length: int, write: bool = True) -> int:
        self.bus.write(BASE + rdma.ADDRESS, 8, address)
        self.bus.write(BASE + rdma.LENGTH, 8, length)
        self.set(rdma.ACCESS, write)
        self.set(rdma.COMMAND, rdma.REGISTER)
        return self.get(rdma.KEY)

    def begin(
        self, operation: int, size: int, source: tuple[int, int] = (0, 0), target: tuple[int, int] = (0, 0)
    ) -> None:
        for register, key_register, (address, key) in (
            (rdma.SOURCE, rdma.SOURCE_KEY, source),
            (rdma.TARGET, rdma.TARGET_KEY, target),
        ):
            self.bus.write(BASE + register, 8, address)
            self.set(key_register, key)
        self.set(rdma.SIZE, size)
        self.set(rdma.DOORBELL, operation)

    def finish(self) -> tuple[int, int, int]:
        self.clock.advance(1_000_000)
        return self.get(rdma.STATUS), self.get(rdma.ERROR), self.get(rdma.BYTES)


@pytest.fixture
def world() -> World:
    return World()


def test_it_says_what_it_is(world: World) -> None:
    assert world.get(rdma.ID) == rdma.IDENTITY
    world.set(rdma.ID, 1)
    assert [world.get(register) for register in (rdma.ID, rdma.STATUS, rdma.ERROR, 0x200)] == [rdma.IDENTITY, 0, 0, 0]


def test_copy(world: World) -> None:
    source, target = world.register(0, SIZE, write=False), world.register(SIZE, SIZE)
    assert (source, target) == (1, 2)
    assert world.space.regions == {1: (0, SIZE, False), 2: (SIZE, SIZE, True)}
    world.space.memory[100:9100] = bytes(range(250)) * 36
    world.begin(rdma.COPY, 9000, (100, source), (SIZE + 5, target))
    assert world.get(rdma.STATUS) == rdma.BUSY
    assert world.finish() == (rdma.DONE, 0, 9000)
    assert world.space.memory[SIZE + 5 : SIZE + 9005] == world.space.memory[100:9100]
    assert world.get(rdma.FAULTS) == world.space.faults - 7 > 0


def test_a_copy_takes_its_time(world: World) -> None:
    key = world.register(0, 2 * SIZE)
    world.begin(rdma.COPY, 8192, (0, key), (SIZE, key))
    world.clock.advance(500 + 4096 // 8 - 1)
    assert world.get(rdma.BYTES) == 0
    world.clock.advance(1)
    assert world.get(rdma.BYTES) == 4096
    world.clock.advance(500 + 4096 // 8)
    assert (world.get(rdma.BYTES), world.get(rdma.STATUS)) == (8192, rdma.DONE)


def test_fill_and_add(world: World) -> None:
    key = world.register(0, SIZE)
    world.set(rdma.VALUE, 0x0403_0201)
    world.begin(rdma.FILL, 4100, target=(8, key))
    assert world.finish() == (rdma.DONE, 0, 4100)
    assert world.space.memory[:4116] == bytes(8) + bytes([1, 2, 3, 4]) * 1025 + bytes(8)
    world.set(rdma.VALUE, 5)
    world.begin(rdma.ADD, 0, target=(8, key))
    assert world.finish() == (rdma.DONE, 0, 8)
    assert (world.get(rdma.RESULT), world.get(rdma.RESULT + 4)) == (0x0403_0201, 0x0403_0201)
    assert world.space.memory[8:16] == bytes([6, 2, 3, 4, 1, 2, 3, 4])


def test_nothing_to_do(world: World) -> None:
    world.begin(rdma.COPY, 0)
    assert world.finish() == (rdma.DONE, 0, 0)


@pytest.mark.parametrize(
    ("operation", "size", "target", "error"),
    [
        (rdma.COPY, 64, (SIZE, 9), errno.EINVAL),
        (rdma.COPY, 64, (SIZE, 1), errno.EPERM),
        (rdma.COPY, 64, (4 * SIZE, 2), errno.EFAULT),
        (rdma.FILL, 6, (SIZE, 2), errno.EINVAL),
        (rdma.FILL, 8, (SIZE + 2, 2), errno.EINVAL),
        (99, 8, (SIZE, 2), errno.EINVAL),
    ],
)
def test_errors(world: World, operation: int, size: int, target: tuple[int, int], error: int) -> None:
    key = world.register(0, 2 * SIZE, write=False)
    assert world.register(SIZE, SIZE) == 2
    world.begin(operation, size, (0, key), target)
    assert world.finish() == (rdma.FAILED, error, 0)


def test_it_says_how_far_it_came(world: World) -> None:
    key = world.register(0, 4096)
    world.begin(rdma.FILL, 4096, target=(2048, key))
    assert world.finish() == (rdma.FAILED, errno.EFAULT, 2048)


def test_a_page_that_changes_all_the_time_is_tried_again(world: World) -> None:
    key = world.register(0, SIZE)
    world.space.refuse = [errno.EDEADLK, errno.EBUSY]
    world.begin(rdma.FILL, 8, target=(0, key))
    assert world.finish() == (rdma.DONE, 0, 8)


def test_one_at_a_time(world: World) -> None:
    key = world.register(0, SIZE)
    world.begin(rdma.FILL, 8, target=(0, key))
    world.begin(rdma.FILL, 16, target=(64, key))
    assert world.get(rdma.ERROR) == errno.EBUSY
    assert world.finish() == (rdma.DONE, 0, 8)
    assert world.space.memory[64:80] == bytes(16)


def test_commands(world: World) -> None:
    world.set(rdma.COMMAND, 7)
    assert world.get(rdma.ERROR) == errno.EINVAL
    assert world.register(0, 0) == 0
    assert world.get(rdma.ERROR) == errno.EINVAL
    key = world.register(0, 8)
    assert world.get(rdma.ERROR) == 0
    world.set(rdma.KEY, key)
    world.set(rdma.COMMAND, rdma.FORGET)
    assert (world.get(rdma.ERROR), world.space.regions) == (0, {})
    world.set(rdma.COMMAND, rdma.FORGET)
    assert world.get(rdma.ERROR) == errno.EINVAL


def test_the_interrupt(world: World) -> None:
    world.begin(rdma.COPY, 0)
    world.finish()
    assert not world.levels[-1]
    world.set(rdma.IRQ_ENABLE, 1)
    assert world.levels[-1]
    world.set(rdma.STATUS, rdma.DONE)
    assert not world.levels[-1]
    world.begin(99, 0)
    assert world.levels[-1]
    world.set(rdma.STATUS, rdma.FAILED)
    assert not world.levels[-1]


def test_reset_in_the_middle(world: World) -> None:
    key = world.register(0, 2 * SIZE)
    world.set(rdma.IRQ_ENABLE, 1)
    world.begin(rdma.COPY, 8192, (0, key), (SIZE, key))
    world.clock.advance(1100)
    world.device.reset()
    assert world.clock.next_deadline() is None
    assert [world.get(register) for register in (rdma.STATUS, rdma.BYTES, rdma.KEY, rdma.FAULTS)] == [0, 0, 0, 0]
    assert world.space.regions == {}
