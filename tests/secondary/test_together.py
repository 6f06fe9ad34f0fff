"""A guest, and every kind of secondary MMU on its memory at once, under storms: nothing shows, every view is memory."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest

from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.errors import BadInput
from xipvm.machine import Machine
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.verify import verify
from xipvm.storm import Storm
from xipvm.storm.check import Job, difference, run_once, stormy_limit
from xipvm.storm.devices import DEVICE_OPERATIONS
from xipvm.trace import Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")
SECONDARIES = ("kvm", "gru")
BOTH = ("all", "devices")


def elf(name: str, isa: str) -> str:
    return str(BIN / isa / f"{name}-{isa}.elf")


@pytest.mark.slow
@pytest.mark.parametrize("secondary", SECONDARIES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_storm_with_devices_does_not_show(isa: str, secondary: str) -> None:
    job = Job(elf("reprogram", isa), secondary=secondary)
    calm = run_once(job)
    done: Counter[str] = Counter()
    for seed in (1, 2, 3):
        storm = Storm(seed, rate=1000, ops=BOTH)
        assert difference(calm, run_once(job, storm, limit=stormy_limit(calm))) == "", f"seed {seed}"
        done += storm.done
    assert set(DEVICE_OPERATIONS) <= set(done)


@pytest.mark.parametrize("secondary", SECONDARIES)
@pytest.mark.parametrize("isa", ISAS)
def test_at_every_quiescent_point_every_view_is_memory(
    isa: str, secondary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_due = Storm.run_due
    looked: list[int] = []

    def looks(self: Storm, now: int) -> None:
        run_due(self, now)
        mmus = [*machine.secondaries(), *self.secondaries()]
        assert [at_rest.difference(mmu) for mmu in mmus] == [""] * len(mmus)
        assert self._world is not None
        verify(machine.host, held=Counter(self._world.held))
        looked.append(len(mmus))

    monkeypatch.setattr(Storm, "run_due", looks)
    oracle, trace, storm = Oracle(), Trace(), Storm(7, rate=1000, ops=BOTH)
    trace.attach(oracle)
    with Machine(
        elf("reprogram", isa),
        memory=4 << 20,
        secondary=secondary,
        storm=storm,
        trace=trace,
        console=Console(io.BytesIO()),
    ) as machine:
        assert machine.run().status == 0
        trace.detach(oracle)
    assert oracle.violations == [], oracle.violations[0].render()
    assert len(looked) > 10
    assert max(looked) >= 4


def test_groups_of_operations() -> None:
    assert {operation.name for operation in Storm(1, ops=["devices"])._drawn} == set(DEVICE_OPERATIONS)
    assert not {operation.name for operation in Storm(1)._drawn} & set(DEVICE_OPERATIONS)
    with pytest.raises(BadInput, match=r"called 'gpu'; known are pageout, .*, mirror-exclusive, all, devices$"):
        Storm(1, ops=["gpu"])
