"""The hunt reversed: with one invariant switched off, which mutants does nothing else see.

A mutant that escapes then is why the invariant is there. So is one that is only seen when the run is over, where a
scenario says what has to be there in the end: by then nobody can tell any more what went wrong. An invariant of which
every mutant is seen by another invariant would be dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xipvm.check import INVARIANTS
from xipvm.explore.scene import Scenario
from xipvm.mutants.hunt import hunt
from xipvm.mutants.mutant import Mutant
from xipvm.mutants.reach import Reached

STRATEGIES: Final = ("random", "pct")


@dataclass
class Ablation:
    """What becomes of mutants without ``invariant``."""

    invariant: str
    escapes: list[str] = field(default_factory=list)
    """Nothing sees them."""
    late: dict[str, str] = field(default_factory=dict)
    """Only when the run is over they are seen, and as what."""
    seen: dict[str, str] = field(default_factory=dict)
    """The invariant that sees each of the others."""

    @property
    def dead(self) -> bool:
        """Nobody misses it."""
        return not self.escapes and not self.late

    @property
    def instead(self) -> dict[str, int]:
        """Which invariants see the others: how many each."""
        found: dict[str, int] = {}
        for what in self.seen.values():
            found[what] = found.get(what, 0) + 1
        return dict(sorted(found.items()))


def ablate(
    invariant: str,
    mutants: Iterable[Mutant],
    scenarios: Mapping[str, Scenario],
    *,
    runs: int,
    seed: int = 0,
    reached: Reached | None = None,
) -> Ablation:
    """Hunt those of ``mutants`` that ``invariant`` may see without it, with the budget of ``hunt``.

    Of what escapes, only that counts which is found with the invariant and the same budget. With ``reached``, only
    where what a mutant changes is called.
    """
    others = [name for name in INVARIANTS if name != invariant]
    result = Ablation(invariant)
    for mutant in mutants:
        if invariant not in mutant.caught_by:
            continue
        same: dict[str, Any] = {"runs": runs, "seed": seed, "enough": 1, "shrunk": False}
        same |= {"reached": reached, "everywhere": False}
        found = hunt(mutant, scenarios, STRATEGIES, invariants=others, counts=lambda what: what in INVARIANTS, **same)
        if found.caught:
            result.seen[mutant.name] = found.caught[0].what
            continue
        found = hunt(mutant, scenarios, STRATEGIES, invariants=others, counts=lambda what: True, **same)
        if found.caught:
            result.late[mutant.name] = found.caught[0].what
        elif hunt(mutant, scenarios, STRATEGIES, **same).caught:
            result.escapes.append(mutant.name)
    return result
