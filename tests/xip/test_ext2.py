"""ext2 images as the command line shows and changes them; e2fsck has the last word."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from xipvm.address import PAGE_SIZE
from xipvm.cli import main
from xipvm.cli.commands import cli
from xipvm.errors import BadInput, MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.vma import MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xip.ext2.inode import blocks_for, most_blocks_for
from xipvm.xip.ext2.tree import Ext2Volume
from xipvm.xip.ext2.volume import Ext2Image
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import Volume, open_volume

MakeImage = Callable[..., Path]
Fsck = Callable[[Path], str]


def xip(*words: str | Path, data: bytes = b"") -> bytes:
    result = CliRunner().invoke(cli, ["xip", *map(str, words)], input=data, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout_bytes


class Mounted:
    def __init__(self, image: Path) -> None:
        self.host = HostMemory(1 << 20)
        self.trace = Trace()
        self.volume: Volume = open_volume(self.host, str(image))

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *_: object) -> None:
        self.volume.close()
        self.host.close()

    def open(self, path: str, *, create: bool = False) -> OpenFile:
        inode = self.volume.create(path) if create else self.volume.lookup(path)
        return OpenFile(self.volume.file(self.host, self.trace, inode))


def test_what_was_put_comes_out_again(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image({"/boot/a": b"alpha"})
    data = random.Random(1).randbytes(3_000_001)
    xip("put", image, "-", "/boot/b", data=data)
    assert xip("cat", image, "/boot/b") == data
    assert xip("cat", image, "/boot/a") == b"alpha"
    listed = json.loads(xip("ls", image, "/boot", "--json"))
    assert {entry["name"]: entry["size"] for entry in listed} == {"a": 5, "b": 3_000_001}
    assert fsck(image) == ""


def test_a_full_image_is_an_error_and_stays_whole(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image(size="1M")
    with pytest.raises(BadInput, match="ENOSPC"):
        xip("put", image, "-", "/big", data=random.Random(2).randbytes(2 << 20))
    assert b"big" not in xip("ls", image)
    assert fsck(image) == ""


def test_a_file_is_not_replaced_by_what_cannot_be(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    image = make_image({"/a": b"alpha"}, size="1M")
    for _ in range(2):
        with pytest.raises(BadInput, match=f"^{image}: /a needs 257 blocks, .* free, beside .*ENOSPC"):
            xip("put", image, "-", "/a", "--force", data=random.Random(2).randbytes(1 << 20))
    with pytest.raises(BadInput, match="no-such-file"):
        xip("put", image, tmp_path / "no-such-file", "/a", "--force")
    assert xip("cat", image, "/a") == b"alpha"
    with Mounted(image) as mounted:
        assert isinstance(mounted.volume, Ext2Volume)
        room = mounted.volume.image.free_blocks
    data = random.Random(3).randbytes((room - 1) << 12)  # and one that leads to those behind the twelfth
    xip("put", image, "-", "/a", "--force", data=data)
    assert xip("cat", image, "/a") == data
    xip("put", image, "-", "/a", "--force", data=b"one block")
    assert fsck(image) == ""


def test_blocks_for() -> None:
    assert blocks_for([]) == 0
    assert blocks_for(range(12)) == 12
    assert blocks_for(range(13)) == 14
    assert blocks_for([12 + 1024]) == 3
    for count in (0, 1, 12, 13, 12 + 1024, 12 + 1024 + 1, 12 + 7 * 1024, 12 + 7 * 1024 + 1):
        needed = blocks_for(range(count))
        assert needed <= most_blocks_for(count * PAGE_SIZE) <= needed + 6
    assert blocks_for([0, 12, 12 + 1024, 12 + 2 * 1024]) == 4 + 1 + 1 + 2


def test_errors_name_the_image_once_and_the_path_whole(make_image: MakeImage) -> None:
    image = make_image(size="1M")
    with pytest.raises(BadInput, match=f"^{image}: /a/b: ENOENT"):
        xip("cat", image, "/a/b")
    with pytest.raises(BadInput, match=f"^{image}: /big needs 513 blocks, and 238 are free: ENOSPC"):
        xip("put", image, "-", "/big", data=random.Random(2).randbytes(2 << 20))


def test_zeros_become_holes_and_truncation_frees(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image()
    xip("put", image, "-", "/sparse", data=bytes(1 << 20) + b"end")
    with Mounted(image) as mounted:
        inode = mounted.volume.lookup("/sparse")
        assert [(page, count) for page, _, count in mounted.volume.extents(inode)] == [(256, 1)]
    xip("truncate", image, "/sparse", "3")
    assert xip("cat", image, "/sparse") == bytes(3)
    with Mounted(image) as mounted:
        assert mounted.volume.status(mounted.volume.lookup("/sparse")).sectors == 0
    assert fsck(image) == ""


@pytest.mark.parametrize("page", [11, 12, 12 + 1023, 12 + 1024, 12 + 1024 + 1024**2 - 1, 12 + 1024 + 1024**2])
def test_each_depth_of_indirect_blocks(make_image: MakeImage, fsck: Fsck, page: int) -> None:
    image = make_image()
    with Mounted(image) as mounted:
        file = mounted.open("/deep", create=True)
        file.lseek(page << 12)
        file.put(b"here")
        file.lseek(page << 12)
        assert file.get(4) == b"here"
    assert fsck(image) == ""
    with Mounted(image) as mounted:
        mounted.open("/deep").file.truncate(0)
        assert mounted.volume.status(mounted.volume.lookup("/deep")).sectors == 0
    assert fsck(image) == ""


def test_directories_grow_and_shrink(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image()
    with Mounted(image) as mounted:
        volume = mounted.volume
        volume.mkdir("/many")
        names = {f"{'long-' * 20}{n}" for n in range(120)}
        for name in sorted(names):
            volume.create(f"/many/{name}")
        assert {name for name, _ in volume.names(volume.lookup("/many"))} == names
        with pytest.raises(MmError, match="ENOTEMPTY"):
            volume.unlink("/many")
        with pytest.raises(MmError, match="EEXIST"):
            volume.mkdir("/many")
        for name in sorted(names)[::2]:
            volume.unlink(f"/many/{name}")
    assert fsck(image) == ""
    with Mounted(image) as mounted:
        for name, _ in list(mounted.volume.names(mounted.volume.lookup("/many"))):
            mounted.volume.unlink(f"/many/{name}")
        mounted.volume.unlink("/many")
    assert fsck(image) == ""


@pytest.mark.parametrize("room", range(8))
def test_a_full_disk_of_the_host_is_an_error(
    make_image: MakeImage, fsck: Fsck, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The image is sparse: without room on the disk a store to it would be the end of the process."""
    image = make_image()
    backed: set[int] = set()

    def allocate(fd: int, mode: int, start: int, size: int) -> None:
        if len(backed) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        backed.add(start)

    monkeypatch.setattr("xipvm.xip.ext2.volume.allocate", allocate)

    def fill(mounted: Mounted) -> None:
        for path in ("/new1", "/new2"):
            file = mounted.open(path, create=True)
            for _ in range(4):
                file.put(bytes(PAGE_SIZE))

    with Mounted(image) as mounted, pytest.raises(MmError, match="ENOSPC"):
        fill(mounted)
    assert fsck(image) == ""
    assert len(backed) == room


