"""A GRU's contexts, which have TLBs only, against what takes their pages away.

Two contexts are on two chiplets; what they drop in is checked against the ranges that are open meanwhile.
"""

from __future__ import annotations

from contextlib import suppress

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, expect, read
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.gru import GruBase
from xipvm.mmu.secondary.gru_hardware import GRUMAXINVAL
from xipvm.mmu.vma import PROT_READ


def furnish(scene: Scene) -> tuple[Mm, int, GruBase]:
    """An mm with two pages at the returned address, both written, that two contexts see at GFN."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    gru = scene.gru(mm, hva, pages=2, gfn=GFN)
    first, second = scene.vcpu(gru), scene.vcpu(gru)
    first.store(GFN, OLD)
    second.load(GFN)
    scene.actor("gru0", first.store, GFN, NEW)
    scene.actor("gru1", read, second)
    return mm, hva, gru


@scenario
def gru_against_munmap(scene: Scene) -> None:
    """munmap of memory that two contexts use; the frame is given to somebody else at once."""
    mm, hva, _ = furnish(scene)
    other = mm.mmap(PAGE_SIZE, RW)
    thread = HostThread(mm)

    def host() -> None:
        mm.munmap(hva, 2 * PAGE_SIZE)
        thread.store(other, b"reused!!")

    scene.actor("host", host)


@scenario
def gru_against_cow(scene: Scene) -> None:
    """fork; the parent's thread writes first, then its contexts have the copy."""
    mm, hva, _ = furnish(scene)
    thread = HostThread(mm)

    def host() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        thread.store(hva + 8, NEW)
        seen = child.read(hva + 8, 8)
        if seen != bytes(8):
            raise AssertionError(f"the child reads {seen!r}, which its parent wrote")

    scene.actor("host", host)


@scenario
def gru_against_mprotect(scene: Scene) -> None:
    """The page becomes read-only, and writable again."""
    mm, hva, _ = furnish(scene)

    def host() -> None:
        mm.mprotect(hva, 2 * PAGE_SIZE, PROT_READ)
        mm.mprotect(hva, 2 * PAGE_SIZE, RW)

    scene.actor("host", host)


@scenario
def gru_against_swapout(scene: Scene) -> None:
    """The page goes to swap; a context brings it back, and what it wrote is there."""
    mm, hva, _ = furnish(scene)
    mm.swapon(16)

    def kswapd() -> None:
        pageout(mm, hva, hva + 2 * PAGE_SIZE)  # in 2008 it finds that the page was used
        pageout(mm, hva, hva + 2 * PAGE_SIZE)

    scene.actor("kswapd", kswapd)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def gru_against_migrate(scene: Scene) -> None:
    """The page moves to another frame."""
    mm, hva, _ = furnish(scene)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario
def gru_first_access_against_dontneed(scene: Scene) -> None:
    """A context's first access to a page that a thread has written, while the host gives the page up."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.gru(mm, hva, gfn=GFN))
    HostThread(mm).store(hva, OLD)
    scene.actor("gru0", vcpu.store, GFN, NEW)
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@scenario
def gru_beside_two_ranges(scene: Scene) -> None:
    """A context's first access while two threads give up pages, that one too: it sleeps until no range is open."""
    mm = scene.mm()
    hva, other = mm.mmap(PAGE_SIZE, RW), mm.mmap(PAGE_SIZE, PROT_READ)
    vcpu = scene.vcpu(scene.gru(mm, hva, gfn=GFN))
    HostThread(mm).store(hva, OLD)
    scene.actor("gru0", vcpu.store, GFN, NEW)
    scene.actor("host0", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
    scene.actor("host1", mm.madvise, other, PAGE_SIZE, MADV_DONTNEED)


@scenario
def gru_context_comes_back(scene: Scene) -> None:
    """A context is off its chiplet, whose TLB still has its pages, while these go; then it is loaded again."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    gru = scene.gru(mm, hva, gfn=GFN)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, OLD)

    def context() -> None:
        gru.port(0).unload()
        read(vcpu)

    scene.actor("gru0", context)
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@scenario
def gru_and_a_long_range(scene: Scene) -> None:
    """More pages go at once than an invalidate command covers."""
    mm = scene.mm()
    pages = GRUMAXINVAL + 16
    hva = mm.mmap(pages * PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.gru(mm, hva, pages=pages, gfn=GFN))
    vcpu.store(GFN, OLD)
    vcpu.store(GFN + pages - 1, OLD)
    scene.actor("gru0", vcpu.store, GFN + pages - 2, NEW)
    scene.actor("host", mm.munmap, hva, pages * PAGE_SIZE)


@scenario
def gru_of_two_processes(scene: Scene) -> None:
    """Two mms share a chiplet, under an ASID each; one unmaps its page, the other has its own there."""
    mms = [scene.mm(), scene.mm()]
    hvas = [mm.mmap(PAGE_SIZE, RW) for mm in mms]
    vcpus = [scene.vcpu(scene.gru(mm, hva, gfn=GFN)) for mm, hva in zip(mms, hvas, strict=True)]
    for vcpu in vcpus:
        vcpu.store(GFN, OLD)
    scene.actor("gru0", vcpus[0].store, GFN, NEW)
    scene.actor("gru1", vcpus[1].store, GFN, NEW)
    scene.actor("host", mms[0].munmap, hvas[0], PAGE_SIZE)
    scene.afterwards(lambda: expect(mms[1], hvas[1], NEW))


@scenario
def gru_against_a_moved_window(scene: Scene) -> None:
    """What the context's pages are changes under it, then the memory that they were goes."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    gru = scene.gru(mm, hva, gfn=GFN)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, OLD)

    def host() -> None:
        gru.set_memslot(0, 2 * GFN, 1, hva)
        mm.munmap(hva, PAGE_SIZE)

    scene.actor("gru0", vcpu.store, GFN, NEW)
    scene.actor("host", host)


@scenario
def gru_against_exit(scene: Scene) -> None:
    """The process ends while a context uses its memory."""
    mm, _, _ = furnish(scene)
    scene.actor("exit", mm.exit)


@scenario
def gru_given_back(scene: Scene) -> None:
    """The last user gives the GRU back, then the memory goes that its contexts had used."""
    mm, hva, gru = furnish(scene)

    def close() -> None:
        with suppress(MmError):
            gru.destroy()
        mm.munmap(hva, 2 * PAGE_SIZE)

    scene.actor("close", close)
