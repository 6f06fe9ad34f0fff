"""What stands behind the pytest plugin's fixtures and its mark.

A search fails the test with one text: what is wrong, the shrunk order, where the counterexample was saved, how to see
it again. A counterexample that is there already is tried first: what has failed once fails at once, until it is mended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from xipvm.check import INVARIANTS, Oracle, Violation, reader_of
from xipvm.errors import BadInput
from xipvm.explore.choices import DriftError, Replay
from xipvm.explore.explorer import Run, Search, explore, run_once
from xipvm.explore.explorer import replay as run_again
from xipvm.explore.files import Counterexample
from xipvm.explore.find import find
from xipvm.explore.scene import BrokenError, Furnish, Scenario, Scene
from xipvm.explore.shrink import shrink
from xipvm.explore.story import extent, needed, tell
from xipvm.explore.strategies import strategy
from xipvm.machine import Machine
from xipvm.testing import plain_scene
from xipvm.trace.expect import TraceLog
from xipvm.trace.funnel import Trace

SHRINK: Final = 500
"""Runs that may be spent on making a counterexample smaller."""
_EVENTS: Final = "xipvm events"


class MachineFactory(Protocol):
    """What the fixture ``machine`` is."""

    def __call__(self, guest: str | os.PathLike[str] | None = None, *, check: bool = True, **options: Any) -> Machine:
        """A machine; ``check``: the oracle judges it. ``options`` are those of :class:`xipvm.Machine`."""


class Bench:
    """What the fixtures of one test share; closed behind it."""

    def __init__(self, item: pytest.Function, *, listens: bool) -> None:
        self.log = TraceLog()
        self.listens = listens
        self._item = item
        self._scene: Scene | None = None
        self._machines: list[tuple[Machine, Oracle | None]] = []

    def scene(self) -> Scene:
        """The one scene of a test that is not interleaved."""
        if self._scene is None:
            self._scene = plain_scene()
            self.listen(self._scene.trace)
        return self._scene

    def listen(self, trace: Trace) -> None:
        """Let the test's log hear of ``trace``, if the test asked for one."""
        if self.listens:
            trace.attach(self.log)

    def machine(self, guest: str | os.PathLike[str] | None = None, *, check: bool = True, **options: Any) -> Machine:
        """See :class:`MachineFactory`."""
        trace = options.setdefault("trace", Trace())
        self.listen(trace)
        oracle: Oracle | None = None
        made: list[Machine] = []

        def broken(violation: Violation) -> None:
            for machine in made:
                machine.request_exit("check", 1)

        if check:
            oracle = Oracle(stop=broken)
            trace.attach(oracle)
        made.append(Machine(guest, **options))
        if oracle is not None:
            oracle.reader = reader_of(made[0].host)
        self._machines.append((made[0], oracle))
        return made[0]

    def judge(self) -> None:
        """The test is over, and went well: now what its fixtures check. Raises what is wrong."""
        for _, oracle in self._machines:
            if oracle is not None:
                oracle.finish()
                if oracle.violations:
                    raise BrokenError(oracle.violations[0])
        if self._scene is not None:
            self._scene.run()

    def close(self) -> None:
        """Gives everything back."""
        for machine, oracle in self._machines:
            if oracle is not None:
                machine.trace.detach(oracle)
            machine.close()
        self._machines = []
        if self._scene is not None:
            scene, self._scene = self._scene, None
            scene.close()


@contextmanager
def judged(bench: Bench | None) -> Iterator[None]:
    """Around a test's call. A broken invariant tells the page's history as a note."""
    __tracebackhide__ = True
    try:
        yield
        if bench is not None:
            bench.judge()
    except BrokenError as error:
        error.add_note(error.violation.render())
        raise


@dataclass(frozen=True)
class Plan:
    """How to search: the arguments of the mark, and of the fixture ``explore``."""

    n: int = 1000
    strategy: str = "random"
    preemptions: int | None = 2
    seed: int = 0
    protocol: str = "modern"
    invariants: Sequence[str] | None = None

    def of(self, config: pytest.Config) -> Plan:
        """As the command line changes it."""
        runs, seed = config.getoption("xipvm_runs"), config.getoption("xipvm_seed")
        return replace(self, n=self.n if runs is None else runs, seed=self.seed if seed is None else seed)

    @property
    def options(self) -> dict[str, Any]:
        """Of the scenes."""
        chosen = {} if self.invariants is None else {"invariants": tuple(self.invariants)}
        return {"protocol": self.protocol, **chosen}

    def __str__(self) -> str:
        if self.strategy == "exhaustive":
            return f"exhaustive, {'any number of' if self.preemptions is None else self.preemptions} preemptions"
        return f"{self.strategy}, seed {self.seed}"


