"""KVM reads and writes the guest's memory by translations of its own, while the host takes the pages away."""

from __future__ import annotations

import errno

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import PRESENT, pte_pfn
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.pfncache import PfnCache

_GPA = GFN << PAGE_SHIFT


def furnish(scene: Scene) -> tuple[Mm, int, Kvm, PfnCache]:
    """An mm with a page that a guest has written, its hva, the VM, and a cache of the page."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    kvm = scene.kvm(mm, hva, gfn=GFN)
    assert isinstance(kvm, Kvm)
    scene.vcpu(kvm).store(GFN, OLD)
    cache = kvm.pfn_caches.new()
    cache.activate(_GPA, len(NEW))
    scene.afterwards(lambda: agrees(mm, cache))
    return mm, hva, kvm, cache


def agrees(mm: Mm, cache: PfnCache) -> None:
    """Raises AssertionError when a cache that is valid has another frame than the host."""
    entry = mm.pgd.pte(cache.uhva >> PAGE_SHIFT)
    if cache.valid and (not entry & PRESENT or pte_pfn(entry) != cache.pfn):
        raise AssertionError(f"{cache!r} has frame {cache.pfn}, the host {entry:#x}")


@scenario(protocols=("modern",))
def kvm_writes_against_migrate(scene: Scene) -> None:
    """KVM writes by its cache of a page while that moves to another frame."""
    mm, hva, _, cache = furnish(scene)
    scene.actor("kvm", cache.write, NEW)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def kvm_reads_against_dontneed(scene: Scene) -> None:
    """KVM reads by its cache, twice, while the host gives the page up, and uses its frame otherwise."""
    mm, hva, _, cache = furnish(scene)
    other = mm.mmap(PAGE_SIZE, RW)
    thread = scene.thread(mm)

    def kvm() -> None:
        for _ in range(2):
            seen = cache.read(len(OLD))
            if seen not in (OLD, bytes(len(OLD))):
                raise AssertionError(f"{cache.name} read {seen!r}, which nobody wrote there")

    def host() -> None:
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
        thread.store(other, b"reused!!")

    scene.actor("kvm", kvm)
    scene.actor("host", host)


@scenario(protocols=("modern",))
def a_cache_of_host_memory(scene: Scene) -> None:
    """A cache of host memory that no memslot shows: its invalidations leave no trace in the state of the VM."""
    mm, _, kvm, _ = furnish(scene)
    hva = mm.mmap(PAGE_SIZE, RW)
    mm.write(hva, OLD)
    cache = kvm.pfn_caches.new()

    def write() -> None:
        cache.activate_hva(hva, len(NEW))
        cache.write(NEW)

    scene.actor("kvm", write)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: agrees(mm, cache))
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario(protocols=("modern",))
def a_cache_is_turned_off_and_on(scene: Scene) -> None:
    """One vCPU deactivates and activates what another one writes by, while the page moves."""
    mm, hva, _, cache = furnish(scene)
    written = []

    def write() -> None:
        try:
            cache.write(NEW)
            written.append(NEW)
        except MmError as error:
            if error.errno != errno.EINVAL:  # it is not active
                raise

    def turn() -> None:
        cache.deactivate()
        cache.activate(_GPA, len(NEW))

    scene.actor("vcpu0", write)
    scene.actor("vcpu1", turn)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, hva, written[0] if written else OLD))
