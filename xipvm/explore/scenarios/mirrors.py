"""Devices with page tables of their own: told of everything, or watching a range; and who only looks."""

from __future__ import annotations

from contextlib import suppress

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.mirror import PAGES, SIZE, Engine, Mirror, Odp, Watcher
from xipvm.explore.scenarios.faults import NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.vma import PROT_READ
from xipvm.notifier import RangeEvent


def _given_up(mm: Mm, hva: int) -> None:
    """Gives both pages back, and uses the first one again."""
    mm.madvise(hva, SIZE, MADV_DONTNEED)
    HostThread(mm).store(hva, OLD)


@scenario
def a_mirror_against_dontneed(scene: Scene) -> None:
    """A device's first access and another's second one, while the process gives the pages back."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    mirror = scene.watch(Mirror(mm, hva, PAGES))
    first, second = scene.vcpu(mirror), scene.vcpu(mirror)
    second.store(1, OLD)
    scene.actor("queue0", first.store, 0, NEW)
    scene.actor("queue1", second.load, 1)
    scene.actor("process", _given_up, mm, hva)


@scenario
def a_mirror_against_swapout(scene: Scene) -> None:
    """The pages of a device go to swap and come back."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    mm.swapon(16)
    queue = scene.vcpu(scene.watch(Mirror(mm, hva, PAGES)))
    queue.store(0, OLD)
    scene.actor("queue0", queue.store, 0, NEW)
    scene.actor("kswapd", pageout, mm, hva, hva + SIZE)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario
def a_mirror_is_closed(scene: Scene) -> None:
    """A device goes while one of its queues faults; the process keeps its memory."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    HostThread(mm).store(hva, OLD)
    mirror = scene.watch(Mirror(mm, hva, PAGES))
    queue = scene.vcpu(mirror)
    queue.load(1)
    scene.actor("queue0", queue.load, 0)
    scene.actor("driver", mirror.destroy)


@scenario
def an_engine_against_mprotect(scene: Scene) -> None:
    """A DMA engine without a TLB writes to pages that lose the right to be written, and get it back."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    engine = scene.watch(Engine(mm, hva, PAGES))
    engine.write(0, OLD)

    def process() -> None:
        mm.mprotect(hva, SIZE, PROT_READ)
        mm.mprotect(hva, SIZE, RW)

    scene.actor("engine0", engine.write, 0, NEW)
    scene.actor("process", process)


@scenario
def an_engine_s_page_is_swapped_twice(scene: Scene) -> None:
    """A page that came back from swap is read by a DMA engine, which may write it from then on, and goes again."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    mm.swapon(16)
    engine = scene.watch(Engine(mm, hva, 1))
    engine.write(0, OLD)
    pageout(mm, hva, hva + PAGE_SIZE)
    mm.read(hva, 1)
    scene.actor("engine0", engine.read, 0)
    scene.actor("kswapd", pageout, mm, hva, hva + PAGE_SIZE)


@scenario(protocols=("modern",))
def a_watched_page_is_given_up(scene: Scene) -> None:
    """As a_mirror_against_dontneed, for a device that watches its range."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    odp = scene.watch(Odp(mm, hva, PAGES))
    first, second = scene.vcpu(odp), scene.vcpu(odp)
    second.store(1, OLD)
    scene.actor("queue0", first.store, 0, NEW)
    scene.actor("queue1", second.load, 1)
    scene.actor("process", _given_up, mm, hva)


@scenario(protocols=("modern",))
def a_watched_page_moves(scene: Scene) -> None:
    """The pages of a watched range move to other frames, or lose the right to be written for a while."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    queue = scene.vcpu(scene.watch(Odp(mm, hva, PAGES)))
    queue.store(0, OLD)

    def protect() -> None:
        mm.mprotect(hva, SIZE, PROT_READ)
        mm.mprotect(hva, SIZE, RW)

    scene.actor("queue0", queue.store, 0, NEW)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.actor("process", protect)


@scenario(protocols=("modern",))
def two_ranges_are_watched(scene: Scene) -> None:
    """Two devices watch a page each and one watches both; the process gives up one of them, then all."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    first = scene.vcpu(scene.watch(Odp(mm, hva, 1)))
    both = scene.vcpu(scene.watch(Odp(mm, hva, PAGES, page=0x10, name="odp1")))
    both.store(0x11, OLD)

    def process() -> None:
        mm.madvise(hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        mm.munmap(hva, SIZE)

    scene.actor("queue0", first.store, 0, NEW)
    scene.actor("queue1", both.load, 0x11)
    scene.actor("process", process)


@scenario(protocols=("modern",))
def a_snapshot_is_taken(scene: Scene) -> None:
    """Somebody who translates nothing looks at two pages, which the process gives up and uses again."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    watcher = scene.watch(Watcher(mm, hva, PAGES))
    HostThread(mm).store(hva, OLD)
    scene.actor("watcher", watcher.snapshot)
    scene.actor("process", _given_up, mm, hva)


@scenario(protocols=("modern",))
def a_watched_range_is_left(scene: Scene) -> None:
    """A device goes while its range is invalidated; behind that nobody may call it."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    odp = scene.watch(Odp(mm, hva, PAGES))
    scene.vcpu(odp).store(0, OLD)
    scene.actor("driver", odp.destroy)
    scene.actor("process", mm.madvise, hva, SIZE, MADV_DONTNEED)


@scenario(protocols=("modern",))
def a_watched_range_is_declined(scene: Scene) -> None:
    """Somebody who must not wait finds a device at work, and goes without; the device's fault is not to suffer."""
    mm = scene.mm()
    hva = mm.mmap(SIZE, RW)
    queue = scene.vcpu(scene.watch(Odp(mm, hva, PAGES)))

    def reaper() -> None:
        with suppress(MmError):  # EAGAIN
            range = mm.notifiers.invalidate_range_start(hva, hva + SIZE, RangeEvent.UNMAP, blockable=False)
            mm.notifiers.invalidate_range_end(range)

    scene.actor("queue0", queue.store, 0, NEW)
    scene.actor("oom_reaper", reaper)
    scene.actor("process", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
