"""A run that is wrong made small: the same failure with as few preemptions, switches and steps as can be found.

Two ways, the better result counts:

* *from nothing*: all runs of the scenario without a preemption, then with one, then with two, as far as the budget
  goes. Most failures need no more (Musuvathi and Qadeer, PLDI 2007), and what is found so is minimal in preemptions;
* *from the run*: its schedule is a list of blocks (who ran, for how many choices). Blocks are taken out, a half of them
  first and single ones in the end, so that their neighbours, of one actor then, become one; blocks are stretched until
  their actor cannot go on; choices that are not about who goes on become 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xipvm.errors import BadInput
from xipvm.explore.choices import Pick, Question, Replay
from xipvm.explore.explorer import Run, run_once
from xipvm.explore.scene import Furnish
from xipvm.explore.strategies import Exhaustive

BUDGET: Final = 600
"""Runs."""
_BOUND: Final = 2
_FOREVER: Final = 1 << 30


@dataclass(frozen=True)
class Block:
    """Actor ``name`` answers so many choices; or, without a name, an answer that is not about actors."""

    name: str
    length: int


class _Schedule:
    """Answers so that ``blocks`` happen as far as they can; then the plain order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = list(reversed(blocks))
        self._left = self._blocks[-1].length if blocks else 0

    def _next(self) -> None:
        self._blocks.pop()
        self._left = self._blocks[-1].length if self._blocks else 0

    def __call__(self, question: Question) -> int:
        if not question.actors:
            if self._blocks and not self._blocks[-1].name:
                answer = self._left
                self._next()
                return answer
            return 0
        while self._blocks and (not self._left or self._blocks[-1].name not in question.actors):
            self._next()
        if not self._blocks:
            return 0
        self._left -= 1
        return question.actors.index(self._blocks[-1].name)


def _blocks(scenario: Furnish, run: Run, options: dict[str, Any]) -> tuple[list[Block], Run]:
    """The schedule of ``run`` as blocks, and the run that was made to see it."""
    blocks: list[Block] = []
    answers = Replay(run.choices)

    def pick(question: Question) -> int:
        answer = answers(question)
        answer = answer if 0 <= answer < question.n else 0
        if not question.actors:
            blocks.append(Block("", answer))
        elif blocks and blocks[-1].name == question.actors[answer]:
            blocks[-1] = Block(blocks[-1].name, blocks[-1].length + 1)
        else:
            blocks.append(Block(question.actors[answer], 1))
        return answer

    return blocks, run_once(scenario, pick, **options)


def size(run: Run) -> tuple[int, int, int]:
    """Smaller is better: preemptions, switches, choices."""
    return run.preemptions, run.switches, len(run.choices)


def shrink(scenario: Furnish, run: Run, *, budget: int = BUDGET, **options: Any) -> Run:
    """A smaller run that is wrong in the same way; makes ``budget`` runs at most. Raises BadInput for a right one."""
    if run.failure is None:
        raise BadInput("a run that is right cannot be shrunk")
    if run.failure.what == "livelock":  # long runs, all of them
        budget //= 10
    shrinking = _Shrinking(scenario, run, budget, options)
    for bound in range(_BOUND + 1):
        # What the run itself can be made into limits how far it is worth to look.
        if bound == _BOUND:
            shrinking.thin_out()
        if shrinking.best.preemptions <= bound and bound:
            break
        if shrinking.all_with(bound):
            break
    if shrinking.best is run:
        shrinking.thin_out()
    return shrinking.best


class _Shrinking:
    def __init__(self, scenario: Furnish, run: Run, budget: int, options: dict[str, Any]) -> None:
        self._scenario = scenario
        self._options = options
        self._what = run.failure.what if run.failure is not None else ""
        self._budget = budget
        self.best = run

    def _try(self, pick: Pick) -> Run | None:
        """A run; None when the budget is used up. It is the best from now on if it is."""
        if self._budget <= 0:
            return None
        self._budget -= 1
        found = run_once(self._scenario, pick, **self._options)
        if found.failure is not None and found.failure.what == self._what and size(found) < size(self.best):
            self.best = found
        return found

    def all_with(self, preemptions: int) -> bool:
        """Every run with so many preemptions; whether the failure is among them."""
        by = Exhaustive(preemptions)
        share = self._budget // (_BOUND + 1 - preemptions)
        found = False
        while share > 0 and by.begin():
            share -= 1
            run = self._try(by.pick)
            if run is None:
                break
            by.end(run.choices, run.features)
            found = found or (run.failure is not None and run.failure.what == self._what)
        return found

    def thin_out(self) -> None:
        """Take blocks out of the best run's schedule, and stretch those that are left, until nothing helps any more."""
        improved = True
        while improved and self._budget > 0:
            before = self.best
            blocks, _ = _blocks(self._scenario, before, self._options)
            piece = max(len(blocks) // 2, 1)
            while piece and self.best is before:
                for at in range(0, len(blocks), piece):
                    self._try(_Schedule(blocks[:at] + blocks[at + piece :]))
                    if self.best is not before:
                        break
                piece //= 2
            for change in (_stretched, _calmed, _swapped):
                if self.best is before:
                    self._change_each(blocks, before, change)
            improved = self.best is not before

    def _change_each(
        self, blocks: list[Block], before: Run, change: Callable[[list[Block], int], list[Block] | None]
    ) -> None:
        for at in range(len(blocks)):
            changed = change(blocks, at)
            if changed is not None:
                self._try(_Schedule(changed))
            if self.best is not before:
                return


def _stretched(blocks: list[Block], at: int) -> list[Block] | None:
    if not blocks[at].name or blocks[at].length == _FOREVER:
        return None
    return [*blocks[:at], Block(blocks[at].name, _FOREVER), *blocks[at + 1 :]]


def _calmed(blocks: list[Block], at: int) -> list[Block] | None:
    if blocks[at].name or not blocks[at].length:
        return None
    return [*blocks[:at], Block("", 0), *blocks[at + 1 :]]


def _swapped(blocks: list[Block], at: int) -> list[Block] | None:
    if at + 1 >= len(blocks) or not blocks[at].name or not blocks[at + 1].name:
        return None
    return [*blocks[:at], blocks[at + 1], blocks[at], *blocks[at + 2 :]]
