"""Hunting mutants: which searches find a planted fault, after how many runs, and how small it can be made."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from xipvm.check import INVARIANTS
from xipvm.explore.explorer import Run, explore, shrink
from xipvm.explore.scene import Scenario
from xipvm.explore.strategies import strategy
from xipvm.mutants.mutant import Mutant, planted


@dataclass
class Catch:
    """How one strategy fared. ``run`` is None when it found nothing."""

    strategy: str
    runs: int = 0
    distinct: int = 0
    seconds: float = 0.0
    scenario: str = ""
    protocol: str = ""
    run: Run | None = None
    small: Run | None = None

    @property
    def what(self) -> str:
        """What was broken first, empty for nothing."""
        return self.run.failure.what if self.run is not None and self.run.failure is not None else ""


@dataclass
class Hunt:
    """All about one mutant."""

    mutant: Mutant
    catches: list[Catch] = field(default_factory=list)

    @property
    def caught(self) -> list[Catch]:
        """By strategy."""
        return [catch for catch in self.catches if catch.what]


def hunt(
    mutant: Mutant,
    scenarios: Mapping[str, Scenario],
    strategies: Sequence[str],
    *,
    runs: int,
    seed: int = 0,
    invariants: Collection[str] = tuple(INVARIANTS),
) -> Hunt:
    """Search each scenario, ``runs`` runs at most, in each protocol that the mutant exists in, until it is found."""
    result = Hunt(mutant)
    for name in strategies:
        result.catches.append(_hunt(mutant, scenarios, name, runs, seed, invariants))
    return result


def _hunt(
    mutant: Mutant,
    scenarios: Mapping[str, Scenario],
    name: str,
    runs: int,
    seed: int,
    invariants: Collection[str],
) -> Catch:
    catch = Catch(name)
    started = time.process_time()
    with planted(mutant.name):
        for scenario in scenarios.values():
            for protocol in scenario.protocols:
                if mutant.protocol not in ("", protocol):
                    continue
                search = explore(scenario, strategy(name, seed), runs=runs, protocol=protocol, invariants=invariants)
                catch.runs += search.runs
                catch.distinct += search.distinct
                if search.failing is not None:
                    catch.scenario, catch.protocol, catch.run = scenario.name, protocol, search.failing
                    catch.seconds = time.process_time() - started
                    catch.small = shrink(scenario, search.failing, protocol=protocol, invariants=invariants)
                    return catch
    catch.seconds = time.process_time() - started
    return catch
