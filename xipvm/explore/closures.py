"""Whether all that a function can reach is watched (footprint.py), so that its steps are known by what they touch.

What is watched are the objects of the model, :class:`~xipvm.explore.shared.Shared` and classes derived from them;
constants, and functions that reach nothing else. Lists, dictionaries and objects of other classes are not, nor are
variables that a function sets for others (``nonlocal``, ``global``).
"""

from __future__ import annotations

import dis
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from xipvm.explore.footprint import MODEL, is_watched

_TRUSTED: Final = (*MODEL, "xipvm.errors", "xipvm.actors", "xipvm.locks", "xipvm.address", "contextlib", "functools")
_STORES: Final = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL"))


def reaches_only_watched(function: object) -> bool:
    """All that calling ``function`` can touch is watched. Only to be asked while footprints are recorded."""
    return _fine(function, set())


def _fine(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return True
    seen.add(id(value))
    kind = type(value)
    if kind is FunctionType:
        return _function(value, seen)
    if kind is MethodType:
        return _fine(value.__self__, seen) and _fine(value.__func__, seen)
    if kind is partial:
        return all(_fine(part, seen) for part in (value.func, *value.args, *value.keywords.values()))
    if kind in (tuple, frozenset):
        return all(_fine(part, seen) for part in value)
    if kind is BuiltinFunctionType:
        return value.__self__ is None or isinstance(value.__self__, ModuleType) or _fine(value.__self__, seen)
    if isinstance(value, ModuleType):
        return True
    return is_watched(kind) or _is_scene(kind)


def _is_scene(kind: type) -> bool:
    """What an actor asks of its scene is chance, or bookkeeping that no actor sees."""
    from xipvm.explore.scene import Scene

    return issubclass(kind, Scene)


def _function(function: FunctionType, seen: set[int]) -> bool:
    if (function.__module__ or "").startswith(_TRUSTED):
        return True
    names = _names(function.__code__)
    if names is None:
        return False
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not set yet: somebody will
            return False
        if not _fine(held, seen):
            return False
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not all(_fine(each, seen) for each in defaults):
        return False
    return all(_fine(function.__globals__[name], seen) for name in names if name in function.__globals__)


@cache
def _names(code: CodeType) -> frozenset[str] | None:
    """The global names that ``code`` loads; None when it sets a variable for others."""
    names: set[str] = set()
    return frozenset(names) if _collect(code, names, frozenset(code.co_freevars)) else None


def _collect(code: CodeType, names: set[str], free: frozenset[str]) -> bool:
    for each in dis.get_instructions(code):
        if each.opname in _STORES or (each.opname in ("STORE_DEREF", "DELETE_DEREF") and each.argval in free):
            return False
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(str(each.argval))
    return all(_collect(inner, names, free) for inner in code.co_consts if isinstance(inner, CodeType))
