"""XIP files on a plain host file: read, written, mapped, truncated, as filemap_xip did it without its bugs."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.filemap import XipFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.open_file import OpenFile

RW = PROT_READ | PROT_WRITE


class World:
    """A file of five pages, of which the first, in part, and the fourth are not holes."""

    def __init__(self, path: Path, protocol: str, form: type[XipFile]) -> None:
        self.path = path
        with path.open("wb") as file:
            file.write(b"begin")
            file.seek(3 * PAGE_SIZE)
            file.write(b"fourth")
            file.truncate(5 * PAGE_SIZE)
        self.host = HostMemory(4 << 20)
        self.trace = Trace()
        self.events: list[Event] = []
        self.trace.attach(self.events.append)
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.inode = HostInode(self.host, str(path))
        self.file = form(self.host, self.trace, self.inode)
        self.open = OpenFile(self.file)

    def map(self, flags: int) -> int:
        return self.mm.mmap(5 * PAGE_SIZE, RW, flags, file=self.file)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture(params=[("2008", XipFile), ("modern", XipFile), ("modern", DaxFile)], ids=["2008", "modern", "dax"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(tmp_path / "file", *request.param)
    yield world
    world.mm.exit()
    world.inode.close()


def test_a_read_ends_where_it_was_asked_to(world: World) -> None:
    buffer = world.mm.mmap(4 * PAGE_SIZE, RW, MAP_PRIVATE | 0x20)
    world.mm.write(buffer, b"\xee" * 4 * PAGE_SIZE)
    assert world.open.read(world.mm, buffer, 5000) == 5000
    got = world.mm.read(buffer, 5004)
    assert got[:5] == b"begin"
    assert got[5:5000] == bytes(4995)
    assert got[5000:] == b"\xee" * 4
    assert world.open.pos == 5000


def test_reading_nothing_of_a_hole_is_nothing(world: World) -> None:
    world.open.lseek(PAGE_SIZE)
    assert world.open.get(0) == b""


def test_a_read_stops_at_memory_that_is_not_there_and_says_how_far_it_came(world: World) -> None:
    buffer = world.mm.mmap(PAGE_SIZE, RW, MAP_PRIVATE | 0x20)
    assert world.open.read(world.mm, buffer, 3 * PAGE_SIZE) == PAGE_SIZE
    with pytest.raises(MmError) as caught:
        world.open.read(world.mm, buffer + PAGE_SIZE, 1)
    assert caught.value.errno == errno.EFAULT
    assert world.open.pos == PAGE_SIZE


def test_who_maps_a_hole_sees_what_is_written_into_it(world: World) -> None:
    private = world.map(MAP_PRIVATE)
    assert world.mm.read(private + PAGE_SIZE, 4) == bytes(4)
    world.open.lseek(PAGE_SIZE)
    world.open.put(b"data")
    assert world.mm.read(private + PAGE_SIZE, 4) == b"data"


def test_a_private_copy_of_a_hole_stays_what_it_is(world: World) -> None:
    private = world.map(MAP_PRIVATE)
    world.mm.write(private + PAGE_SIZE, b"mine")
    world.open.lseek(PAGE_SIZE)
    world.open.put(b"data")
    assert world.mm.read(private + PAGE_SIZE, 4) == b"mine"


def test_a_shared_mapping_allocates_and_its_stores_are_in_the_file(world: World) -> None:
    shared = world.map(MAP_SHARED)
    world.mm.write(shared + 2 * PAGE_SIZE, b"stored")
    assert "xip_allocate" in world.kinds()
    world.open.lseek(2 * PAGE_SIZE)
    assert world.open.get(6) == b"stored"
    assert world.path.read_bytes()[2 * PAGE_SIZE :][:6] == b"stored"


@pytest.mark.parametrize("grow", [lambda open: open.put(b"x"), lambda open: open.truncate(open.pos + 1)])
def test_what_was_stored_behind_the_end_is_zero_when_the_file_grows(
    world: World, grow: Callable[[OpenFile], object]
) -> None:
    world.open.truncate(5)
    hva = world.map(MAP_SHARED)
    world.mm.write(hva, b"begin and more")
    world.open.lseek(PAGE_SIZE + 7)
    grow(world.open)
    assert world.mm.read(hva, 14) == b"begin" + bytes(9)
    world.open.lseek(0)
    assert world.open.get(14) == b"begin" + bytes(9)


@pytest.mark.parametrize("moved", [False, True])
def test_a_trace_says_what_of_the_file_an_area_shows_that_has_grown(world: World, moved: bool) -> None:
    hva = world.mm.mmap(PAGE_SIZE, RW, MAP_SHARED, file=world.file, pgoff=1)
    to = hva - (1 << 30)
    hva = world.mm.mremap(hva, PAGE_SIZE, 3 * PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED * moved, to if moved else None)
    last = [event.fields for event in world.events if event.kind == "xip_map"][-1]
    assert (last["start"], last["end"], last["pgoff"]) == (hva, hva + 3 * PAGE_SIZE, 1)


def test_truncation_takes_pages_and_tail_away(world: World) -> None:
    shared = world.map(MAP_SHARED)
    assert world.mm.read(shared + 3 * PAGE_SIZE, 6) == b"fourth"
    world.file.truncate(3)
    assert world.path.stat().st_size == 3
    with pytest.raises(MmError):
        world.mm.read(shared + PAGE_SIZE, 1)
    world.file.truncate(4 * PAGE_SIZE)
    assert world.mm.read(shared, 5) == b"beg\0\0"
    assert world.mm.read(shared + 3 * PAGE_SIZE, 6) == bytes(6)


def test_append_writes_at_the_end(world: World) -> None:
    log = OpenFile(world.file, os.O_WRONLY | os.O_APPEND)
    assert log.put(b"line") == 4
    assert (log.pos, world.file.size) == (5 * PAGE_SIZE + 4, 5 * PAGE_SIZE + 4)
    with pytest.raises(MmError) as caught:
        log.get(1)
    assert caught.value.errno == errno.EBADF


def test_nobody_writes_beyond_his_limit(world: World) -> None:
    """RLIMIT_FSIZE: what would cross it is cut short; holes may be punched wherever they like."""
    limited = OpenFile(world.file, fsize=PAGE_SIZE + 2)
    limited.lseek(PAGE_SIZE)
    assert limited.put(b"data") == 2
    assert limited.pos == PAGE_SIZE + 2
    for refused in (lambda: limited.put(b"x"), lambda: limited.truncate(5 * PAGE_SIZE + 1)):
        with pytest.raises(MmError) as caught:
            refused()
        assert caught.value.errno == errno.EFBIG
    assert limited.put(b"") == 0
    world.file.punch_hole(3, 1)
    limited.truncate(3 * PAGE_SIZE)  # shorter than it was
    with pytest.raises(MmError):
        limited.truncate(3 * PAGE_SIZE + 1)
    limited.fsize = resource.RLIM_INFINITY
    limited.truncate(3 * PAGE_SIZE + 1)
    limited.lseek(0)
    assert limited.get(PAGE_SIZE + 4)[PAGE_SIZE:] == b"da\0\0"


def test_an_append_of_nothing_moves_nobody(world: World) -> None:
    log = OpenFile(world.file, os.O_RDWR | os.O_APPEND)
    assert log.put(b"") == 0
    assert log.pos == 0


def test_who_reads_does_not_truncate_and_no_hole_is_where_no_file_can_be(world: World) -> None:
    with pytest.raises(MmError) as caught:
        OpenFile(world.file, os.O_RDONLY).truncate(0)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(MmError) as caught:
        world.file.punch_hole(world.inode.max_bytes >> PAGE_SHIFT, 1)
    assert caught.value.errno == errno.EFBIG


def test_who_may_not_write_maps_holes_and_sees_what_comes_into_them(world: World) -> None:
    reader = world.file.opened_read_only()
    hva = world.mm.mmap(5 * PAGE_SIZE, PROT_READ, MAP_SHARED, file=reader)
    assert world.mm.read(hva + PAGE_SIZE, 4) == bytes(4)
    assert "xip_allocate" not in world.kinds()
    with pytest.raises(MmError):
        OpenFile(reader).put(b"x")
    world.open.lseek(PAGE_SIZE)
    world.open.put(b"data")
    assert world.mm.read(hva + PAGE_SIZE, 4) == b"data"


def test_holes_are_holes_again_when_punched(world: World) -> None:
    shared = world.map(MAP_SHARED)
    world.mm.write(shared + 3 * PAGE_SIZE, b"x")
    world.file.punch_hole(3, 1)
    assert world.mm.read(shared + 3 * PAGE_SIZE, 6) == bytes(6)
