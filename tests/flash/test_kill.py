"""A process that is killed while the guest programs or erases leaves an image that a chip could hold."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from xipvm.devices.flash.files import create
from xipvm.devices.flash.image import FlashImage

SIZE = 0x40000
SECTOR = 0x10000

PRELUDE = """
import os, signal, sys
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.image import FlashImage

image = FlashImage.open(sys.argv[1], 0x40000)
bank = PflashCfi01(0, image, size=0x40000, sector=0x10000)

def both(offset, *commands):
    for command in commands:
        bank.write(offset, 4, command * 0x10001)

def program(offset, value):
    both(offset, 0xE8, 1023)
    for i in range(1024):
        bank.write(offset + 4 * i, 4, value)
    both(offset, 0xD0)
"""

# The bank's cells, with a SIGKILL after so many stores: it strikes inside one buffered program.
STORES = """
class Cells:
    def __init__(self, cells, stores):
        self.cells, self.stores = cells, stores
        self.format = cells.format
    def __getitem__(self, index):
        return self.cells[index]
    def __setitem__(self, index, value):
        self.cells[index] = value
        self.stores -= 1
        if not self.stores:
            os.kill(os.getpid(), signal.SIGKILL)

bank._cells = Cells(bank._cells, int(sys.argv[2]))
program(0, 0x12345678)
"""

LOOP = """
while True:
    both(0, 0x20, 0xD0)
    for offset in range(0, 0x10000, 0x1000):
        program(offset, 0x12345678)
    os.write(1, b"x")
"""


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "flash.img")
    create(path, SIZE)
    return path


@pytest.mark.parametrize("stores", [1, 2, 700, 1024, 1025, 2047])
def test_killed_inside_a_buffered_program(path, stores):
    run = subprocess.run([sys.executable, "-c", PRELUDE + STORES, path, str(stores)], check=False)
    assert run.returncode == -signal.SIGKILL
    with FlashImage.open(path, SIZE) as image:  # the lock went with the process
        words = image.view(width=2).tolist()
    programmed = [(index, word) for index, word in enumerate(words) if word != 0xFFFF]
    assert len(programmed) == stores
    assert all(index < 2048 and word == (0x5678, 0x1234)[index % 2] for index, word in programmed)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_killed_at_any_moment(path, rounds):
    """Where it strikes is up to the host; what may be there is not."""
    child = subprocess.Popen([sys.executable, "-c", PRELUDE + LOOP, path], stdout=subprocess.PIPE)
    for _ in range(rounds):
        assert child.stdout.read(1) == b"x"
    child.kill()
    child.wait()
    child.stdout.close()
    with FlashImage.open(path, SIZE) as image:
        words = image.view(width=2).tolist()
    assert all(word in (0xFFFF, (0x5678, 0x1234)[index % 2]) for index, word in enumerate(words[: SECTOR // 2]))
    assert set(words[SECTOR // 2 :]) == {0xFFFF}
