"""Every kind of secondary MMU on one mm at once: each writes a word of its own into one page, which is taken away."""

from __future__ import annotations

from typing import Final

from xipvm.address import PAGE_SIZE
from xipvm.explore.scenarios.faults import GFN, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mmu.secondary.sva import Sva

_WORDS: Final = (b"of kvm..", b"of gru..", b"of odp..", b"mirror's", b"of sva..")


def furnish(scene: Scene) -> tuple[Mm, int]:
    """An mm with one page that a KVM, a GRU, an ODP region, a mirror and an SVA device write to."""
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW)
    kvm, gru = scene.vcpu(scene.kvm(mm, hva, gfn=GFN)), scene.vcpu(scene.gru(mm, hva, gfn=GFN))
    odp, mirror, sva = (
        scene.watch(OdpUmem(mm, hva, PAGE_SIZE)),
        scene.watch(Dmirror(mm)),
        scene.watch(Sva(mm)),
    )
    sva.store(hva, bytes(8))
    scene.actor("vcpu0", kvm.store, GFN, _WORDS[0])
    scene.actor("gru0", gru.store, GFN, _WORDS[1], 8)
    scene.actor("odp0", odp.write, 0, _WORDS[2], 16)
    scene.actor("mirror0", mirror.write, hva + 24, _WORDS[3])
    scene.actor("sva0", sva.store, hva + 32, _WORDS[4])
    scene.afterwards(lambda: expect(mm, hva, b"".join(_WORDS)))
    return mm, hva


@scenario(protocols=("modern",))
def every_kind_against_swapout(scene: Scene) -> None:
    """The page goes to swap, with what all of them have written by then."""
    mm, hva = furnish(scene)
    mm.swapon(16)
    scene.actor("kswapd", pageout, mm, hva, hva + PAGE_SIZE)


@scenario(protocols=("modern",))
def every_kind_against_migrate(scene: Scene) -> None:
    """The page moves to another frame."""
    furnish(scene)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)


@scenario(protocols=("modern",))
def every_kind_against_fork(scene: Scene) -> None:
    """The process forks: what comes later is not the child's."""
    mm, hva = furnish(scene)

    def fork() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        before = child.read(hva, PAGE_SIZE)
        scene.afterwards(lambda: expect(child, hva, before))

    scene.actor("host", fork)
