"""The OOM killer: whom it takes, what the reaper gets without waiting for anybody, and what becomes of the victim."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.mm.pressure import PAGE, RW, anonymous, check, fill
from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.mm import Mm
from xipvm.mmu.oom import REAP_ATTEMPTS, memory_use, oom_badness
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.reclaim import Reclaim, watch_memory
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifierRange, RangeEvent
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace


@pytest.fixture
def reclaim(host: HostMemory, trace: Trace) -> Iterator[Reclaim]:
    """256 frames, no swap."""
    yield watch_memory(host, trace)
    verify(host)


@pytest.fixture
def others(host: HostMemory, trace: Trace, reclaim: Reclaim) -> list[Mm]:
    """Three more processes, with 20, 100 and 40 pages."""
    mms = [Mm(host, trace, name=name) for name in ("small", "large", "middle")]
    for mm, pages in zip(mms, (20, 100, 40), strict=True):
        anonymous(mm, pages)
    return mms


# ---- whom


def test_badness_is_what_killing_would_give_back(mm: Mm, host: HostMemory, trace: Trace) -> None:
    mm.swapon(64)
    start = anonymous(mm, 10)
    mm.madvise(start, 3 * PAGE, 21)  # MADV_PAGEOUT
    file = ShmemFile(host, trace, "shmem", 2 * PAGE)
    shared = mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    fill(mm, shared, 2)
    mm.read(mm.mmap(PAGE, RW), 1)  # the zero page is nobody's
    use = memory_use(mm)
    assert (use.anon, use.shmem, use.file, use.swap, use.pinned) == (7, 2, 0, 3, 0)
    assert oom_badness(mm, 1000) == 7 + 2 + 3 + mm.pgd.tables
    mm.oom_score_adj = -5
    assert oom_badness(mm, 2000) == 12 + mm.pgd.tables - 10
    mm.oom_score_adj = -1000
    assert oom_badness(mm, 1000) is None
    mm.exit()
    assert oom_badness(mm, 1000) is None
    file.close()


def test_the_largest_goes_and_who_needed_memory_gets_it(mm: Mm, others: list[Mm], reclaim: Reclaim) -> None:
    start = mm.mmap(200 * PAGE, RW)
    for page in range(120):
        mm.write(start + page * PAGE, b"x")
        if others[1].dead:
            break
    small, large, middle = others
    assert [other.dead for other in others] == [False, True, False]
    assert page == 255 - reclaim.marks.min - 160  # nobody was killed before memory was used up
    kill = large.oom
    assert kill is not None
    assert (kill.victim, kill.invoked_by) == ("large", mm.name)
    assert (kill.use.anon, kill.reaped, kill.unreaped) == (100, 100, 0)
    assert mm.oom is None
    check(small, small.vmas[0].start, 20)
    check(middle, middle.vmas[0].start, 40)


def test_who_must_not_be_killed_is_not(mm: Mm, others: list[Mm], reclaim: Reclaim) -> None:
    others[1].oom_score_adj = -1000
    mm.oom_score_adj = -1000
    others[0].oom_score_adj = 1000  # please
    start = mm.mmap(200 * PAGE, RW)
    with pytest.raises(MmError) as error:
        fill(mm, start, 200)
    assert error.value.errno == errno.ENOMEM
    assert [other.dead for other in others] == [True, False, True]
    assert reclaim.kills == 2
    mm.munmap(start, 200 * PAGE)
    fill(mm, mm.mmap(50 * PAGE, RW), 50)


def test_the_one_who_needs_it_may_be_the_victim(mm: Mm, host: HostMemory, others: list[Mm], reclaim: Reclaim) -> None:
    start = mm.mmap(200 * PAGE, RW)
    for other in others:
        other.oom_score_adj = -1000
    with pytest.raises(MmError) as error:
        fill(mm, start, 200)
    assert error.value.errno == errno.ENOMEM
    assert mm.oom is not None
    assert mm.oom.invoked_by == mm.oom.victim == mm.name
    assert mm.oom.reaped == mm.oom.use.anon == 255 - reclaim.marks.min - 160
    assert not mm.dead  # whoever runs it ends it
    # Its memory is not what it was: nobody may look at it.
    with pytest.raises(MmError) as error:
        mm.read(start, 1)
    assert error.value.errno == errno.ESRCH
    with pytest.raises(MmError):
        HostThread(mm).load(start, 1)
    mm.exit()
    assert reclaim.kills == 1


def test_a_thread_of_the_victim_gets_a_signal(mm: Mm, reclaim: Reclaim) -> None:
    start = mm.mmap(300 * PAGE, RW)
    thread = HostThread(mm)
    with pytest.raises(HostAccessError) as error:
        thread.store(start, b"x" * (300 * PAGE))
    assert error.value.signal == "SIGKILL"


def test_with_nobody_to_kill_the_allocation_fails(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    mm.oom_score_adj = -1000
    start = mm.mmap(300 * PAGE, RW)
    with pytest.raises(MmError) as error:
        fill(mm, start, 300)
    assert error.value.errno == errno.ENOMEM
    assert (reclaim.kills, mm.oom) == (0, None)
    check(mm, start, 255 - reclaim.marks.min)


def test_memory_of_others_is_not_the_victims_to_give(
    mm: Mm, host: HostMemory, trace: Trace, others: list[Mm], reclaim: Reclaim
) -> None:
    """A shared area is left to the end of the mm, which only gives its entries up."""
    large = others[1]
    file = ShmemFile(host, trace, "shmem", 30 * PAGE)
    fill(large, large.mmap(30 * PAGE, RW, MAP_SHARED, file=file), 30)
    with on_point(lambda label: None):
        start = mm.mmap(100 * PAGE, RW)
        fill(mm, start, 40)
    assert large.oom is not None
    assert (large.oom.use.shmem, large.oom.reaped) == (30, 100)
    assert large.dead
    assert len(file.pages) == 30
    check(mm, start, 40)
    file.close()


# ---- the reaper may not wait


class Busy(MmuNotifier):
    """Cannot take ranges without blocking, for the first ``times``."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.seen: list[tuple[bool, RangeEvent]] = []

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.seen.append((range.blockable, range.event))
        if range.blockable or not self.times:
            return 0
        self.times -= 1
        return -errno.EAGAIN


