"""Stacks that cost little to take: who called whom, to be put into words only when somebody wants to read them."""

from __future__ import annotations

import os
import sys
from types import CodeType
from typing import Final

LIMIT: Final = 14
"""Frames that are kept, from the innermost one on."""

Stack = tuple[tuple[CodeType, int], ...]
"""Code and line number, innermost frame first."""

_OWN: Final = os.path.dirname(__file__)


def take() -> Stack:
    """The stack of who called into this package."""
    frame = sys._getframe(1)
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < LIMIT:
        code = frame.f_code
        if found or not code.co_filename.startswith(_OWN):
            found.append((code, frame.f_lineno))
        back = frame.f_back
        if back is None:
            break
        frame = back
    return tuple(found)


def show(stack: Stack) -> str:
    """One line a frame, outermost first."""
    return "\n".join(f"  {code.co_filename}:{line} in {code.co_qualname}" for code, line in reversed(stack))
