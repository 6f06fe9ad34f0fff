"""Every guest, on the machine it was built for: how it ends and what it says last."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from xipvm.console import Console
from xipvm.machine import Machine
from xipvm.result import RunResult

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")
ALIAS = 0x20_0000_0000
"""Where `selfmod-alias` expects RAM a second time."""


@dataclass(frozen=True)
class Expected:
    """What a guest does. ``lines``: how many lines its output has."""

    guest: str
    last: str
    lines: int
    smp: int = 1
    ram_alias: int | None = None
    status: int = 0
    reason: str = "exit"
    slow: bool = False


GUESTS = (
    Expected("hello", "ok", 6),
    Expected("selfmod", "selfmod: ok", 5),
    Expected("selfmod-alias", "selfmod: ok", 5, ram_alias=ALIAS),
    Expected("selfmod-smp", "selfmod-smp: ok", 4, smp=2),
    Expected("selfmod-smp", "selfmod-smp: needs a second CPU, there is only one (--smp 2)", 2, status=2),
    Expected("reprogram", "reprogram: ok", 9),
    Expected("faults", "faults: 7 of 7 as expected", 9),
    Expected("user", "user: ok", 5),
    Expected("paging", "paging: ok", 9),
    Expected("shootdown", "shootdown: 1 cpus, 48 rounds, 0 wrong", 1),
    Expected("shootdown", "shootdown: 2 cpus, 48 rounds, 0 wrong", 1, smp=2),
    Expected("shootdown", "shootdown: 4 cpus, 48 rounds, 0 wrong", 1, smp=4),
    Expected("processes", "processes: 3762e5b6 ok", 15),
    Expected("processes", "processes: 3762e5b6 ok", 15, smp=3),
    Expected("token", "token: 2 cpus, 200 passes, sum 19900 ok", 1, smp=2),
    Expected("token", "token: 4 cpus, 400 passes, sum 79800 ok", 1, smp=4),
    Expected("pages", "pages: 0 wrong", 5),
    Expected("coldfault", "coldfault: 2000 ok", 1),
    Expected("store", "store: 25ffc000 ok", 1, slow=True),
    Expected("sort", "sort: 0 ok", 1, slow=True),
    Expected("crc", "crc: 60318e4e ok", 1, slow=True),
    Expected("matrix", "matrix: fa295c0 ok", 1, slow=True),
    Expected("thrash", "thrash: 1ffc00000 ok", 1, slow=True),
)


def run(
    guest: str, isa: str, smp: int = 1, limit: int = 50_000_000, ram_alias: int | None = None
) -> tuple[RunResult, list[str]]:
    out = io.BytesIO()
    elf = BIN / isa / f"{guest}-{isa}.elf"
    with Machine(guest=elf, smp=smp, console=Console(out), ram_alias=ram_alias) as machine:
        result = machine.run(max_instructions=limit)
    return result, out.getvalue().decode("ascii").replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(guest, id=f"{guest.guest}-{guest.smp}", marks=[pytest.mark.slow] if guest.slow else [])
        for guest in GUESTS
    ],
)
def test_guest(expected: Expected, isa: str) -> None:
    limit = 3_000_000_000 if expected.slow else 50_000_000
    result, lines = run(expected.guest, isa, expected.smp, limit, expected.ram_alias)
    assert lines[-1] == expected.last, "\n".join(lines)
    assert len(lines) == expected.lines
    assert (result.status, result.reason) == (expected.status, expected.reason)


@pytest.mark.parametrize("isa", ISAS)
def test_an_alias_that_is_not_there_is_no_memory(isa: str) -> None:
    result, lines = run("selfmod-alias", isa)
    assert (result.status, result.reason) == (1, "exit")
    assert lines[-1].startswith(("  r", "unhandled")), "the guest's own report"


@pytest.mark.parametrize("isa", ISAS)
def test_clocks_tick_and_two_runs_agree(isa: str) -> None:
    first, lines = run("clocks", isa, limit=1_000_000)
    second, again = run("clocks", isa, limit=1_000_000)
    assert lines[-1] == "clocks: ok", "\n".join(lines)
    assert lines == again
    assert first.status == second.status == 0


@pytest.mark.parametrize("isa", ISAS)
def test_panic_prints_the_guest_s_own_registers(isa: str) -> None:
    result, lines = run("panic", isa)
    assert (result.status, result.reason) == (1, "exit")
    assert lines[2] == "unhandled write fault"
    assert len([line for line in lines if line.startswith("  r")]) == 8


@pytest.mark.parametrize(
    ("isa", "register", "wild"), [("arm64", "far_el1", 0x0B000104), ("riscv64", "mtval", 0x18000104)]
)
def test_a_fault_without_a_handler_is_reported(isa: str, register: str, wild: int) -> None:
    result, lines = run("crash", isa)
    assert lines == [f"crash: about to write to {wild:08x}"]
    assert (result.status, result.reason) == (1, "crash")
    assert result.report is not None
    assert "no memory answers" in result.report.message
    assert dict(result.report.registers)[register] == wild, "the first fault is still to be seen"


@pytest.mark.parametrize("isa", ISAS)
def test_a_loop_in_flash_that_polls_its_own_bank_does_not_survive(isa: str) -> None:
    result, lines = run("warmloop", isa)
    assert len(lines) == 1
    assert "reads ffffffff" in lines[0], "the flash that the guest was not given is erased"
    assert (result.status, result.reason) == (1, "crash")
    assert result.report is not None
    assert "not in read-array mode" in result.report.message
    assert result.report.where is not None
    assert result.report.where.startswith("command_and_poll+")
