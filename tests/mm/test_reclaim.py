"""Memory pressure: watermarks, kswapd, direct reclaim, the LRU lists, pages of files, the working set."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mm.pressure import PAGE, RW, anonymous, check, fill, leave_free, swap_of, word
from xipvm.errors import MmError
from xipvm.mmu.frames import (
    LRU_ACTIVE_ANON,
    LRU_ACTIVE_FILE,
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    PG_ACTIVE,
    PG_LRU,
    HostMemory,
)
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.madvise import MADV_COLD, MADV_FREE
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import MAPPED, SWAP, pte_pfn
from xipvm.mmu.reclaim import CLUSTER, Reclaim, make_room, retry, watch_memory, watermarks
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.scheduler import Scheduler
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

Steps = Callable[[], list[str]]


@pytest.fixture
def reclaim(host: HostMemory, trace: Trace, mm: Mm) -> Iterator[Reclaim]:
    """256 frames with watermarks 32, 40, 48, and swap for 2048 pages."""
    mm.swapon(2048)
    yield watch_memory(host, trace)
    verify(host)


def entry(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva >> 12)


def pfns(mm: Mm, start: int, pages: int) -> list[int]:
    return [pte_pfn(entry(mm, start + page * PAGE)) for page in range(pages)]


def kinds(events: list[Event], *names: str) -> list[str]:
    return [event.kind for event in events if event.kind in names]


# ---- watermarks


@pytest.mark.parametrize(
    ("mib", "marks"),
    [(1, (32, 40, 48)), (8, (90, 112, 134)), (1024, (1024, 1286, 1548)), (32768, (5792, 14180, 22568))],
)
def test_watermarks_are_linuxs(mib: int, marks: tuple[int, int, int]) -> None:
    """min_free_kbytes is 4 * sqrt(KiB); low and high are a quarter of it more, or a thousandth of all memory."""
    assert watermarks(mib * 256) == marks


def test_a_host_without_watermarks_gives_its_last_frame_away(mm: Mm, host: HostMemory) -> None:
    mm.swapon(64)
    taken = [host.alloc() for _ in range(host.free_frames - 2)]
    start = mm.mmap(4 * PAGE, RW)
    fill(mm, start, 2)
    with pytest.raises(MmError) as error:
        mm.write(start + 2 * PAGE, b"x")
    assert error.value.errno == errno.ENOMEM
    assert not make_room(host, mm)
    for pfn in taken:
        host.put(pfn)


def test_kswapd_is_woken_at_low_and_goes_on_to_high(
    mm: Mm, host: HostMemory, reclaim: Reclaim, events: list[Event]
) -> None:
    start = mm.mmap(256 * PAGE, RW)
    page = 0
    while host.free_frames > reclaim.marks.low:
        mm.write(start + page * PAGE, word(page))
        page += 1
    assert not kinds(events, "kswapd_wake", "swap_out")
    events.clear()
    mm.write(start + page * PAGE, word(page))
    # Pages go in clusters, so it may be a few more; the write got one of them.
    assert reclaim.marks.high - 1 <= host.free_frames < reclaim.marks.high + CLUSTER
    wake, sleep = [event for event in events if event.kind in ("kswapd_wake", "kswapd_sleep")]
    assert (wake.fields["free"], sleep.fields["free"]) == (reclaim.marks.low, host.free_frames + 1)
    assert sleep.fields["reclaimed"] == len(kinds(events, "swap_out")) == host.free_frames + 1 - reclaim.marks.low
    outs = [event for event in events if event.kind == "swap_out"]
    assert {event.actor for event in (wake, sleep, *outs)} == {"kswapd0"}
    assert events[-1].actor != "kswapd0"
    assert not kinds(events, "direct_reclaim")
    check(mm, start, page + 1)


def test_the_order_for_each_page(mm: Mm, reclaim: Reclaim, steps: Steps) -> None:
    """S → clear → TLB → swap entry → E for each page alone, and only then is it freed."""
    start = mm.mmap(256 * PAGE, RW)
    page = 0
    while mm.host.free_frames > reclaim.marks.low:
        mm.write(start + page * PAGE, word(page))
        page += 1
    steps()
    mm.write(start + page * PAGE, b"x")
    words = steps()
    assert words[-2:] == ["alloc", "set"]
    first = words.index("S CLEAR 0-1")
    assert set(words[:first]) == {"tlb"}  # accessed bits were taken
    for n in range(8):
        at = words.index(f"S CLEAR {n}-{n + 1}")
        assert words[at + 1 : at + 6] == ["clear 1", "tlb", "nonpresent", "E", "free 1"]


def test_four_times_the_memory(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 1024)
    check(mm, start, 1024)
    fill(mm, start, 1024, salt=7)
    verify(host)
    check(mm, start, 1024, salt=7)
    assert reclaim.lru.reclaimed > 3000
    assert reclaim.kills == 0
    mm.munmap(start, 1024 * PAGE)
    assert not swap_of(mm).counts


def test_equal_runs_are_equal(mm: Mm, reclaim: Reclaim) -> None:
    """To the last event, with what is used in an order that makes the lists turn."""

    def run() -> list[Event]:
        host, trace = HostMemory(256 * PAGE), Trace()
        seen: list[Event] = []
        trace.attach(seen.append)
        watch_memory(host, trace)
        mm = Mm(host, trace)
        mm.swapon(512)
        start = mm.mmap(400 * PAGE, RW)
        number = 1
        for _ in range(1500):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF
            mm.write(start + number // 65536 % 400 * PAGE, b"x")
        mm.exit()
        return seen

    one, two = run(), run()
    assert len(kinds(one, "workingset_refault")) > 100
    assert one == two


def test_without_pressure_nobody_comes_here(mm: Mm, reclaim: Reclaim, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocation pays for reclaim is one comparison that it made before, too."""

    def called(*_: object) -> bool:
        raise AssertionError("make_room was called")

    monkeypatch.setattr(Reclaim, "make_room", called)
    anonymous(mm, 150)