class _BodyError(BaseException):
    """The test's own body failed before anything was left to chance: no matter of order. Not to be caught inside."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def interleaved(item: pytest.Function, marker: pytest.Mark, bench: Bench | None) -> Callable[..., None]:
    """What takes the place of a marked test function: the search that calls it for every run."""
    function = item.obj
    if getattr(function, "is_hypothesis_test", False):
        pytest.fail(
            "@given and the mark interleavings exclude each other; `scene.choose` lets the search choose", False
        )
    if "scene" not in item.fixturenames:
        pytest.fail("a test with the mark interleavings takes the fixture `scene`, and furnishes it", False)
    try:
        plan = Plan(*marker.args, **marker.kwargs)
    except TypeError:
        known = ", ".join(field.name for field in fields(Plan))
        pytest.fail(f"the mark interleavings takes {known}; not {marker.args} {marker.kwargs}", False)

    def search(**arguments: Any) -> None:
        __tracebackhide__ = True

        def furnish(scene: Scene) -> None:
            if bench is not None and bench.listens:
                bench.log.clear()
                scene.trace.attach(bench.log)
            try:
                function(**{**arguments, "scene": scene})
            except BrokenError:
                raise
            except Exception as error:
                if scene.asked:
                    raise
                raise _BodyError(error) from None

        try:
            hunt(item, furnish, item.nodeid, plan)
        except _BodyError as failed:
            raise failed.error from None

    return search


class Explorer:
    """What the fixture ``explore`` is: call it."""

    def __init__(self, item: pytest.Function) -> None:
        self._item = item

    def __call__(
        self,
        scenario: Furnish | str,
        *,
        runs: int = 1000,
        strategy: str = "random",
        preemptions: int | None = 2,
        seed: int = 0,
        protocol: str | None = None,
        invariants: Sequence[str] | None = None,
    ) -> Search:
        """Search ``scenario`` (a function that furnishes a scene, a Scenario, or the name of one) for a wrong run.

        Fails the test when there is one; returns what was searched.
        """
        __tracebackhide__ = True
        named = isinstance(scenario, str)
        furnish: Furnish = find(scenario) if isinstance(scenario, str) else scenario
        if protocol is None:
            protocol = furnish.protocols[0] if isinstance(furnish, Scenario) else "modern"
        label = furnish.name if isinstance(furnish, Scenario) else getattr(furnish, "__name__", "scenario")
        name = str(scenario) if named else f"{self._item.nodeid} {label}"
        return hunt(self._item, furnish, name, Plan(runs, strategy, preemptions, seed, protocol, invariants))


def hunt(item: pytest.Function, scenario: Furnish, name: str, plan: Plan) -> Search:
    """Search ``scenario``, called ``name`` in counterexamples; fail the test with all that is known of a wrong run."""
    __tracebackhide__ = True
    scenario = _caught(scenario)
    plan = plan.of(item.config)
    for invariant in plan.invariants or ():
        if invariant not in INVARIANTS:
            raise BadInput(f"no invariant is called {invariant!r}; known are {', '.join(INVARIANTS)}")
    given = item.config.getoption("xipvm_replay")
    if given is not None:
        return _replayed(item, scenario, name, plan, Path(given))
    path = _path(item, name)
    if path.exists():
        run = run_once(scenario, Replay(Counterexample.load(path).choices), **plan.options)
        if run.failure is not None:
            _fail(item, scenario, run, plan, path, f"found at once: it is the order of {_here(item, path)}")
    search = explore(
        scenario,
        strategy(plan.strategy, plan.seed, preemptions=plan.preemptions, reduce=True),
        runs=plan.n,
        **plan.options,
    )
    asked = sum(search.checks.values())
    complete = "all of " if search.complete else ""
    item.user_properties.append(("xipvm", f"{complete}{search.runs} runs, {search.distinct} distinct, {asked} checks"))
    if search.failing is not None:
        small = shrink(scenario, search.failing, budget=SHRINK, **plan.options)
        assert small.failure is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        what = f"{small.failure.what}: {small.failure.message}"
        Counterexample(name, what, needed(small.choices), protocol=plan.protocol).save(path)
        _fail(item, scenario, small, plan, path, f"found by run {search.failing_at} of {plan.n} ({plan})")
    return search


def _caught(scenario: Furnish) -> Furnish:
    """``scenario``, where pytest.fail, and pytest.raises around what does not raise, make a run wrong.

    pytest's own exceptions are none to be caught: they would end the search, not the run.
    """

    def furnish(scene: Scene) -> None:
        scenario(scene)
        run = scene.run

        def caught() -> None:
            try:
                run()
            except pytest.fail.Exception as error:
                raise AssertionError(error.msg).with_traceback(error.__traceback__) from None

        scene.run = caught  # type: ignore[method-assign]

    return replace(scenario, furnish=furnish) if isinstance(scenario, Scenario) else furnish


def _replayed(item: pytest.Function, scenario: Furnish, name: str, plan: Plan, path: Path) -> Search:
    __tracebackhide__ = True
    example = Counterexample.load(path)
    if _tail(example.scenario) != _tail(name):
        if _tail(_test_of(example.scenario)) == _tail(item.nodeid):  # another search of the same test
            return Search()
        pytest.skip(f"{path} is a counterexample of {example.scenario}")
    plan = replace(plan, protocol=example.protocol)
    strict = not item.config.getoption("xipvm_continue")
    try:
        run = run_again(scenario, example.choices, strict=strict, **plan.options)
    except DriftError as error:
        pytest.fail(f"{error}\n--xipvm-continue goes on from there in the plain order", False)
    if run.failure is not None:
        _fail(item, scenario, run, plan, path, f"as {_here(item, path)} has it")
    return Search(runs=1)


def _fail(item: pytest.Function, scenario: Furnish, run: Run, plan: Plan, path: Path, how: str) -> None:
    """Fail the test: what, in which order, how it was found, how to see it again."""
    __tracebackhide__ = True
    story = tell(scenario, run, **plan.options)
    if item.config.getoption("xipvm_replay") is not None:
        item.add_report_section("call", _EVENTS, story.timeline())
    file = _here(item, path)
    lines = [story.render(), f"{how}; {extent(run)}", f"again: xipvm replay {file}"]
    if "::" in Counterexample.load(path).scenario:
        test = _here(item, item.config.rootpath / item.nodeid.partition("::")[0])
        lines.append(f"   or: pytest '{test}::{item.nodeid.partition('::')[2]}' --xipvm-replay {file}")
    pytest.fail("\n".join(lines), pytrace=False)


def _path(item: pytest.Function, name: str) -> Path:
    """Where the counterexample of ``name`` is kept."""
    folder = item.config.rootpath / item.config.getini("xipvm_counterexamples")
    return Path(folder) / (re.sub(r"[^\w.\[\]-]+", "-", _tail(name))[:150] + ".json")


def _tail(name: str) -> str:
    """``name`` without the folders of a test: where pytest's root is may differ."""
    path, separator, test = name.partition("::")
    return f"{Path(path).name}::{test}" if separator else name


