"""The command state machine of one Intel/Sharp (command set 0x0001) NOR chip.

The chip sees bus cycles: a word address and the data on its own lane. It knows commands, status, locks and
times; the cells belong to the bank, which is told what to do to them. Two things are separate, as in
the next-state tables of StrataFlash datasheets (P30 306666 figure 37, L30 figure 29):

* ``mode``, what a read gives: array, status, identifier or query. A command that starts a program, erase or
  lock sequence selects status, and status stays selected until a read command comes.
* what the next write means: a command, the second cycle of a sequence, a word for the buffer, or, while an
  operation runs, hardly anything.

========  =================================  ================================================================
command   cycles                             effect
========  =================================  ================================================================
FF        1                                  read array
70        1                                  read status
90        1                                  read identifier: 0 maker, 1 device, block base + 2 lock bits
98        1                                  read query
50        1                                  clear SR5 SR4 SR3 SR1; mode and SR7 stay
40 10     data                               program one word: cells AND data
E8        count-1, count words, D0           program a buffer of words of one block, at most ``buffer`` bytes
20        D0                                 erase the block of the *second* address, not before it
BC        D0                                 blank check: SR5 when the block is not erased
60        01, D0, 2F, 03                     lock, unlock, lock down the block of the second address; set RCR
B0        1                                  suspend the running operation; nothing when none runs
D0        1                                  resume what was suspended last; nothing when nothing is
00 F0     1                                  nothing: what probing drivers send to chips of other makers
========  =================================  ================================================================

Anything else sets SR5 and SR4 and changes nothing else. A wrong second cycle, a count that is too large
and a buffer word outside ``[start, start + count)`` or its block do the same and end the sequence. A running
operation obeys B0 only. While an erase is suspended, other blocks can be programmed, read and locked; while a
program is suspended the array can only be read.

Cells change when an operation is done, except that an erase that is suspended has erased the first part
of its block, in proportion to its time. Locks are those of a chip whose WP# is low: lock-down lasts until
reset. They are not kept in the image; all blocks are unlocked at power-up unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xipvm.devices.flash.geometry import INSTANT, ChipGeometry, Timing
from xipvm.devices.flash.query import query_table

READY = 0x80
"""SR7: no operation runs."""
ERASE_SUSPENDED = 0x40
"""SR6."""
ERASE_ERROR = 0x20
"""SR5."""
PROGRAM_ERROR = 0x10
"""SR4."""
PROGRAM_SUSPENDED = 0x04
"""SR2."""
BLOCK_LOCKED = 0x02
"""SR1: the block is locked, or the image is readonly."""
SEQUENCE_ERROR = ERASE_ERROR | PROGRAM_ERROR

ARRAY = "read array"
STATUS = "read status"
IDENTIFIER = "read id"
QUERY = "read query"

LOCKED = 1
LOCKED_DOWN = 2

_LEAVES_ARRAY = frozenset({0x70, 0x90, 0x98, 0x40, 0x10, 0xE8, 0x20, 0xBC, 0x60})

PROGRAM = "program"
ERASE = "erase"
BLANK_CHECK = "blank check"


class Clock(Protocol):
    """What flash needs of the machine's clock: virtual time in ns."""

    @property
    def now(self) -> int:
        """Virtual time, ns."""


class Cells(Protocol):
    """Where a chip's operations take effect; all addresses are words of the chip, ranges half-open."""

    def program(self, chip: Chip, words: list[tuple[int, int]]) -> None:
        """AND each (address, data) into the cells."""

    def erase(self, chip: Chip, first: int, end: int, done: bool) -> None:
        """Set the words to ones; ``done`` unless more of the block is to come."""

    def blank(self, chip: Chip, first: int, end: int) -> bool:
        """Whether every bit of the words is one."""

    def failed(self, chip: Chip, word: int, what: str) -> None:
        """A command at ``word`` was refused or failed."""

    def mode_changed(self, chip: Chip) -> None:
        """``chip.mode`` is a different one."""


@dataclass(slots=True)
class Operation:
    """A program, erase or blank check on its way. ``left`` is its remaining time in ns while it does not run."""

    kind: str
    word: int
    total: int
    left: int
    words: list[tuple[int, int]]


