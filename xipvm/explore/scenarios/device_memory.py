"""Devices that pin nothing: DMA that is under way when its page goes, and pages that move to a device's own memory."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.notifier import RangeEvent

_NUMBER: Final = 8


def _number(mm: Mm, hva: int) -> int:
    return int.from_bytes(mm.read(hva, _NUMBER), "little")


def _adds(thread: HostThread, hva: int, times: int) -> None:
    """A CPU adds 1, as often as that, not atomically: nobody else may touch the page meanwhile."""
    for _ in range(times):
        value = int.from_bytes(thread.load(hva, _NUMBER), "little")
        thread.store(hva, (value + 1).to_bytes(_NUMBER, "little"))


def furnish(scene: Scene) -> tuple[Mm, int, Dmirror]:
    """An mm with one page at the returned address, and a device that has four of its own."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    return mm, hva, scene.watch(Dmirror(mm, pages=4))


@scenario(protocols=("modern",))
def dma_is_under_way(scene: Scene) -> None:
    """A DMA engine writes to a page that is given up and used again."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    umem = scene.watch(OdpUmem(mm, hva, PAGE_SIZE))
    umem.write(0, OLD)

    def process() -> None:
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
        HostThread(mm).store(hva, OLD)

    scene.actor("engine0", umem.write, 0, NEW)
    scene.actor("process", process)


@scenario(protocols=("modern",))
def dma_against_swapout(scene: Scene) -> None:
    """A DMA engine writes to a page that goes to swap, and comes back."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    mm.swapon(16)
    umem = scene.watch(OdpUmem(mm, hva, PAGE_SIZE))
    umem.write(0, OLD)
    pageout(mm, hva, hva + PAGE_SIZE)
    umem.read(0, 1)
    scene.actor("engine0", umem.write, 0, NEW)
    scene.actor("kswapd", pageout, mm, hva, hva + PAGE_SIZE)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def dma_while_another_declines(scene: Scene) -> None:
    """Who must not wait asks in vain; the engine's fault and the invalidations behind it go on."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    umem = scene.watch(OdpUmem(mm, hva, PAGE_SIZE))
    umem.write(0, OLD)

    def reaper() -> None:
        with suppress(MmError):  # EAGAIN: the engine's driver sleeps
            range = mm.notifiers.invalidate_range_start(hva, hva + PAGE_SIZE, RangeEvent.UNMAP, blockable=False)
            mm.notifiers.invalidate_range_end(range)

    def process() -> None:
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)

    scene.actor("engine0", umem.write, 0, NEW)
    scene.actor("oom_reaper", reaper)
    scene.actor("process", process)


@scenario(protocols=("modern",))
def a_page_goes_to_the_device(scene: Scene) -> None:
    """A device writes to a page that goes to its memory meanwhile; nothing of it may be lost."""
    mm, hva, device = furnish(scene)
    device.write(hva, OLD)

    def driver() -> None:
        with suppress(MmError):  # ENOENT: it was in use
            device.migrate_to_dev(hva, 1)

    scene.actor("queue0", device.write, hva, NEW)
    scene.actor("driver", driver)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def a_page_comes_back(scene: Scene) -> None:
    """A CPU writes to a page in a device's memory, half of which the device writes, too."""
    mm, hva, device = furnish(scene)
    device.write(hva, OLD)
    device.migrate_to_dev(hva, 1)
    scene.actor("queue0", device.write, hva, NEW)
    scene.actor("cpu", HostThread(mm).store, hva + 64, NEW)
    scene.afterwards(lambda: expect(mm, hva, NEW))
    scene.afterwards(lambda: expect(mm, hva + 64, NEW))


@scenario(protocols=("modern",))
def a_page_of_the_device_is_shared(scene: Scene) -> None:
    """A process forks while its page is in a device's memory; each of the two writes."""
    mm, hva, device = furnish(scene)
    device.write(hva, OLD)
    device.migrate_to_dev(hva, 1)
    child = mm.fork()
    scene.mms.append(child)
    scene.actor("parent", device.write, hva, NEW)
    scene.actor("child", HostThread(child).store, hva + 64, NEW)

    def check() -> None:
        expect(mm, hva, NEW)
        expect(mm, hva + 64, bytes(len(NEW)))
        expect(child, hva, OLD)
        expect(child, hva + 64, NEW)

    scene.afterwards(check)


@scenario(protocols=("modern",))
def two_cpus_want_a_page_of_the_device(scene: Scene) -> None:
    """Two processes that share a page in a device's memory read it, at once."""
    mm, hva, device = furnish(scene)
    device.write(hva, OLD)
    device.migrate_to_dev(hva, 1)
    child = mm.fork()
    scene.mms.append(child)
    scene.actor("parent", HostThread(mm).load, hva, len(OLD))
    scene.actor("child", HostThread(child).load, hva, len(OLD))
    scene.afterwards(lambda: expect(mm, hva, OLD))
    scene.afterwards(lambda: expect(child, hva, OLD))


@scenario(protocols=("modern",))
def a_page_of_the_device_is_given_up(scene: Scene) -> None:
    """A process gives up a page that goes to a device's memory, and uses it again."""
    mm, hva, device = furnish(scene)
    device.write(hva, OLD)

    def driver() -> None:
        with suppress(MmError):
            device.migrate_to_dev(hva, 1)

    def process() -> None:
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
        HostThread(mm).store(hva, NEW)

    scene.actor("driver", driver)
    scene.actor("process", process)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def a_page_is_the_device_s_alone(scene: Scene) -> None:
    """A device adds to a number by turns with a CPU that knows no atomic accesses of devices."""
    mm, hva, device = furnish(scene)
    device.update(hva, 1)
    thread = HostThread(mm)
    scene.actor("queue0", device.update, hva, 1)
    scene.actor("cpu", thread.store, hva + 64, NEW)
    scene.afterwards(lambda: _is(mm, hva, 2))


@scenario(protocols=("modern",))
def an_exclusive_page_is_forked(scene: Scene) -> None:
    """A process forks while a device has its page for itself; the CPU and the device write afterwards."""
    mm, hva, device = furnish(scene)
    device.update(hva, 1)
    children: list[Mm] = []

    def process() -> None:
        children.append(mm.fork())
        scene.mms.append(children[0])
        _adds(HostThread(children[0]), hva, 1)

    def check() -> None:
        _is(mm, hva, 2)
        if _number(children[0], hva) not in (2, 3):
            raise AssertionError(f"the child has {_number(children[0], hva)}")

    scene.actor("queue0", device.update, hva, 1)
    scene.actor("process", process)
    scene.afterwards(check)


def _is(mm: Mm, hva: int, wanted: int) -> None:
    """Raises AssertionError."""
    if _number(mm, hva) != wanted:
        raise AssertionError(f"{hva:#x} in {mm.name} has {_number(mm, hva)}, not {wanted}")
