"""Files that are used in place: holes that are filled while they are mapped, blocks that are freed while they are read.

Under the 2008 protocol a file is what mm/filemap_xip.c made of it, under today's what DAX does.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final

from xipvm.actors import point
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import GFN, RW
from xipvm.explore.scene import Scene, scenario
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.remap_file_pages import remap_file_pages
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ
from xipvm.xip.filemap import XipFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume
from xipvm.xip.volume import FORMS

DATA: Final = b"new data"
HOLE: Final = bytes(8)


def make_file(scene: Scene, pages: int = 4) -> tuple[XipFile, RamVolume]:
    """A file of so many pages, all of them holes, on a small device."""
    volume = RamVolume(scene.host, 8)
    scene.undo(volume.close)
    return FORMS[scene.protocol](scene.host, scene.trace, volume.file(pages * PAGE_SIZE)), volume


def _write(file: XipFile, data: bytes = DATA, pos: int = 0) -> None:
    handle = OpenFile(file)
    handle.lseek(pos)
    if handle.put(data) != len(data):
        raise AssertionError("a short write")


@scenario
def hole_read_while_it_is_filled(scene: Scene) -> None:
    """A guest and a thread of the host read a hole of a file, mapped privately, while somebody writes into it."""
    file, _ = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))
    thread = scene.thread(mm)

    def look() -> None:
        for _ in range(2):
            if vcpu.load(GFN) not in (HOLE, DATA):
                raise AssertionError("the guest reads what nobody wrote")

    def written() -> None:
        if vcpu.load(GFN) != DATA or thread.load(hva, 8) != DATA:
            raise AssertionError("somebody still reads the hole")

    scene.actor("vcpu0", look)
    scene.actor("thread0", thread.load, hva, 8)
    scene.actor("writer", _write, file)
    scene.afterwards(written)


@scenario
def hole_read_through_a_shared_mapping(scene: Scene) -> None:
    """Two address spaces map a file to write and to read; the hole that one reads is filled by the other's store."""
    file, _ = make_file(scene)
    reader, writer = scene.mm(), scene.mm()
    seen = reader.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, file=file.opened_read_only())
    hva = writer.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    vcpu = scene.vcpu(scene.kvm(reader, seen, gfn=GFN))
    scene.actor("vcpu0", vcpu.load, GFN)
    scene.actor("host", writer.write, hva, DATA)

    def written() -> None:
        if vcpu.load(GFN) != DATA:
            raise AssertionError("the guest still reads the hole")

    scene.afterwards(written)


@scenario
def hole_seen_out_of_order(scene: Scene) -> None:
    """Pages of a file are mapped in another order (remap_file_pages), and a hole among them is filled."""
    file, _ = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, PROT_READ, MAP_SHARED, file=file.opened_read_only())
    remap_file_pages(mm, hva, PAGE_SIZE, 1)
    remap_file_pages(mm, hva + PAGE_SIZE, PAGE_SIZE, 0)
    vcpu = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))
    scene.actor("vcpu0", vcpu.load, GFN + 1)
    scene.actor("writer", _write, file)

    def written() -> None:
        if vcpu.load(GFN + 1) != DATA:
            raise AssertionError("the guest still reads the hole")

    scene.afterwards(written)


@scenario
def hole_filled_while_its_mapping_is_protected(scene: Scene) -> None:
    """A hole is mapped; its area loses a right and gets it back while somebody writes into the hole."""
    file, _ = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)
    mm.read(hva, 1)

    def protect() -> None:
        mm.mprotect(hva, PAGE_SIZE, PROT_NONE)
        mm.mprotect(hva, PAGE_SIZE, PROT_READ)

    scene.actor("host", protect)
    scene.actor("writer", _write, file)


@scenario
def block_read_while_it_is_freed(scene: Scene) -> None:
    """A guest reads a file that is cut off, while another file gets the block."""
    file, volume = make_file(scene, 1)
    _write(file, b"old data")
    other = FORMS[scene.protocol](scene.host, scene.trace, volume.file())
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    vcpu = scene.vcpu(scene.kvm(mm, hva, gfn=GFN))

    def use() -> None:
        if vcpu.load(GFN) not in (b"old data", HOLE):
            raise AssertionError("the guest reads another file's data")
        vcpu.store(GFN, b"scribble")

    def cut() -> None:
        file.truncate(0)
        _write(other, DATA)

    def whole() -> None:
        found = OpenFile(other).get(8)
        if found != DATA:
            raise AssertionError(f"the other file has {found!r}")

    scene.actor("vcpu0", use)
    scene.actor("host", cut)
    scene.afterwards(whole)


