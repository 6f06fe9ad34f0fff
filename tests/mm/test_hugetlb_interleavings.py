"""A guest on huge pages of the pool against what takes them away, in many interleavings: the oracle finds nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest

from xipvm.errors import MmError
from xipvm.explore import Scene, explore, strategy
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.huge_pmd import HPAGE_SIZE as H
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
)

RW = PROT_READ | PROT_WRITE
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB
PLACE = 1 << 32
GFN = 7
OLD, NEW = b"old word", b"new word"


def furnish(scene: Scene, pool: int, flags: int = PRIVATE, file: HugetlbFile | None = None) -> tuple[Mm, list[bytes]]:
    """A guest with two huge pages. vCPU 0 writes to a word of the first, vCPU 1 looks at it: what it saw."""
    scene.host.reserve_huge_pages(pool)
    mm = scene.mm()
    mm.mmap(2 * H, RW, flags | MAP_FIXED, addr=PLACE, file=file)
    kvm = scene.kvm(mm, PLACE, pages=2 * HUGE_PAGES)
    first, second = scene.vcpu(kvm), scene.vcpu(kvm)
    first.store(GFN, OLD)
    first.store(HUGE_PAGES, OLD)
    seen = [second.load(GFN)]
    scene.actor("vcpu0", first.store, GFN, NEW)
    scene.actor("vcpu1", look, second, seen)
    scene.afterwards(lambda: looks_right(scene, seen))
    return mm, seen


def look(vcpu: ScriptedVcpu, seen: list[bytes]) -> None:
    seen.append(vcpu.load(GFN))


def looks_right(scene: Scene, seen: list[bytes]) -> None:
    assert set(seen) <= {OLD, NEW, bytes(8)}, seen
    host = scene.host
    assert 0 <= host.reserved_huge_pages <= host.free_huge_pages


def holds(mm: Mm, *words: bytes) -> None:
    assert mm.read(PLACE + GFN * 4096, 8) in words


def dontneed(scene: Scene) -> None:
    mm, _ = furnish(scene, 2)
    thread = HostThread(mm)

    def host() -> None:
        mm.madvise(PLACE, H, MADV_DONTNEED)
        thread.store(PLACE + 8192, b"mine")

    scene.actor("host", host)
    scene.afterwards(lambda: holds(mm, NEW, bytes(8)))


def munmap(scene: Scene) -> None:
    mm, _ = furnish(scene, 2)

    def host() -> None:
        mm.munmap(PLACE, H)
        HostThread(mm).store(mm.mmap(H, RW, PRIVATE), b"somebody else's")

    scene.actor("host", host)


def protect(scene: Scene) -> None:
    mm, _ = furnish(scene, 2)

    def host() -> None:
        mm.mprotect(PLACE, H, PROT_READ)
        mm.mprotect(PLACE, H, RW)

    scene.actor("host", host)


def copy(scene: Scene, pool: int) -> None:
    """Parent and child both write: with a pool of 2 the child gets SIGBUS, or its page is taken from it."""
    mm, _ = furnish(scene, pool)

    def host() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        thread = HostThread(child)
        with suppress(HostAccessError) if pool == 2 else nullcontext():
            thread.store(PLACE + GFN * 4096, b"child's!")
            assert thread.load(PLACE + GFN * 4096, 8) == b"child's!"

    scene.actor("host", host)
    scene.afterwards(lambda: holds(mm, NEW))


def copy_with_room(scene: Scene) -> None:
    copy(scene, 4)


def copy_without_room(scene: Scene) -> None:
    copy(scene, 2)


def move(scene: Scene) -> None:
    mm, _ = furnish(scene, 3)
    pfn = pte_pfn(mm.pgd.get(PLACE >> 12))

    def migrate() -> None:
        assert migrate_page(scene.host, scene.trace, pfn) != pfn

    scene.actor("kcompactd", migrate)
    scene.afterwards(lambda: holds(mm, NEW))


def remap(scene: Scene) -> None:
    mm, _ = furnish(scene, 2)
    away = PLACE + 8 * H

    def host() -> None:
        mm.mremap(PLACE, H, H, MREMAP_MAYMOVE | MREMAP_FIXED, away)
        mm.mremap(away, H, H, MREMAP_MAYMOVE | MREMAP_FIXED, PLACE)

    scene.actor("host", host)
    scene.afterwards(lambda: holds(mm, OLD, NEW))


def truncate(scene: Scene) -> None:
    file = HugetlbFile(scene.host, scene.trace, "huge", 2 * H)
    furnish(scene, 2, MAP_SHARED, file)
    scene.undo(file.close)

    def host() -> None:
        file.truncate(0)
        file.truncate(H)

    scene.actor("host", host)


def punch(scene: Scene) -> None:
    file = HugetlbFile(scene.host, scene.trace, "huge", 2 * H)
    furnish(scene, 3, MAP_SHARED, file)
    scene.undo(file.close)
    other = scene.mm()
    other.mmap(2 * H, RW, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, addr=PLACE, file=file)

    def write() -> None:
        with suppress(MmError):  # there may be no page for the copy
            other.write(PLACE, b"private")

    scene.actor("host", file.punch_hole, 0, HUGE_PAGES)
    scene.actor("other", write)


SCENES = (dontneed, munmap, protect, copy_with_room, copy_without_room, move, remap, truncate, punch)


@pytest.mark.parametrize("how", ["random", "pct"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_no_interleaving_breaks_anything(scene: Callable[[Scene], None], how: str) -> None:
    search = explore(scene, strategy(how, 1, preemptions=2), runs=15, host_memory=6 * H)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
    assert search.distinct > 1


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_no_interleaving_of_many_breaks_anything(scene: Callable[[Scene], None]) -> None:
    search = explore(scene, strategy("random", 2, preemptions=2), runs=300, host_memory=6 * H)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