class Counting(MmuNotifier):
    def __init__(self) -> None:
        self.open = self.most = 0

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.open += 1
        self.most = max(self.most, self.open)
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        self.open -= 1


@pytest.mark.parametrize("times", [0, 3, 1000])
def test_an_area_that_would_block_is_tried_again_and_then_left(
    mm: Mm, host: HostMemory, others: list[Mm], reclaim: Reclaim, times: int
) -> None:
    large = others[1]
    large.notifiers.register(counting := Counting())
    large.notifiers.register(busy := Busy(times))
    points: list[str] = []
    start = mm.mmap(110 * PAGE, RW)
    with on_point(points.append):
        fill(mm, start, 70)
    kill = large.oom
    assert kill is not None
    expected = {0: (100, 0, 0), 3: (100, 0, 3), 1000: (0, 1, REAP_ATTEMPTS)}[times]
    assert (kill.reaped, kill.unreaped, points.count("oom_reaper.retry")) == expected
    assert busy.seen == [(False, RangeEvent.UNMAP)] * (min(times, REAP_ATTEMPTS - 1) + 1)
    assert (counting.open, counting.most) == (0, 1)
    assert large.oom_skip
    assert large.dead  # what could not be reaped went with it
    check(mm, start, 70)


def test_nothing_is_reaped_while_somebody_changes_areas(mm: Mm, others: list[Mm], reclaim: Reclaim) -> None:
    large = others[1]
    large.notifiers.register(MmuNotifier())
    start = mm.mmap(110 * PAGE, RW)
    area = large.vmas[0]
    mm.oom_score_adj = -1000

    def hook(label: str) -> None:
        if label == "notifier.range_start.done" and large.oom is None:
            assert large.mmap_lock.writer
            for page in range(110):
                mm.write(start + page * PAGE, b"x")
                if large.oom is not None:
                    return

    with on_point(hook):
        large.mprotect(area.start, PAGE, 1)
    assert large.oom is not None
    assert (large.oom.reaped, large.oom.unreaped) == (0, 2)  # mprotect had split it
    assert not large.dead  # it could not exit before its lock was free
    check(large, area.start, 100)
    large.exit()


