"""Who used a page, and who wrote to it: what reclaim asks before it takes a page away."""

from __future__ import annotations

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.explore.scenarios.faults import GFN, NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.pageout import pageout, reclaim_page
from xipvm.mmu.pte import PRESENT, pte_pfn


@scenario
def reclaim_asks_who_used_it(scene: Scene) -> None:
    """Reclaim looks at a page that only the guest uses, twice; a second VM never touches it."""
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    mm.swapon(16)
    kvm = scene.kvm(mm, hva, pages=2, gfn=GFN)
    vcpu = scene.vcpu(kvm)
    vcpu.store(GFN, OLD)

    def kswapd() -> None:
        for _ in range(2):
            entry = mm.pgd.pte(hva >> PAGE_SHIFT)
            if entry & PRESENT:
                reclaim_page(mm, pte_pfn(entry))

    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("kswapd", kswapd)
    scene.afterwards(lambda: expect(mm, hva, NEW))


@scenario
def swapped_twice(scene: Scene) -> None:
    """A page that came back from swap is written by the guest, and goes to swap again."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    mm.swapon(16)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))
    vcpu.store(GFN, OLD)
    pageout(mm, hva, hva + PAGE_SIZE)
    mm.read(hva, 1)

    def guest() -> None:
        vcpu.load(GFN)
        vcpu.store(GFN, NEW)

    scene.actor("vcpu0", guest)
    scene.actor("kswapd", pageout, mm, hva, hva + PAGE_SIZE)
    scene.afterwards(lambda: expect(mm, hva, NEW))