def _test_of(name: str) -> str:
    """The test in which a search called ``name`` was: without the scenario's own name, which the fixture appends."""
    test, _, scenario = name.rpartition(" ")
    return test if "::" in test and re.fullmatch(r"[\w-]+", scenario) else name


def _here(item: pytest.Function, path: Path) -> str:
    """``path`` as seen from where pytest was started, if it is below."""
    start = item.config.invocation_params.dir
    return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)


def replay_test(scenario: str, path: str, *, go_on: bool) -> int:
    """Have pytest replay the counterexample ``path`` of a test. Raises BadInput when the test is not to be found.

    The exit status is that of ``xipvm replay``: 0 when it is right now, 1 when it is still wrong, 2 for neither.
    """
    test = _test_of(scenario)
    file = test.partition("::")[0]
    for folder in (Path.cwd(), *Path(path).resolve().parents):
        if (folder / file).is_file():
            break
    else:
        raise BadInput(f"{path} is a counterexample of the test {test}, and there is no {file}")
    options = ["-p", "xipvm.pytest_plugin", "--no-header", "-q"]
    go = ["--xipvm-continue"] if go_on else []
    status = pytest.main([f"{folder / test}", "--xipvm-replay", str(Path(path).resolve()), *go, *options])
    return int(status) if status in (0, 1) else 2
