"""``xipvm mutants``: the known faults, and whether they are found."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from xipvm.check import INVARIANTS
from xipvm.explore.find import KNOWN
from xipvm.explore.shrink import size
from xipvm.mutants import ablation, reach
from xipvm.mutants.hunt import STRATEGIES, Catch, Hunt, hunt
from xipvm.mutants.mutant import MUTANTS, Mutant, get

_NUMBER = max(len(mutant.number) for mutant in MUTANTS.values())
_NAME = max(map(len, MUTANTS))
_EXPECTED = max(len(", ".join(mutant.caught_by)) for mutant in MUTANTS.values())
"""How wide columns are."""

HEADERS = {
    "text": f"{'number':{_NUMBER}} {'mutant':{_NAME}} {'expected':{_EXPECTED}} caught by      strategy    schedules  "
    "ms     small",
    "markdown": "| number | mutant | expected | caught by, after so many different schedules | s | counterexample |\n"
    "|---|---|---|---|---|---|",
}
ABLATIONS = {
    "text": "without  escape  late  seen by another invariant",
    "markdown": "| without | escape | late | seen by another invariant |\n|---|---|---|---|",
}
"""What stands above the lines, by form."""


def list_mutants(names: Sequence[str], *, as_json: bool) -> int:
    """The mutants ``names``, or all, a line each. Raises BadInput."""
    for mutant in [get(name) for name in names] or MUTANTS.values():
        if as_json:
            print(json.dumps(_described(mutant)))
        else:
            expected = ", ".join(mutant.caught_by)
            print(f"{mutant.number:{_NUMBER}} {mutant.name:{_NAME}} {expected:{_EXPECTED}} {mutant.doc}")
    return 0


def run_mutants(names: Sequence[str], *, runs: int, seed: int, form: str, quiet: bool) -> int:
    """Hunt the mutants ``names``, or all and the right system; 0 when each was found by two strategies, 1 otherwise.

    ``form``: "text", "json" or "markdown". Raises BadInput.
    """
    chosen = [get(name) for name in names] or list(MUTANTS.values())
    started = time.process_time()
    reached = reach.survey(chosen, KNOWN, seed=seed)
    before = time.process_time() - started
    hunts = []
    if form in HEADERS:
        print(HEADERS[form], flush=True)
    with _bar(len(chosen), quiet) as (bar, task):
        for mutant in chosen:
            bar.update(task, description=mutant.name)
            found = hunt(mutant, KNOWN, runs=runs, seed=seed, reached=reached)
            hunts.append(found)
            TELL[form](mutant, found)
            bar.advance(task)
    escaped = sum(len(found.caught) < 2 for found in hunts)
    if form != "json":
        if form == "markdown":
            print()
        print(f"{len(chosen)} mutants, {escaped} not caught by two strategies")
        if len(chosen) > 1:
            print(_summary(hunts, before))
    if names:
        return 1 if escaped else 0
    if form == "text":
        print("negative control: the right system, the same budget")
    as_json = form == "json"
    return (form != "markdown" and control(runs=runs, seed=seed, as_json=as_json, quiet=quiet)) or (1 if escaped else 0)


def _summary(hunts: Sequence[Hunt], before: float) -> str:
    said = []
    for what, seconds in (
        ("until two strategies have found it", [found.seconds for found in hunts]),
        ("to shrink what they found", [found.shrinking for found in hunts]),
    ):
        said.append(f"{statistics.median(seconds):.2f} s {what} in the median, {max(seconds):.1f} s at most")
    return f"{'; '.join(said)}; {before:.1f} s for all to see where mutants make a difference"


def control(*, runs: int, seed: int, as_json: bool, quiet: bool) -> int:
    """The right system in the same scenarios with the same budget: 0 when nothing is reported, 1 otherwise."""
    where = reach.sites(MUTANTS.values())
    reported = 0
    for name in STRATEGIES:
        with _bar(1, quiet) as (bar, task), reach.counting(where) as calls:
            bar.update(task, description=f"the right system: {name}")
            (catch,) = hunt(None, KNOWN, (name,), runs=runs, seed=seed).catches
        reported += bool(catch.what)
        reached = f"{len(calls)} of {len(where)}"
        if as_json:
            places = {"changed_by_mutants": len(where), "reached": len(calls), "calls": calls.total()}
            print(json.dumps({"control": name, **_caught(catch), **places}), flush=True)
        else:
            report = f"{catch.what} in {catch.scenario} ({catch.protocol})" if catch.what else "no report"
            print(
                f"{name:11} {catch.runs:7} schedules, {catch.distinct:7} distinct, "
                f"{reached} functions that mutants change reached, {calls.total()} calls: {report}",
                flush=True,
            )
    return 1 if reported else 0


def ablate(names: Sequence[str], *, runs: int, seed: int, form: str, quiet: bool) -> int:
    """Each invariant switched off in turn: which mutants escape then. 1 when an invariant is missed by nobody.

    ``form``: "text", "json" or "markdown". Raises BadInput.
    """
    chosen = [get(name) for name in names] or list(MUTANTS.values())
    concerned = [name for name in INVARIANTS if any(name in mutant.caught_by for mutant in chosen)]
    reached = reach.survey(chosen, KNOWN, seed=seed)
    dead = []
    if form in ABLATIONS:
        print(ABLATIONS[form], flush=True)
    with _bar(len(concerned), quiet) as (bar, task):
        for invariant in concerned:
            bar.update(task, description=f"without {invariant}")
            found = ablation.ablate(invariant, chosen, KNOWN, runs=runs, seed=seed, reached=reached)
            if found.dead:
                dead.append(invariant)
            _tell_ablation(found, form)
            bar.advance(task)
    if form != "json":
        if form == "markdown":
            print()
        print(f"{len(concerned)} invariants, {len(dead)} missed by nobody{': ' if dead else ''}{', '.join(dead)}")
    return 1 if dead else 0


def _tell_ablation(found: ablation.Ablation, form: str) -> None:
    by = ", ".join(f"{count} by {what}" for what, count in found.instead.items()) or "none"
    if form == "json":
        said = {"without": found.invariant, "escape": found.escapes, "late": found.late, "seen": found.seen}
        print(json.dumps(said), flush=True)
    elif form == "markdown":
        named = [", ".join(f"`{name}`" for name in names) or "none" for names in (found.escapes, found.late)]
        print(f"| {found.invariant} | {' | '.join(named)} | {by} |", flush=True)
    else:
        print(f"{found.invariant:8} {len(found.escapes):6}  {len(found.late):4}  {by}")
        for name in (*found.escapes, *found.late):
            print(f"{'':23}{name}", flush=True)


def _described(mutant: Mutant) -> dict[str, Any]:
    return {
        "mutant": mutant.name,
        "number": mutant.number,
        "doc": mutant.doc,
        "expected": list(mutant.caught_by),
        "protocol": mutant.protocol,
    }


def _caught(catch: Catch) -> dict[str, Any]:
    said: dict[str, Any] = {
        "strategy": catch.strategy,
        "caught_by": catch.what,
        "schedules": catch.runs,
        "distinct": catch.distinct,
        "seconds": round(catch.seconds, 3),
        "shrinking": round(catch.shrinking, 3),
    }
    if catch.small is not None:
        said |= {
            "scenario": catch.scenario,
            "protocol": catch.protocol,
            "actors": catch.actors,
            "switches": catch.small.switches,
            "preemptions": catch.small.preemptions,
        }
    return said


def _tell_json(mutant: Mutant, found: Hunt) -> None:
    print(json.dumps({**_described(mutant), "catches": [_caught(catch) for catch in found.catches]}), flush=True)


def _tell_text(mutant: Mutant, found: Hunt) -> None:
    for number, catch in enumerate(found.catches):
        what = (mutant.number, mutant.name, ", ".join(mutant.caught_by)) if not number else ("", "", "")
        print(
            f"{what[0]:{_NUMBER}} {what[1]:{_NAME}} {what[2]:{_EXPECTED}} {catch.what or 'ESCAPED':14} "
            f"{catch.strategy:11} {catch.distinct:9}  {1000 * catch.seconds:<6.0f} {_small(catch)}",
            flush=True,
        )


def _tell_markdown(mutant: Mutant, found: Hunt) -> None:
    by = ", ".join(
        f"{catch.what}: {catch.strategy} {catch.distinct}" if catch.what else f"not {catch.strategy} ({catch.distinct})"
        for catch in found.catches
    )
    smallest = min(found.caught, key=lambda catch: size(catch.small) if catch.small else (), default=None)
    print(
        f"| {mutant.number} | `{mutant.name}` | {', '.join(mutant.caught_by)} | {by} | {found.seconds:.2f} "
        f"| {_small(smallest) if smallest else ''} |",
        flush=True,
    )


TELL = {"text": _tell_text, "json": _tell_json, "markdown": _tell_markdown}
"""How a hunt is told, by form."""


def _small(catch: Catch) -> str:
    if catch.small is None:
        return ""
    found = catch.small
    return (
        f"{catch.actors} actors, {found.switches} switches, {found.preemptions} preemptions "
        f"in {catch.scenario} ({catch.protocol})"
    )


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        yield bar, bar.add_task("mutants", total=total)
