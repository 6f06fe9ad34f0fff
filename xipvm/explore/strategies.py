"""How the interleavings are searched: by chance, by priorities, one after the other, or towards what is new.

A strategy answers the questions of one run after the other. ``begin`` says whether there is another run to make,
``pick`` answers, ``end`` is told how it went. All chance comes from a seed: a strategy's n-th run is always the same.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xipvm.errors import BadInput
from xipvm.explore.choices import Choice, Question

Feature = tuple[str, str, str, str]
"""What one actor did last, and what another did next."""


class Strategy(ABC):
    """One search. ``name`` is what the command line calls it."""

    name = ""
    complete = False
    """There is no run within its bounds that was not made."""

    @abstractmethod
    def begin(self) -> bool:
        """Get ready for a run; False when all have been made."""

    @abstractmethod
    def pick(self, question: Question) -> int:
        """The answer."""

    def end(self, choices: Sequence[Choice], features: frozenset[Feature]) -> None:  # noqa: B027
        """The run asked and was answered ``choices``; ``features`` is what it reached."""


class RandomWalk(Strategy):
    """Every answer is as likely as any other."""

    name = "random"

    def __init__(self, seed: int | str = 0) -> None:
        self._seed = seed
        self._run = 0
        self._random = random.Random()

    def begin(self) -> bool:
        """Always."""
        self._random.seed(f"{self._seed}/{self._run}")
        self._run += 1
        return True

    def pick(self, question: Question) -> int:
        """Any."""
        return self._random.randrange(question.n)


class Pct(Strategy):
    """Probabilistic concurrency testing (Burckhardt and others, ASPLOS 2010).

    Actors have random priorities and the highest one runs; at ``depth - 1`` random moments the one that runs gets the
    lowest. A bug that needs d orderings among n actors and k steps is found with a probability of at least
    1 / (n * k ** (d - 1)) a run.

    Neither d nor k is known: one run after the other goes through ``depths``, and k is the median of the last runs'
    lengths, so that one that was long, as those are that try again and again, does not thin out those behind it.
    """

    name = "pct"

    def __init__(self, seed: int | str = 0, depths: Sequence[int] = (2, 3, 4, 6)) -> None:
        self._seed = seed
        self._depths = depths
        self._run = 0
        self._random = random.Random()
        self._lengths: deque[int] = deque([16], maxlen=16)
        """Of the last runs, in questions about who goes on."""
        self._priorities: dict[str, float] = {}
        self._changes: set[int] = set()
        self._step = 0
        self._lowest = 0.0

    def begin(self) -> bool:
        """Always."""
        self._random.seed(f"{self._seed}/{self._run}")
        depth = self._depths[self._run % len(self._depths)]
        self._run += 1
        self._priorities = {}
        length = sorted(self._lengths)[len(self._lengths) // 2]
        self._changes = {self._random.randrange(length) for _ in range(depth - 1)}
        self._step = 0
        self._lowest = 0.0
        return True

    def pick(self, question: Question) -> int:
        """The actor of the highest priority; chance where it is not about actors."""
        if not question.actors:
            return self._random.randrange(question.n)
        if self._step in self._changes:
            self._lowest -= 1
            self._priorities[question.actors[0]] = self._lowest
        self._step += 1
        for actor in question.actors:
            if actor not in self._priorities:
                self._priorities[actor] = 1 + self._random.random()
        return max(range(question.n), key=lambda at: self._priorities[question.actors[at]])

    def end(self, choices: Sequence[Choice], features: frozenset[Feature]) -> None:
        """Remembers how long runs are."""
        self._lengths.append(max(self._step, 2))


class Exhaustive(Strategy):
    """All runs with at most ``preemptions`` preemptions, each once, depth first; None for no bound.

    ``root``: only those that begin with these answers.
    """

    name = "exhaustive"

    def __init__(self, preemptions: int | None = 2, *, root: Sequence[int] = ()) -> None:
        self._bound = preemptions
        self._root = len(root)
        self._prefix: list[int] | None = list(root)
        self._at = 0

    def begin(self) -> bool:
        """As long as an answer is left."""
        self._at = 0
        return self._prefix is not None

    def pick(self, question: Question) -> int:
        """The prefix that is being tried, then 0."""
        assert self._prefix is not None
        at, self._at = self._at, self._at + 1
        return self._prefix[at] if at < len(self._prefix) else 0

    def end(self, choices: Sequence[Choice], features: frozenset[Feature]) -> None:
        """Finds the last answer behind the root that can be made another one."""
        spent = self._spent(choices)
        for at in range(len(choices) - 1, self._root - 1, -1):
            if self._may_rise(choices[at], spent[at]):
                self._prefix = [earlier.answer for earlier in choices[:at]] + [choices[at].answer + 1]
                return
        self._prefix = None
        self.complete = True

    def below(self, root: Sequence[int], choices: Sequence[Choice]) -> list[tuple[int, ...]]:
        """``root`` with each answer that may follow it, given ``choices``, its first run; itself if none can."""
        at = len(root)
        if at >= len(choices):
            return [tuple(root)]
        spent = self._spent(choices)[at]
        return [(*root, answer) for answer in range(choices[at].n) if not answer or self._may_rise(choices[at], spent)]

    def _spent(self, choices: Sequence[Choice]) -> list[int]:
        """Preemptions before each choice."""
        spent = [0]
        for choice in choices:
            spent.append(spent[-1] + choice.is_preemption)
        return spent

    def _may_rise(self, choice: Choice, spent: int) -> bool:
        if choice.answer + 1 >= choice.n:
            return False
        return self._bound is None or not choice.preempts or spent + 1 <= self._bound


class CoverageGuided(Strategy):
    """Varies those runs that reached something new: a pair of steps of different actors in an order not seen before."""

    name = "coverage"
    _FRESH: Final = 0.2
    """How often it begins from nothing."""

    def __init__(self, seed: int | str = 0) -> None:
        self._random = random.Random(f"coverage/{seed}")
        self._corpus: list[tuple[int, ...]] = []
        self.seen: set[Feature] = set()
        self._prefix: tuple[int, ...] = ()
        self._changes: set[int] = set()
        self._at = 0

    def begin(self) -> bool:
        """Always."""
        chance = self._random
        self._at = 0
        self._changes = set()
        self._prefix = ()
        if self._corpus and chance.random() > self._FRESH:
            base = chance.choice(self._corpus)
            self._prefix = base[: chance.randrange(1, len(base) + 1)] if chance.random() < 0.5 else base
            self._changes = {chance.randrange(len(base)) for _ in range(chance.randrange(3))}
        return True

    def pick(self, question: Question) -> int:
        """As in the run that is varied, except where it is changed; chance behind it."""
        at, self._at = self._at, self._at + 1
        if at < len(self._prefix) and at not in self._changes:
            return self._prefix[at]
        return self._random.randrange(question.n)

    def end(self, choices: Sequence[Choice], features: frozenset[Feature]) -> None:
        """Keeps a run that reached something new."""
        new = features - self.seen
        if new and choices:
            self.seen |= new
            self._corpus.append(tuple(choice.answer for choice in choices))


STRATEGIES: dict[str, Callable[[int | str], Strategy]] = {
    "random": RandomWalk,
    "pct": Pct,
    "coverage": CoverageGuided,
    "exhaustive": lambda seed: Exhaustive(),
}
"""By name; each is made with a seed."""


def strategy(name: str, seed: int | str = 0, *, preemptions: int | None = 2, reduce: bool = False) -> Strategy:
    """The strategy ``name``. Raises BadInput for an unknown one.

    ``preemptions`` bound an exhaustive one, None: nothing does. ``reduce``: it leaves out what is the same but for the
    order of independent steps (reduction.py), which only :func:`~xipvm.explore.explorer.explore` can do.
    """
    if name == "exhaustive":
        from xipvm.explore.reduction import Reduced  # which is derived from what is here

        return Reduced(preemptions) if reduce else Exhaustive(preemptions)
    if name not in STRATEGIES:
        raise BadInput(f"no strategy is called {name!r}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](seed)
