"""``xipvm explore`` and ``xipvm replay``: searching the interleavings of a scenario, and looking at one again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xipvm.cli import INTERRUPTED
from xipvm.errors import BadInput
from xipvm.explore.explorer import Search, replay
from xipvm.explore.files import Counterexample
from xipvm.explore.find import KNOWN, find
from xipvm.explore.shards import Shard, dask_executor, explore_shards, local_executor, shards_of
from xipvm.explore.shrink import shrink
from xipvm.explore.story import extent, needed, tell
from xipvm.mutants import get, planted
from xipvm.mutants.reach import why_nothing
from xipvm.trace.show import format_event

_SHOWN = 16
"""The bar moves every so many runs."""


def list_scenarios() -> None:
    """The scenarios that come with xipvm, a line each."""
    width = max(map(len, KNOWN))
    for name, scenario in KNOWN.items():
        print(f"{name:{width}} {scenario.doc}")


def explore_scenario(
    whole: Shard, *, jobs: int, executor: str, scheduler: str | None, save: str | None, quiet: bool
) -> int:
    """Search as ``whole`` says; 0 when nothing is wrong, 1 when something is. Raises BadInput."""
    scenario = find(whole.scenario)
    whole = replace(whole, mutants=tuple(get(name).name for name in whole.mutants))
    if scheduler is not None and executor != "dask":
        raise BadInput("--scheduler is for --executor dask")
    if save:
        Counterexample.check_place(save)
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
        done = 0

        def progress(runs: int) -> None:
            nonlocal done
            done = runs
            if not bar.disable and not runs % _SHOWN:
                bar.update(task, completed=runs)

        try:
            search = _search(whole, jobs=jobs, executor=executor, scheduler=scheduler, progress=progress)
        except KeyboardInterrupt:
            return _interrupted(whole, done)
    _report(whole, search)
    if search.failing is None:
        for name in whole.mutants:
            why = why_nothing(get(name), scenario, whole.protocol)
            print(f"xipvm: {name} {why}; 'xipvm mutants --run {name}' says where it is found", file=sys.stderr)
        return 0
    with planted(*whole.mutants):
        small = shrink(scenario, search.failing, protocol=whole.protocol)
        print(tell(scenario, small, protocol=whole.protocol).render())
    print(f"found by run {search.failing_at}; shrunk to {extent(small)}")
    assert small.failure is not None
    path = save or f"{scenario.name}.xipvm.json"
    failure = f"{small.failure.what}: {small.failure.message}"
    Counterexample(whole.scenario, failure, needed(small.choices), whole.mutants, whole.protocol).save(path)
    print(f"again: {shlex.join(['xipvm', 'replay', path])}")
    return 1


def _search(
    whole: Shard, *, jobs: int, executor: str, scheduler: str | None, progress: Callable[[int], None]
) -> Search:
    if jobs == 1 and executor == "local":
        return explore_shards([whole], None, progress=progress)
    pieces = shards_of(whole, pieces=64)
    with dask_executor(scheduler) if executor == "dask" else local_executor(jobs) as pool:
        return explore_shards(pieces, pool, progress=progress)


def _interrupted(whole: Shard, done: int) -> int:
    """Says how far a search got, and how to go on."""
    so_far = f"after {done} runs; none of them is wrong" if done else "before a result of any run was there"
    print(f"{whole.scenario}: {whole.strategy}: interrupted {so_far}")
    if whole.strategy == "exhaustive":
        print("it begins from the start again; --runs N bounds it, --preemptions N makes it smaller")
        return INTERRUPTED
    again = ["xipvm", "explore", whole.scenario, "--strategy", whole.strategy]
    again += ["--runs", str(max(whole.runs - done, 1)), "--seed", str(int(whole.seed) + 1)]
    if whole.protocol != "modern":
        again += ["--protocol", whole.protocol]
    for name in whole.mutants:
        again += ["--mutant", name]
    print(f"other runs: {shlex.join(again)}")
    return INTERRUPTED


def replay_file(path: str, *, go_on: bool, events: bool) -> int:
    """Run the counterexample ``path`` again; 0 when it is right now, 1 when it is still wrong. Raises BadInput."""
    example = Counterexample.load(path)
    if "::" in example.scenario:
        return _replay_test(example.scenario, path, go_on=go_on)
    with planted(*example.mutants):
        scenario = find(example.scenario)
        run = replay(scenario, example.choices, strict=not go_on, protocol=example.protocol)
        story = tell(scenario, run, protocol=example.protocol)
    if events:
        for event in story.events:
            print(format_event(event))
    if run.failure is None:
        print(f"{example.scenario}: nothing is wrong; it was {example.failure}")
        return 0
    print(story.render())
    return 1


def _replay_test(test: str, path: str, *, go_on: bool) -> int:
    """The same for a counterexample that a test has found: the test furnishes the scene."""
    try:
        from xipvm.pytest_support import replay_test
    except ImportError:
        raise BadInput(f"{path} is a counterexample of the test {test}; it needs pytest: pip install pytest") from None
    return replay_test(test, path, go_on=go_on)


def _report(whole: Shard, search: Search) -> None:
    asked = sum(search.checks.values())
    made = f"all runs ({search.runs})" if search.complete else f"{search.runs} runs"
    found = "1 is wrong" if search.failing is not None else "none is wrong"
    what = f"{whole.scenario}: {whole.strategy}: {made}"
    if search.cut:
        what += f" and {search.cut} cut short"
    print(f"{what}, {search.distinct} distinct, {asked} checks: {found}")
