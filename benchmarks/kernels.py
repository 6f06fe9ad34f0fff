"""Guest code that computes: four kernels on both clocks, and what recording a trace adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness import Bench, Figure, MissingPeerError, Spread, Target, compare
from benchmarks.machines import guest, timed_once, timed_recorded
from benchmarks.peers import Qemu, raw_once

KERNELS = ("store", "sort", "crc", "matrix")


def kernels(bench: Bench) -> Iterator[Figure]:
    """Four kernels: clock host and clock instructions against raw Unicorn, each other and QEMU."""
    speedups: list[list[float]] = []
    for name in KERNELS:
        elf = guest(name)
        runs: dict[str, Callable[[], float]] = {
            "raw": partial(raw_once, elf),
            "host": partial(timed_once, elf, "host"),
            "instructions": partial(timed_once, elf, "instructions"),
        }
        try:
            runs["qemu"] = Qemu(elf, bench.folder).cpu
        except MissingPeerError as missing:
            bench.say(str(missing))
        times = bench.rounds(**runs)
        raw, host, counted = times["raw"], times["host"], times["instructions"]
        speedups.append([a / b for a, b in zip(raw, counted, strict=True)])
        limit = 1 / 7 if name == "store" else 1.03
        yield compare(f"{name}: clock host / raw", host, "raw Unicorn", raw, target=Target(limit))
        yield compare(f"{name}: clock instructions / host", counted, "clock host", host, target=Target(1.45))
        yield compare(f"{name}: clock instructions / raw", counted, "raw Unicorn", raw)
        if "qemu" in times:
            yield compare(f"{name}: clock host / QEMU", host, "QEMU, whole process", times["qemu"])
            yield compare(f"{name}: clock instructions / QEMU", counted, "QEMU, whole process", times["qemu"])
    means = [math.prod(each) ** (1 / len(each)) for each in zip(*speedups, strict=True)]
    yield Figure(
        "geometric mean: raw / clock instructions",
        "s",
        None,
        "raw Unicorn",
        None,
        Spread.of(means),
        Target(1.5, at_least=True),
    )


def trace(bench: Bench) -> Iterator[Figure]:
    """The kernels with everything recorded into a file, against the same without."""
    for name in KERNELS:
        elf = guest(name)
        file = bench.folder / f"{name}.trace"
        times = bench.rounds(
            without=partial(timed_once, elf, "instructions"),
            recorded=partial(timed_recorded, elf, "instructions", file),
        )
        yield compare(
            f"{name}: recorded / not", times["recorded"], "without --trace", times["without"], target=Target(1.05)
        )
