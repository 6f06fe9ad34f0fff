"""Hunting mutants: which searches find a planted fault, after how many runs, and how small it can be made.

A hunt goes over all scenarios in rounds, with more runs in each, so that what is easy somewhere is found soon whatever
comes first. Scenarios do not know of mutants, and no mutant says where it is to be found; but one can see where it
makes no difference, since nothing that it changes is called there (reach.py), and look there last.
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
from xipvm.mutants.reach import Reached, changes
from xipvm.trace.events import Event

STRATEGIES: Final = ("pct", "random", "exhaustive", "coverage")
ROUND: Final = 4
"""Runs of a scenario in the first round; each further round makes three times as many."""
_WITH_GUEST: Final = {**GUEST_SCENARIOS, **CODE_SCENARIOS}
GUEST_COST: Final = 4
"""How many runs without a real guest one with a guest counts for."""
LIMIT: Final = 1_000
"""Questions after which a run counts as a livelock; right ones ask less than a quarter of that."""


_Stage = list[tuple[Scenario, str]]
"""Scenarios, each in a protocol."""


@dataclass
class Catch:
    """How one strategy fared. ``run`` is None when it found nothing."""

    strategy: str
    runs: int = 0
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    """Of those runs: scenario, protocol and fingerprint."""
    seconds: float = 0.0
    """Of processor time, without the shrinking."""
    shrinking: float = 0.0
    """The same of the shrinking."""
    scenario: str = ""
    protocol: str = ""
    run: Run | None = None
    small: Run | None = None
    """The same, shrunk."""
    actors: int = 0
    """How many act in that before it fails."""

    @property
    def distinct(self) -> int:
        """Runs, before it was found, that differ in more than the order of steps that nobody can tell apart."""
        return len(self.seen)

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

    @property
    def seconds(self) -> float:
        """Of processor time, for all strategies, without the shrinking."""
        return sum(catch.seconds for catch in self.catches)

    @property
    def shrinking(self) -> float:
        """Of processor time, for what all strategies found."""
        return sum(catch.shrinking for catch in self.catches)


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
    counts: Callable[[str], bool] | None = None,
    reached: Reached | None = None,
    everywhere: bool = True,
) -> Hunt:
    """Search every scenario, ``runs`` runs at most of each in each protocol that the mutant exists in.

    One strategy after the other, until ``enough`` of them have found it; what they find is made small if ``shrunk``.
    Without a ``mutant`` the system is right, and all strategies are used. A run is wrong if what was broken ``counts``,
    by default what should see the mutant: whatever else comes of it does not.

    With ``reached``, the shortest scenarios come first, and those that call nothing of what the mutant changes when all
    strategies are through with the others; or not at all, unless ``everywhere``.
    """
    if counts is None:
        counts = _anything if mutant is None else mutant.caught_by.__contains__
    result = Hunt(mutant)
    stages = _stages(mutant, scenarios, reached)
    names = (mutant.name,) if mutant is not None else ()
    options = {"invariants": invariants, "limit": LIMIT}
    result.catches = [Catch(name) for name in strategies]
    for stage in stages if everywhere else stages[:1]:
        for catch in result.catches:
            if mutant is not None and len(result.caught) >= enough:
                break
            if catch.run is not None:
                continue
            with planted(*names):
                _hunt(catch, stage, runs, seed, options, counts)
                if shrunk and catch.run is not None:
                    _shrink(catch, scenarios[catch.scenario], {"protocol": catch.protocol, **options})
    result.catches = [catch for catch in result.catches if catch.runs]
    return result


def _anything(what: str) -> bool:
    return True


def _stages(mutant: Mutant | None, scenarios: Mapping[str, Scenario], reached: Reached | None) -> list[_Stage]:
    """Where to look, and where when nothing was found there."""
    places = [
        (scenario, protocol)
        for scenario in scenarios.values()
        for protocol in scenario.protocols
        if mutant is None or mutant.protocol in ("", protocol)
    ]
    if mutant is None or reached is None:
        return [places]
    changed = changes(mutant)
    first: _Stage = []
    last: _Stage = []
    for place in places:
        found = reached[place[0].name, place[1]]
        (first if changed.matter(found.called) else last).append(place)

    def length(place: tuple[Scenario, str]) -> tuple[bool, int]:
        choices = reached[place[0].name, place[1]].choices
        return not choices, choices  # where there is nothing to choose, a search says little

    return [sorted(first, key=length), last]


def _hunt(
    catch: Catch, stage: _Stage, runs: int, seed: int, options: Mapping[str, Any], counts: Callable[[str], bool]
) -> None:
    """Goes on with ``catch``, in the scenarios of ``stage``."""
    fields = [_Field(scenario, protocol, strategy(catch.strategy, seed)) for scenario, protocol in stage]
    started, made, count = time.process_time(), 0, ROUND
    while made < runs and catch.run is None:
        count = min(count, runs - made)
        for each in fields:
            share = max(count // GUEST_COST, 1) if each.scenario.name in _WITH_GUEST else count
            for run in each.runs(share, options):
                catch.runs += 1
                catch.seen.add((each.scenario.name, each.protocol, run.fingerprint))
                if run.failure is not None and counts(run.failure.what):
                    catch.scenario, catch.protocol, catch.run = each.scenario.name, each.protocol, run
                    break
            if catch.run is not None:
                break
        made, count = made + count, 3 * count
    catch.seconds += time.process_time() - started


def _shrink(catch: Catch, scenario: Scenario, options: Mapping[str, Any]) -> None:
    """What was caught, made small."""
    assert catch.run is not None
    started = time.process_time()
    catch.small = shrink(scenario, catch.run, **options)
    catch.actors = _acting(scenario, catch.small, options)
    catch.shrinking = time.process_time() - started


def _acting(scenario: Scenario, run: Run, options: Mapping[str, Any]) -> int:
    """How many of a scenario's actors say something in ``run``, made again; what closing the scene says is no part."""
    names: set[str] = set()

    def furnish(scene: Scene) -> None:
        def listen(event: Event) -> None:
            if event.actor in actors:  # not the host, who checks what comes of it
                names.add(event.actor)

        scenario(scene)
        actors = {actor.name for actor in scene.scheduler.actors}
        scene.trace.attach(listen)
        scene.undo(lambda: scene.trace.detach(listen))

    run_once(replace(scenario, furnish=furnish), Replay(run.choices), **options)
    return len(names)
