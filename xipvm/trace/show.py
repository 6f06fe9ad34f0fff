"""Events as text and as JSON, and which of them to show.

A line of text is ``time #seq actor kind fields <- #cause``: time in ns, addresses and page numbers in
hexadecimal, ranges half-open with their length: ``gfn 0x40000..0x40010 (16 pages)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import BadInput
from xipvm.trace.events import KINDS, RUN_TYPES, Event, Kind, spans
from xipvm.trace.reader import TraceReader

_ADDRESS_TYPES = frozenset({"hva", "gva", "gpa"})
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+./:@,")


def format_event(event: Event, kind: Kind | None = None) -> str:
    """One line for ``event``, without a newline; ``kind`` is its declaration, by default today's."""
    words = list(_words(kind or KINDS[event.kind], event.fields))
    if event.cause:
        words.append(f"<- #{event.cause}")
    head = f"{event.time:>12} {f'#{event.seq}':>7} {_text(event.actor):<6} {event.kind}"
    return " ".join([head, *words])


def _words(kind: Kind, fields: dict[str, Any]) -> Iterator[str]:
    types = {name: type_ for name, type_, _ in kind.fields}
    length = next((fields[name] for name, type_ in types.items() if type_ == "npages"), None)
    for name, type_ in types.items():
        value = fields[name]
        if value is None:
            yield f"{name}=-"
        elif type_ in RUN_TYPES:
            runs = ", ".join(_range(first, first + count, count) for first, count in value)
            yield f"{name} {type_[:-1]} {runs or 'none'}"
        elif name == "start" and types.get("end") == type_:
            yield f"{type_} {_range(value, fields['end'], _pages(type_, value, fields['end']))}"
        elif name == "end" and types.get("start") == type_:
            continue
        elif length is not None and type_ in ("gfn", "hva"):
            yield f"{name} {_range(value, value + (length << PAGE_SHIFT if type_ == 'hva' else length), length)}"
        elif type_ != "npages":
            yield f"{name}={_value(type_, value)}"


def _pages(type_: str, start: int, end: int) -> int:
    if type_ in _ADDRESS_TYPES:
        return (end + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT) - (start >> PAGE_SHIFT)
    return end - start


def _range(start: int, end: int, pages: int) -> str:
    return f"{start:#x}..{end:#x} ({pages} page{'' if pages == 1 else 's'})"


def _value(type_: str, value: Any) -> str:
    if type_ == "str":
        return _text(value)
    if type_ == "bool":
        return "yes" if value else "no"
    if type_ == "int":
        return str(value)
    if type_ == "prot" and value < 8:
        return "".join(letter if value & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
    return f"{value:#x}"


def _text(value: str) -> str:
    """``value`` as it is when it is one plain word, else quoted, so that no file can drive a terminal."""
    return value if value and _PLAIN.issuperset(value) else ascii(value)


def to_json(event: Event) -> str:
    """``event`` as one line of JSON: seq, time, actor, cause, kind, fields; runs are pairs."""
    import json

    return json.dumps(event._asdict(), separators=(",", ":"))


@dataclass(frozen=True)
class Filter:
    """Which events to show: those that every criterion lets through.

    ``kinds`` and ``actors`` are names or patterns (``mmu_notifier_*``), empty for all. ``page`` is a page
    number in any of the spaces (gfn, pfn, or of an address), or a guest physical or host virtual address.
    ``first`` and ``last`` are sequence numbers, both included.
    """

    kinds: Sequence[str] = ()
    actors: Sequence[str] = ()
    page: int | None = None
    first: int | None = None
    last: int | None = None

    def check(self, known: dict[str, Kind]) -> None:
        """Raise BadInput for a pattern that matches no kind in ``known``; it tells those that look like it."""
        for pattern in self.kinds:
            if not any(fnmatchcase(name, pattern) for name in known):
                near = get_close_matches(pattern, known, n=4) or sorted(name for name in known if pattern in name)
                hint = f"it knows {', '.join(near)}" if near else "a pattern such as 'spte_*' finds kinds by name"
                raise BadInput(f"the trace knows no event kind {pattern!r}; {hint}")

    def passes(self, event: Event, kind: Kind) -> bool:
        """Whether to show ``event``, which is declared as ``kind``."""
        if self.first is not None and event.seq < self.first:
            return False
        if self.last is not None and event.seq > self.last:
            return False
        if self.kinds and not any(fnmatchcase(event.kind, pattern) for pattern in self.kinds):
            return False
        if self.actors and not any(fnmatchcase(event.actor, pattern) for pattern in self.actors):
            return False
        return self.page is None or self._touches(self.page, event, kind)

    def _touches(self, page: int, event: Event, kind: Kind) -> bool:
        for space, first, end in spans(kind, event.fields):
            by_address = space in _ADDRESS_TYPES or space.startswith("gfn")
            if first <= page < end or (by_address and page >= PAGE_SIZE and first <= page >> PAGE_SHIFT < end):
                return True
        return False


def shown(reader: TraceReader, wanted: Filter, *, as_json: bool = False) -> Iterator[str]:
    """The lines of a trace that ``wanted`` lets through. Raises BadInput, and TraceFileError as the reader does."""
    wanted.check(reader.kinds)
    for event in reader:
        kind = reader.kinds[event.kind]
        if wanted.passes(event, kind):
            yield to_json(event) if as_json else format_event(event, kind)
