"""What each command does to one bank, cycle by cycle, against the datasheets (and against what QEMU 7.2 does)."""

from __future__ import annotations

import pytest

READY = 0x0080_0080
SEQUENCE_ERROR = 0x00B0_00B0


def test_power_up_reads_the_array(rig):
    rig.bank.place(0x100, b"\x78\x56\x34\x12")
    assert rig.bank.array_mode
    assert rig.read(0x100) == 0x12345678
    assert [rig.bank.read(0x100 + i, 1) for i in range(4)] == [0x78, 0x56, 0x34, 0x12]
    assert rig.bank.read(0x102, 2) == 0x1234


@pytest.mark.parametrize(
    ("command", "leaves"),
    [(0x70, True), (0x90, True), (0x98, True), (0x40, True), (0x10, True), (0xE8, True), (0x20, True), (0x60, True),
     (0xBC, True), (0xFF, False), (0x50, False), (0xB0, False), (0xD0, False), (0xF0, False), (0x00, False),
     (0xC0, False), (0x55, False)],
)  # fmt: skip
def test_which_commands_leave_array_mode(rig, command, leaves):
    rig.command(0, command)
    assert rig.bank.array_mode is not leaves
    assert bool(rig.calls) is leaves


def test_read_array_ends_every_read_mode(rig):
    for command in (0x70, 0x90, 0x98):
        rig.command(0, command)
        assert rig.read() != 0xFFFF_FFFF
        rig.command(0, 0xFF)
        assert rig.bank.array_mode
        assert rig.read() == 0xFFFF_FFFF


def test_query_mode_takes_any_command(rig):
    """QEMU swallows everything but FF there."""
    rig.command(0, 0x98, 0x70)
    assert rig.read() == READY
    rig.command(0, 0x98, 0x90)
    assert rig.read() == 0x0089_0089


def test_clear_status_keeps_the_ready_bit_and_the_mode(rig):
    """QEMU's status is 0 after 50, until the next operation."""
    rig.command(0, 0x20, 0x20, 0x70)
    assert rig.read() == SEQUENCE_ERROR
    rig.command(0, 0x50)
    assert rig.read() == READY
    rig.command(0, 0xFF, 0x50)
    assert rig.bank.array_mode


@pytest.mark.parametrize("setup", [0x40, 0x10])
def test_word_program_clears_bits_only(rig, setup):
    rig.command(0x40, setup)
    rig.write(0x40, 0x12345678)
    assert rig.read() == READY
    rig.command(0x40, setup)
    rig.write(0x40, 0xFFFF_0000)
    rig.command(0, 0xFF)
    assert rig.read(0x40) == 0x1234_0000  # QEMU stores FFFF0000
    assert rig.array.count(0xFF) == len(rig.array) - 4


def test_setup_cycles_change_no_cell(rig):
    """QEMU erases at the setup byte 20."""
    rig.bank.place(0, bytes(64))
    for setup in (0x20, 0x40, 0xE8, 0x60, 0xBC):
        before = rig.array
        rig.command(0, setup)
        assert rig.array == before
        rig.bank.reset()
    assert rig.bank.erases == rig.bank.programs == 0


def test_erase_happens_at_the_confirm_in_the_confirmed_block(rig):
    rig.bank.place(0, bytes(len(rig.array)))
    rig.command(0x8000, 0x20)
    assert rig.read() == READY
    rig.command(0x4ABC, 0xD0)
    rig.command(0, 0xFF)
    assert rig.array == bytes(0x4000) + b"\xff" * 0x4000 + bytes(len(rig.array) - 0x8000)
    assert rig.bank.erases == 1


@pytest.mark.parametrize("confirm", [0xFF, 0x00, 0x20, 0x70, 0x50, 0x2F, 0xB0])
def test_erase_without_confirm_is_a_sequence_error(rig, confirm):
    rig.bank.place(0, bytes(64))
    rig.command(0, 0x20, confirm)
    assert rig.read() == SEQUENCE_ERROR
    assert rig.array[:64] == bytes(64)
    rig.command(0, 0xD0)  # confirms nothing any more
    assert rig.array[:64] == bytes(64)
    assert rig.bank.errors == 2


