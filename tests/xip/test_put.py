"""``xipvm xip put`` makes a file whole or not at all, whenever it is ended: by an error, by a signal, by SIGKILL."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.command import DEADLINE, environment, inside, start
from xipvm.cli.put import _LARGE
from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_SHARED, PROT_READ
from xipvm.trace.funnel import Trace
from xipvm.xip.ext2 import layout
from xipvm.xip.ext2.tree import Ext2Volume
from xipvm.xip.ext2.volume import Ext2Image
from xipvm.xip.inode import HOLE
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import open_volume

MakeImage = Callable[..., Path]
Fsck = Callable[[Path], str]

OLD, NEW = b"old" * 20_000, random.Random(1).randbytes(70_001)

#: Kills itself right before store number ``argv[1]`` to the image, those of the bytes of files not counted.
_KILLED = """
import os, signal, sys
from xipvm.cli import main
from xipvm.xip.ext2 import directory, replace
from xipvm.xip.ext2 import layout
from xipvm.xip.ext2.tree import Ext2Volume
from xipvm.xip.ext2.volume import Ext2Image

last, stores = int(sys.argv[1]), 0

def counted(owner, name):
    method = getattr(owner, name)
    def store(*arguments):
        global stores
        stores += 1
        if stores == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    setattr(owner, name, store)

for owner, name in (
    (Ext2Image, "_put16"), (Ext2Image, "_put32"), (Ext2Image, "_clear_bit"), (Ext2Image, "_take_bit"),
    (directory, "_fill"), (replace, "_store"),
):
    counted(owner, name)
try:
    main(sys.argv[2:])
finally:
    print(stores)
"""


def killed(store: int, *words: str | Path, cwd: Path) -> tuple[int, str]:
    """``xipvm words`` as a process that dies before that store: its status, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(store), *map(str, words)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def content(image: Path, path: str) -> bytes:
    host = HostMemory(1 << 20)
    try:
        with open_volume(host, str(image), read_only=True) as volume:
            return b"".join(volume.read_whole(host, Trace(), volume.lookup(path)))
    finally:
        host.close()


def names(image: Path, path: str = "/") -> set[str]:
    host = HostMemory(1 << 20)
    try:
        with open_volume(host, str(image), read_only=True) as volume:
            return {name for name, _ in volume.names(volume.lookup(path))}
    finally:
        host.close()


def repaired(image: Path) -> None:
    """By e2fsck, which can put all of it right."""
    path = "/usr/sbin:/sbin:" + os.environ["PATH"]
    done = subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True, text=True, env={"PATH": path})
    assert done.returncode in (0, 1), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["new", "only", "linked"])
def test_a_kill_at_any_store_leaves_the_old_file_or_the_new_one(
    make_image: MakeImage, fsck: Fsck, tmp_path: Path, what: str
) -> None:
    """``what`` is put: a new file, one that replaces an only name, and one that replaces a file with another name."""
    (tmp_path / "tree").mkdir()
    if what != "new":
        (tmp_path / "tree" / "file").write_bytes(OLD)
    if what == "linked":
        (tmp_path / "tree" / "other").hardlink_to(tmp_path / "tree" / "file")
    image = make_image()
    good = image.read_bytes()
    (tmp_path / "source").write_bytes(NEW)
    words = ("xip", "put", "--force", image, "source", "/file")
    status, said = killed(0, *words, cwd=tmp_path)
    assert status == 0
    total = int(said.splitlines()[-1])
    some = {*random.Random(2).sample(range(1, total), 14), *range(total - 8, total + 1)}
    seen = set()
    for store in sorted(some):
        image.write_bytes(good)
        status, _ = killed(store, *words, cwd=tmp_path)
        assert status == -signal.SIGKILL
        for _ in range(2):
            found = content(image, "/file") if "file" in names(image) else b""
            assert found == NEW or (found == OLD if what != "new" else not found), f"killed at store {store}"
            if what == "linked":
                assert content(image, "/other") == found
            seen.add(found == NEW)
            repaired(image)
        assert fsck(image) == ""
    assert seen == {False, True}


