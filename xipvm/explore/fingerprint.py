"""What a run did, up to the order of steps that nobody can tell apart.

Two events depend on each other when one actor did both or when they name the same page, vCPU or object. Runs in which
dependent events come in the same order are the same (a Mazurkiewicz trace); the fingerprint is the hash of the Foata
normal form, which has every event at the earliest level that its dependences allow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from xipvm.address import PAGE_SHIFT
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
        self._sum = 0
        self._slots: dict[str, dict[int, tuple[int, int, int]]] = {}
        """By VM and slot: first guest frame, pages, first page of the host."""
        self._mms: dict[str, str] = {}
        """By VM."""
        self._watched: dict[str, tuple[int, int]] = {}
        """By interval notifier: pages of the host."""

    def __call__(self, event: Event) -> None:
        """Place ``event`` behind what it depends on."""
        self.learn(event)
        keys, spaces = self.resources(event)
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
        text = f"{deepest} {event.actor} {event.kind} {fields}"
        self._sum += int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")

    @property
    def digest(self) -> str:
        """A hexadecimal number; the same for equal runs, on every machine. The sum of its events' hashes."""
        return f"{self._sum % (1 << 128):032x}"

    def learn(self, event: Event) -> None:
        """Remember what ``event`` says of guest frames and pages of the host."""
        if event.kind == "memslot_set":
            slot = event.fields["gfn"], event.fields["pages"], event.fields["hva"] >> PAGE_SHIFT
            self._slots.setdefault(event.fields["vm"], {})[event.fields["slot"]] = slot
        elif event.kind in ("mmu_notifier_register", "mmu_interval_notifier_insert"):
            self._mms[event.fields["notifier"]] = event.fields["mm"]
            if "start" in event.fields:
                pages = event.fields["start"] >> PAGE_SHIFT, -(-event.fields["end"] >> PAGE_SHIFT)
                self._watched[event.fields["notifier"]] = pages

    def resources(self, event: Event) -> tuple[Iterable[Any], set[str]]:
        """What an event touches: keys, and names of spaces that it touches as a whole. A guest's page is the host's.

        What names a notifier that watches a range touches that; what only names a VM or an mm, all of its pages.
        """
        fields = event.fields
        keys: list[Any] = [event.actor]
        spaces: set[str] = set()
        vm = fields.get("vm") or ""
        owner = fields.get("mm") or self._mms.get(vm, vm)
        for space, first, end in spans(KINDS[event.kind], fields):
            name = space if space == "pfn" else f"{space} of {owner}"
            if end - first > _MANY:
                spaces.add(name)
                if space == "gfn":
                    spaces.add(f"hva of {owner}")
            elif space == "gfn":
                for page in range(first, end):
                    keys.append((name, page))
                    keys.extend(
                        (f"hva of {owner}", host + page - gfn)
                        for gfn, pages, host in self._slots.get(vm, {}).values()
                        if 0 <= page - gfn < pages
                    )
            else:
                keys.extend((name, page) for page in range(first, end))
        if "vcpu" in fields:
            keys.append(("vcpu", fields["vcpu"]))
        if len(keys) == 1 and not spaces:
            watched = self._watched.get(fields.get("notifier") or "")
            if watched is not None and watched[1] - watched[0] <= _MANY:
                keys.extend((f"hva of {owner}", page) for page in range(*watched))
            else:
                spaces.add(f"hva of {owner}" if owner else event.kind)
        return keys, spaces
