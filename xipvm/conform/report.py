"""Replaying scenarios, and what came of it: for a person as text, for programs as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from xipvm.conform.compare import Difference, Names, Taken, compare
from xipvm.conform.detail import compare_detail, present_sptes
from xipvm.conform.scenario import Scenario, Step
from xipvm.conform.schema import SPACES
from xipvm.conform.steps import execute
from xipvm.conform.world import Table, UnsupportedError, World
from xipvm.errors import InternalError, OutOfFrames

PASS: Final = "pass"
DIFFERS: Final = "differs"
VARIES: Final = "varies"
"""It differs, and says itself that its outcome depends on more than its steps."""
UNSUPPORTED: Final = "unsupported"


@dataclass(slots=True)
class StepReport:
    """What is not as recorded in one step. ``detail`` is no error."""

    step: Step
    differences: list[Difference]
    detail: list[Difference]


@dataclass(slots=True)
class Report:
    """One replayed scenario. ``unsupported`` is the operation at which the replay had to stop, empty if none."""

    scenario: Scenario
    steps: list[StepReport] = field(default_factory=list)
    unsupported: str = ""

    @property
    def verdict(self) -> str:
        """``pass``, ``differs``, ``varies``, or ``unsupported``, whatever differed before."""
        if self.unsupported:
            return UNSUPPORTED
        if not any(step.differences for step in self.steps):
            return PASS
        return VARIES if self.scenario.stable else DIFFERS


def replay(scenario: Scenario, *, detail: bool = False) -> Report:
    """Does the steps of ``scenario`` in a new world, to the end also when something differs.

    A defect of the model ends it, and is a difference.
    """
    report = Report(scenario)
    with World() as world:
        names: Names | None = None
        for step in scenario.steps:
            if not step.setup and names is None:
                names = Names(world)
                names.start(_tables(world))
            try:
                taken = _take(world, step)
            except UnsupportedError as error:
                report.unsupported = error.op
                break
            except InternalError as error:
                world.broken = True
                report.steps.append(StepReport(step, [Difference("model", "no defect", "a defect", str(error))], []))
                break
            found = _setup_failed(taken) if names is None or step.setup else compare(world, names, taken)
            extra = compare_detail(world, names, taken) if detail and names is not None and not step.setup else []
            if found or extra:
                report.steps.append(StepReport(step, found, extra))
    return report


def _tables(world: World) -> dict[str, Table]:
    return {space: world.table(space) for space in SPACES}


def _take(world: World, step: Step) -> Taken:
    before, sptes = _tables(world), present_sptes(world)
    born_after = world.begin_step()
    try:
        observed, failure = execute(world, step)
    except OutOfFrames as error:
        observed, failure = {"rc": -1, "errno": "ENOMEM"}, str(error)
    return Taken(
        step=step,
        observed=observed,
        failure=failure,
        before=before,
        after=_tables(world),
        born_after=born_after,
        calls=list(world.calls),
        events=list(world.events),
        sptes=(sptes, present_sptes(world)),
    )


def _setup_failed(taken: Taken) -> list[Difference]:
    observed = taken.observed
    if not taken.failure and observed.get("exit", "ok") == "ok":
        return []
    got = observed.get("errno") or observed.get("signal") or observed.get("exit", "")
    return [Difference("set-up", "success", got, taken.failure)]


# ---- for a person


def lines(reports: list[Report]) -> Iterator[str]:
    """The text of a run: a line a scenario, what differs below it, and a line that counts."""
    for report in reports:
        verdict = report.verdict
        what = f"unsupported: {report.unsupported}" if verdict == UNSUPPORTED else verdict
        yield f"{report.scenario.name}: {what}"
        if verdict in (DIFFERS, VARIES) or any(step.detail for step in report.steps):
            yield from _differences(report)
    yield _counts(reports)


def _differences(report: Report) -> Iterator[str]:
    for step in report.steps:
        yield f"  step {step.step.number}, {step.step}"
        for difference in (*step.differences, *step.detail):
            yield f"    {difference.field}: expected {difference.expected}"
            yield f"    {'':{len(difference.field)}}  got      {difference.got}"
            if difference.cause:
                yield f"    {'':{len(difference.field)}}  cause    {difference.cause}"
    for caveat in (*report.scenario.caveats, *report.scenario.stable):
        yield f"  note: {caveat}"


def _counts(reports: list[Report]) -> str:
    counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in _COUNTED}
    what = "scenario" if len(reports) == 1 else "scenarios"
    return f"{len(reports)} {what}: {', '.join(f'{count} {_COUNTED[verdict]}' for verdict, count in counts.items())}"


_COUNTED: Final = {PASS: "pass", DIFFERS: "differ", VARIES: "vary", UNSUPPORTED: "unsupported"}


# ---- for programs


def to_json(reports: list[Report]) -> list[dict[str, Any]]:
    """One object a scenario."""
    return [
        {
            "scenario": report.scenario.name,
            "group": report.scenario.group,
            "verdict": report.verdict,
            "unsupported": report.unsupported or None,
            "steps": [
                {
                    "step": step.step.number,
                    "op": step.step.op,
                    "differences": [_object(difference) for difference in step.differences],
                    "detail": [_object(difference) for difference in step.detail],
                }
                for step in report.steps
            ],
        }
        for report in reports
    ]


def _object(difference: Difference) -> dict[str, str]:
    return {
        "field": difference.field,
        "expected": difference.expected,
        "got": difference.got,
        "cause": difference.cause,
    }
