"""2 MiB of an ext2 file as one piece of its image: found, allocated, given up, cut short; e2fsck has the last word."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.asm import a64, words
from tests.loader.conftest import write_elf
from tests.run.command import inside
from tests.xip.test_power import LOSSES
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.trace.reader import TraceReader
from xipvm.xip.dax import DaxFile
from xipvm.xip.ext2.inode import Ext2Inode
from xipvm.xip.ext2.tree import Ext2Volume
from xipvm.xip.ext2.volume import Ext2Image
from xipvm.xip.inode import HOLE
from xipvm.xip.open_file import OpenFile

MakeImage = Callable[..., Path]
Fsck = Callable[[Path], str]

HVA = 0x2000_0000_0000
DATA = 0x6000_0000
IN_PAGE = 0x78


class Mounted:
    """An image in use, judged by the oracle."""

    def __init__(self, image: Path) -> None:
        self.host = HostMemory(16 << 20)
        self.trace = Trace()
        self.oracle = Oracle()
        self.events: list[Event] = []
        self.trace.attach(self.oracle)
        self.trace.attach(self.events.append)
        self.volume = Ext2Volume(self.host, str(image))
        self.image = self.volume.image
        self.mm = Mm(self.host, self.trace)

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *_: object) -> None:
        self.mm.exit()
        self.volume.close()
        self.host.close()
        assert not self.oracle.violations

    def open(self, path: str, size: int | None = None) -> tuple[Ext2Inode, OpenFile]:
        """The file at ``path``, a new one of ``size`` bytes, all of them a hole, if that is given."""
        inode = self.volume.lookup(path) if size is None else self.volume.create(path)
        file = OpenFile(self.volume.file(self.host, self.trace, inode))
        if size is not None:
            file.file.truncate(size)
        return inode, file

    def map(self, file: OpenFile, pages: int) -> None:
        self.mm.mmap(pages * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, addr=HVA, file=file.file)

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)


def aligned(mounted: Mounted, inode: Ext2Inode, page: int) -> bool:
    """The 2 MiB from ``page`` on are one piece of the image, as all its other readers see it, too."""
    pfns = [inode.find(page + n) for n in range(HUGE_PAGES)]
    first = pfns[0]
    assert inode.find_huge(page) == (first if first and first % HUGE_PAGES == 0 else None)
    return first is not None and first % HUGE_PAGES == 0 and pfns == [first + n for n in range(HUGE_PAGES)]


@pytest.mark.parametrize("megabytes", [0, 2, 4, 6, 8, 4096 + 4])
def test_a_store_to_a_hole_of_2_mib_gets_one_piece(make_image: MakeImage, fsck: Fsck, megabytes: int) -> None:
    """Behind direct, indirect and double indirect numbers, at their borders, and behind triple indirect ones."""
    image, page = make_image(size="16M"), megabytes << 8
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file", (megabytes + 4) << 20)
        free = mounted.image.free_blocks
        mounted.mm.mmap(HPAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, addr=HVA, file=file.file, pgoff=page)
        assert mounted.mm.read(HVA, 8) == bytes(8)
        assert mounted.image.free_blocks == free
        assert inode.find_huge(page) == HOLE
        mounted.mm.write(HVA + 5 * PAGE_SIZE, b"stored")
        assert mounted.mm.pgd.huge(HVA >> PAGE_SHIFT)
        assert mounted.count("xip_allocate_huge") == 1
        assert mounted.count("xip_allocate") == 0
        assert aligned(mounted, inode, page)
        assert inode.find_huge(page + HUGE_PAGES) == HOLE
        assert free - mounted.image.free_blocks == inode.blocks // 8
        assert 0 <= inode.blocks // 8 - HUGE_PAGES <= 5
    assert fsck(image) == ""
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file")
        file.lseek((page + 5) * PAGE_SIZE)
        assert file.get(8) == b"stored\0\0"
        file.file.truncate(0)
        assert mounted.image.free_blocks == free
    assert fsck(image) == ""


def test_what_is_not_one_piece_is_not_taken_for_one(make_image: MakeImage) -> None:
    with Mounted(make_image(size="16M")) as mounted:
        inode, _ = mounted.open("/file", 4 << 20)
        inode.create_huge(0)
        assert aligned(mounted, inode, 0)
        for page in (0, 3, 11, 12, 300, 511):
            place = inode._place((page,) if page < 12 else (12, page - 12))
            number = mounted.image.get32(place)
            for other in (0, number - 1, number + 1, inode.image.block_of(inode.find(511 - page) or 0)):
                mounted.image.put32(place, other)
                assert inode.find_huge(0) is None
            mounted.image.put32(place, number)
        assert inode.create_huge(0) is None  # somebody else was faster
        mounted.image.put32(inode._place((12, 5)) + 4 * HUGE_PAGES, 1)
        assert inode.find_huge(HUGE_PAGES) is None  # one page of it is no hole


def test_a_write_of_whole_2_mib_of_holes_gets_pieces(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image({"/small": b"small"}, size="16M")
    data = bytes(range(1, 251)) * 34_000  # 8.5 MB
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file", 0)
        file.lseek(PAGE_SIZE)
        assert file.put(data) == len(data)
        assert mounted.count("xip_allocate_huge") == 3
        assert [aligned(mounted, inode, page) for page in range(0, 2048, HUGE_PAGES)] == [False, True, True, True]
        file.lseek(PAGE_SIZE)
        assert file.get(len(data)) == data
    assert fsck(image) == ""


def test_put_makes_pieces_where_there_are_no_holes(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    image = make_image(size="16M")
    data = b"x" * HPAGE_SIZE + bytes(PAGE_SIZE) + b"y" * (HPAGE_SIZE - PAGE_SIZE) + b"z" * (HPAGE_SIZE + 5)
    (tmp_path / "source").write_bytes(data)
    assert inside("xip", "put", image, "source", "/file", cwd=tmp_path).status == 0
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file")
        assert [aligned(mounted, inode, page) for page in range(0, 3 * HUGE_PAGES, HUGE_PAGES)] == [True, False, True]
        assert inode.find(HUGE_PAGES) is None
        assert file.get(1 << 24) == data
    assert fsck(image) == ""


def test_put_says_when_there_is_room_for_a_part_only(
    make_image: MakeImage, fsck: Fsck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(size="4M")
    (tmp_path / "source").write_bytes(b"x" * (5 << 20))
    monkeypatch.setattr(Ext2Volume, "check_room", lambda *_, **__: None)
    done = inside("xip", "put", image, "source", "/file", cwd=tmp_path)
    assert done.status == 2
    assert "no block is free: ENOSPC" in done.err
    with Mounted(image) as mounted, pytest.raises(MmError, match="ENOENT"):
        mounted.open("/file")
    assert fsck(image) == ""


def test_a_write_over_a_huge_hole_that_is_mapped(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    with Mounted(image) as mounted:
        _, file = mounted.open("/file", 6 << 20)
        mounted.map(file, 3 * HUGE_PAGES)
        assert mounted.mm.read(HVA, 8) == bytes(8)
        assert mounted.mm.read(HVA + HPAGE_SIZE + PAGE_SIZE, 8) == bytes(8)
        assert file.put(b"12345678" * (3 * HPAGE_SIZE // 8)) == 3 * HPAGE_SIZE
        assert isinstance(file.file, DaxFile)
        assert not file.file.entries
        assert not file.file.huge
        assert not mounted.mm.pgd.huge(HVA >> PAGE_SHIFT)
        for page in (0, 1, HUGE_PAGES, 2 * HUGE_PAGES + 7):
            assert mounted.mm.read(HVA + page * PAGE_SIZE, 8) == b"12345678"
        assert mounted.count("xip_allocate_huge") == 3
        assert all(mounted.mm.pgd.huge((HVA + n * HPAGE_SIZE) >> PAGE_SHIFT) for n in range(3))
    assert fsck(image) == ""


def test_a_write_that_fails_gives_back_what_is_behind_the_end(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file", 0)
        hva = mounted.mm.mmap(2 * PAGE_SIZE, PROT_READ | PROT_WRITE)
        mounted.mm.write(hva, b"12345678")
        free = mounted.image.free_blocks
        assert file.write(mounted.mm, hva, 2 * HPAGE_SIZE) == 2 * PAGE_SIZE
        assert mounted.count("xip_allocate_huge") == 1
        assert inode.size == 2 * PAGE_SIZE
        assert [count for _, _, count in inode.extents()] == [2]
        assert mounted.image.free_blocks == free - 2
    assert fsck(image) == ""


def test_where_small_entries_are_a_write_takes_small_blocks(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    with Mounted(image) as mounted:
        _, file = mounted.open("/file", 2 << 20)
        mounted.mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, addr=HVA, file=file.file, pgoff=9)
        assert mounted.mm.read(HVA, 8) == bytes(8)
        assert file.put(b"12345678" * (HPAGE_SIZE // 8)) == HPAGE_SIZE
        assert mounted.mm.read(HVA, 8) == b"12345678"
        assert mounted.count("xip_allocate_huge") == 0
    assert fsck(image) == ""


def fragment(image: Path) -> None:
    """Fills it with files of 1 MiB, and removes every third."""
    with Mounted(image) as mounted:
        files: list[str] = []
        while mounted.image.free_blocks > HUGE_PAGES // 2:
            _, file = mounted.open(f"/fill{len(files)}", 0)
            file.put(b"x" * (min(mounted.image.free_blocks - 8, HUGE_PAGES // 2) * PAGE_SIZE))
            files.append(f"/fill{len(files)}")
        for path in files[::3]:
            mounted.volume.unlink(path)


def test_a_fragmented_image_gives_small_pages(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    fragment(image)
    with Mounted(image) as mounted:
        assert mounted.image.free_blocks > HUGE_PAGES + 8
        inode, file = mounted.open("/file", 4 << 20)
        mounted.map(file, 2 * HUGE_PAGES)
        mounted.mm.write(HVA + 3 * PAGE_SIZE, b"stored")
        assert mounted.mm.read(HVA + 3 * PAGE_SIZE, 6) == b"stored"
        assert not mounted.mm.pgd.huge(HVA >> PAGE_SHIFT)
        assert mounted.count("xip_allocate_huge") == 0
        assert inode.blocks == 8
        file.lseek(HPAGE_SIZE)
        assert file.put(b"y" * HPAGE_SIZE) == HPAGE_SIZE
    assert fsck(image) == ""


def test_a_full_image_gives_nothing(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    with Mounted(image) as mounted:
        _, file = mounted.open("/file", 4 << 20)
        mounted.map(file, 2 * HUGE_PAGES)
        _, filler = mounted.open("/filler", 0)
        assert filler.put(b"x" * (16 << 20)) < 16 << 20
        assert mounted.image.free_blocks == 0
        with pytest.raises(MmError, match="SIGBUS"):
            mounted.mm.write(HVA, b"stored")
        file.lseek(HPAGE_SIZE)
        with pytest.raises(MmError, match="ENOSPC"):
            file.put(b"y" * HPAGE_SIZE)
        assert mounted.mm.read(HVA, 8) == bytes(8)
    assert fsck(image) == ""


def test_a_disk_with_no_room_for_2_mib(make_image: MakeImage, fsck: Fsck, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, mode: int, offset: int, length: int) -> None:
        if length > PAGE_SIZE:
            raise OSError(errno.ENOSPC, "full")

    image = make_image(size="16M")
    with Mounted(image) as mounted:
        inode, file = mounted.open("/file", 2 << 20)
        mounted.map(file, HUGE_PAGES)
        monkeypatch.setattr("xipvm.xip.ext2.volume.allocate", full)
        mounted.mm.write(HVA, b"stored")
        assert inode.blocks == 8
    assert fsck(image) == ""


def test_where_there_is_room_for_the_piece_and_not_for_what_leads_to_it(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="16M")
    with Mounted(image) as mounted:
        inode, _ = mounted.open("/file", 8 << 20)
        taken: list[int] = []
        while mounted.image.free_blocks > HUGE_PAGES + 2:  # all that is free but one piece, and two
            taken.append(mounted.image.allocate_block(taken[-1] + 1 if taken else 0))
            if taken[-1] == 2 * HUGE_PAGES:
                mounted.image.release_block(taken.pop())
                taken.append(mounted.image.allocate_block(3 * HUGE_PAGES))
        assert inode.create_huge(4 * HUGE_PAGES) is None  # three lead to it
        assert mounted.image.free_blocks == HUGE_PAGES + 2
        assert inode.blocks == 0
        assert inode._place((13, 0, 0)) == 0
        assert inode.create_huge(0) is not None  # one does
        assert mounted.image.free_blocks == 1
        inode.free_blocks(0, HUGE_PAGES)
        for block in taken:
            mounted.image.release_block(block)
    assert fsck(image) == ""


def test_groups_of_any_size(make_image: MakeImage, fsck: Fsck) -> None:
    """Those of 1000 blocks have an aligned piece at bits that are no multiple of 512; those of 512 have none."""
    image = make_image(None, "16M", "-g", "1000", "-N", "64")
    with Mounted(image) as mounted:
        inode, _ = mounted.open("/file", 8 << 20)
        assert all(inode.create_huge(page) for page in (0, HUGE_PAGES))
        assert aligned(mounted, inode, 0)
        assert aligned(mounted, inode, HUGE_PAGES)
        blocks = [inode.image.block_of(inode.find(page) or 0) for page in (0, HUGE_PAGES)]
        assert all(block // 1000 == (block + HUGE_PAGES - 1) // 1000 for block in blocks)
    assert fsck(image) == ""
    image = make_image(None, "16M", "-g", "512", "-N", "64")
    with Mounted(image) as mounted:
        inode, _ = mounted.open("/file", 8 << 20)
        assert inode.create_huge(0) is None
    assert fsck(image) == ""


def test_a_kill_at_any_store_of_it(make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image as it is before each store, and half way through the larger ones. Free blocks hold garbage."""
    image = make_image({"/kept": b"kept" * 5000}, size="16M")
    page = 4 * HUGE_PAGES  # 12 of its pages are behind one indirect block, the others behind another one
    copies: list[Path] = []

    def cut() -> None:
        copies.append(tmp_path / f"cut{len(copies)}")
        shutil.copyfile(image, copies[-1])

    def cutting(method: Callable[..., None]) -> Callable[..., None]:
        def store(at: int, value: int | bytes) -> None:
            cut()
            if isinstance(value, bytes):
                method(at, value[: len(value) // 2])
                cut()
            method(at, value)

        return store

    with Mounted(image) as mounted:
        ext2 = mounted.image
        soil(ext2)
        inode, _ = mounted.open("/file", 16 << 20)
        for name in ("_put16", "_put32", "_put_bytes"):
            monkeypatch.setattr(ext2, name, cutting(getattr(ext2, name)))
        assert inode.create_huge(page) is not None
        monkeypatch.undo()
        cut()
    named = set()
    for copy in copies:
        checked = e2fsck("-fn", copy)
        wrong = [line for line in checked.stdout.splitlines() if not LOSSES.fullmatch(line)]
        assert wrong == [], copy.name
        assert e2fsck("-fy", copy).returncode in (0, 1)
        with Mounted(copy) as mounted:
            inode, file = mounted.open("/file")
            named.add(sum(count for _, _, count in inode.extents()))
            file.lseek(page * PAGE_SIZE)
            assert file.get(HPAGE_SIZE) == bytes(HPAGE_SIZE), copy.name
            assert mounted.open("/kept")[1].get(1 << 20) == b"kept" * 5000
    assert named == {0, 6, 12, 12 + 250, HUGE_PAGES}


def soil(ext2: Ext2Image) -> None:
    """Leaves no zeros in free pieces of 2 MiB."""
    taken = []
    while (bit := ext2._find_run(0, 0)) is not None:
        taken.append(ext2.allocate_run(bit))
        ext2.bytes[bit * PAGE_SIZE : bit * PAGE_SIZE + HPAGE_SIZE] = b"\xa5" * HPAGE_SIZE
    assert taken
    for block in taken:
        for n in range(HUGE_PAGES):
            ext2.release_block(block + n)


def e2fsck(option: str, image: Path) -> subprocess.CompletedProcess[str]:
    path = {"PATH": "/usr/sbin:/sbin:" + os.environ["PATH"]}
    return subprocess.run(["e2fsck", option, str(image)], capture_output=True, text=True, env=path)


def storer() -> bytes:
    """A guest in flash that stores a word to each page of 2 MiB at ``DATA``, and then powers off."""
    page = [a64.str(6, 5), a64.add(5, 5, PAGE_SIZE - 1), a64.add(5, 5, 1), a64.sub(6, 6, 1), a64.cbnz(6, -16)]
    end = [*a64.mov(0, 0x8400_0008), a64.hvc(), a64.b(0)]
    code = [*a64.mov(5, DATA), a64.movz(6, HUGE_PAGES), *page, *end]
    return write_elf({"paddr": IN_PAGE, "data": words(*code)}, entry=IN_PAGE)


@pytest.mark.parametrize("room", ["free", "fragmented"])
def test_a_guest_stores_to_a_hole(make_image: MakeImage, fsck: Fsck, tmp_path: Path, room: str) -> None:
    image = make_image({"/storer": storer()}, size="16M")
    if room == "fragmented":
        fragment(image)
    with Mounted(image) as mounted:
        mounted.open("/data", 2 << 20)
    trace = tmp_path / "trace"
    words = ("--image", image, "--map", f"/data@{DATA:#x},shared=on", "--check", "--trace", trace)
    done = inside("run", *words, "/storer", cwd=tmp_path)
    assert done.status == 0, done
    with TraceReader(str(trace)) as reader:
        kinds = [event.kind for event in reader]
    huge = room == "free"
    assert kinds.count("xip_allocate_huge") == kinds.count("spte_set_huge") == huge
    assert kinds.count("xip_allocate") == (0 if huge else HUGE_PAGES)
    assert fsck(image) == ""
    with Mounted(image) as mounted:
        data = mounted.open("/data")[1].get(HPAGE_SIZE)
    stored = [int.from_bytes(data[n : n + 8], "little") for n in range(0, HPAGE_SIZE, PAGE_SIZE)]
    assert stored == list(range(HUGE_PAGES, 0, -1))
