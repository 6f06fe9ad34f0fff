"""The same accesses to QEMU's pflash_cfi01: what a driver sees is the same, except where QEMU is no chip."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from xipvm.devices.flash.files import create

MIB = 1 << 20
READY = 0x0080_0080

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="qemu-system-aarch64 is not installed"),
]


class QtestBus:
    """Guest physical memory of a QEMU whose CPU never starts."""

    COMMANDS = {1: "b", 2: "w", 4: "l"}
    width = 4

    def __init__(self, image):
        command = ["qemu-system-aarch64", "-M", "virt", "-S", "-display", "none", "-nodefaults"]
        command += ["-qtest", "stdio", "-drive", f"if=pflash,unit=0,file={image},format=raw"]
        self.qemu = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )

    def ask(self, line):
        self.qemu.stdin.write(line + "\n")
        while not (answer := self.qemu.stdout.readline()).startswith("OK"):
            assert answer, "QEMU is gone"
        return answer.split()[1:]

    def read(self, offset, size):
        return int(self.ask(f"read{self.COMMANDS[size]} {offset:#x}")[0], 0)

    def write(self, offset, size, value):
        self.ask(f"write{self.COMMANDS[size]} {offset:#x} {value:#x}")

    def close(self):
        self.qemu.terminate()
        self.qemu.communicate()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    image = tmp_path_factory.mktemp("qemu") / "flash.img"
    create(str(image), 64 * MIB)
    bus = QtestBus(image)
    yield bus
    bus.close()


@pytest.fixture
def qemu(running):
    """It, erased where the tests program, and in array mode, whatever sequence a test left unfinished."""
    for value in (0, 0xFFFF_FFFF, 0x00FF_00FF, 0x00FF_00FF):  # a count of one, its word, no confirm
        running.write(0, 4, value)
    for sector in (0, 0x40000, 0x80000):
        for command in (0x20, 0xD0, 0xFF):
            running.write(sector, 4, command * 0x0001_0001)
    return running


@pytest.fixture
def ours(make_rig):
    return make_rig(size=64 * MIB, sector=256 * 1024).bank


@pytest.fixture
def both(ours, qemu, make_driver):
    """A driver of our bank and one of QEMU's, both probed."""
    return [make_driver(SimpleNamespace(bank=bus, clock=None)) for bus in (ours, qemu)]


def test_probe_identifiers_and_query(both):
    us, qemu = both
    assert (us.chip_width, us.size, us.sector, us.buffer) == (qemu.chip_width, qemu.size, qemu.sector, qemu.buffer)
    assert us.identify() == qemu.identify()
    differ = {index for index in range(0x10, 0x60) if us.query[index] != qemu.query[index]}
    assert differ == {0x36, 0x3A, 0x3B, 0x3F}  # features, suspend, lock bits, protection registers


def test_erase_and_program_leave_the_same_bytes(both):
    data = bytes(i * 11 & 0xFF for i in range(0x2000))
    contents = []
    for driver in both:
        driver.program(0x3F000, data)
        driver.program_word(0x80000, 0x1234_5678)
        driver.erase(0)
        driver.program(0x10000, data[:0x40])
        contents.append([driver.read(offset, 0x100) for offset in (0x3FF00, 0x40000, 0x40F00, 0x80000, 0x10000)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "cycles",
    [
        [(0, 0x70)],
        [(0, 0x90)],
        [(0, 0x98)],
        [(0, 0x98), (0, 0xFF)],
        [(0, 0x40), (0x100, 0x55)],
        [(0, 0x10), (0x100, 0x55), (0, 0xFF)],
        [(0, 0xE8)],
        [(0, 0xE8), (0, 1), (0x100, 0x55), (0x104, 0x66)],
        [(0, 0xE8), (0, 1), (0x100, 0x55), (0x104, 0x66), (0, 0xD0)],
        [(0, 0x60), (0, 0xD0)],
        [(0x40000, 0x20), (0x40000, 0xD0)],
        [(0x40000, 0x20), (0x40000, 0xD0), (0, 0xFF)],
        [(0, 0xF0), (0, 0xFF)],
        [(0, 0x50), (0, 0xFF)],
    ],
)
def test_what_is_read_after_right_sequences(ours, qemu, cycles):
    for offset, command in cycles:
        for bus in (ours, qemu):
            bus.write(offset, 4, command * 0x0001_0001)
    for offset in (0, 4, 8, 0x40, 0x44, 0x100, 0x104, 0x40000):
        for size in (4, 2):
            assert ours.read(offset, size) == qemu.read(offset, size)


# Aligned ones: QEMU splits the others.
@pytest.mark.parametrize(("size", "lane"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2)])
def test_narrow_cycles_do_the_same(ours, qemu, size, lane):
    reads = []
    for bus in (ours, qemu):
        seen = []
        for offset, value in ((lane, 0x70), (lane, 0x20), (lane, 0xD0), (lane, 0x40), (0x100 + lane, 0x5A)):
            bus.write(offset, size, value)
            seen.append(bus.read(0, 4))
        bus.write(lane, size, 0xE8)
        bus.write(lane, size, 2)
        for i in range(3):
            bus.write(0x200 + lane + size * i, size, 0x11 * i)
        bus.write(lane, size, 0xD0)
        seen.append(bus.read(0, 4))
        bus.write(lane, size, 0xFF)
        seen += [bus.read(offset, 4) for offset in (0, 0x100, 0x200, 0x204, 0x208)]
        bus.write(4 * 0x55 + lane, size, 0x98)
        seen += [bus.read(4 * index, 2) for index in range(0x10, 0x30)]
        bus.write(lane, size, 0xFF)
        reads.append(seen)
    assert reads[0] == reads[1]


# What QEMU 7.2 does, and what a chip does.


@pytest.fixture
def as_in_7_2():
    version = subprocess.run(["qemu-system-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    if "version 7.2" not in version:
        pytest.skip("another QEMU may be another chip")


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_programs_bits_up(both):
    results = []
    for driver in both:
        driver.program_word(0, 0x1234_5678)
        driver.program_word(0, 0xFFFF_0000)
        results.append(driver.get(0))
    assert results == [0x1234_0000, 0xFFFF_0000]


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_erases_before_the_confirm(both):
    results = []
    for driver in both:
        driver.program_word(0, 0x1234_5678)
        driver.put(0, 0x20)
        driver.put(0, 0xFF)
        driver.put(0, 0xFF)
        results.append(driver.get(0))
    assert results == [0x1234_5678, 0xFFFF_FFFF]


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_clears_the_ready_bit(both):
    for driver, status in zip(both, (READY, 0), strict=True):
        driver.put(0, 0x50)
        driver.put(0, 0x70)
        assert driver.get(0) == status


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_keeps_no_locks(both, driver_error):
    us, qemu = both
    us.lock(0)
    qemu.lock(0)
    qemu.program_word(0, 0)
    with pytest.raises(driver_error):
        us.program_word(0, 0)


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_swallows_commands_in_query_mode(both):
    for driver, value in zip(both, (READY, 0), strict=True):
        driver.put(0, 0x98)
        driver.put(0, 0x70)
        assert driver.get(0) == value


@pytest.mark.usefixtures("as_in_7_2")
def test_qemu_takes_one_lane_for_all(ours, qemu):
    for bus, value in ((ours, 0xFFFF_0080), (qemu, READY)):
        bus.write(0, 4, 0x0000_0070)
        assert bus.read(0, 4) == value
