"""The one source of everything that a storm leaves to chance."""

from __future__ import annotations

_MASK = (1 << 64) - 1


class Choices:
    """Numbers that follow from ``seed`` alone, on every host and version of Python (splitmix64)."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK
        self.made = 0
        """How many choices there were."""

    def choose(self, n: int, label: str) -> int:
        """A number in ``range(n)``. ``label`` says what it decides, for whoever records or replaces choices."""
        self.made += 1
        self._state = mixed = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        return ((mixed ^ mixed >> 31) * n) >> 64
