"""Huge pages, of the pool and transparent ones: split, collapsed, moved, cut off, copied."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import NEW, OLD, RW, expect
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.madvise import MADV_COLLAPSE, MADV_DONTNEED, MADV_HUGEPAGE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_HUGETLB, MAP_PRIVATE, MAP_SHARED

HOST: Final = 10 << 20
BASE: Final = 0x7000_0000_0000
GFN: Final = HUGE_PAGES
"""Aligned as the host's address, so that one entry can show all of a huge page."""


def transparent(scene: Scene) -> tuple[Mm, ScriptedVcpu]:
    """An mm with 2 MiB at BASE that one huge entry maps, and a guest that has written to the first page."""
    mm = scene.mm()
    mm.mmap(HPAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=BASE)
    mm.madvise(BASE, HPAGE_SIZE, MADV_HUGEPAGE)
    scene.thread(mm).store(BASE, OLD)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    return mm, vcpu


@scenario(protocols=("modern",), host_memory=HOST)
def a_huge_page_is_split(scene: Scene) -> None:
    """A page in the middle of a huge one is given up while the guest uses its neighbours, then the page itself."""
    mm, vcpu = transparent(scene)
    vcpu.load(GFN)

    def guest() -> None:
        vcpu.store(GFN, NEW)
        vcpu.store(GFN + 1, NEW)

    def host() -> None:
        mm.madvise(BASE + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)

    scene.actor("vcpu0", guest)
    scene.actor("host", host)
    scene.afterwards(lambda: expect(mm, BASE, NEW))


@scenario(protocols=("modern",), host_memory=HOST)
def a_huge_page_moves(scene: Scene) -> None:
    """Compaction moves a huge page as a whole."""
    mm, vcpu = transparent(scene)
    vcpu.store(GFN, OLD)
    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)
    scene.afterwards(lambda: expect(mm, BASE, NEW))


@scenario(protocols=("modern",), host_memory=HOST)
def small_pages_become_a_huge_one(scene: Scene) -> None:
    """MADV_COLLAPSE of anonymous memory."""
    mm = scene.mm()
    mm.mmap(HPAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=BASE)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    vcpu.store(GFN, OLD)

    def host() -> None:
        with suppress(MmError):
            mm.madvise(BASE, HPAGE_SIZE, MADV_COLLAPSE)

    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("host", host)
    scene.afterwards(lambda: expect(mm, BASE, NEW))


@scenario(protocols=("modern",), host_memory=HOST)
def pages_of_a_file_become_a_huge_one(scene: Scene) -> None:
    """MADV_COLLAPSE of a memory file that the guest maps."""
    file = ShmemFile(scene.host, scene.trace, "memory", HPAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    mm.mmap(HPAGE_SIZE, RW, MAP_SHARED | MAP_FIXED, addr=BASE, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    vcpu.store(GFN, OLD)

    def host() -> None:
        with suppress(MmError):
            mm.madvise(BASE, HPAGE_SIZE, MADV_COLLAPSE)

    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("host", host)
    scene.afterwards(lambda: expect(mm, BASE, NEW))


@scenario(protocols=("modern",), host_memory=HOST)
def hugetlb_against_fork(scene: Scene) -> None:
    """Huge pages of the pool, mapped privately: fork, and the guest writes to its own copy."""
    scene.host.reserve_huge_pages(2)
    mm = scene.mm()
    mm.mmap(HPAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_FIXED, addr=BASE)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    vcpu.store(GFN, OLD)

    def host() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        seen = child.read(BASE, 8)
        if child.read(BASE, 8) != seen:
            raise AssertionError("the parent's guest has changed the child's page")

    scene.actor("vcpu0", vcpu.store, GFN, NEW)
    scene.actor("host", host)


@scenario(host_memory=HOST)
def hugetlb_against_truncate(scene: Scene) -> None:
    """A file of two huge pages that the guest maps is cut to nothing."""
    scene.host.reserve_huge_pages(2)
    file = HugetlbFile(scene.host, scene.trace, "/dev/hugepages/x", 2 * HPAGE_SIZE)
    scene.undo(file.close)
    mm = scene.mm()
    mm.mmap(2 * HPAGE_SIZE, RW, MAP_SHARED | MAP_FIXED, addr=BASE, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=2 * HUGE_PAGES, gfn=GFN))
    vcpu.store(GFN, OLD)
    vcpu.store(GFN + HUGE_PAGES, OLD)
    scene.actor("vcpu0", vcpu.store, GFN + HUGE_PAGES, NEW)
    scene.actor("host", file.truncate, 0)
