"""A guest's access against every operation that can take its page away.

In each, one vCPU writes while the host changes its mind, and another vCPU reads the same page. Afterwards what was
written is there, or the page is what the operation makes of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_MERGEABLE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.vma import MAP_SHARED, PROT_READ, PROT_WRITE

RW: Final = PROT_READ | PROT_WRITE
GFN: Final = 0x10
OLD: Final = b"old page"
NEW: Final = b"new word"


def furnish(scene: Scene, *, file: ShmemFile | None = None) -> tuple[Mm, int, KvmBase]:
    """An mm with two pages at the returned address, both written, that a guest of two vCPUs sees at GFN."""
    mm = scene.mm()
    if file is None:
        hva = mm.mmap(2 * PAGE_SIZE, RW)
    else:
        hva = mm.mmap(2 * PAGE_SIZE, RW, MAP_SHARED, file=file)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    first, second = scene.vcpu(kvm), scene.vcpu(kvm)
    first.store(GFN, OLD)
    second.load(GFN)
    scene.actor("vcpu0", first.store, GFN, NEW)
    scene.actor("vcpu1", read, second)
    return mm, hva, kvm


def read(vcpu: ScriptedVcpu) -> None:
    """What a guest may see there: the old word, the new one, or a fresh page. Raises AssertionError."""
    seen = vcpu.load(GFN)
    if seen not in (OLD, NEW, bytes(8)):
        raise AssertionError(f"vcpu{vcpu.index} read {seen!r}, which nobody wrote")


@scenario
def fault_against_munmap(scene: Scene) -> None:
    """munmap of memory that a guest uses; the frame is given to somebody else at once."""
    mm, hva, _ = furnish(scene)
    other = mm.mmap(PAGE_SIZE, RW)
    thread = HostThread(mm)

    def host() -> None:
        mm.munmap(hva, 2 * PAGE_SIZE)
        thread.store(other, b"reused!!")

    scene.actor("host", host)


@scenario
def fault_against_dontneed(scene: Scene) -> None:
    """madvise(MADV_DONTNEED): the guest may find a fresh page, and the host's thread sees what it writes there."""
    mm, hva, _ = furnish(scene)
    thread = HostThread(mm)
    thread.store(hva + PAGE_SIZE, b"x")

    def host() -> None:
        mm.madvise(hva, 2 * PAGE_SIZE, MADV_DONTNEED)
        thread.store(hva + PAGE_SIZE, b"y")

    scene.actor("host", host)


@scenario
def fault_against_mprotect(scene: Scene) -> None:
    """mprotect to read-only and back."""
    mm, hva, _ = furnish(scene)

    def host() -> None:
        mm.mprotect(hva, 2 * PAGE_SIZE, PROT_READ)
        mm.mprotect(hva, 2 * PAGE_SIZE, RW)

    scene.actor("host", host)


@scenario
def fault_against_cow(scene: Scene) -> None:
    """fork; the child writes to its copy, the guest to the parent's."""
    mm, hva, _ = furnish(scene)

    def host() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        HostThread(child).store(hva, b"child's!")

    scene.actor("host", host)


@scenario
def fault_against_swapout(scene: Scene) -> None:
    """The page goes to swap; the guest brings it back."""
    mm, hva, _ = furnish(scene)
    mm.swapon(16)
    scene.actor("kswapd", pageout, mm, hva, hva + 2 * PAGE_SIZE)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def fault_against_migrate(scene: Scene) -> None:
    """The page moves to another frame."""
    mm, hva, _ = furnish(scene)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def fault_against_ksm(scene: Scene) -> None:
    """KSM makes one page of two equal ones, and the guest writes to one of them."""
    mm, hva, _ = furnish(scene)
    HostThread(mm).store(hva + PAGE_SIZE, OLD)
    mm.madvise(hva, 2 * PAGE_SIZE, MADV_MERGEABLE)

    def ksmd() -> None:
        mm.ksm_scan()
        mm.ksm_scan()

    scene.actor("ksmd", ksmd)
    scene.afterwards(lambda: expect(mm, hva, NEW))
    scene.afterwards(lambda: expect(mm, hva + PAGE_SIZE, OLD))


@scenario
def fault_against_truncate(scene: Scene) -> None:
    """A memory file that the guest maps is cut to nothing."""
    file = ShmemFile(scene.host, scene.trace, "memory", 2 * PAGE_SIZE)
    furnish(scene, file=file)
    scene.actor("host", file.truncate, 0)
    scene.undo(file.close)


@scenario
def fault_against_memslot_move(scene: Scene) -> None:
    """The memslot moves to another guest frame while the guest writes at the old one."""
    _, hva, kvm = furnish(scene)

    def host() -> None:
        with suppress(MmError):  # it may have to wait for somebody who does not go on
            kvm.set_memslot(0, GFN + 0x10, 2, hva)

    scene.actor("host", host)


def expect(mm: Mm, hva: int, data: bytes) -> None:
    """Raises AssertionError when something else is at ``hva``."""
    found = mm.read(hva, len(data))
    if found != data:
        raise AssertionError(f"{mm.name} has {found!r} at {hva:#x}, not {data!r}")
