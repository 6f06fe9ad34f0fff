"""``xipvm explore`` and ``xipvm replay``: searching the interleavings of a scenario, and looking at one again."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xipvm.explore.choices import Choice
from xipvm.explore.explorer import Run, Search, replay, shrink
from xipvm.explore.files import Counterexample
from xipvm.explore.find import KNOWN, find
from xipvm.explore.shards import Shard, dask_executor, explore_shards, local_executor, shards_of
from xipvm.mutants import planted
from xipvm.trace.events import Event
from xipvm.trace.show import format_event


def list_scenarios() -> None:
    """The scenarios that come with xipvm, a line each."""
    for name, scenario in KNOWN.items():
        print(f"{name:28} {scenario.doc}")


def explore_scenario(
    whole: Shard, *, jobs: int, executor: str, scheduler: str | None, save: str | None, quiet: bool
) -> int:
    """Search as ``whole`` says; 0 when nothing is wrong, 1 when something is. Raises BadInput."""
    scenario = find(whole.scenario)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        task = bar.add_task(scenario.name, total=None if whole.strategy == "exhaustive" else whole.runs)

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        if jobs == 1 and executor == "local":
            search = explore_shards([whole], None, progress=progress)
        else:
            pieces = shards_of(whole, pieces=64)
            with dask_executor(scheduler) if executor == "dask" else local_executor(jobs) as pool:
                search = explore_shards(pieces, pool, progress=progress)
    _report(whole, search)
    if search.failing is None:
        return 0
    with planted(*whole.mutants):
        small = shrink(scenario, search.failing, protocol=whole.protocol)
    _tell(small)
    print(f"found by run {search.failing_at}; shrunk to {small.switches} switches, {small.preemptions} preemptions")
    assert small.failure is not None
    path = save or f"{scenario.name}.xipvm.json"
    failure = f"{small.failure.what}: {small.failure.message}"
    Counterexample(whole.scenario, failure, _needed(small), whole.mutants, whole.protocol).save(path)
    print(f"xipvm replay {path}")
    return 1


def replay_file(path: str, *, go_on: bool, events: bool) -> int:
    """Run the counterexample ``path`` again; 0 when it is right now, 1 when it is still wrong. Raises BadInput."""
    example = Counterexample.load(path)
    seen: list[Event] = []
    with planted(*example.mutants):
        scenario = find(example.scenario)
        run = replay(scenario, example.choices, strict=not go_on, sinks=[seen.append], protocol=example.protocol)
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


def _report(whole: Shard, search: Search) -> None:
    asked = sum(search.checks.values())
    extent = "all runs" if search.complete else f"{search.runs} runs"
    found = "1 is wrong" if search.failing is not None else "none is wrong"
    what = f"{whole.scenario}: {whole.strategy}: {extent} ({search.runs})"
    print(f"{what}, {search.distinct} distinct, {asked} checks: {found}")


def _tell(run: Run) -> None:
    assert run.failure is not None
    print(run.failure.render())
    switches = [
        f"  at {choice.label}: candidate {choice.answer} of {choice.n}" for choice in run.choices if choice.answer
    ]
    if switches:
        print("the order, where it is not the plain one:")
        print("\n".join(switches))
