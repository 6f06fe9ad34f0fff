"""What a run did, up to the order of steps that nobody can tell apart.

Two events depend on each other when one actor did both or when they name the same page, vCPU or object. Runs in which
dependent events come in the same order are the same (a Mazurkiewicz trace); the fingerprint is the hash of the Foata
normal form, which has every event at the earliest level that its dependences allow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from xipvm.trace.events import KINDS, Event, spans

_MANY: Final = 64
"""A range of more pages counts as all of its space."""
_NOT_WHAT: Final = frozenset({"range"})
"""Fields that number what happened, and differ where nothing else does."""


class Fingerprint:
    """A sink; ``digest`` is the fingerprint of what it has seen."""

    def __init__(self) -> None:
        self._level: dict[Any, int] = {}
        self._whole: dict[str, int] = {}
        self._events: list[tuple[int, str]] = []

    def __call__(self, event: Event) -> None:
        """Place ``event`` behind what it depends on."""
        keys, spaces = _resources(event)
        level = self._level
        deepest = 0
        for key in keys:
            deepest = max(deepest, level.get(key, 0))
        for space in spaces:
            deepest = max(deepest, self._whole.get(space, 0))
        for key in keys:
            if type(key) is tuple:
                deepest = max(deepest, self._whole.get(key[0], 0))
        deepest += 1
        for key in keys:
            level[key] = deepest
        for space in spaces:
            self._whole[space] = deepest
            for key in level:
                if type(key) is tuple and key[0] == space:
                    level[key] = deepest
        fields = [(name, value) for name, value in event.fields.items() if name not in _NOT_WHAT]
        self._events.append((deepest, f"{event.actor} {event.kind} {fields}"))

    @property
    def digest(self) -> str:
        """A hexadecimal number; the same for equal runs, on every machine."""
        hashed = hashlib.blake2b(digest_size=16)
        for level, text in sorted(self._events):
            hashed.update(f"{level} {text}\n".encode())
        return hashed.hexdigest()


def _resources(event: Event) -> tuple[Iterable[Any], set[str]]:
    """What an event touches: keys, and names of spaces that it touches as a whole."""
    fields = event.fields
    keys: list[Any] = [event.actor]
    spaces: set[str] = set()
    owner = fields.get("mm") or fields.get("vm") or ""
    for space, first, end in spans(KINDS[event.kind], fields):
        name = space if space == "pfn" else f"{space} of {owner}"
        if end - first > _MANY:
            spaces.add(name)
        else:
            keys.extend((name, page) for page in range(first, end))
    if "vcpu" in fields:
        keys.append(("vcpu", fields["vcpu"]))
    if len(keys) == 1 and not spaces:
        spaces.add(event.kind)
    return keys, spaces
