"""No memory, and nothing to reclaim: somebody has to go.

::

    oom_badness of every mm → the largest is the victim → the OOM reaper takes its private pages, area by area
    → the mm exits

The reaper may not wait for anybody, who might be waiting for memory. So each area is announced as a range that may not
block; where a notifier says EAGAIN, the area is left out, and tried again up to 10 times with a schedule point between,
as is everything while somebody has mmap_lock for writing. What cannot be reaped goes with the mm. A pinned page stays
until its last holder lets it go.

The victim exits at once when it is not the one who needs the memory. That one's fault fails, as all that it
would still do, and whoever runs it ends it: ``Mm.oom`` says why. No second victim is chosen before the first is reaped.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.actors import point
from xipvm.errors import MmError, ProtocolUnsupported
from xipvm.mmu.frames import PG_ANON, PG_HUGETLB, PG_SWAPBACKED, HostMemory
from xipvm.mmu.pageout import is_pinned
from xipvm.mmu.pte import DEVICE, HUGE, MAPPED, SPECIAL, SWAP, pte_pfn
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.vma import Vma
    from xipvm.trace.funnel import Trace

OOM_SCORE_ADJ_MIN: Final = -1000
"""An mm with this ``oom_score_adj`` is never killed."""
REAP_ATTEMPTS: Final = 10


class Watermarks(NamedTuple):
    """Frames that should be free; reclaim.py says what for."""

    min: int
    low: int
    high: int


@dataclass(slots=True)
class MemoryUse:
    """What an mm has, in pages."""

    anon: int = 0
    file: int = 0
    shmem: int = 0
    swap: int = 0
    tables: int = 0
    pinned: int = 0
    """Of those in memory: held by somebody, so that they cannot go."""

    @property
    def resident(self) -> int:
        """In memory."""
        return self.anon + self.file + self.shmem


@dataclass(slots=True)
class OomKill:
    """What the OOM killer knew when it chose. Counts are pages."""

    victim: str
    """Name of the mm."""
    invoked_by: str
    """Name of the mm that needed memory; empty for the host itself."""
    badness: int
    use: MemoryUse
    """What the victim had."""
    frames: int
    free: int
    marks: Watermarks
    anon: int
    """Pages on the anonymous LRU lists of the host."""
    file: int
    swap_total: int
    swap_free: int
    swap_errors: int
    reaped: int = 0
    """Frames that the reaper freed."""
    unreaped: int = 0
    """Areas that it had to leave."""

    @property
    def reclaimable(self) -> int:
        """The victim's pages that would have gone, if there had been a place for them."""
        return self.use.resident - self.use.pinned


def memory_use(mm: Mm) -> MemoryUse:
    """What ``mm`` has; looks at every entry."""
    host, use = mm.host, MemoryUse(tables=mm.pgd.tables)
    for _, entry in mm.pgd.entries(0, 1 << 36):
        if not entry & MAPPED:
            use.swap += bool(entry & SWAP and not entry & DEVICE)
            continue
        if entry & SPECIAL:
            continue
        pfn, pages = pte_pfn(entry), 512 if entry & HUGE else 1
        flags = host.flags(pfn)
        if flags & PG_HUGETLB:
            continue  # of a pool: killing somebody gives it back there
        if flags & PG_ANON:
            use.anon += pages
        elif flags & PG_SWAPBACKED:
            use.shmem += pages
        else:
            use.file += pages
        if is_pinned(host, pfn):
            use.pinned += pages
    return use


def oom_badness(mm: Mm, total: int) -> int | None:
    """How much killing ``mm`` would help, of ``total`` pages of memory and swap; None for one that must not be."""
    if mm.dead or mm.oom_skip or mm.oom_score_adj == OOM_SCORE_ADJ_MIN:
        return None
    use = memory_use(mm)
    return use.resident + use.swap + use.tables + mm.oom_score_adj * (total // 1000)


def out_of_memory(host: HostMemory, trace: Trace, marks: Watermarks, mm: Mm | None) -> bool:
    """Kills somebody, because of an allocation for ``mm``; False when there is nobody left."""
    rmap = reverse_map(host)
    if any(each.oom is not None and not each.oom_skip and not each.dead for each in rmap.mms):
        return False  # one is being reaped already
    swap = rmap.swap
    total = host.nr_frames - 1 + (0 if swap is None else swap.total)
    victim, most = None, 0
    for each in rmap.mms:
        points = oom_badness(each, total)
        if points is not None and (victim is None or points >= most):
            victim, most = each, points
    if victim is None:
        return False
    victim.oom = kill = OomKill(
        victim=victim.name,
        invoked_by="" if mm is None else mm.name,
        badness=most,
        use=memory_use(victim),
        frames=host.nr_frames - 1,
        free=host.free_frames,
        marks=marks,
        anon=host.lru_count(0) + host.lru_count(1),
        file=host.lru_count(2) + host.lru_count(3),
        swap_total=0 if swap is None else swap.total,
        swap_free=0 if swap is None else swap.total - swap.used,
        swap_errors=0 if swap is None else swap.errors,
    )
    if trace.on:
        use = kill.use
        trace.emit("oom_kill", mm=victim.name, badness=most, rss=use.resident, swap=use.swap, pinned=use.pinned)
    oom_reap(victim, kill)
    if victim is not mm and not victim.mmap_lock.writer and not victim.mmap_lock.readers:
        victim.exit()
    return True


def oom_reap(mm: Mm, kill: OomKill) -> None:
    """Takes what can be taken from the victim, and says in ``kill`` what that was."""
    before = mm.host.free_frames
    actor, mm.trace.actor = mm.trace.actor, "oom_reaper"
    try:
        for _ in range(REAP_ATTEMPTS):
            left = list(mm.vmas) if mm.mmap_lock.writer else [area for area in mm.vmas if not _reap_area(mm, area)]
            kill.unreaped = len(left)
            if not left:
                break
            point("oom_reaper.retry")
        mm.oom_skip = True
        kill.reaped = max(mm.host.free_frames - before, 0)
        if mm.trace.on:
            mm.trace.emit("oom_reap", mm=mm.name, pages=kill.reaped, left=kill.unreaped)
    finally:
        mm.trace.actor = actor


def _reap_area(mm: Mm, area: Vma) -> bool:
    """False when the area has to be left for now."""
    if area.shared or (area.file is not None and area.file.hugetlb):
        return True  # the pages are not its own, or nothing that the kernel gets back this way
    try:
        range = mm.notifiers.invalidate_range_start(area.start, area.end, RangeEvent.UNMAP, blockable=False)
    except MmError as error:
        if error.errno != errno.EAGAIN:
            raise
        return False
    except ProtocolUnsupported:
        return True  # before there was a reaper: the pages go with the mm
    with MmuGather(mm) as gather:
        try:
            gather.zap(area.start, area.end)
        finally:
            mm.notifiers.invalidate_range_end(range)
    return True
