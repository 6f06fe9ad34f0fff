"""The pytest plugin: fixtures ``machine``, ``mm``, ``trace``, ``scene``, ``explore``, and the mark ``interleavings``.

Active as soon as xipvm is installed, also for projects that do not use it: nothing of xipvm is imported before a test
asks for one of these. What they do is in pytest_support.py; docs/testing.md shows their use.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xipvm.explore import Scene
    from xipvm.mmu.mm import Mm
    from xipvm.pytest_support import Bench, Explorer, MachineFactory
    from xipvm.trace.expect import TraceLog

MARK = (
    "interleavings(n=1000, strategy='random', preemptions=2, seed=0, protocol='modern', invariants=None): "
    "run the test, which furnishes `scene`, in at most n interleavings"
)
_BENCH: pytest.StashKey[Bench] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and where counterexamples go."""
    group = parser.getgroup("xipvm", "interleavings (xipvm)")
    group.addoption("--xipvm-replay", metavar="FILE", help="only the one order that FILE, a counterexample, describes")
    group.addoption(
        "--xipvm-continue", action="store_true", help="with --xipvm-replay, when the program has changed: go on"
    )
    group.addoption("--xipvm-runs", type=int, metavar="N", help="interleavings a test, whatever its mark says")
    group.addoption("--xipvm-seed", type=int, metavar="N", help="of all chance, whatever marks say")
    parser.addini("xipvm_counterexamples", "where counterexamples go, seen from rootdir", default=".xipvm")


def pytest_configure(config: pytest.Config) -> None:
    """Declares the mark."""
    config.addinivalue_line("markers", MARK)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Runs a marked test once an interleaving; checks, behind each test, what its fixtures have to check."""
    marker = pyfuncitem.get_closest_marker("interleavings")
    bench = pyfuncitem.stash.get(_BENCH, None)
    if marker is None and bench is None:
        return (yield)
    from xipvm.pytest_support import interleaved, judged

    function = pyfuncitem.obj
    if marker is not None:
        pyfuncitem.obj = interleaved(pyfuncitem, marker, bench)
    try:
        with judged(bench):
            return (yield)
    finally:
        pyfuncitem.obj = function


def _bench(request: pytest.FixtureRequest) -> Bench:
    """What the fixtures of one test share."""
    stash: pytest.Stash = request.node.stash
    if _BENCH not in stash:
        from xipvm.pytest_support import Bench

        stash[_BENCH] = bench = Bench(request.node, listens="trace" in request.fixturenames)
        request.addfinalizer(bench.close)
    return stash[_BENCH]


@pytest.fixture
def trace(request: pytest.FixtureRequest) -> TraceLog:
    """What happens in the ``mm``, the machines or the scene of the test, and assertions over it."""
    return _bench(request).log


@pytest.fixture
def mm(request: pytest.FixtureRequest) -> Mm:
    """An address space on a host of its own. The oracle judges it; behind the test everything is scanned."""
    return _bench(request).scene().mm()


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Scene | None:
    """To be furnished; behind the test its actors run. With the mark ``interleavings``, in many orders."""
    bench = _bench(request)
    return None if request.node.get_closest_marker("interleavings") is not None else bench.scene()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> MachineFactory:
    """Makes machines: ``machine(guest, ...)`` as :class:`xipvm.Machine`. The oracle judges them; closed at the end."""
    return _bench(request).machine


@pytest.fixture
def explore(request: pytest.FixtureRequest) -> Explorer:
    """Searches a scenario: ``explore(scenario, runs=1000, strategy="random")`` fails the test if one run is wrong."""
    from xipvm.pytest_support import Explorer

    return Explorer(request.node)
