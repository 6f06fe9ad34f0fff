"""Hunting mutants: which searches find a planted fault, after how many runs, and how small it can be made.

A hunt goes over all scenarios in rounds, with more runs in each, so that what is easy somewhere is found soon whatever
comes first. Scenarios do not know of mutants, and no mutant says where it is to be found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from xipvm.check import INVARIANTS
from xipvm.explore.choices import Replay
from xipvm.explore.explorer import Run, run_once
from xipvm.explore.guest_code import CODE_SCENARIOS
from xipvm.explore.guests import GUEST_SCENARIOS
from xipvm.explore.scene import Scenario, Scene
from xipvm.explore.shrink import shrink
from xipvm.explore.strategies import Strategy, strategy
from xipvm.mutants.mutant import Mutant, planted
from xipvm.trace.events import Event

STRATEGIES: Final = ("pct", "random", "exhaustive", "coverage")
ROUND: Final = 4
"""Runs of a scenario in the first round; each further round makes three times as many."""
_WITH_GUEST: Final = {**GUEST_SCENARIOS, **CODE_SCENARIOS}
GUEST_COST: Final = 4
"""How many runs without a real guest one with a guest counts for."""
LIMIT: Final = 1_000
"""Questions after which a run counts as a livelock; right ones ask less than a quarter of that."""


@dataclass
class Catch:
    """How one strategy fared. ``run`` is None when it found nothing."""

    strategy: str
    runs: int = 0
    distinct: int = 0
    """Runs, before it was found, that differ in more than the order of steps that nobody can tell apart."""
    seconds: float = 0.0
    """Of processor time, without the shrinking."""
    scenario: str = ""
    protocol: str = ""
    run: Run | None = None
    small: Run | None = None
    """The same, shrunk."""
    actors: int = 0
    """How many act in that before it fails."""

    @property
    def what(self) -> str:
        """What was broken first, empty for nothing."""
        return self.run.failure.what if self.run is not None and self.run.failure is not None else ""


@dataclass
class Hunt:
    """All about one mutant, None for the right system."""

    mutant: Mutant | None
    catches: list[Catch] = field(default_factory=list)

    @property
    def caught(self) -> list[Catch]:
        """By strategy."""
        return [catch for catch in self.catches if catch.what]


@dataclass
class _Field:
    """A scenario in one protocol, and how far the search of it has come."""

    scenario: Scenario
    protocol: str
    by: Strategy
    done: bool = False

    def runs(self, count: int, options: Mapping[str, Any]) -> Iterator[Run]:
        for _ in range(count):
            if self.done or not self.by.begin():
                self.done = True
                return
            run = run_once(self.scenario, self.by.pick, protocol=self.protocol, **options)
            self.by.end(run.choices, run.features)
            yield run


def hunt(
    mutant: Mutant | None,
    scenarios: Mapping[str, Scenario],
    strategies: Sequence[str] = STRATEGIES,
    *,
    runs: int,
    seed: int = 0,
    enough: int = 2,
    invariants: Collection[str] = tuple(INVARIANTS),
    shrunk: bool = True,
    counts: Callable[[str], bool] = lambda what: True,
) -> Hunt:
    """Search every scenario, ``runs`` runs at most of each in each protocol that the mutant exists in.

    One strategy after the other, until ``enough`` of them have found it; what they find is made small if ``shrunk``.
    Without a ``mutant`` the system is right, and all strategies are used. A run is wrong if what was broken ``counts``.
    """
    result = Hunt(mutant)
    names = (mutant.name,) if mutant is not None else ()
    for name in strategies:
        with planted(*names):
            options = {"invariants": invariants, "limit": LIMIT}
            catch = _hunt(mutant, scenarios, name, runs, seed, options, counts)
            if shrunk and catch.run is not None:
                _shrink(catch, scenarios[catch.scenario], {"protocol": catch.protocol, **options})
            result.catches.append(catch)
        if mutant is not None and len(result.caught) >= enough:
            break
    return result


def _hunt(
    mutant: Mutant | None,
    scenarios: Mapping[str, Scenario],
    name: str,
    runs: int,
    seed: int,
    options: Mapping[str, Any],
    counts: Callable[[str], bool],
) -> Catch:
    catch = Catch(name)
    fields = [
        _Field(scenario, protocol, strategy(name, seed))
        for scenario in scenarios.values()
        for protocol in scenario.protocols
        if mutant is None or mutant.protocol in ("", protocol)
    ]
    seen: set[tuple[str, str, str]] = set()
    started, made, count = time.process_time(), 0, ROUND
    while made < runs and catch.run is None:
        count = min(count, runs - made)
        for each in fields:
            share = max(count // GUEST_COST, 1) if each.scenario.name in _WITH_GUEST else count
            for run in each.runs(share, options):
                catch.runs += 1
                seen.add((each.scenario.name, each.protocol, run.fingerprint))
                if run.failure is not None and counts(run.failure.what):
                    catch.scenario, catch.protocol, catch.run = each.scenario.name, each.protocol, run
                    break
            if catch.run is not None:
                break
        made, count = made + count, 3 * count
    catch.seconds = time.process_time() - started
    catch.distinct = len(seen)
    return catch


def _shrink(catch: Catch, scenario: Scenario, options: Mapping[str, Any]) -> None:
    """What was caught, made small."""
    assert catch.run is not None
    catch.small = shrink(scenario, catch.run, **options)
    catch.actors = _acting(scenario, catch.small, options)


def _acting(scenario: Scenario, run: Run, options: Mapping[str, Any]) -> int:
    """How many of a scenario's actors say something in ``run``, made again; what closing the scene says is no part."""
    names: set[str] = set()

    def furnish(scene: Scene) -> None:
        def listen(event: Event) -> None:
            names.add(event.actor)

        scenario(scene)
        scene.trace.attach(listen)
        scene.undo(lambda: scene.trace.detach(listen))

    run_once(replace(scenario, furnish=furnish), Replay(run.choices), **options)
    return len(names)
