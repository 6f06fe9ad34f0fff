"""Random sequences of operations on the mm and on the naive model beside it (world.py).

    python -m tests.mm.sequences --count 100000 [--seed 0] [--length 24] [--huge]

runs that many, and stops at the first that fails: with its seed, and what is left of it when everything that does not
matter is taken away.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.mm.huge_world import HugeWorld
from tests.mm.world import HEAP_PAGES, MOST_PROCESSES, PAGES, Operation, World

_WEIGHTS = {
    "store": 10, "load": 6, "guest_store": 8, "guest_load": 5, "store_across": 2, "mmap": 6, "mmap_anywhere": 1,
    "munmap": 3, "brk": 4, "mprotect": 5, "mremap": 5, "resize": 3, "map_again": 1, "dontneed": 3, "free": 3,
    "cold": 1, "pageout": 5, "willneed": 1, "mergeable": 5, "merge": 4, "dontfork": 1, "guard": 3, "populate": 3,
    "remove": 2, "mlock": 3, "msync": 2, "bad_arguments": 1, "slot": 2, "reopen_vm": 1, "pin": 3, "fork": 4,
    "exit": 2, "reclaim": 4, "huge": 1, "collapse": 1, "monitor": 3, "write_protect": 4, "uffd_move": 3, "swap": 2,
    "migrate": 3, "compact": 2, "move_pages": 1, "clear_refs": 3, "pwrite": 3, "pread": 1, "truncate": 3,
    "punch": 2, "fsync": 2, "direct_write": 1,
}  # fmt: skip
VERBS = [verb for verb, weight in _WEIGHTS.items() for _ in range(weight)]
ACCESSES = ("store", "load", "guest_store", "guest_load", "mmap", "fork")
_STORES = ("store", "load", "guest_store", "guest_load")
THEMES = (
    (*_STORES, "fsync", "msync", "pwrite", "direct_write", "mprotect", "clear_refs", "migrate", "mmap"),
    (*_STORES, "truncate", "punch", "remove", "pwrite", "fsync", "fork", "dontneed", "mremap", "mmap"),
    (*_STORES, "pageout", "reclaim", "swap", "free", "fork", "exit", "migrate", "dontneed", "pin"),
    (*_STORES, "mergeable", "merge", "fork", "exit", "pageout", "migrate", "mremap", "clear_refs", "pin"),
    (*_STORES, "mremap", "resize", "map_again", "munmap", "mprotect", "fork", "guard", "mlock", "pageout"),
    (*_STORES, "monitor", "write_protect", "uffd_move", "fork", "pageout", "mprotect", "merge", "mergeable", "migrate"),
)
"""What is likely to get in each other's way."""
CHOICES = 40320


def sequence_of(seed: int, length: int, huge: bool = False) -> list[Operation]:
    """The sequence of a seed: it maps something, then anything. ``huge``: where huge pages are wanted."""
    source = random.Random(seed)
    number = source.randrange
    first: list[Operation] = [
        ("mmap", 0, 0, PAGES, source.choice((0, 0, 0, 3, 7, 9, 9))),
        ("mmap", 0, number(6), 6, number(CHOICES)),
    ]
    if huge:
        first = [("mmap", 0, 0, 6, 0), ("huge", 0, 0, 6, 1), ("mmap", 0, number(PAGES), 3, number(CHOICES))]
    # A few kinds of operations on a few pages come upon each other more often than all of them everywhere.
    share, theme = source.choice((0.2, 0.5, 1)), source.choice((*THEMES, (), (), ()))
    verbs = [verb for verb in _WEIGHTS if verb in (theme or ACCESSES) or (not theme and source.random() < share)]
    weights, places = [_WEIGHTS[verb] for verb in verbs], source.choice((1, 2, 4, PAGES + HEAP_PAGES + 4))
    return first + [
        (verb, number(MOST_PROCESSES), number(places), 1 + number(6), number(CHOICES))
        for verb in source.choices(verbs, weights, k=length)
    ]


def run_sequence(
    sequence: list[Operation], folder: str, *, swap: int = 0, traced: bool = False, huge: bool = False
) -> None:
    """Raises what an operation raises that should not, and AssertionError."""
    world = (HugeWorld if huge else World)(folder, swap=swap, traced=traced)
    for op in sequence:
        world.run(op)
    world.finish()


def environment(seed: int, huge: bool = False) -> dict[str, Any]:
    """What else differs between sequences."""
    return {"swap": (0, 4, 24)[seed % 3] * (64 if huge else 1), "traced": seed % 16 == 0, "huge": huge}


def shrink(sequence: list[Operation], fails: Callable[[list[Operation]], bool]) -> list[Operation]:
    """What is left of a failing sequence when no operation can be left out."""
    size = len(sequence) // 2
    while size:
        at = 0
        while at < len(sequence):
            shorter = sequence[:at] + sequence[at + size :]
            if fails(shorter):
                sequence = shorter
            else:
                at += size
        size //= 2
    return sequence


def _fails(sequence: list[Operation], folder: str, kind: type, how: dict[str, Any]) -> bool:
    try:
        run_sequence(sequence, folder, **how)
    except Exception as error:
        return type(error) is kind
    return False


def run_many(
    count: int, seed: int, length: int, folder: str, report: Callable[[int], None] | None = None, *, huge: bool = False
) -> int:
    """Runs the sequences of ``count`` seeds; how many operations that were. The first failure is shrunk and raised."""
    for number in range(seed, seed + count):
        sequence, how = sequence_of(number, length, huge), environment(number, huge)
        try:
            run_sequence(sequence, folder, **how)
        except Exception as error:
            short = shrink(sequence, partial(_fails, folder=folder, kind=type(error), how=how))
            raise AssertionError(f"seed {number}: {error!r}\nrun_sequence({short!r}, folder, **{how!r})") from error
        if report is not None and (number - seed) % 1000 == 999:
            report(number - seed + 1)
    return count * (length + 2 + huge)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--huge", action="store_true", help="Many more pages, and huge ones among them.")
    options = parser.parse_args()
    start = time.monotonic()

    def report(done: int) -> None:
        print(f"{done} sequences, {time.monotonic() - start:.0f} s", flush=True)

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # the files are small, and made anew each time
    with tempfile.TemporaryDirectory(prefix="xipvm-sequences-", dir=memory) as folder:
        try:
            operations = run_many(options.count, options.seed, options.length, folder, report, huge=options.huge)
        except AssertionError as error:
            traceback.print_exception(error)
            return 1
    print(f"{options.count} sequences, {operations} operations: no difference, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
