"""Freezing a file system wrongly: too early, and with mappings that may still be written."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm import actors
from xipvm.locks.gate import Gate
from xipvm.mutants.mutant import mutant, replaced
from xipvm.xip.dax import DaxFile


@mutant("xip-frozen-in-the-middle-of-a-write", "B12", "AssertionError")
def frozen_in_the_middle_of_a_write() -> Iterator[None]:
    """Who changes a file system looks whether it is frozen when he begins, and nobody waits for him to be done."""

    def close(self: Gate) -> None:
        actors.access(self, write=True)
        self.shut = True

    with replaced(Gate, "close", close):
        yield


@mutant("dax-frozen-and-still-writable", "D2", "AssertionError", protocol="modern")
def frozen_and_still_writable() -> Iterator[None]:
    """Write-back, also that of freezing, cleans pages and leaves the entries that map them writable."""

    def fsync(self: DaxFile, pgoff: int = 0, count: int | None = None) -> int:
        self.inode.sync()
        return 0

    with replaced(DaxFile, "fsync", fsync):
        yield
