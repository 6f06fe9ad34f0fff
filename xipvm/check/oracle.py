"""The ordering oracle: a sink that judges every event by the protocol of MMU notifiers.

Attach it to a trace (``trace.attach(Oracle())``) before the machine is built, or feed it a recorded one. It reads
events only, so it judges any secondary MMU that tells what it does. The order that it holds everybody to::

    range start → shadow entries removed, TLBs flushed → start returns → primary entries change → range end
                                                                   primary TLB flush → frames are freed

In the protocol of 2008 a single page may do without a range: its entry is cleared, the primary TLB is flushed, and
before anything else the notifiers are told of the page.

Not demanded, because the kernel does not keep it either: minimal ranges, an end behind the flush or behind the freeing,
a word when rights are raised, a change inside every range, a word about where mremap moves to, about migration entries
that go away, or about MADV_COLD.

When an event breaks an invariant the oracle remembers a :class:`Violation` and calls ``stop`` with it. What it keeps
is bounded by the memory that is touched: entries go when they are unmapped, a page's history is sorted out.

The rules here say what holds for an event of their kind in every case. For the usual case of the kinds that come most
often usual.pyx comes to the same without asking them: change both, tests/check/test_usual.py compares.

The file is long because it has a method for each kind of event, all of which judge by one state. What only some
secondary MMUs or files do is judged elsewhere (retry.py, pins.py, xip.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from xipvm.address import PAGE_SHIFT
from xipvm.check import pins, retry, rules, xip
from xipvm.check.explain import Reader, chain, mm_of, reads
from xipvm.check.rules import Fields
from xipvm.check.usual import Judge
from xipvm.check.violation import INVARIANTS, Violation
from xipvm.check.world import WRITE, Area, Entry, Range, Vm
from xipvm.errors import BadInput
from xipvm.trace.events import Event
from xipvm.trace.history import History

VIOLATION_LIMIT: Final = 100
"""More are not remembered: what follows the first ones follows from them."""
HISTORY: Final = 1 << 15
"""How many events are remembered in any case."""
EACH: Final = 16
"""And how many of every page, besides the last of each kind."""
_MAPPED: Final = 1 << 0 | 1 << 4
"""One of these has every entry of the host's that maps a page: PRESENT, PROTNONE."""
_HUGE: Final = 1 << 7
_HUGE_PAGES: Final = 512
# An entry of the huge zero page maps the zero page, frame 0, so many times.


def _nothing(violation: Violation) -> None:
    pass


@dataclass(slots=True)
class Change:
    """In 2008: an entry that changed outside of every range, so that its notifiers have to be told of the page."""

    mm: str
    page: int
    pfn: int
    actor: str
    event: Event
    told: int = 0
    """The event that tells them."""


