"""Faults of devices that are told of every change: what they install, keep, and do not pass on."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.explore.mirror import Engine, Mirror
from xipvm.mutants.mutant import mutant, replaced
from xipvm.notifier import MmuNotifierRange, NotifiedMm


@mutant("mirror-installs-whatever-it-found", "M7 (device)", "I7", "I2", "I4")
def mirror_installs_whatever_it_found() -> Iterator[None]:
    """A device that is told of every change installs what it looked up without asking for changes meanwhile."""
    with replaced(Mirror, "overtaken", lambda self, sequence: False):
        yield


@mutant("mirror-asks-for-open-ranges-only", "M8 (device)", "I7", "I4")
def mirror_asks_for_open_ranges_only() -> Iterator[None]:
    """A device asks whether an invalidation is open, not whether one has come and gone."""
    with replaced(Mirror, "overtaken", lambda self, sequence: self.invalidations > 0):
        yield


@mutant("mirror-goes-while-it-faults", "M26 (device)", "I13")
def mirror_goes_while_it_faults() -> Iterator[None]:
    """A device that goes drops what it has, and forgets who is on the way to install more."""

    def release(self: Mirror, mm: NotifiedMm) -> None:
        self.table.clear()
        self.zapped(0, 1 << 27)
        self.flush_remote_tlbs("release")

    with replaced(Mirror, "release", release):
        yield


@mutant("engine-drops-at-the-end", "M5 (engine)", "I3")
def engine_drops_at_the_end() -> Iterator[None]:
    """A device without a TLB removes its entries when the range ends, though it holds no page."""
    start, end = Engine.invalidate_range_start, Engine.invalidate_range_end

    def count(self: Engine, range: MmuNotifierRange) -> int:
        self.invalidations += 1
        return 0

    def late(self: Engine, range: MmuNotifierRange) -> None:
        start(self, range)
        self.invalidations -= 1
        end(self, range)

    with replaced(Engine, "invalidate_range_start", count), replaced(Engine, "invalidate_range_end", late):
        yield


@mutant("engine-writes-unnoticed", "M16 (engine)", "I8")
def engine_writes_unnoticed() -> Iterator[None]:
    """A device that may write a page without telling anybody does not mark it dirty: swap has an older one."""
    with replaced(Engine, "set_page_dirty", lambda self, pfn: None):
        yield
