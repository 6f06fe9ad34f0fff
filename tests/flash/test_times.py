"""Busy times, suspend and resume, in virtual time."""

from __future__ import annotations

import pytest

from xipvm.devices.flash.geometry import TYPICAL, Timing

READY = 0x0080_0080
US = 1_000
MS = 1_000_000


@pytest.fixture
def rig(make_rig):
    return make_rig(timing=TYPICAL)


def start_erase(rig, offset):
    rig.command(offset, 0x20, 0xD0)


def start_program(rig, offset, value=0):
    rig.command(offset, 0x40)
    rig.write(offset, value)


def test_program_takes_its_time(rig):
    start_program(rig, 0x40)
    assert rig.read() == 0
    rig.clock.advance(128 * US - 1)
    assert rig.read() == 0
    assert rig.array[0x40:0x44] == b"\xff" * 4
    rig.clock.advance(1)
    assert rig.array[0x40:0x44] == bytes(4)  # by the clock's call, nobody looked
    assert rig.read() == READY
    assert rig.bank.programs == 1
    assert [event.actor for event in rig.events if event.kind == "flash_program"] == ["flash0"]


def test_erase_takes_its_time_and_is_one_event(rig):
    rig.bank.place(0, bytes(0x8000))
    rig.calls.clear()
    start_erase(rig, 0x4000)
    rig.clock.advance(1024 * MS - 1)
    assert rig.array[:0x8000] == bytes(0x8000)
    rig.clock.advance(1)
    assert rig.array[:0x8000] == bytes(0x4000) + b"\xff" * 0x4000
    assert rig.kinds("flash_erase") == [{"bank": 0, "offset": 0x4000, "size": 0x4000}]
    assert rig.calls[1:] == [("change", 0x4000, 0x4000)]


def test_done_before_the_next_access_when_the_clock_is_late(rig):
    """The vCPU loop runs the clock's calls at block starts only; an access must not see the past."""
    now = 0
    rig.clock.follow(lambda: now)
    start_program(rig, 0)
    now = 128 * US
    assert rig.read() == READY
    assert rig.array[:4] == bytes(4)
    assert rig.clock.run_due() == 0


def test_driver_polls(make_rig, make_driver):
    rig = make_rig(timing=TYPICAL)
    driver = make_driver(rig, idle_ns=50 * US)
    driver.program(0, bytes(range(256)) * 20)
    assert rig.array[:0x1400] == bytes(range(256)) * 20
    driver.erase(0)
    assert rig.array[:0x1400] == b"\xff" * 0x1400
    assert rig.clock.now > 1024 * MS


def test_a_busy_chip_takes_no_commands(rig):
    start_program(rig, 0)
    for command in (0xFF, 0x90, 0x98, 0x50, 0x40, 0x20, 0x70, 0xD0):
        rig.command(0, command)
        assert rig.read() == 0
    assert not rig.bank.array_mode
    assert rig.bank.errors == 2 * 6
    rig.clock.advance(128 * US)
    assert rig.read() == READY


def test_erase_suspend_read_program_resume(rig):
    rig.bank.place(0, bytes(0xC000))
    start_erase(rig, 0x4000)
    rig.clock.advance(256 * MS)
    rig.command(0, 0xB0)
    assert rig.read() == 0
    rig.clock.advance(20 * US)
    assert rig.read() == 0x00C0_00C0
    rig.command(0, 0xFF)
    assert rig.bank.array_mode
    assert rig.read(0) == 0
    start_program(rig, 0x10000, 0x1234_5678)
    assert rig.read() == 0x0040_0040
    rig.clock.advance(128 * US)
    assert rig.read() == 0x00C0_00C0
    assert rig.array[0x10000:0x10004].hex() == "78563412"
    rig.clock.advance(5000 * MS)
    assert rig.array[0x7FFC:0x8000] == bytes(4)
    rig.command(0, 0xD0)
    assert rig.read() == 0
    rig.clock.advance(768 * MS - 20 * US)
    assert rig.read() == READY
    assert rig.array[:0xC000] == bytes(0x4000) + b"\xff" * 0x4000 + bytes(0x4000)
    assert rig.bank.erases == 1


