"""The ARM PrimeCell UART, PL011 (ARM DDI 0183), on the console.

A byte written is sent at once, so the transmit FIFO is always empty and each write raises the transmit
interrupt anew. The receive FIFO is the console's input itself: nothing is lost while the guest does not
look, and the receive and receive-timeout interrupts are both raised for as long as a byte waits; with both
masked the guest polls, and FR shows what the console offers to such a guest. As QEMU does, the model sends
and receives whether or not UARTEN, TXE and RXE are set.
"""

from __future__ import annotations

from xipvm.console import Console
from xipvm.devices.device import IrqLine, no_line

DR = 0x00
RSR = 0x04
FR = 0x18
ILPR = 0x20
IBRD = 0x24
FBRD = 0x28
LCRH = 0x2C
CR = 0x30
IFLS = 0x34
IMSC = 0x38
RIS = 0x3C
MIS = 0x40
ICR = 0x44
DMACR = 0x48
PERIPH_ID0 = 0xFE0

FR_RXFE = 1 << 4
FR_RXFF = 1 << 6
FR_TXFE = 1 << 7
LCRH_FEN = 1 << 4
INT_RX = 1 << 4
INT_TX = 1 << 5
INT_RT = 1 << 6

# Peripheral id (part 0x011, ARM, revision 1) and PrimeCell id, one byte a word.
_IDS = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_STORED = {ILPR: 0xFF, IBRD: 0xFFFF, FBRD: 0x3F, LCRH: 0xFF, CR: 0xFF87, IFLS: 0x3F, IMSC: 0x7FF, DMACR: 0x7}
_RESET = {CR: 0x300, IFLS: 0x12}


class Pl011:
    """A PL011 UART; ``irq`` is its combined interrupt, UARTINTR."""

    name = "pl011"

    def __init__(self, console: Console, irq: IrqLine = no_line) -> None:
        self._console = console
        self._irq = irq
        self.reset()
        console.listen(self._update)

    def reset(self) -> None:
        """The registers as after power-on."""
        self._stored = {offset: _RESET.get(offset, 0) for offset in _STORED}
        self._sent = 0
        self._update()

    def read(self, offset: int, size: int) -> int:
        """Registers are up to 16 bits wide on 4-byte places; any size reads the same place."""
        if offset == FR:
            return self._flags()
        if offset == DR:
            byte = self._console.read()
            self._update()
            return byte or 0
        if offset in self._stored:
            return self._stored[offset]
        if offset == RIS:
            return self._raw()
        if offset == MIS:
            return self._raw() & self._stored[IMSC]
        if offset >= PERIPH_ID0 and offset % 4 == 0:
            return _IDS[(offset - PERIPH_ID0) // 4]
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """See ``read``; writing DR prints its low byte."""
        if offset == DR:
            self._console.write(value & 0xFF)
            self._sent = INT_TX
        elif offset == ICR:
            self._sent &= ~value
        elif offset in self._stored:
            self._stored[offset] = value & _STORED[offset]
        self._update()

    def _flags(self) -> int:
        console = self._console
        if not (console.readable() if self._stored[IMSC] & (INT_RX | INT_RT) else console.offered()):
            return FR_TXFE | FR_RXFE
        # How full the FIFO is cannot be known; without it, one byte fills the holding register.
        return FR_TXFE if self._stored[LCRH] & LCRH_FEN else FR_TXFE | FR_RXFF

    def _raw(self) -> int:
        return self._sent | (INT_RX | INT_RT if self._console.readable() else 0)

    def _update(self) -> None:
        mask = self._stored[IMSC]
        self._irq(bool(mask and self._raw() & mask))
