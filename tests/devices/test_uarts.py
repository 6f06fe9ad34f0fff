"""PL011 and 16550A through their registers, as a driver uses them."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from xipvm.console import Console
from xipvm.devices import ns16550 as ns
from xipvm.devices import pl011
from xipvm.devices.ns16550 import Ns16550
from xipvm.devices.pl011 import Pl011


class Line:
    """An interrupt line that remembers its level."""

    level = False

    def __call__(self, level: bool) -> None:
        self.level = level


class TestPl011:
    def test_polled_output(self) -> None:
        output = io.BytesIO()
        console = Console(output)
        uart = Pl011(console)
        for byte in b"hello\n":
            assert not uart.read(pl011.FR, 4) & 0x20
            uart.write(pl011.DR, 4, byte)
        assert output.getvalue() == b"hello\n"

    def test_polled_input_until_the_fifo_is_empty(self) -> None:
        uart = Pl011(Console(source=b"ab"))
        got = bytearray()
        for _ in range(100):
            if not uart.read(pl011.FR, 4) & pl011.FR_RXFE:
                got.append(uart.read(pl011.DR, 4))
        assert got == b"ab"
        assert uart.read(pl011.DR, 4) == 0

    def test_receive_interrupt_lasts_as_long_as_there_is_input(self) -> None:
        line = Line()
        uart = Pl011(Console(source=b"ab"), line)
        assert not line.level
        uart.write(pl011.IMSC, 4, pl011.INT_RX | pl011.INT_RT)
        assert line.level
        uart.write(pl011.ICR, 4, 0x7FF)
        uart.read(pl011.DR, 4)
        assert line.level
        assert uart.read(pl011.MIS, 4) == pl011.INT_RX | pl011.INT_RT
        uart.read(pl011.DR, 4)
        assert not line.level
        assert uart.read(pl011.RIS, 4) == 0

    def test_transmit_interrupt_comes_after_each_byte_and_is_cleared(self) -> None:
        line = Line()
        uart = Pl011(Console(), line)
        uart.write(pl011.IMSC, 4, pl011.INT_TX)
        assert not line.level
        uart.write(pl011.DR, 4, 0x41)
        assert line.level
        uart.write(pl011.ICR, 4, pl011.INT_TX)
        assert not line.level

    def test_full_flag_without_the_fifo_only(self) -> None:
        uart = Pl011(Console(source=b"a"))
        uart.write(pl011.IMSC, 4, pl011.INT_RX)
        assert uart.read(pl011.FR, 4) & pl011.FR_RXFF
        uart.write(pl011.LCRH, 4, pl011.LCRH_FEN)
        assert not uart.read(pl011.FR, 4) & pl011.FR_RXFF

    def test_identification_and_line_registers(self) -> None:
        uart = Pl011(Console())
        ids = [uart.read(pl011.PERIPH_ID0 + 4 * i, 4) for i in range(8)]
        assert ids == [0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1]
        assert uart.read(pl011.CR, 4) == 0x300
        uart.write(pl011.IBRD, 4, 0x1_0002)
        uart.write(pl011.FBRD, 4, 0xFF)
        assert (uart.read(pl011.IBRD, 4), uart.read(pl011.FBRD, 4)) == (2, 0x3F)
        uart.write(0x80, 4, 0xFFFF_FFFF)
        assert uart.read(0x80, 4) == 0
        uart.reset()
        assert uart.read(pl011.IBRD, 4) == 0


class TestNs16550:
    def test_polled_output_as_u_boot_does_it(self) -> None:
        output = io.BytesIO()
        uart = Ns16550(Console(output))
        uart.write(ns.LCR, 1, ns.LCR_DLAB)
        uart.write(ns.DLL, 1, 0x34)
        uart.write(ns.DLM, 1, 0x12)
        assert (uart.read(ns.DLL, 1), uart.read(ns.DLM, 1)) == (0x34, 0x12)
        uart.write(ns.LCR, 1, 3)
        uart.write(ns.FCR, 1, 7)
        for byte in b"ok\n":
            assert uart.read(ns.LSR, 1) & ns.LSR_THRE
            uart.write(ns.THR, 1, byte)
        assert output.getvalue() == b"ok\n"

    def test_clearing_the_fifo_loses_no_console_input(self) -> None:
        uart = Ns16550(Console(source=b"x"))
        uart.write(ns.FCR, 1, 7)
        assert any(uart.read(ns.LSR, 1) & ns.LSR_DR for _ in range(100))
        assert uart.read(ns.RBR, 1) == ord("x")
        assert not uart.read(ns.LSR, 1) & ns.LSR_DR

    def test_interrupt_causes_in_order_of_priority(self) -> None:
        line = Line()
        uart = Ns16550(Console(source=b"x"), line)
        assert uart.read(ns.IIR, 1) == ns.IIR_NONE
        uart.write(ns.FCR, 1, ns.FCR_ENABLE)
        uart.write(ns.IER, 1, ns.IER_RDI | ns.IER_THRI)
        assert line.level
        assert uart.read(ns.IIR, 1) == ns.IIR_RDI | ns.IIR_FIFO
        uart.read(ns.RBR, 1)
        assert line.level
        assert uart.read(ns.IIR, 1) == ns.IIR_THRI | ns.IIR_FIFO
        assert not line.level
        assert uart.read(ns.IIR, 1) == ns.IIR_NONE | ns.IIR_FIFO
        uart.write(ns.THR, 1, 0x41)
        assert line.level

    def test_loopback_tells_it_from_nothing(self) -> None:
        output = io.BytesIO()
        console = Console(output, b"real")
        uart = Ns16550(console)
        uart.write(ns.MCR, 1, ns.MCR_LOOP | 0x0A)
        assert uart.read(ns.MSR, 1) & 0xF0 == 0x90
        uart.write(ns.THR, 1, 0x5A)
        assert uart.read(ns.RBR, 1) == 0x5A
        assert not uart.read(ns.LSR, 1) & ns.LSR_DR
        uart.write(ns.MCR, 1, 0)
        assert uart.read(ns.RBR, 1) == ord("r")
        console.flush()
        assert output.getvalue() == b""

    def test_scratch(self) -> None:
        uart = Ns16550(Console())
        uart.write(ns.SCR, 1, 0xA5)
        assert uart.read(ns.SCR, 1) == 0xA5


def uart_of(kind: type[Pl011] | type[Ns16550], console: Console) -> tuple[Pl011 | Ns16550, Callable[[], bool]]:
    """A UART, and whether its polled flag says that there is input."""
    if kind is Pl011:
        pl = Pl011(console)
        return pl, lambda: not pl.read(pl011.FR, 4) & pl011.FR_RXFE
    sixteen = Ns16550(console)
    return sixteen, lambda: bool(sixteen.read(ns.LSR, 1) & ns.LSR_DR)


@pytest.mark.parametrize("kind", [Pl011, Ns16550])
def test_a_look_for_ctrl_c_between_lines_does_not_eat_the_script(kind: type[Pl011] | type[Ns16550]) -> None:
    uart, ready = uart_of(kind, Console(source=b"x\nls\n\x03"))

    def line() -> bytes:
        got = bytearray()
        while not got.endswith(b"\n"):
            assert ready()
            got.append(uart.read(0, 1))
            uart.write(0, 1, got[-1])
        return bytes(got)

    assert line() == b"x\n", "the first line is there from the start"
    for _ in range(200):
        uart.write(0, 1, ord("."))
        assert not ready()
    assert any(ready() for _ in range(100))
    assert line() == b"ls\n"
    uart.write(0, 1, ord("."))
    assert ready(), "Ctrl-C is what such a look is for"


@pytest.mark.parametrize("kind", [Pl011, Ns16550])
def test_input_that_arrives_later_raises_the_interrupt(kind: type[Pl011] | type[Ns16550]) -> None:
    class Late:
        live = True
        data = b""

        def take(self) -> bytes:
            data, self.data = self.data, b""
            return data

        def ended(self) -> bool:
            return False

        def fileno(self) -> int | None:
            return None

        def close(self) -> None:
            pass

    source, line = Late(), Line()
    console = Console(source=source)
    uart = kind(console, line)
    uart.write(pl011.IMSC if kind is Pl011 else ns.IER, 1, 0x10 if kind is Pl011 else ns.IER_RDI)
    assert not console.poll()
    assert not line.level
    source.data = b"k"
    assert console.poll()
    assert line.level
    assert uart.read(0, 1) == ord("k")
    assert not line.level
