"""A guest whose memory goes to a device and comes back, and is the device's alone now and then: nothing of it shows."""

from __future__ import annotations

import io
import random
from contextlib import suppress
from pathlib import Path

import pytest

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.errors import MmError
from xipvm.machine import Machine
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.verify import verify
from xipvm.trace.funnel import Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
MEMORY = 8 << 20
SLICE, SLICES, LIMIT = 1_500, 60, 50_000_000


class Driver:
    """Does something with a device's mirror of a guest's RAM between two slices of the guest."""

    def __init__(self, machine: Machine, device: Dmirror, seed: int) -> None:
        self.machine, self.device, self.dice = machine, device, random.Random(seed)
        self.moved = self.alone = 0

    def act(self) -> None:
        mm, ram = self.machine.mm, self.machine.ram
        first = ram >> PAGE_SHIFT
        used = [page for page, _ in mm.pgd.entries(first, first + (MEMORY >> PAGE_SHIFT))]
        for _ in range(6):
            hva, pages = self.dice.choice(used) << PAGE_SHIFT, self.dice.randint(1, 8)
            pages = min(pages, (ram + MEMORY - hva) >> PAGE_SHIFT)
            with suppress(MmError):  # a page that somebody holds
                match self.dice.randrange(4):
                    case 0 | 1:
                        self.device.migrate_to_dev(hva, pages)
                        self.moved += pages
                    case 2:
                        self.device.exclusive(hva, pages)
                        self.alone += pages
                    case _:
                        data, _ = self.device.read(hva, PAGE_SIZE)
                        self.device.write(hva, data)


def run(name: str, isa: str, *, coherent: bool, driven: bool) -> tuple[object, ...]:
    output, trace, oracle = io.BytesIO(), Trace(), Oracle()
    trace.attach(oracle)
    guest = str(BIN / isa / f"{name}-{isa}.elf")
    stdin = b"600" if name == "pages" else b""
    with Machine(guest, memory=MEMORY, trace=trace, console=Console(output, stdin)) as machine:
        device = Dmirror(machine.mm, pages=256, coherent=coherent) if driven else None
        driver = None if device is None else Driver(machine, device, 1)
        for _ in range(SLICES):
            result = machine.run(max_instructions=SLICE)
            if driver is not None:
                driver.act()
        assert result.reason == "limit"
        result = machine.run(max_instructions=LIMIT)
        ram = machine.mm.read(machine.ram, MEMORY)
        verify(machine.host)
        trace.detach(oracle)
        if device is not None and driver is not None:
            device.destroy()
            verify(machine.host)
            assert machine.mm.read(machine.ram, MEMORY) == ram
            assert driver.moved > 20
            assert driver.alone > 20
    assert oracle.violations == [], oracle.violations[0].render()
    return result.reason, result.status, result.summary.instructions, output.getvalue(), ram


@pytest.mark.slow
@pytest.mark.parametrize("coherent", [False, True], ids=["private", "coherent"])
@pytest.mark.parametrize("isa", ["arm64", "riscv64"])
def test_memory_that_goes_to_a_device_and_back(isa: str, coherent: bool) -> None:
    calm = run("pages", isa, coherent=coherent, driven=False)
    assert calm[:2] == ("exit", 0)
    assert run("pages", isa, coherent=coherent, driven=True) == calm
