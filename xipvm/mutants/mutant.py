"""A mutant: a named switch that puts one known fault into an otherwise right system.

Each is a context: inside it the fault is there, behind it everything is as it was. Mutants show that the oracle, the
explorer and the scenarios find what they are made to find; nothing in a scenario knows of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from xipvm import actors
from xipvm.actors import Actor
from xipvm.errors import BadInput, InternalError

Apply = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Mutant:
    """``number`` is a historical bug's (``7``), a generic mutation's (``M7``) or one of the CPU's (``C2``).

    ``caught_by``: the invariants, or other words of a failure, that should see it.

    ``protocol``: the one in which it exists, both by default.
    """

    name: str
    number: str
    caught_by: tuple[str, ...]
    apply: Apply
    doc: str
    protocol: str = ""


MUTANTS: dict[str, Mutant] = {}
"""By name, in the order of their declaration."""


def mutant(
    name: str, number: str, *caught_by: str, protocol: str = ""
) -> Callable[[Callable[[], Iterator[None]]], Mutant]:
    """Declares the generator below it as a mutant: before its ``yield`` it breaks something, behind it repairs it."""

    def declare(function: Callable[[], Iterator[None]]) -> Mutant:
        if name in MUTANTS:
            raise InternalError(f"mutant {name} is declared twice")
        doc = " ".join((function.__doc__ or "").split())
        declared = MUTANTS[name] = Mutant(name, number, caught_by, contextmanager(function), doc, protocol)
        return declared

    return declare


Site = tuple[Any, str]
"""A function: what it belongs to, and its name there."""


@dataclass
class Changes:
    """What a mutant changes, and inside of which functions alone that makes a difference, if there are such."""

    replaced: list[Site] = field(default_factory=list)
    scopes: list[Site] = field(default_factory=list)

    def matter(self, called: Collection[Site]) -> bool:
        """Whether it can make a difference where just those functions are called."""
        return (not self.scopes or any(site in called for site in self.scopes)) and any(
            site in called for site in self.replaced
        )


_changes: Changes | None = None


@contextmanager
def watching() -> Iterator[Changes]:
    """Notes which functions are replaced meanwhile."""
    global _changes
    before, _changes = _changes, Changes()
    try:
        yield _changes
    finally:
        _changes = before


Inside = Callable[[], bool]
"""Whether the current actor is inside of the function that :func:`inside` was given."""


@contextmanager
def inside(owner: Any, attribute: str, when: Callable[..., bool] = lambda *_, **__: True) -> Iterator[Inside]:
    """Watches calls of ``owner.attribute``, those whose arguments ``when`` accepts: elsewhere, nothing is different."""
    original = getattr(owner, attribute)
    within: Counter[Actor] = Counter()

    def watched(*arguments: Any, **named: Any) -> Any:
        if not when(*arguments, **named):
            return original(*arguments, **named)
        actor = actors.current
        within[actor] += 1
        try:
            return original(*arguments, **named)
        finally:
            within[actor] -= 1

    with _put(owner, attribute, watched):
        if _changes is not None:
            _changes.scopes.append((owner, attribute))
        yield lambda: within[actors.current] > 0


@contextmanager
def replaced(owner: Any, attribute: str, replacement: Any) -> Iterator[None]:
    """``owner.attribute``, which may be inherited, is ``replacement`` meanwhile."""
    if _changes is not None:
        _changes.replaced.append((owner, attribute))
    with _put(owner, attribute, replacement):
        yield


@contextmanager
def _put(owner: Any, attribute: str, replacement: Any) -> Iterator[None]:
    getattr(owner, attribute)
    own, original = attribute in vars(owner), vars(owner).get(attribute)
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        if own:
            setattr(owner, attribute, original)
        else:
            delattr(owner, attribute)


def get(name: str) -> Mutant:
    """The mutant ``name``, or the one that has this number alone. Raises BadInput for any other."""
    if name in MUTANTS:
        return MUTANTS[name]
    numbered = [mutant for mutant in MUTANTS.values() if name in mutant.number.split(", ")]
    if len(numbered) == 1:
        return numbered[0]
    if numbered:
        raise BadInput(f"{name} is the number of {', '.join(mutant.name for mutant in numbered)}: say which")
    raise BadInput(f"no mutant is called {name!r}; see 'xipvm mutants'")


@contextmanager
def planted(*names: str) -> Iterator[None]:
    """The faults ``names`` are in the system meanwhile. Raises BadInput as :func:`get` does."""
    chosen = [get(name) for name in names]
    if not chosen:
        yield
        return
    with chosen[0].apply(), planted(*names[1:]):
        yield
