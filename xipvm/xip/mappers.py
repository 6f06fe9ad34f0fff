"""Who maps the pages of a file at the end of a recorded run: processes by their entries, guests by theirs.

A file is what ``xip_file`` says: an inode of an image. An entry counts if its frame is a block of the image, or stands
for a hole; a private copy of a page shows the file no longer.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, format_size
from xipvm.mmu.frames import HUGE_PAGES, ZERO_PFN
from xipvm.mmu.pte import EXEC, HUGE, MAPPED, PRESENT, WRITE
from xipvm.trace.events import Event, Runs
from xipvm.xip.inode import Identity

HOLE: Final = -1
"""What a page is that has no block."""


class Mapping(NamedTuple):
    """One who maps a page: by an entry of ``size`` bytes, as block ``block`` of the image, or as a HOLE."""

    who: str
    address: int
    rights: str
    size: int
    block: int

    def __str__(self) -> str:
        huge = "" if self.size == PAGE_SIZE else f" {format_size(self.size)}"
        return f"{self.who} at {self.address:#x} {self.rights}{huge}"

    def later(self, pages: int) -> Mapping:
        """The same one, so many pages further on."""
        return self._replace(
            address=self.address + (pages << PAGE_SHIFT), block=self.block if self.block == HOLE else self.block + pages
        )


class _Area(NamedTuple):
    """Pages ``[start, end)`` of ``mm`` show the file from page ``pgoff`` on."""

    mm: str
    start: int
    end: int
    file: str
    pgoff: int

    def cut(self, first: int, last: int) -> Iterator[_Area]:
        """What is left without the pages ``[first, last)``."""
        if self.start < first:
            yield self._replace(end=min(self.end, first))
        if last < self.end:
            start = max(self.start, last)
            yield self._replace(start=start, pgoff=self.pgoff + start - self.start)


class _Shadow(NamedTuple):
    """A guest's entry; ``pages``: how many it maps."""

    pfn: int
    rights: str
    pages: int = 1


