"""A guest's DMA engine, whose memory the host moves about: what it copies, and the code that it writes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.errors import BadInput
from xipvm.machine import Machine, run
from xipvm.mmu.secondary.odp import OdpContext
from xipvm.storm import Storm
from xipvm.storm.check import Job, difference, run_once, stormy_limit
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")


def guest(isa: str) -> str:
    return str(BIN / isa / f"dma-{isa}.elf")


@pytest.mark.parametrize("isa", ISAS)
def test_transfers_are_right(isa: str) -> None:
    trace, oracle = Trace(), Oracle()
    drops: list[Event] = []
    trace.attach(oracle)
    trace.attach(lambda event: drops.append(event) if event.kind == "code_drop" else None)
    output = io.BytesIO()
    with Machine(guest(isa), devices=("odp",), trace=trace, console=Console(output)) as machine:
        result = machine.run(max_instructions=100_000_000)
        assert (result.reason, result.status) == ("exit", 0), output.getvalue()
        assert output.getvalue() == b"dma: 0 wrong, ok\r\n"
        assert isinstance(machine.dma, OdpContext)
        assert machine.dma.faults > 0
        assert len(machine.dma.regions) == 1
        trace.detach(oracle)
    oracle.finish()
    assert oracle.violations == []
    # The engine writes to a page that was executed, round after round: each time what was translated of it goes.
    assert len(drops) >= 11


@pytest.mark.parametrize("isa", ISAS)
def test_without_an_engine(isa: str) -> None:
    result, output = run(guest(isa), max_instructions=1_000_000)
    assert (result.status, output) == (2, b"dma: no engine: run it with --device odp\r\n")


def test_unknown_devices() -> None:
    with pytest.raises(BadInput, match="no device is called 'gpu'; known are odp"):
        run(guest("arm64"), devices=("gpu",))
    with pytest.raises(BadInput, match="2008"):
        run(guest("arm64"), devices=("odp",), protocol="2008")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm_does_not_show(isa: str, seed: int) -> None:
    job = Job(guest(isa), devices=("odp",))
    calm = run_once(job)
    stormy = run_once(job, Storm(seed, rate=150), limit=stormy_limit(calm))
    assert difference(calm, stormy) == ""
    assert stormy.operations > 500
