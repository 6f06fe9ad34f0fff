"""Who maps the pages of a file at the end of a recorded run: processes by their entries, guests by theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.pte import EXEC, HUGE, WRITE
from xipvm.trace.events import Event


class Mappers:
    """Follows the events of a trace. Files go by their names without directories, as events have them."""

    def __init__(self) -> None:
        self._areas: list[tuple[str, int, int, str, int]] = []
        self._entries: dict[tuple[str, int], str] = {}
        self._slots: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._shadow: dict[tuple[str, int], str] = {}
        self._huge_shadow: dict[tuple[str, int], int] = {}

    def feed(self, events: Iterable[Event]) -> None:
        """Takes events, in their order."""
        handlers: dict[str, Callable[..., None]] = {
            "xip_map": self._map,
            "vma_unmap": self._unmap,
            "pte_set": self._set,
            "pte_clear": self._clear,
            "memslot_set": self._slot,
            "memslot_delete": self._no_slot,
            "pte_move": self._move,
            "vma_remap": self._remap,
            "spte_set": self._shadow_set,
            "spte_set_huge": self._shadow_set_huge,
            "spte_zap": self._shadow_zap,
        }
        for event in events:
            handler = handlers.get(event.kind)
            if handler is not None:
                handler(**event.fields)

    def of(self, name: str) -> dict[int, list[str]]:
        """By page of the file: who maps it, a phrase each."""
        found: defaultdict[int, list[str]] = defaultdict(list)
        for mm, start, end, file, pgoff in self._areas:
            if file != name:
                continue
            for page in range(start, end):
                rights = self._entries.get((mm, page))
                if rights is None:
                    continue
                found[pgoff + page - start].append(f"{mm} at {page << PAGE_SHIFT:#x} {rights}")
                for (vm, _), (gfn, pages, first) in self._slots.items():
                    at = gfn + page - first
                    if first <= page < first + pages and (vm, at) in self._shadow:
                        found[pgoff + page - start].append(f"{vm} at {at << PAGE_SHIFT:#x} {self._shadow[vm, at]}")
        return dict(found)

    def _map(self, file: str, mm: str, start: int, end: int, pgoff: int) -> None:
        self._unmap(mm, start, end)
        self._areas.append((mm, start >> PAGE_SHIFT, end >> PAGE_SHIFT, file, pgoff))

    def _unmap(self, mm: str, start: int, end: int) -> None:
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        kept = []
        for area in self._areas:
            owner, lo, hi, file, pgoff = area
            if owner != mm or hi <= first or last <= lo:
                kept.append(area)
                continue
            if lo < first:
                kept.append((owner, lo, first, file, pgoff))
            if last < hi:
                kept.append((owner, last, hi, file, pgoff + last - lo))
        self._areas = kept

    def _set(self, mm: str, hva: int, pfn: int, flags: int) -> None:
        rights = f"r{'w' if flags & WRITE else '-'}{'x' if flags & EXEC else '-'}"
        first = hva >> PAGE_SHIFT
        for page in range(first, first + (HUGE_PAGES if flags & HUGE else 1)):
            self._entries[mm, page] = rights

    def _clear(self, mm: str, start: int, end: int, pages: object) -> None:
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        for key in [key for key in self._entries if key[0] == mm and first <= key[1] < last]:
            del self._entries[key]

    def _slot(self, vm: str, slot: int, gfn: int, pages: int, hva: int, flags: int) -> None:
        self._slots[vm, slot] = gfn, pages, hva >> PAGE_SHIFT

    def _no_slot(self, vm: str, slot: int) -> None:
        self._slots.pop((vm, slot), None)

    def _move(self, mm: str, start: int, end: int, to: int, length: int, pages: object) -> None:
        first, last, by = start >> PAGE_SHIFT, end >> PAGE_SHIFT, (to - start) >> PAGE_SHIFT
        places = [place for place in self._entries if place[0] == mm and first <= place[1] < last]
        rights = [self._entries.pop(place) for place in places]
        self._entries.update({(mm, page + by): each for (_, page), each in zip(places, rights, strict=True)})

    def _remap(self, mm: str, start: int, end: int, to: int, pages: int) -> None:
        self._unmap(mm, start, end)  # the new place is said to be mapped

    def _shadow_set(self, vm: str, gfn: int, pfn: int, rights: str) -> None:
        self._shadow[vm, gfn] = rights

    def _shadow_set_huge(self, vm: str, gfn: int, pages: int, pfn: int, rights: str) -> None:
        self._huge_shadow[vm, gfn] = pages
        self._shadow.update({(vm, each): rights for each in range(gfn, gfn + pages)})

    def _shadow_zap(self, vm: str, start: int, end: int, pages: object) -> None:
        for (owner, first), count in list(self._huge_shadow.items()):
            if owner == vm and first < end and start < first + count:  # they go as a whole
                start, end = min(start, first), max(end, first + count)
                del self._huge_shadow[owner, first]
        for key in [key for key in self._shadow if key[0] == vm and start <= key[1] < end]:
            del self._shadow[key]
