"""``xipvm explore`` and ``xipvm replay``: searching the interleavings of a scenario, and looking at one again."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xipvm.explore.choices import Choice
from xipvm.explore.explorer import Run, Search, explore, replay, shrink
from xipvm.explore.files import Counterexample
from xipvm.explore.find import find
from xipvm.explore.scenarios import SCENARIOS
from xipvm.explore.strategies import strategy
from xipvm.trace.events import Event
from xipvm.trace.show import format_event


def list_scenarios() -> None:
    """The scenarios that come with xipvm, a line each."""
    for name, scenario in SCENARIOS.items():
        print(f"{name:28} {scenario.doc}")


def explore_scenario(
    name: str, how: str, *, runs: int, seed: int, preemptions: int, save: str | None, quiet: bool
) -> int:
    """Search ``name``; 0 when nothing is wrong, 1 when something is. Raises BadInput."""
    scenario = find(name)
    search_by = strategy(how, seed, preemptions=preemptions)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=runs)
        search = explore(scenario, search_by, runs=runs, progress=lambda done: bar.update(task, completed=done))
    _report(name, how, search)
    if search.failing is None:
        return 0
    small = shrink(scenario, search.failing)
    _tell(small)
    print(f"found by run {search.failing_at}; shrunk to {small.switches} switches, {small.preemptions} preemptions")
    assert small.failure is not None
    path = save or f"{scenario.name}.xipvm.json"
    Counterexample(name, f"{small.failure.what}: {small.failure.message}", _needed(small)).save(path)
    print(f"xipvm replay {path}")
    return 1


def replay_file(path: str, *, go_on: bool, events: bool) -> int:
    """Run the counterexample ``path`` again; 0 when it is right now, 1 when it is still wrong. Raises BadInput."""
    example = Counterexample.load(path)
    seen: list[Event] = []
    run = replay(find(example.scenario), example.choices, strict=not go_on, sinks=[seen.append])
    if events:
        for event in seen:
            print(format_event(event))
    if run.failure is None:
        print(f"{example.scenario}: nothing is wrong; it was {example.failure}")
        return 0
    _tell(run)
    return 1


def _needed(run: Run) -> list[Choice]:
    """The choices without those at the end that are 0 anyway."""
    choices = list(run.choices)
    while choices and choices[-1].answer == 0:
        choices.pop()
    return choices


def _report(name: str, how: str, search: Search) -> None:
    asked = sum(search.checks.values())
    extent = "all runs" if search.complete else f"{search.runs} runs"
    found = "1 is wrong" if search.failing is not None else "none is wrong"
    print(f"{name}: {how}: {extent} ({search.runs}), {search.distinct} distinct, {asked} checks: {found}")


def _tell(run: Run) -> None:
    assert run.failure is not None
    print(run.failure.render())
    switches = [
        f"  at {choice.label}: candidate {choice.answer} of {choice.n}" for choice in run.choices if choice.answer
    ]
    if switches:
        print("the order, where it is not the plain one:")
        print("\n".join(switches))
