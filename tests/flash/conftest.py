"""A bank to drive, and a driver for it that knows nothing of the model: only the bus and the CFI documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from xipvm.clock import EventClock
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.image import FlashImage
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

KIB = 1024
SIZE = 256 * KIB
SECTOR = 16 * KIB


@dataclass
class Rig:
    """A small bank (two x16 chips unless told otherwise), what it told the host, and its trace."""

    bank: PflashCfi01
    image: FlashImage
    clock: EventClock
    trace: Trace
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def array(self) -> bytes:
        return self.image.view().tobytes()

    def kinds(self, *kinds: str) -> list[dict[str, Any]]:
        return [event.fields for event in self.events if event.kind in kinds]

    def both(self, command: int) -> int:
        """A command on every lane of the bank."""
        bits = 8 * self.bank.device_width
        return sum(command << bits * lane for lane in range(len(self.bank.chips)))

    def write(self, offset: int, value: int) -> None:
        self.bank.write(offset, self.bank.width, value)

    def read(self, offset: int = 0) -> int:
        return self.bank.read(offset, self.bank.width)

    def command(self, offset: int, *commands: int) -> None:
        for command in commands:
            self.write(offset, self.both(command))


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(image: FlashImage | None = None, **options: Any) -> Rig:
        size = options.pop("size", SIZE)
        clock = EventClock()
        trace = Trace(lambda: clock.now)
        image = image or FlashImage.erased(size)
        bank = PflashCfi01(
            0, image, size=size, sector=options.pop("sector", SECTOR), clock=clock, trace=trace, **options
        )
        rig = Rig(bank, image, clock, trace)
        trace.attach(rig.events.append)
        bank.on_leave_array = lambda: rig.calls.append(("leave", bank.array_mode, [c.mode for c in bank.chips]))
        bank.on_enter_array = lambda: rig.calls.append(("enter", bank.array_mode, [c.mode for c in bank.chips]))
        bank.on_change = lambda offset, size: rig.calls.append(("change", offset, size))
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.bank.close()
        rig.image.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


class FlashError(Exception):
    """The driver saw error bits; ``status`` is each chip's status register."""

    def __init__(self, status: list[int]) -> None:
        super().__init__(" ".join(f"{sr:#04x}" for sr in status))
        self.status = status


class Driver:
    """Probes and uses a flash bank the way firmware does, over read(offset, size) and write(offset, size, value)."""

    def __init__(self, bus: PflashCfi01, width: int, *, idle: Callable[[], None] = lambda: None) -> None:
        self.bus = bus
        self.width = width
        self.idle = idle
        self.chip_width = 0
        self.query: list[int] = []

    @property
    def lanes(self) -> int:
        return self.width // self.chip_width

    def replicate(self, value: int) -> int:
        return sum(value << 8 * self.chip_width * lane for lane in range(self.lanes))

    def split(self, value: int) -> list[int]:
        mask = (1 << 8 * self.chip_width) - 1
        return [value >> 8 * self.chip_width * lane & mask for lane in range(self.lanes)]

    def put(self, offset: int, command: int) -> None:
        self.bus.write(offset, self.width, self.replicate(command))

    def get(self, offset: int) -> int:
        return self.bus.read(offset, self.width)

    def probe(self) -> None:
        """Find the width of the chips and read their query table. Raises LookupError when there are none."""
        chip_width = 1
        while chip_width <= self.width:
            self.chip_width = chip_width
            self.put(0, 0xF0)
            self.put(0, 0xFF)
            self.put(0x55 * self.width, 0x98)
            found = all(self.get((0x10 + i) * self.width) == self.replicate(byte) for i, byte in enumerate(b"QRY"))
            if found:
                self.query = [self.get(i * self.width) & 0xFF for i in range(0x60)]
            self.put(0, 0xF0)
            self.put(0, 0xFF)
            if found:
                return
            chip_width *= 2
        raise LookupError("no CFI flash")

    def word(self, index: int) -> int:
        return self.query[index] | self.query[index + 1] << 8

    @property
    def size(self) -> int:
        return (1 << self.query[0x27]) * self.lanes

    @property
    def sector(self) -> int:
        return self.word(0x2F) * 256 * self.lanes

    @property
    def buffer(self) -> int:
        return (1 << self.word(0x2A)) * self.lanes

    def identify(self) -> tuple[int, int]:
        self.put(0, 0x90)
        ids = self.get(0), self.get(self.width)
        self.put(0, 0xFF)
        assert all(value == self.replicate(value & 0xFF) for value in ids)
        return ids[0] & 0xFF, ids[1] & 0xFF

    def wait(self) -> None:
        """Poll until every chip is ready, check for errors, go back to read array."""
        for _ in range(100_000):
            status = self.split(self.get(0))
            if all(sr & 0x80 for sr in status):
                break
            self.idle()
        else:
            raise TimeoutError
        if any(sr & 0x3A for sr in status):
            self.put(0, 0x50)
            self.put(0, 0xFF)
            raise FlashError(status)
        self.put(0, 0xFF)

    def erase(self, offset: int) -> None:
        self.put(offset, 0x20)
        self.put(offset, 0xD0)
        self.wait()

    def program_word(self, offset: int, value: int) -> None:
        self.put(offset, 0x40)
        self.bus.write(offset, self.width, value)
        self.wait()

    def program_buffer(self, offset: int, data: bytes) -> None:
        """At most ``buffer`` bytes inside one buffer window."""
        count = len(data) // self.width
        self.put(offset, 0xE8)
        assert all(sr & 0x80 for sr in self.split(self.get(offset)))
        self.put(offset, count - 1)
        for i in range(0, len(data), self.width):
            self.bus.write(offset + i, self.width, int.from_bytes(data[i : i + self.width], "little"))
        self.put(offset, 0xD0)
        self.wait()

    def program(self, offset: int, data: bytes) -> None:
        """Whole bank words, by buffers aligned to their windows."""
        while data:
            part = self.buffer - offset % self.buffer
            self.program_buffer(offset, data[:part])
            offset += part
            data = data[part:]

    def lock(self, offset: int, confirm: int = 0x01) -> None:
        self.put(offset, 0x60)
        self.put(offset, confirm)
        self.wait()

    def unlock(self, offset: int) -> None:
        self.lock(offset, 0xD0)

    def locks(self, offset: int) -> list[int]:
        self.put(offset, 0x90)
        bits = self.split(self.get(offset + 2 * self.width))
        self.put(offset, 0xFF)
        return bits

    def read(self, offset: int, size: int) -> bytes:
        return b"".join(self.get(offset + i).to_bytes(self.width, "little") for i in range(0, size, self.width))


@pytest.fixture
def driver_error() -> type[FlashError]:
    return FlashError


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    def make(rig: Rig, *, idle_ns: int = 0) -> Driver:
        driver = Driver(rig.bank, rig.bank.width, idle=lambda: rig.clock.advance(idle_ns))
        driver.probe()
        return driver

    return make


@pytest.fixture
def driver(rig: Rig, make_driver: Callable[..., Driver]) -> Driver:
    return make_driver(rig)
