"""The one source of everything that is not determined: who goes on at a schedule point, which page is the victim.

A run asks ``choose(n, label)`` and gets a number below n. What was asked and answered is recorded as a list of
:class:`Choice`; the same answers give the same run, fewer or smaller ones a shorter one. 0 is always the dull answer:
the actor that runs goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from xipvm.errors import XipvmError


class Choice(NamedTuple):
    """A question and its answer. ``preempts``: another answer than 0 takes the turn from an actor that could go on."""

    n: int
    label: str
    answer: int
    preempts: bool = False

    @property
    def is_preemption(self) -> bool:
        """The turn was taken from an actor that could have gone on."""
        return self.preempts and self.answer != 0


class Question(NamedTuple):
    """What a strategy is asked. ``actors`` are the candidates' names, empty when it is not about who goes on."""

    n: int
    label: str
    preempts: bool = False
    actors: tuple[str, ...] = ()


Pick = Callable[[Question], int]


class DriftError(XipvmError):
    """A recorded run was replayed on a program that asks something else; ``index`` is the first different question."""

    def __init__(self, index: int, recorded: Choice | None, asked: Question | None) -> None:
        was = "the end of the run" if recorded is None else f"{recorded.label} (of {recorded.n})"
        now = "the run has ended" if asked is None else f"it asks {asked.label} (of {asked.n})"
        super().__init__(f"the program has changed: choice {index} was recorded at {was}, now {now}")
        self.index = index


class Recording:
    """Asks ``pick`` and remembers. An answer that is too large counts as 0."""

    def __init__(self, pick: Pick) -> None:
        self.choices: list[Choice] = []
        self._pick = pick

    def ask(self, question: Question) -> int:
        """The answer to ``question``."""
        answer = self._pick(question)
        if not 0 <= answer < question.n:
            answer = 0
        self.choices.append(Choice(question.n, question.label, answer, question.preempts))
        return answer


class Replay:
    """Answers as recorded, then always 0. ``strict``: raises DriftError when something else is asked."""

    def __init__(self, choices: Sequence[Choice], *, strict: bool = False) -> None:
        self._choices = choices
        self._strict = strict
        self._next = 0

    def __call__(self, question: Question) -> int:
        """The recorded answer."""
        at, self._next = self._next, self._next + 1
        if at >= len(self._choices):
            return 0
        recorded = self._choices[at]
        if self._strict and (recorded.n, recorded.label) != (question.n, question.label):
            raise DriftError(at, recorded, question)
        return recorded.answer

    def finish(self) -> None:
        """The run has ended. Raises DriftError, if strict, when answers are left over."""
        if self._strict and self._next < len(self._choices):
            raise DriftError(self._next, self._choices[self._next], None)
