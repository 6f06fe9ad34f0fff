"""pflash_cfi01: a bank of Intel/Sharp NOR chips side by side on one bus.

A bank word is ``width`` bytes; chip ``i`` is on byte lanes ``[i * device_width, (i + 1) * device_width)`` of it and
sees nothing but them. A driver that wants all chips to act writes its command to every lane; one that does
not gets chips in different states, as on a board.

A write that is narrower than the bank is still a cycle of every chip, as they share WE# and have no byte
enables: a command is taken from the lanes that are driven and seen by all chips, as on buses that replicate
narrow data; of data, bytes that are not driven are ones and program nothing. So firmware that takes a bank of
two x16 chips for one x16 chip works (U-Boot on QEMU's virt boards does), and each chip stays in step. Accesses
that are wider than the bank, or cross one of its words, are several cycles, lowest address first.

While every chip reads its array (``array_mode``) the machine lets the guest read and execute the bytes at ``address``
directly. The order in which it hears of changes:

1. ``on_leave_array()`` before the first chip leaves array mode: unmap, flush. The guest reads cells until it returns.
2. The chips act; reads and writes come to :meth:`PflashCfi01.read` and :meth:`PflashCfi01.write`.
3. ``on_change(offset, length)`` right after cells changed, once per bus cycle and range: drop translated code.
4. ``on_enter_array()`` after the last chip is back in array mode: map again.

Cells change by single stores of a chip's word that clear bits, or by filling with 0xFF, so an image cut off
at any instant holds what a chip could hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from xipvm.devices.flash.chip import ARRAY, Chip, Clock
from xipvm.devices.flash.geometry import INSTANT, ChipGeometry, Timing
from xipvm.devices.flash.image import FlashImage
from xipvm.devices.flash.mapping import in_words
from xipvm.errors import FlashImageError
from xipvm.trace.funnel import Trace

Lanes = tuple[int, list[tuple[Chip, int, int]]]
"""Ones on the lanes that a narrow write does not drive; for each chip (shift, mask) of its command in the value."""

_PLACE_PIECE = 4096


class EventClock(Clock, Protocol):
    """A clock that calls back."""

    def call_at(self, ns: int, fn: Callable[[], None]) -> Any:
        """Call ``fn`` at ``ns`` virtual time; returns what :meth:`cancel` takes."""

    def cancel(self, call: Any) -> None:
        """Take a call back."""


def _nothing() -> None:
    pass


def _no_change(offset: int, length: int) -> None:
    pass


class PflashCfi01:
    """Bank ``index``: ``size`` bytes of ``image`` from ``offset``, in sectors of ``sector`` bytes (all chips together).

    ``width`` is the bank's and ``device_width`` one chip's data bus in bytes. ``timing`` other than INSTANT needs a
    ``clock``. Raises ValueError for a geometry that chips cannot have.
    """

    def __init__(
        self,
        index: int,
        image: FlashImage,
        *,
        size: int,
        sector: int,
        offset: int = 0,
        width: int = 4,
        device_width: int = 2,
        ids: tuple[int, int] = (0x89, 0x18),
        timing: Timing = INSTANT,
        clock: EventClock | None = None,
        trace: Trace | None = None,
        powerup_locked: bool = False,
    ) -> None:
        if width not in (1, 2, 4) or device_width not in (1, 2, 4) or device_width > width:
            raise ValueError(f"flash bank {index}: width {width}, device width {device_width}; each is 1, 2 or 4 bytes")
        lanes = width // device_width
        geometry = ChipGeometry(size // lanes, sector // lanes, device_width)
        if geometry.size * lanes != size or geometry.block * lanes != sector:
            raise ValueError(f"flash bank {index}: {lanes} chips cannot share {size} bytes in sectors of {sector}")
        self.index = index
        self.name = f"flash{index}"
        self.image = image
        self.address = image.address + offset
        """Host pointer to the bank's cells."""
        self.size = size
        self.sector = sector
        self.width = width
        self.device_width = device_width
        self.array_mode = True
        """Every chip reads its array: reads may go straight to the cells."""
        self.on_leave_array: Callable[[], None] = _nothing
        self.on_enter_array: Callable[[], None] = _nothing
        self.on_change: Callable[[int, int], None] = _no_change
        self.programs = 0
        """Program operations that were carried out; those of chips that act together count once."""
        self.erases = 0
        """Sectors erased, likewise."""
        self.errors = 0
        """Commands that were refused or failed, of each chip."""
        self.chips = tuple(
            Chip(
                geometry,
                self,
                lane=lane,
                ids=ids,
                timing=timing,
                clock=clock,
                readonly=image.readonly,
                powerup_locked=powerup_locked,
            )
            for lane in range(lanes)
        )
        self._trace = trace if trace is not None else Trace()
        self._clock = clock
        self._call: Any = None
        self._call_at: int | None = None
        self._timed = timing != INSTANT
        self._bytes = image.view(offset, size)
        self._cells = image.view(offset, size, device_width)
        self._erased = b"\xff" * sector
        self._shift = width.bit_length() - 1
        self._lane_bits = 8 * device_width
        self._lane_mask = (1 << self._lane_bits) - 1
        self._lane_table: dict[tuple[int, int], Lanes] = {}
        # What chips did in this bus cycle, by range of chip words: operations on equal ranges are one to the outside.
        self._programmed: dict[tuple[int, int], bool] = {}
        self._erasing: dict[tuple[int, int, bool], list[int]] = {}

    # The bus.

    def read(self, offset: int, size: int) -> int:
        """What a read cycle gives: cells, status, identifiers or query data, lane by lane."""
        if self.array_mode:
            return int.from_bytes(self._bytes[offset : offset + size], "little")
        if self._call is not None:
            self._tick()
        if size != self.width or offset & (size - 1):
            return self._read_part(offset, size)
        return self._read_word(offset >> self._shift)

    def write(self, offset: int, size: int, value: int) -> None:
        """A write cycle: commands, addresses and data for the chips on the lanes it drives."""
        if self._call is not None:
            self._tick()
        if size != self.width or offset & (size - 1):
            self._write_part(offset, size, value)
            return
        if self.array_mode:
            self._before(value)
        word = offset >> self._shift
        bits = self._lane_bits
        mask = self._lane_mask
        for chip in self.chips:
            chip.cycle(word, value & mask)
            value >>= bits
        if self._programmed or self._erasing:
            self._settle()
        if self._timed or chip.mode is ARRAY:
            self._after()

    def _before(self, value: int) -> None:
        """A full bus word comes in array mode: say so when it ends that."""
        for chip in self.chips:
            if chip.leaves_array(value):
                self._leave()
                return
            value >>= self._lane_bits

    def _leave(self) -> None:
        self.on_leave_array()
        self.array_mode = False

    def _after(self) -> None:
        """Chips have acted: report what they did to cells, arm the clock, and note when all read their arrays."""
        if self._programmed or self._erasing:
            self._settle()
        if self._timed:
            self._arm()
        if not self.array_mode and all(chip.mode is ARRAY for chip in self.chips):
            self.array_mode = True
            self.on_enter_array()

    def _read_word(self, word: int) -> int:
        value = 0
        shift = 0
        index = word * len(self.chips)
        for chip in self.chips:
            value |= (self._cells[index] if chip.mode is ARRAY else chip.read(word)) << shift
            index += 1
            shift += self._lane_bits
        return value

    def _read_part(self, offset: int, size: int) -> int:
        """A read of some bytes of a bank word, or of several words."""
        first = offset & (self.width - 1)
        here = self._read_word(offset >> self._shift) >> 8 * first
        room = self.width - first
        if size <= room:
            return here & (1 << 8 * size) - 1
        return here | self._read_part(offset + room, size - room) << 8 * room

    def _write_part(self, offset: int, size: int, value: int) -> None:
        """A write of some bytes of a bank word, or of several words."""
        first = offset & (self.width - 1)
        room = self.width - first
        if size > room:
            self._write_part(offset, room, value & (1 << 8 * room) - 1)
            self._write_part(offset + room, size - room, value >> 8 * room)
            return
        undriven, lanes = self._lane_table.get((first, size)) or self._lanes(first, size)
        if self.array_mode:
            for chip, shift, mask in lanes:
                if chip.leaves_array(value >> shift & mask):
                    self._leave()
                    break
        word = offset >> self._shift
        data = value << 8 * first | undriven
        for chip, shift, mask in lanes:
            if chip.takes_data:
                chip.cycle(word, data >> self._lane_bits * chip.lane & self._lane_mask)
            else:
                chip.cycle(word, value >> shift & mask)
        if self._programmed or self._erasing:
            self._settle()
        if self._timed or chip.mode is ARRAY:
            self._after()

    def _lanes(self, first: int, size: int) -> Lanes:
        """How a write of ``size`` bytes from lane ``first`` reaches the chips."""
        commands: list[tuple[int, int] | None] = []
        for chip in self.chips:
            start = max(first, chip.lane * self.device_width)
            stop = min(first + size, (chip.lane + 1) * self.device_width)
            commands.append((8 * (start - first), (1 << 8 * (stop - start)) - 1) if start < stop else None)
        lowest = next(filter(None, commands))
        driven = ((1 << 8 * size) - 1) << 8 * first
        lanes = [(chip, *(command or lowest)) for chip, command in zip(self.chips, commands, strict=True)]
        self._lane_table[first, size] = known = (1 << 8 * self.width) - 1 & ~driven, lanes
        return known

    # Cells: what chips ask for.

    def program(self, chip: Chip, words: list[tuple[int, int]]) -> None:
        """AND the words into the cells, one store each."""
        cells = self._cells
        lanes = len(self.chips)
        lane = chip.lane
        changed = False
        for word, data in words:
            index = word * lanes + lane
            old = cells[index]
            if old & data != old:
                cells[index] = old & data
                changed = True
        key = (word, word + 1) if len(words) == 1 else (min(words)[0], max(words)[0] + 1)
        if changed or key not in self._programmed:
            self._programmed[key] = changed

    def erase(self, chip: Chip, first: int, end: int, done: bool) -> None:
        """Note that the words become ones; chips that erase the same ones are erased together."""
        self._erasing.setdefault((first, end, done), []).append(chip.lane)

    def blank(self, chip: Chip, first: int, end: int) -> bool:
        """Whether the chip's words are all ones."""
        lanes = len(self.chips)
        part = self._cells[first * lanes + chip.lane : end * lanes : lanes]
        return part.tobytes() == self._erased[: (end - first) * self.device_width]

    def failed(self, chip: Chip, word: int, what: str) -> None:
        """Count and trace a failure."""
        self.errors += 1
        if self._trace.on:
            self._trace.emit("flash_error", bank=self.index, offset=word * self.width, what=f"chip {chip.lane}: {what}")

    def mode_changed(self, chip: Chip) -> None:
        """Trace it."""
        if self._trace.on:
            self._trace.emit("flash_mode", bank=self.index, chip=chip.lane, mode=chip.mode, array=chip.mode is ARRAY)

    def _settle(self) -> None:
        """Carry out erases, then report every range once."""
        width = self.width
        trace = self._trace
        if self._programmed:
            programmed, self._programmed = self._programmed, {}
            for (first, end), changed in programmed.items():
                offset, size = first * width, (end - first) * width
                self.programs += 1
                if trace.on:
                    trace.emit("flash_program", bank=self.index, offset=offset, size=size)
                if changed:
                    self.on_change(offset, size)
        if self._erasing:
            erasing, self._erasing = self._erasing, {}
            for (first, end, done), lanes in erasing.items():
                offset, size = first * width, (end - first) * width
                changed = self._fill(offset, size, lanes)
                if done:
                    self.erases += 1
                    if trace.on:
                        trace.emit("flash_erase", bank=self.index, offset=offset, size=size)
                if changed:
                    self.on_change(offset, size)

    def _fill(self, offset: int, size: int, lanes: list[int]) -> bool:
        """Set the cells of some lanes in a range to ones; False when they were."""
        part = self._bytes[offset : offset + size]
        ones = self._erased[:size]
        # Comparing copies, as comparing views goes byte by byte; not writing keeps pages clean and unshared ones few.
        if part.tobytes() == ones:
            return False
        if len(lanes) == len(self.chips):
            part[:] = ones
            return True
        ones = ones[: size // len(self.chips)]
        words = in_words(memoryview(ones), self.device_width)
        first = offset // self.device_width
        end = first + size // self.device_width
        changed = False
        for lane in lanes:
            cells = self._cells[first + lane : end : len(self.chips)]
            if cells.tobytes() != ones:
                cells[:] = words
                changed = True
        return changed

    # Time.

    def _tick(self) -> None:
        """Let operations end whose time has come."""
        for chip in self.chips:
            chip.tick()
        self._after()

    def _timer(self) -> None:
        trace = self._trace
        actor, trace.actor = trace.actor, self.name
        self._call = self._call_at = None
        try:
            self._tick()
        finally:
            trace.actor = actor

    def _arm(self) -> None:
        """Have one call waiting for the chip that is done first."""
        first = min((chip.deadline for chip in self.chips if chip.deadline is not None), default=None)
        if first == self._call_at:
            return
        assert self._clock is not None  # chips with busy times have one
        if self._call is not None:
            self._clock.cancel(self._call)
            self._call = None
        self._call_at = first
        if first is not None:
            self._call = self._clock.call_at(first, self._timer)

    # The host's side.

    def place(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put ``data`` into the cells as a programming adapter would, before the guest runs.

        Bytes that are right already are not written. Raises FlashImageError when ``data`` does not fit, or
        differs from a readonly image.
        """
        source = bytes(data)
        path = self.image.path or self.name
        if not 0 <= offset <= offset + len(source) <= self.size:
            end = offset + len(source)
            raise FlashImageError(path, f"[{offset:#x}, {end:#x}) is outside the bank of {self.size:#x} bytes")
        if self.image.readonly and self._bytes[offset : offset + len(source)].tobytes() != source:
            raise FlashImageError(path, f"readonly, and differs from what belongs at {offset:#x}")
        for start in range(0, len(source), _PLACE_PIECE):
            piece = source[start : start + _PLACE_PIECE]
            at = offset + start
            if self._bytes[at : at + len(piece)].tobytes() != piece:
                self._bytes[at : at + len(piece)] = piece
                self.on_change(at, len(piece))

    def reset(self) -> None:
        """Reset every chip; what runs is cut off and the bank reads its array."""
        for chip in self.chips:
            chip.reset()
        self._after()

    def close(self) -> None:
        """Take back the waiting call. The image stays open; its owner closes it."""
        if self._call is not None and self._clock is not None:
            self._clock.cancel(self._call)
        self._call = self._call_at = None

    def describe(self) -> str:
        """The state of each chip: ``chip 0: read status, SR=0x80; chip 1: ...``."""
        return "; ".join(f"chip {chip.lane}: {chip.describe()}" for chip in self.chips)
