"""How a benchmark measures and what it reports.

A benchmark is a function from a :class:`Bench` to figures. Everything that it compares runs in turn, round by round
(A B A B, never A A B B), so that a machine that gets slower or busier does so for both sides. A ratio is taken inside
each round; a figure shows the median of the rounds and their extremes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Samples = dict[str, list[float]]


class MissingPeerError(Exception):
    """What a benchmark compares with is not installed here; the message says what."""


@dataclass(frozen=True)
class Spread:
    """Median and extremes of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Target:
    """What a figure should come to: at most ``limit``, or at least it. ``of_value``: ours, not the ratio."""

    limit: float
    at_least: bool = False
    of_value: bool = False


@dataclass(frozen=True)
class Figure:
    """One line of the report. ``ours`` and ``theirs`` are in ``unit``; ``ratio`` is what ``what`` says."""

    what: str
    unit: str
    ours: Spread | None
    peer: str
    theirs: Spread | None
    ratio: Spread | None
    target: Target | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median is on the right side of the target; None without one."""
        target = self.target
        spread = self.ours if target is not None and target.of_value else self.ratio
        if target is None or spread is None:
            return None
        return spread.median >= target.limit if target.at_least else spread.median <= target.limit


def compare(
    what: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    *,
    unit: str = "s",
    target: Target | None = None,
    note: str = "",
) -> Figure:
    """Ours over theirs, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Figure(what, unit, Spread.of(ours), peer, Spread.of(theirs), Spread.of(ratios), target, note)


def value(what: str, ours: Sequence[float], *, unit: str, target: Target | None = None, note: str = "") -> Figure:
    """A figure that belongs to another one and has no peer of its own: a part, a number of something."""
    return Figure(what, unit, Spread.of(ours), "", None, None, target, note)


@dataclass
class Bench:
    """What a benchmark gets. ``folder`` is for its files and removed afterwards."""

    repeat: int
    folder: Path
    say: Callable[[str], None] = field(default=lambda text: None)

    def rounds(self, **runs: Callable[[], float]) -> Samples:
        """Call every one of ``runs`` once a round; what each returned, by its name."""
        samples: Samples = {name: [] for name in runs}
        for number in range(self.repeat):
            for name, run in runs.items():
                self.say(f"{number + 1}/{self.repeat} {name}")
                samples[name].append(run())
        return samples


Benchmark = Callable[[Bench], Iterable[Figure]]
