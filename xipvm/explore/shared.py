"""A variable that actors of a scenario share, so that a search knows who reads it and who writes to it."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Holds ``value``, which actors read and set. What it holds must not itself change."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Shared({self.value!r})"
