"""SiFive's test finisher: one word by which a RISC-V guest says how it ended (Linux: ``sifive,test0``)."""

from __future__ import annotations

from collections.abc import Callable

FAIL = 0x3333
PASS = 0x5555
RESET = 0x7777

ExitRequest = Callable[[str, int], None]
"""``exit(reason, status)``: ends the run; ``status`` is the process's exit status."""


class Finisher:
    """The word at offset 0: PASS, FAIL with a code in the upper half, or RESET; others do nothing."""

    name = "finisher"

    def __init__(self, exit: ExitRequest, reset: Callable[[], None]) -> None:
        self._exit = exit
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        """Always 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A word written to offset 0 ends or restarts the machine, by its lower half; a failure is never status 0."""
        if offset != 0:
            return
        command = value & 0xFFFF
        if command == PASS:
            self._exit("finisher pass", 0)
        elif command == FAIL:
            self._exit("finisher fail", value >> 16 or 1)
        elif command == RESET:
            self._reset()
