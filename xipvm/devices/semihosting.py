"""Semihosting (Arm "Semihosting for AArch32 and AArch64", RISC-V semihosting 1.0): exit and text output.

Only what a bare test program needs: SYS_EXIT, SYS_EXIT_EXTENDED, SYS_WRITEC and SYS_WRITE0. All other
operations, and arguments that point nowhere, answer -1.
"""

from __future__ import annotations

from collections.abc import Callable

from xipvm.console import Console

SYS_WRITEC = 0x03
SYS_WRITE0 = 0x04
SYS_EXIT = 0x18
SYS_EXIT_EXTENDED = 0x20
ADP_STOPPED_APPLICATION_EXIT = 0x20026

_FAILED = -1 & 0xFFFF_FFFF_FFFF_FFFF
_PAGE = 4096
_LONGEST = 1 << 20

ReadMemory = Callable[[int, int], bytes | None]
"""``read(address, size)``: guest memory as the caller sees it, None where there is none."""


class Semihosting:
    """The debugger that a 64-bit guest thinks it is attached to."""

    def __init__(self, read_memory: ReadMemory, console: Console, exit: Callable[[str, int], None]) -> None:
        self._read_memory = read_memory
        self._console = console
        self._exit = exit

    def call(self, operation: int, argument: int) -> int:
        """Do ``operation``; the answer for the guest's first register, unsigned."""
        if operation in (SYS_EXIT, SYS_EXIT_EXTENDED):
            block = self._read_memory(argument, 16)
            if block is None:
                return _FAILED
            reason, status = int.from_bytes(block[:8], "little"), int.from_bytes(block[8:], "little")
            # Any other reason is an error in the guest, whatever the second word says.
            self._exit("semihosting exit", status if reason == ADP_STOPPED_APPLICATION_EXIT else 1)
            return 0
        text = self._text(operation, argument)
        if text is None:
            return _FAILED
        for byte in text:
            self._console.write(byte)
        return 0

    def _text(self, operation: int, address: int) -> bytes | None:
        if operation == SYS_WRITEC:
            return self._read_memory(address, 1)
        if operation != SYS_WRITE0:
            return None
        text = bytearray()
        while len(text) < _LONGEST:
            # Up to the end of the page: what follows it may not be there.
            piece = self._read_memory(address, _PAGE - address % _PAGE)
            if piece is None:
                return None
            end = piece.find(0)
            if end >= 0:
                return bytes(text + piece[:end])
            text += piece
            address += len(piece)
        return None
