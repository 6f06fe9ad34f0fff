"""2 MiB of a DAX file that are one entry: synced while they are written, filled while they are read, cut off."""

from __future__ import annotations

from typing import Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.explore.scenarios.faults import RW
from xipvm.explore.scenarios.huge import BASE, GFN, HOST
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import HUGE, WRITE
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ
from xipvm.xip.dax import DaxFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume

DATA: Final = b"new data"
HOLE: Final = bytes(8)
_BLOCKS: Final = 2 * HUGE_PAGES
"""So that there is one piece of 2 MiB, also when small ones were taken."""


def _file(scene: Scene, *, filled: bool) -> tuple[DaxFile, RamVolume]:
    """A file of 2 MiB, a hole or one piece of the device."""
    volume = RamVolume(scene.host, _BLOCKS)
    scene.undo(volume.close)
    inode = volume.file(HPAGE_SIZE)
    if filled:
        inode.create_huge(0)
    return DaxFile(scene.host, scene.trace, inode), volume


def _mapped(scene: Scene, file: DaxFile) -> Mm:
    mm = scene.mm()
    mm.mmap(HPAGE_SIZE, RW, MAP_SHARED, addr=BASE, file=file)
    return mm


def _write(file: DaxFile, data: bytes, page: int) -> None:
    handle = OpenFile(file)
    handle.lseek(page * PAGE_SIZE)
    if handle.put(data) != len(data):
        raise AssertionError("a short write")


def _noticed(file: DaxFile, mms: list[Mm]) -> None:
    """Whoever may write without a fault may because the page counts as written to."""
    for mm in mms:
        for area in mm.vmas:
            for page, entry in mm.pgd.entries(area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT):
                first = area.page_offset(page << PAGE_SHIFT)
                pages = range(first, first + (HUGE_PAGES if entry & HUGE else 1))
                if entry & WRITE and not file.dirty.issuperset(pages):
                    raise AssertionError(f"{mm.name} may write to page {first:#x}, which nobody will write back")


@scenario(protocols=("modern",), host_memory=HOST)
def huge_block_written_while_it_is_synced(scene: Scene) -> None:
    """A guest and a thread store to 2 MiB that one entry maps, another process to a page of them, during an fsync."""
    file, _ = _file(scene, filled=True)
    other = scene.mm()
    page = other.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file, pgoff=2)
    mm = _mapped(scene, file)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    thread = scene.thread(mm)
    thread.store(BASE, b"old data")

    scene.actor("fsync", file.fsync)
    scene.actor("vcpu0", vcpu.store, GFN + 3, DATA)
    scene.actor("other", other.write, page, DATA)

    def dirty_again() -> None:
        _noticed(file, [mm, other])
        file.fsync()
        thread.store(BASE + PAGE_SIZE, DATA)
        _noticed(file, [mm, other])

    scene.afterwards(dirty_again)


@scenario(protocols=("modern",), host_memory=HOST)
def huge_hole_written_to(scene: Scene) -> None:
    """A guest, and another process by a private mapping, read a hole of 2 MiB while somebody writes into it."""
    file, _ = _file(scene, filled=False)
    mm, other = _mapped(scene, file), scene.mm()
    private = other.mmap(HPAGE_SIZE, PROT_READ, MAP_PRIVATE, addr=BASE, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    vcpu.load(GFN)
    scene.actor("vcpu0", vcpu.load, GFN + 3)
    scene.actor("other", other.read, private, 8)
    scene.actor("writer", _write, file, DATA, 3)

    def written() -> None:
        if vcpu.load(GFN + 3) != DATA or other.read(private + 3 * PAGE_SIZE, 8) != DATA:
            raise AssertionError("somebody still reads the hole")
        if vcpu.load(GFN + 4) != HOLE:
            raise AssertionError("the rest of the hole is none")

    scene.afterwards(written)


@scenario(protocols=("modern",), host_memory=HOST)
def huge_hole_stored_to(scene: Scene) -> None:
    """A store gives a hole of 2 MiB one piece of the device, while a guest of another process reads a page of it."""
    file, _ = _file(scene, filled=False)
    mm, other = _mapped(scene, file), scene.mm()
    page = other.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, file=file.opened_read_only(), pgoff=3)
    vcpu = scene.vcpu(scene.kvm(other, page, gfn=GFN))
    scene.actor("vcpu0", vcpu.load, GFN)
    scene.actor("host", mm.write, BASE + 3 * PAGE_SIZE, DATA)

    def written() -> None:
        if vcpu.load(GFN) != DATA:
            raise AssertionError("the guest still reads the hole")
        _noticed(file, [mm])

    scene.afterwards(written)


@scenario(protocols=("modern",), host_memory=HOST)
def huge_block_cut_in_the_middle(scene: Scene) -> None:
    """A guest uses both ends of 2 MiB that one entry maps, while the second is cut off and becomes another file's."""
    file, volume = _file(scene, filled=True)
    other = DaxFile(scene.host, scene.trace, volume.file())
    mm = _mapped(scene, file)
    vcpu = scene.vcpu(scene.kvm(mm, BASE, pages=HUGE_PAGES, gfn=GFN))
    vcpu.store(GFN, DATA)

    def use() -> None:
        vcpu.store(GFN, b"begin...")
        vcpu.store(GFN + HUGE_PAGES - 1, b"scribble")

    def cut() -> None:
        file.truncate(HPAGE_SIZE - PAGE_SIZE)
        _write(other, DATA, 0)

    def whole() -> None:
        if OpenFile(other).get(8) != DATA:
            raise AssertionError("the other file has what the guest stored")
        if vcpu.load(GFN) != b"begin...":
            raise AssertionError("what the guest stored before is gone")
        _noticed(file, [mm])

    scene.actor("vcpu0", use)
    scene.actor("host", cut)
    scene.afterwards(whole)
