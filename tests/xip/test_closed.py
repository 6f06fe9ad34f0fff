"""A volume that was closed says so, and one that is in use is not closed."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError, XipImageError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pin import pin_user_page, unpin_user_page
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import FORMS, Volume, open_volume

MakeImage = Callable[..., Path]
ASKED = {
    "lookup": ("/file",), "names": (None,), "status": (None,), "extents": (None,), "create": ("/new",),
    "mkdir": ("/new",), "check_room": ((), "/new"), "tmpfile": ("/new",), "link": (None, "/new"),
    "replace": (None, "/new"), "discard": (None,), "unlink": ("/file",), "freeze": (), "thaw": (),
    "file": (None, None, None), "read_whole": (None, None, None), "forget": (None,),
}  # fmt: skip
"""What can be asked of a volume."""


def closed(asked: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MmError, match=r"fs\.ext2 is closed: EBADF") as caught:
        asked(*arguments)
    return str(caught.value)


def test_all_that_can_be_asked_is_listed() -> None:
    methods = {name for name in dir(Volume) if not name.startswith("_") and callable(getattr(Volume, name))}
    assert methods - {"close"} == set(ASKED)


@pytest.mark.parametrize("protocol", sorted(FORMS))
def test_a_closed_volume_and_its_files_say_so(make_image: MakeImage, protocol: str) -> None:
    image = make_image({"/file": b"data"})
    host, trace = HostMemory(1 << 20), Trace()
    mm = Mm(host, trace, protocol=protocol)
    volume = open_volume(host, str(image))
    inode = volume.lookup("/file")
    file = volume.file(host, trace, inode, protocol)
    handle = OpenFile(file)
    volume.close()
    volume.close()
    for name, arguments in ASKED.items():
        assert closed(getattr(volume, name), *arguments).startswith(f"{name}: ")
    closed(lambda: handle.get(1))
    closed(lambda: handle.put(b"x"))
    closed(lambda: handle.truncate(1))
    closed(lambda: handle.lseek(0, os.SEEK_END))
    closed(lambda: file.punch_hole(0, 1))
    closed(file.fsync)
    closed(lambda: mm.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file))
    assert not mm.vmas
    with open_volume(host, str(image)) as again:  # its lock is gone
        assert again.clean
    mm.exit()
    host.close()


def test_what_is_mapped_or_pinned_keeps_it_open(make_image: MakeImage) -> None:
    image = make_image({"/file": b"data"})
    host, trace = HostMemory(1 << 20), Trace()
    mm = Mm(host, trace)
    volume = open_volume(host, str(image))
    file = volume.file(host, trace, volume.lookup("/file"))
    hva = mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file=file)
    with pytest.raises(MmError, match=f"fs.ext2 cannot be closed: file: mm0 maps it at {hva:#x}: EBUSY"):
        volume.close()
    pfn = pin_user_page(mm, hva, write=True)
    mm.munmap(hva, PAGE_SIZE)
    with pytest.raises(MmError, match="file: somebody has a page of it pinned: EBUSY") as caught:
        volume.close()
    assert caught.value.errno == errno.EBUSY
    assert OpenFile(file).get(4) == b"data"
    with pytest.raises(XipImageError):
        open_volume(host, str(image))
    unpin_user_page(mm, pfn)
    volume.close()
    closed(lambda: OpenFile(file).get(4))
    mm.exit()
    host.close()


def test_an_error_is_not_hidden_by_what_it_left_mapped(make_image: MakeImage) -> None:
    host, trace = HostMemory(1 << 20), Trace()
    mm = Mm(host, trace)
    volume = open_volume(host, str(make_image({"/file": b"data"})))
    file = volume.file(host, trace, volume.lookup("/file"))
    mm.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)
    with pytest.raises(RuntimeError, match="the reason") as caught, volume:
        raise RuntimeError("the reason")
    assert "mm0 maps it" in caught.value.__notes__[0]
    assert not volume.closed
    mm.exit()
    volume.close()
    host.close()


def test_romfs_is_closed_in_the_same_way(tmp_path: Path) -> None:
    image = tmp_path / "fs.romfs"
    head = b"-rom1fs-" + struct.pack(">II", 64, 0) + b"volume".ljust(16, b"\0")
    root = struct.pack(">IIII", 9, 32, 0, 0) + b".".ljust(16, b"\0")
    data = head + root
    words = struct.unpack(f">{len(data) // 4}I", data)
    data = data[:12] + struct.pack(">I", -sum(words) & 0xFFFF_FFFF) + data[16:]
    image.write_bytes(data.ljust(1024, b"\0"))
    volume = open_volume(HostMemory(1 << 20), str(image))
    assert list(volume.names(volume.lookup("/"))) == []
    volume.close()
    volume.close()
    with pytest.raises(MmError, match=r"lookup: .*fs\.romfs is closed: EBADF"):
        volume.lookup("/")
