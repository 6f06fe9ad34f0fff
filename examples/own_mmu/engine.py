"""A secondary MMU in a page: a copy engine that works on a buffer of a process, by a page table and a TLB of its own.

The process may unmap, swap, copy or move its memory whenever it likes. ``TableMmu`` hears of it and does in the right
order what has to be done; here is what it cannot know: how an entry is set and cleared, and how the TLB is emptied.
"""

from __future__ import annotations

from xipvm.testing import PAGE_SIZE, READ, WRITE, Mm, TableMmu


class Engine(TableMmu):
    """The engine, on ``pages`` pages of ``mm`` from ``hva`` on. Close it with ``destroy``."""

    def __init__(self, mm: Mm, hva: int, pages: int) -> None:
        self.table: dict[int, tuple[int, bool]] = {}
        self.tlb: dict[int, tuple[int, bool]] = {}
        super().__init__(mm, hva, pages, name="engine0")

    # What TableMmu asks for

    def set_entry(self, page: int, pfn: int, *, write: bool) -> None:
        """Frame and writability of ``page``."""
        self.table[page] = pfn, write

    def clear_entries(self, first: int, last: int) -> None:
        """Forget pages ``[first, last)``."""
        for page in [page for page in self.table if first <= page < last]:
            del self.table[page]

    def flush_tlbs(self) -> None:
        """Forget what was read from the table."""
        self.tlb.clear()
        self.tlb_flushed(0, "invalidate")

    def translate(self, page: int) -> tuple[int, bool] | None:
        """What the table has for ``page``."""
        return self.table.get(page)

    # The engine

    def frame(self, page: int, access: int) -> int:
        """The frame of an access, which has to follow at once: by the TLB, else by the table, else by a fault."""
        entry = self.tlb.get(page)
        if entry is None or (access == WRITE and not entry[1]):
            entry = self.tlb[page] = self.entry(page, access)
            self.tlb_filled(0, page, entry[0], write=entry[1])
        return entry[0]

    def copy(self, source: int, target: int, pages: int = 1) -> None:
        """Copy pages from ``source`` on to those from ``target`` on. Raises GuestAccessError where one is missing."""
        for n in range(pages):
            data = self.dma_read(self.frame(source + n, READ), PAGE_SIZE)
            self.dma_write(self.frame(target + n, WRITE), data)


if __name__ == "__main__":
    from xipvm.testing import MADV_DONTNEED, PROT_READ, PROT_WRITE, open_scene

    with open_scene() as scene:
        mm = scene.mm()
        buffer = mm.mmap(4 * PAGE_SIZE, PROT_READ | PROT_WRITE)
        engine = scene.watch(Engine(mm, buffer, 4))
        mm.write(buffer, b"first")
        engine.copy(0, 2, pages=2)
        print(mm.read(buffer + 2 * PAGE_SIZE, 5), sorted(engine.table))
        mm.madvise(buffer, PAGE_SIZE, MADV_DONTNEED)
        print(sorted(engine.table), engine.tlb)
