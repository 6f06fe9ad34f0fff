"""What a trace must show, in few words: a recorded run, and assertions over the order of its events.

::

    log = TraceLog()
    trace.attach(log)
    ...
    log.every("page_free").after("spte_zap", same="pfn", since="spte_set")
    log.every("pte_clear").between("mmu_notifier_invalidate_range", same="hva")
    log.never("tlb_insert", within="mmu_notifier_invalidate_range", actor="host")
    assert log.count("tlb_flush", vcpu=0) == 1

Kinds are names or patterns (``mmu_notifier_*``). Further words choose among the events of a kind: ``actor``; a field's
value, or a function of it; or ``hva``, ``gva``, ``gpa`` (an address), ``gfn``, ``pfn`` (a number) for events that name
that page in any way, by a range or a run too. ``same`` says what two events must have in common: one of these spaces
(page by page: an event of many pages needs its partner for each), a field, or several of both. What has a ``gfn`` has
the ``hva`` that the memslots of that moment give it.

An assertion that fails raises AssertionError, with the events in question on a timeline. A kind or field that there is
not raises BadInput: a typing error must not hold.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Final, NoReturn

from xipvm.address import PAGE_SHIFT
from xipvm.errors import BadInput
from xipvm.trace.events import KINDS, Event, spans
from xipvm.trace.timeline import timeline

SPACES: Final = ("hva", "gva", "gpa", "gfn", "pfn")
_OWNERS: Final = {"hva": "mm", "gfn": "vm"}
"""Pages of these spaces are the same only in the same mm or vm, where both events name one."""
_SHOWN: Final = 16
"""At most so many events are shown with a failure."""

Same = str | Sequence[str] | None
Key = tuple[object, ...]
Bracket = str | tuple[str, str]


class TraceLog:
    """A sink that remembers every event; ``events`` has them as they came."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._slots: dict[tuple[str, int], tuple[int, int, int]] = {}
        """gfn, pages and first page of the host, by vm and slot. Never changed in place."""
        self._slots_at: list[dict[tuple[str, int], tuple[int, int, int]]] = []

    def __call__(self, event: Event) -> None:
        """Remember ``event``."""
        fields = event.fields
        if event.kind == "memslot_set":
            key = fields["vm"], fields["slot"]
            self._slots = self._slots | {key: (fields["gfn"], fields["pages"], fields["hva"] >> PAGE_SHIFT)}
        elif event.kind == "memslot_delete":
            gone = fields["vm"], fields["slot"]
            self._slots = {key: slot for key, slot in self._slots.items() if key != gone}
        self.events.append(event)
        self._slots_at.append(self._slots)

    def clear(self) -> None:
        """Forget every event; memslots stay known."""
        self.events.clear()
        self._slots_at.clear()

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __repr__(self) -> str:
        return f"<trace of {len(self.events)} events>"

    # ---- questions

    def select(self, kind: str, **which: Any) -> list[Event]:
        """The events of ``kind``, in order."""
        return [self.events[at] for at in self._find(kind, which)]

    def count(self, kind: str, **which: Any) -> int:
        """How many events of ``kind`` there are."""
        return len(self._find(kind, which))

    def show(self, kinds: Iterable[str] = ("*",)) -> str:
        """The events of ``kinds`` on a timeline."""
        wanted = {name for kind in kinds for name in _kinds(kind)}
        return timeline([event for event in self.events if event.kind in wanted])

    # ---- assertions

    def every(self, kind: str, *, at_least: int = 1, **which: Any) -> Every:
        """All events of ``kind``; say on what they have in common by a method of the result.

        Where there are fewer than ``at_least`` the assertion fails: about nothing, everything holds.
        """
        __tracebackhide__ = True
        found = self._find(kind, which)
        if len(found) < at_least:
            self._fail(f"{_words(kind, which)}: {len(found)} of them, at least {at_least} wanted", found)
        return Every(self, _words(kind, which), found)

    def never(self, kind: str, *, within: Bracket | None = None, same: Same = None, **which: Any) -> None:
        """No event of ``kind``; with ``within`` (see :meth:`Every.between`) none while that is open."""
        __tracebackhide__ = True
        found = self._find(kind, which)
        what = f"never {_words(kind, which)}"
        if within is None:
            if found:
                self._fail(f"{what}: there are {len(found)}", found, found)
            return
        brackets = _Brackets(self, within, same)
        bad = [at for at in found if any(brackets.around(at, key) is not None for key in self._keys(at, same))]
        if bad:
            starts = [brackets.around(bad[0], key) for key in self._keys(bad[0], same)]
            opened = [at for at in starts if at is not None][:1]
            self._fail(f"{what} within {brackets.words}: there are {len(bad)}", [*opened, *bad], bad)

    def order(self, *kinds: str, **which: Any) -> list[Event]:
        """The run has an event of each of ``kinds`` in this order, with anything in between; returns the first such."""
        __tracebackhide__ = True
        found: list[int] = []
        for kind in kinds:
            places = self._find(kind, which)
            at = bisect_right(places, found[-1] if found else -1)
            if at == len(places):
                behind = f" behind {_label(self.events[found[-1]])}" if found else ""
                rest = sorted({place for name in kinds for place in self._find(name, which)})
                self._fail(f"in order {', '.join(kinds)}: there is no {kind}{behind}", rest, found[-1:])
            found.append(places[at])
        return [self.events[at] for at in found]

    # ---- its parts

    def _find(self, kind: str, which: dict[str, Any]) -> list[int]:
        names = set(_kinds(kind))
        actor = which.get("actor")
        rest = {name: wanted for name, wanted in which.items() if name != "actor"}
        for name in rest:
            known = {field.name for each in names for field in KINDS[each].fields}
            if name not in known and name not in SPACES:
                raise BadInput(f"{kind} has no field {name!r}; it has {', '.join(sorted(known))}")
        return [
            at
            for at, event in enumerate(self.events)
            if event.kind in names
            and (actor is None or fnmatchcase(event.actor, actor))
            and all(self._has(at, name, wanted) for name, wanted in rest.items())
        ]

    def _has(self, at: int, name: str, wanted: Any) -> bool:
        if name in SPACES and not callable(wanted) and wanted is not None:
            page = wanted if name in ("gfn", "pfn") else wanted >> PAGE_SHIFT
            return any(first <= page < end for first, end in self._pages(at, name))
        fields = self.events[at].fields
        if name not in fields:
            return False
        return bool(wanted(fields[name])) if callable(wanted) else bool(fields[name] == wanted)

    def _pages(self, at: int, space: str) -> Iterator[tuple[int, int]]:
        """The pages of ``space`` that an event names, half-open; an ``hva`` also by way of the memslots."""
        event = self.events[at]
        for found, first, end in spans(KINDS[event.kind], event.fields):
            if found == space:
                yield first, end
            elif found == "gfn" and space == "hva":
                for (vm, _), (gfn, pages, page) in self._slots_at[at].items():
                    lo, hi = max(first, gfn), min(end, gfn + pages)
                    if lo < hi and event.fields.get("vm", vm) == vm:
                        yield lo - gfn + page, hi - gfn + page

    def _keys(self, at: int, same: Same) -> list[Key]:
        """What an event has of ``same``: one key for each page, or one for all."""
        names = () if same is None else (same,) if isinstance(same, str) else tuple(same)
        fields = self.events[at].fields
        parts: list[list[object]] = []
        for name in names:
            if name in SPACES:
                parts.append([page for first, end in self._pages(at, name) for page in range(first, end)])
            else:
                parts.append([fields[name]] if name in fields else [])
        return list(product(*parts))

    def _index(self, kind: str, same: Same) -> dict[Key, list[int]]:
        """Where the events of ``kind`` are, by key."""
        found: dict[Key, list[int]] = {}
        for at in self._find(kind, {}):
            for key in self._keys(at, same):
                found.setdefault(key, []).append(at)
        return found

    def _alike(self, one: int, other: int, same: Same) -> bool:
        """Whether pages of two events with an equal key are of the same mm, or vm, as far as they say."""
        first, second = self.events[one].fields, self.events[other].fields
        for space, owner in _OWNERS.items():
            if same == space or (not isinstance(same, str) and same is not None and space in same):
                a, b = first.get(owner), second.get(owner)
                if a is not None and b is not None and a != b:
                    return False
        return True

    def _fail(self, message: str, places: Iterable[int], bad: Collection[int] = ()) -> NoReturn:
        __tracebackhide__ = True
        wanted = sorted({*places, *bad})
        first = next((number for number, at in enumerate(wanted) if at in set(bad)), len(wanted))
        begin = max(0, min(first - _SHOWN // 2, len(wanted) - _SHOWN))
        events = [self.events[at] for at in wanted[begin : begin + _SHOWN]]
        marked = [self.events[at] for at in bad]
        more = len(wanted) - len(events)
        tail = f"\n  and {more} more" if more else ""
        raise AssertionError(f"{message}\n{timeline(events, marked)}{tail}" if events else message)


class Every:
    """All events of a kind. Each method asserts, and returns the same again."""

    def __init__(self, log: TraceLog, words: str, places: list[int]) -> None:
        self._log = log
        self._words = words
        self._places = places

    def after(self, kind: str, *, same: Same = None, since: str | None = None) -> Every:
        """Each comes after a ``kind``; with ``since``, after one behind the last ``since``, if there was any."""
        __tracebackhide__ = True
        return self._beside("after", kind, same, "since", since)

    def before(self, kind: str, *, same: Same = None, until: str | None = None) -> Every:
        """Each comes before a ``kind``; with ``until``, before one in front of the next ``until``, if there is any."""
        __tracebackhide__ = True
        return self._beside("before", kind, same, "until", until)

    def between(self, start: str, end: str | None = None, *, same: Same = None) -> Every:
        """Each comes behind a ``start`` whose ``end`` has not come yet.

        ``between("x")`` stands for ``between("x_start", "x_end")``. An end ends the start that has the same ``range``,
        where both kinds have that field, else the last one that has the ``same``.
        """
        __tracebackhide__ = True
        log = self._log
        brackets = _Brackets(log, start if end is None else (start, end), same)
        bad = [at for at in self._places if any(brackets.around(at, key) is None for key in self._wanted(at, same))]
        if bad:
            message = f"every {self._words} between {brackets.words}: {_list(log, bad)} not"
            log._fail(message, self._related(bad, same, brackets.places), bad)
        return self

    def _beside(self, how: str, kind: str, same: Same, limit_word: str, limit: str | None) -> Every:
        __tracebackhide__ = True
        log, back = self._log, how == "after"
        partners = log._index(kind, same)
        limits = log._index(limit, same) if limit is not None else {}
        bad = []
        for at in self._places:
            for key in self._wanted(at, same):
                bound = self._nearest(limits.get(key, []), at, same, back=back)
                if limit is not None and bound is None:
                    continue
                found = self._nearest(partners.get(key, []), at, same, back=back)
                if found is None or (bound is not None and (found < bound if back else found > bound)):
                    bad.append(at)
                    break
        if bad:
            tail = f" {limit_word} {limit}" if limit is not None else ""
            message = f"every {self._words} {how} {kind}{_sharing(same)}{tail}: {_list(log, bad)} not"
            others = [place for index in (partners, limits) for found in index.values() for place in found]
            log._fail(message, self._related(bad, same, others), bad)
        return self

    def _wanted(self, at: int, same: Same) -> list[Key]:
        event = self._log.events[at]
        for name in () if same is None else (same,) if isinstance(same, str) else same:
            if not _may_have(event.kind, name):
                raise BadInput(f"{event.kind} names no {name}")
        return self._log._keys(at, same)

    def _nearest(self, places: list[int], at: int, same: Same, *, back: bool) -> int | None:
        """The last of ``places`` before ``at``, or the first behind it, that is of the same mm."""
        if back:
            candidates: Iterable[int] = reversed(places[: bisect_left(places, at)])
        else:
            candidates = places[bisect_right(places, at) :]
        return next((place for place in candidates if self._log._alike(place, at, same)), None)

    def _related(self, bad: list[int], same: Same, others: Iterable[int]) -> list[int]:
        """Those of ``others`` that have something in common with the first bad one."""
        keys = set(self._log._keys(bad[0], same))
        return [at for at in others if keys.intersection(self._log._keys(at, same))]


class _Brackets:
    """Where in a run something is open: between a start and its end."""

    def __init__(self, log: TraceLog, kinds: Bracket, same: Same) -> None:
        start, end = (f"{kinds}_start", f"{kinds}_end") if isinstance(kinds, str) else kinds
        self.words = f"{start} and {end}{_sharing(same)}"
        self._log = log
        self._same = same
        starts, ends = log._find(start, {}), set(log._find(end, {}))
        self.places = sorted({*starts, *ends})
        by_range = all(
            "range" in {field.name for field in KINDS[name].fields} for name in (*_kinds(start), *_kinds(end))
        )
        self._spans: dict[Key, list[list[int]]] = {}
        opened: dict[object, list[list[int]]] = {}
        for at in self.places:
            fields = log.events[at].fields
            keys = log._keys(at, same)
            names: list[object] = [(fields.get("mm"), fields["range"])] if by_range else list(keys)
            if at in ends:
                for name in names:
                    for span in opened.get(name, [])[-1:]:
                        span[1] = at
                        opened[name].pop()
            else:
                span = [at, len(log.events)]
                for name in names:
                    opened.setdefault(name, []).append(span)
                for key in keys:
                    self._spans.setdefault(key, []).append(span)

    def around(self, at: int, key: Key) -> int | None:
        """The start of what is open at ``at``, None when nothing is."""
        for start, end in reversed(self._spans.get(key, [])):
            if start < at < end and self._log._alike(start, at, self._same):
                return start
        return None


def _kinds(pattern: str) -> list[str]:
    found = [name for name in KINDS if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, KINDS, 3)
        raise BadInput(f"there are no events {pattern!r}" + (f"; there are {', '.join(near)}" if near else ""))
    return found


def _may_have(kind: str, name: str) -> bool:
    """Whether events of ``kind`` have a field ``name``, or name pages of that space."""
    fields = KINDS[kind].fields
    spaces = {field.type.removesuffix("s") for field in fields}
    return name in {field.name for field in fields} or name in spaces or (name == "hva" and "gfn" in spaces)


def _words(kind: str, which: dict[str, Any]) -> str:
    chosen = ", ".join(f"{name}={_value(value)}" for name, value in which.items())
    return f"{kind}({chosen})" if chosen else kind


def _value(value: Any) -> str:
    return hex(value) if type(value) is int else getattr(value, "__name__", None) or str(value)


def _sharing(same: Same) -> str:
    return f" of the same {same if isinstance(same, str) else ' and '.join(same)}" if same else ""


def _label(event: Event) -> str:
    return f"#{event.seq} {event.kind}"


def _list(log: TraceLog, bad: list[int]) -> str:
    shown = ", ".join(f"#{log.events[at].seq}" for at in bad[:4])
    rest = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"{shown}{rest} {'does' if len(bad) == 1 else 'do'}"
