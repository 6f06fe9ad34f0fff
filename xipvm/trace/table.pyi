"""A hash table from page numbers to two numbers each. See table.pyx."""

from collections.abc import Iterator

class Table:
    """Two numbers, below 2**64, by page number."""

    def __len__(self) -> int: ...
    def __contains__(self, key: int) -> bool: ...
    def __iter__(self) -> Iterator[int]:
        """The keys, ascending."""
    def keys(self, start: int = 0, end: int = ...) -> list[int]:
        """Those of ``[start, end)``, ascending."""
    def get(self, key: int) -> tuple[int, int] | None:
        """The two numbers of ``key``, None when it is not there."""
    def set(self, key: int, a: int, b: int = 0) -> None:
        """Give ``key`` these numbers."""
    def pop(self, key: int) -> tuple[int, int] | None:
        """The two numbers of ``key``, which is there no longer; None when it was not."""
