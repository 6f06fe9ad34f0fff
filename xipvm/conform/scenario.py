"""Scenario files: reading and checking.

A scenario is a JSON object: ``format`` 1, ``scenario`` (its name, also the file's), ``group``, ``title``, ``recorded``
(on what), ``steps``, and optionally ``caveats`` and ``stable`` (both lists of sentences). A step is an ``op`` with its
arguments, and either ``"setup": true`` (nothing to compare, cannot fail) or ``expect`` (what must match) and
``detail`` (what is particular to KVM or to one kernel build).

Everything is checked when it is read, unknown fields included, and that a step names only what earlier ones made: an
executor needs no checks of its own. Pages are counted in 4 KiB from the start of a *space* of addresses, guest frames
from guest frame 0; ranges are half-open; a value is the 64-bit little-endian word at the start of a page, in hex.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xipvm.conform.schema import DETAIL, EXPECT, OPS, TOP, WrongError, brief, check_fields
from xipvm.errors import BadInput, os_reason


class ScenarioError(BadInput):
    """The file is no scenario. ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what to do with which arguments, and what was observed. ``number`` counts from 1, as people do."""

    number: int
    op: str
    args: dict[str, Any]
    setup: bool
    expect: dict[str, Any]
    detail: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.op, *(f"{name}={brief(value)}" for name, value in self.args.items())])


@dataclass(frozen=True, slots=True)
class Scenario:
    """One file. ``stable`` is not empty where the outcome depends on concurrency or on the state of the machine."""

    path: str
    name: str
    group: str
    title: str
    caveats: tuple[str, ...]
    stable: tuple[str, ...]
    steps: tuple[Step, ...]


def find(paths: list[str]) -> list[str]:
    """The files that ``paths`` stand for: a folder for the ``.json`` files in it, by name. Raises ScenarioError."""
    files = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).glob("*.json"))
            if not inside:
                raise ScenarioError(path, "no .json file in this folder")
            files += inside
        else:
            files.append(path)
    return files


def load(path: str) -> Scenario:
    """The scenario in the file ``path``. Raises ScenarioError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(path, os_reason(error)) from None
    except UnicodeDecodeError:
        raise ScenarioError(path, "not a text file") from None
    except (ValueError, RecursionError) as error:
        raise ScenarioError(path, f"not JSON: {error}") from None
    try:
        return parse(content, path)
    except WrongError as error:
        raise ScenarioError(path, str(error)) from None


def parse(content: Any, path: str) -> Scenario:
    """Check ``content``, decoded JSON. Raises ValueError that says what is wrong."""
    if not isinstance(content, dict) or "steps" not in content:
        raise WrongError("not a scenario: an object with steps is expected")
    check_fields("the scenario", content, TOP)
    if content["scenario"] != Path(path).stem:
        raise WrongError(f"the scenario is called {content['scenario']!r}, not like its file")
    known = _Known()
    steps = []
    for number, step in enumerate(content["steps"], 1):
        try:
            steps.append(_step(number, step, known))
        except WrongError as error:
            raise WrongError(f"step {number}: {error}") from None
    return Scenario(
        path=path,
        name=content["scenario"],
        group=content["group"],
        title=content["title"],
        caveats=tuple(content.get("caveats", ())),
        stable=tuple(content.get("stable", ())),
        steps=tuple(steps),
    )


