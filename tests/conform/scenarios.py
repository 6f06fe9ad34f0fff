"""Scenarios as values: a recorded one, changed, or a small one made up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from xipvm.conform.report import Report, replay
from xipvm.conform.scenario import parse

GOLDEN = Path(__file__).parents[1] / "golden"
Steps = list[dict[str, Any]]


def recorded(name: str) -> dict[str, Any]:
    """The content of a recorded scenario."""
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def scenario(steps: Steps, **more: Any) -> dict[str, Any]:
    """A scenario named ``made`` with ``steps``."""
    return {
        "format": 1,
        "scenario": "made",
        "group": "zero",
        "title": "Made up.",
        "recorded": {"kernel": "none", "secondary": "none"},
        "steps": copy.deepcopy(steps),
        **more,
    }


def vm(pages: int = 16) -> Steps:
    """Set-up: anonymous memory that the host has written (page n holds 0x1000 + n), a VM on it."""
    steps: Steps = [
        {"op": "mmap", "space": "slot", "page": 0, "pages": pages, "kind": "anon", "share": "private", "prot": "rw"},
        {"op": "host_write", "space": "slot", "fill": {"start": 0, "end": pages, "base": "0x1000"}},
        {"op": "vm_create", "vm": "vm1", "guest_pages": "4k"},
        {
            "op": "memslot_set",
            "vm": "vm1",
            "slot": 1,
            "gfn": 0,
            "pages": pages,
            "space": "slot",
            "page": 0,
            "flags": [],
        },
    ]
    return [{**step, "setup": True} for step in steps]


def run(content: dict[str, Any]) -> Report:
    """Replay ``content``."""
    return replay(parse(content, f"{content['scenario']}.json"), detail=True)


def fields(report: Report) -> list[str]:
    """What differs, in order."""
    return [difference.field for step in report.steps for difference in step.differences]
