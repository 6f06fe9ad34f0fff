"""Guests whose pages are aged while they run: nothing of it shows, and every use is noticed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from xipvm.console import Console
from xipvm.machine import Machine

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
EVERYTHING = (1 << 47) - 4096


class AgeingConsole(Console):
    """Has all of the host's memory aged before each byte that the guest writes."""

    def __init__(self, output: io.BytesIO, hook: str) -> None:
        super().__init__(output)
        self.hook = hook
        self.machine: Machine | None = None
        self.young: list[bool] = []

    def write(self, byte: int) -> None:
        if self.machine is not None:
            self.young.append(getattr(self.machine.mm.notifiers, self.hook)(0, EVERYTHING))
        super().write(byte)


def run(isa: str, hook: str) -> tuple[tuple[object, ...], AgeingConsole]:
    output = io.BytesIO()
    console = AgeingConsole(output, hook or "clear_young")
    with Machine(BIN / isa / f"hello-{isa}.elf", board=f"virt-{isa}", console=console) as machine:
        if hook:
            console.machine = machine
        result = machine.run(max_instructions=1_000_000)
        return (result.reason, result.status, machine.summary().instructions, output.getvalue()), console


@pytest.mark.parametrize("isa", ["arm64", "riscv64"])
@pytest.mark.parametrize("hook", ["clear_young", "clear_flush_young"])
def test_ageing_does_not_show(isa: str, hook: str) -> None:
    plain, _ = run(isa, "")
    aged, console = run(isa, hook)
    assert plain[:2] == ("exit", 0)
    assert aged == plain
    # Between two bytes the guest executes at least the code that writes one.
    assert len(console.young) > 100
    assert all(console.young)