@pytest.mark.parametrize("words", [("put", "-"), ("put", "--force", "-"), ("truncate",), ("rm",)])
def test_ctrl_c_in_the_middle_of_a_change_leaves_a_whole_image(
    make_image: MakeImage, fsck: Fsck, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    verb, *options = words
    image = make_image({"/old": b"x" * 200_000})
    path, size = ("/new" if words == ("put", "-") else "/old"), ["100"] if verb == "truncate" else []
    count, counts = Ext2Image._count, itertools.count()

    def counted(self: Ext2Image, number: int, in_group: int, in_superblock: int, delta: int) -> None:
        if next(counts) == 7:
            signal.raise_signal(signal.SIGINT)
        count(self, number, in_group, in_superblock, delta)

    monkeypatch.setattr(Ext2Image, "_count", counted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y" * 300_000)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in the background ignores it
    try:
        with pytest.raises(SystemExit) as ended:
            main(["xip", verb, *options[:-1], str(image), *options[-1:], path, *size])
        assert ended.value.code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert fsck(image) == ""


def test_who_keeps_what_is_written_to_himself_needs_no_room_on_the_disk(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xipvm.xip.ext2.volume.allocate", lambda *_: pytest.fail("room for what is never written"))
    host = HostMemory(1 << 20)
    with open_volume(host, str(make_image()), snapshot=True) as volume:
        assert OpenFile(volume.file(host, Trace(), volume.create("/new"))).put(b"x") == 1
    host.close()


def test_a_file_with_a_pinned_page_is_not_removed(make_image: MakeImage, fsck: Fsck) -> None:
    """Nobody maps it any more; a device may still write to the page, which must not become another file's."""
    image = make_image({"/log": b"x" * 5000})
    with Mounted(image) as mounted:
        file = mounted.open("/log").file
        mm = Mm(mounted.host, mounted.trace)
        hva = mm.mmap(2 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file=file)
        pfn = pin_user_page(mm, hva, write=True)
        mm.munmap(hva, 2 * PAGE_SIZE)
        with pytest.raises(MmError, match="EBUSY"):
            mounted.volume.unlink("/log")
        unpin_user_page(mm, pfn)
        mounted.volume.unlink("/log")
        mm.exit()
    assert fsck(image) == ""


def test_who_has_a_file_open_that_is_removed_does_not_write_to_the_next_one(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image({"/old": b"old data"})
    with Mounted(image) as mounted:
        old = mounted.open("/old")
        mounted.volume.unlink("/old")
        new = mounted.open("/new", create=True)
        with pytest.raises(MmError, match="EBADF"):
            old.put(b"x" * 5000)
        with pytest.raises(MmError, match="EINVAL"):
            old.truncate(1)
        assert new.put(b"new data") == 8
        assert old.get(8) == b""
        mm = Mm(mounted.host, mounted.trace)
        hva = mm.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, file=old.file)
        with pytest.raises(MmError, match="EFAULT"):
            mm.read(hva, 8)
        mm.exit()
    assert fsck(image) == ""


@pytest.mark.parametrize("grow", [lambda file: file.put(b"x"), lambda file: file.truncate(file.pos + 1)])
def test_what_was_stored_behind_the_end_is_zero_when_the_file_grows(
    make_image: MakeImage, grow: Callable[[OpenFile], object]
) -> None:
    with Mounted(make_image({"/file": b"begin"})) as mounted:
        opened = mounted.open("/file")
        mm = Mm(mounted.host, mounted.trace)
        hva = mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file=opened.file)
        mm.write(hva, b"begin and more")
        opened.lseek(PAGE_SIZE + 7)
        grow(opened)
        assert mm.read(hva, 14) == b"begin" + bytes(9)
        mm.exit()


def test_a_file_that_loses_one_of_its_names_remains_the_same_to_everybody(
    make_image: MakeImage, fsck: Fsck, tmp_path: Path
) -> None:
    one = tmp_path / "tree" / "one"
    one.parent.mkdir()
    with one.open("wb") as file:
        file.truncate(PAGE_SIZE)
    one.with_name("two").hardlink_to(one)
    image = make_image()
    with Mounted(image) as mounted:
        mm = Mm(mounted.host, mounted.trace)
        hva = mm.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, file=mounted.open("/one").file)
        assert mm.read(hva, 4) == bytes(4)
        mounted.volume.unlink("/one")
        mounted.open("/two").put(b"data")
        assert mm.read(hva, 4) == b"data"
        with pytest.raises(MmError, match="EBUSY"):
            mounted.volume.unlink("/two")
        mm.exit()
    assert fsck(image) == ""


def test_a_large_image_takes_memory_only_for_what_is_touched(make_image: MakeImage, fsck: Fsck) -> None:
    image = make_image({"/small": b"x"}, "64G", "-N", "1024")
    with Mounted(image) as mounted:
        file = mounted.open("/far", create=True)
        file.lseek(40 << 30)
        file.put(b"far away")
        file.lseek(40 << 30)
        assert file.get(8) == b"far away"
    assert image.stat().st_blocks * 512 < 64 << 20


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(("-b", "1024"), "mke2fs -b 4096"), (("-O", "extents"), "extents")],
)
def test_other_file_systems_are_named(make_image: MakeImage, options: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        xip("ls", make_image({}, "8M", *options))


def test_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "not"
    path.write_bytes(b"\x7fELF" * 1000)
    with pytest.raises(BadInput, match="is no ext2 or romfs image"):
        xip("ls", path)
    with pytest.raises(BadInput, match="No such file or directory"):
        xip("ls", tmp_path / "missing")


def test_a_cut_image(make_image: MakeImage) -> None:
    image = make_image()
    with image.open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(BadInput, match="cut short"):
        xip("ls", image)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(os.devnull, path)])
def test_what_is_no_regular_file_is_no_image(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Nobody waits until somebody opens the other end of a FIFO, either."""
    make(tmp_path / "image")
    with pytest.raises(BadInput, match="is not a regular file"):
        xip("ls", tmp_path / "image")


def test_who_writes_a_file_takes_its_owner_s_rights_away(make_image: MakeImage) -> None:
    image = make_image({"/tool": b"#!"})
    with Mounted(image) as mounted:
        file = mounted.open("/tool")
        inode = mounted.volume.lookup("/tool")
        mounted.volume.image.put16(inode.at, 0o106755)
        file.put(b"x")
        assert mounted.volume.status(inode).rights == 0o755
