"""Calls that leave the guest: PSCI, semihosting and HTIF."""

from __future__ import annotations

import io

import pytest

from xipvm.clock import EventClock
from xipvm.console import Console
from xipvm.devices import psci as p
from xipvm.devices.htif import Htif
from xipvm.devices.psci import Psci
from xipvm.devices.semihosting import Semihosting

MINUS = {-1: (1 << 64) - 1, -2: (1 << 64) - 2, -4: (1 << 64) - 4}


class Power:
    """Two CPUs, the first on."""

    def __init__(self) -> None:
        self.on = [True, False]
        self.done: list[object] = []

    def cpu_is_on(self, cpu: int) -> bool:
        return self.on[cpu]

    def cpu_on(self, cpu: int, entry: int, context: int) -> None:
        self.on[cpu] = True
        self.done.append((cpu, entry, context))

    def cpu_off(self, cpu: int) -> None:
        self.on[cpu] = False

    def cpu_suspend(self, cpu: int) -> None:
        self.done.append(f"suspend {cpu}")


class TestPsci:
    def make(self) -> tuple[Psci, Power]:
        power = Power()
        return (
            Psci(
                2, power, lambda reason, status: power.done.append((reason, status)), lambda: power.done.append("reset")
            ),
            power,
        )

    def test_version_and_features(self) -> None:
        psci, _ = self.make()
        assert psci.call(0, [p.VERSION, 0, 0, 0]) == 0x1_0000
        for function in (p.CPU_ON, p.CPU_ON | p.SMC64, p.SYSTEM_OFF, p.FEATURES):
            assert psci.call(0, [p.FEATURES, function, 0, 0]) == 0
        assert psci.call(0, [p.FEATURES, 0x8400_0012, 0, 0]) == MINUS[-1]
        assert psci.call(0, [p.VERSION | p.SMC64, 0, 0, 0]) == MINUS[-1]
        assert psci.call(0, [0x8000_0000, 0, 0, 0]) == MINUS[-1]
        assert psci.call(0, [p.MIGRATE_INFO_TYPE, 0, 0, 0]) == 2

    def test_turning_a_cpu_on_and_off(self) -> None:
        psci, power = self.make()
        info = [p.AFFINITY_INFO | p.SMC64, 1, 0, 0]
        assert psci.call(0, info) == p.OFF
        assert psci.call(0, [p.CPU_ON | p.SMC64, 1, 0x12_4000_0000, 0x55]) == 0
        assert power.done == [(1, 0x12_4000_0000, 0x55)]
        assert psci.call(0, info) == p.ON
        assert psci.call(0, [p.CPU_ON | p.SMC64, 1, 0, 0]) == MINUS[-4]
        assert psci.call(0, [p.CPU_ON | p.SMC64, 2, 0, 0]) == MINUS[-2]
        assert psci.call(0, [p.CPU_ON | p.SMC64, 0x100, 0, 0]) == MINUS[-2]
        assert psci.call(0, [p.AFFINITY_INFO, 1, 1, 0]) == MINUS[-2]
        assert psci.call(1, [p.CPU_OFF, 0, 0, 0]) is None
        assert psci.call(0, info) == p.OFF

    def test_32_bit_calls_see_32_bit_arguments(self) -> None:
        psci, power = self.make()
        psci.call(0, [p.CPU_ON, 1 | 1 << 32, 0xDEAD_4000_0000, 3 << 40])
        assert power.done == [(1, 0x4000_0000, 0)]

    def test_suspend_is_standby_only(self) -> None:
        psci, power = self.make()
        assert psci.call(1, [p.CPU_SUSPEND | p.SMC64, 1 << 16, 0, 0]) == MINUS[-2]
        assert power.done == []
        assert psci.call(1, [p.CPU_SUSPEND | p.SMC64, 0, 0, 0]) == 0
        assert power.done == ["suspend 1"]

    def test_the_system_calls_do_not_return(self) -> None:
        psci, power = self.make()
        assert psci.call(0, [p.SYSTEM_OFF, 0, 0, 0]) is None
        assert psci.call(0, [p.SYSTEM_RESET, 0, 0, 0]) is None
        assert power.done == [("psci system_off", 0), "reset"]


class Memory:
    """Guest memory of two pages at 0x1000."""

    def __init__(self) -> None:
        self.data = bytearray(0x2000)

    def read(self, address: int, size: int) -> bytes | None:
        at = address - 0x1000
        return bytes(self.data[at : at + size]) if at >= 0 and at + size <= len(self.data) else None

    def write(self, address: int, data: bytes) -> bool:
        at = address - 0x1000
        if at < 0 or at + len(data) > len(self.data):
            return False
        self.data[at : at + len(data)] = data
        return True

    def words(self, address: int, *values: int) -> None:
        self.write(address, b"".join(value.to_bytes(8, "little") for value in values))