def test_what_the_reaper_does_is_told(
    mm: Mm, others: list[Mm], reclaim: Reclaim, events: list[Event], host: HostMemory, trace: Trace
) -> None:
    """Kill, then for the area a range that may not block, entries cleared, its end, flush, free; then the exit."""
    large = others[1]
    large.notifiers.register(MmuNotifier())
    fill(mm, mm.mmap(110 * PAGE, RW), 70)
    names = [event.kind for event in events]
    at = names.index("oom_kill")
    assert names[at : at + 8] == [
        "oom_kill",
        "mmu_notifier_invalidate_range_start",
        "pte_clear",
        "mmu_notifier_invalidate_range_end",
        "primary_tlb_flush",
        "page_free",
        "oom_reap",
        "mm_exit",
    ]
    assert events[at].fields == {"mm": "large", "badness": large.oom.badness, "rss": 100, "swap": 0, "pinned": 0}  # type: ignore[union-attr]
    assert {event.actor for event in events[at + 1 : at + 7]} == {"oom_reaper"}


def test_a_virtual_machine_forgets_what_was_reaped(mm: Mm, host: HostMemory, trace: Trace, reclaim: Reclaim) -> None:
    kvm = Kvm(mm, trace, host)
    start = mm.mmap(300 * PAGE, RW)
    kvm.set_memslot(0, 0, 300, start)
    page = 0
    while kvm.fault(page, 1) == 0:
        assert page < 300
        page += kvm.translate(page) is not None
    assert "OOM" in kvm.last_error  # the fault's own answer
    assert kvm.host_failed
    assert kvm.sptes.present == 0
    assert mm.oom is not None
    assert mm.oom.reaped == mm.oom.use.anon == page


# ---- what 2008 was about


def test_pins_keep_everything_in_memory(mm: Mm, host: HostMemory, trace: Trace, reclaim: Reclaim) -> None:
    """With a reference for each shadow entry nothing can go to swap, and killing does not help before the VM ends."""
    mm.swapon(1024)
    kvm = Kvm(mm, trace, host, pin_sptes=True)
    start = mm.mmap(300 * PAGE, RW)
    kvm.set_memslot(0, 0, 300, start)
    page = 0
    while kvm.fault(page, 1) == 0:
        assert page < 300
        page += kvm.translate(page) is not None
    kill = mm.oom
    assert kill is not None
    assert page == kill.use.pinned == kill.use.anon == 255 - reclaim.marks.min
    assert (kill.reclaimable, kill.swap_free, kill.reaped) == (0, 1024, 0)
    assert all(host.refcount(pfn) for pfn in kvm.pins())
    kvm.destroy()
    assert host.free_frames == 255


def test_without_pins_the_same_goes_to_swap(mm: Mm, host: HostMemory, trace: Trace, reclaim: Reclaim) -> None:
    mm.swapon(1024)
    kvm = Kvm(mm, trace, host)
    start = mm.mmap(300 * PAGE, RW)
    kvm.set_memslot(0, 0, 300, start)
    for page in range(300):
        while kvm.translate(page) is None:
            assert kvm.fault(page, 1) == 0
        translated = kvm.translate(page)
        assert translated is not None
        host.write(translated[0], 0, bytes([page % 251]))
    assert reclaim.kills == 0
    for page in range(300):
        assert mm.read(start + page * PAGE, 1)[0] == page % 251
    kvm.destroy()
