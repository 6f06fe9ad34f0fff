"""A failing run as a small file: which scenario, what was asked and answered, what was wrong.

JSON, for people and version control::

    {"xipvm": "counterexample", "version": 1, "scenario": "fault-against-munmap", "failure": "I5: ...",
     "choices": [["kvm.fault.gup_done", 3, 1, true], ...]}

A choice is label, number of candidates, answer, and whether another answer than 0 preempts. Questions behind the last
one recorded are answered 0.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipvm.errors import BadInput, os_reason
from xipvm.explore.choices import Choice

VERSION: Final = 1
_LIMIT: Final = 16 << 20


@dataclass(frozen=True)
class Counterexample:
    """What the file says. ``scenario`` is a name, or ``path.py:name`` for one of the user's own."""

    scenario: str
    failure: str
    choices: Sequence[Choice]
    mutants: Sequence[str] = ()
    protocol: str = "modern"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it whole or not at all. Raises BadInput."""
        rows = [json.dumps([choice.label, choice.n, choice.answer, choice.preempts]) for choice in self.choices]
        head: dict[str, object] = {
            "xipvm": "counterexample",
            "version": VERSION,
            "scenario": self.scenario,
            "failure": self.failure,
        }
        if self.mutants:
            head["mutants"] = list(self.mutants)
        if self.protocol != "modern":
            head["protocol"] = self.protocol
        text = json.dumps(head)[:-1] + ', "choices": [\n  ' + ",\n  ".join(rows) + "\n]}\n"
        target = Path(path)
        scratch = _scratch(target)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(target)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise BadInput(f"{target}: {os_reason(error)}") from error

    @staticmethod
    def check_place(path: str) -> None:
        """Whether something can be saved there, which is better known before a search. Raises BadInput."""
        if Path(path).is_dir():
            raise BadInput(f"{path}: {os.strerror(errno.EISDIR)}")
        scratch = _scratch(Path(path))
        try:
            scratch.touch()
            scratch.unlink()
        except OSError as error:
            raise BadInput(f"{path}: {os_reason(error)}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Counterexample:
        """What ``save`` wrote. Raises BadInput."""
        try:
            with open(path, encoding="utf-8") as file:
                data = json.loads(file.read(_LIMIT))
        except OSError as error:
            raise BadInput(f"{path}: {os_reason(error)}") from error
        except UnicodeDecodeError:
            raise BadInput(f"{path}: not a counterexample: not a text file") from None
        except ValueError as error:
            raise BadInput(f"{path}: not a counterexample: {error}") from None
        if not isinstance(data, dict) or data.get("xipvm") != "counterexample":
            raise BadInput(f"{path}: not a counterexample")
        if data.get("version") != VERSION:
            raise BadInput(f"{path}: version {data.get('version')!r}; this program reads {VERSION}")
        try:
            choices = [
                Choice(_number(n), _text(label), _number(answer), bool(p)) for label, n, answer, p in data["choices"]
            ]
            mutants = tuple(_text(name) for name in data.get("mutants", ()))
            protocol = _text(data.get("protocol", "modern"))
            return cls(_text(data["scenario"]), _text(data["failure"]), choices, mutants, protocol)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path}: not a counterexample: {error!r}") from None


def _scratch(target: Path) -> Path:
    """Where a file is written first."""
    return target.with_name(f"{target.name}.{os.getpid()}.tmp")


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
