"""Faults of the GRU: its drop-ins, what it flushes of which chiplet, who sleeps and who is woken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xipvm.actors import point
from xipvm.mmu.secondary.gru import Gru, GruBase
from xipvm.mmu.secondary.gru_2008 import Gru2008
from xipvm.mmu.secondary.gru_hardware import GRUMAXINVAL, AddressSpace
from xipvm.mutants.mutant import mutant, replaced

if TYPE_CHECKING:
    from xipvm.mmu.tables import GupPage


# ---- drop-ins


@mutant("gru-range-active-not-asked", "M28 (range_active)", "I2", "I3", "I4", "I5", "I10")
def range_active_not_asked() -> Iterator[None]:
    """A page is dropped in although a range is open."""
    with replaced(GruBase, "range_open", lambda self: False):
        yield


@mutant("gru-dropin-not-discarded", "M28 (discard)", "I2", "I3", "I4", "I5", "I10")
def dropin_not_discarded() -> Iterator[None]:
    """The hardware drops in what was looked up before an invalidation of the page."""
    invalidate = AddressSpace.invalidate

    def invalidated(self: AddressSpace, page: int, count: int) -> list[tuple[int, int]]:
        runs = invalidate(self, page, count)
        for tfh in self.handles:
            tfh.discarded = False
        return runs

    with replaced(AddressSpace, "invalidate", invalidated):
        yield


@mutant("gru-handle-read-late", "M28 (order)", "I2", "I3", "I4", "I5", "I10")
def handle_read_late() -> Iterator[None]:
    """The fault handle is read when the page has been looked up, so that no invalidation before that counts."""
    look_up = GruBase.look_up

    def looked_up(self: GruBase, page: int, write: bool, may_sleep: bool) -> GupPage | None:
        found = look_up(self, page, write, may_sleep)
        point("mutant.looked_up")
        for context in self.contexts:
            if context.tfh.page == page:
                context.tfh.discarded = False
        return found

    with replaced(GruBase, "look_up", looked_up):
        yield


@mutant("gru-write-not-checked", "16 (drop-in)", "I3", "I4", "AssertionError")
def write_not_checked() -> Iterator[None]:
    """The interrupt handler gives an access that writes what a lookup for reading finds."""
    look_up = GruBase.look_up

    def looked_up(self: GruBase, page: int, write: bool, may_sleep: bool) -> GupPage | None:
        return look_up(self, page, write and may_sleep, may_sleep)

    with replaced(GruBase, "look_up", looked_up):
        yield


@mutant("gru-interrupt-sleeps", "42 (interrupt)", "lock")
def interrupt_sleeps() -> Iterator[None]:
    """The interrupt handler has the page faulted in, which may sleep."""
    look_up = GruBase.look_up

    def looked_up(self: GruBase, page: int, write: bool, may_sleep: bool) -> GupPage | None:
        return look_up(self, page, write, True)

    with replaced(GruBase, "look_up", looked_up):
        yield


# ---- ranges


@mutant("gru-flushes-before-it-counts", "M3 (count)", "I2", "I3", "I4", "I5", "I10")
def flushes_before_it_counts() -> Iterator[None]:
    """The TLBs are flushed first, and the range is counted then: what is dropped in between stays."""

    def begin(self: GruBase, start: int, end: int) -> None:
        self.invalidations += 1
        self.flush_range(start, end)
        point("mutant.flushed")
        self.range_active += 1

    with replaced(GruBase, "begin_range", begin):
        yield


@mutant("gru-range-active-is-a-flag", "M14 (GRU)", "I2", "I3", "I4", "I5", "I10")
def range_active_is_a_flag() -> Iterator[None]:
    """That a range is open is a flag: the first end of two clears it."""
    begin = GruBase.begin_range

    def begun(self: GruBase, start: int, end: int) -> None:
        begin(self, start, end)
        self.range_active = 1

    def ended(self: GruBase) -> None:
        self.range_active = 0
        self._wake_up()

    with replaced(GruBase, "begin_range", begun), replaced(GruBase, "end_range", ended):
        yield


@mutant("gru-nobody-is-woken", "M13 (wake-up)", "deadlock", "DeadlockError")
def nobody_is_woken() -> Iterator[None]:
    """The end of a range leaves those asleep who wait for it."""
    with replaced(GruBase, "_wake_up", lambda self: None):
        yield


@mutant("gru-one-command", "M2 (clamp)", "I3", "I2", "I5", "I10")
def one_command() -> Iterator[None]:
    """A range is invalidated by one command, however long it is: pages behind the first 1024 stay."""
    invalidate = GruBase._invalidate

    def clamped(self: GruBase, space: AddressSpace, first: int, last: int) -> None:
        invalidate(self, space, first, min(last, first + GRUMAXINVAL))

    with replaced(GruBase, "_invalidate", clamped):
        yield


@mutant("gru-one-chiplet", "M19 (chiplets)", "I3", "I2", "I5", "I10")
def one_chiplet() -> Iterator[None]:
    """Only the first chiplet that knows the mm is flushed."""
    flush = GruBase.flush_range

    def flushed(self: GruBase, start: int, end: int) -> None:
        spaces, self.spaces = self.spaces, [space for space in self.spaces if space.asid][:1]
        try:
            flush(self, start, end)
        finally:
            self.spaces = spaces

    with replaced(GruBase, "flush_range", flushed):
        yield


@mutant("gru-chiplet-not-forgotten", "M1 (unloaded)", "I3", "I2", "I5", "I10")
def chiplet_not_forgotten() -> Iterator[None]:
    """Where no context is loaded nothing is done: the next one has the mm's old ASID, and what the TLB has under it."""
    flush = GruBase.flush_range

    def flushed(self: GruBase, start: int, end: int) -> None:
        spaces, self.spaces = self.spaces, [space for space in self.spaces if space.loaded]
        try:
            flush(self, start, end)
        finally:
            self.spaces = spaces

    with replaced(GruBase, "flush_range", flushed):
        yield


