"""The exhaustive search with partial-order reduction: of runs that differ only in the order of independent steps, one.

It follows what each run did (steps.py): which step depends on which. Runs of the same dependences are one Mazurkiewicz
trace, and end alike. Of every trace at least one run is made, as far as the bound allows:

* *Without a bound* it is source-DPOR with sleep sets (Abdulla, Aronis, Jonsson, Sagonas, POPL 2014): for each race of
  two steps that was seen, somebody who can bring about the other order is tried where the first of them began; and
  whoever was tried sleeps until something that its step depends on is done. No trace is run to its end twice. A run in
  which all sleep is cut short.

* *With a bound of preemptions* each trace that any run within the bound has is found, by a run of no more preemptions
  than any that comes later in the order of the search; not only each state of each actor, as bounded DPOR guarantees
  (Coons, Musuvathi, McKinley, OOPSLA 2013). What is left out are runs for which there is one of the same trace, of as
  few preemptions, that comes earlier:

  1. An actor is preempted before a step only if that step was in a race, in some run that had it, with one of another
     actor. (Else it could as well be preempted behind that step. A step is recognised by its identity, wherever it is
     met.) Who else goes on is not narrowed, as another choice may cost a preemption more.
  2. Who was preempted sleeps, as above. Nobody else does: to do his step first could cost a preemption.
  3. Where the steps so far are those of a run that was already followed, the same actor is about to go on, and no fewer
     preemptions are left, nothing new can come (happens-before caching, as in CHESS).

  Each run that is left out is replaced by an earlier one, which may itself be; as there is a first, that ends.

A violation that a run shows is that of its trace: the oracle's verdict hangs on the order of events that name the same
page or vCPU, and those depend on each other. What the search cannot see through makes steps depend on everything
(footprint.py); it only reduces less then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xipvm.explore.choices import Choice, Question
from xipvm.explore.footprint import Footprint, Recorder
from xipvm.explore.steps import Step, Trail, first_of
from xipvm.explore.strategies import Exhaustive, Feature

if TYPE_CHECKING:
    from xipvm.explore.scene import Scene


class CutError(Exception):
    """What would come now is the same as what has been: the run may end here."""


class _Node:
    """A question that was asked on the way to the run that is made now."""

    __slots__ = ("actors", "answer", "asleep", "begins", "fixed", "preempts", "size", "spent", "tried", "wanted")

    def __init__(self, question: Question, actors: list[int], spent: int, asleep: dict[int, Footprint]) -> None:
        self.size = question.n
        self.actors = actors
        """Candidates; none if it is not about who goes on."""
        self.preempts = question.preempts
        self.spent = spent
        """Preemptions before it."""
        self.asleep = asleep
        """Who sleeps, and what his next step touches."""
        self.answer = 0
        self.begins = 0
        """Which step of the run it begins."""
        self.tried: dict[int, Step | None] = {}
        """The answers that were given, and the step that each began, if it did."""
        self.wanted: set[int] = set()
        """Without a bound: the answers that races ask for."""
        self.fixed = False
        """Its answer is given."""


class Reduced(Exhaustive):
    """All traces of runs with at most ``preemptions`` preemptions, or without a bound; each run is watched.

    ``root``: only what begins with these answers.
    """

    def __init__(self, preemptions: int | None = 2, *, root: Sequence[int] = ()) -> None:
        super().__init__(preemptions, root=root)
        self.cut = 0
        """Runs that were cut short."""
        self._given = tuple(root)
        self._nodes: list[_Node] = []
        self._trail: Trail | None = None
        self._scene: Scene | None = None
        self._asleep: dict[int, Footprint] = {}
        self._live = True
        """The run has left what was run before."""
        self._raced: set[int] = set()
        """Identities of steps that were in a race with a later one."""
        self._reached: dict[tuple[int, int], int] = {}
        """By trace and who goes on: the fewest preemptions there."""
        self._made = 0
        self._over = False

    def watch(self, scene: Scene, recorder: Recorder) -> Trail:
        """Follows the run of ``scene``, which is about to begin."""
        self._scene = scene
        self._trail = Trail(recorder, scene.scheduler, scene.fingerprint, on_step=self._step, on_turn=self._turn)
        scene.trace.detach(scene.fingerprint)  # the trace of the steps says it better
        scene.trace.attach(self._trail)
        return self._trail

    # ---- a run

    def begin(self) -> bool:
        """As long as something is left."""
        self._at = 0
        self._asleep = {}
        self._live = not self._nodes
        return not self._over

    def pick(self, question: Question) -> int:
        """As before, as far as it is a run again; then the first answer that is not asleep. Raises CutError."""
        at, self._at = self._at, self._at + 1
        if self._scene is None or self._trail is None:
            raise AssertionError("a reduced search has to watch its runs")
        trail = self._trail
        if at < len(self._nodes):
            node = self._nodes[at]
            if at == len(self._nodes) - 1:
                self._asleep, self._live = dict(self._sleeping(node)), True
        else:
            node = self._new(question)
            self._nodes.append(node)
        node.begins = len(trail.steps_made)
        if not node.actors:
            trail.answered(question.label, node.answer)
        return node.answer

    def _new(self, question: Question) -> _Node:
        assert self._scene is not None
        assert self._trail is not None
        actors = [self._trail.number(actor) for actor in self._scene.scheduler.candidates] if question.actors else []
        spent = 0
        if self._nodes:
            last = self._nodes[-1]
            spent = last.spent + (last.preempts and last.answer != 0)
        node = _Node(question, actors, spent, dict(self._asleep))
        at = len(self._nodes)
        if at < len(self._given):
            node.answer, node.fixed = min(self._given[at], question.n - 1), True
            return node
        if not actors:
            return node
        if self._bound is not None:
            place = self._trail.trace, actors[0] if question.preempts else -1
            if self._reached.get(place, spent + 1) <= spent:
                raise CutError
            self._reached[place] = spent
        for answer, actor in enumerate(actors):
            if actor not in self._asleep:
                node.answer = answer
                node.wanted.add(answer)
                return node
        raise CutError

    def _sleeping(self, node: _Node) -> dict[int, Footprint]:
        """Who sleeps while the answer to ``node`` is followed."""
        asleep = dict(node.asleep)
        if node.actors and not node.fixed:
            for answer, step in node.tried.items():
                if (
                    step is not None
                    and answer != node.answer
                    and (self._bound is None or (node.preempts and not answer))
                ):
                    asleep[node.actors[answer]] = step.print
        return asleep

    def _turn(self, actor: int) -> None:
        """``actor`` goes on. Raises CutError when it sleeps."""
        if self._live and actor in self._asleep:
            raise CutError

    def _step(self, step: Step, races: list[Step]) -> None:
        if self._live and self._asleep:
            self._asleep = {actor: print_ for actor, print_ in self._asleep.items() if not print_.conflicts(step.print)}
        if self._bound is not None:
            self._raced.update(each.id for each in races)
        else:
            for each in races:
                self._reverse(each, step)

    # ---- without a bound: who has to be tried where

    def _reverse(self, first: Step, second: Step) -> None:
        """Has somebody tried, where ``first`` began, who can bring ``second`` about before it."""
        node = self._node(first.index)
        if node is None or node.fixed:
            return
        assert self._trail is not None
        between = [each for each in self._trail.steps_made[first.index + 1 : second.index] if not first.before(each)]
        able = [node.actors.index(actor) for actor in first_of([*between, second]) if actor in node.actors]
        if second.resumed >= 0 and second.actor in node.actors:
            able = [node.actors.index(second.actor)]
        if node.wanted.isdisjoint(able):
            node.wanted.update(able[:1] or range(node.size))

    def _node(self, step: int) -> _Node | None:
        """The question that was answered with step ``step``, None if nobody was asked."""
        low, high = 0, min(self._at, len(self._nodes))
        while low < high:
            middle = (low + high) // 2
            if self._nodes[middle].begins < step:
                low = middle + 1
            else:
                high = middle
        for node in self._nodes[low:]:
            if node.begins != step:
                return None
            if node.actors:
                return node
        return None

    # ---- which run is next

    def end(self, choices: Sequence[Choice], features: frozenset[Feature]) -> None:
        """Finds the last question that has another answer to be tried."""
        assert self._trail is not None
        steps = self._trail.steps_made
        self._made += 1
        del self._nodes[len(choices) :]
        for node in self._nodes:
            if node.actors:
                node.tried[node.answer] = steps[node.begins] if node.begins < len(steps) else None
            else:
                node.tried[node.answer] = None
        while self._nodes:
            node = self._nodes[-1]
            answer = None if node.fixed else self._next(node)
            if answer is not None:
                node.answer = answer
                return
            self._nodes.pop()
        self._over = self.complete = True

    def _next(self, node: _Node) -> int | None:
        if not node.actors:
            return node.answer + 1 if node.answer + 1 < node.size else None
        left = [
            answer for answer in range(node.size) if answer not in node.tried and node.actors[answer] not in node.asleep
        ]
        if self._bound is None:
            left = [answer for answer in left if answer in node.wanted]
        elif node.preempts:
            step = node.tried.get(0)
            if node.spent + 1 > self._bound or (step is not None and step.id not in self._raced):
                return None
        return left[0] if left else None
