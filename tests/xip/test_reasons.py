"""Who finds no page behind an address is told why by the file that is mapped there."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Gfn
from xipvm.errors import MmError
from xipvm.mmu.file import VmFault
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_POPULATE_WRITE
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import FAULT, WRITE
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.secondary.sva import Sva
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xip.ram import RamInode, RamVolume
from xipvm.xip.volume import FORMS

RW = PROT_READ | PROT_WRITE
PAGES = 4


class World:
    """A file of four pages and a half, all holes, mapped shared, five pages and a page behind; one block is free."""

    def __init__(self, protocol: str) -> None:
        self.host = HostMemory(1 << 20)
        self.trace = Trace()
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.volume = RamVolume(self.host, 1)
        self.inode: RamInode = self.volume.file(PAGES * PAGE_SIZE + 100)
        self.file = FORMS[protocol](self.host, self.trace, self.inode)
        self.hva = self.mm.mmap((PAGES + 2) * PAGE_SIZE, RW, MAP_SHARED, file=self.file)

    def message(self, page: int) -> str:
        with pytest.raises(MmError) as caught:
            self.mm.write(self.hva + page * PAGE_SIZE, b"data")
        assert caught.value.errno == errno.EFAULT
        return str(caught.value)

    def close(self) -> None:
        self.mm.exit()
        self.volume.close()
        self.host.close()


@pytest.fixture(params=sorted(FORMS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def _full(world: World) -> None:
    world.mm.write(world.hva, b"the last block")


def _failing(world: World) -> None:
    world.inode.failing = True


@pytest.mark.parametrize(
    ("prepare", "page", "why"),
    [
        (_full, 1, "SIGBUS (file1: ENOSPC (No space left on device)): EFAULT"),
        (_failing, 1, "SIGBUS (page 0x1 of file1: EIO (Input/output error)): EFAULT"),
        (lambda world: None, PAGES + 1, "SIGBUS (page 0x5 is behind the end of file1, which has 16484 bytes): EFAULT"),
    ],
)
def test_a_store_that_finds_no_page_says_why(
    world: World, prepare: Callable[[World], None], page: int, why: str
) -> None:
    prepare(world)
    assert why in world.message(page)


def test_the_sparse_page_of_a_file_system_that_was_read_only(world: World) -> None:
    world.volume.read_only = True
    world.mm.read(world.hva, 1)
    why = "file1: EROFS (Read-only file system)" if world.file.kind == "dax" else "page 0x0 of file1 is a hole"
    assert f"SIGBUS ({why}" in world.message(0)


def test_so_does_a_guest(world: World) -> None:
    _full(world)
    kvm = kvm_of(world.mm, world.trace, world.host)
    kvm.set_memslot(0, Gfn(0x60000), PAGES, world.hva, 0)
    assert kvm.fault(Gfn(0x60001), WRITE) == FAULT
    assert "no page behind guest frame 0x60001" in kvm.last_error
    assert "ENOSPC (No space left on device)" in kvm.last_error


def test_so_does_a_device_a_thread_and_whoever_asks_for_pages_ahead(world: World) -> None:
    _full(world)
    at = world.hva + PAGE_SIZE
    with pytest.raises(HostAccessError, match=r"thread0 .*SIGBUS \(file1: ENOSPC") as caught:
        HostThread(world.mm).store(at, b"data")
    assert caught.value.signal == "SIGBUS"
    if world.mm.notifiers.protocol == "modern":  # the other one knows neither of these
        with pytest.raises(MmError, match=r"populating .*SIGBUS \(file1: ENOSPC"):
            world.mm.madvise(at, PAGE_SIZE, MADV_POPULATE_WRITE)
        sva = Sva(world.mm)
        assert sva.fault(at >> PAGE_SHIFT, WRITE) == FAULT
        assert "SIGBUS (file1: ENOSPC" in sva.last_error


def test_a_reason_is_told_of_its_own_page_only_and_once(world: World) -> None:
    _full(world)
    area = world.mm.find_vma(world.hva)
    assert area is not None
    assert world.file.fault(area, 1, True)[1] == VmFault.SIGBUS
    assert world.file.why_not(2) == ""
    assert world.file.fault(area, 1, True)[1] == VmFault.SIGBUS
    assert "ENOSPC" in world.file.why_not(1)
    assert world.file.why_not(1) == ""


def test_a_cached_file_of_the_host_that_ends_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(b"data")
    host, trace = HostMemory(1 << 20), Trace()
    mm = Mm(host, trace)
    file = HostFile(host, trace, str(tmp_path / "data"))
    hva = mm.mmap(2 * PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)
    with pytest.raises(MmError, match=r"SIGBUS \(page 0x1 is behind the end of .*data, which has 4 bytes\)"):
        mm.read(hva + PAGE_SIZE, 1)

    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(MmError, match=r"SIGBUS \(.*data: Input/output error\)"):
        mm.read(hva, 1)
    mm.exit()
    file.close()
    host.close()
