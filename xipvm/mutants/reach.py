"""What code the right system gets to: of the functions that mutants change, which are called, and how often.

That a search of the right system has no report says something only if it was where the mutants are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from xipvm.mutants.mutant import Mutant, Site, replaced, watching


def sites(mutants: Iterable[Mutant]) -> list[Site]:
    """The functions that ``mutants`` replace, each once: its owner and its name there."""
    found: dict[Site, None] = {}
    for mutant in mutants:
        with watching() as seen, mutant.apply():
            pass
        found.update(dict.fromkeys(seen))
    return list(found)


@contextmanager
def counting(where: Iterable[Site]) -> Iterator[Counter[Site]]:
    """Counts calls of the functions ``where`` meanwhile."""
    calls: Counter[Site] = Counter()
    with ExitStack() as stack:
        for site in where:
            stack.enter_context(replaced(*site, _counted(site, calls)))
        yield calls


def _counted(site: Site, calls: Counter[Site]) -> Callable[..., Any]:
    original = getattr(*site)

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[site] += 1
        return original(*arguments, **named)

    return counted
