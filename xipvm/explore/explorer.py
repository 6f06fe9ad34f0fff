"""Runs a scenario again and again, each time in another order, until one of them is wrong or the budget is used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xipvm.check import Violation
from xipvm.errors import BadInput, DeadlockError, LockError, XipvmError
from xipvm.explore.choices import Choice, DriftError, Pick, Question, Recording, Replay
from xipvm.explore.scene import BrokenError, Furnish, Scene, opened
from xipvm.explore.strategies import Feature, Strategy
from xipvm.trace.events import Event

LIMIT = 20_000
"""Questions in one run after which it is called a livelock."""


class LivelockError(XipvmError):
    """A run asked LIMIT questions and did not end."""


@dataclass(frozen=True)
class Failure:
    """What was wrong with a run. ``what`` is the invariant, or the kind of error."""

    what: str
    message: str
    violation: Violation | None = None
    error: BaseException | None = None

    def render(self) -> str:
        """Several lines for a person."""
        return self.violation.render() if self.violation is not None else f"{self.what}: {self.message}"


@dataclass
class Run:
    """One run: the questions it was asked, with the answers, and what was wrong, if anything."""

    choices: list[Choice]
    failure: Failure | None = None
    switches: int = 0
    fingerprint: str = ""
    """Equal for runs that differ only in the order of steps that nobody can tell apart."""
    features: frozenset[Feature] = frozenset()
    checks: dict[str, int] = field(default_factory=dict)

    @property
    def preemptions(self) -> int:
        """How often an actor that could have gone on had to wait."""
        return sum(choice.is_preemption for choice in self.choices)


@dataclass
class Search:
    """What a search found. ``complete``: there are no other runs within its bounds."""

    runs: int = 0
    fingerprints: frozenset[str] = frozenset()
    """Of the runs, see Run.fingerprint."""
    complete: bool = False
    failing: Run | None = None
    failing_at: int = 0
    """Which run it was, from 1, of its shard if there are several."""
    failing_shard: int = 0
    checks: dict[str, int] = field(default_factory=dict)
    """How often each invariant was asked."""

    @property
    def distinct(self) -> int:
        """Runs that differ in more than the order of steps that nobody can tell apart."""
        return len(self.fingerprints)


def run_once(
    scenario: Furnish,
    pick: Pick,
    *,
    sinks: Sequence[Callable[[Event], None]] = (),
    limit: int = LIMIT,
    **options: Any,
) -> Run:
    """One run of ``scenario``, with at most ``limit`` questions.

    Raises DriftError as ``pick`` does, and nothing for what is wrong with the run.
    """
    asked = 0

    def limited(question: Question) -> int:
        nonlocal asked
        asked += 1
        if asked > limit:
            raise LivelockError(f"it does not end: {limit} choices, the last at {question.label}")
        return pick(question)

    recording = Recording(limited)
    features: set[Feature] = set()
    last: dict[str, str] = {}
    previous = ""

    def see(event: Event) -> None:
        nonlocal previous
        actor, kind = event.actor, event.kind
        if actor != previous:
            for other, what in last.items():
                if other != actor:
                    features.add((other, what, actor, kind))
            previous = actor
        last[actor] = kind

    failure: Failure | None = None
    scene: Scene | None = None
    run_print = ""
    try:
        with opened(scenario, recording, **options) as scene:
            scene.trace.attach(see)
            for sink in sinks:
                scene.trace.attach(sink)
            try:
                scene.run()
            finally:
                run_print = scene.fingerprint.digest  # what closing does is no part of it
    except (DriftError, BadInput, KeyboardInterrupt):
        raise
    except BrokenError as error:
        failure = Failure(error.violation.invariant, error.violation.message, error.violation, error)
    except LivelockError as error:
        failure = Failure("livelock", str(error), error=error)
    except LockError as error:
        failure = Failure("lock", str(error), error=error)
    except DeadlockError as error:
        failure = Failure("deadlock", str(error), error=error)
    except Exception as error:
        failure = Failure(type(error).__name__, str(error), error=error)
    run = Run(recording.choices, failure, features=frozenset(features))
    if scene is not None:
        run.switches, run.checks, run.fingerprint = scene.scheduler.switches, scene.oracle.checks, run_print
    return run


def explore(
    scenario: Furnish,
    strategy: Strategy,
    *,
    runs: int,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Search:
    """At most ``runs`` runs of ``scenario`` as ``strategy`` orders them; stops at the first that is wrong."""
    search = Search()
    seen: set[str] = set()
    while search.runs < runs and strategy.begin():
        run = run_once(scenario, strategy.pick, **options)
        strategy.end(run.choices, run.features)
        search.runs += 1
        seen.add(run.fingerprint)
        for name, count in run.checks.items():
            search.checks[name] = search.checks.get(name, 0) + count
        if progress is not None:
            progress(search.runs)
        if run.failure is not None:
            search.failing, search.failing_at = run, search.runs
            break
    search.fingerprints = frozenset(seen)
    search.complete = strategy.complete
    return search


def replay(scenario: Furnish, choices: Sequence[Choice], *, strict: bool = True, **options: Any) -> Run:
    """The run that ``choices`` describe. Raises DriftError when the program asks something else, if ``strict``."""
    answers = Replay(choices, strict=strict)
    run = run_once(scenario, answers, **options)
    if run.failure is None:
        answers.finish()
    return run
