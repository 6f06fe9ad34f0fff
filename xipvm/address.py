"""Addresses, page numbers and sizes, as distinct types.

``Gva``/``Gpa``/``Hva`` are byte addresses (guest virtual, guest physical, host virtual);
``Gfn``/``Pfn`` are page numbers (guest frame, host frame). Ranges are half-open everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NewType

Gva = NewType("Gva", int)
Gpa = NewType("Gpa", int)
Hva = NewType("Hva", int)
Gfn = NewType("Gfn", int)
Pfn = NewType("Pfn", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as ``64M``, ``4k``, ``1GiB`` or ``4096``. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as 4096, 64K, 128M or 1G")
    return int(match[1], 16 if match[1][:2].lower() == "0x" else 10) * _UNITS[match[2].lower()]


def format_size(size: int) -> str:
    """``size`` bytes in the largest binary unit that divides it: ``64 MiB``, ``4 KiB``, ``12 B``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def page_up(value: int) -> int:
    """``value`` rounded up to a page boundary."""
    return (value + PAGE_SIZE - 1) & PAGE_MASK


def join_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of pages, each the first one and how many, with those that follow on each other made one."""
    joined: list[tuple[int, int]] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((first, count))
    return joined