def fill_values(fill: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(page, value) of every page of a fill, ascending."""
    for page in range(fill["start"], fill["end"]):
        if "value" in fill:
            yield page, int(fill["value"], 16)
        else:
            yield page, (int(fill["base"], 16) + page * int(fill.get("step", "0x1"), 16)) & 0xFFFF_FFFF_FFFF_FFFF


def expand(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Notifier calls with every ``repeat`` written out."""
    out = []
    for call in calls:
        if "repeat" not in call:
            out.append(call)
            continue
        block = dict(call["repeat"])
        first, last, step, pages = (block.pop(name) for name in ("from", "to", "step", "pages"))
        out += [{**block, "start": start, "end": start + pages} for start in range(first, last, step)]
    return out


# ---- steps


class _Known:
    """What the steps so far have made."""

    def __init__(self) -> None:
        self.file: set[str] = set()
        self.child: set[str] = set()
        self.vm: set[str] = set()
        self.slots: set[tuple[str, int]] = set()
        self.uffd = False

    def check(self, op: str, args: Mapping[str, Any]) -> None:
        """A step may use only what is there. Raises WrongError; afterwards, what the step makes is known."""
        made = {"file_create": "file", "fork": "child", "vm_create": "vm"}.get(op)
        if op in ("guest_read", "guest_write", "guest_spin_start", "guest_loop_start"):
            args = {"vm": "vm1", **args}
        for what, names in (("file", self.file), ("child", self.child), ("vm", self.vm)):
            if what not in args:
                continue
            if what == made:
                if args[what] in names:
                    raise WrongError(f"{what} {args[what]!r} is there already")
                names.add(args[what])
            elif args[what] not in names:
                raise WrongError(f"no earlier step made {what} {args[what]!r}")
        if op == "memslot_set":
            self.slots.add((args["vm"], args["slot"]))
        elif "slot" in args and (args["vm"], args["slot"]) not in self.slots:
            raise WrongError(f"no earlier step made memslot {args['slot']}")
        if op == "uffd_open":
            self.uffd = True
        elif op.startswith("uffd_") and not self.uffd:
            raise WrongError(f"{op} without uffd_open")


def _step(number: int, step: Any, known: _Known) -> Step:
    if not isinstance(step, dict) or not isinstance(step.get("op"), str):
        raise WrongError("no op")
    op = step["op"]
    if op not in OPS:
        raise WrongError(f"there is no op {op!r}")
    args = {name: value for name, value in step.items() if name not in ("op", "setup", "expect", "detail")}
    check_fields(op, args, OPS[op])
    _together(op, args)
    known.check(op, args)
    setup = step.get("setup", False)
    if setup is not True and "setup" in step:
        raise WrongError(f"{op}: setup is true or left out")
    if setup and ("expect" in step or "detail" in step):
        raise WrongError(f"{op}: a set-up step expects nothing")
    expect, detail = step.get("expect", {}), step.get("detail", {})
    check_fields(f"{op}: expect", expect, EXPECT)
    check_fields(f"{op}: detail", detail, DETAIL)
    if "spte" in expect and "gfn" not in args:
        raise WrongError(f"{op}: an spte is expected, but not of which gfn")
    return Step(number, op, args, setup, expect, detail)


def _together(op: str, args: Mapping[str, Any]) -> None:
    """Arguments that need or exclude each other."""
    for span in (args, args.get("range", {}), args.get("fill", {}), args.get("contents") or {}):
        if "start" in span and span["start"] >= span["end"]:
            raise WrongError(f"{op}: range {span['start']} to {span['end']} is empty")
        if span.get("step") == 0:
            raise WrongError(f"{op}: step 0")
    if op == "mmap" and not (args["kind"] == "file") == ("file" in args) == ("file_page" in args):
        raise WrongError("mmap: file and file_page belong to kind file")
    ways = {
        "guest_read": (("gfn",), ("range",)),
        "guest_write": (("gfn", "value"), ("fill",)),
        "host_write": (("page", "value"), ("fill",)),
    }.get(op)
    if ways is not None:
        given = [way for way in ways if any(name in args for name in way)]
        if len(given) != 1 or any(name not in args for name in given[0]):
            raise WrongError(f"{op} wants either {' or '.join(' and '.join(way) for way in ways)}")
    if ("offset" in args) != ("bytes" in args):
        raise WrongError(f"{op}: offset and bytes belong together")
    if "offset" in args and args["offset"] + args["bytes"] > 4096:
        raise WrongError(f"{op}: offset {args['offset']} leaves the page")
