"""The bugs of mm/filemap_xip.c of July 2008, one by one: what each does to a guest, a reader or another file."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xipvm.actors import on_point
from xipvm.address import PAGE_SIZE
from xipvm.errors import InternalError, MmError
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu import remap_file_pages
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE
from xipvm.mutants import planted
from xipvm.trace.funnel import Trace
from xipvm.xip.filemap import XipFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume

RW = PROT_READ | PROT_WRITE
DATA = b"new data"
HOLE = bytes(8)


class World:
    """A file of four holes, with a block behind the first, in an mm of 2008 with a guest that shows two pages of it."""

    def __init__(self) -> None:
        self.host = HostMemory(1 << 20)
        self.trace = Trace()
        self.mm = Mm(self.host, self.trace, protocol="2008")
        self.volume = RamVolume(self.host, 8)
        self.file = self.new_file(4)
        self.handle = OpenFile(self.file)

    def close(self) -> None:
        self.mm.exit()
        self.volume.close()

    def new_file(self, pages: int) -> XipFile:
        return XipFile(self.host, self.trace, self.volume.file(pages * PAGE_SIZE))

    def map(self, flags: int = MAP_PRIVATE, prot: int = PROT_READ, *, file: XipFile | None = None) -> int:
        return self.mm.mmap(2 * PAGE_SIZE, prot, flags, file=self.file if file is None else file)

    def guest(self, hva: int) -> ScriptedVcpu:
        kvm = kvm_of(self.mm, self.trace, self.host)
        kvm.set_memslot(0, 0, 2, hva)
        vcpu = ScriptedVcpu(kvm.port(0), self.host, self.trace, 0)
        kvm.vcpus.append(vcpu)
        return vcpu

    def fill(self, pos: int = 0) -> None:
        self.handle.lseek(pos)
        self.handle.put(DATA)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def meanwhile(label: str, action: Callable[[], object]) -> Callable[[str], None]:
    """A hook that does ``action`` once, the first time that somebody passes ``label``."""
    todo = [action]

    def hook(passed: str) -> None:
        if passed == label and todo:
            todo.pop()()

    return hook


def test_b1_a_read_stores_more_than_it_was_asked_for(world: World) -> None:
    buffer = world.mm.mmap(2 * PAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS)
    world.mm.write(buffer, b"\xee" * 2 * PAGE_SIZE)
    assert world.handle.read(world.mm, buffer, 5000) == 5000
    assert world.mm.read(buffer + 5000, 8) == b"\xee" * 8
    world.handle.lseek(0)
    with planted("xip-read-takes-the-whole-length-for-each-page"):
        assert world.handle.read(world.mm, buffer, 5000) == 8192
    assert world.mm.read(buffer + 5000, 8) == HOLE


def test_b2_a_read_of_nothing_fails(world: World) -> None:
    assert world.handle.get(0) == b""
    with planted("xip-read-of-nothing-in-a-hole-fails"), pytest.raises(MmError) as caught:
        world.handle.get(0)
    assert caught.value.errno == errno.ENODATA


@pytest.mark.parametrize("broken", [False, True])
def test_b3_a_guest_sees_stale_zeros_for_ever(world: World, broken: bool) -> None:
    vcpu = world.guest(world.map())
    with planted(*["xip-hole-mapped-behind-its-filling"] * broken), on_point(meanwhile("mm.xip.looked_up", world.fill)):
        first = vcpu.load(0)
    assert (first, vcpu.load(0)) == ((HOLE, HOLE) if broken else (DATA, DATA))
    world.handle.lseek(0)
    assert world.handle.get(8) == DATA


@pytest.mark.parametrize("broken", [False, True])
def test_b4_a_nonlinear_mapping_keeps_the_hole(world: World, broken: bool) -> None:
    with planted(*["xip-nonlinear-areas-keep-the-hole"] * broken):
        hva = world.map(MAP_SHARED, file=world.file.opened_read_only())
        remap_file_pages.remap_file_pages(world.mm, hva, PAGE_SIZE, 1)
        vcpu = world.guest(hva)
        assert vcpu.load(0) == HOLE
        world.fill(PAGE_SIZE)
        assert vcpu.load(0) == (HOLE if broken else DATA)


@pytest.mark.parametrize("broken", [False, True])
def test_b5_an_entry_that_is_being_changed_keeps_the_hole(world: World, broken: bool) -> None:
    hva = world.map()
    world.mm.read(hva, 1)

    def protect() -> None:
        world.mm.mprotect(hva, 2 * PAGE_SIZE, PROT_NONE)
        world.mm.mprotect(hva, 2 * PAGE_SIZE, PROT_READ)

    with (
        planted(*["xip-entries-looked-at-without-their-lock"] * broken),
        on_point(meanwhile("mutant.modify_prot", world.fill)),
    ):
        protect()
    if not broken:
        world.fill()
    assert world.mm.read(hva, 8) == (HOLE if broken else DATA)


@pytest.mark.parametrize(("broken", "number"), [(False, errno.EFAULT), (True, errno.ENOMEM)])
def test_b6_an_error_of_the_device_looks_like_a_lack_of_memory(world: World, broken: bool, number: int) -> None:
    hva = world.map()
    vars(world.file.inode)["failing"] = True
    with planted(*["xip-io-error-is-out-of-memory"] * broken), pytest.raises(MmError) as caught:
        world.mm.read(hva, 1)
    assert caught.value.errno == number


@pytest.mark.parametrize("broken", [False, True])
def test_b7_two_threads_that_fault_on_one_page_are_a_bug(world: World, broken: bool) -> None:
    world.fill()
    hva = world.map()
    hook = meanwhile("mm.xip.looked_up", lambda: world.mm.read(hva, 8))
    with planted(*["xip-two-faults-on-a-page-are-a-bug"] * broken), on_point(hook):
        if broken:
            with pytest.raises(InternalError, match="BUG"):
                world.mm.read(hva, 8)
        else:
            assert world.mm.read(hva, 8) == DATA


@pytest.mark.parametrize("broken", [False, True])
def test_b8_a_store_lands_in_another_file(world: World, broken: bool) -> None:
    world.fill()
    other = world.new_file(0)
    hva = world.map(MAP_SHARED, RW)

    def cut() -> None:
        world.file.truncate(0)
        OpenFile(other).put(DATA)

    with planted(*["xip-fault-does-not-see-truncation"] * broken), on_point(meanwhile("mm.xip.looked_up", cut)):
        if broken:
            world.mm.write(hva, b"scribble")
        else:
            with pytest.raises(MmError):
                world.mm.write(hva, b"scribble")
    assert OpenFile(other).get(8) == (b"scribble" if broken else DATA)


@pytest.mark.parametrize("broken", [False, True])
def test_b9_of_two_who_create_a_block_one_loses_his_data(world: World, broken: bool) -> None:
    hva = world.map(MAP_SHARED, RW)
    hook = meanwhile("xip.allocate", lambda: world.fill(8))
    with planted(*["xip-two-create-a-block"] * broken), on_point(hook):
        world.mm.write(hva, b"first...")
    world.handle.lseek(0)
    assert world.handle.get(16) == (b"first..." + (HOLE if broken else DATA))


@pytest.mark.parametrize("broken", [False, True])
def test_b10_the_holes_of_all_files_show_what_was_stored(world: World, broken: bool) -> None:
    elsewhere = world.map(file=world.new_file(2))
    hva = world.map(MAP_SHARED, RW)
    world.volume.read_only = True
    assert world.mm.read(hva, 8) == HOLE
    with planted(*["xip-sparse-page-becomes-writable"] * broken):
        if broken:
            world.mm.write(hva, b"everyone")
        else:
            with pytest.raises(MmError):
                world.mm.write(hva, b"everyone")
    assert world.mm.read(elsewhere, 8) == (b"everyone" if broken else HOLE)
    if broken:
        world.mm.munmap(hva, 2 * PAGE_SIZE)


@pytest.mark.parametrize("broken", [False, True])
def test_b11_bytes_that_were_stored_do_not_count(world: World, broken: bool) -> None:
    buffer = world.mm.mmap(PAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS)
    with planted(*["xip-partial-copy-not-counted"] * broken):
        if broken:
            with pytest.raises(MmError) as caught:
                world.handle.read(world.mm, buffer + PAGE_SIZE - 50, 200)
            assert caught.value.errno == errno.EFAULT
            assert world.mm.read(buffer + PAGE_SIZE - 50, 50) == bytes(50)
        else:
            assert world.handle.read(world.mm, buffer + PAGE_SIZE - 50, 200) == 50
