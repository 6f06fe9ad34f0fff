"""An RDMA-like DMA engine: it copies between memory regions that the guest registers, without anybody pinning them.

The guest registers a range of its memory, which gives it a key, and then has bytes of regions copied, filled or added
to. The engine looks every page up when it comes there, by whoever provides its memory (:class:`DmaSpace`); pages move,
are swapped and copied meanwhile as the host likes.

Registers are 32 bits wide, at offsets from the base; addresses are guest physical:

======  ============  ==============================================================================================
offset  name          what it is
======  ============  ==============================================================================================
0x00    ID            reads 0x4d44_4150
0x04    STATUS        BUSY 1: a transfer goes on. DONE 2, ERROR 4: how the last one ended; writing a bit clears it
0x08    ERROR         Linux errno of the last transfer or command that failed, 0 when it did not
0x0c    IRQ_ENABLE    1: the interrupt line is DONE or ERROR
0x10    ADDRESS       of a region to be registered; 0x14 has its upper half
0x18    LENGTH        its length in bytes; 0x1c has the upper half
0x20    ACCESS        1: the engine may write there, 0: only read
0x24    COMMAND       1: register; KEY is its key then. 2: forget the region KEY. Done when the write is
0x28    KEY           see COMMAND
0x30    SOURCE        where a transfer reads; 0x34 has the upper half
0x38    SOURCE_KEY
0x40    TARGET        where it writes; 0x44 has the upper half
0x48    TARGET_KEY
0x4c    SIZE          bytes
0x50    VALUE         of FILL, the word that is repeated (TARGET and SIZE are multiples of 4); of ADD, what is added
0x54    DOORBELL      1 COPY, 2 FILL, 3 ADD: VALUE to the 64-bit number at TARGET, atomically. Begins the transfer;
                      ERROR is EBUSY (16) when one goes on
0x58    RESULT        of ADD, the number that was there; 0x5c has the upper half
0x60    BYTES         bytes that were done, also of a transfer that failed
0x64    FAULTS        pages that the engine had to ask for, since power-on
======  ============  ==============================================================================================

A transfer is done page by page; a page of n bytes takes 500 + n / 8 ns. Source and target may not overlap unless they
are equal. Errors: EINVAL (a key that is none, a bad operation), EFAULT (outside of the region, or no memory), EPERM
(no right to write), ENOMEM (the host has no frame).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from xipvm.address import PAGE_MASK, PAGE_SIZE
from xipvm.devices.device import IrqLine, no_line
from xipvm.errors import MmError

if TYPE_CHECKING:
    from xipvm.clock import Call, EventClock

IDENTITY: Final = 0x4D44_4150

ID: Final = 0x00
STATUS: Final = 0x04
ERROR: Final = 0x08
IRQ_ENABLE: Final = 0x0C
ADDRESS: Final = 0x10
LENGTH: Final = 0x18
ACCESS: Final = 0x20
COMMAND: Final = 0x24
KEY: Final = 0x28
SOURCE: Final = 0x30
SOURCE_KEY: Final = 0x38
TARGET: Final = 0x40
TARGET_KEY: Final = 0x48
SIZE: Final = 0x4C
VALUE: Final = 0x50
DOORBELL: Final = 0x54
RESULT: Final = 0x58
BYTES: Final = 0x60
FAULTS: Final = 0x64

BUSY, DONE, FAILED = 1, 2, 4
REGISTER, FORGET = 1, 2
COPY, FILL, ADD = 1, 2, 3

_WORD: Final = 0xFFFF_FFFF
_PLAIN: Final = frozenset({IRQ_ENABLE, ACCESS, KEY, SOURCE_KEY, TARGET_KEY, SIZE, VALUE})
_WIDE: Final = frozenset({ADDRESS, LENGTH, SOURCE, TARGET})
_START_NS: Final = 500
_BYTES_A_NS: Final = 8


class DmaSpace(Protocol):
    """Memory as the engine reaches it. All of it raises MmError; a read or write lies in one page."""

    @property
    def faults(self) -> int:
        """Pages that had to be asked for."""

    def register(self, address: int, length: int, *, write: bool) -> int:
        """A region; its key."""

    def deregister(self, key: int) -> None:
        """Forgets it."""

    def read(self, key: int, address: int, size: int) -> bytes:
        """Bytes of a region."""

    def write(self, key: int, address: int, data: bytes) -> None:
        """Puts them there."""

    def fetch_add(self, key: int, address: int, value: int) -> int:
        """Adds to a 64-bit number; what it was."""

    def close(self) -> None:
        """Forgets all regions."""


class Rdma:
    """The engine over ``space``; ``irq`` is its interrupt."""

    name = "rdma"

    def __init__(self, space: DmaSpace, clock: EventClock, irq: IrqLine = no_line) -> None:
        self._space = space
        self._clock = clock
        self._irq = irq
        self._call: Call | None = None
        self._operations: dict[int, Callable[[int], int]] = {COPY: self._copy, FILL: self._fill, ADD: self._add}
        self.reset()

    def reset(self) -> None:
        """Power-on: no transfer, no region."""
        if self._call is not None:
            self._clock.cancel(self._call)
            self._call = None
        self._space.close()
        self._registers = dict.fromkeys((*_PLAIN, *_WIDE, *(low + 4 for low in _WIDE)), 0)
        self._first_fault = self._space.faults
        self._status = self._error = self._result = self._bytes = 0
        self._irq(False)

    # ---- registers

    def read(self, offset: int, size: int) -> int:
        """Registers are words."""
        if offset == ID:
            return IDENTITY
        if offset == STATUS:
            return self._status
        if offset == ERROR:
            return self._error
        if offset == BYTES:
            return self._bytes
        if offset == FAULTS:
            return (self._space.faults - self._first_fault) & _WORD
        if offset in (RESULT, RESULT + 4):
            return self._result >> 8 * (offset - RESULT) & _WORD
        return self._registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are words; those of a transfer that goes on can be written, for the next one."""
        if offset in self._registers:
            self._registers[offset] = value
        elif offset == STATUS:
            self._status &= ~(value & (DONE | FAILED))
        elif offset == COMMAND:
            self._command(value)
        elif offset == DOORBELL:
            self._begin(value)
        self._interrupt()

    def _wide(self, low: int) -> int:
        return self._registers[low] | self._registers[low + 4] << 32

    def _interrupt(self) -> None:
        self._irq(bool(self._registers[IRQ_ENABLE] & 1 and self._status & (DONE | FAILED)))

    def _command(self, command: int) -> None:
        registers = self._registers
        try:
            if command == REGISTER:
                write = bool(registers[ACCESS] & 1)
                registers[KEY] = self._space.register(self._wide(ADDRESS), self._wide(LENGTH), write=write)
            elif command == FORGET:
                self._space.deregister(registers[KEY])
            else:
                raise MmError(errno.EINVAL, f"{self.name}: command {command:#x}")
        except MmError as error:
            self._error = error.errno
        else:
            self._error = 0

    # ---- transfers

    def _begin(self, operation: int) -> None:
        if self._status & BUSY:
            self._error = errno.EBUSY
            return
        self._status, self._error, self._bytes = BUSY, 0, 0
        registers = self._registers
        self._operation = operation
        self._source, self._source_key = self._wide(SOURCE), registers[SOURCE_KEY]
        self._target, self._target_key = self._wide(TARGET), registers[TARGET_KEY]
        self._size, self._value = registers[SIZE], registers[VALUE]
        if operation not in self._operations or (operation == FILL and (self._target | self._size) & 3):
            self._end(errno.EINVAL)
        else:
            self._wait()

    def _wait(self) -> None:
        """The next page will be done by then."""
        self._call = self._clock.call_at(self._clock.now + _START_NS + self._step() // _BYTES_A_NS, self._go_on)

    def _step(self) -> int:
        """How many bytes are done at a time: as far as the first page of both sides goes."""
        if self._operation == ADD:
            return 8
        done = self._bytes
        left = min(self._size - done, PAGE_SIZE - (self._target + done & ~PAGE_MASK))
        return min(left, PAGE_SIZE - (self._source + done & ~PAGE_MASK)) if self._operation == COPY else left

    def _go_on(self) -> None:
        self._call = None
        try:
            step = self._step()
            self._bytes += self._operations[self._operation](step) if step else 0
        except MmError as error:
            if error.errno in (errno.EDEADLK, errno.EBUSY):  # the page is being changed all the time: another try
                self._wait()
            else:
                self._end(error.errno)
            return
        if self._operation != ADD and self._bytes < self._size:
            self._wait()
        else:
            self._end(0)

    def _end(self, error: int) -> None:
        self._status, self._error = FAILED if error else DONE, error
        self._interrupt()

    def _copy(self, step: int) -> int:
        data = self._space.read(self._source_key, self._source + self._bytes, step)
        self._space.write(self._target_key, self._target + self._bytes, data)
        return step

    def _fill(self, step: int) -> int:
        self._space.write(self._target_key, self._target + self._bytes, self._value.to_bytes(4, "little") * (step // 4))
        return step

    def _add(self, step: int) -> int:
        self._result = self._space.fetch_add(self._target_key, self._target, self._value)
        return step
