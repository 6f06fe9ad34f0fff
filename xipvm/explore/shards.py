"""A search in pieces that can be run anywhere: in this process, in several, or on a Dask cluster.

A shard is a search of its own with a seed of its own, or, of an exhaustive search, the runs below one first choice. It
finds the same wherever it runs, so the whole does, however many work at it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Final

from xipvm.errors import BadInput
from xipvm.explore.explorer import Run, Search, explore, run_once
from xipvm.explore.find import find
from xipvm.explore.reduction import Reduced
from xipvm.explore.strategies import Exhaustive, strategy
from xipvm.mutants import planted

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

SHARD_RUNS: Final = 500
"""How many runs of a search by chance make a shard."""

WAKE: Final = 0.2
"""How long a wait for workers may be before it is begun again, s."""

_given_up: Event | None = None
"""Of a worker process: nobody waits for what it does."""


@dataclass(frozen=True)
class Shard:
    """One piece: ``scenario`` by name (``find``), and for exhaustive searches the first choices ``root``."""

    scenario: str
    strategy: str
    seed: str
    runs: int
    preemptions: int | None = 2
    protocol: str = "modern"
    mutants: tuple[str, ...] = ()
    root: tuple[int, ...] = ()
    reduce: bool = True
    """Of runs that are the same but for the order of independent steps, an exhaustive search makes one."""


@dataclass
class ShardResult:
    """What came of it; fingerprints of the runs, to be counted over all shards."""

    runs: int
    complete: bool
    fingerprints: frozenset[str]
    checks: dict[str, int]
    failing: Run | None = None
    failing_at: int = 0
    shard: Shard | None = field(default=None, repr=False)
    cut: int = 0


def run_shard(shard: Shard, progress: Callable[[int], None] | None = None) -> ShardResult:
    """Search ``shard``, to its first wrong run."""
    scenario = find(shard.scenario)
    if shard.strategy == "exhaustive":
        search_by: Any = (Reduced if shard.reduce else Exhaustive)(shard.preemptions, root=shard.root)
    else:
        search_by = strategy(shard.strategy, shard.seed)
    with planted(*shard.mutants):
        search = explore(scenario, search_by, runs=shard.runs, protocol=shard.protocol, progress=progress or _go_on)
    failing = search.failing
    if failing is not None and failing.failure is not None:  # exceptions do not travel
        failing = replace(failing, failure=replace(failing.failure, error=None))
    return ShardResult(
        search.runs, search.complete, search.fingerprints, search.checks, failing, search.failing_at, shard, search.cut
    )


def shards_of(whole: Shard, *, pieces: int) -> list[Shard]:
    """``whole`` in pieces: by chance, of SHARD_RUNS runs; exhaustive, below about ``pieces`` first choices."""
    if whole.strategy == "exhaustive":
        return [replace(whole, root=root) for root in _roots(whole, pieces)]
    count = -(-whole.runs // SHARD_RUNS)
    return [
        replace(whole, seed=f"{whole.seed}.{number}", runs=min(SHARD_RUNS, whole.runs - number * SHARD_RUNS))
        for number in range(count)
    ]


def _roots(whole: Shard, pieces: int) -> list[tuple[int, ...]]:
    """First choices that, together, every run within the bounds begins with, each once."""
    roots: list[tuple[int, ...]] = [()]
    scenario = find(whole.scenario)
    with planted(*whole.mutants):
        depth = 0
        while len(roots) < pieces and depth < pieces:
            found: list[tuple[int, ...]] = []
            for root in roots:
                search_by = Exhaustive(whole.preemptions, root=root)
                search_by.begin()
                run = run_once(scenario, search_by.pick, protocol=whole.protocol)
                found.extend(search_by.below(root, run.choices))
            depth += 1
            if found == roots:
                break
            roots = found
    return roots


def explore_shards(
    shards: Sequence[Shard], executor: Executor | None, *, progress: Callable[[int], None] | None = None
) -> Search:
    """Run ``shards``, on ``executor`` if there is one. Of several wrong runs the one of the first shard counts."""
    search = Search()
    prints: set[str] = set()
    complete = True

    def inside(done: int) -> None:
        if progress is not None:
            progress(search.runs + done)

    for number, result in _results(shards, executor, inside):
        search.runs += result.runs
        search.cut += result.cut
        prints |= result.fingerprints
        complete = complete and result.complete
        for name, count in result.checks.items():
            search.checks[name] = search.checks.get(name, 0) + count
        if result.failing is not None and (search.failing is None or number < search.failing_shard):
            search.failing, search.failing_at, search.failing_shard = result.failing, result.failing_at, number
        if progress is not None:
            progress(search.runs)
    search.fingerprints = frozenset(prints)
    search.complete = complete and shards[0].strategy == "exhaustive"
    return search


def _results(
    shards: Sequence[Shard], executor: Executor | None, progress: Callable[[int], None]
) -> Iterator[tuple[int, ShardResult]]:
    """As they come; none that is behind the first wrong one need be waited for."""
    if executor is None:
        for number, shard in enumerate(shards):
            result = run_shard(shard, progress)
            yield number, result
            if result.failing is not None:
                return
        return
    waiting = {executor.submit(run_shard, shard): number for number, shard in enumerate(shards)}
    first = len(shards)
    try:
        while any(number < first for number in waiting.values()):
            # A signal that comes just before a wait does not end it, so no wait is for ever.
            done, _ = wait(waiting, WAKE, FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                result = future.result()
                if result.failing is not None:
                    first = min(first, number)
                if number <= first:
                    yield number, result
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def local_executor(jobs: int) -> Iterator[Executor]:
    """``jobs`` processes of this machine. Where the context ends by an exception, Ctrl-C say, they end after a run."""
    context = get_context("spawn")
    given_up = context.Event()
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(given_up,)) as pool:
        # Workers inherit what is blocked: Ctrl-C is not for those, either, that have not come to _begin yet.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(jobs):
                pool.submit(int)  # starts one
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            yield pool
        except BaseException:
            given_up.set()
            raise


def _begin(given_up: Event) -> None:
    """Ctrl-C reaches everybody at the terminal; who asked for the work decides what becomes of it."""
    global _given_up
    _given_up = given_up
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _go_on(runs: int) -> None:
    if _given_up is not None and _given_up.is_set():
        raise KeyboardInterrupt


@contextmanager
def dask_executor(address: str | None) -> Iterator[Executor]:
    """An executor of the Dask cluster at ``address``, by default the one that Dask's own settings name.

    Raises BadInput when Dask is not installed, or no scheduler answers.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise BadInput("--executor dask needs Dask: pip install 'xipvm[dask]'") from None
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise BadInput(f"no Dask scheduler at {address or 'the configured address'}: {error}") from None
    with client:
        yield client.get_executor(pure=False)