def test_a_suspended_erase_has_erased_the_first_part(rig):
    rig.bank.place(0x4000, bytes(0x4000))
    start_erase(rig, 0x4000)
    rig.clock.advance(512 * MS - 20 * US)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    assert rig.array[0x4000:0x8000] == b"\xff" * 0x2000 + bytes(0x2000)
    assert rig.calls[-1] == ("change", 0x4000, 0x2000)
    assert rig.kinds("flash_erase") == []


def test_resume_leaves_array_mode(rig):
    start_erase(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    rig.command(0, 0xFF)
    rig.calls.clear()
    rig.command(0, 0xD0)
    assert rig.calls == [("leave", True, ["read array"] * 2)]
    assert not rig.bank.array_mode


def test_suspend_latency_outlives_the_operation(rig):
    start_program(rig, 0)
    rig.clock.advance(120 * US)
    rig.command(0, 0xB0)
    rig.clock.advance(8 * US)
    assert rig.read() == READY  # done, not suspended
    rig.command(0, 0xD0)
    assert rig.read() == READY
    assert rig.array[:4] == bytes(4)


def test_program_suspend_allows_reading_only(rig):
    rig.bank.place(0x40, b"\x12\x34\x56\x78")
    start_program(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    assert rig.read() == 0x0084_0084
    rig.command(0, 0xFF)
    assert rig.read(0x40) == 0x7856_3412
    for setup in (0x40, 0xE8, 0x20, 0x60, 0xBC):
        rig.command(0, setup)
        assert rig.read() == 0x00B4_00B4
        rig.command(0, 0xD0)  # belongs to the refused sequence and resumes nothing
        assert rig.read() == 0x00B4_00B4
        rig.command(0, 0x50)
    rig.command(0, 0xD0)
    assert rig.read() == 0
    rig.clock.advance(108 * US)
    assert rig.read() == READY
    assert rig.array[:4] == bytes(4)


def test_narrow_commands_after_a_refused_program(rig):
    """It waited for no data, so what comes narrow is a command for both chips."""
    start_program(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    rig.command(0, 0x40, 0x00)
    rig.bank.write(0, 2, 0x90)
    assert rig.read() == 0x0089_0089


def test_program_in_a_suspended_erase_can_be_suspended_too(rig):
    start_erase(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    start_program(rig, 0x4000)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    assert rig.read() == 0x00C4_00C4
    rig.command(0, 0xD0)
    rig.clock.advance(108 * US)
    assert rig.read() == 0x00C0_00C0
    rig.command(0, 0xD0)
    rig.clock.advance(1024 * MS)
    assert rig.read() == READY
    assert rig.array[0x4000:0x4004] == bytes(4)


def test_what_a_suspended_erase_forbids(rig):
    start_erase(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    rig.command(0x4000, 0x20, 0xD0)
    assert rig.read() == 0x00F0_00F0
    rig.command(0, 0x50)
    start_program(rig, 0x3FFC)
    assert rig.read() == 0x00D0_00D0
    rig.command(0, 0x50)
    rig.command(0x4000, 0x60, 0x01)  # locking works
    assert rig.read() == 0x00C0_00C0
    rig.clock.advance(10_000 * MS)
    assert rig.array.count(0xFF) == len(rig.array)
    assert rig.bank.erases == 0


def test_lock_during_suspend_does_not_stop_the_erase(rig):
    rig.bank.place(0, bytes(8))
    start_erase(rig, 0)
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    rig.command(0, 0x60, 0x01, 0xD0)
    rig.clock.advance(1024 * MS)
    assert rig.read() == READY
    assert rig.array[:8] == b"\xff" * 8


def test_interleaved_chips_may_be_at_different_points(rig):
    """Chip 1 starts later, so chip 0 is done while chip 1 can still be suspended."""
    rig.write(0, 0x0000_0020)
    rig.write(0, 0x0000_00D0)
    rig.clock.advance(100 * MS)
    rig.write(0, 0x0020_0070)
    rig.write(0, 0x00D0_0070)
    rig.clock.advance(924 * MS)
    assert rig.read() == 0x0000_0080
    rig.command(0, 0xB0, 0x70)
    rig.clock.advance(20 * US)
    assert rig.read() == 0x00C0_0080
    rig.command(0, 0xD0, 0x70)
    assert rig.read() == 0x0000_0080
    rig.clock.advance(100 * MS)
    assert rig.read() == READY
    assert rig.bank.erases == 2


def test_reset_cuts_an_operation_off(rig):
    rig.bank.place(0, bytes(0x4000))
    start_erase(rig, 0)
    rig.clock.advance(256 * MS)
    rig.bank.reset()
    assert rig.bank.array_mode
    assert rig.array[:0x4000] == b"\xff" * 0x1000 + bytes(0x3000)
    rig.clock.advance(5000 * MS)
    assert rig.array[:0x4000] == b"\xff" * 0x1000 + bytes(0x3000)
    assert rig.clock.next_deadline() is None


def test_close_takes_the_waiting_call_back(rig):
    start_erase(rig, 0)
    assert rig.clock.next_deadline() == 1024 * MS
    rig.bank.close()
    assert rig.clock.next_deadline() is None


def test_one_call_waits_for_the_chip_that_is_done_first(rig):
    start_program(rig, 0)
    start_program(rig, 0)
    assert rig.clock.next_deadline() == 128 * US
    rig.command(0, 0xB0)
    assert rig.clock.next_deadline() == 20 * US


def test_instant_timing_ignores_suspend_and_resume(make_rig):
    rig = make_rig()
    rig.command(0, 0x20, 0xD0, 0xB0, 0x70)
    assert rig.read() == READY
    rig.command(0, 0xD0)
    assert rig.read() == READY


def test_busy_times_need_a_clock():
    from xipvm.devices.flash.cfi01 import PflashCfi01
    from xipvm.devices.flash.image import FlashImage

    with FlashImage.erased(1 << 18) as image, pytest.raises(ValueError, match="clock"):
        PflashCfi01(0, image, size=1 << 18, sector=1 << 14, timing=Timing(block_erase=1))


def test_describe_says_what_runs_and_what_is_suspended(rig):
    start_erase(rig, 0x4000)
    assert rig.bank.describe().startswith("chip 0: read status, SR=0x00, erase of block 1 runs; chip 1:")
    rig.command(0, 0xB0)
    rig.clock.advance(20 * US)
    start_program(rig, 0x8000)
    assert rig.bank.describe().startswith(
        "chip 0: read status, SR=0x40, program of word 0x2000 runs, erase of block 1 suspended;"
    )


def test_as_linux_suspends_for_an_interrupt(rig):
    """The loop of an XIP kernel: suspend, check that it took, run from the array, resume, until SR7."""
    rig.bank.place(0, bytes(0x8000))
    start_erase(rig, 0x4000)
    suspended = 0
    while rig.read() != READY:
        rig.clock.advance(100 * MS)
        rig.command(0x4000, 0xB0, 0x70)
        while rig.read() & READY != READY:
            rig.clock.advance(1 * US)
        if rig.read() & 0x0040_0040 != 0x0040_0040:
            break
        suspended += 1
        rig.command(0x4000, 0xFF)
        assert rig.bank.array_mode
        assert rig.read(0) == 0
        rig.command(0x4000, 0xD0, 0x70)
    assert suspended == 10
    rig.command(0, 0xFF)
    assert rig.array[:0x8000] == bytes(0x4000) + b"\xff" * 0x4000
