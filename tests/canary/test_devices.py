"""MMIO callbacks: what arrives, and what can be asked in them."""

from __future__ import annotations

import pytest
from unicorn import unicorn_const as uc

from tests.asm import a64, rv64, words
from tests.canary.conftest import CODE, PAGE, Raw

MMIO = 0x1000_0000


def log_device(raw: Raw) -> list[tuple[str, int, int, int]]:
    """A page that logs (kind, offset, size, value or PC-at-access) and reads as offset + 1."""
    log: list[tuple[str, int, int, int]] = []

    def read(_u: object, offset: int, size: int, _d: object) -> int:
        log.append(("read", offset, size, raw.pc))
        return offset + 1

    def write(_u: object, offset: int, size: int, value: int, _d: object) -> None:
        log.append(("write", offset, size, value))

    raw.uc.mmio_map(MMIO, PAGE, read, None, write, None)
    raw.map(MMIO)
    raw[1] = MMIO
    return log


def test_a_64_bit_access_arrives_as_two_halves_low_address_first(raw: Raw) -> None:
    """Devices see 32 bits at most; a 64-bit register of a device is put together by the device."""
    log = log_device(raw)
    raw.code(
        words(a64.ldr(2, 1, 8), a64.str(3, 1, 16), a64.WFI)
        if raw.arm
        else words(rv64.ld(2, 1, 8), rv64.sd(3, 1, 16), rv64.WFI)
    )
    raw[3] = 0x1111_2222_3333_4444
    assert raw.run() == uc.UC_ERR_OK
    assert [entry[:3] for entry in log[:2]] == [("read", 8, 4), ("read", 12, 4)]
    assert log[2:] == [("write", 16, 4, 0x3333_4444), ("write", 20, 4, 0x1111_2222)]
    assert raw[2] == 13 << 32 | 9


@pytest.mark.parametrize("size", [1, 2, 4])
def test_smaller_accesses_arrive_whole(raw: Raw, size: int) -> None:
    """The offset is the one in the window, so the guest physical address."""
    log = log_device(raw)
    if raw.arm:
        code = words(a64.ldr(2, 1, 8, size), a64.WFI)
    else:
        code = words({1: rv64.lb, 2: lambda d, s, i: rv64.lb(d, s, i) | 1 << 12, 4: rv64.lw}[size](2, 1, 8), rv64.WFI)
    raw.code(code)
    assert raw.run() == uc.UC_ERR_OK
    assert [entry[:3] for entry in log] == [("read", 8, size)]
    assert raw[2] == 9


def test_an_access_across_alignment_arrives_as_two_aligned_ones(arm64: Raw) -> None:
    """A device never sees an address that is not a multiple of the size; what is read is put together."""
    log = log_device(arm64)
    arm64.code(words(a64.ldr(2, 1, 0, 4), a64.WFI))
    arm64[1] = MMIO + 6
    assert arm64.run() == uc.UC_ERR_OK
    assert [entry[:3] for entry in log] == [("read", 4, 4), ("read", 8, 4)]
    assert arm64[2] == 9 << 16


def test_the_pc_is_stale_inside_a_device_callback(raw: Raw) -> None:
    """Virtual time in a device is that of its block, and nothing there may look at the PC.

    The fill hook brings the PC up to date, so the first access to a page looks right; the second one shows its PC, too.
    """
    log = log_device(raw)
    if raw.arm:
        code = words(a64.NOP, a64.ldr(2, 1, 8, 4), a64.NOP, a64.ldr(2, 1, 12, 4), a64.WFI)
    else:
        code = words(rv64.NOP, rv64.lw(2, 1, 8), rv64.NOP, rv64.lw(2, 1, 12), rv64.WFI)
    raw.code(code)
    raw.run()
    assert log == [("read", 8, 4, CODE + 4), ("read", 12, 4, CODE + 4)]
