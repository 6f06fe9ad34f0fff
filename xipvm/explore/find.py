"""Scenarios by name: those that come with xipvm, those in a user's file (``path.py:name``), recorded ones (a file)."""

from __future__ import annotations

import errno
import importlib.util
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from xipvm.errors import BadInput
from xipvm.explore.guest_code import CODE_SCENARIOS
from xipvm.explore.guests import GUEST_SCENARIOS
from xipvm.explore.recorded import recorded
from xipvm.explore.scenarios import SCENARIOS
from xipvm.explore.scene import Scenario

KNOWN: Final = {**SCENARIOS, **GUEST_SCENARIOS, **CODE_SCENARIOS}
"""Those that come with xipvm."""


def find(name: str) -> Scenario:
    """The scenario ``name``. Raises BadInput for one that there is not, or a file that cannot be loaded."""
    if name in KNOWN:
        return KNOWN[name]
    if name.endswith(".json"):
        return recorded(name)
    path, separator, function = name.rpartition(":")
    if not separator:
        if name.endswith(".py"):
            raise BadInput(f"{name}: which scenario? Write {name}:NAME, NAME being one of {_names(name)}")
        close = get_close_matches(name, KNOWN, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise BadInput(
            f"no scenario is called {name!r}{meant} ('xipvm explore' lists them; others are FILE.py:NAME and FILE.json)"
        )
    found = in_file(path)
    if function not in found:
        raise BadInput(f"{path} has no scenario {function!r}; it has {', '.join(found) or 'none'}")
    return found[function]


def in_file(path: str) -> dict[str, Scenario]:
    """The scenarios that the Python file ``path`` defines. Raises BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: {os.strerror(errno.EISDIR if Path(path).is_dir() else errno.ENOENT)}")
    spec = importlib.util.spec_from_file_location(f"xipvm_scenarios_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{path}: {type(error).__name__}: {error}") from error
    return {each.name: each for each in vars(module).values() if isinstance(each, Scenario)}


def _names(path: str) -> str:
    return ", ".join(in_file(path)) or "none"
