"""How a run ended and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xipvm.oom_report import OomReport
    from xipvm.report import CrashReport


@dataclass
class Summary:
    """What a run did. Counts are for the whole machine; ``instructions`` is None on the host clock."""

    instructions: int | None
    seconds: float
    guest_faults: int
    invalidations: int
    tlb_flushes: int
    flash_programs: int
    flash_erases: int
    reclaimed: int = 0
    """Pages that left the host's memory under pressure."""
    swap_ins: int = 0
    swap_outs: int = 0
    swap_errors: int = 0
    dirty_pages: int | None = None
    """Pages that the guest has written, where a dirty log is kept."""
    image_pages: tuple[int, int] | None = None
    """Of a guest in an image: how many of its pages are the image's own, and how many copies. None without."""

    @property
    def mips(self) -> float | None:
        """Million instructions a second of wall time."""
        if self.instructions is None or self.seconds == 0:
            return None
        return self.instructions / self.seconds / 1e6


@dataclass
class RunResult:
    """How a run ended. ``reason`` is one of exit, until, timeout, limit, crash, quit,
    interrupted, trace."""

    status: int
    reason: str
    summary: Summary
    report: CrashReport | OomReport | None = None