@scenario(protocols=("modern",))
def block_pinned_while_it_is_freed(scene: Scene) -> None:
    """A device writes to a page of a file, pinned, while the file is cut off and another one gets the block."""
    file, volume = make_file(scene, 1)
    _write(file, b"old data")
    other = FORMS[scene.protocol](scene.host, scene.trace, volume.file())
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.write(hva, b"old data")

    def transfer() -> None:
        with suppress(MmError):  # when there is no page any more
            pfn = pin_user_page(mm, hva, write=True)
            for at in range(4):
                point("scenario.pinned")
                scene.host.write(pfn, 8 * at, b"transfer")
            unpin_user_page(mm, pfn)

    def cut() -> None:
        file.truncate(0)
        _write(other, DATA)

    def whole() -> None:
        found = OpenFile(other).get(32)
        if found != DATA:
            raise AssertionError(f"the other file has {found!r}")

    scene.actor("device0", transfer)
    scene.actor("host", cut)
    scene.afterwards(whole)


@scenario
def hole_filled_twice(scene: Scene) -> None:
    """Two threads store into the same hole of a file at once, and a third writes to it."""
    file, _ = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)
    scene.actor("first", mm.write, hva, b"one.....")
    scene.actor("second", mm.write, hva + 8, b"two.....")
    scene.actor("writer", _write, file, DATA, 16)

    def all_there() -> None:
        found = OpenFile(file).get(24)
        if found != b"one.....two....." + DATA:
            raise AssertionError(f"the file has {found!r}")

    scene.afterwards(all_there)


@scenario
def hole_of_a_file_system_that_turns_read_only(scene: Scene) -> None:
    """A file is mapped to be written, and then nothing may change any more: stores into holes fail, and only those.

    The mapping goes with its process, so that what became of it is nowhere to be found when all is over.
    """
    file, volume = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=file)

    def remount() -> None:
        volume.read_only = True

    def store() -> None:
        with suppress(MmError):
            mm.read(hva, 8)
            point("scenario.has_read")
            mm.write(hva, DATA)
        mm.munmap(hva, PAGE_SIZE)

    scene.actor("host", remount)
    scene.actor("thread0", store)


@scenario
def file_system_frozen_while_it_is_in_use(scene: Scene) -> None:
    """A file is appended to and stored to through a mapping, while somebody freezes its file system and looks at it.

    He sees no write half done, and nothing that changes; but stores of 2008 to blocks that are there.
    """
    file, volume = make_file(scene, 2)
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.write(hva, b"old data")
    vcpu = scene.vcpu(scene.kvm(mm, hva, pages=2, gfn=GFN))

    def state() -> tuple[int, set[int], bytes]:
        size, pages = file.size, {page for page in range(4) if file.inode.find(page) is not None}
        return size, pages, b"" if scene.protocol == "2008" else OpenFile(file).get(size)

    def look() -> None:
        volume.sb.freeze()
        size, pages, data = state()
        if any(page * PAGE_SIZE >= size for page in pages):
            raise AssertionError("a write is half done while the file system is frozen")
        point("scenario.frozen")
        if state() != (size, pages, data):
            raise AssertionError("the file system changes while it is frozen")
        volume.sb.thaw()

    def store() -> None:
        vcpu.store(GFN, DATA)
        vcpu.store(GFN + 1, DATA)

    def all_there() -> None:
        if OpenFile(file).get(3 * PAGE_SIZE)[::PAGE_SIZE] != DATA[:1] * 3:
            raise AssertionError("something that was stored is not there")

    scene.actor("writer", _write, file, DATA, 2 * PAGE_SIZE)
    scene.actor("vcpu0", store)
    scene.actor("freezer", look)
    scene.afterwards(all_there)


@scenario
def blocks_that_cannot_be_read(scene: Scene) -> None:
    """The device fails under a mapping: whoever touches more of it than is there gets SIGBUS."""
    file, _ = make_file(scene)
    mm = scene.mm()
    hva = mm.mmap(3 * PAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.read(hva, 2 * PAGE_SIZE)
    inode = file.inode

    def fail() -> None:
        vars(inode)["failing"] = True

    def load() -> None:
        try:
            mm.read(hva + PAGE_SIZE, 2 * PAGE_SIZE)
        except MmError as error:
            if error.errno != errno.EFAULT:
                raise AssertionError(f"a failing device is {errno.errorcode[error.errno]}") from None

    scene.actor("device", fail)
    scene.actor("thread0", load)


@scenario
def reads_of_all_lengths(scene: Scene) -> None:
    """A file is read in pieces of all kinds, into memory that ends in the middle, while it is written to."""
    file, _ = make_file(scene)
    _write(file, b"begin", 4090)
    mm = scene.mm()
    buffer = mm.mmap(2 * PAGE_SIZE, RW)
    handle = OpenFile(file)

    def read() -> None:
        for pos, count, room in ((0, 5000, 0), (2 * PAGE_SIZE, 0, 0), (4000, 200, 0), (PAGE_SIZE, 200, 50)):
            handle.lseek(pos)
            with suppress(MmError):
                handle.read(mm, buffer + 2 * PAGE_SIZE - room if room else buffer, count)

    scene.actor("reader", read)
    scene.actor("writer", _write, file, DATA, 3 * PAGE_SIZE)
