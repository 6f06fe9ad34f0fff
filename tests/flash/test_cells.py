"""The cells against a model written from the command table alone, under any sequence of bus cycles.

One lane is a coroutine that takes (word, data, command) and applies confirmed operations to its own words; the
bank's bytes have to be the lanes' words, always. ``data`` and ``command`` are the two readings of a cycle that drives
only part of a chip's lanes.
"""

from __future__ import annotations

from collections.abc import Generator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from xipvm.clock import EventClock
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.geometry import INSTANT, TYPICAL
from xipvm.devices.flash.image import FlashImage

SIZE = 0x1000
SECTOR = 0x400
BUFFER_WORDS = {1: 256, 2: 1024, 4: 512}  # of one chip: 256 or 2048 bytes
ORGANISATIONS = [(4, 2), (4, 1), (2, 2), (1, 1), (4, 4)]

Cycle = tuple[int, int, int]


def lane(cells: list[int], block: int, buffer: int, ones: int) -> Generator[None, Cycle, None]:
    """One chip that is never busy."""
    locked: set[int] = set()
    down: set[int] = set()
    while True:
        _, _, command = yield
        if command in (0x40, 0x10):
            word, data, _ = yield
            if word // block not in locked:
                cells[word] &= data
        elif command == 0xE8:
            _, _, count = yield
            if count >= buffer:
                continue
            pending: list[tuple[int, int]] = []
            while len(pending) <= count:
                word, data, _ = yield
                first = pending[0][0] if pending else word
                if not first <= word <= first + count or word // block != first // block:
                    pending = []
                    break
                pending.append((word, data))
            if not pending:
                continue
            _, _, confirm = yield
            if confirm & 0xFF == 0xD0 and pending[0][0] // block not in locked:
                for word, data in pending:
                    cells[word] &= data
        elif command in (0x20, 0x60, 0xBC):
            word, _, second = yield
            number = word // block
            second &= 0xFF
            if command == 0x20 and second == 0xD0 and number not in locked:
                cells[number * block : (number + 1) * block] = [ones] * block
            elif command == 0x60 and second == 0x01:
                locked.add(number)
            elif command == 0x60 and second == 0xD0 and number not in down:
                locked.discard(number)
            elif command == 0x60 and second == 0x2F:
                locked.add(number)
                down.add(number)


