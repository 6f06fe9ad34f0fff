"""The full scan finds each kind of broken bookkeeping; and native code counts bits as Python does."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import xipvm.mmu
from xipvm.errors import InternalError
from xipvm.mmu import pte
from xipvm.mmu.frames import PG_ANON, HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.trace.funnel import Trace

PAGE = 4096


class World:
    """An anonymous area with two pages, written, and a shared file area with one."""

    def __init__(self) -> None:
        self.host = HostMemory(64 * PAGE)
        self.trace = Trace()
        self.mm = Mm(self.host, self.trace)
        self.file = ShmemFile(self.host, self.trace, "file", 4 * PAGE)
        self.anon = self.mm.mmap(4 * PAGE, 3)
        self.shared = self.mm.mmap(4 * PAGE, 3, MAP_SHARED, file=self.file)
        self.mm.write(self.anon, b"x" * 2 * PAGE)
        self.mm.write(self.shared, b"x")
        self.page = self.anon >> 12
        self.pfn = pte.pte_pfn(self.mm.pgd.get(self.page))

    def change(self, page: int, bits: int) -> None:
        self.mm.pgd.set(page, self.mm.pgd.get(page) ^ bits)


def test_a_sound_world_passes() -> None:
    world = World()
    verify(world.host)
    child = world.mm.fork()
    verify(world.host)
    child.exit()
    verify(world.host)
    world.host.get(world.pfn)
    verify(world.host, held={world.pfn: 1})


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda w: w.host.get(w.pfn), "refcount 2, found 1"),
        (lambda w: w.host.add_mapcount(w.pfn, 1), "mapcount 2, found 1"),
        (lambda w: w.host.set_rmap(w.pfn, 77, 0), "root does not lead back"),
        (lambda w: w.host.set_rmap(w.pfn, w.host.mapping(w.pfn), 0), "the reverse map finds 0 of 1"),
        (lambda w: w.host.clear_flags(w.pfn, PG_ANON), "as anonymous that is not"),
        (lambda w: w.mm.pgd.set(w.page, 0), "refcount 1, found 0"),
        (lambda w: w.mm.pgd.set(w.page + 9, w.mm.pgd.get(w.page)), "lies in no area"),
        (lambda w: w.change(w.page, pte.EXCLUSIVE), "writable entry of a shared page"),
        (lambda w: w.change(w.page, pte.PRESENT | pte.PROTNONE), "does not fit"),
        (lambda w: w.change(w.page, pte.SPECIAL), "special or not"),
        (lambda w: w.mm.find_vma(w.anon).set_prot(1), "is writable"),
        (lambda w: w.file.pages.clear(), "not in the page cache"),
        (lambda w: w.host.set_rmap(w.file.pages[0], 1, 3), "does not know it"),
        (lambda w: w.file.areas.clear(), "unknown to its file"),
        (lambda w: w.mm.find_vma(w.anon).anon_vma.areas.clear(), "unknown to anon_vma"),
        (lambda w: setattr(w.mm.vmas[0], "end", w.mm.vmas[0].end + PAGE), "overlaps"),
        (lambda w: w.change(w.page, pte.UFFD_WP), "writable and protected"),
        (lambda w: w.change(w.page, pte.UFFD_WP | pte.WRITE), "protected for nobody"),
        (lambda w: w.mm.pgd.set(w.page + 2, pte.UFFD_WP), "protected for nobody"),
        (lambda w: w.mm.pgd.set(w.page + 2, pte.POISON | pte.GUARD), "none that stays"),
        (lambda w: w.host.view(0).__setitem__(0, 1), "zero page"),
    ],
)
def test_breakage_is_found(breakage: Callable[[World], object], message: str) -> None:
    world = World()
    breakage(world)
    with pytest.raises(InternalError, match=message):
        verify(world.host)


def test_a_profiler_that_keeps_frames_keeps_no_memory() -> None:
    """As those of Dask's workers do, which sample all threads."""
    world, frames = World(), []
    sys.setprofile(lambda frame, event, arg: frames.append(frame))
    try:
        verify(world.host)
    finally:
        sys.setprofile(None)
    assert len(frames) > 10
    world.mm.exit()
    world.host.close()


def test_native_bits_are_the_same() -> None:
    text = (Path(xipvm.mmu.__path__[0]) / "pte.pxd").read_text()
    native = {name: 1 << int(bit) for name, bit in re.findall(r"PTE_(\w+) (?:= 1|\(1ULL) << (\d+)", text)}
    assert native == {name: getattr(pte, name) for name in native}
    assert len(native) == 14


def test_describe() -> None:
    assert pte.describe(0) == "empty"
    assert pte.describe(0x12 << 12 | pte.PRESENT | pte.WRITE | pte.ANON | pte.EXCLUSIVE) == "0x12 rw- anon exclusive"
    assert pte.describe(0x12 << 12 | pte.SWAP | pte.EXCLUSIVE) == "swap 0x12"
    assert pte.describe(0x12 << 12 | pte.MIGRATION | pte.WRITE) == "migration 0x12"
    assert pte.describe(pte.PRESENT | pte.SPECIAL | pte.EXEC) == "0x0 r-x special"
    assert pte.describe(pte.UFFD_WP) == "write-protected hole"
    assert pte.describe(pte.POISON) == "poison"
    assert pte.describe(0x12 << 12 | pte.PRESENT | pte.ANON | pte.UFFD_WP) == "0x12 r-- anon uffd-wp"
