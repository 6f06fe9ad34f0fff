"""The National Semiconductor 16550A UART (datasheet PC16550D), on the console.

Byte registers at consecutive addresses. A byte written is sent at once. The receive FIFO is the console's
input itself, so clearing it (FCR) drops nothing but what loopback put there; with the receive interrupt off
the guest polls, and LSR shows what the console offers to such a guest. In loopback (MCR bit 4) what
is sent comes back as input, and the modem status shows the modem control outputs, which drivers use to
tell a 16550 from nothing.
"""

from __future__ import annotations

from collections import deque

from xipvm.console import Console
from xipvm.devices.device import IrqLine, no_line

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

IER_RDI = 1 << 0
IER_THRI = 1 << 1
IIR_NONE = 0x01
IIR_THRI = 0x02
IIR_RDI = 0x04
IIR_FIFO = 0xC0
FCR_ENABLE = 1 << 0
FCR_CLEAR_RX = 1 << 1
LCR_DLAB = 1 << 7
MCR_LOOP = 1 << 4
LSR_DR = 1 << 0
LSR_THRE = 1 << 5
LSR_TEMT = 1 << 6
MSR_CONNECTED = 0xB0  # carrier, data set ready, clear to send: as if a terminal were plugged in


class Ns16550:
    """A 16550A UART; ``irq`` is its interrupt output."""

    name = "ns16550"

    def __init__(self, console: Console, irq: IrqLine = no_line) -> None:
        self._console = console
        self._irq = irq
        self.reset()
        console.listen(self._update)

    def reset(self) -> None:
        """The registers as after power-on."""
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = 0
        self._thr_emptied = False
        self._looped: deque[int] = deque()
        self._update()

    def read(self, offset: int, size: int) -> int:
        """One register; a wider access reads the register at ``offset`` only."""
        if offset == LSR:
            return LSR_THRE | LSR_TEMT | (LSR_DR if self._data_ready() else 0)
        if offset == RBR:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            byte = self._receive()
            self._update()
            return byte
        if offset == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR:
            return self._identify()
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == MSR:
            return self._modem_status()
        return self._scr if offset == SCR else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """One register takes the low byte of ``value``."""
        value &= 0xFF
        if offset == THR:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            else:
                self._send(value)
        elif offset == IER:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            else:
                # Enabling the interrupt while the register is empty, which it always is, raises it.
                self._thr_emptied |= bool(value & ~self._ier & IER_THRI)
                self._ier = value & 0x0F
        elif offset == FCR:
            self._fcr = value & ~FCR_CLEAR_RX
            if value & FCR_CLEAR_RX:
                self._looped.clear()
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
        elif offset == SCR:
            self._scr = value
        self._update()

    def _send(self, byte: int) -> None:
        if self._mcr & MCR_LOOP:
            self._looped.append(byte)
        else:
            self._console.write(byte)
        self._thr_emptied = True

    def _readable(self) -> bool:
        return bool(self._looped) if self._mcr & MCR_LOOP else self._console.readable()

    def _data_ready(self) -> bool:
        return self._readable() if self._mcr & MCR_LOOP or self._ier & IER_RDI else self._console.offered()

    def _receive(self) -> int:
        if self._mcr & MCR_LOOP:
            return self._looped.popleft() if self._looped else 0
        return self._console.read() or 0

    def _modem_status(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CONNECTED
        # DTR, RTS, OUT1 and OUT2 are wired to DSR, CTS, RI and DCD.
        mcr = self._mcr
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _cause(self) -> int:
        if self._ier & IER_RDI and self._readable():
            return IIR_RDI
        if self._ier & IER_THRI and self._thr_emptied:
            return IIR_THRI
        return IIR_NONE

    def _identify(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:
            # Reading the cause answers a transmit interrupt.
            self._thr_emptied = False
            self._update()
        return cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)

    def _update(self) -> None:
        self._irq(self._cause() != IIR_NONE)
