"""Buffered programming: counts, windows, confirm and abort."""

from __future__ import annotations

import pytest

READY = 0x0080_0080
SEQUENCE_ERROR = 0x00B0_00B0


def load(rig, offset, words, count=None):
    rig.command(offset, 0xE8, (len(words) if count is None else count) - 1)
    for i, word in enumerate(words):
        rig.write(offset + 4 * i, word)


def test_confirmed_buffer_is_programmed(rig):
    words = [0x1111_1111 * (i % 15 + 1) for i in range(100)]
    load(rig, 0x400, words)
    assert rig.array.count(0xFF) == len(rig.array)  # QEMU 7.2 has stored them by now
    rig.command(0x400, 0xD0)
    assert rig.read() == READY
    assert rig.array[0x400:0x590] == b"".join(word.to_bytes(4, "little") for word in words)
    assert rig.bank.programs == 1
    assert rig.kinds("flash_program") == [{"bank": 0, "offset": 0x400, "size": 400}]


def test_buffer_ands_into_the_cells(rig):
    rig.bank.place(0, b"\x0f" * 8)
    load(rig, 0, [0xFCFC_FCFC, 0xFFFF_FFFF])
    rig.command(0, 0xD0)
    assert rig.array[:8] == b"\x0c" * 4 + b"\x0f" * 4


def test_one_word(rig):
    load(rig, 0x40, [0])
    rig.command(0, 0xD0)
    assert rig.array[0x40:0x44] == bytes(4)
    assert rig.read() == READY


def test_full_buffer_of_every_chip(rig):
    load(rig, 0, [0] * 1024)
    rig.command(0, 0xD0)
    assert rig.read() == READY
    assert rig.array[:0x1004] == bytes(0x1000) + b"\xff" * 4


def test_count_beyond_the_buffer_is_a_sequence_error(rig):
    rig.command(0, 0xE8, 1024)
    assert rig.read() == SEQUENCE_ERROR
    rig.command(0, 0xFF)
    assert rig.bank.array_mode


@pytest.mark.parametrize("confirm", [0xFF, 0x00, 0x70, 0xE8, 0x50])
def test_anything_but_the_confirm_discards_the_buffer(rig, confirm):
    load(rig, 0, [0, 0])
    rig.command(0, confirm)
    assert rig.read() == SEQUENCE_ERROR
    rig.command(0, 0xD0)
    assert rig.array.count(0xFF) == len(rig.array)


def test_words_may_come_in_any_order_and_twice(rig):
    rig.command(0x100, 0xE8, 3)
    for offset, word in ((0x100, 0xFFFF_FFF0), (0x10C, 1), (0x104, 2), (0x100, 0xFFFF_FF0F)):
        rig.write(offset, word)
    rig.command(0, 0xD0)
    assert rig.array[0x100:0x110].hex() == "00ffffff" + "02000000" + "ffffffff" + "01000000"
    assert rig.kinds("flash_program") == [{"bank": 0, "offset": 0x100, "size": 16}]


@pytest.mark.parametrize("stray", [0x0FC, 0x108, 0x4100])
def test_word_outside_start_and_count_ends_the_sequence(rig, stray):
    rig.command(0x100, 0xE8, 1)
    rig.write(0x100, 0)
    rig.write(stray, 0)
    assert rig.read() == SEQUENCE_ERROR
    rig.command(0, 0xD0)
    assert rig.array.count(0xFF) == len(rig.array)


def test_buffer_may_not_cross_its_block(rig):
    load(rig, 0x3FFC, [0, 0])
    assert rig.read() == SEQUENCE_ERROR
    assert rig.array.count(0xFF) == len(rig.array)


def test_status_can_be_read_in_every_cycle(rig):
    rig.command(0, 0xE8)
    assert rig.read() == READY
    rig.command(0, 1)
    assert rig.read() == READY
    rig.write(0, 0)
    assert rig.read() == READY


def test_commands_are_data_while_the_buffer_fills(rig):
    load(rig, 0, [0x00FF_00FF, 0x0050_0050, 0x00B0_00B0])
    rig.command(0, 0xD0)
    assert rig.array[:12].hex() == "ff00ff00" + "50005000" + "b000b000"


def test_count_is_as_wide_as_the_chip(make_rig):
    rig = make_rig(width=1, device_width=1)
    rig.command(0, 0xE8, 0xFF)
    for i in range(256):
        rig.write(i, i)
    rig.command(0, 0xD0)
    assert rig.array[:257] == bytes(range(256)) + b"\xff"


def test_driver_programs_across_windows_and_blocks(rig, driver):
    data = bytes(i * 7 & 0xFF for i in range(0x5000))
    driver.program(0x3000, data)
    assert driver.read(0x3000, len(data)) == data
    assert rig.array[0x3000:0x8000] == data