class Mappers:
    """Follows the events of a trace."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, Identity]] = {}
        """Those of images that were ever mapped, by what events call them: a name, and which files they are."""
        self.nameless = False
        """Files were mapped of which the trace does not say which they are."""
        self._areas: list[_Area] = []
        self._entries: defaultdict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._slots: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._watched: dict[str, str] = {}
        self._shadow: defaultdict[str, dict[int, _Shadow]] = defaultdict(dict)
        self._huge_shadow: dict[tuple[str, int], int] = {}
        self._chiplets: defaultdict[tuple[str, int], dict[int, _Shadow]] = defaultdict(dict)
        """Where a guest has TLBs and no entries."""
        self._holes: dict[int, int] = {ZERO_PFN: 1}
        """The frames that stand for holes, as runs."""

    def feed(self, events: Iterable[Event]) -> None:
        """Takes events, in their order."""
        handlers: dict[str, Callable[..., None]] = {
            "xip_file": self._file,
            "xip_map": self._map,
            "xip_sparse_page": self._sparse_page,
            "dax_entry_huge": self._huge_entry,
            "page_free": self._freed,
            "vma_unmap": self._unmap,
            "mm_fork": self._fork,
            "mm_exit": self._exit,
            "pte_set": self._set,
            "pte_clear": self._clear,
            "pte_nonpresent": self._nonpresent,
            "pte_protect": self._protect,
            "pte_copy": self._copy,
            "pte_move": self._move,
            "pmd_split": self._split,
            "mmu_notifier_register": self._watch,
            "memslot_set": self._slot,
            "memslot_delete": self._no_slot,
            "spte_set": self._shadow_set,
            "spte_set_huge": self._shadow_set_huge,
            "spte_restore": self._shadow_restore,
            "spte_protect": self._shadow_protect,
            "spte_age": self._shadow_age,
            "spte_zap": self._shadow_zap,
            "tlb_dropin": self._dropin,
            "tlb_invalidate": self._invalidate,
        }
        for event in events:
            handler = handlers.get(event.kind)
            if handler is not None:
                handler(**event.fields)

    def same(self, wanted: Identity) -> list[str]:
        """The files that are ``wanted``, as events call them."""
        return [file for file, (_, identity) in self.files.items() if _same(identity, wanted)]

    def of(self, file: str) -> dict[int, list[Mapping]]:
        """By page of the file: who maps it. An entry whose frame is not the file's, a private copy, does not."""
        base = self.files[file][1].base if file in self.files else None
        found: defaultdict[int, list[Mapping]] = defaultdict(list)
        for area in self._areas:
            if area.file == file:
                for page, mapping in self._seen(area, base):
                    found[area.pgoff + page - area.start].append(mapping)
        return dict(found)

    def _seen(self, area: _Area, base: int | None) -> Iterator[tuple[int, Mapping]]:
        entries = self._entries[area.mm]
        for page in _inside(entries, area.start, area.end):
            pfn, flags = entries[page]
            block = self._block(pfn, base)
            if block is not None:
                size = PAGE_SIZE * (HUGE_PAGES if flags & HUGE else 1)
                yield page, Mapping(area.mm, page << PAGE_SHIFT, _rights(flags), size, block)
        for (vm, _), (gfn, pages, first) in self._slots.items():
            start, end = max(area.start, first), min(area.end, first + pages)
            if self._watched.get(vm, area.mm) != area.mm or start >= end:
                continue
            tables = [(vm, self._shadow[vm])]
            tables += [(f"{vm} chiplet {n}", tlb) for (owner, n), tlb in sorted(self._chiplets.items()) if owner == vm]
            for who, table in tables:
                for at in _inside(table, gfn + start - first, gfn + end - first):
                    pfn, rights, count = table[at]
                    block = self._block(pfn, base)
                    if block is not None:
                        yield first + at - gfn, Mapping(who, at << PAGE_SHIFT, rights, count << PAGE_SHIFT, block)

    def _block(self, pfn: int, base: int | None) -> int | None:
        """The block that a frame is, HOLE, or None if it is anything else."""
        if any(first <= pfn < first + count for first, count in self._holes.items()):
            return HOLE
        return None if base is None or pfn < base else pfn - base

    # ---- files and areas

    def _file(self, file: str, name: str, **identity: Any) -> None:
        self.files[file] = name, Identity(**identity)

    def _map(self, file: str, mm: str, start: int, end: int, pgoff: int) -> None:
        self.nameless |= file not in self.files
        self._unmap(mm, start, end)
        self._areas.append(_Area(mm, start >> PAGE_SHIFT, end >> PAGE_SHIFT, file, pgoff))

    def _sparse_page(self, pfn: int) -> None:
        self._holes[pfn] = 1

    def _huge_entry(self, file: str, pgoff: int, count: int, pfn: int, hole: bool) -> None:
        if hole:
            self._holes[pfn] = count

    def _freed(self, pages: Runs) -> None:
        if len(self._holes) > 1:
            for first, count in pages:
                for hole in [hole for hole in self._holes if first <= hole < first + count]:
                    del self._holes[hole]

    def _unmap(self, mm: str, start: int, end: int) -> None:
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        kept: list[_Area] = []
        for area in self._areas:
            kept += area.cut(first, last) if area.mm == mm else (area,)
        self._areas = kept

    def _fork(self, mm: str, child: str) -> None:
        self._areas += [area._replace(mm=child) for area in self._areas if area.mm == mm]

    def _exit(self, mm: str) -> None:
        self._areas = [area for area in self._areas if area.mm != mm]
        self._entries.pop(mm, None)

    # ---- entries of processes

    def _set(self, mm: str, hva: int, pfn: int, flags: int) -> None:
        self._put(mm, hva, HUGE_PAGES if flags & HUGE else 1, pfn, flags)

    def _split(self, mm: str, start: int, end: int, pfn: int, flags: int) -> None:
        self._put(mm, start, (end - start) >> PAGE_SHIFT, pfn, flags & ~HUGE)

    def _put(self, mm: str, hva: int, count: int, pfn: int, flags: int) -> None:
        first = hva >> PAGE_SHIFT
        if not flags & MAPPED:
            _drop(self._entries[mm], first, first + count)
            return
        step = 1 if pfn else 0  # the zero page, so many times
        self._entries[mm].update({first + n: (pfn + n * step, flags) for n in range(count)})

    def _clear(self, mm: str, start: int, end: int, pages: Runs) -> None:
        entries = self._entries[mm]
        mapped = _inside(entries, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        all_of_them = sum(count for _, count in pages) == len(mapped)
        for page in mapped:
            if all_of_them or any(first <= entries[page][0] < first + count for first, count in pages):
                del entries[page]

    def _nonpresent(self, mm: str, hva: int, entry: str, value: int) -> None:
        self._entries[mm].pop(hva >> PAGE_SHIFT, None)

    def _protect(self, mm: str, start: int, end: int, flags: int) -> None:
        entries = self._entries[mm]
        for page in _inside(entries, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            pfn, before = entries[page]
            entries[page] = pfn, flags & ~HUGE | before & HUGE

    def _copy(self, mm: str, child: str, start: int, end: int) -> None:
        entries = self._entries[mm]
        pages = _inside(entries, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        self._entries[child].update({page: entries[page] for page in pages})

    def _move(self, mm: str, start: int, end: int, to: int, length: int, pages: Runs) -> None:
        entries, by = self._entries[mm], (to - start) >> PAGE_SHIFT
        places = _inside(entries, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        entries.update({page + by: entry for page, entry in [(page, entries.pop(page)) for page in places]})

    # ---- entries of guests

    def _watch(self, mm: str, notifier: str, **_: Any) -> None:
        self._watched[notifier] = mm

    def _slot(self, vm: str, slot: int, gfn: int, pages: int, hva: int, flags: int) -> None:
        self._slots[vm, slot] = gfn, pages, hva >> PAGE_SHIFT

    def _no_slot(self, vm: str, slot: int) -> None:
        self._slots.pop((vm, slot), None)

    def _shadow_set(self, vm: str, gfn: int, pfn: int, rights: str) -> None:
        self._shadow[vm][gfn] = _Shadow(pfn, rights)

    def _shadow_set_huge(self, vm: str, gfn: int, pages: int, pfn: int, rights: str) -> None:
        self._huge_shadow[vm, gfn] = pages
        self._shadow[vm].update({gfn + n: _Shadow(pfn + n, rights, pages) for n in range(pages)})

    def _shadow_restore(self, vm: str, gfn: int, pages: int, pfn: int, rights: str) -> None:
        self._shadow[vm].update({gfn + n: _Shadow(pfn + n, rights, pages) for n in range(pages)})

    def _shadow_protect(self, vm: str, start: int, end: int) -> None:
        shadow = self._shadow[vm]
        for gfn in _inside(shadow, start, end):
            shadow[gfn] = shadow[gfn]._replace(rights=shadow[gfn].rights.replace("w", ""))

    def _shadow_age(self, vm: str, start: int, end: int) -> None:
        shadow = self._shadow[vm]
        for gfn in _inside(shadow, start, end):
            shadow[gfn] = shadow[gfn]._replace(rights="old")

    def _shadow_zap(self, vm: str, start: int, end: int, pages: Runs) -> None:
        for (owner, first), count in list(self._huge_shadow.items()):
            if owner == vm and first < end and start < first + count:  # they go as a whole
                start, end = min(start, first), max(end, first + count)
                del self._huge_shadow[owner, first]
        _drop(self._shadow[vm], start, end)

    def _dropin(self, vm: str, chiplet: int, gfn: int, pfn: int, rights: str) -> None:
        self._chiplets[vm, chiplet][gfn] = _Shadow(pfn, rights)

    def _invalidate(self, vm: str, chiplet: int, start: int, end: int, pages: Runs) -> None:
        _drop(self._chiplets[vm, chiplet], start, end)


def _same(one: Identity, other: Identity) -> bool:
    """Whether two runs mean one file. An image that is not at its old path any more goes by what tells it apart."""
    if one[1:4] != other[1:4]:
        return False
    try:
        return os.path.samefile(one.image, other.image)
    except (OSError, ValueError):
        return True


def _inside(table: dict[int, Any], first: int, end: int) -> list[int]:
    """The pages ``[first, end)`` that ``table`` has, ascending."""
    if end - first < len(table):
        return [page for page in range(first, end) if page in table]
    return sorted(page for page in table if first <= page < end)


def _drop(table: dict[int, Any], first: int, end: int) -> None:
    for page in _inside(table, first, end):
        del table[page]


def _rights(flags: int) -> str:
    return "".join(letter if flags & bit else "-" for letter, bit in (("r", PRESENT), ("w", WRITE), ("x", EXEC)))
