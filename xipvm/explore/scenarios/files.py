"""Pages of files: cut off, moved, mapped twice, and copied when somebody writes to them."""

from __future__ import annotations

from contextlib import suppress

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, expect, furnish
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pageout import pageout
from xipvm.mmu.pte import PRESENT
from xipvm.mmu.secondary.sva import Sva
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED


@scenario
def cow_under_host_threads(scene: Scene) -> None:
    """After a fork two threads of the parent, and its guest, use a page that one of them writes to."""
    mm, hva, _ = furnish(scene)
    writer, reader = scene.thread(mm), scene.thread(mm)
    reader.load(hva, 8)
    child = mm.fork("child")
    reader.load(hva, 8)
    scene.mms.append(child)

    def write() -> None:
        writer.store(hva, NEW)
        found = writer.load(hva, 8)
        if found != NEW:
            raise AssertionError(f"the writer reads {found!r}")

    scene.actor("writer", write)
    scene.actor("reader", reader.load, hva, 8)
    scene.afterwards(lambda: expect(child, hva, OLD))


@scenario
def unmapped_under_host_threads(scene: Scene) -> None:
    """A thread of the host and a guest use memory that another thread unmaps and maps again."""
    mm, hva, _ = furnish(scene)
    thread = scene.thread(mm)
    thread.load(hva, 8)
    other = mm.mmap(PAGE_SIZE, RW)

    def host() -> None:
        mm.munmap(hva, 2 * PAGE_SIZE)
        HostThread(mm, "thread1").store(other, b"reused!!")

    scene.actor("host", host)
    scene.actor("thread0", _try_load, thread, hva)


def _try_load(thread: HostThread, hva: int) -> None:
    with suppress(MmError):
        thread.load(hva, 8)


@scenario
def mremap_against_truncate(scene: Scene) -> None:
    """Memory of a file, which a guest and a thread have used, moves to other addresses while the file is cut off."""
    file = ShmemFile(scene.host, scene.trace, "memory", PAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.mmap(PAGE_SIZE, RW, addr=hva + PAGE_SIZE)  # so that it cannot grow where it is
    scene.vcpu(scene.kvm(mm, hva, gfn=GFN)).store(GFN, OLD)
    scene.thread(mm).load(hva, 8)
    scene.actor("host", mm.mremap, hva, PAGE_SIZE, 2 * PAGE_SIZE, MREMAP_MAYMOVE)
    scene.actor("truncate", file.truncate, 0)


@scenario
def mremap_against_swapout(scene: Scene) -> None:
    """Anonymous memory moves to other addresses while its pages go to swap."""
    mm, hva, _ = furnish(scene)
    mm.swapon(16)
    thread = scene.thread(mm)
    thread.load(hva, 8)
    mm.mmap(PAGE_SIZE, RW, addr=hva + 2 * PAGE_SIZE)  # so that it cannot grow where it is
    places: list[int] = []

    def host() -> None:
        places.append(mm.mremap(hva, 2 * PAGE_SIZE, 4 * PAGE_SIZE, MREMAP_MAYMOVE))
        pageout(mm, places[0], places[0] + 2 * PAGE_SIZE)

    scene.actor("host", host)
    scene.actor("thread0", _try_load, thread, hva)


@scenario
def private_copies_against_truncate(scene: Scene) -> None:
    """Private copies of a file's pages are made while the file is cut off: none is left behind its end."""
    file = ShmemFile(scene.host, scene.trace, "memory", 2 * PAGE_SIZE)
    scene.undo(file.close)
    file.pwrite(0, OLD)
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW, MAP_PRIVATE, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))
    vcpu.load(GFN)
    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("truncate", file.truncate, 0)
    scene.afterwards(lambda: _nothing_at(mm, hva))


def _nothing_at(mm: Mm, hva: int) -> None:
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    if entry & PRESENT:
        raise AssertionError(f"{mm.name} maps {entry:#x} at {hva:#x}, behind the end of the file")


@scenario(protocols=("modern",))
def a_device_that_follows_the_host_s_tlbs(scene: Scene) -> None:
    """Shared virtual addressing: the device has a TLB and nothing else, and is told of the host's flushes."""
    file = ShmemFile(scene.host, scene.trace, "memory", 2 * PAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW, MAP_SHARED, file=file)
    device = scene.watch(Sva(mm, "sva0"))
    device.store(hva, OLD)

    def use() -> None:
        with suppress(MmError):
            device.store(hva, NEW)

    scene.actor("sva0", use)
    scene.actor("truncate", file.truncate, 0)
