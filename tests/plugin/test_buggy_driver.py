"""The example of a third person's driver: its ordinary tests pass, interleavings find its three faults."""

from __future__ import annotations

import re
import shutil
from difflib import ndiff
from pathlib import Path

import pytest

from tests.plugin.conftest import Run
from tests.run.command import ROOT

SEEDED = {
    "test_prefault_against_dontneed": "I4",
    "test_prefetch_against_dontneed": "I10",
    "test_prefault_against_close": "I13",
}


@pytest.fixture
def driver(pytester: pytest.Pytester) -> Path:
    """A copy of the example, so that nothing is left beside the original."""
    shutil.copytree(
        ROOT / "examples" / "buggy_driver",
        pytester.path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(".xipvm", "__pycache__", ".pytest_cache"),
    )
    return pytester.path


def found(result: pytest.RunResult) -> dict[str, str]:
    """The invariant that each failed test reports, by test."""
    text = result.stdout.str()
    return dict(re.findall(r"^_+ (test_\w+) _+$\n(I\d+) broken at event #", text, re.MULTILINE))


def test_its_author_s_tests_pass(driver: Path, run: Run) -> None:
    run("test_ordinary.py").assert_outcomes(passed=12)


@pytest.mark.slow
def test_interleavings_find_exactly_its_three_faults(driver: Path, run: Run) -> None:
    result = run("test_interleavings.py")
    result.assert_outcomes(passed=1, failed=3)
    assert found(result) == SEEDED
    for test in SEEDED:
        file = f".xipvm/test_interleavings.py-{test}.json"
        assert f"again: xipvm replay {file}" in result.stdout.lines
        again = run(f"test_interleavings.py::{test}", "--xipvm-replay", file)
        again.assert_outcomes(failed=1)
        assert found(again) == {test: SEEDED[test]}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pct", "coverage", "exhaustive"])
def test_any_strategy_finds_them(how: str, driver: Path, run: Run) -> None:
    tests = driver / "test_interleavings.py"
    tests.write_text(tests.read_text().replace("interleavings(500)", f"interleavings(500, strategy={how!r})"))
    assert found(run("test_interleavings.py")) == SEEDED


@pytest.mark.slow
def test_the_mended_driver_passes(driver: Path, run: Run) -> None:
    run("test_interleavings.py").assert_outcomes(passed=1, failed=3)
    result = run("--driver", "mirror_fixed")  # which tries the orders that were found first
    result.assert_outcomes(passed=16)


def test_the_mended_driver_differs_in_the_three_places_only() -> None:
    before, after = (
        (ROOT / "examples" / "buggy_driver" / name).read_text().splitlines()
        for name in ("mirror.py", "mirror_fixed.py")
    )
    changes = [line[2:].strip() for line in ndiff(before, after) if line[0] in "+-"]
    assert len(changes) == 9
    assert all(
        line.startswith(
            ("sequence = ", "if self.closed or ", "if self.invalidations ", "# Queues", "self.flush", "point(")
        )
        for line in changes
    )
