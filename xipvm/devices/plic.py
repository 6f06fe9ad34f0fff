"""RISC-V's platform-level interrupt controller (PLIC specification 1.0.0), as SiFive maps it.

Sources are level lines behind gateways: a gateway hands on one request, and the next only after the
request was completed and the line is (still or again) high; a request once handed on is not withdrawn.
A context is a hart in a privilege mode that takes interrupts: here 2h is hart h in machine mode, 2h+1 in
supervisor mode. Priority 0 means never; ties go to the lowest source.
"""

from __future__ import annotations

from collections.abc import Sequence

from xipvm.devices.device import IrqLine

PRIORITY = 0x00_0000
PENDING = 0x00_1000
ENABLE = 0x00_2000
ENABLE_STRIDE = 0x80
CONTEXT = 0x20_0000
CONTEXT_STRIDE = 0x1000
CONTEXT_THRESHOLD = 0
CONTEXT_CLAIM = 4

MAX_PRIORITY = 7
_WORD = 0xFFFF_FFFF


class Plic:
    """A PLIC with sources 1 to ``sources``; ``contexts`` are the lines it drives, one a context."""

    name = "plic"

    def __init__(self, sources: int, contexts: Sequence[IrqLine]) -> None:
        self._sources = sources
        self._contexts = contexts
        self._lines = 0
        self._known = ((1 << sources + 1) - 1) & ~1
        self._levels = [False] * len(contexts)
        self._clear()

    def _clear(self) -> None:
        self._priority = [0] * (self._sources + 1)
        self._pending = 0
        self._in_service = 0
        self._enable = [0] * len(self._contexts)
        self._threshold = [0] * len(self._contexts)

    def reset(self) -> None:
        """Everything disabled, every source line low: devices drive theirs anew when they reset."""
        self._lines = 0
        self._clear()
        self._update()

    def source(self, number: int) -> IrqLine:
        """The input line of source ``number``. Raises ValueError when there is none."""
        if not 1 <= number <= self._sources:
            raise ValueError(f"the PLIC has sources 1 to {self._sources}, not {number}")
        bit = 1 << number

        def line(level: bool) -> None:
            if bool(self._lines & bit) == level:
                return
            self._lines ^= bit
            if level:
                self._pending |= bit & ~self._in_service
                self._update()

        return line

    def best(self, context: int) -> int:
        """The pending, enabled source that ``context`` takes first, 0 when there is none; not the threshold."""
        candidates = self._pending & self._enable[context]
        found = priority = 0
        while candidates:
            low = candidates & -candidates
            candidates ^= low
            number = low.bit_length() - 1
            if self._priority[number] > priority:
                found, priority = number, self._priority[number]
        return found

    def claim(self, context: int) -> int:
        """Take the best source into service; 0 when there is none."""
        number = self.best(context)
        if number:
            self._pending &= ~(1 << number)
            self._in_service |= 1 << number
            self._update()
        return number

    def complete(self, context: int, number: int) -> None:
        """End the service of source ``number``; ignored when it is not enabled for ``context``."""
        bit = 1 << number & self._enable[context]
        self._in_service &= ~bit
        self._pending |= self._lines & bit
        self._update()

    def read(self, offset: int, size: int) -> int:
        """Registers are words. Reading a context's claim register claims."""
        if offset < PENDING:
            number = offset // 4
            return self._priority[number] if number <= self._sources else 0
        if offset < ENABLE:
            return self._pending >> (offset - PENDING) * 8 & _WORD
        if offset < CONTEXT:
            context, at = divmod(offset - ENABLE, ENABLE_STRIDE)
            return self._enable[context] >> at * 8 & _WORD if context < len(self._enable) else 0
        context, at = divmod(offset - CONTEXT, CONTEXT_STRIDE)
        if context >= len(self._contexts):
            return 0
        if at == CONTEXT_THRESHOLD:
            return self._threshold[context]
        return self.claim(context) if at == CONTEXT_CLAIM else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are words. Writing a context's claim register completes."""
        if offset < PENDING:
            number = offset // 4
            if 1 <= number <= self._sources:
                self._priority[number] = value & MAX_PRIORITY
        elif ENABLE <= offset < CONTEXT:
            context, at = divmod(offset - ENABLE, ENABLE_STRIDE)
            if context < len(self._enable):
                kept = self._enable[context] & ~(_WORD << at * 8)
                self._enable[context] = (kept | value << at * 8) & self._known
        elif offset >= CONTEXT:
            context, at = divmod(offset - CONTEXT, CONTEXT_STRIDE)
            if context >= len(self._contexts):
                return
            if at == CONTEXT_THRESHOLD:
                self._threshold[context] = value & MAX_PRIORITY
            elif at == CONTEXT_CLAIM and 1 <= value <= self._sources:
                self.complete(context, value)
                return
        self._update()

    def _update(self) -> None:
        for context, output in enumerate(self._contexts):
            level = self._priority[self.best(context)] > self._threshold[context]
            if level != self._levels[context]:
                self._levels[context] = level
                output(level)
