"""Runs a scenario again and again, each time in another order, until one of them is wrong or the budget is used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xipvm.check import Violation
from xipvm.errors import BadInput, DeadlockError, LockError, XipvmError
from xipvm.explore.choices import Choice, DriftError, Pick, Question, Recording, Replay
from xipvm.explore.footprint import Recorder, recording
from xipvm.explore.reduction import CutError, Reduced
from xipvm.explore.scene import BrokenError, Furnish, Scene, opened
from xipvm.explore.steps import Trail
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
    trace: str = ""
    """If it was watched: equal for runs that differ only in the order of steps that do not depend on each other."""
    cut: bool = False
    """It was ended where nothing new could come."""

    @property
    def preemptions(self) -> int:
        """How often an actor that could have gone on had to wait."""
        return sum(choice.is_preemption for choice in self.choices)


@dataclass
class Search:
    """What a search found. ``complete``: there are no other runs within its bounds."""

    runs: int = 0
    cut: int = 0
    """Runs besides, that a reduced search has ended where nothing new could come."""
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
    watch: Callable[[Scene, Recorder], Trail] | None = None,
    **options: Any,
) -> Run:
    """One run of ``scenario``, with at most ``limit`` questions. ``watch`` follows its steps, and may cut it short.

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
    recorder = Recorder() if watch is not None else None
    scene: Scene | None = None
    trail: Trail | None = None
    cut = False
    run_print = ""
    try:
        with opened(scenario, recording, **options) as scene:
            scene.trace.attach(see)
            for sink in sinks:
                scene.trace.attach(sink)
            if watch is not None and recorder is not None:
                trail = watch(scene, recorder)
            try:
                scene.run()
            finally:
                run_print = scene.fingerprint.digest  # what closing does is no part of it
    except CutError:
        cut = True
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
    run = Run(recording.choices, failure, features=frozenset(features), cut=cut)
    if scene is not None:
        run.switches, run.checks, run.fingerprint = scene.scheduler.switches, scene.oracle.checks, run_print
    if trail is not None:
        run.trace = f"{trail.trace:032x}"
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
    if isinstance(strategy, Reduced):
        with recording():
            return _explore(scenario, strategy, runs, progress, watch=strategy.watch, **options)
    return _explore(scenario, strategy, runs, progress, **options)


def _explore(
    scenario: Furnish, strategy: Strategy, runs: int, progress: Callable[[int], None] | None, **options: Any
) -> Search:
    search = Search()
    seen: set[str] = set()
    while search.runs < runs and strategy.begin():
        run = run_once(scenario, strategy.pick, **options)
        strategy.end(run.choices, run.features)
        if run.cut:
            search.cut += 1
            continue
        search.runs += 1
        seen.add(run.trace or run.fingerprint)
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
