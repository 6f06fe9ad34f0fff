"""The GRU's secondary MMU: TLBs and nothing else. No walker could find an entry anywhere: each miss is a fault.

:class:`GruBase` is the driver as it always was: contexts, drop-ins, the flushing of ranges. :class:`Gru` is how it
hears of the mm's changes today; gru_2008.py is how it did in the beginning. The hardware is in gru_hardware.py.

``range_active`` counts the ranges of the mm that are open, wherever they are. While one is, nothing is dropped in.

Drop-in: fault handle read → give up if a range is open → page looked up → entry dropped in, *which the hardware
discards if an invalidation has hit the page since the handle was read*. An invalidation either comes before the handle
is read, and then the page that is looked up is the new one or its range is seen to be open; or it comes after, and the
hardware knows.

Who gives up: the interrupt handler, which must not sleep, leaves the handle to its user to poll. The user's call sleeps
until no range is open, and tries again; it may sleep in the lookup, too.

Start: range_active + 1 → for each chiplet that knows the mm: a context is loaded → invalidate the range, 1024 pages a
command; none is → the chiplet forgets the mm, which has an empty TLB when it comes back. *Counted first, flushed then*:
what is dropped in between the two would stay.

End: range_active - 1 → everybody who sleeps is woken, also when other ranges are open.

Nothing holds a reference to a page, nobody can ask whether a page was used, and that it was written is in the host's
entry: an access that writes has the page looked up for writing, and gets an entry of its own.

Engines ask for every page that their own TLB misses (``keeps_entries`` is false). What that has evicted, and the
chiplet still has, comes back without a word: a chiplet keeps what it was given until it is told to forget.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Self, cast

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, Gfn, Hva
from xipvm.errors import InternalError, MmError
from xipvm.locks.check import atomic, sleep_until
from xipvm.mmu.secondary.base import ACCESS_NAMES, FAULT, FETCH, MMIO, READ, RETRY_WALK, WRITE, SecondaryMmu
from xipvm.mmu.secondary.gru_hardware import CHIPLETS, CONTEXTS, GRUMAXINVAL, AddressSpace, Chiplet, Tfh, TfhState
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.memslot import GFN_LIMIT, MEM_LOG_DIRTY_PAGES, Memslot
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.tables import GupPage

FLUSH_ALL: Final = 64 * GRUMAXINVAL
"""Pages from which on a whole ASID is given up: cheaper than that many commands."""


class Dropin(Enum):
    """What became of an attempt."""

    DONE = "done"
    """The access goes on, or misses again."""
    WAIT = "wait"
    """Not now: a range is open, or the page is not there and nobody may sleep."""


@dataclass(frozen=True, slots=True)
class GruInfo:
    """What a GRU has for one page."""

    page: int
    hva: Hva | None
    entries: tuple[tuple[int, int, bool], ...]
    """Chiplet, frame, writability."""
    range_active: int

    def __str__(self) -> str:
        held = ", ".join(f"chiplet {n}: pfn {pfn:#x} {'rwx' if w else 'rx'}" for n, pfn, w in self.entries)
        where = "no memslot" if self.hva is None else f"hva {self.hva:#x}"
        open = f", {self.range_active} ranges open" if self.range_active else ""
        return f"gfn {self.page:#x}: TLB {held or 'has nothing'}; {where}{open}"


class GruContext(SecondaryMmu):
    """Context ``number`` of a GRU: a vCPU, or a thread with instructions of its own. Loaded by its first miss."""

    keeps_entries = False

    def __init__(self, gru: GruBase, number: int, space: AddressSpace) -> None:
        SecondaryMmu.__init__(self, gru.mm, gru.trace, f"{gru.name}.{number}")
        self.gru = gru
        self.number = number
        self.space = space
        self.tfh = Tfh()
        space.handles.append(self.tfh)

    @property
    def loaded(self) -> bool:
        """The chiplet has it."""
        return self.number in self.space.loaded

    def load(self) -> None:
        """Put it onto its chiplet, with the mm's ASID there or a new one. Raises MmError EAGAIN when that is full."""
        space = self.space
        if self.loaded:
            return
        if space.chiplet.full:
            raise MmError(errno.EAGAIN, f"{self.name}: chiplet {space.chiplet.number} has {CONTEXTS} contexts")
        if not space.asid:
            space.asid = space.chiplet.new_asid()
        space.loaded.add(self.number)

    def unload(self) -> None:
        """Take it off its chiplet, whose TLB keeps what the mm has there. Its next access loads it again."""
        self.space.loaded.discard(self.number)
        self.tfh.state = TfhState.IDLE
        self.gru.flush_context(self, "unload")

    def fault(self, page: int, access: int) -> int:
        """The access of ``page`` misses. See :meth:`SecondaryMmu.fault`."""
        trace = self.trace
        if not trace.on:
            return self._fault(page, access)
        with trace.because(trace.emit("tlb_miss", vm=self.gru.name, gfn=page, access=ACCESS_NAMES[access])):
            return self._fault(page, access)

    def _fault(self, page: int, access: int) -> int:
        gru, write = self.gru, access == WRITE
        slot = gru.memslots.find(page)
        if slot is None:
            if access != FETCH and gru.mmio_lookup(page << PAGE_SHIFT):
                return MMIO
            return self._nothing(f"no memory at guest physical page {page << PAGE_SHIFT:#x}", host_failed=False)
        if write and slot.readonly:
            return MMIO
        if gru.released:
            return self._nothing(f"{gru.name} has lost its address space", host_failed=True)
        try:
            self.load()
            if self.again(page, access):  # it was not loaded, but its chiplet knew the page
                return RETRY_WALK
            self.tfh.miss(page, self.space.asid, write)
            if self.interrupt() is Dropin.WAIT:
                point("gru.polling")
                self.call_os()
        except MmError as error:
            self.tfh.state = TfhState.IDLE
            if slot.romd and access != FETCH and error.errno == errno.EFAULT:
                return MMIO  # the ROM does not show its array: the device answers
            return self._nothing(f"no page behind guest frame {page:#x} ({slot!r}): {error}", host_failed=not slot.romd)
        return RETRY_WALK

    def _nothing(self, why: str, *, host_failed: bool) -> int:
        self.last_error, self.host_failed = why, host_failed
        return FAULT

    def interrupt(self) -> Dropin:
        """The miss has raised an interrupt: serve it without sleeping, or leave it to be polled."""
        with atomic("gru_intr"):
            result = self.try_dropin(may_sleep=False)
        if result is Dropin.WAIT:
            self.tfh.state = TfhState.POLLING
        return result

    def call_os(self) -> None:
        """The user, who polls, asks for help: sleep until no range is open, and try until it works. Raises MmError."""
        gru = self.gru
        while self.tfh.state is not TfhState.IDLE:
            gru.wait_for_ranges()
            self.try_dropin(may_sleep=True)

    def try_dropin(self, *, may_sleep: bool) -> Dropin:
        """One attempt; the order of its steps is the protocol. Raises MmError when there is no page."""
        gru, tfh, space = self.gru, self.tfh, self.space
        if not tfh.read():
            return Dropin.DONE
        page, asid, write = tfh.page, tfh.asid, tfh.write
        point("gru.dropin.tfh_read")
        if gru.range_open():
            gru.retry(page, "range active")
            return Dropin.WAIT
        point("gru.dropin.checked")
        found = gru.look_up(page, write, may_sleep)
        if found is None:
            return Dropin.WAIT
        point("gru.dropin.looked_up")
        if space.drop_in(tfh, asid, found.pfn, write):
            self.again(page, WRITE if write else READ)
            if gru.trace.on:
                chiplet, rights = space.chiplet.number, "rwx" if write else "rx"
                gru.trace.emit("tlb_dropin", vm=gru.name, chiplet=chiplet, gfn=page, pfn=found.pfn, rights=rights)
        else:
            gru.retry(page, "discarded")
        return Dropin.DONE

    def again(self, page: int, access: int) -> bool:
        """See the base: what the chiplet's TLB has for ``page`` goes to who walks this context's entries."""
        seen = self.space.tlb.get(page) if self.loaded and 0 <= page < GFN_LIMIT else 0
        if not seen & 1 << access:
            return False
        self.sptes.set(page, seen)
        return True

    def translate(self, page: int) -> tuple[int, bool] | None:
        """What its chiplet's TLB has for ``page``; nothing for a context that is not loaded."""
        return self.space.entry(page) if self.loaded else None

    def describe(self, page: int) -> GruInfo:
        """See the base."""
        return self.gru.describe(page)

    def backing(self) -> Iterator[tuple[int, Hva]]:
        """The pages that its chiplet's TLB has."""
        for page, _ in self.space.tlb.entries(0, GFN_LIMIT):
            slot = self.gru.memslots.find(page)
            if slot is not None:
                yield page, slot.hva_of(Gfn(page))

    def destroy(self) -> None:
        """Unload it; its GRU goes when that is destroyed."""
        self.unload()


