"""I16 to I18, and I5 for blocks: files that are used in place, by what their operations say.

* ``xip_map`` tells which pages of a file an area shows; ``xip_sparse_page`` which frame a hole is mapped as. In a DAX
  file that is the zero page; or 2 MiB of holes are mapped at once, as what ``dax_entry_huge`` says.
* From ``xip_allocate`` on a page is no hole. Who still maps the hole then has to lose it before ``xip_unmapped``; and
  nobody may map it again from the allocation on (I16).
* Nobody may write to the page that stands for holes (I17): by an entry of the host, a shadow entry, or a TLB.
* The blocks of ``xip_free`` may be another file's next: from there until they are allocated again no entry of the host
  maps one, no TLB or shadow entry translates to one, and nobody has one pinned (I5).
* ``xip_read`` says what was asked for, what came of it and how much was stored in the buffer (I18).

What was said of a page of a file belongs to the history of wherever that page is mapped: the last of each kind is kept.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT
from xipvm.check.rules import Fields
from xipvm.check.world import WRITE
from xipvm.trace.events import Event

if TYPE_CHECKING:
    from xipvm.check.oracle import Oracle

_ZERO_PFN: Final = 0
_HUGE: Final = 1 << 7
_HUGE_PAGES: Final = 512
_SINGLE: Final = ("xip_allocate", "xip_unmapped", "dax_entry")
_MANY: Final = ("xip_allocate_huge", "xip_unmapped_huge", "dax_entry_huge", "xip_free")
"""What is said of one page of a file, and of many."""
_MANY_KEPT: Final = 64
_DIRTY: Final = 1 << 6
"""Of the flags of ``pte_set``, as WRITE and HUGE are (mmu/pte.py)."""


class XipFiles:
    """Judges one oracle's events. Costs nothing until a file is mapped in place."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._sparse = -1
        self._areas: dict[str, list[tuple[int, int, str, int]]] = {}
        """By mm: first page, end, file and its page at the first."""
        self._filled: dict[tuple[str, int], int] = {}
        """Pages of files that have a block, and the event that gave it."""
        self._shown: dict[tuple[str, int], tuple[str, int, int]] = {}
        """Where holes are mapped: by mm and first page, the file, its first page, and how many."""
        self._zeros = range(0)
        """The frames of the huge zero page, as far as a file has it."""
        self._free: dict[int, int] = {}
        """Blocks that are no file's, and the event that says so."""
        self._said: defaultdict[tuple[str, int], dict[str, Event]] = defaultdict(dict)
        """By file and page, by kind: the last event of the page."""
        self._said_of_many: defaultdict[str, deque[Event]] = defaultdict(lambda: deque(maxlen=_MANY_KEPT))
        """By file: the last events of more than a page."""
        self._watching = self._watching_zeros = False
        oracle.on("xip_map", self._mapped)
        oracle.on("xip_sparse_page", self._sparse_page)
        oracle.on("xip_allocate", self._allocated)
        oracle.on("xip_allocate_huge", self._allocated)
        oracle.on("xip_unmapped", self._unmapped)
        oracle.on("xip_unmapped_huge", self._unmapped)
        oracle.on("dax_entry_huge", self._huge_entry)
        oracle.on("xip_free", self._freed)
        oracle.on("xip_read", self._read)
        oracle.on("mm_fork", self._forked)
        for kind in _SINGLE:
            oracle.on(kind, self._remember)
        for kind in _MANY:
            oracle.on(kind, self._remember_many)

    # ---- what reports tell

    def _remember(self, event: Event, fields: Fields) -> None:
        self._said[fields["file"], fields["pgoff"]][event.kind] = event

    def _remember_many(self, event: Event, fields: Fields) -> None:
        self._said_of_many[fields["file"]].append(event)

    def page_at(self, mm: str, hva: int) -> tuple[str, int] | None:
        """The file and its page that address ``hva`` of ``mm`` shows, if it is one of a file used in place."""
        page = hva >> PAGE_SHIFT
        for start, stop, file, pgoff in self._areas.get(mm, ()):
            if start <= page < stop:
                return file, pgoff + page - start
        return None

    def is_hole(self, pfn: int) -> bool:
        """Whether frame ``pfn`` stands for holes: what happens to it is no page's own history."""
        return bool(self._areas) and (pfn in (_ZERO_PFN, self._sparse) or pfn in self._zeros)

    def said(self, at: tuple[str, int] | None, pfn: int | None) -> list[Event]:
        """The last event of each kind that was about this page of a file, or about many with frame ``pfn``."""
        found = {} if at is None else dict(self._said.get(at, {}))
        for file, events in self._said_of_many.items():
            for event in events:
                if (at is not None and file == at[0] and at[1] in _pages(event)) or pfn in _frames(event):
                    found[event.kind] = event
        return list(found.values())

    def _mapped(self, event: Event, fields: Fields) -> None:
        if not self._watching:
            self._watching = True
            oracle = self._oracle
            oracle.on("pte_set", self._entry)
            oracle.on("pte_clear", self._cleared)
            oracle.on("pte_copy", self._copied)
            oracle.on("pte_move", self._moved)
            oracle.on("pte_protect", self._protected)
            oracle.on("vma_unmap", self._area_gone)
            oracle.on("spte_set", self._shadow)
            oracle.on("spte_set_huge", self._shadow)
            oracle.on("tlb_insert", self._shadow)
            oracle.on("device_tlb_insert", self._shadow)
        first, end = fields["start"] >> PAGE_SHIFT, fields["end"] >> PAGE_SHIFT
        self._area_gone(event, fields)
        self._areas[fields["mm"]].append((first, end, fields["file"], fields["pgoff"]))

    def _area_gone(self, event: Event, fields: Fields) -> None:
        first, end = fields["start"] >> PAGE_SHIFT, fields["end"] >> PAGE_SHIFT
        left = []
        for start, stop, file, pgoff in self._areas.get(fields["mm"], ()):
            if start < first:
                left.append((start, min(stop, first), file, pgoff))
            if stop > end:
                at = max(start, end)
                left.append((at, stop, file, pgoff + at - start))
        self._areas[fields["mm"]] = left

    def _forked(self, event: Event, fields: Fields) -> None:
        if fields["mm"] in self._areas:
            self._areas[fields["child"]] = list(self._areas[fields["mm"]])

    def _copied(self, event: Event, fields: Fields) -> None:
        mm, first, end = fields["mm"], fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        for (owner, page), hole in list(self._shown.items()):
            if owner == mm and first <= page < end:
                self._shown[fields["child"], page] = hole

    def _moved(self, event: Event, fields: Fields) -> None:
        mm, first, end = fields["mm"], fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        by = (fields["to"] - fields["start"]) >> PAGE_SHIFT
        places = [place for place in self._shown if place[0] == mm and first <= place[1] < end]
        holes = [self._shown.pop(place) for place in places]
        self._shown.update({(mm, page + by): hole for (_, page), hole in zip(places, holes, strict=True)})

    def _sparse_page(self, event: Event, fields: Fields) -> None:
        self._sparse = fields["pfn"]

    def _huge_entry(self, event: Event, fields: Fields) -> None:
        if not fields["hole"]:
            return
        if not self._watching_zeros:
            self._watching_zeros = True
            self._oracle.on("page_free", self._zeros_freed)
        self._zeros = range(fields["pfn"], fields["pfn"] + fields["count"])

    def _zeros_freed(self, event: Event, fields: Fields) -> None:
        if any(first <= self._zeros.start < first + count for first, count in fields["pages"]):
            self._zeros = range(0)

    # ---- I16

    def _entry(self, event: Event, fields: Fields) -> None:
        mm, page = fields["mm"], fields["hva"] >> PAGE_SHIFT
        self._shown.pop((mm, page), None)
        pfn, count = fields["pfn"], _HUGE_PAGES if fields["flags"] & _HUGE else 1
        free = next((block for block in range(pfn, pfn + count) if block in self._free), None) if self._free else None
        if free is not None:
            what = f"block {free:#x} is mapped, and is no file's since #{self._free[free]}"
            self._oracle.broken("I5", what, event, hva=fields["hva"], pfn=free)
        if pfn == self._sparse or pfn in self._zeros:
            self._no_writer(event, "an entry", bool(fields["flags"] & (WRITE | _DIRTY)), fields["hva"])
        elif pfn != _ZERO_PFN:
            return
        for start, stop, file, pgoff in self._areas.get(mm, ()):
            if start <= page < stop:
                first = pgoff + page - start
                self._shown[mm, page] = file, first, count
                self._oracle.checks["I16"] += 1
                filled = next((each for each in range(first, first + count) if (file, each) in self._filled), None)
                if filled is not None:
                    since = self._filled[file, filled]
                    what = f"page {filled:#x} of {file} is mapped as a hole, and has a block since #{since}"
                    hva = (page + filled - first) << PAGE_SHIFT
                    self._oracle.broken("I16", what, event, hva=hva, at=(file, filled))
                return

    def _cleared(self, event: Event, fields: Fields) -> None:
        if not self._shown:
            return
        mm, first, end = fields["mm"], fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        for key in [key for key in self._shown if key[0] == mm and first <= key[1] < end]:
            del self._shown[key]

    def _allocated(self, event: Event, fields: Fields) -> None:
        file, first, pfn = fields["file"], fields["pgoff"], fields["pfn"]
        for n in range(fields.get("count", 1)):
            self._filled[file, first + n] = event.seq
            self._free.pop(pfn + n, None)

    def _unmapped(self, event: Event, fields: Fields) -> None:
        file, first, count = fields["file"], fields["pgoff"], fields.get("count", 1)
        self._oracle.checks["I16"] += 1
        for (mm, page), (whose, shown, many) in self._shown.items():
            if whose == file and shown < first + count and first < shown + many:
                hole = max(first, shown)
                hva = (page + hole - shown) << PAGE_SHIFT
                what = f"page {hole:#x} of {file} has a block, and {mm} still maps the hole at {hva:#x}"
                self._oracle.broken("I16", what, event, mm=mm, hva=hva, at=(file, hole))
                return

    def _freed(self, event: Event, fields: Fields) -> None:
        file, first, end = fields["file"], fields["first"], fields["end"]
        for hole in [hole for hole in self._filled if hole[0] == file and first <= hole[1] < end]:
            del self._filled[hole]
        blocks = {pfn for start, count in fields["pages"] for pfn in range(start, start + count)}
        self._free.update(dict.fromkeys(blocks, event.seq))
        self._oracle.checks["I5"] += len(blocks)
        for pfn, who in self._holders(blocks):
            what = f"block {pfn:#x} of {file} is freed, but {who}"
            self._oracle.broken("I5", what, event, pfn=pfn, at=self._page_of(file, pfn))

    def _page_of(self, file: str, pfn: int) -> tuple[str, int] | None:
        """The page of ``file`` that got block ``pfn`` last, as far as is known."""
        told = [
            (event.seq, page)
            for (whose, page), kinds in self._said.items()
            for event in kinds.values()
            if whose == file and event.fields.get("pfn") == pfn
        ]
        return (file, max(told)[1]) if told else None

    def _holders(self, blocks: set[int]) -> Iterator[tuple[int, str]]:
        """Who still has one of ``blocks``, each with the first that does."""
        world = self._oracle.world
        for process in world.mms.values():
            for page, (pfn, _) in process.entries.items():
                if pfn in blocks:
                    yield pfn, f"{process.name} maps it at {page << PAGE_SHIFT:#x}"
        for pfn in blocks:
            if pfn in world.holders:
                yield pfn, "; ".join(world.who_holds(pfn))
        for vm in world.vms.values():
            for gfn, pfn in vm.pins.items():
                if pfn in blocks:
                    yield pfn, f"{vm.name} has it pinned as guest frame {gfn:#x}"

    # ---- I17

    def _protected(self, event: Event, fields: Fields) -> None:
        if not self._shown or not fields["flags"] & WRITE:
            return
        mm, first, end = fields["mm"], fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        for shown, page in self._shown:
            if shown == mm and first <= page < end:
                self._no_writer(event, "an entry", True, page << PAGE_SHIFT)

    def _shadow(self, event: Event, fields: Fields) -> None:
        if fields["pfn"] == self._sparse or fields["pfn"] in self._zeros:
            self._no_writer(event, "a secondary MMU", "w" in fields["rights"], fields.get("hva"))

    def _no_writer(self, event: Event, who: str, writes: bool, hva: int | None) -> None:
        self._oracle.checks["I17"] += 1
        if writes:
            what = f"{who} may write to the page that stands for every hole"
            self._oracle.broken("I17", what, event, hva=hva, gfn=event.fields.get("gfn"))

    # ---- I18

    def _read(self, event: Event, fields: Fields) -> None:
        self._oracle.checks["I18"] += 1
        count, result, stored = fields["count"], fields["result"], fields["stored"]
        if result > count or stored > count:
            what = f"a read of {count} bytes of {fields['file']} returned {result}, and stored {stored}"
        elif stored != max(result, 0):
            what = f"a read of {fields['file']} stored {stored} bytes, and returned {result}"
        elif not count and result:
            what = f"a read of no bytes of {fields['file']} returned {result}"
        else:
            return
        self._oracle.broken("I18", what, event)


def _pages(event: Event) -> range:
    """The pages of its file that an event of many is about."""
    fields = event.fields
    if event.kind == "xip_free":
        return range(fields["first"], fields["end"])
    return range(fields["pgoff"], fields["pgoff"] + fields["count"])


def _frames(event: Event) -> range:
    """The blocks, from one on, that an event of many is about; none where the history finds it by them."""
    fields = event.fields
    if "pfn" not in fields or fields.get("hole"):
        return range(0)
    return range(fields["pfn"], fields["pfn"] + fields["count"])
