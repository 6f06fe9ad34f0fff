"""What code the right system gets to: of the functions that mutants change, which are called, and how often.

That a search of the right system has no report says something only if it was where the mutants are. And where nothing
that a mutant changes is called, it makes no difference: a hunt looks there last.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from xipvm.explore.explorer import run_once
from xipvm.explore.scene import Scenario
from xipvm.explore.strategies import Pct, RandomWalk
from xipvm.mutants.mutant import Changes, Mutant, Site, replaced, watching

LOOKS: Final = 4
"""Runs of a scenario that show what it calls: so many with a switch or none, and so many by chance."""


@dataclass(frozen=True)
class Reach:
    """What a scenario gets to in one protocol."""

    called: frozenset[Site]
    """Of the functions that mutants change."""
    choices: int
    """How many a search makes in those runs."""


Reached = Mapping[tuple[str, str], Reach]
"""By scenario and protocol."""


def changes(mutant: Mutant) -> Changes:
    """What ``mutant`` changes."""
    with watching() as seen, mutant.apply():
        pass
    return seen


def sites(mutants: Iterable[Mutant]) -> list[Site]:
    """The functions that ``mutants`` replace or watch, each once: its owner and its name there."""
    found: dict[Site, None] = {}
    for mutant in mutants:
        seen = changes(mutant)
        found.update(dict.fromkeys([*seen.scopes, *seen.replaced]))
    return list(found)


@contextmanager
def counting(where: Iterable[Site]) -> Iterator[Counter[Site]]:
    """Counts calls of the functions ``where`` meanwhile."""
    calls: Counter[Site] = Counter()
    with ExitStack() as stack:
        for site in where:
            stack.enter_context(replaced(*site, _counted(site, calls)))
        yield calls


def survey(mutants: Iterable[Mutant], scenarios: Mapping[str, Scenario], *, seed: int = 0) -> Reached:
    """What of that which ``mutants`` change each of ``scenarios`` gets to in a few runs."""
    found: dict[tuple[str, str], Reach] = {}
    with counting(sites(mutants)) as calls:
        for scenario in scenarios.values():
            for protocol in scenario.protocols:
                calls.clear()
                choices = 0
                for by in (Pct(seed, depths=(1, 2)), RandomWalk(seed)):
                    for _ in range(LOOKS):
                        by.begin()
                        run = run_once(scenario, by.pick, protocol=protocol)
                        by.end(run.choices, run.features)
                        choices += len(run.choices)
                found[scenario.name, protocol] = Reach(frozenset(calls), choices)
    return found


def why_nothing(mutant: Mutant, scenario: Scenario, protocol: str) -> str:
    """Why a search of ``scenario`` in ``protocol`` may have found nothing of ``mutant``, as the end of a sentence."""
    if mutant.protocol not in ("", protocol):
        return f"is a fault of the {mutant.protocol} protocol: --protocol {mutant.protocol}"
    reached = survey([mutant], {scenario.name: replace(scenario, protocols=(protocol,))})[scenario.name, protocol]
    changed = changes(mutant)
    if changed.matter(reached.called):
        return "was not seen here, though what it changes is called"
    missing = changed.replaced if not reached.called.intersection(changed.replaced) else changed.scopes
    names = ", ".join(f"{owner.__name__.rpartition('.')[2]}.{attribute}" for owner, attribute in missing)
    return f"makes no difference in {scenario.name} ({protocol}): nobody calls {names}"


def _counted(site: Site, calls: Counter[Site]) -> Any:
    """What replaces ``site``: a function, or the class's or static method that it is."""
    found = inspect.getattr_static(*site)
    bound = isinstance(found, classmethod | staticmethod)
    original = found.__func__ if bound else getattr(*site)

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[site] += 1
        return original(*arguments, **named)

    return type(found)(counted) if bound else counted