class GruBase(GuestMmu):
    """The GRU of one mm, whatever tells it of changes. Its pages are guest frames, by memslots."""

    def __init__(self, mm: Mm) -> None:
        GuestMmu.__init__(self, mm, mm.trace, f"gru-{mm.name}")
        self.range_active = 0
        """Ranges of the mm that are open."""
        self.wake_ups = 0
        """How often those who sleep were woken."""
        self.released = False
        """The mm is gone: every fault fails."""
        self._chiplets = chiplets_of(mm)
        self.spaces: list[AddressSpace] = [chiplet.join() for chiplet in self._chiplets]
        """One a chiplet."""
        self.contexts: list[GruContext] = []

    # ---- contexts

    def port(self, index: int) -> GruContext:
        """Context ``index``. Raises MmError EAGAIN when the hardware has not so many."""
        if index >= CHIPLETS * CONTEXTS:
            raise MmError(errno.EAGAIN, f"{self.name}: a GRU has {CHIPLETS * CONTEXTS} contexts")
        while len(self.contexts) <= index:
            number = len(self.contexts)
            self.contexts.append(GruContext(self, number, self.spaces[number % CHIPLETS]))
        return self.contexts[index]

    def ports(self) -> Iterator[SecondaryMmu]:
        """Its contexts."""
        return iter(self.contexts)

    def fault(self, page: int, access: int) -> int:
        """As a miss of context 0."""
        context = self.port(0)
        result = context.fault(page, access)
        self.last_error, self.host_failed = context.last_error, context.host_failed
        return result

    # ---- drop-ins

    def look_up(self, page: int, write: bool, may_sleep: bool) -> GupPage | None:
        """The host's page behind ``page``, None where it would have to be waited for. Raises MmError without one."""
        slot = self.memslots.find(page)
        if slot is None:
            raise MmError(errno.EFAULT, f"{self.name}: no memslot has page {page:#x} any more")
        hva = slot.hva_of(Gfn(page))
        if may_sleep:
            return self.mm.get_user_pages(hva, write=write)
        return self.mm.pgd.gup(hva >> PAGE_SHIFT, write)

    def range_open(self) -> bool:
        """Whether nothing may be dropped in."""
        return self.range_active > 0

    def wait_for_ranges(self) -> None:
        """Sleep until no range is open. Raises DeadlockError when nobody can close it."""
        because = f"a range of {self.mm.name} is open"
        while self.range_open():
            sleep_until("gru_user_dropin", self._woken_after(self.wake_ups), because=because, label="gru.wait")

    def _woken_after(self, seen: int) -> Callable[[], bool]:
        return lambda: self.wake_ups != seen

    def retry(self, page: int, reason: str) -> None:
        """Say that an attempt was given up."""
        if self.trace.on:
            self.trace.emit("tlb_retry", vm=self.name, gfn=page, reason=reason)

    # ---- flushing

    def flush_range(self, start: int, end: int) -> None:
        """Have every chiplet forget bytes ``[start, end)`` of the mm; done when the call returns."""
        hit = self.memslots.in_hva_range(start, end)
        for space in self.spaces:
            if not space.asid:
                continue
            if not space.loaded:
                self._forget(space, "asid")
                continue
            for first, last in hit:
                if last - first >= FLUSH_ALL:
                    self._forget(space, "all")
                    space.asid = space.chiplet.new_asid()
                else:
                    self._invalidate(space, first, last)

    def _invalidate(self, space: AddressSpace, first: int, last: int) -> None:
        """Have a chiplet forget pages ``[first, last)``, as many at a time as a command takes."""
        for page in range(first, last, GRUMAXINVAL):
            end = min(page + GRUMAXINVAL, last)
            self._gone(space, page, end, space.invalidate(page, end - page), "invalidate")
            point("gru.flush.command")

    def _forget(self, space: AddressSpace, reason: str) -> None:
        self._gone(space, 0, GFN_LIMIT, space.forget(), reason)

    def _gone(self, space: AddressSpace, first: int, last: int, runs: list[tuple[int, int]], reason: str) -> None:
        """A chiplet's TLB has forgotten ``runs``: so must what looks at it."""
        if not runs:
            return
        if self.trace.on:
            chiplet = space.chiplet.number
            self.trace.emit("tlb_invalidate", vm=self.name, chiplet=chiplet, start=first, end=last, pages=runs)
        for context in self.contexts:
            if context.space is space:
                context.sptes.zap(first, last, False)
                self.flush_context(context, reason)

    def flush_context(self, context: GruContext, reason: str) -> None:
        """Whoever uses ``context`` looks at its TLB again."""
        if context.number < len(self.vcpus):
            self.vcpus[context.number].flush_tlb(reason)

    def forget_all(self, reason: str) -> None:
        """Every chiplet forgets the mm; contexts that are loaded get new ASIDs."""
        for space in self.spaces:
            self._forget(space, reason)
            if space.loaded:
                space.asid = space.chiplet.new_asid()

    def begin_range(self, start: int, end: int) -> None:
        """A range of the mm opens: counted first, flushed then."""
        self.invalidations += 1
        self.range_active += 1
        try:
            point("gru.start.counted")
            self.flush_range(start, end)
        except BaseException:  # an aborted run, a sink that failed: no end comes
            self.end_range()
            raise

    def end_range(self) -> None:
        """It closes."""
        self.range_active -= 1
        if self.range_active < 0:
            raise InternalError(f"{self.name}: more ranges ended than began")
        self._wake_up()

    def _wake_up(self) -> None:
        self.wake_ups += 1

    def zap_gfn_range(self, start: int, end: int, reason: str) -> None:
        """See the base."""
        for space in self.spaces:
            if space.asid:
                self._invalidate(space, start, end)

    def _release(self) -> None:
        self.released = True
        for context in self.contexts:
            context.space.loaded.discard(context.number)
            context.tfh.state = TfhState.IDLE
        for space in self.spaces:
            self._forget(space, "release")

    def _leave(self) -> None:
        """It is nobody's any more: give the chiplets back."""
        self._release()
        for space in self.spaces:
            space.chiplet.leave(space)
        self.spaces = []

    # ---- memslots

    def set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        """See the base. EINVAL also for a slot with a dirty log: nothing here could keep one."""
        if flags & MEM_LOG_DIRTY_PAGES:
            raise MmError(errno.EINVAL, f"memslot {slot}: {self.name} keeps no dirty log")
        new = Memslot(slot, Gfn(gfn), pages, Hva(hva), flags)
        old = self.memslots.check(new)
        if old is not None and (old.gfn, old.flags) == (gfn, flags):
            return
        self.memslots.insert(new)
        self._slots_changed()
        if self.trace.on:
            self.trace.emit("memslot_set", vm=self.name, slot=slot, gfn=gfn, pages=pages, hva=hva, flags=flags)

    def delete_memslot(self, slot: int) -> None:
        """See the base."""
        if self.memslots.get(slot) is None:
            raise MmError(errno.EINVAL, f"memslot {slot}: there is none to delete")
        self.memslots.remove(slot)
        self._slots_changed()
        if self.trace.on:
            self.trace.emit("memslot_delete", vm=self.name, slot=slot)

    def _slots_changed(self) -> None:
        """Pages are others now: with new ASIDs nothing that was dropped in counts, nor what is on its way."""
        self.forget_all("memslot")
        self.flush_remote_tlbs("memslot")  # also what vCPUs know of MMIO

    # ---- questions

    def translate(self, page: int) -> tuple[int, bool] | None:
        """What some chiplet's TLB has for ``page``."""
        return next((entry for space in self.spaces if (entry := space.entry(page)) is not None), None)

    def describe(self, page: int) -> GruInfo:
        """See the base."""
        slot = self.memslots.find(page)
        entries = tuple(
            (space.chiplet.number, *entry) for space in self.spaces if (entry := space.entry(page)) is not None
        )
        return GruInfo(page, None if slot is None else slot.hva_of(Gfn(page)), entries, self.range_active)


