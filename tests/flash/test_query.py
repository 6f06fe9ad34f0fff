"""The query table: QEMU's values where a guest can tell, our features, and what drivers compute from them."""

from __future__ import annotations

import pytest

from xipvm.devices.flash.geometry import TYPICAL, ChipGeometry
from xipvm.devices.flash.query import query_table

MIB = 1 << 20
# pflash_cfi01 of QEMU 7.2, 64 MiB bank of two x16 chips with 256 KiB sectors, addresses 10 to 51.
QEMU = bytes.fromhex(
    "51 52 59 01 00 31 00 00 00 00 00 45 55 00 00 07 07 0a 00 04 04 04 00 19 02 00 0b 00 01 ff 00 00 02"
    "50 52 49 31 30" + "00" * 9 + "01" + "00" * 18
)
OURS = {0x36: 0x26, 0x3A: 0x01, 0x3B: 0x03, 0x3F: 0x00}  # suspends and locks, but no protection registers


def test_virt_bank_answers_as_qemu_does_except_for_features(make_rig):
    rig = make_rig(size=64 * MIB, sector=256 * 1024)
    rig.command(0, 0x98)
    assert rig.read(0x40) == 0x0051_0051
    table = [rig.read(4 * i) for i in range(0x10, 0x52)]
    assert all(value >> 16 == value & 0xFFFF for value in table)
    expected = {0x10 + i: byte for i, byte in enumerate(QEMU)} | OURS
    assert {0x10 + i: value & 0xFFFF for i, value in enumerate(table)} == expected
    assert rig.bank.read(0x40, 2) == rig.bank.read(0x42, 2) == 0x51
    assert [rig.bank.read(0x40 + i, 1) for i in range(4)] == [0x51, 0, 0x51, 0]


@pytest.mark.parametrize(
    ("width", "device_width", "buffer"),
    [(1, 1, 256), (2, 1, 512), (2, 2, 2048), (4, 1, 1024), (4, 2, 4096), (4, 4, 2048)]
)  # fmt: skip
def test_driver_finds_every_organisation(make_rig, make_driver, width, device_width, buffer):
    rig = make_rig(size=1 * MIB, sector=64 * 1024, width=width, device_width=device_width)
    driver = make_driver(rig)
    assert (driver.chip_width, driver.size, driver.sector) == (device_width, 1 * MIB, 64 * 1024)
    assert driver.buffer == buffer
    assert (driver.word(0x13), driver.word(0x15)) == (1, 0x31)
    assert driver.word(0x2D) + 1 == 16
    assert driver.identify() == (0x89, 0x18)
    assert rig.bank.array_mode


def test_block_status_in_query_mode(rig):
    rig.command(0x4000, 0x60, 0x01)
    rig.command(0, 0x98)
    assert [rig.read(0x4000 + 8), rig.read(0x8000 + 8), rig.read(0x4000)] == [0x0001_0001, 0, 0]


def test_announced_times_are_those_of_typical_timing():
    table = query_table(ChipGeometry(1 << 25, 1 << 17, 2))
    assert TYPICAL.word_program == (1 << table[0x1F]) * 1_000
    assert TYPICAL.buffer_program == (1 << table[0x20]) * 1_000
    assert TYPICAL.block_erase == (1 << table[0x21]) * 1_000_000
    assert 1 << table[0x2A] == ChipGeometry(1 << 25, 1 << 17, 2).buffer


@pytest.mark.parametrize(
    "sizes",
    [(3 << 20, 1 << 16, 2), (1 << 20, 3 << 10, 2), (1 << 20, 128, 2), (1 << 20, 1 << 21, 2), (1 << 20, 1 << 16, 8),
     (1 << 20, 1 << 16, 3), (1 << 25, 256, 1), (1 << 25, 1 << 24, 1), (0, 0, 1)]
)  # fmt: skip
def test_geometry_that_no_query_table_can_describe(sizes):
    with pytest.raises(ValueError, match="flash chip"):
        ChipGeometry(*sizes)


@pytest.mark.parametrize("widths", [(4, 8), (8, 2), (3, 1), (2, 4), (4, 0)])
def test_bank_widths(make_rig, widths):
    with pytest.raises(ValueError, match="flash bank 0: width"):
        make_rig(width=widths[0], device_width=widths[1])


def test_as_u_boot_probes(rig):
    """Port widths from 1 byte up, at both query addresses, plain and shifted: what fits first is 16 x 16."""
    found = []
    for port in (1, 2, 4):
        for chip in (width for width in (1, 2, 4) if width <= port):
            for shift in (0, 1):
                lanes = range(0, 8 * port, 8 * chip)
                for command in (0xF0, 0xFF):
                    rig.bank.write(0, port, sum(command << lane for lane in lanes))
                for address in (0x55, 0x555):
                    rig.bank.write(address * port << shift, port, sum(0x98 << lane for lane in lanes))
                    wanted = [sum(byte << lane for lane in lanes) for byte in b"QRY"]
                    if [rig.bank.read((0x10 + i) * port << shift, port) for i in range(3)] == wanted:
                        found.append((port, chip, shift))
    assert found == [(2, 2, 1)] * 2 + [(4, 2, 0)] * 2
    rig.command(0, 0xF0, 0xFF)
    assert rig.bank.array_mode
    assert rig.bank.errors == 0
    assert rig.array == b"\xff" * len(rig.array)