class Chip:
    """One chip on lane ``lane`` of a bank. ``ids`` are its maker and device codes."""

    def __init__(
        self,
        geometry: ChipGeometry,
        cells: Cells,
        *,
        lane: int = 0,
        ids: tuple[int, int] = (0x89, 0x18),
        timing: Timing = INSTANT,
        clock: Clock | None = None,
        readonly: bool = False,
        powerup_locked: bool = False,
    ) -> None:
        if clock is None and timing != INSTANT:
            raise ValueError("flash with busy times needs a clock")
        self.geometry = geometry
        self.lane = lane
        self.ids = ids
        self.timing = timing
        self.readonly = readonly
        self.powerup_locked = powerup_locked
        self.deadline: int | None = None
        """When the running operation ends or stands still, None when none runs."""
        self._cells = cells
        self._clock = clock
        self._query = query_table(geometry)
        self._block_words = geometry.block // geometry.width
        self._block_shift = self._block_words.bit_length() - 1
        self._buffer_words = geometry.buffer // geometry.width
        self._quick = not timing.word_program and not readonly
        self._word_mask = (1 << 8 * geometry.width) - 1
        self.mode = ARRAY
        """What a read gives: ARRAY, STATUS, IDENTIFIER or QUERY."""
        self._power_up()

    def reset(self) -> None:
        """RP# or power-up: array mode, no errors, locks as at power-up; a running operation is cut off."""
        if self._running is not None and self._running.kind == ERASE:
            self._erase_so_far(self._running, self._time_left())
        self._power_up()
        self._set_mode(ARRAY)

    def _power_up(self) -> None:
        self.locks = bytearray((LOCKED if self.powerup_locked else 0,) * self.geometry.blocks)
        """Lock bits by block: LOCKED, LOCKED_DOWN."""
        self.read_configuration = 0xBFCF
        self.deadline = None
        self._errors = 0
        self._ends = 0
        self._running: Operation | None = None
        self._suspended: list[Operation] = []
        self._left = 0
        self._buffer_start: int | None = None
        self._buffer_end = 0
        self._buffer: list[tuple[int, int]] = []
        self.cycle: Callable[[int, int], None] = self._command
        """Takes the next write cycle: (word address, data of this lane)."""
        self.takes_data = False
        """The next write cycle is data for cells, not a command."""

    # Reading.

    @property
    def status(self) -> int:
        """The status register."""
        status = self._errors if self._running is not None else self._errors | READY
        for operation in self._suspended:
            status |= PROGRAM_SUSPENDED if operation.kind == PROGRAM else ERASE_SUSPENDED
        return status

    def read(self, word: int) -> int:
        """The word that a read cycle gives in any mode but ARRAY."""
        if self.mode is STATUS:
            return self.status
        block, index = divmod(word, self._block_words)
        if self.mode is QUERY and word < len(self._query):
            return self._query[word]
        if index == 2:
            return self.locks[block]
        if self.mode is IDENTIFIER:
            if index < 2:
                return self.ids[index]
            if index == 5:
                return self.read_configuration & self._word_mask
        return 0

    def leaves_array(self, data: int) -> bool:
        """Whether a chip that reads its array would no longer do so after the write cycle ``data``."""
        command = data & 0xFF
        return command in _LEAVES_ARRAY or (command == 0xD0 and bool(self._suspended))

    # Writing: one method for each meaning of the next cycle; `self.cycle` is the one in force.

    def _command(self, word: int, data: int) -> None:
        command = _COMMANDS.get(data & 0xFF)
        if command is None:
            self._fail(word, SEQUENCE_ERROR, f"unknown command {data & 0xFF:#04x}")
        else:
            command(self, word)

    def _read_array(self, word: int) -> None:
        self._set_mode(ARRAY)

    def _read_status(self, word: int) -> None:
        self._set_mode(STATUS)

    def _read_identifier(self, word: int) -> None:
        self._set_mode(IDENTIFIER)

    def _read_query(self, word: int) -> None:
        self._set_mode(QUERY)

    def _clear_status(self, word: int) -> None:
        self._errors = 0

    def _ignore(self, word: int) -> None:
        pass

    def _resume(self, word: int) -> None:
        if self._suspended:
            self._set_mode(STATUS)
            self._run(self._suspended.pop())

    def _program_setup(self, word: int) -> None:
        self._set_mode(STATUS)
        self.cycle = self._program_data
        self.takes_data = True
        if self._suspended:
            self._refuse(word, "program", PROGRAM)

    def _buffer_setup(self, word: int) -> None:
        self._set_mode(STATUS)
        self.cycle = self._buffer_count
        if self._suspended:
            self._refuse(word, "buffered program", PROGRAM)

    def _erase_setup(self, word: int) -> None:
        self._set_mode(STATUS)
        self.cycle = self._erase_confirm
        if self._suspended:
            self._refuse(word, "block erase", PROGRAM, ERASE)

    def _blank_setup(self, word: int) -> None:
        self._set_mode(STATUS)
        self.cycle = self._blank_confirm
        if self._suspended:
            self._refuse(word, "blank check", PROGRAM, ERASE)

    def _lock_setup(self, word: int) -> None:
        self._set_mode(STATUS)
        self.cycle = self._lock_confirm
        if self._suspended:
            self._refuse(word, "lock", PROGRAM)

    def _refuse(self, word: int, what: str, *kinds: str) -> None:
        """Do not begin a sequence while an operation of one of the ``kinds`` is suspended."""
        for operation in self._suspended:
            if operation.kind in kinds:
                # The second cycle is swallowed: D0 there must not resume what is suspended.
                self.cycle = self._swallow
                self.takes_data = False
                self._fail(word, SEQUENCE_ERROR, f"{what} while {operation.kind} is suspended")

    def _swallow(self, word: int, data: int) -> None:
        self.cycle = self._command

    def _program_data(self, word: int, data: int) -> None:
        self.takes_data = False
        if self._quick and not self._suspended and not self.locks[word >> self._block_shift]:
            # What _program comes to: thousands of these in a row are all that a driver without buffered program does.
            self.cycle = self._command
            self._cells.program(self, [(word, data)])
        else:
            self._program([(word, data)], self.timing.word_program)

    def _buffer_count(self, word: int, data: int) -> None:
        if data >= self._buffer_words:
            self._botch(word, f"buffered program of {data + 1} words, the buffer has {self._buffer_words}")
            return
        self._left = data + 1
        self._buffer_start = None
        self._buffer = []
        self.cycle = self._buffer_data
        self.takes_data = True

    def _buffer_data(self, word: int, data: int) -> None:
        start = self._buffer_start
        if start is None:
            self._buffer_start = word
            self._buffer_end = min(word + self._left, (word | (self._block_words - 1)) + 1)
        elif not start <= word < self._buffer_end:
            self._botch(word, "buffered program outside its block or count")
            return
        self._buffer.append((word, data))
        self._left -= 1
        if not self._left:
            self.cycle = self._buffer_confirm
            self.takes_data = False

    def _buffer_confirm(self, word: int, data: int) -> None:
        if data & 0xFF != 0xD0:
            self._botch(word, f"buffered program not confirmed but {data & 0xFF:#04x}")
        else:
            self._program(self._buffer, self.timing.buffer_program)
        self._buffer = []

    def _erase_confirm(self, word: int, data: int) -> None:
        if data & 0xFF != 0xD0:
            self._botch(word, f"block erase not confirmed but {data & 0xFF:#04x}")
        elif not self._protected(word, ERASE_ERROR, "block erase"):
            self._start(ERASE, word & -self._block_words, self.timing.block_erase, [])

    def _blank_confirm(self, word: int, data: int) -> None:
        if data & 0xFF != 0xD0:
            self._botch(word, f"blank check not confirmed but {data & 0xFF:#04x}")
        else:
            self._start(BLANK_CHECK, word & -self._block_words, 0, [])

    def _lock_confirm(self, word: int, data: int) -> None:
        command = data & 0xFF
        block = word >> self._block_shift
        self.cycle = self._command
        if command == 0x01:
            self.locks[block] |= LOCKED
        elif command == 0x2F:
            self.locks[block] |= LOCKED | LOCKED_DOWN
        elif command == 0xD0:
            if self.locks[block] & LOCKED_DOWN:
                self._fail(word, 0, "unlock of a block that is locked down")
            else:
                self.locks[block] &= ~LOCKED
        elif command == 0x03:
            self.read_configuration = word & 0xFFFF
        else:
            self._botch(word, f"lock sequence with {command:#04x}")

    def _busy(self, word: int, data: int) -> None:
        command = data & 0xFF
        if command == 0xB0:
            self._suspend()
        elif command not in (0x70, 0xD0):  # drivers repeat these to chips that may be done already
            self._fail(word, 0, f"command {command:#04x} while busy")

    # Operations.

    def _program(self, words: list[tuple[int, int]], time: int) -> None:
        """Start programming; the words are in one block."""
        word = words[0][0]
        if self._protected(word, PROGRAM_ERROR, "program"):
            return
        for operation in self._suspended:
            if (operation.word ^ word) >> self._block_shift == 0:
                self.cycle = self._command
                self._fail(word, PROGRAM_ERROR, "program of a block whose erase is suspended")
                return
        self._start(PROGRAM, word, time, words)

    def _protected(self, word: int, error: int, what: str) -> bool:
        """Whether the block of ``word`` may not change; then the operation has failed."""
        locked = self.locks[word >> self._block_shift] & LOCKED
        if not locked and not self.readonly:
            return False
        self.cycle = self._command
        self._fail(word, error | BLOCK_LOCKED, f"{what} of a locked block" if locked else f"{what} of a readonly image")
        return True

    def _start(self, kind: str, word: int, time: int, words: list[tuple[int, int]]) -> None:
        """Start an operation; without a busy time it is done at once."""
        if time:
            self._run(Operation(kind, word, time, time, words))
        else:
            self._finish(kind, word, words)

    def _run(self, operation: Operation) -> None:
        """Let ``operation`` go on for the time it has left."""
        self._running = operation
        self._ends = self._now() + operation.left
        self.deadline = self._ends
        self.cycle = self._busy

    def _finish(self, kind: str, word: int, words: list[tuple[int, int]]) -> None:
        self._running = None
        self.deadline = None
        self.cycle = self._command
        if kind is PROGRAM:
            self._cells.program(self, words)
        elif kind is ERASE:
            self._cells.erase(self, word, word + self._block_words, True)
        elif not self._cells.blank(self, word, word + self._block_words):
            self._errors |= ERASE_ERROR

    def _suspend(self) -> None:
        """Stand still after the suspend latency, unless the operation is done before."""
        self.deadline = min(self._ends, self._now() + self.timing.suspend)
        self.tick()

    def tick(self) -> None:
        """Let the running operation end or stand still when its time has come."""
        deadline = self.deadline
        operation = self._running
        if operation is None or deadline is None or self._now() < deadline:
            return
        if deadline == self._ends:
            self._finish(operation.kind, operation.word, operation.words)
            return
        operation.left = self._ends - deadline
        if operation.kind == ERASE:
            self._erase_so_far(operation, operation.left)
        self._suspended.append(operation)
        self._running = None
        self.deadline = None
        self.cycle = self._command

    def _erase_so_far(self, operation: Operation, left: int) -> None:
        words = self._block_words * (operation.total - left) // operation.total
        if words:
            self._cells.erase(self, operation.word, operation.word + words, False)

    def _time_left(self) -> int:
        return max(self._ends - self._now(), 0)

    def _now(self) -> int:
        assert self._clock is not None  # only an operation with a busy time asks, and __init__ wants a clock for those
        return self._clock.now

    def _botch(self, word: int, what: str) -> None:
        """End a sequence with a command sequence error."""
        self.cycle = self._command
        self.takes_data = False
        self._fail(word, SEQUENCE_ERROR, what)

    def _fail(self, word: int, errors: int, what: str) -> None:
        self._errors |= errors
        self._cells.failed(self, word, what)

    def _set_mode(self, mode: str) -> None:
        if mode is not self.mode:
            self.mode = mode
            self._cells.mode_changed(self)

    def describe(self) -> str:
        """Mode, status and what the chip is in the middle of: ``read status, SR=0x80``."""
        parts = [self.mode, f"SR={self.status:#04x}"]
        if self.cycle == self._program_data:
            parts.append("program setup")
        elif self.cycle == self._buffer_count:
            parts.append("buffered program setup")
        elif self.cycle == self._buffer_data:
            loaded = len(self._buffer)
            parts.append(f"{loaded} of {loaded + self._left} buffer words")
        elif self.cycle == self._buffer_confirm:
            parts.append(f"{len(self._buffer)} buffer words not confirmed")
        elif self.cycle == self._erase_confirm:
            parts.append("erase setup")
        elif self.cycle == self._lock_confirm:
            parts.append("lock setup")
        elif self.cycle == self._blank_confirm:
            parts.append("blank check setup")
        if self._running is not None:
            parts.append(f"{self._running.kind} of {self._where(self._running)} runs")
        parts += [f"{operation.kind} of {self._where(operation)} suspended" for operation in self._suspended]
        return ", ".join(parts)

    def _where(self, operation: Operation) -> str:
        if operation.kind == PROGRAM:
            return f"word {operation.word:#x}"
        return f"block {operation.word >> self._block_shift}"


_COMMANDS: dict[int, Callable[[Chip, int], None]] = {
    0xFF: Chip._read_array,
    0x70: Chip._read_status,
    0x90: Chip._read_identifier,
    0x98: Chip._read_query,
    0x50: Chip._clear_status,
    0x40: Chip._program_setup,
    0x10: Chip._program_setup,
    0xE8: Chip._buffer_setup,
    0x20: Chip._erase_setup,
    0xBC: Chip._blank_setup,
    0x60: Chip._lock_setup,
    0xB0: Chip._ignore,
    0xD0: Chip._resume,
    0x00: Chip._ignore,
    0xF0: Chip._ignore,
}
