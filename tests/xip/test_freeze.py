"""Frozen file systems: what waits and what goes on, and copies of an image that is in use, which e2fsck finds clean."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.asm import rv64, words
from xipvm.actors import on_point, point
from xipvm.address import PAGE_SIZE
from xipvm.errors import DeadlockError, LockOrderError, MmError, XipvmError
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.locks import checking
from xipvm.machine import Machine
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace
from xipvm.xip.ext2.layout import SUPERBLOCK_AT, VALID_FS, Superblock
from xipvm.xip.filemap import XipFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import FORMS, open_volume

MakeImage = Callable[..., Path]
Fsck = Callable[[Path], str]

RW = PROT_READ | PROT_WRITE
BLOCK, HOLE, PAGES = 0, 2 * PAGE_SIZE, 4
"""Places in the file of a World; how long it is."""


class World:
    """An ext2 image with a file of a block and three holes, which a process has mapped privately and shared."""

    def __init__(self, image: Path, protocol: str) -> None:
        self.image = image
        self.protocol = protocol
        self.host = HostMemory(2 << 20)
        self.trace = Trace()
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.volume = open_volume(self.host, str(image), now=lambda: self.now)
        self.now = 1000
        self.file = self.create("/file")
        self.handle = OpenFile(self.file)
        self.handle.put(b"block")
        self.file.truncate(PAGES * PAGE_SIZE)
        self.shared = self.mm.mmap(PAGES * PAGE_SIZE, RW, MAP_SHARED, file=self.file)
        self.private = self.mm.mmap(PAGES * PAGE_SIZE, RW, MAP_PRIVATE, file=self.file)

    def create(self, path: str) -> XipFile:
        return self.volume.file(self.host, self.trace, self.volume.create(path), self.protocol)

    def write(self, pos: int, data: bytes = b"data") -> None:
        self.handle.lseek(pos)
        self.handle.put(data)

    def read(self, pos: int, count: int) -> bytes:
        self.handle.lseek(pos)
        return self.handle.get(count)

    def close(self) -> None:
        self.mm.exit()
        self.volume.close()
        self.host.close()


@pytest.fixture(params=["2008", "modern"])
def world(make_image: MakeImage, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(make_image(size="1M"), request.param)
    yield world
    world.close()


def together(world: World, seed: int, **actors: Callable[[], object]) -> None:
    """Runs them beside each other, in an order that ``seed`` decides, with their use of locks checked."""
    choose = random.Random(seed)
    scheduler = Scheduler(lambda n, label: choose.randrange(n), trace=world.trace)
    for name, body in actors.items():
        scheduler.spawn(name, body)
    with checking():
        scheduler.run()


def state(image: bytes) -> int:
    return Superblock.parse(image[SUPERBLOCK_AT : SUPERBLOCK_AT + 1024]).state


CHANGES: dict[str, Callable[[World], object]] = {
    "a write": lambda world: world.write(BLOCK),
    "a write of nothing": lambda world: world.write(BLOCK, b""),
    "a truncation": lambda world: world.file.truncate(1),
    "a hole": lambda world: world.file.punch_hole(0, 1),
    "a new file": lambda world: world.volume.create("/new"),
    "a new directory": lambda world: world.volume.mkdir("/new"),
    "a name less": lambda world: world.volume.unlink("/other"),
    "a store into a hole": lambda world: world.mm.write(world.shared + HOLE, b"data"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_waits_for_the_thaw(world: World, change: str) -> None:
    world.create("/other")
    world.volume.freeze()
    before = world.image.read_bytes()
    with pytest.raises(DeadlockError, match="frozen, and who froze it would have to thaw it first"):
        CHANGES[change](world)
    assert world.image.read_bytes() == before
    waiting: list[str] = []

    def hook(label: str) -> None:
        if label == "gate.shut":
            waiting.append(label)
            world.volume.thaw()

    with on_point(hook):
        CHANGES[change](world)
    assert waiting == ["gate.shut"]


def test_reading_goes_on_and_leaves_no_trace(world: World) -> None:
    world.volume.freeze()
    before = world.image.read_bytes()
    world.now = 2000
    assert world.read(BLOCK, 5) == b"block"
    assert world.read(HOLE, 5) == bytes(5)
    assert world.mm.read(world.private, 5) == b"block"
    assert world.mm.read(world.private + HOLE, 5) == bytes(5)
    world.mm.write(world.private, b"mine")
    assert world.mm.read(world.shared, 5) == b"block"
    world.file.fsync()
    assert world.image.read_bytes() == before
    world.volume.thaw()
    world.read(BLOCK, 1)
    assert world.image.read_bytes() != before


@pytest.mark.parametrize("dirty", [False, True])
def test_a_store_to_a_block_goes_on_where_nobody_could_see_it(world: World, dirty: bool) -> None:
    kvm = kvm_of(world.mm, world.trace, world.host)
    kvm.set_memslot(0, 0, PAGES, world.shared)
    vcpu = ScriptedVcpu(kvm.port(0), world.host, world.trace, 0)
    kvm.vcpus.append(vcpu)
    if dirty:
        vcpu.store(0, b"first")
        world.mm.write(world.shared, b"first")
    world.volume.freeze()
    for store in (lambda: world.mm.write(world.shared, b"later"), lambda: vcpu.store(0, b"guest")):
        if world.protocol == "2008":
            store()
        else:
            with pytest.raises(XipvmError, match=r"sb_pagefaults .* is frozen"):
                store()
    held = b"guest" if world.protocol == "2008" else b"first" if dirty else b"block"
    assert world.read(BLOCK, 5) == held
    world.volume.thaw()
    vcpu.store(0, b"again")
    assert world.read(BLOCK, 5) == b"again"
    kvm.destroy()


def test_a_hole_read_through_a_mapping_that_may_be_written(world: World) -> None:
    """In 2008 that gives it a block, and waits."""
    world.volume.freeze()
    if world.protocol == "2008":
        with pytest.raises(DeadlockError):
            world.mm.read(world.shared + HOLE, 4)
    else:
        assert world.mm.read(world.shared + HOLE, 4) == bytes(4)


def test_who_is_in_the_middle_is_waited_for(world: World) -> None:
    """And nobody else begins meanwhile; where nobody can go on, nothing is frozen."""
    frozen: list[MmError] = []

    def freeze(label: str) -> None:
        if label == "mm.xip.write" and not frozen:
            with pytest.raises(DeadlockError, match="who is inside") as caught:
                world.volume.freeze()
            frozen.append(caught.value)

    with on_point(freeze):
        world.write(HOLE)
    assert frozen
    world.write(HOLE)
    with pytest.raises(MmError, match="EINVAL"):
        world.volume.thaw()


def test_a_write_from_a_mapping_of_the_same_file_system_ends(world: World) -> None:
    """Its faults are behind the gate that is shut second."""
    source = OpenFile(world.create("/source"))
    source.file.truncate(2 * PAGE_SIZE)
    hva = world.mm.mmap(2 * PAGE_SIZE, RW, MAP_SHARED, file=source.file)
    order: list[str] = []

    def copy() -> None:
        world.mm.write(hva, b"from")
        world.handle.lseek(HOLE)
        world.handle.write(world.mm, hva, 2 * PAGE_SIZE)
        order.append("copied")

    def freeze() -> None:
        world.volume.freeze()
        order.append("frozen")
        world.volume.thaw()

    for seed in range(30):
        together(world, seed, writer=copy, freezer=freeze)
        world.file.punch_hole(0, PAGES)
        source.file.punch_hole(0, 2)
    assert order.count("copied") == order.count("frozen") == 30


def test_freezing_twice_and_thawing_nothing(world: World) -> None:
    with pytest.raises(MmError) as caught:
        world.volume.thaw()
    assert caught.value.errno == errno.EINVAL
    world.volume.freeze()
    with pytest.raises(MmError) as caught:
        world.volume.freeze()
    assert caught.value.errno == errno.EBUSY
    world.volume.thaw()
    world.volume.freeze()


def test_what_cannot_be_written_back_is_not_frozen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise MmError(errno.EIO, "the disk")

    with monkeypatch.context() as patch:
        patch.setattr(type(world.file.inode), "sync", fail)
        with pytest.raises(MmError, match="EIO"):
            world.volume.freeze()
    world.write(BLOCK)
    world.volume.freeze()


def test_who_holds_what_comes_later_does_not_freeze(world: World) -> None:
    with checking(), world.mm.mmap_lock.read, pytest.raises(LockOrderError, match="sb_writers"):
        world.volume.freeze()


def test_a_file_system_that_is_only_read_has_nothing_to_freeze(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"data")
    with suppress(FileNotFoundError):
        subprocess.run(["genromfs", "-a", "4096", "-d", "tree", "-f", "fs"], cwd=tmp_path, check=True)
    if not (tmp_path / "fs").exists():
        pytest.skip("needs genromfs: apt-get install genromfs")
    host = HostMemory(1 << 20)
    with open_volume(host, str(tmp_path / "fs")) as volume:
        for call in (volume.freeze, volume.thaw):
            with pytest.raises(MmError) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP
    host.close()


@pytest.mark.parametrize("form", FORMS.values())
def test_a_plain_file_is_a_file_system_of_its_own(tmp_path: Path, form: type[XipFile]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old data")
    host, trace = HostMemory(1 << 20), Trace()
    inode = HostInode(host, str(path))
    handle = OpenFile(form(host, trace, inode))
    inode.sb.freeze()
    with pytest.raises(DeadlockError, match="frozen"):
        handle.put(b"new data")
    assert handle.get(100) == path.read_bytes() == b"old data"
    inode.sb.thaw()
    handle.put(b", and more")
    assert path.read_bytes() == b"old data, and more"
    inode.close()
    host.close()


# ---- copies


class Busy:
    """A world in which some write, map, cut and name files, and somebody copies the image again and again."""

    def __init__(self, world: World, seed: int, *, freeze: bool) -> None:
        self.world = world
        self.freeze = freeze
        self.copies: list[tuple[bytes, bytes]] = []
        """Each was made twice."""
        together(world, seed, writer=self.write, mapper=self.store, namer=self.name, copier=self.copy)

    def write(self) -> None:
        log = OpenFile(self.world.create("/log"), os.O_WRONLY | os.O_APPEND)
        for size in (9000, 30_000, 70_000):
            log.put(random.Random(size).randbytes(size))
            log.truncate(size // 2)

    def store(self) -> None:
        for page in range(PAGES):
            self.world.mm.write(self.world.shared + page * PAGE_SIZE, b"mapped")
        self.world.file.punch_hole(1, 2)
        self.world.mm.write(self.world.shared + HOLE, b"again")

    def name(self) -> None:
        for number in range(3):
            self.world.volume.mkdir(f"/dir{number}")
            self.world.volume.create(f"/dir{number}/file")
        self.world.volume.unlink("/dir1/file")
        self.world.volume.unlink("/dir1")

    def copy(self) -> None:
        for _ in range(3):
            if self.freeze:
                self.world.volume.freeze()
            self.copies.append((self.read_image(), self.read_image()))
            if self.freeze:
                self.world.volume.thaw()
            point("test.copied")

    def read_image(self) -> bytes:
        pieces = []
        with self.world.image.open("rb") as file:
            while piece := file.read(64 << 10):
                pieces.append(piece)
                point("test.copying")
        return b"".join(pieces)


def complaints(world: World, seed: int, fsck: Fsck, *, freeze: bool) -> list[str]:
    """What e2fsck says of the copies, and whether one of them changed while it was made."""
    found = []
    copied = world.image.parent / "copy"
    for first, second in Busy(world, seed, freeze=freeze).copies:
        if first != second and world.protocol == "modern":
            found.append("changed")
        if not state(first) & VALID_FS:
            found.append("not put away")
        copied.write_bytes(first)
        found.append(fsck(copied))
    return [each for each in found if each]


@pytest.mark.parametrize("seed", range(12))
def test_a_copy_of_what_is_frozen_is_clean(world: World, fsck: Fsck, seed: int) -> None:
    assert complaints(world, seed, fsck, freeze=True) == []
    world.close()
    assert fsck(world.image) == ""


def test_a_copy_of_what_is_not_frozen_is_not(world: World, fsck: Fsck) -> None:
    found = complaints(world, 1, fsck, freeze=False)
    assert any("e2fsck" in each or "Pass" in each for each in found)


def test_an_image_is_copied_while_a_guest_stores_to_it(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    """A machine that is not running is frozen, copied and thawed; its guest goes on."""
    image = make_image({"/data": bytes(range(1, 256)) * 64})
    code = words(
        rv64.lui(5, 0x6000_0000),
        rv64.addi(6, 6, 1),
        rv64.sd(6, 5, 0),
        rv64.jal(0, -8),
    )
    options = {"image": f"{image}", "map_files": ["/data@0x60000000,shared=on"]}
    with Machine(board="virt-riscv64", memory=4 << 20, **options) as machine:  # type: ignore[arg-type]
        machine.flash[0].device.place(0, code)
        assert machine.image_memory is not None
        volume = machine.image_memory.volume
        machine.run(max_instructions=1000)
        volume.freeze()
        copied = tmp_path / "copy"
        copied.write_bytes(image.read_bytes())
        assert fsck(copied) == ""
        assert state(copied.read_bytes()) & VALID_FS
        volume.thaw()
        before = image.read_bytes()
        machine.run(max_instructions=1000)
        assert image.read_bytes() != before
    assert fsck(image) == ""
