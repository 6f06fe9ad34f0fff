"""A world with room for transparent huge pages: two of them, memory files that can have some, and many more frames."""

from __future__ import annotations

from tests.mm.world import HEAP, HEAP_PAGES, PAGES, Process, World
from xipvm.mmu.frames import HUGE_PAGES

EDGES = (0, 1, 2, 100, 510, 511, 512, 513, 514, 700, 1022, 1023)
"""The first pages of ranges: what happens to huge pages happens at their ends."""
SIZES = (1, 2, HUGE_PAGES, HUGE_PAGES + 1, HUGE_PAGES // 2, 2 * HUGE_PAGES)
"""How many pages a range has: less than a huge page, a whole one, more."""


class HugeWorld(World):
    """Ranges are cut at the end of the pages that are used, so that few of them have holes."""

    base = 0x20_0000_0000 // 4096 - HUGE_PAGES
    pages = 2 * HUGE_PAGES
    frames = 8192
    file_pages = 2 * HUGE_PAGES
    most_pages = 5 * HUGE_PAGES
    most_processes = 2
    heap_gfn, alias_gfn = 4 * HUGE_PAGES, 8 * HUGE_PAGES

    def _pages(self, process: Process, page: int, count: int) -> range:
        size = SIZES[(count - 1) % len(SIZES)]
        if page < PAGES:
            first = self.base + EDGES[page]
            return range(first, min(first + size, self.base + self.pages))
        if page < PAGES + HEAP_PAGES:
            return range(HEAP + page - PAGES, HEAP + page - PAGES + min(size, HEAP_PAGES))
        mapped = sorted(process.model.pages) or [self.base]
        return range(mapped[page * 97 % len(mapped)], mapped[page * 97 % len(mapped)] + size)

    def target(self, choice: int, count: int) -> int:
        return self.base + max(min(EDGES[choice % PAGES], self.pages - count), 0)
