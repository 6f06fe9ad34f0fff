"""Notifiers that join and leave, and address spaces that end, while others go on."""

from __future__ import annotations

from contextlib import suppress

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.vma import MAP_SHARED


@scenario(protocols=("modern",))
def exit_against_truncate(scene: Scene) -> None:
    """A process with a guest exits while somebody else cuts off the file that its memory is."""
    file = ShmemFile(scene.host, scene.trace, "memory", PAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))
    vcpu.store(GFN, OLD)
    scene.actor("exit", mm.exit)
    scene.actor("truncate", file.truncate, 0)


@scenario
def exit_against_faults(scene: Scene) -> None:
    """A process exits while its guest goes on."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))
    vcpu.store(GFN, OLD)
    scene.actor("exit", mm.exit)
    scene.actor("vcpu0", vcpu.store, GFN, NEW)


@scenario
def exit_against_unregister(scene: Scene) -> None:
    """The address space ends while the VM is closed."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, gfn=GFN)
    scene.vcpu(kvm).store(GFN, OLD)

    def close() -> None:
        with suppress(MmError):
            kvm.destroy()

    scene.actor("exit", mm.exit)
    scene.actor("close", close)


@scenario(protocols=("modern",))
def unregister_against_truncate(scene: Scene) -> None:
    """The VM is closed while somebody else cuts off the file that its memory is."""
    file = ShmemFile(scene.host, scene.trace, "memory", PAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    kvm = scene.kvm(mm, hva, gfn=GFN)
    scene.vcpu(kvm).store(GFN, OLD)
    scene.actor("close", kvm.destroy)
    scene.actor("truncate", file.truncate, 0)


@scenario
def a_vm_is_made(scene: Scene) -> None:
    """A VM joins an address space of files and anonymous memory that others change."""
    file = ShmemFile(scene.host, scene.trace, "memory", PAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    shared = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    thread = scene.thread(mm)
    thread.store(hva, OLD)
    thread.store(shared, OLD)

    def vmm() -> None:
        kvm = scene.kvm(mm, hva, gfn=GFN)
        vcpu = scene.vcpu(kvm)
        kvm.set_memslot(1, 2 * GFN, 1, shared)
        vcpu.store(GFN, NEW)

    scene.actor("vmm", vmm)
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