@pytest.mark.parametrize("confirm", [0xFF, 0x00, 0x60, 0x70])
def test_lock_sequence_error(rig, confirm):
    rig.command(0, 0x60, confirm)
    assert rig.read() == SEQUENCE_ERROR


def test_errors_stay_until_cleared(rig):
    rig.command(0, 0x20, 0x00)
    rig.command(0, 0x20, 0xD0)
    assert rig.read() == SEQUENCE_ERROR
    rig.command(0, 0x50, 0x20, 0xD0)
    assert rig.read() == READY


@pytest.mark.parametrize("command", [0x01, 0x2F, 0x30, 0x80, 0xAA, 0xC0, 0xE9])
def test_unknown_commands_set_a_sequence_error_and_keep_the_mode(rig, command):
    rig.command(0, command)
    assert rig.bank.array_mode
    rig.command(0, 0x70)
    assert rig.read() == SEQUENCE_ERROR
    assert rig.kinds("flash_error")[0]["what"] == f"chip 0: unknown command {command:#04x}"


@pytest.mark.parametrize("command", [0xF0, 0x00, 0xB0, 0xD0])
def test_commands_that_an_idle_chip_ignores(rig, command):
    """Probing drivers write F0, and a driver that gets the interleave wrong writes 0 to some chips."""
    rig.command(0, 0x70, command)
    assert rig.read() == READY
    assert rig.bank.errors == 0


def test_commands_reach_the_chip_on_dq0_to_7_only(rig):
    rig.write(0, 0xAB98_CD98)
    assert rig.read(0x40) == 0x0051_0051


def test_identifier(rig, make_rig):
    rig.command(0, 0x90)
    assert [rig.read(4 * i) for i in range(5)] == [0x0089_0089, 0x0018_0018, 0, 0, 0]
    assert rig.read(0x4000) == 0x0089_0089  # of any block
    other = make_rig(ids=(0x2C, 0x7E))
    other.command(0, 0x90)
    assert [other.read(0), other.read(4)] == [0x002C_002C, 0x007E_007E]


def test_set_read_configuration(rig):
    rig.command(0x1234 * 4, 0x60, 0x03)
    assert rig.read() == READY
    rig.command(0, 0x90)
    assert rig.read(5 * 4) == 0x1234_1234


def test_blank_check(rig):
    rig.command(0x4000, 0xBC, 0xD0)
    assert rig.read() == READY
    rig.command(0x4100, 0x40)
    rig.write(0x4100, 0xFFFF_FFFE)
    rig.command(0x4000, 0xBC, 0xD0)
    assert rig.read() == 0x0080_00A0  # chip 1 is blank
    rig.command(0, 0x50, 0xBC, 0x70)
    assert rig.read() == SEQUENCE_ERROR


def test_reset_returns_to_array_and_forgets_errors(rig):
    rig.command(0, 0x20, 0xFF, 0x60, 0x01, 0x40)
    rig.bank.reset()
    assert rig.bank.array_mode
    rig.write(0, 0)  # is no data any more
    assert rig.array[:4] == b"\xff" * 4
    rig.command(0, 0x70)
    assert rig.read() == READY


def test_describe(rig):
    assert rig.bank.describe() == "chip 0: read array, SR=0x80; chip 1: read array, SR=0x80"
    rig.write(0, 0x0000_0020)
    assert rig.bank.describe() == "chip 0: read status, SR=0x80, erase setup; chip 1: read array, SR=0x80"
    rig.write(0, 0x0000_0000)
    assert rig.bank.describe() == "chip 0: read status, SR=0xb0; chip 1: read array, SR=0x80"
    for setup, text in ((0x40, "program setup"), (0x60, "lock setup"), (0xBC, "blank check setup")):
        rig.bank.reset()
        rig.command(0, setup)
        assert rig.bank.describe().endswith(f"chip 1: read status, SR=0x80, {text}")
    rig.bank.reset()
    rig.command(0, 0xE8)
    assert rig.bank.describe().endswith("buffered program setup")
    rig.command(0, 0x02)
    rig.write(0, 0)
    assert rig.bank.describe().endswith("1 of 3 buffer words")
    rig.write(4, 0)
    rig.write(8, 0)
    assert rig.bank.describe().endswith("3 buffer words not confirmed")
