"""What Linux did: every recorded scenario that the model can do passes, and none of those that once passed is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from xipvm.conform.report import DIFFERS, PASS, UNSUPPORTED, replay
from xipvm.conform.scenario import find, load

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [Path(path).stem for path in find([str(GOLDEN)])]
INFORMATIVE = [Path(path).stem for path in find([str(GOLDEN / "informative")])]
BASELINE = (Path(__file__).parent / "baseline.txt").read_text().split()


@pytest.mark.parametrize("name", NAMES)
def test_as_on_linux(name: str) -> None:
    report = replay(load(str(GOLDEN / f"{name}.json")))
    differences = "\n".join(
        f"step {step.step.number} {step.step}: {difference}" for step in report.steps for difference in step.differences
    )
    assert report.verdict != DIFFERS, differences
    if name in BASELINE:
        assert report.verdict == PASS, f"{name} passed before; now {report.verdict} {report.unsupported}"


@pytest.mark.parametrize("name", INFORMATIVE)
def test_what_depends_on_timing_runs(name: str) -> None:
    report = replay(load(str(GOLDEN / "informative" / f"{name}.json")))
    assert report.verdict != DIFFERS
    if report.verdict == UNSUPPORTED:
        assert report.unsupported


def test_what_the_running_scenarios_promise() -> None:
    """Their stable sentences hold: nothing is lost, and a vCPU beside the host ends as recorded."""
    for name in ("race_dontneed", "running_munmap", "running_fork_host_write", "running_mprotect_r"):
        report = replay(load(str(GOLDEN / "informative" / f"{name}.json")))
        ends = [step for step in report.steps if step.step.op in ("guest_spin_end", "host_check") and step.differences]
        assert not ends, name


def test_the_baseline_names_scenarios() -> None:
    assert sorted(set(BASELINE)) == BASELINE
    assert set(BASELINE) <= set(NAMES)
