"""The harness: rounds take turns, ratios are taken inside a round, targets look at what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.harness import Bench, Spread, Target, compare, value


def test_what_is_compared_takes_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = Bench(3, tmp_path).rounds(a=lambda: run("a"), b=lambda: run("b"))
    assert order == ["a", "b"] * 3
    assert samples == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_ratio_is_one_of_a_round() -> None:
    # The second round ran on a machine ten times slower: both sides of it did.
    figure = compare("x", [1, 30, 4], "peer", [2, 20, 2])
    assert figure.ratio == Spread(1.5, 0.5, 2)
    assert figure.ours == Spread(4, 1, 30)


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target(2), True),
        (Target(1.9), False),
        (Target(2, at_least=True), True),
        (Target(2.1, at_least=True), False),
        (Target(10, of_value=True), True),
        (Target(9, of_value=True), False),
        (None, None),
    ],
)
def test_targets(target: Target | None, reached: bool | None) -> None:
    assert compare("x", [10], "peer", [5], target=target).reached is reached


def test_a_part_has_no_ratio_to_reach() -> None:
    assert value("x", [1], unit="s", target=Target(2)).reached is None
    assert value("x", [1], unit="s", target=Target(2, of_value=True)).reached is True


def test_every_benchmark_says_what_it_is() -> None:
    listed = CliRunner().invoke(main, ["--list"])
    assert listed.exit_code == 0
    lines = listed.output.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_name_is_an_error() -> None:
    result = CliRunner().invoke(main, ["--only", "kernels,frobnicate"])
    assert result.exit_code == 2
    assert "frobnicate" in result.output
    assert "uboot" in result.output


@pytest.mark.slow
def test_one_benchmark_runs_and_reports(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--only", "dontneed", "--repeat", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["failed"] == {}
    untraced, traced = report["benchmarks"]["dontneed"]
    assert untraced["target"]["limit"] == traced["target"]["limit"] == 140
    for figure in (untraced, traced):
        assert figure["unit"] == "ns"
        assert figure["ours"]["median"] > 0
        assert figure["theirs"]["median"] > 0
        assert figure["what"] in " ".join(result.output.split())


def test_a_benchmark_that_fails_is_an_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(bench: Bench) -> list[object]:
        """Fails."""
        raise RuntimeError("the guest ended by crash")

    monkeypatch.setitem(BENCHMARKS, "broken", broken)  # type: ignore[arg-type]
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--only", "broken", "--json", str(file)])
    assert result.exit_code == 1
    assert json.loads(file.read_text())["failed"] == {"broken": "the guest ended by crash"}
