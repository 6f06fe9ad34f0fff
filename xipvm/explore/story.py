"""A run told to a person: what was wrong, who went on when, and the command that shows it again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from xipvm.errors import XipvmError
from xipvm.explore.choices import Choice, Question, Replay
from xipvm.explore.explorer import Failure, Run, run_once
from xipvm.explore.scene import Furnish, Scenario, Scene
from xipvm.trace.events import Event
from xipvm.trace.timeline import timeline

_HERE: Final = Path(__file__).parent
_INSIDE: Final = (str(_HERE), str(_HERE.parent / "scheduler.py"), str(_HERE.parent / "pytest_"))
"""Frames of files that begin so are no business of whoever wrote the scenario."""


def extent(run: Run) -> str:
    """How often ``run`` goes from one actor to another, in words."""
    switches = f"{run.switches} {'switch' if run.switches == 1 else 'switches'}"
    return f"{switches}, {run.preemptions} {'preemption' if run.preemptions == 1 else 'preemptions'}"


@dataclass
class Story:
    """A wrong run, made once more. ``turns``: who went on where it was not the plain order, a line each."""

    run: Run
    turns: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    aftermath: list[str] = field(default_factory=list)
    """What would have come of it: accesses to pages that the host has taken away, a line each."""

    def timeline(self) -> str:
        """Every event, a column for each actor; an arrow where it became wrong."""
        failure = self.run.failure
        return timeline(self.events, [failure.violation.event] if failure is not None and failure.violation else [])

    def render(self) -> str:
        """Several lines: what is wrong, then the order."""
        assert self.run.failure is not None
        lines = [failure_text(self.run.failure)]
        if self.turns:
            lines.append("the order, where it is not the plain one:")
            lines += [f"  {turn}" for turn in self.turns]
        if self.aftermath:
            lines.append("what comes of it, if the run goes on in the plain order:")
            lines += [f"  {line}" for line in self.aftermath]
        return "\n".join(lines)


def tell(scenario: Furnish, run: Run, **options: Any) -> Story:
    """Makes ``run`` of ``scenario`` once more and listens."""
    story = Story(run)
    answers = Replay(run.choices)

    def pick(question: Question) -> int:
        answer = answers(question)
        if 0 < answer < question.n:
            story.turns.append(_turn(question, answer))
        return answer

    again = run_once(_heard(scenario, story.events.append), pick, **options)
    if again.failure is not None:
        story.run = again
        if again.failure.violation is not None:  # what follows is only the end of the scene
            last = again.failure.violation.event  # which the oracle kept from those behind it
            story.events = [*(event for event in story.events if event.seq < last.seq), last]
            story.aftermath = _aftermath(scenario, run, **options)
    return story


def _aftermath(scenario: Furnish, run: Run, **options: Any) -> list[str]:
    """Makes ``run`` once more, and does not end it where it became wrong."""
    scenes: list[Scene] = []

    def furnish(scene: Scene) -> object:
        scene.goes_on = True
        scenes.append(scene)
        return scenario(scene)

    going_on = replace(scenario, furnish=furnish) if isinstance(scenario, Scenario) else furnish
    run_once(going_on, Replay(run.choices), **options)
    return [line for scene in scenes for line in scene.aftermath]


def _heard(scenario: Furnish, sink: Callable[[Event], None]) -> Furnish:
    """``scenario``, with ``sink`` attached before anything happens."""

    def furnish(scene: Scene) -> object:
        scene.trace.attach(sink)
        return scenario(scene)

    return replace(scenario, furnish=furnish) if isinstance(scenario, Scenario) else furnish


def _turn(question: Question, answer: int) -> str:
    if not question.actors:
        return f"{question.label}: {answer} of {question.n}"
    goes = question.actors[answer]
    if question.preempts:
        return f"at {question.label}: {question.actors[0]} is stopped, {goes} goes on"
    return f"at {question.label}: {goes} goes on"


def failure_text(failure: Failure) -> str:
    """What is wrong; for an error of the scenario's own, where it came from."""
    error = failure.error
    if failure.violation is not None or error is None or isinstance(error, XipvmError):
        return failure.render()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_INSIDE)]
    where = "".join(traceback.format_list(frames))
    what = "".join(traceback.format_exception_only(error))
    return f"{where}{what}".rstrip("\n")


def needed(choices: Sequence[Choice]) -> list[Choice]:
    """``choices`` without those at the end that are 0 anyway."""
    kept = list(choices)
    while kept and kept[-1].answer == 0:
        kept.pop()
    return kept
