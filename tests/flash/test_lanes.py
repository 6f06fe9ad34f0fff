"""Chips side by side: each sees its own lanes only, and may be in a state of its own."""

from __future__ import annotations

import pytest


def test_a_command_on_one_lane_reaches_one_chip(rig):
    """The other chip sees 0, which is no command."""
    rig.bank.place(0x40, b"\x11\x22\x33\x44")
    rig.write(0, 0x0000_0098)
    assert not rig.bank.array_mode
    assert rig.read(0x40) == 0x4433_0051
    rig.write(0, 0x0070_0000)
    assert rig.read(0x40) == 0x0080_0051
    rig.write(0, 0x0000_00FF)
    assert rig.read(0x40) == 0x0080_2211
    assert not rig.bank.array_mode
    rig.write(0, 0x00FF_0000)
    assert rig.bank.array_mode
    assert rig.bank.errors == 0


def test_different_commands_in_one_cycle(rig):
    rig.write(0, 0x0090_0098)
    assert rig.read(0x40) == 0x0000_0051
    assert rig.read(0) == 0x0089_0000


def test_one_chip_fails_and_the_other_does_not(rig):
    rig.write(0, 0x0020_0020)
    rig.write(0, 0x00FF_00D0)
    assert rig.read() == 0x00B0_0080
    assert rig.bank.erases == 1


def test_erase_of_one_lane_leaves_the_other_chip_alone(rig):
    rig.bank.place(0, bytes(len(rig.array)))
    rig.write(0x4000, 0x0020_0000)
    rig.write(0x4000, 0x00D0_0000)
    assert rig.array == bytes(0x4000) + b"\0\0\xff\xff" * 0x1000 + bytes(len(rig.array) - 0x8000)
    assert rig.calls[-1] == ("change", 0x4000, 0x4000)


def test_locks_are_per_chip(rig, driver):
    rig.write(0x4000, 0x0000_0060)
    rig.write(0x4000, 0x0000_0001)
    assert driver.locks(0x4000) == [1, 0]
    rig.command(0x4000, 0x40)
    rig.write(0x4000, 0)
    assert rig.read() == 0x0080_0092
    assert rig.array[0x4000:0x4004] == b"\xff\xff\0\0"


@pytest.mark.parametrize(
    ("offset", "size", "value", "cells"),
    [(0x10, 1, 0x0F, "0fffffff"),
     (0x11, 1, 0x0F, "ff0fffff"), (0x13, 1, 0x0F, "ffffff0f"), (0x12, 2, 0x0123, "ffff2301")],
)  # fmt: skip
def test_narrow_data_programs_only_the_bytes_it_drives(rig, offset, size, value, cells):
    rig.bank.write(offset, size, 0x40)
    rig.bank.write(offset, size, value)
    assert rig.array[0x10:0x14].hex() == cells
    assert rig.read() == 0x0080_0080


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2)])
def test_a_narrow_command_reaches_every_chip(rig, offset, size):
    rig.bank.write(offset, size, 0x98)
    assert rig.read(0x40) == 0x0051_0051
    rig.bank.write(offset, size, 0xFF)
    assert rig.bank.array_mode
    assert [call[0] for call in rig.calls] == ["leave", "enter"]


def test_narrow_commands_of_byte_wide_chips(make_rig):
    rig = make_rig(device_width=1)
    rig.bank.write(2, 2, 0x7098)  # chips 2 and 3; the others see what the lower one sees
    assert rig.read(0x40) == 0x8051_5151


def test_a_bank_of_two_chips_can_be_used_as_one_x16_chip(rig):
    """What U-Boot takes QEMU's virt bank for: 16-bit cycles, half the size, addresses shifted by one."""
    write = rig.bank.write
    write(0x55 * 4, 2, 0x98)
    assert [rig.bank.read((0x10 + i) * 4, 2) for i in range(3)] == list(b"QRY")
    write(0, 2, 0xFF)
    for command in (0x50, 0x20, 0xD0):
        write(0x4000, 2, command)
    assert rig.bank.read(0x4000, 2) == 0x80
    write(0x4000, 2, 0xFF)
    for offset, value in ((0x4100, 0x1122), (0x4102, 0x3344)):
        for command in (0x50, 0x40):
            write(0x4000, 2, command)
        write(offset, 2, value)
        assert rig.bank.read(0x4000, 2) == 0x80
    for command in (0x50, 0x70, 0xE8, 5):
        write(0x4000, 2, command)
    for i in range(6):
        write(0x4202 + 2 * i, 2, 0x0101 * (i + 1))
    write(0x4000, 2, 0xD0)
    assert rig.bank.read(0x4000, 2) == 0x80
    write(0x4000, 2, 0xFF)
    assert rig.bank.array_mode
    assert rig.array[0x4100:0x4104].hex() == "22114433"
    assert rig.array[0x4200:0x4210].hex() == "ffff" + "010102020303040405050606" + "ffff"
    assert rig.bank.errors == 0


def test_misaligned_access_across_bank_words_is_two_cycles(rig):
    rig.command(0, 0x40)
    rig.bank.write(0x12, 4, 0x00FF_CCDD)  # data for chip 1, then read array for both
    assert rig.array[0x10:0x18].hex() == "ffffddcc" + "ffffffff"
    assert rig.bank.array_mode
    assert rig.bank.read(0x12, 4) == 0xFFFF_CCDD
    rig.command(0, 0x98)
    assert rig.bank.read(0x42, 4) == 0x0052_0051


def test_misaligned_access_inside_a_bank_word(rig):
    rig.command(0, 0x40)
    rig.bank.write(0x11, 2, 0xAABB)  # high byte of chip 0, low byte of chip 1
    assert rig.array[0x10:0x14].hex() == "ffbbaaff"


def test_access_wider_than_the_bank_is_several_cycles(make_rig):
    rig = make_rig(width=2, device_width=2)
    rig.bank.write(0x20, 4, 0x1234_0040)  # setup, then its data at the next word
    assert rig.array[0x20:0x24].hex() == "ffff3412"
    assert rig.bank.read(0, 4) == 0x0080_0080


def test_wrong_interleave_drives_some_chips_to_nothing(rig):
    """A driver that takes the bank for one x32 chip: the upper chip sees 0000."""
    rig.write(0, 0x0000_0098)
    assert rig.read(0x40) == 0xFFFF_0051
    rig.write(0, 0x0000_00FF)
    assert rig.bank.array_mode
    assert rig.bank.errors == 0