# ---- second chance


class Young(MmuNotifier):
    """Has used the pages ``used`` whenever it is asked, and knows what it was asked."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.asked: list[int] = []

    def clear_flush_young(self, start: int, end: int) -> bool:
        self.asked.append(start)
        return start in self.used


def shrink(reclaim: Reclaim, pages: int, *, file: bool = False) -> int:
    return reclaim.lru.shrink_inactive(pages, file)


def test_a_used_page_goes_round_once_and_then_becomes_active(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 3)
    first, second, third = pfns(mm, start, 3)
    assert host.lru_pages(LRU_INACTIVE_ANON) == [third, second, first]
    assert shrink(reclaim, 3) == 0  # all were used
    assert host.lru_pages(LRU_INACTIVE_ANON) == [third, second, first]
    mm.read(start + PAGE, 1)
    assert shrink(reclaim, 3) == 2
    assert [bool(entry(mm, start + page * PAGE) & SWAP) for page in range(3)] == [True, False, True]
    assert host.lru_pages(LRU_ACTIVE_ANON) == [second]
    assert host.flags(second) & PG_ACTIVE


def test_the_secondary_mmu_is_asked_before_a_page_is_unmapped(
    mm: Mm, reclaim: Reclaim, events: list[Event], steps: Steps
) -> None:
    mm.notifiers.register(young := Young())
    start = anonymous(mm, 2)
    mm.madvise(start, 2 * PAGE, MADV_COLD)
    young.used = {start}
    steps()
    assert shrink(reclaim, 2) == 1
    assert young.asked == [start, start + PAGE]
    assert steps()[0] == "S CLEAR 1-2"  # nothing was announced of the page that is in use
    assert entry(mm, start) & MAPPED
    young.used = set()
    assert shrink(reclaim, 1) == 1


def test_an_active_list_that_is_too_long_gives_pages_back(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 4)
    for pfn in pfns(mm, start, 4):
        host.lru_move(pfn, LRU_ACTIVE_ANON)
    assert reclaim.lru.inactive_is_low(False)
    reclaim.lru.shrink_active(2, False)  # used or not
    assert (host.lru_count(LRU_ACTIVE_ANON), host.lru_count(LRU_INACTIVE_ANON)) == (2, 2)
    assert not reclaim.lru.inactive_is_low(False)
    assert host.lru_pages(LRU_INACTIVE_ANON) == [pfns(mm, start, 4)[1], pfns(mm, start, 4)[0]]


def test_locked_pages_stay(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 8)
    mm.mlock(start, 8 * PAGE)
    anonymous(mm, 500)
    assert all(entry(mm, start + page * PAGE) & MAPPED for page in range(8))
    mm.munlock(start, 8 * PAGE)
    reclaim.lru.shrink_active(host.lru_count(LRU_ACTIVE_ANON), False)
    anonymous(mm, 500)
    assert not any(entry(mm, start + page * PAGE) & MAPPED for page in range(8))
    check(mm, start, 8)


def test_a_pinned_page_is_not_even_unmapped(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 1)
    pfn = pfns(mm, start, 1)[0]
    host.get(pfn)
    anonymous(mm, 500)
    assert pte_pfn(entry(mm, start)) == pfn
    assert host.flags(pfn) & PG_LRU
    host.put(pfn)


def test_pages_given_away_go_first_and_without_a_slot(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    mm.swapoff()
    start = anonymous(mm, 16)
    mm.madvise(start, 16 * PAGE, MADV_FREE)
    assert host.lru_count(LRU_INACTIVE_FILE) == 16
    mm.write(start, b"again")
    taken = leave_free(host, reclaim, 4)
    anonymous(mm, 8)
    assert mm.read(start, 5) == b"again"
    assert mm.read(start + PAGE, 8) == bytes(8)
    for pfn in taken:
        host.put(pfn)


def test_active_pages_go_when_nothing_else_can(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    """Though there are enough inactive ones: those are pinned."""
    start = anonymous(mm, 210)
    for pfn in pfns(mm, start, 10):
        host.lru_move(pfn, LRU_ACTIVE_ANON)
    pinned = pfns(mm, start, 210)[10:]
    for pfn in pinned:
        host.get(pfn)
    anonymous(mm, 20)
    assert reclaim.kills == 0
    assert any(entry(mm, start + page * PAGE) & SWAP for page in range(10))
    for pfn in pinned:
        host.put(pfn)


# ---- files


@pytest.fixture
def disk(host: HostMemory, trace: Trace, tmp_path: Path) -> HostFile:
    path = tmp_path / "file"
    path.write_bytes(b"".join(word(page).ljust(PAGE, b".") for page in range(600)))
    return HostFile(host, trace, str(path), writable=True)


def test_clean_pages_of_a_file_are_dropped(mm: Mm, host: HostMemory, reclaim: Reclaim, disk: HostFile) -> None:
    mm.swapoff()
    start = mm.mmap(600 * PAGE, 1, MAP_PRIVATE, file=disk)
    check(mm, start, 600)
    assert len(disk.pages) < 224
    assert host.lru_count(LRU_INACTIVE_FILE) + host.lru_count(LRU_ACTIVE_FILE) == len(disk.pages)
    check(mm, start, 600)
    assert disk.pread(599 * PAGE, 8) == word(599)
    assert reclaim.workingset.refaults


def test_dirty_pages_of_a_file_are_written_first(
    mm: Mm, reclaim: Reclaim, disk: HostFile, tmp_path: Path, events: list[Event]
) -> None:
    mm.swapoff()
    start = mm.mmap(600 * PAGE, RW, MAP_SHARED, file=disk)
    fill(mm, start, 600, salt=5)
    assert len(disk.pages) < 224
    content = (tmp_path / "file").read_bytes()
    gone = [page for page in range(600) if page not in disk.pages]
    assert all(content[page * PAGE : page * PAGE + 8] == word(page, 5) for page in gone)
    check(mm, start, 600, salt=5)


def test_a_file_that_cannot_be_written_keeps_its_pages(
    mm: Mm, host: HostMemory, reclaim: Reclaim, disk: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = mm.mmap(8 * PAGE, RW, MAP_SHARED, file=disk)
    fill(mm, start, 8, salt=1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("xipvm.mmu.host_file.os.pwrite", full)
        assert shrink(reclaim, 8, file=True) == shrink(reclaim, 8, file=True) == 0
        assert len(disk.pages) == 8
    assert shrink(reclaim, 8, file=True) == 8
    check(mm, start, 8, salt=1)


def test_file_system_calls_make_room_as_faults_do(mm: Mm, host: HostMemory, reclaim: Reclaim, disk: HostFile) -> None:
    for page in range(600):
        disk.pwrite(page * PAGE, word(page, 3))
    for page in range(600):
        assert disk.pread(page * PAGE, 8) == word(page, 3)


def test_memory_files_go_to_swap(mm: Mm, host: HostMemory, trace: Trace, reclaim: Reclaim) -> None:
    file = ShmemFile(host, trace, "shmem", 600 * PAGE)
    start = mm.mmap(600 * PAGE, RW, MAP_SHARED, file=file)
    fill(mm, start, 600)
    assert len(file.swapped) > 380
    verify(host)
    check(mm, start, 600)
    file.truncate(300 * PAGE)
    assert not any(pgoff >= 300 for pgoff in (*file.pages, *file.swapped))
    check(mm, start, 300)


def test_file_pages_go_before_anonymous_ones(mm: Mm, host: HostMemory, reclaim: Reclaim, disk: HostFile) -> None:
    """With nothing known of either, 140 to 60."""
    start = anonymous(mm, 100)
    again = mm.mmap(100 * PAGE, 1, MAP_PRIVATE, file=disk)
    check(mm, again, 100)
    anonymous(mm, 60)
    stay = sum(bool(entry(mm, start + page * PAGE) & MAPPED) for page in range(100))
    assert len(disk.pages) < stay


# ---- the working set


def test_a_page_that_comes_back_soon_is_active(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 300)
    for pfn in host.lru_pages(LRU_INACTIVE_ANON)[:50]:
        host.lru_move(pfn, LRU_ACTIVE_ANON)
    gone = max(page for page in range(300) if entry(mm, start + page * PAGE) & SWAP)
    mm.read(start + gone * PAGE, 1)
    assert host.flags(pfns(mm, start, 300)[gone]) & PG_ACTIVE
    assert reclaim.workingset.activations == 1


def test_a_page_that_comes_back_late_is_not(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    start = anonymous(mm, 600)
    mm.read(start, 1)
    assert not host.flags(pfns(mm, start, 1)[0]) & PG_ACTIVE
    assert (reclaim.workingset.refaults, reclaim.workingset.activations) == (1, 0)


# ---- who reclaims


def test_kswapd_as_an_actor(mm: Mm, host: HostMemory, reclaim: Reclaim, trace: Trace, events: list[Event]) -> None:
    """Allocations only wake it, and go on; it runs when its turn comes."""
    start = mm.mmap(600 * PAGE, RW)

    def work() -> None:
        fill(mm, start, 600)
        check(mm, start, 600)
        reclaim.stop()

    turn = 0

    def choose(n: int, label: str) -> int:
        nonlocal turn
        turn += 1
        return turn % n

    scheduler = Scheduler(choose, trace=trace)
    scheduler.spawn("kswapd0", reclaim.kswapd)
    scheduler.spawn("writer", work)
    scheduler.run()
    assert not reclaim.scheduled
    by = {event.actor for event in events if event.kind == "swap_out"}
    assert "kswapd0" in by
    verify(host)


def test_direct_reclaim_at_min_when_kswapd_does_not_come(
    mm: Mm, host: HostMemory, reclaim: Reclaim, events: list[Event]
) -> None:
    reclaim.scheduled = True  # and nobody does it
    start = anonymous(mm, 300)
    assert reclaim.wanted
    assert host.free_frames >= reclaim.marks.min
    assert kinds(events, "direct_reclaim")
    assert not kinds(events, "kswapd_wake")
    check(mm, start, 300)


def test_retry_is_for_who_is_no_fault(mm: Mm, host: HostMemory, reclaim: Reclaim) -> None:
    anonymous(mm, 200)
    taken = [retry(host, lambda: mm.alloc_frame(False)) for _ in range(40)]
    assert host.free_frames >= reclaim.marks.min
    for pfn in taken:
        host.put(pfn)


def test_watch_memory_twice_is_once(host: HostMemory, trace: Trace, reclaim: Reclaim) -> None:
    assert watch_memory(host, trace) is reclaim


def test_the_last_round_looks_at_every_page(mm: Mm, host: HostMemory, reclaim: Reclaim, disk: HostFile) -> None:
    """However much one kind is preferred."""
    anonymous(mm, 3)
    disk.pread(0, 8)
    reclaim.lru.note_cost(False, 10)
    assert reclaim.lru.quotas(0) == [3, 0, 1, 0]
    mm.swapoff()
    assert reclaim.lru.quotas(0) == [0, 0, 1, 0]
