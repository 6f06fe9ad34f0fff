"""What is said when the host's OOM killer has taken the process of a machine: why, and what would have helped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from xipvm.machine import Machine
    from xipvm.mmu.oom import OomKill

#: The exit status of a machine whose process was killed: 128 + SIGKILL.
OOM_STATUS = 137


@dataclass
class OomReport:
    """``kill`` is what the OOM killer knew; ``pins`` how many pages the entries of the secondary MMU held."""

    kill: OomKill
    pins: int

    def render(self) -> str:
        """The report as text, without a final newline. Counts are pages of 4 KiB."""
        kill, use = self.kill, self.kill.use
        needed = f"{kill.invoked_by} needed a page" if kill.invoked_by else "the host needed a page"
        lines = [
            f"host out of memory: {needed}, nothing could be reclaimed; killed {kill.victim}, badness {kill.badness}",
            f"  {kill.victim:<8} {use.resident} pages in memory ({use.anon} anonymous, {use.shmem} shared memory, "
            f"{use.file} of files), {use.swap} in swap, {use.tables} page tables",
            f"           {use.pinned} of them pinned{self._pinned_by()}, {kill.reclaimable} reclaimable",
            f"  host     {kill.frames} frames, {kill.free} free; "
            f"watermarks min {kill.marks.min}, low {kill.marks.low}, high {kill.marks.high}",
            f"           LRU lists: {kill.anon} anonymous, {kill.file} of files",
            f"  swap     {self._swap()}",
            f"  reaper   freed {kill.reaped}, left {kill.unreaped} areas",
            "",
            "what would have helped:",
        ]
        return "\n".join([*lines, *(f"  {line}" for line in self.advice())])

    def _pinned_by(self) -> str:
        return f" ({self.pins} by shadow entries)" if self.pins else ""

    def _swap(self) -> str:
        kill = self.kill
        if not kill.swap_total:
            return "none"
        errors = f"; {kill.swap_errors} reads or writes failed" if kill.swap_errors else ""
        return f"{kill.swap_total} slots, {kill.swap_free} free{errors}"

    def advice(self) -> list[str]:
        """What would have helped, the most likely first."""
        kill, found = self.kill, []
        if self.pins:
            where = f"{kill.swap_free} slots of swap were free" if kill.swap_free else "with --swap SIZE"
            found.append(f"without --pin-sptes, {self.pins} pages could have gone to swap ({where})")
        elif not kill.swap_total:
            found.append(f"swap: --swap SIZE would have had room for {kill.reclaimable} pages")
        elif kill.swap_errors:
            found.append(f"a swap file that can be written: {kill.swap_errors} reads or writes failed")
        elif not kill.swap_free:
            found.append(f"more swap: all {kill.swap_total} slots are in use")
        found.append(f"more memory: --host-memory above {format_size((kill.frames + 1) * PAGE_SIZE)}")
        return found


def oom_report(machine: Machine) -> OomReport:
    """The report of the machine whose mm was killed."""
    assert machine.mm.oom is not None
    return OomReport(machine.mm.oom, sum(machine.secondary.pins().values()))