class TestSemihosting:
    def make(self) -> tuple[Semihosting, Memory, io.BytesIO, Console, list[tuple[str, int]]]:
        memory, output, exits = Memory(), io.BytesIO(), list[tuple[str, int]]()
        console = Console(output)
        return (
            Semihosting(memory.read, console, lambda reason, status: exits.append((reason, status))),
            memory,
            output,
            console,
            exits,
        )

    @pytest.mark.parametrize("operation", [0x18, 0x20])
    def test_exit(self, operation: int) -> None:
        call, memory, _, _, exits = self.make()
        memory.words(0x1000, 0x20026, 42)
        call.call(operation, 0x1000)
        memory.words(0x1000, 0x20023, 0)
        call.call(operation, 0x1000)
        assert exits == [("semihosting exit", 42), ("semihosting exit", 1)]

    def test_text_across_a_page_to_the_end_of_memory(self) -> None:
        call, memory, output, console, _ = self.make()
        memory.write(0x1FFE, b"ab\n\0")
        assert call.call(0x04, 0x1FFE) == 0
        memory.write(0x2FFF, b"!")
        assert call.call(0x03, 0x2FFF) == 0
        console.flush()
        assert output.getvalue() == b"ab\n!"
        assert call.call(0x04, 0x2FFF) == MINUS[-1]

    def test_what_it_does_not_know_fails(self) -> None:
        call, _, _, _, exits = self.make()
        assert call.call(0x01, 0x1000) == MINUS[-1]
        assert call.call(0x18, 0x9000) == MINUS[-1]
        assert exits == []


class TestHtif:
    TOHOST, FROMHOST = 0x100, 0x140

    def make(self) -> tuple[Htif, EventClock, Memory, Console, list[tuple[str, int]]]:
        clock, memory, exits = EventClock(), Memory(), list[tuple[str, int]]()
        console = Console(io.BytesIO())
        htif = Htif(
            0x1000,
            self.TOHOST,
            self.FROMHOST,
            clock=clock,
            console=console,
            memory=memory,
            exit=lambda reason, status: exits.append((reason, status)),
        )
        return htif, clock, memory, console, exits

    def send(self, htif: Htif, value: int) -> None:
        htif.write(self.TOHOST, 4, value & 0xFFFF_FFFF)
        htif.write(self.TOHOST + 4, 4, value >> 32)

    def test_the_page_is_storage(self) -> None:
        htif, clock, _, _, _ = self.make()
        htif.write(0, 4, 0x1234_5678)
        htif.write(0xFFF, 1, 0xAB)
        assert htif.read(0, 4) == 0x1234_5678
        assert htif.read(1, 2) == 0x3456
        assert htif.read(0xFFC, 4) == 0xAB00_0000
        assert clock.next_deadline() is None

    @pytest.mark.parametrize(("value", "status"), [(1, 0), (3, 1), (1337 << 1 | 1, 1337)])
    def test_exit_by_a_64_bit_store(self, value: int, status: int) -> None:
        htif, clock, _, _, exits = self.make()
        self.send(htif, value)
        assert exits == [("htif exit", status)]
        assert clock.next_deadline() is None
        assert htif.read(self.TOHOST, 4) == 0

    def test_exit_by_a_32_bit_store_takes_a_moment(self) -> None:
        htif, clock, _, _, exits = self.make()
        htif.write(self.TOHOST, 4, 7)
        htif.write(self.TOHOST, 4, 7)
        assert exits == []
        clock.advance(1000)
        assert exits == [("htif exit", 3)]
        assert clock.next_deadline() is None

    def test_a_32_bit_store_that_is_repeated_for_ever_is_taken(self) -> None:
        """riscv-tests' old environment ends in a loop that stores the low word, and nothing else."""
        htif, clock, _, _, exits = self.make()
        for _ in range(200):
            htif.write(self.TOHOST, 4, 5)
            clock.advance(10)
        assert exits[0] == ("htif exit", 2)

    def test_an_odd_character_is_no_exit(self) -> None:
        htif, clock, _, console, exits = self.make()
        for byte in b"ace\n":
            self.send(htif, 1 << 56 | 1 << 48 | byte)
        clock.advance(5000)
        assert bytes(console.tail) == b"ace\n"
        assert exits == []

    def test_proxied_write_and_exit(self) -> None:
        htif, _, memory, console, exits = self.make()
        memory.write(0x1800, b"hello")
        memory.words(0x1000, 64, 1, 0x1800, 5)
        self.send(htif, 0x1000)
        assert bytes(console.tail) == b"hello"
        assert memory.read(0x1000, 8) == (5).to_bytes(8, "little")
        assert htif.read(self.FROMHOST, 4) == 1
        for words, error in (((64, 9, 0x1800, 5), 9), ((64, 1, 0x9000, 5), 14), ((57, 0, 0, 0), 38)):
            memory.words(0x1000, *words)
            self.send(htif, 0x1000)
            assert memory.read(0x1000, 8) == (-error & (1 << 64) - 1).to_bytes(8, "little")
        memory.words(0x1000, 93, 4, 0, 0)
        self.send(htif, 0x1000)
        assert exits == [("htif exit", 4)]

    def test_a_call_block_nowhere_is_still_answered(self) -> None:
        htif, _, _, _, _ = self.make()
        self.send(htif, 0x9000)
        assert htif.read(self.FROMHOST, 4) == 1

    def test_misplaced_words_are_refused(self) -> None:
        with pytest.raises(ValueError, match="offset 0x1000 of 0x1000"):
            Htif(
                0x1000,
                0x1000,
                None,
                clock=EventClock(),
                console=Console(),
                memory=Memory(),
                exit=lambda reason, status: None,
            )