class Oracle(Judge):
    """A sink that checks ``invariants`` (names of INVARIANTS, all by default). Raises BadInput for an unknown one.

    ``violations`` is what it found, at most VIOLATION_LIMIT; ``checks`` counts how often each invariant was asked.
    ``stop`` is called with each violation while the event is delivered; what it raises goes to whoever emitted.
    Of the last ``history`` events, and of the last EACH of every page, it knows what they were. Without ``usual`` every
    event goes through the rules in Python: the same verdicts, slower.
    """

    def __init__(
        self,
        invariants: Collection[str] = tuple(INVARIANTS),
        *,
        stop: Callable[[Violation], None] = _nothing,
        history: int = HISTORY,
        usual: bool = True,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(_HANDLERS, INVARIANTS, History(history, each=EACH), usual)
        for name in invariants:
            if name not in INVARIANTS:
                raise BadInput(f"no invariant is called {name!r}; known are {', '.join(INVARIANTS)}")
        self.invariants = frozenset(invariants)
        self.violations: list[Violation] = []
        self.reader = reader
        """Gives reports the first bytes of host frames, while there is host memory."""
        self._stop = stop
        retries, pinned, self._files = retry.Retries(self), pins.Pins(self), xip.XipFiles(self)
        self._rules = [retries, pinned, self._files, *(make(self) for make in rules.RULES)]

    @property
    def returning(self) -> tuple[Range, ...]:
        """Ranges whose start, or whose end if something is owed, may still be telling somebody."""
        return tuple(self._returning)

    def finish(self) -> None:
        """No more events come: every range must have ended, every page must have been told of."""
        for change in self._changes:
            if not change.told:
                self._untold(change)
        for opened in self.world.open.values():
            self.checks["I6"] += 1
            last = self.history.events[-1]
            self.broken("I6", f"range {opened.id} of {opened.mm}, begun at #{opened.seq}, never ended", last)
        for opened in self._returning:
            self._paid(opened, self.history.events[-1])
        for rule in self._rules:
            finish = getattr(rule, "finish", None)
            if finish is not None:
                finish()

    def check(self, events: Iterable[Event]) -> list[Violation]:
        """Judge a whole recorded run; returns what was found."""
        for event in events:
            self(event)
        self.finish()
        return self.violations

    # ---- ranges

    def _on_mmu_notifier_invalidate_range_start(self, event: Event, fields: Fields) -> None:
        start, end = fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)
        opened = Range(fields["range"], fields["mm"], start, end, event.actor, event.seq, event.cause)
        self.checks["I6"] += 1
        if (opened.mm, opened.id) in self.world.open:
            self.broken("I6", f"range {opened.id} begins, but it is open already", event, hva=fields["start"])
        opened.inside.add(event.seq)
        self.last_range = event.seq
        self.world.open[opened.mm, opened.id] = opened
        self._returning.append(opened)

    def _on_mmu_notifier_invalidate_range_end(self, event: Event, fields: Fields) -> None:
        self.checks["I6"] += 1
        self.last_range = event.seq
        opened = self.world.open.pop((fields["mm"], fields["range"]), None)
        if opened is None:
            self.broken("I6", f"range {fields['range']} ends, but never began", event, hva=fields["start"])
        elif opened in self._returning:
            self._returning.remove(opened)
        if opened is not None and opened.owed:
            opened.actor, opened.inside = event.actor, {event.seq}
            self._returning.append(opened)  # its end may still be telling somebody

    def _paid(self, opened: Range, event: Event) -> None:
        """The start of ``opened`` has returned, or its end, until which entries of pinned pages may stay."""
        if opened.owed and (opened.mm, opened.id) not in self.world.open:
            for vm, gfn, entry in opened.owed:
                if vm.sptes.get(gfn) is entry:
                    what = f"{vm.name}'s entry of guest frame {gfn:#x} (frame {entry.pfn:#x}, since #{entry.seq})"
                    self.broken("I3", f"range {opened.id} has ended, but {what} is still there", event, pfn=entry.pfn)

    def _on_mmu_notifier_invalidate_page(self, event: Event, fields: Fields) -> None:
        self.last_range = event.seq

    def _see_told(self, event: Event) -> None:
        """In 2008: between the change of an entry and the word about it, its actor may flush TLBs and nothing else."""
        for change in tuple(self._changes):
            if event.actor != change.actor or event.cause == change.told != 0:
                continue
            if change.told:  # the callbacks have returned
                self._changes.remove(change)
                self._translated(event, change.mm, change.page, (change.pfn, 0), None, 0, ())
            elif event.kind == "mmu_notifier_invalidate_page":
                if event.fields["mm"] == change.mm and event.fields["address"] >> PAGE_SHIFT == change.page:
                    change.told = event.seq
            elif event.kind != "primary_tlb_flush":
                self._changes.remove(change)
                self._untold(change)

    def _untold(self, change: Change) -> None:
        hva = change.page << PAGE_SHIFT
        self.broken("I1", f"the entry of {hva:#x} changed, and nobody was told of the page", change.event, hva=hva)

    # ---- who is told

    def _on_mmu_notifier_register(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        process.notifiers.add(fields["notifier"])
        process.protocol = fields["protocol"]
        vm = self.world.vm(fields["notifier"])
        vm.mm, vm.gone = fields["mm"], False

    def _on_mmu_notifier_unregister(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        process.notifiers.discard(fields["notifier"])
        self.world.release_all(process.devices.pop(fields["notifier"], {}))
        self.world.release_all(process.iotlbs.pop(fields["notifier"], {}))
        vm = self.world.vm(fields["notifier"])
        vm.mm, vm.gone = None, True

    _on_mmu_notifier_put = _on_mmu_notifier_unregister

    def _on_mmu_notifier_release(self, event: Event, fields: Fields) -> None:
        self.world.vm(fields["notifier"]).gone = True

    def _on_mmu_interval_notifier_insert(self, event: Event, fields: Fields) -> None:
        self.world.mm(fields["mm"]).intervals.add(fields["notifier"])
        vm = self.world.vm(fields["notifier"])
        vm.mm, vm.gone = fields["mm"], False

    def _on_mmu_interval_notifier_remove(self, event: Event, fields: Fields) -> None:
        self.world.mm(fields["mm"]).intervals.discard(fields["notifier"])
        vm = self.world.vm(fields["notifier"])
        vm.mm, vm.gone = None, True

    def _on_mm_exit(self, event: Event, fields: Fields) -> None:
        # Whoever was told of the release has nothing left to be told of; see exit_mmap.
        process = self.world.mm(fields["mm"])
        process.intervals.clear()
        process.dead = True

    # ---- primary entries

    def _on_pte_set(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        page, pfn, flags = fields["hva"] >> PAGE_SHIFT, fields["pfn"], fields["flags"]
        for offset in range(_HUGE_PAGES if flags & _HUGE else 1):
            self._set(event, process.name, page + offset, pfn + offset if pfn else pfn, flags)

    def _set(self, event: Event, mm: str, page: int, pfn: int, flags: int) -> None:
        process = self.world.mm(mm)
        self.world.swapped.pop(pfn, None)
        before = process.entries.get(page)
        if before is not None and (before[0] != pfn or before[1] & ~flags & WRITE):
            self._lowered(event, mm, page, before, pfn, flags)
        process.entries[page] = (pfn, flags)

    def _on_mm_cow(self, event: Event, fields: Fields) -> None:
        page, old, new = fields["hva"] >> PAGE_SHIFT, fields["old"], fields["new"]
        self.checks["I11"] += 1
        process = self.world.mm(fields["mm"])
        for thread, tlb in (*process.tlbs.items(), *process.iotlbs.items()):
            seen = tlb.get(page)
            if seen is not None and seen.pfn == old:
                what = f"{thread} still reads frame {old:#x} at {fields['hva']:#x}"
                self.broken("I11", f"frame {new:#x} can be written, but {what}", event, hva=fields["hva"])

    def _on_pte_clear(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        entries = process.entries
        pages = process.mapped(fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT))
        runs = fields["pages"]
        if sum(count for _, count in runs) != len(pages):  # some stay
            gone = {pfn for first, count in runs for pfn in range(first, first + count)}
            pages = [page for page in pages if entries[page][0] in gone]
        if len(pages) == 1:
            process.cleared = pages[0], entries[pages[0]][0]
        self._given_up(process.name, fields["start"], fields["end"])
        for page in pages:
            self._lowered(event, process.name, page, entries.pop(page), None, 0)

    def _on_vma_unmap(self, event: Event, fields: Fields) -> None:
        self._given_up(fields["mm"], fields["start"], fields["end"])

    _on_vma_remap = _on_mm_madvise = _on_vma_unmap

    def _given_up(self, mm: str, start: int, end: int) -> None:
        """Nobody needs what swap entries of bytes ``[start, end)`` stand for, or they are elsewhere now."""
        world = self.world
        for pfn, (whose, page) in tuple(world.swapped.items()):
            if whose == mm and start >> PAGE_SHIFT <= page < -(-end >> PAGE_SHIFT):
                del world.swapped[pfn]

    def _on_pte_nonpresent(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        page = fields["hva"] >> PAGE_SHIFT
        before = process.entries.pop(page, None)
        if fields["entry"] == "swap" and (before is not None or process.cleared[0] == page):
            self.world.swapped[process.cleared[1] if before is None else before[0]] = process.name, page
        if before is not None:
            self._lowered(event, process.name, page, before, None, 0)

    def _on_swap_out(self, event: Event, fields: Fields) -> None:
        self.world.written.pop(fields["pfn"], None)

    def _on_pte_protect(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        flags = fields["flags"]
        for page in process.mapped(fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)):
            before = process.entries[page]
            if not before[1] & _MAPPED:  # a device's: what becomes of it is said by entries of its own
                continue
            if before[1] & ~flags & WRITE:
                self._lowered(event, process.name, page, before, before[0], flags)
            process.entries[page] = (before[0], flags)

    def _on_pmd_split(self, event: Event, fields: Fields) -> None:
        first, flags = fields["pfn"], fields["flags"]
        for offset in range((fields["end"] - fields["start"]) >> PAGE_SHIFT):
            pfn = first + offset if first else first
            self._set(event, fields["mm"], (fields["start"] >> PAGE_SHIFT) + offset, pfn, flags)

    def _on_pte_move(self, event: Event, fields: Fields) -> None:
        process = self.world.mm(fields["mm"])
        start, by = fields["start"] >> PAGE_SHIFT, (fields["to"] - fields["start"]) >> PAGE_SHIFT
        moved = {page: process.entries.pop(page) for page in process.mapped(start, -(-fields["end"] >> PAGE_SHIFT))}
        for page, before in moved.items():
            self._lowered(event, process.name, page, before, None, 0)
            process.entries[page + by] = before

    def _on_pte_copy(self, event: Event, fields: Fields) -> None:
        parent, child = self.world.mm(fields["mm"]), self.world.mm(fields["child"])
        for page in parent.mapped(fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT)):
            child.entries[page] = parent.entries[page]

    def _lowered(self, event: Event, mm: str, page: int, before: tuple[int, int], pfn: int | None, flags: int) -> None:
        """The entry of ``page`` was ``before`` and is ``pfn`` with ``flags`` now, or nothing."""
        world = self.world
        process = world.mms[mm]
        if not process.notifiers and not process.intervals:
            return
        told = tuple(world.covering(mm, page))
        if process.intervals or any(not vm.gone for vm in world.watchers(mm)):
            self.checks["I1"] += 1
            if not told and process.protocol == "2008":
                self._changes.append(Change(mm, page, before[0], event.actor, event))
                return
            if not told:
                hva = page << PAGE_SHIFT
                self.broken("I1", f"the entry of {hva:#x} changes outside of every range", event, hva=hva)
        self._translated(event, mm, page, before, pfn, flags, told)

    def _translated(
        self,
        event: Event,
        mm: str,
        page: int,
        before: tuple[int, int],
        pfn: int | None,
        flags: int,
        told: tuple[Range, ...],
    ) -> None:
        """Nobody may translate ``page`` by ``before`` any more, as far as ``pfn`` with ``flags`` allows less."""
        world = self.world
        hva = page << PAGE_SHIFT
        self.checks["I3"] += 1
        for vm in world.watchers(mm):
            for gfn in vm.gfns(page):
                for table in vm.tables():
                    spte = table.get(gfn)
                    if spte is None or not _stale(spte, before, pfn, flags):
                        continue
                    if told and vm.pins.get(gfn) == spte.pfn:
                        for opened in told:
                            opened.owed.append((vm, gfn, spte))
                        continue
                    late = next((opened for opened in told if opened.returned and spte.seq > opened.seq), None)
                    if late is None:
                        name, how = "I3", "was not removed"
                    else:
                        name, how = "I2", f"was installed inside range {late.id}"
                    what = f"{vm.name}'s entry of guest frame {gfn:#x} (frame {spte.pfn:#x}, since #{spte.seq}) {how}"
                    self.broken(name, f"the entry of {hva:#x} changes, but {what}", event, hva=hva, pfn=spte.pfn)
                self.checks["I10"] += 1
                for vcpu, tlb in world.tlbs.items():
                    seen = tlb.get(gfn)
                    if seen is not None and _stale(seen, before, pfn, flags):
                        what = f"vcpu{vcpu}'s TLB has guest frame {gfn:#x} (frame {seen.pfn:#x}, since #{seen.seq})"
                        self.broken("I10", f"the entry of {hva:#x} changes, but {what}", event, hva=hva, pfn=seen.pfn)

    # ---- frames

    def _on_page_alloc(self, event: Event, fields: Fields) -> None:
        self.world.freed.pop(fields["pfn"], None)
        self.world.written.pop(fields["pfn"], None)

    def _on_page_alloc_huge(self, event: Event, fields: Fields) -> None:
        for first, count in fields["pages"]:
            for pfn in range(first, first + count):
                self.world.freed.pop(pfn, None)

    def _on_page_free(self, event: Event, fields: Fields) -> None:
        world = self.world
        for first, count in fields["pages"]:
            for pfn in range(first, first + count):
                self.checks["I5"] += 1
                if pfn in world.freed:
                    self.broken("I5", f"frame {pfn:#x} is free since #{world.freed[pfn]}", event, pfn=pfn)
                elif pfn in world.holders:
                    who = "; ".join(world.who_holds(pfn))
                    self.broken("I5", f"frame {pfn:#x} is freed, but {who}", event, pfn=pfn)
                written = world.written.pop(pfn, 0)
                if pfn in world.swapped:
                    mm, page = world.swapped.pop(pfn)
                    self.checks["I8"] += 1
                    if written:
                        what = f"what may have been written since #{written} is not in the swap slot of {mm}"
                        hva = page << PAGE_SHIFT
                        self.broken("I8", f"frame {pfn:#x} is freed, but {what}", event, pfn=pfn, hva=hva)
                world.freed[pfn] = event.seq

    # ---- the hosts' own TLBs

    def _on_host_tlb_insert(self, event: Event, fields: Fields) -> None:
        tlb = self.world.mm(fields["mm"]).tlbs.setdefault(fields["thread"], {})
        entry = Entry(fields["pfn"], fields["rights"] == "rw", event.seq)
        self.world.hold(tlb, fields["hva"] >> PAGE_SHIFT, entry)

    def _on_primary_tlb_flush(self, event: Event, fields: Fields) -> None:
        for tlb in self.world.mm(fields["mm"]).tlbs.values():
            self.world.release_range(tlb, fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT))

    def _on_host_tlb_drop(self, event: Event, fields: Fields) -> None:
        tlb = self.world.mm(fields["mm"]).tlbs.get(fields["thread"], {})
        if fields["hva"] is None:
            self.world.release_all(tlb)
            self.world.mm(fields["mm"]).tlbs.pop(fields["thread"], None)
        else:
            self.world.release(tlb, fields["hva"] >> PAGE_SHIFT)

    # ---- TLBs that follow the hosts'

    def _on_device_tlb_insert(self, event: Event, fields: Fields) -> None:
        tlb = self.world.mm(fields["mm"]).devices.setdefault(fields["device"], {})
        entry = Entry(fields["pfn"], fields["rights"] == "rw", event.seq)
        self.world.hold(tlb, fields["hva"] >> PAGE_SHIFT, entry)

    def _on_iotlb_insert(self, event: Event, fields: Fields) -> None:
        process, page, pfn = self.world.mm(fields["mm"]), fields["hva"] >> PAGE_SHIFT, fields["pfn"]
        write = fields["rights"] == "rw"
        self.checks["I4"] += 1
        entry = process.entries.get(page)
        if entry is None or entry[0] != pfn or (write and not entry[1] & WRITE):
            has = "maps nothing" if entry is None else f"maps frame {entry[0]:#x}"
            what = f"{fields['device']} gets frame {pfn:#x} at {fields['hva']:#x}, which {has}"
            self.broken("I4", f"{what}, {'writable' if entry and entry[1] & WRITE else 'not writable'}", event, pfn=pfn)
        self.world.hold(process.iotlbs.setdefault(fields["device"], {}), page, Entry(pfn, write, event.seq))

    def _on_iotlb_drop(self, event: Event, fields: Fields) -> None:
        tlb = self.world.mm(fields["mm"]).iotlbs.get(fields["device"], {})
        self.world.release_range(tlb, fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT))

    def _on_mmu_notifier_arch_invalidate_secondary_tlbs(self, event: Event, fields: Fields) -> None:
        for tlb in self.world.mm(fields["mm"]).devices.values():
            self.world.release_range(tlb, fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT))

    def _on_device_tlb_drop(self, event: Event, fields: Fields) -> None:
        tlb = self.world.mm(fields["mm"]).devices.get(fields["device"])
        if tlb:
            self.world.release_range(tlb, fields["start"] >> PAGE_SHIFT, -(-fields["end"] >> PAGE_SHIFT))

    # ---- who used what

    def _on_spte_age(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        for gfn, entry in self._sptes(vm, fields["start"], fields["end"]):
            page = vm.page(gfn)
            if entry.young and page is not None and vm.mm is not None:
                self.world.mm(vm.mm).aged.add(page)
            entry.young = False

    @staticmethod
    def _sptes(vm: Vm, start: int, end: int) -> list[tuple[int, Entry]]:
        sptes = vm.sptes
        if end - start > len(sptes):
            return [(gfn, entry) for gfn, entry in sptes.items() if start <= gfn < end]
        return [(gfn, sptes[gfn]) for gfn in range(start, end) if gfn in sptes]

    def _on_mmu_notifier_clear_flush_young(self, event: Event, fields: Fields) -> None:
        self._asked_young(event, fields["mm"], fields["start"], fields["end"], fields["young"], forgotten=True)

    _on_mmu_notifier_clear_young = _on_mmu_notifier_clear_flush_young

    def _on_mmu_notifier_test_young(self, event: Event, fields: Fields) -> None:
        self._asked_young(event, fields["mm"], fields["address"], fields["address"] + 1, fields["young"])

    def _asked_young(
        self, event: Event, mm: str, start: int, end: int, young: bool, *, forgotten: bool = False
    ) -> None:
        world, process = self.world, self.world.mm(mm)
        self.checks["I9"] += 1
        for page in range(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            used = forgotten and page in process.aged
            process.aged.discard(page)
            if young:
                continue
            # Another operation that asks while the range is open, on the same stack or not, has no way to know.
            asker = (event.actor, event.cause)
            swallowed = next(
                (open for open in world.covering(mm, page) if (open.actor, open.cause) == asker and page in open.young),
                None,
            )
            hva = page << PAGE_SHIFT
            if swallowed is not None:
                what = f"its shadow entries were removed by range {swallowed.id}, and nobody asked before"
                self.broken("I9", f"{hva:#x} counts as unused, but {what}", event, hva=hva)
            elif used or any(
                vm.sptes[gfn].young for vm in world.watchers(mm) for gfn in vm.gfns(page) if gfn in vm.sptes
            ):
                self.broken("I9", f"{hva:#x} counts as unused, but a guest has used it", event, hva=hva)

    def _swallow(self, event: Event, vm: Vm, start: int, end: int) -> None:
        """A start that is telling its notifiers removes entries: who used them is forgotten with them."""
        for opened in self._returning:
            if opened.actor == event.actor and opened.mm == vm.mm:
                for gfn, entry in self._sptes(vm, start, end):
                    page = vm.page(gfn)
                    if entry.young and page is not None and opened.start <= page < opened.end:
                        opened.young.add(page)

    # ---- secondary MMUs

    def _on_memslot_set(self, event: Event, fields: Fields) -> None:
        slots = self.world.vm(fields["vm"]).slots
        slots[fields["slot"]] = Area(fields["gfn"], fields["pages"], fields["hva"] >> PAGE_SHIFT)

    def _on_memslot_delete(self, event: Event, fields: Fields) -> None:
        self.world.vm(fields["vm"]).slots.pop(fields["slot"], None)

    def _on_spte_set(self, event: Event, fields: Fields) -> None:
        self._install(event, self.world.vm(fields["vm"]), fields["gfn"], fields["pfn"], "w" in fields["rights"])

    def _on_spte_set_huge(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        vm.huge[fields["gfn"]] = fields["pages"]
        for offset in range(fields["pages"]):
            self._install(event, vm, fields["gfn"] + offset, fields["pfn"] + offset, "w" in fields["rights"])

    def _on_spte_restore(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        for offset in range(fields["pages"]):
            self._install(event, vm, fields["gfn"] + offset, fields["pfn"] + offset, "w" in fields["rights"])

    def _on_tlb_dropin(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        self._may_install(event, vm, fields["gfn"], fields["pfn"], "w" in fields["rights"])
        tlb = vm.chiplets.setdefault(fields["chiplet"], {})
        self.world.hold(tlb, fields["gfn"], Entry(fields["pfn"], "w" in fields["rights"], event.seq))

    def _on_tlb_invalidate(self, event: Event, fields: Fields) -> None:
        tlb = self.world.vm(fields["vm"]).chiplets.get(fields["chiplet"], {})
        self.world.release_range(tlb, fields["start"], fields["end"])

    def _install(self, event: Event, vm: Vm, gfn: int, pfn: int, write: bool) -> None:
        self._may_install(event, vm, gfn, pfn, write)
        # Those who watch intervals, or hold their pages, are not asked for their use.
        asked = vm.mm is None or vm.name not in self.world.mm(vm.mm).intervals
        asked = asked and vm.pins.get(gfn) != pfn
        self.world.hold(vm.sptes, gfn, Entry(pfn, write, event.seq, young=asked))

    def _may_install(self, event: Event, vm: Vm, gfn: int, pfn: int, write: bool) -> None:
        self.checks["I13"] += 1
        if vm.gone:
            self.broken("I13", f"{vm.name} installs an entry, but it is no notifier any more", event, gfn=gfn, pfn=pfn)
        page = vm.page(gfn)
        if page is not None and vm.mm is not None:
            self._installed(event, vm.mm, page, gfn, pfn, write, pinned=vm.pins.get(gfn) == pfn)
        if write:
            self.world.written[pfn] = event.seq

    def _installed(self, event: Event, mm: str, page: int, gfn: int, pfn: int, write: bool, *, pinned: bool) -> None:
        hva = page << PAGE_SHIFT
        self.checks["I2"] += 1
        for opened in self.world.covering(mm, page):
            if opened.returned and not pinned:
                what = f"range {opened.id}, begun at #{opened.seq}, is open"
                self.broken("I2", f"guest frame {gfn:#x} gets frame {pfn:#x}, but {what}", event, hva=hva, pfn=pfn)
        if any((change.mm, change.page) == (mm, page) for change in self._changes):
            return  # of 2008: all are being told of the page, and remove what they have when that is done
        self.checks["I4"] += 1
        entry = self.world.mm(mm).entries.get(page)
        if entry is None:
            self.broken("I4", f"guest frame {gfn:#x} gets frame {pfn:#x}, but {hva:#x} maps nothing", event, hva=hva)
        elif entry[0] != pfn:
            what = f"{hva:#x} maps frame {entry[0]:#x}"
            self.broken("I4", f"guest frame {gfn:#x} gets frame {pfn:#x}, but {what}", event, hva=hva, pfn=pfn)
        elif write and not entry[1] & WRITE:
            self.broken("I4", f"guest frame {gfn:#x} may be written, but {hva:#x} may not", event, hva=hva, pfn=pfn)

    def _on_spte_zap(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        start, end = vm.zapped(fields["start"], fields["end"])
        if self._returning:
            self._swallow(event, vm, start, end)
        self.world.release_range(vm.sptes, start, end)

    def _on_dirty_log(self, event: Event, fields: Fields) -> None:
        vm = self.world.vm(fields["vm"])
        slot = vm.slots.get(fields["slot"])
        if slot is None:
            return
        self.checks["I12"] += 1
        for vcpu, tlb in self.world.tlbs.items():
            for gfn, seen in tlb.items():
                spte = vm.sptes.get(gfn)
                inside = slot.gfn <= gfn < slot.gfn + slot.pages
                if inside and seen.write and spte is not None and spte.pfn == seen.pfn and not spte.write:
                    what = f"vcpu{vcpu} may write guest frame {gfn:#x} by what its TLB has since #{seen.seq}"
                    self.broken("I12", f"the dirty log is handed out, but {what}", event, gfn=gfn, pfn=seen.pfn)

    def _on_spte_protect(self, event: Event, fields: Fields) -> None:
        for gfn, entry in self.world.vm(fields["vm"]).sptes.items():
            if fields["start"] <= gfn < fields["end"]:
                entry.write = False

    def _on_tlb_insert(self, event: Event, fields: Fields) -> None:
        world = self.world
        gfn, pfn, write = fields["gfn"], fields["pfn"], "w" in fields["rights"]
        tlb = world.tlbs.setdefault(fields["vcpu"], {})
        self.checks["I10"] += 1
        sptes = [table[gfn] for vm in world.vms.values() for table in vm.tables() if gfn in table]
        if not any(spte.pfn == pfn and (spte.write or not write) for spte in sptes):
            what = "no shadow entry says so"
            self.broken("I10", f"guest frame {gfn:#x} gets frame {pfn:#x}, but {what}", event, gfn=gfn, pfn=pfn)
        before = tlb.get(gfn)
        world.hold(
            tlb, gfn, Entry(pfn, write or (before is not None and before.pfn == pfn and before.write), event.seq)
        )

    def _on_tlb_flush(self, event: Event, fields: Fields) -> None:
        tlb = self.world.tlbs.get(fields["vcpu"])
        if tlb:
            self.world.release_all(tlb)

    # ----

    def recall(self, seq: int) -> Event | None:
        """Event number ``seq``, None when it is not remembered any more."""
        return self.history.recall(seq)

    def broken(
        self,
        invariant: str,
        message: str,
        event: Event,
        *,
        hva: int | None = None,
        gfn: int | None = None,
        pfn: int | None = None,
        mm: str | None = None,
        at: tuple[str, int] | None = None,
    ) -> None:
        """Report that ``event`` breaks ``invariant`` about the page that ``hva`` (bytes), ``gfn`` and ``pfn`` name.

        ``mm``: whose ``hva`` it is, where the event does not say so; ``at``: a file used in place, and its page.
        """
        if invariant not in self.invariants or len(self.violations) >= VIOLATION_LIMIT:
            return
        told, earlier = self._history_of(event, mm, hva, gfn, pfn, at)
        violation = Violation(
            invariant,
            message,
            event,
            history=[*(each for each in told if each.seq != event.seq), event],
            earlier=earlier,
            chain=chain(self, invariant, event, hva, gfn, pfn),
            reads=[] if pfn is None else reads(self, event, pfn, self.reader),
        )
        self.violations.append(violation)
        self._stop(violation)

    def _mapped_at(self, pfn: int) -> tuple[str | None, int | None, int | None]:
        """Address space, address and guest frame at which a secondary MMU has frame ``pfn``."""
        for vm in self.world.vms.values():
            for gfn, entry in vm.sptes.items():
                if entry.pfn == pfn:
                    page = vm.page(gfn)
                    return vm.mm, None if page is None else page << PAGE_SHIFT, gfn
        return None, None, None

    def _history_of(
        self,
        event: Event,
        mm: str | None,
        hva: int | None,
        gfn: int | None,
        pfn: int | None,
        at: tuple[str, int] | None,
    ) -> tuple[list[Event], int]:
        """What happened to a page at its address, guest frame, frame, and in its file; and how much more there was."""
        mm = mm or event.fields.get("mm") or mm_of(self, event)
        if pfn is not None and gfn is None and hva is None:
            mm, hva, gfn = self._mapped_at(pfn)
        if mm is not None and hva is not None:
            page = hva >> PAGE_SHIFT
            if gfn is None:
                gfn = next((gfn for vm in self.world.watchers(mm) for gfn in vm.gfns(page)), None)
            if pfn is None:
                pfn = self.world.mm(mm).entries.get(page, (None,))[0]
            if at is None:
                at = self._files.page_at(mm, hva)
        if pfn is not None and self._files.is_hole(pfn):
            pfn = None
        history = self.history
        known = history.touching(hva=hva, gfn=gfn, pfn=pfn, mm=mm, last=history.kept_records)
        told = history.touching(hva=hva, gfn=gfn, pfn=pfn, mm=mm, last=EACH, kinds=True)
        earlier = history.earlier(hva=hva, gfn=gfn, pfn=pfn, mm=mm) + len(known) - len(told)
        seqs, kept = {each.seq for each in told}, {each.seq for each in known}
        for each in self._files.said(at, pfn):
            if each.seq not in seqs:
                told.append(each)
                earlier -= each.seq in kept
        return sorted(told, key=lambda each: each.seq), earlier


_HANDLERS: Final[dict[str, Callable[[Oracle, Event, Fields], None]]] = {
    name.removeprefix("_on_"): function for name, function in vars(Oracle).items() if name.startswith("_on_")
}
"""By kind of event."""


def _stale(held: Entry, before: tuple[int, int], pfn: int | None, flags: int) -> bool:
    """``held`` is a translation by ``before`` that allows what ``pfn`` with ``flags`` does not."""
    if held.pfn != before[0]:
        return False
    return pfn != held.pfn or (held.write and not flags & WRITE)
