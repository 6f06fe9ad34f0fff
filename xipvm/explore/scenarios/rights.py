"""Entries that get rights back without a lock, and guest frames that are memory now and a device then."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.dirty import furnish
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, read
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import GuestAccessError, ScriptedVcpu
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.spte import MMIO_GEN_MASK

_DEVICE: Final = 0x90


@scenario
def rights_come_back_against_munmap(scene: Scene) -> None:
    """The guest writes a page that the dirty log has protected, while the host unmaps it and uses its frame."""
    mm, hva, kvm, vcpu = furnish(scene)
    second = scene.vcpu(kvm)
    second.load(GFN)
    other = mm.mmap(PAGE_SIZE, RW)
    thread = HostThread(mm)

    def host() -> None:
        mm.munmap(hva, 2 * PAGE_SIZE)
        thread.store(other, b"reused!!")

    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("vcpu1", read, second)
    scene.actor("host", host)


@scenario
def rights_come_back_against_fork(scene: Scene) -> None:
    """The guest reads and then writes, while the host forks: what is shared by then must be copied first."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))
    vcpu.store(GFN, OLD)

    def guest() -> None:
        vcpu.load(GFN)
        vcpu.store(GFN, NEW)

    def fork() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        seen = child.read(hva, len(OLD))
        again = child.read(hva, len(OLD))
        if seen not in (OLD, NEW) or again != seen:
            raise AssertionError(f"the child reads {seen!r}, then {again!r}")

    scene.actor("vcpu0", guest)
    scene.actor("host", fork)


@scenario
def exit_against_a_cold_fault(scene: Scene) -> None:
    """A process exits while its guest faults in a page for the first time."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    vcpu = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))
    vcpu.store(GFN, OLD)
    scene.actor("exit", mm.exit)
    scene.actor("vcpu0", vcpu.store, GFN + 1, NEW)


def _memory(scene: Scene) -> tuple[ScriptedVcpu, ScriptedVcpu, list[bool]]:
    """Two vCPUs of a VM with a device at _DEVICE, a second memslot of which takes its place."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, gfn=GFN)
    kvm.mmio_lookup = lambda gpa: gpa >> PAGE_SHIFT == _DEVICE
    first, second = scene.vcpu(kvm), scene.vcpu(kvm)
    first.store(GFN, OLD)
    memory = mm.mmap(PAGE_SIZE, RW)
    there: list[bool] = []

    def vmm() -> None:
        with suppress(MmError):
            kvm.set_memslot(1, _DEVICE, 1, memory)
            there.append(True)
            second.store(_DEVICE, NEW)  # not to the device any more, or it ends in an error
            there.append(True)
            mm.munmap(memory, PAGE_SIZE)

    scene.actor("vmm", vmm)
    return first, second, there


def _accepted(scene: Scene, there: list[bool]) -> None:
    if len(there) == 1:
        raise AssertionError("there is memory, and the guest still gets to the device")


@scenario
def memory_takes_a_device_s_place(scene: Scene) -> None:
    """A guest talks to a device where a memslot appears; from then on that is memory."""
    first, _, there = _memory(scene)
    with suppress(GuestAccessError):
        first.load(_DEVICE)
    scene.actor("vcpu0", first.load, _DEVICE)
    scene.afterwards(lambda: _accepted(scene, there))


@scenario
def generations_of_memslots_wrap(scene: Scene) -> None:
    """As before, and the generation comes that had the same number long ago."""
    first, _, there = _memory(scene)
    kvm = first.mmu
    assert isinstance(kvm, KvmBase)
    kvm.memslots.generation = kvm.sptes.mmio_generation = 0
    with suppress(GuestAccessError):
        first.load(_DEVICE)
    kvm.memslots.generation = kvm.sptes.mmio_generation = MMIO_GEN_MASK  # the last one before that number
    scene.actor("vcpu0", first.load, _DEVICE)
    scene.afterwards(lambda: _accepted(scene, there))


@scenario
def memory_appears_while_a_device_is_looked_up(scene: Scene) -> None:
    """One vCPU has found no memslot, another finds one there and uses it, before the first one remembers that."""
    first, second, there = _memory(scene)

    def guest() -> None:
        with suppress(GuestAccessError):
            second.load(_DEVICE)

    scene.actor("vcpu0", first.load, _DEVICE)
    scene.actor("vcpu1", guest)
    scene.afterwards(lambda: _accepted(scene, there))
