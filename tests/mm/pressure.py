"""A host with little memory, and ways to fill it."""

from __future__ import annotations

from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.reclaim import Reclaim
from xipvm.mmu.swap import Swap

PAGE = 4096
RW = 3


def word(page: int, salt: int = 0) -> bytes:
    """What a page begins with."""
    return (page * 1_000_003 + salt).to_bytes(8, "little")


def fill(mm: Mm, start: int, pages: int, salt: int = 0) -> None:
    """Writes so many pages from ``start`` on."""
    for page in range(pages):
        mm.write(start + page * PAGE, word(page, salt))


def check(mm: Mm, start: int, pages: int, salt: int = 0) -> None:
    """Every page has what :func:`fill` wrote."""
    for page in range(pages):
        assert mm.read(start + page * PAGE, 8) == word(page, salt), page


def anonymous(mm: Mm, pages: int, salt: int = 0) -> int:
    """A new area of so many pages, all written."""
    start = mm.mmap(pages * PAGE, RW)
    fill(mm, start, pages, salt)
    return start


def swap_of(mm: Mm) -> Swap:
    assert mm.rmap.swap is not None
    return mm.rmap.swap


def leave_free(host: HostMemory, reclaim: Reclaim, frames: int) -> list[int]:
    """Takes frames away until so many are free above ``low``; put them back."""
    return [host.alloc() for _ in range(host.free_frames - reclaim.marks.low - frames)]