@mutant("gru-windows-change-under-asids", "M34 (GRU)", "I3", "I4", "I5", "I10", "AssertionError")
def windows_change_under_asids() -> Iterator[None]:
    """When memslots change the TLBs keep what they have: later ranges do not find it."""
    with replaced(GruBase, "_slots_changed", lambda self: None):
        yield


# ---- coming and going


@mutant("gru-not-registered", "26", "I5", "AssertionError")
def not_registered() -> Iterator[None]:
    """Registering the notifier fails, and the driver goes on without."""
    with (
        replaced(Gru, "of", classmethod(lambda cls, mm: cls(mm))),
        replaced(Gru2008, "of", classmethod(lambda cls, mm: cls(mm))),
    ):
        yield


@mutant("gru-release-forgets-nothing", "M25 (release)", "I3", "I5")
def release_forgets_nothing() -> Iterator[None]:
    """The process ends, and the TLBs keep its pages while they are freed. (Linux's driver has no release.)"""
    with replaced(GruBase, "_release", lambda self: None):
        yield


@mutant("gru-pages-not-invalidated", "M1 (invalidate_page)", "I3", "I5", "I10", "I4", protocol="2008")
def pages_not_invalidated() -> Iterator[None]:
    """Ranges are flushed, single pages are not."""
    with replaced(Gru2008, "invalidate_page", lambda self, mm, address: None):
        yield


@mutant("gru-used-after-release", "M25 (released)", "I13", "I5", protocol="2008")
def used_after_release() -> Iterator[None]:
    """``ms_released`` is not looked at: the GRU of a process that ends drops pages in again."""
    release = GruBase._release

    def forgotten(self: GruBase) -> None:
        release(self)
        self.released = False

    with replaced(GruBase, "_release", forgotten):
        yield
