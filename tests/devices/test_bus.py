"""The bus: which device answers where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.devices.bus import Bus, BusError


class Recorder:
    """A device that remembers what was asked of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append(("read", offset, size))
        return 0x1000_0000 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("write", offset, size, value))


def test_accesses_reach_the_device_at_their_offset() -> None:
    bus, low, high = Bus(), Recorder("low"), Recorder("high")
    bus.map(0x1000, 0x100, low)
    bus.map(0x9000, 0x100, high)
    assert bus.read(0x9004, 4) == 0x1000_0004
    bus.write(0x10FF, 1, 7)
    assert high.calls == [("read", 4, 4)]
    assert low.calls == [("write", 0xFF, 1, 7)]
    assert bus.find(0x90FF) == (high, 0xFF)
    assert [bus.covers(gpa) for gpa in (0xFFF, 0x1000, 0x10FF, 0x1100)] == [False, True, True, False]


def test_a_64_bit_access_is_two_halves_low_address_first() -> None:
    bus, device = Bus(), Recorder("device")
    bus.map(0, 0x100, device)
    assert bus.read(8, 8) == 0x1000_000C_1000_0008
    bus.write(16, 8, 0x1111_2222_3333_4444)
    assert device.calls == [
        ("read", 8, 4),
        ("read", 12, 4),
        ("write", 16, 4, 0x3333_4444),
        ("write", 20, 4, 0x1111_2222),
    ]


@pytest.mark.parametrize(("gpa", "size"), [(0xFFF, 1), (0x1100, 1), (0x10FE, 4), (0x5000, 4), (0, 8)])
def test_an_access_without_a_device_is_a_bus_error(gpa: int, size: int) -> None:
    bus = Bus()
    bus.map(0x1000, 0x100, Recorder("device"))
    bus.read(0x1000, 4)
    with pytest.raises(BusError) as error:
        bus.read(gpa, size)
    assert error.value.access == "read"
    with pytest.raises(BusError) as error:
        bus.write(gpa, size, 0)
    assert (error.value.gpa, error.value.access) == (gpa, "write")


def test_overlap_is_refused_and_names_both() -> None:
    bus = Bus()
    bus.map(0x1000, 0x1000, Recorder("uart"))
    for base, size in ((0x1000, 1), (0xFFF, 2), (0x1FFF, 1), (0, 0x10000), (0x1800, 0x10)):
        with pytest.raises(ValueError, match=r"rtc .* uart"):
            bus.map(base, size, Recorder("rtc"))
    with pytest.raises(ValueError, match="no range"):
        bus.map(0x8000, 0, Recorder("rtc"))
    bus.map(0x2000, 0x1000, Recorder("after"))
    bus.map(0, 0x1000, Recorder("before"))
    assert [each.device.name for each in bus.ranges()] == ["before", "uart", "after"]


def test_unmap_takes_effect_at_once() -> None:
    bus, device = Bus(), Recorder("device")
    bus.map(0x1000, 0x100, device)
    bus.read(0x1000, 4)
    assert bus.unmap(0x1000) is device
    assert bus.find(0x1000) is None
    with pytest.raises(ValueError, match="nothing is mapped"):
        bus.unmap(0x1000)


@settings(deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 60)), st.lists(st.integers(0, 64), max_size=40))
def test_find_agrees_with_a_scan(places: set[int], probes: list[int]) -> None:
    bus = Bus()
    for place in places:
        bus.map(place * 16, 10, Recorder(str(place)))
    for probe in probes:
        for gpa in (probe * 16, probe * 16 + 9, probe * 16 + 10):
            found = bus.find(gpa)
            expected = (str(gpa // 16), gpa % 16) if gpa // 16 in places and gpa % 16 < 10 else None
            assert (None if found is None else (found[0].name, found[1])) == expected
