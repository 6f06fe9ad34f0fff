"""HTIF, the host-target interface of RISC-V test programs: the words ``tohost`` and ``fromhost`` in RAM.

The device takes the place of the page or pages that hold the two symbols, and is plain storage everywhere
else in them. A command is 64 bits, (device << 56 | command << 48 | payload), and counts when its upper half
is written, for a 64-bit store arrives lower half first. Some programs store 32 bits only, for ever: ``_PATIENCE`` of
virtual time after the first lower half that stands alone, what is there then counts. A command that was taken is
cleared.

Device 0 is the system call proxy: payload bit 0 set ends the run with status payload >> 1; otherwise the
payload is the address of a call block (number, three arguments, 64 bits each), of which write to the
console and exit are done and all others answered with -ENOSYS. Device 1 command 1 prints a character.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from xipvm.clock import Call, EventClock
from xipvm.console import Console

_PATIENCE = 1000  # ns
_LONG = 0xFFFF_FFFF_FFFF_FFFF
_SYS_WRITE = 64
_SYS_EXIT = 93
_PROXY = 0
_TERMINAL = 1
_PUTCHAR = 1


class PhysicalMemory(Protocol):
    """Guest memory by guest physical address."""

    def read(self, gpa: int, size: int) -> bytes | None:
        """Bytes, None where there is no memory."""

    def write(self, gpa: int, data: bytes) -> bool:
        """Whether there was memory to write to."""


class Htif:
    """``size`` bytes of storage with ``tohost`` and ``fromhost`` (offsets, 8-byte aligned) in them."""

    name = "htif"

    def __init__(
        self,
        size: int,
        tohost: int,
        fromhost: int | None,
        *,
        clock: EventClock,
        console: Console,
        memory: PhysicalMemory,
        exit: Callable[[str, int], None],
    ) -> None:
        for offset in (tohost, fromhost):
            if offset is not None and (offset % 8 or not 0 <= offset < size):
                raise ValueError(f"HTIF word at offset {offset:#x} of {size:#x} bytes")
        self.storage = bytearray(size)
        self._tohost = tohost
        self._fromhost = fromhost
        self._clock = clock
        self._console = console
        self._memory = memory
        self._exit = exit
        self._waiting: Call | None = None

    def reset(self, data: bytes) -> None:
        """Power-on: the storage holds ``data``, which is as long as it, and no command waits."""
        self.storage[:] = data
        if self._waiting is not None:
            self._clock.cancel(self._waiting)
            self._waiting = None

    def over(self, base: int, gpa: int, data: bytes) -> bytes:
        """``data`` of guest memory from ``gpa`` on, with what the device at ``base`` shows in its place."""
        first = max(base, gpa)
        end = min(base + len(self.storage), gpa + len(data))
        if first >= end:
            return data
        return data[: first - gpa] + bytes(self.storage[first - base : end - base]) + data[end - gpa :]

    def read(self, offset: int, size: int) -> int:
        """Storage."""
        return int.from_bytes(self.storage[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Storage; see the module for ``tohost``."""
        self.storage[offset : offset + size] = value.to_bytes(size, "little")
        if offset + size <= self._tohost or offset >= self._tohost + 8:
            return
        if offset + size > self._tohost + 4:
            if self._waiting is not None:
                self._clock.cancel(self._waiting)
            self._command()
        elif self._waiting is None:  # a program that stores again and again must not put it off for ever
            self._waiting = self._clock.call_at(self._clock.now + _PATIENCE, self._command)

    def _command(self) -> None:
        self._waiting = None
        command = self.read(self._tohost, 8)
        if command == 0:
            return
        self.storage[self._tohost : self._tohost + 8] = bytes(8)
        device, kind, payload = command >> 56, command >> 48 & 0xFF, command & 0xFFFF_FFFF_FFFF
        if device == _PROXY and kind == 0:
            if payload & 1:
                self._exit("htif exit", payload >> 1)
            else:
                self._proxy(payload)
        elif device == _TERMINAL and kind == _PUTCHAR:
            self._console.write(payload & 0xFF)

    def _proxy(self, block: int) -> None:
        words = self._memory.read(block, 32)
        if words is not None:
            number, first, second, third = (int.from_bytes(words[i : i + 8], "little") for i in range(0, 32, 8))
            if number == _SYS_EXIT:
                self._exit("htif exit", first)
                return
            answer = self._print(first, second, third) if number == _SYS_WRITE else -errno.ENOSYS
            self._memory.write(block, (answer & _LONG).to_bytes(8, "little"))
        if self._fromhost is not None:
            self.storage[self._fromhost : self._fromhost + 8] = (1).to_bytes(8, "little")

    def _print(self, fd: int, address: int, size: int) -> int:
        if fd not in (1, 2):
            return -errno.EBADF
        text = self._memory.read(address, size)
        if text is None:
            return -errno.EFAULT
        for byte in text:
            self._console.write(byte)
        return size