class Gru(GruBase, MmuNotifier):
    """The GRU as it is today: start and end. An mm has one; :meth:`of` finds it, :meth:`destroy` gives it back.

    Linux has no ``release`` here: the driver's own mapping closes when the process goes, its pages freed by then. A TLB
    that has not been told of that is what the oracle reports, so this one forgets when the mm dies.
    """

    @classmethod
    def of(cls, mm: Mm) -> Self:
        """The GRU of ``mm``, made if there is none. Raises what :meth:`MmuNotifiers.get` raises."""
        return mm.notifiers.get(cls)

    @classmethod
    def alloc_notifier(cls, mm: NotifiedMm) -> Self:
        """A new one."""
        return cls(cast("Mm", mm))

    def free_notifier(self) -> None:
        """It was never registered, or nobody uses it any more."""
        if self.spaces:
            self._leave()

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """See the module. Never declines: a flush does not sleep."""
        self.begin_range(range.start, range.end)
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """See the module."""
        self.end_range()

    def release(self, mm: NotifiedMm) -> None:
        """Forget everything, for good."""
        self._release()

    def destroy(self) -> None:
        """One user less; with the last one everything is forgotten. More calls than users do nothing."""
        if self.subscribed_to is None or not self.users:
            return
        if self.users == 1:
            self._release()
        self.subscribed_to.put(self)


def chiplets_of(mm: Mm) -> list[Chiplet]:
    """The chiplets of the host that ``mm`` lives on: all its mms share them."""
    from xipvm.mmu.rmap import reverse_map

    rmap = reverse_map(mm.host)
    if rmap.gru is None:
        rmap.gru = [Chiplet(number) for number in range(CHIPLETS)]
    return cast("list[Chiplet]", rmap.gru)