def test_other_names_have_what_replaces_the_file(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    one = tmp_path / "tree" / "one"
    one.parent.mkdir()
    one.write_bytes(OLD)
    one.with_name("two").hardlink_to(one)
    one.with_name("link").symlink_to("two")
    image = make_image()
    (tmp_path / "source").write_bytes(NEW)
    assert inside("xip", "put", "--force", image, "source", "/link", cwd=tmp_path).status == 0
    assert content(image, "/one") == content(image, "/two") == content(image, "/link") == NEW
    listed = json.loads(inside("xip", "ls", image, "--json", cwd=tmp_path).out)
    assert [entry["links"] for entry in listed if entry["name"] in ("one", "two")] == [2, 2]
    assert fsck(image) == ""


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    (tmp_path / "tree" / "dir").mkdir(parents=True)
    (tmp_path / "tree" / "dir" / "file").write_bytes(OLD)
    (tmp_path / "tree" / "link").symlink_to("dir/file")
    image = make_image()
    (tmp_path / "source").write_bytes(NEW)
    assert inside("xip", "put", "--force", image, "source", "/link", cwd=tmp_path).status == 0
    assert content(image, "/dir/file") == NEW
    assert "link -> dir/file" in inside("xip", "ls", image, cwd=tmp_path).out
    assert fsck(image) == ""


@pytest.mark.parametrize("links", [1, 2])
def test_a_file_that_is_mapped_is_not_replaced(make_image: MakeImage, fsck: Fsck, tmp_path: Path, links: int) -> None:
    one = tmp_path / "tree" / "one"
    one.parent.mkdir()
    one.write_bytes(OLD)
    if links == 2:
        one.with_name("two").hardlink_to(one)
    image = make_image()
    host, trace = HostMemory(1 << 20), Trace()
    with open_volume(host, str(image)) as volume:
        opened = OpenFile(volume.file(host, trace, volume.lookup("/one")))
        mm = Mm(host, trace)
        hva = mm.mmap(4096, PROT_READ, MAP_SHARED, file=opened.file)
        new = volume.tmpfile("/one")
        OpenFile(volume.file(host, trace, new)).put(NEW)
        with pytest.raises(MmError, match="EBUSY"):
            volume.replace(new, "/one")
        assert mm.read(hva, 3) == b"old"
        mm.exit()
        volume.replace(new, "/one")
        assert opened.get(100) == b""
        again = OpenFile(volume.file(host, trace, volume.lookup("/one")))
        assert again.get(1 << 20) == NEW
    host.close()
    assert fsck(image) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("existing", [True, False])
def test_a_signal_ends_it_and_the_image_is_put_away(
    make_image: MakeImage,
    fsck: Fsck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    existing: bool,
) -> None:
    image = make_image({"/file": OLD} if existing else {})
    (tmp_path / "source").write_bytes(NEW)
    count, counts = Ext2Image._count, itertools.count()

    def counted(self: Ext2Image, group: int, in_group: int, in_superblock: int, delta: int) -> None:
        if next(counts) == 7:
            signal.raise_signal(number)
        count(self, group, in_group, in_superblock, delta)

    monkeypatch.setattr(Ext2Image, "_count", counted)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # who runs in the background may ignore it
    try:
        ended = inside("xip", "put", "--force", image, "source", "/file", cwd=tmp_path)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
    assert ended.status == 128 + number
    said = "interrupted" if number == signal.SIGINT else signal.strsignal(number)
    assert ended.err.strip() == f"xipvm: {said}"
    assert content(image, "/file") == OLD if existing else "file" not in names(image)
    assert fsck(image) == ""


def test_a_signal_that_is_ignored_stays_so(make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image()
    (tmp_path / "source").write_bytes(NEW)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert inside("xip", "put", image, "source", "/file", cwd=tmp_path).status == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_while_it_waits_for_a_pipe(make_image: MakeImage, fsck: Fsck, number: signal.Signals) -> None:
    image = make_image()
    with start("xip", "put", image, "-", "/file", prefix=("env", "--default-signal")) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(bytes(1 << 20))  # more than a pipe holds: it is being read
        child.stdin.flush()
        child.send_signal(number)
        assert child.wait(DEADLINE) == 128 + number
        said = "interrupted" if number == signal.SIGINT else signal.strsignal(number)
        assert child.stderr.read().decode().strip() == f"xipvm: {said}"
    assert "file" not in names(image)
    assert fsck(image) == ""


@pytest.mark.parametrize("mode", [0o755, 0o600, 0o4755])
def test_a_new_file_has_the_rights_of_the_source_and_an_old_one_its_own(
    make_image: MakeImage, fsck: Fsck, tmp_path: Path, mode: int
) -> None:
    image = make_image({"/old": OLD})
    with open_volume(host := HostMemory(1 << 20), str(image)) as volume:
        assert isinstance(volume, Ext2Volume)
        old = volume.lookup("/old")
        volume.image.put16(old.at + layout.I_MODE, layout.S_IFREG | 0o2640)
        volume.image.put16(old.at + layout.I_MODE + 2, 1234)  # i_uid
    host.close()
    (tmp_path / "source").write_bytes(NEW)
    (tmp_path / "source").chmod(mode)
    assert inside("xip", "put", image, "source", "/new", cwd=tmp_path).status == 0
    assert inside("xip", "put", "--force", image, "source", "/old", cwd=tmp_path).status == 0
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(NEW,))
    writer.start()
    assert inside("xip", "put", image, "pipe", "/piped", cwd=tmp_path).status == 0
    writer.join()
    with open_volume(host := HostMemory(1 << 20), str(image)) as volume:
        assert isinstance(volume, Ext2Volume)
        rights = {name: volume.status(volume.lookup(name)).rights for name in ("/new", "/old", "/piped")}
        assert rights == {"/new": mode & 0o777, "/old": 0o2640, "/piped": 0o644}
        assert volume.image.get16(volume.lookup("/old").at + layout.I_MODE + 2) == 1234
    host.close()
    assert fsck(image) == ""


def test_a_large_file_is_in_pieces_as_large_as_huge_pages(make_image: MakeImage, fsck: Fsck, tmp_path: Path) -> None:
    image = make_image({}, "16M")
    data = random.Random(3).randbytes((4 << 20) + 5000)
    (tmp_path / "source").write_bytes(data)
    assert inside("xip", "put", image, "source", "/file", cwd=tmp_path).status == 0
    assert content(image, "/file") == data
    with open_volume(host := HostMemory(1 << 20), str(image), read_only=True) as volume:
        found = [volume.lookup("/file").find_huge(page) for page in (0, HUGE_PAGES)]
        assert all(pfn is not None and pfn != HOLE for pfn in found)
    host.close()
    assert fsck(image) == ""


def test_a_file_of_holes_needs_little_room_and_what_has_data_has_holes_around(
    make_image: MakeImage, fsck: Fsck, tmp_path: Path
) -> None:
    image = make_image()
    with (tmp_path / "source").open("wb") as file:
        for at in (0, 5 << 12, (2 << 20) - 1, 30 << 20):
            file.seek(at)
            file.write(b"data")
        file.truncate((40 << 20) + 77)
    said = inside("xip", "put", image, "source", "/file", cwd=tmp_path)
    assert said.status == 0
    assert content(image, "/file") == (tmp_path / "source").read_bytes()
    runs = json.loads(inside("xip", "map", image, "/file", "--json", cwd=tmp_path).out)
    assert {run["page"]: run["pages"] for run in runs if run["block"]} == {0: 1, 5: 1, 511: 2, 7680: 1}
    assert fsck(image) == ""


def test_a_terminal_sees_how_far_a_large_file_has_come(make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image()
    with (tmp_path / "source").open("wb") as file:
        file.truncate(_LARGE)
    terminal, end = os.openpty()
    try:
        words = [sys.executable, "-m", "xipvm", "xip", "put", str(image), "source", "/file"]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment({"TERM": "xterm"}),
            stderr=end,
            stdout=subprocess.PIPE,
            timeout=DEADLINE,
        )
        assert done.stdout == b"/file: %d bytes, 0 used\n" % _LARGE
        assert b"put" in os.read(terminal, 4096)
    finally:
        os.close(terminal)
        os.close(end)