class Model:
    """The lanes of a bank."""

    def __init__(self, width: int, device_width: int) -> None:
        self.width = width
        self.device_width = device_width
        ones = (1 << 8 * device_width) - 1
        lanes = width // device_width
        self.cells = [[ones] * (SIZE // width) for _ in range(lanes)]
        block = SECTOR // width
        buffer = min(BUFFER_WORDS[device_width], block)
        self.lanes = [lane(cells, block, buffer, ones) for cells in self.cells]
        for each in self.lanes:
            next(each)

    def write(self, offset: int, size: int, value: int) -> None:
        bytes_ = dict(enumerate(value.to_bytes(size, "little"), offset))
        for word in sorted({at // self.width for at in bytes_}):
            for number, each in enumerate(self.lanes):
                base = word * self.width + number * self.device_width
                mine = range(base, base + self.device_width)
                data = bytes(bytes_.get(at, 0xFF) for at in mine)
                command = bytes(bytes_[at] for at in mine if at in bytes_)
                if not command:  # the chip sees what the lowest driven chip sees
                    first = min(at for at in bytes_ if at // self.width == word)
                    base = first - first % self.device_width
                    command = bytes(bytes_[at] for at in range(base, base + self.device_width) if at in bytes_)
                # A count cycle takes all of it, every other command cycle its low byte.
                each.send((word, int.from_bytes(data, "little"), Command(int.from_bytes(command, "little"))))

    @property
    def bytes(self) -> bytes:
        words = zip(*self.cells, strict=True)
        return b"".join(cell.to_bytes(self.device_width, "little") for word in words for cell in word)


class Command(int):
    """A command cycle: equal to a command when its low byte is, but counts with all its bits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and int(self) & 0xFF == int(other)

    __hash__ = int.__hash__


offsets = st.one_of(
    st.sampled_from([0, SECTOR, 2 * SECTOR]).flatmap(lambda base: st.integers(0, 6).map(lambda i: base + 4 * i)),
    st.integers(0, 3).map(lambda i: SECTOR - 4 + i),
    st.integers(0, SIZE - 4),
)
commands = st.sampled_from([0xFF, 0x40, 0x10, 0xE8, 0x20, 0xD0, 0x60, 0x01, 0x2F, 0x50, 0x70, 0x90, 0x98, 0xB0, 0xBC])
values = st.one_of(
    commands.map(lambda command: command * 0x0101_0101),
    commands.map(lambda command: command * 0x0001_0001),
    st.integers(0, 4).map(lambda count: count * 0x0101_0101),
    st.integers(0, 4).map(lambda count: count * 0x0001_0001),
    st.integers(0, 0xFFFF_FFFF),
)
noise = st.tuples(offsets, st.sampled_from([4, 4, 4, 2, 1]), values)


@st.composite
def sequences(draw: st.DrawFn, width: int, device_width: int) -> list[tuple[int, int, int]]:
    """Cycles of whole operations, mostly right ones, with noise between and sometimes inside them."""
    lanes = width // device_width

    def every(value: int) -> int:
        return sum(value << 8 * device_width * number for number in range(lanes))

    cycles: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(1, 8))):
        offset = draw(offsets) & -width
        kind = draw(st.sampled_from(["word", "buffer", "erase", "lock", "unlock", "noise", "array"]))
        one: list[tuple[int, int, int]] = []
        data = st.integers(0, (1 << 8 * width) - 1)
        if kind == "word":
            one = [(offset, width, every(0x40)), (offset, width, draw(data))]
        elif kind == "buffer":
            count = draw(st.integers(1, 6))
            one = [(offset, width, every(0xE8)), (offset, width, every(count - 1))]
            one += [((offset + i * width) % SIZE, width, draw(data)) for i in range(count)]
            one += [(offset, width, every(draw(st.sampled_from([0xD0, 0xD0, 0xD0, 0xFF]))))]
        elif kind in ("erase", "lock", "unlock"):
            first, second = {"erase": (0x20, 0xD0), "lock": (0x60, 0x01), "unlock": (0x60, 0xD0)}[kind]
            one = [(offset, width, every(first)), (offset, width, every(second))]
        elif kind == "noise":
            one = draw(st.lists(noise, max_size=5))
        else:
            one = [(0, width, every(0xFF))]
        if one and draw(st.integers(0, 9)) == 0:
            one.insert(draw(st.integers(0, len(one))), draw(noise))
        cycles += one
    return [(offset, size, value & (1 << 8 * size) - 1) for offset, size, value in cycles]


def check(width: int, device_width: int, cycles: list[tuple[int, int, int]]) -> None:
    model = Model(width, device_width)
    with FlashImage.erased(SIZE) as image:
        bank = PflashCfi01(0, image, size=SIZE, sector=SECTOR, width=width, device_width=device_width)
        changed: set[int] = set()

        def on_change(offset: int, size: int) -> None:
            assert not bank.array_mode
            changed.update(range(offset, offset + size))

        bank.on_change = on_change
        before = image.view().tobytes()
        for offset, size, value in cycles:
            changed.clear()
            bank.write(offset, size, value)
            model.write(offset, size, value)
            after = image.view().tobytes()
            assert after == model.bytes
            if after != before:
                assert {at for at in range(SIZE) if after[at] != before[at]} <= changed
            before = after
        assert bank.array_mode is all(chip.mode == "read array" for chip in bank.chips)


@pytest.mark.parametrize(("width", "device_width"), ORGANISATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_cells_are_those_of_the_model(width, device_width, data):
    check(width, device_width, data.draw(sequences(width, device_width)))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "device_width"), ORGANISATIONS)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_cells_are_those_of_the_model_at_length(width, device_width, data):
    check(width, device_width, data.draw(sequences(width, device_width)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    timing=st.sampled_from([INSTANT, TYPICAL]),
    steps=st.lists(
        st.one_of(noise, noise, st.sampled_from([1_000, 50_000, 300_000_000]), st.tuples(offsets, st.just("read"))),
        max_size=60,
    ),
)
def test_no_sequence_raises_and_bits_only_fall_or_whole_words_rise(timing, steps):
    """Whatever a guest writes, at whatever time: no exception, and each cell is programmed or erased, never else."""
    clock = EventClock()
    with FlashImage.erased(SIZE) as image:
        bank = PflashCfi01(0, image, size=SIZE, sector=SECTOR, timing=timing, clock=clock)
        bank.place(0, bytes(i * 37 & 0xFF for i in range(SIZE)))
        before = image.view(width=2).tolist()
        for step in steps:
            if isinstance(step, int):
                clock.advance(step)
            elif step[1] == "read":
                assert 0 <= bank.read(step[0] & -4, 4) <= 0xFFFF_FFFF
                bank.describe()
            else:
                offset, size, value = step
                bank.write(offset, size, value & (1 << 8 * size) - 1)
            after = image.view(width=2).tolist()
            assert all(new & old == new or new == 0xFFFF for old, new in zip(before, after, strict=True))
            before = after
        bank.reset()
        assert bank.array_mode
        assert bank.read(0, 4) == int.from_bytes(image.view(0, 4).tobytes(), "little")
        bank.close()
