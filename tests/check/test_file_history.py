"""What a report tells of a page of a file used in place: what was said of it by the file's name, too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.check.violation import Violation
from xipvm.mmu.pte import HUGE, SPECIAL
from xipvm.trace.funnel import Trace

HVA = 0x2000_0000_0000
BLOCK = 0x100_0000
Said = tuple[str, dict[str, Any]]

MAPPED: Said = "xip_map", {"file": "f", "mm": "mm0", "start": HVA, "end": HVA + 1024 * PAGE_SIZE, "pgoff": 0}
ZEROS: Said = "dax_entry_huge", {"file": "f", "pgoff": 0, "count": 512, "pfn": 0x200, "hole": True}
HUGE_HOLE: Said = "pte_set", {"mm": "mm0", "hva": HVA, "pfn": 0x200, "flags": 1 | SPECIAL | HUGE}
FREED: Said = "xip_free", {"file": "f", "first": 3, "end": 9, "pages": [(BLOCK + 3, 1)]}


def entry(page: int, pfn: int) -> Said:
    return "dax_entry", {"file": "f", "pgoff": page, "pfn": pfn}


def shown(page: int, pfn: int, mm: str = "mm0") -> Said:
    return "pte_set", {"mm": mm, "hva": HVA + page * PAGE_SIZE, "pfn": pfn, "flags": 1 | SPECIAL}


def allocated(page: int) -> Said:
    return "xip_allocate", {"file": "f", "pgoff": page, "pfn": BLOCK + page}


def unmapped(page: int) -> Said:
    return "xip_unmapped", {"file": "f", "pgoff": page}


def judged(*said: Said, history: int = 1 << 15) -> Violation:
    trace, oracle = Trace(), Oracle(history=history)
    trace.attach(oracle)
    for kind, fields in said:
        trace.emit(kind, **fields)
    (violation,) = oracle.violations
    seqs = [event.seq for event in violation.history]
    assert seqs == sorted(set(seqs))
    assert violation.earlier >= 0
    return violation


def told(violation: Violation) -> list[str]:
    return [
        f"{event.kind} {event.fields['pgoff']}" if "pgoff" in event.fields and "mm" not in event.fields else event.kind
        for event in violation.history
    ]


def test_who_filled_the_hole_and_who_was_unmapped() -> None:
    others = [each for page in range(4, 40) for each in (allocated(page), unmapped(page))]
    violation = judged(MAPPED, entry(3, 0), allocated(3), unmapped(3), *others, shown(3, 0))
    assert violation.invariant == "I16"
    assert told(violation) == ["xip_map", "dax_entry 3", "xip_allocate 3", "xip_unmapped 3", "pte_set"]


def test_however_long_ago_that_was() -> None:
    others = [shown(page, BLOCK + 512 + page) for page in range(600, 1000)]
    violation = judged(MAPPED, allocated(3), unmapped(3), *others, shown(3, 0), history=16)
    assert told(violation)[-3:] == ["xip_allocate 3", "xip_unmapped 3", "pte_set"]


def test_who_still_maps_the_hole_when_it_is_said_that_nobody_does() -> None:
    mapped = "xip_map", {**MAPPED[1], "mm": "mm1"}
    violation = judged(MAPPED, mapped, shown(5, 0, "mm1"), shown(5, BLOCK + 99), allocated(5), unmapped(5))
    assert told(violation) == ["xip_map", "pte_set", "xip_allocate 5", "xip_unmapped 5"]
    assert {event.fields["mm"] for event in violation.history if "mm" in event.fields} == {"mm1"}


def test_what_was_said_of_many_pages() -> None:
    violation = judged(MAPPED, ZEROS, FREED, allocated(5), unmapped(5), HUGE_HOLE)
    assert told(violation) == ["xip_map", "dax_entry_huge 0", "xip_free", "xip_allocate 5", "xip_unmapped 5", "pte_set"]
    huge = {"file": "f", "pgoff": 0, "count": 512}
    filled, gone = ("xip_allocate_huge", {**huge, "pfn": BLOCK}), ("xip_unmapped_huge", huge)
    violation = judged(MAPPED, filled, gone, shown(7, 0))
    assert told(violation) == ["xip_map", "xip_allocate_huge 0", "xip_unmapped_huge 0", "pte_set"]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ((allocated(3), unmapped(3), entry(3, BLOCK + 3)), ["xip_allocate 3", "xip_unmapped 3", "dax_entry 3"]),
        (
            (("xip_allocate_huge", {"file": "f", "pgoff": 0, "count": 512, "pfn": BLOCK}),),
            ["xip_allocate_huge 0"],
        ),
    ],
)
def test_where_a_freed_block_came_from(before: tuple[Said, ...], words: list[str]) -> None:
    pinned = "page_pin", {"vm": "remote", "gfn": 7, "pfn": BLOCK + 3}
    violation = judged(*before, pinned, FREED)
    assert violation.invariant == "I5"
    assert told(violation) == [*words, "page_pin", "xip_free"]


def test_other_holes_are_not_the_page() -> None:
    """All holes are one frame: what touched that is not what touched the page."""
    others = [shown(page, 0) for page in range(600, 640)]
    violation = judged(MAPPED, *others, allocated(3), shown(3, 0))
    assert told(violation) == ["xip_map", "xip_allocate 3", "pte_set"]


def test_an_area_that_was_to_be_moved_and_was_not_still_shows_the_file() -> None:
    moved = "vma_remap", {"mm": "mm0", "start": HVA, "end": HVA + 8 * PAGE_SIZE, "to": HVA, "pages": 2048}
    assert judged(MAPPED, moved, allocated(3), shown(3, 0)).invariant == "I16"


def test_a_scenario_says_so(tmp_path: Path) -> None:
    mutant = "xip-hole-mapped-behind-its-filling"
    words = ("explore", "hole-read-while-it-is-filled", "--protocol", "2008", "--mutant", mutant)
    done = subprocess.run(
        [sys.executable, "-m", "xipvm", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    since = re.search(r"I16 broken at event #\d+: page 0x0 of \S+ is mapped as a hole, .* since #(\d+)", done.stdout)
    assert since is not None, done.stdout + done.stderr
    assert re.search(rf"#{since[1]} \S+ +xip_allocate ", done.stdout)
    assert re.search(r"#\d+ \S+ +xip_unmapped ", done.stdout)
