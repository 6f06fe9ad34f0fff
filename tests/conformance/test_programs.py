"""The conformance programs, run: each must end through ``tohost`` with success."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from xipvm.console import Console
from xipvm.machine import Machine

OWN = sorted((Path(__file__).resolve().parent / "bin").glob("*.elf"))
UPSTREAM = os.environ.get("XIPVM_RISCV_TESTS")


def upstream() -> list[Path]:
    """The programs of a built riscv-tests checkout: user level, physical addresses; not their listings."""
    if UPSTREAM is None:
        return []
    found = sorted(
        path for extension in ("ui", "um", "ua", "uc") for path in Path(UPSTREAM).glob(f"rv64{extension}-p-*")
    )
    return [path for path in found if path.suffix != ".dump"]


@pytest.mark.parametrize("elf", [*OWN, *upstream()], ids=lambda path: path.stem)
def test_program(elf: Path) -> None:
    with Machine(elf, board="virt-riscv64", console=Console(io.BytesIO())) as machine:
        result = machine.run(max_instructions=10_000_000)
    assert (result.status, result.reason) == (0, "exit"), (
        f"case {result.status}" if result.report is None else result.report
    )


if UPSTREAM is not None:

    def test_the_upstream_folder_has_programs() -> None:
        assert upstream()
