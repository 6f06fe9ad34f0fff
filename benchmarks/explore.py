"""The oracle and the explorer: what judging costs a run, how many interleavings a minute are searched."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count

from benchmarks.harness import Bench, Figure, Target, compare, value
from benchmarks.machines import guest, timed
from xipvm.boards import virt_arm64
from xipvm.check import Oracle
from xipvm.cpu import core
from xipvm.devices.flash import mapping
from xipvm.explore import explore, strategy
from xipvm.explore.find import KNOWN
from xipvm.explore.shards import Shard, explore_shards, local_executor, run_shard, shards_of
from xipvm.machine import Machine
from xipvm.trace.funnel import Trace

_MS = 1e3
_MINUTE = 60.0
FAULTS = (
    "fault-against-munmap",
    "fault-against-dontneed",
    "fault-against-mprotect",
    "fault-against-cow",
    "fault-against-swapout",
    "fault-against-migrate",
    "fault-against-ksm",
    "fault-against-truncate",
    "fault-against-flash-mode",
    "fault-against-memslot-move",
)
"""A fault of two vCPUs against everything that takes their page away."""
_EVERY = 200_000
"""Schedules of a scenario after which they are not counted any more."""
_SLICE = 100
"""Runs of a scenario, a protocol and a strategy in a round of the campaign."""


def check(bench: Bench) -> Iterator[Figure]:
    """Runs that the oracle judges while they go on, ms: a guest that faults all the time, and one that does not."""

    def run(name: str, judged: bool) -> float:
        trace, oracle = Trace(), Oracle()
        if judged:
            trace.attach(oracle)
        with Machine(guest=guest(name), trace=trace) as machine:
            seconds = timed(machine)
            if judged:
                trace.detach(oracle)
        if oracle.violations:
            raise RuntimeError(oracle.violations[0].render())
        return seconds * _MS

    for name, what, limit in (("coldfault", "faults all the time", 2.0), ("sort", "calm", 1.05)):
        times = bench.rounds(plain=partial(run, name, False), judged=partial(run, name, True))
        yield compare(what, times["judged"], "not judged", times["plain"], unit="ms", target=Target(limit))


def reset(bench: Bench) -> Iterator[Figure]:
    """A machine for the next schedule, ms: of the memory and the engine that the last one had, or of nothing."""
    sizes = count(4 << 20, 4096)

    def made(size: int) -> float:
        start = time.process_time()
        Machine(board="virt-arm64", memory=size).close()
        return (time.process_time() - start) * _MS

    def anew() -> float:
        core.drain_pool()
        mapping.drop_kept()
        virt_arm64.device_tree.cache_clear()
        return made(next(sizes))  # no arena of that size was there before

    kept = bench.rounds(kept=lambda: min(made(4 << 20) for _ in range(20)), anew=lambda: min(anew() for _ in range(20)))
    yield compare("a machine, made and closed", kept["kept"], "of nothing", kept["anew"], unit="ms")


def interleavings(bench: Bench) -> Iterator[Figure]:
    """Interleavings a minute on one core: scripted accesses, and a real guest; and how two processes scale."""

    def rate(name: str, runs: int) -> float:
        start = time.process_time()
        search = explore(KNOWN[name], strategy("random", 1), runs=runs)
        if search.failing is not None:
            raise RuntimeError(f"{name} is wrong: {search.failing.failure}")
        return search.runs / (time.process_time() - start) * _MINUTE

    def wall(jobs: int) -> float:
        whole = Shard("fault-against-munmap", "random", "1", 6000)
        with local_executor(jobs) as pool:
            explore_shards(shards_of(whole, pieces=8)[:jobs], pool)  # everybody is there
            start = time.perf_counter()
            explore_shards(shards_of(whole, pieces=8), pool)
            return time.perf_counter() - start

    for name, runs, least in (("fault-against-munmap", 2000, 20_000), ("guest-against-fork", 200, 2_000)):
        rates = bench.rounds(rate=partial(rate, name, runs))["rate"]
        yield value(name, rates, unit="a minute", target=Target(least, at_least=True, of_value=True))
    times = bench.rounds(one=partial(wall, 1), two=partial(wall, 2))
    yield compare(
        "two processes against one", times["one"], "two", times["two"], unit="s", target=Target(1.8, at_least=True)
    )


def exhaustive(bench: Bench) -> Iterator[Figure]:
    """All schedules of a fault against each operation, at most three preemptions (--repeat); with reduction, too."""
    bound = min(bench.repeat, 3)
    for name in FAULTS:
        every = run_shard(Shard(name, "exhaustive", "", _EVERY, bound, reduce=False))
        reduced = run_shard(Shard(name, "exhaustive", "", sys.maxsize, bound))
        for result in (every, reduced):
            if result.failing is not None:
                raise RuntimeError(f"{name} is wrong: {result.failing.failure}")
        left = f"{reduced.runs} and {reduced.cut} cut short"
        what = f"{name}: {'' if every.complete else 'more than '}{every.runs} schedules, with reduction {left}"
        yield compare(what, [reduced.runs + reduced.cut], "all", [every.runs], unit="schedules")


def campaign(bench: Bench) -> Iterator[Figure]:
    """The right system: every scenario, protocol and strategy, on all cores; a round (--repeat) is some 10 000 runs."""
    prints: dict[tuple[str, str], set[str]] = {}
    runs = wrong = 0
    checks: Counter[str] = Counter()
    with local_executor(os.cpu_count() or 1) as pool:
        for number in range(bench.repeat):
            shards = [
                Shard(name, by, f"campaign/{number}", _SLICE, protocol=protocol)
                for name, scenario in KNOWN.items()
                for protocol in scenario.protocols
                for by in ("random", "pct", "coverage")
            ]
            for shard, result in zip(shards, pool.map(run_shard, shards), strict=True):
                runs += result.runs
                checks.update(result.checks)
                prints.setdefault((shard.scenario, shard.protocol), set()).update(result.fingerprints)
                if result.failing is not None:
                    wrong += 1
                    print(f"{shard}: {result.failing.failure}", file=sys.stderr)
            distinct = sum(map(len, prints.values()))
            bench.say(f"round {number + 1}/{bench.repeat}: {runs} runs, {distinct} distinct, {wrong} wrong")
    yield value("runs", [runs], unit="runs")
    yield value("distinct, up to commuting steps", [sum(map(len, prints.values()))], unit="runs")
    for invariant, times in sorted(checks.items(), key=lambda pair: int(pair[0][1:])):
        yield value(f"{invariant} asked", [times], unit="times")
    yield value("reports", [wrong], unit="", target=Target(0, of_value=True))
