"""What the bank tells its host, in which order; the programming adapter; the trace."""

from __future__ import annotations

import ctypes

import pytest

from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.image import FlashImage
from xipvm.errors import FlashImageError
from xipvm.trace.events import KINDS

ARRAY = ["read array"] * 2
STATUS = ["read status"] * 2


def test_order_of_the_hooks_around_a_word_program(rig):
    rig.command(0, 0x40)
    rig.write(0x20, 0x0000_FFFF)
    rig.command(0, 0xFF)
    assert rig.calls == [("leave", True, ARRAY), ("change", 0x20, 4), ("enter", True, ARRAY)]


def test_cells_are_new_when_on_change_is_called(rig):
    seen = []
    rig.bank.on_change = lambda offset, size: seen.append((rig.array[:4], [c.mode for c in rig.bank.chips]))
    rig.command(0, 0x40)
    rig.write(0, 0)
    assert seen == [(bytes(4), STATUS)]


def test_no_change_is_reported_where_no_bit_changes(rig):
    rig.command(0, 0x40)
    rig.write(0, 0xFFFF_FFFF)
    rig.command(0, 0x20, 0xD0)
    assert rig.calls == [("leave", True, ARRAY)]
    assert (rig.bank.programs, rig.bank.erases) == (1, 1)
    rig.bank.place(0, bytes(4))
    rig.calls.clear()
    rig.command(0, 0x40)
    rig.write(0, 0x1234_5678)  # into zeros
    assert rig.calls == []


def test_a_leave_that_raises_leaves_the_bank_as_it_was(rig):
    def refuse():
        raise RuntimeError

    rig.bank.on_leave_array = refuse
    for write in (lambda: rig.command(0, 0x40), lambda: rig.bank.write(0, 1, 0x40)):
        with pytest.raises(RuntimeError):
            write()
        assert rig.bank.array_mode
        assert rig.bank.describe() == "chip 0: read array, SR=0x80; chip 1: read array, SR=0x80"


def test_enter_comes_with_the_last_chip(rig):
    rig.command(0, 0x70)
    rig.calls.clear()
    rig.write(0, 0x00FF_0000)
    assert rig.calls == []
    rig.write(0, 0x0000_00FF)
    assert rig.calls == [("enter", True, ARRAY)]


def test_reset_enters_array_mode_once(rig):
    rig.command(0, 0x98)
    rig.bank.reset()
    rig.bank.reset()
    assert [call[0] for call in rig.calls] == ["leave", "enter"]


def test_chips_of_one_cycle_are_reported_together(rig):
    rig.bank.place(0x8000, bytes(0x4000))
    rig.calls.clear()
    rig.command(0x8000, 0x20, 0xD0)
    assert rig.calls[1:] == [("change", 0x8000, 0x4000)]
    assert [event.kind for event in rig.events].count("flash_erase") == 1


def test_trace(rig):
    rig.command(0x4000, 0x40)
    rig.write(0x4000, 0)
    rig.command(0, 0xFF, 0x20, 0x00)
    fields = [(event.kind, *event.fields.values()) for event in rig.events]
    assert fields == [
        ("flash_mode", 0, 0, "read status", False),
        ("flash_mode", 0, 1, "read status", False),
        ("flash_program", 0, 0x4000, 4),
        ("flash_mode", 0, 0, "read array", True),
        ("flash_mode", 0, 1, "read array", True),
        ("flash_mode", 0, 0, "read status", False),
        ("flash_mode", 0, 1, "read status", False),
        ("flash_error", 0, 0, "chip 0: block erase not confirmed but 0x00"),
        ("flash_error", 0, 0, "chip 1: block erase not confirmed but 0x00"),
    ]
    assert all(list(event.fields) == [field.name for field in KINDS[event.kind].fields] for event in rig.events)


def test_the_end_state_does_not_depend_on_tracing(make_rig):
    states = []
    for traced in (True, False):
        rig = make_rig()
        if not traced:
            rig.trace.detach(rig.events.append)
        rig.command(0, 0x40)
        rig.write(4, 0x1234)
        rig.command(0, 0x60, 0x01, 0x20, 0xD0, 0xC0)
        states.append((rig.array, rig.bank.describe(), rig.bank.errors, rig.bank.programs, rig.calls))
        assert bool(rig.events) is traced
    assert states[0] == states[1]


def test_place_writes_what_differs(rig):
    data = bytes(0x1800) + b"\xff" * 0x1000 + b"\x01"
    rig.bank.place(0x100, data)
    assert rig.array[0x100 : 0x100 + len(data)] == data
    assert rig.calls == [("change", 0x100, 0x1000), ("change", 0x1100, 0x1000), ("change", 0x2100, 0x801)]
    rig.calls.clear()
    rig.bank.place(0x100, bytearray(data))
    rig.bank.place(0x100, b"")
    assert rig.calls == []
    rig.bank.place(0x100, memoryview(b"\xff\xff"))  # cells go up too: this is no bus cycle
    assert rig.array[0x100:0x103] == b"\xff\xff\0"


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0x3FFFF, 2), (0x40001, 0)])
def test_place_outside_the_bank(rig, offset, size):
    with pytest.raises(FlashImageError, match=r"flash0: .* is outside the bank of 0x40000 bytes"):
        rig.bank.place(offset, bytes(size))


def test_place_in_a_readonly_image(tmp_path, make_rig):
    path = tmp_path / "flash.img"
    path.write_bytes(bytes(0x40000))
    rig = make_rig(FlashImage.open(str(path), 0x40000, readonly=True))
    rig.bank.place(0x100, bytes(0x3000))
    with pytest.raises(FlashImageError, match=r"flash\.img: readonly, and differs from what belongs at 0x100"):
        rig.bank.place(0x100, bytes(0x3000) + b"\x01")
    assert rig.calls == []


def test_two_banks_of_one_image(make_rig):
    image = FlashImage.erased(0x80000)
    first = make_rig(image)
    second = PflashCfi01(1, image, size=0x40000, sector=0x4000, offset=0x40000)
    assert (second.name, second.address) == ("flash1", image.address + 0x40000)
    second.write(0, 4, 0x0040_0040)
    second.write(0x10, 4, 0)
    second.write(0, 4, 0x00FF_00FF)
    assert second.read(0x10, 4) == 0
    assert first.read(0x10) == 0xFFFF_FFFF
    assert ctypes.string_at(second.address + 0x10, 5) == b"\0\0\0\0\xff"
    assert first.bank.array_mode


def test_a_bank_may_not_reach_beyond_its_image():
    with FlashImage.erased(0x40000) as image, pytest.raises(ValueError, match="outside a flash image"):
        PflashCfi01(0, image, size=0x40000, sector=0x4000, offset=0x4000)


@pytest.mark.parametrize("sizes", [(0x30000, 0x4000), (0x40000, 0x3000), (0x4000, 0x8000)])
def test_impossible_geometry(sizes):
    with FlashImage.erased(0x40000) as image, pytest.raises(ValueError, match="flash"):
        PflashCfi01(0, image, size=sizes[0], sector=sizes[1])
