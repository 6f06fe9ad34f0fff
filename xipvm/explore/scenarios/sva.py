"""A device on the host's own page table, with a TLB that follows the host's, against what takes its pages away."""

from __future__ import annotations

from contextlib import suppress

from xipvm.address import PAGE_SIZE
from xipvm.explore.scenarios.faults import NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_MERGEABLE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.sva import Sva, SvaError
from xipvm.mmu.vma import PROT_READ


def furnish(scene: Scene) -> tuple[Mm, int, Sva]:
    """An mm with two pages at the returned address, both written, and a device that writes to the first."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    device = scene.watch(Sva(mm))
    device.store(hva, OLD)
    device.store(hva + PAGE_SIZE, OLD)

    def use() -> None:
        with suppress(SvaError):
            device.store(hva, NEW)
            seen = device.load(hva, len(NEW))
            if seen not in (NEW, bytes(8)):
                raise AssertionError(f"{device.name} read {seen!r} where it had written {NEW!r}")

    scene.actor("sva0", use)
    return mm, hva, device


@scenario(protocols=("modern",))
def sva_against_munmap(scene: Scene) -> None:
    """munmap of what the device uses; the frames are given to somebody else at once."""
    mm, hva, _ = furnish(scene)
    other = mm.mmap(2 * PAGE_SIZE, RW)
    thread = HostThread(mm)

    def host() -> None:
        mm.munmap(hva, 2 * PAGE_SIZE)
        thread.store(other, b"reused!!")
        thread.store(other + PAGE_SIZE, b"reused!!")

    scene.actor("host", host)


@scenario(protocols=("modern",))
def sva_against_dontneed(scene: Scene) -> None:
    """The device may find a fresh page."""
    mm, hva, _ = furnish(scene)
    scene.actor("host", mm.madvise, hva, 2 * PAGE_SIZE, MADV_DONTNEED)


@scenario(protocols=("modern",))
def sva_first_access_against_dontneed(scene: Scene) -> None:
    """The device's first access to a page that a thread has written, while the host gives the page up."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    device = scene.watch(Sva(mm))
    HostThread(mm).store(hva, OLD)
    scene.actor("sva0", device.store, hva, NEW)
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@scenario(protocols=("modern",))
def sva_against_cow(scene: Scene) -> None:
    """fork; a thread of the parent writes first, and neither that nor what the device writes is the child's."""
    mm, hva, device = furnish(scene)
    thread = HostThread(mm)

    def host() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        before = child.read(hva, 16)
        thread.store(hva + 8, NEW)
        device.load(hva + PAGE_SIZE, 8)
        seen = child.read(hva, 16)
        if seen != before:
            raise AssertionError(f"the child reads {seen!r}, and had {before!r}")

    scene.actor("host", host)


@scenario(protocols=("modern",))
def sva_writes_behind_a_fork(scene: Scene) -> None:
    """After a fork the device writes to a page that parent and child share: the parent gets a copy, for it too."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    device = scene.watch(Sva(mm))
    device.store(hva, OLD)
    children: list[Mm] = []

    def host() -> None:
        children.append(mm.fork("child"))
        scene.undo(children[0].exit)
        device.store(hva, NEW)

    scene.actor("host", host)
    scene.actor("sva0", device.load, hva, 8)
    scene.afterwards(lambda: expect(children[0], hva, OLD))
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def sva_against_mprotect(scene: Scene) -> None:
    """The pages become read-only, and stay so."""
    mm, hva, _ = furnish(scene)
    scene.actor("host", mm.mprotect, hva, 2 * PAGE_SIZE, PROT_READ)


@scenario(protocols=("modern",))
def sva_against_swapout(scene: Scene) -> None:
    """The pages go to swap; the device asks for them, and what it wrote is there."""
    mm, hva, _ = furnish(scene)
    mm.swapon(16)
    scene.actor("kswapd", pageout, mm, hva, hva + 2 * PAGE_SIZE)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def sva_against_migrate(scene: Scene) -> None:
    """The pages move to other frames."""
    mm, hva, _ = furnish(scene)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def sva_against_ksm(scene: Scene) -> None:
    """KSM makes one page of two equal ones, and the device writes to one of them."""
    mm, hva, _ = furnish(scene)
    mm.madvise(hva, 2 * PAGE_SIZE, MADV_MERGEABLE)

    def ksmd() -> None:
        mm.ksm_scan()
        mm.ksm_scan()

    scene.actor("ksmd", ksmd)
    scene.afterwards(lambda: expect(mm, hva, NEW))
    scene.afterwards(lambda: expect(mm, hva + PAGE_SIZE, OLD))


@scenario(protocols=("modern",))
def sva_against_exit(scene: Scene) -> None:
    """The process ends while the device is at work."""
    mm, _, _ = furnish(scene)
    scene.actor("exit", mm.exit)


@scenario(protocols=("modern",))
def sva_against_unbind(scene: Scene) -> None:
    """The process is unbound from the device, then gives its memory up."""
    mm, hva, device = furnish(scene)

    def unbind() -> None:
        device.destroy()
        mm.munmap(hva, 2 * PAGE_SIZE)

    scene.actor("unbind", unbind)
