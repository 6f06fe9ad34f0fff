"""The hunt reversed: with one invariant switched off, which mutants does nothing else see.

A mutant that escapes then is why the invariant is there. One that is seen nevertheless is seen by another invariant, or
when the run is over: what the scenarios expect, counts that are left up, references that do not agree. An invariant
without which no mutant escapes would be dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from xipvm.check import INVARIANTS
from xipvm.explore.scene import Scenario
from xipvm.mutants.hunt import hunt
from xipvm.mutants.mutant import Mutant

STRATEGIES: Final = ("random", "pct")


@dataclass
class Ablation:
    """What is not seen without ``invariant``: ``escapes`` by name; ``seen`` has what sees each of the others."""

    invariant: str
    escapes: list[str] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def dead(self) -> bool:
        """Nobody misses it."""
        return not self.escapes

    @property
    def instead(self) -> dict[str, int]:
        """What sees those that do not escape: how many each."""
        found: dict[str, int] = {}
        for what in self.seen.values():
            found[what] = found.get(what, 0) + 1
        return dict(sorted(found.items()))


def ablate(
    invariant: str, mutants: Iterable[Mutant], scenarios: Mapping[str, Scenario], *, runs: int, seed: int = 0
) -> Ablation:
    """Hunt those of ``mutants`` that ``invariant`` may see without it, with the budget of ``hunt``.

    Of what escapes, only that counts which is found with the invariant and the same budget.
    """
    others = [name for name in INVARIANTS if name != invariant]
    result = Ablation(invariant)
    for mutant in mutants:
        if invariant not in mutant.caught_by:
            continue
        found = hunt(mutant, scenarios, STRATEGIES, runs=runs, seed=seed, enough=1, invariants=others, shrunk=False)
        if found.caught:
            result.seen[mutant.name] = found.caught[0].what
        elif hunt(mutant, scenarios, STRATEGIES, runs=runs, seed=seed, enough=1, shrunk=False).caught:
            result.escapes.append(mutant.name)
    return result
