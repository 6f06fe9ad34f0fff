"""All schedules of a few actors, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Choose = Callable[[int, str], int]


def depth_first(limit: int | None = None) -> Iterator[Choose]:
    """A ``choose`` for each schedule there is, until all have been; with ``limit`` only those that leave the first
    candidate so often at most.
    """
    path: list[tuple[int, int]] = []
    while True:
        taken = [0, 0]  # choices made, candidates left

        def choose(n: int, label: str, taken: list[int] = taken) -> int:
            at = taken[0]
            taken[0] += 1
            if limit is not None and taken[1] >= limit:
                n = 1
            if at == len(path):
                path.append((0, n))
            chosen, choices = path[at]
            assert choices == n, f"{label}: {n} candidates, and the time before {choices}"
            taken[1] += chosen > 0
            return chosen

        yield choose
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1] = path[-1][0] + 1, path[-1][1]
