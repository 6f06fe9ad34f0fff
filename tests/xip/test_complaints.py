"""What ``xipvm xip`` and ``xipvm run --image`` say of mistakes: one line, with all of the path in the image."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.command import DEADLINE, XIPVM, environment, guest, inside

MakeImage = Callable[..., Path]


@pytest.fixture
def folder(make_image: MakeImage) -> Path:
    """With ``fs.ext2``, and in it a guest, data and directories."""
    hello = guest("hello", "arm64").read_bytes()
    image = make_image({"/boot/hello.elf": hello, "/boot/sub/data": bytes(range(256)) * 64})
    (image.parent / "big").write_bytes(b"big" * (3 << 20))
    return image.parent


def complaint(*words: str, cwd: Path) -> str:
    """The one line that a command says which is refused."""
    done = inside(*words, cwd=cwd)
    assert (done.status, done.err.count("\n")) == (2, 1), done
    return done.err.removeprefix("xipvm: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cat /boot/sub", "/boot/sub: EISDIR (Is a directory)"),
        ("cat /", "/: EISDIR (Is a directory)"),
        ("cat /boot/hello.elf/x", "/boot/hello.elf/x: ENOTDIR (Not a directory)"),
        ("map /boot/sub", "/boot/sub: EISDIR (Is a directory)"),
        ("truncate /boot/sub 1", "/boot/sub: EISDIR (Is a directory)"),
        ("truncate /boot/sub/data 5T", "truncate of /boot/sub/data to 0x50000000000: EFBIG (File too large)"),
        ("put big /boot/hello.elf/x", "/boot/hello.elf/x: ENOTDIR (Not a directory)"),
        ("put big /no/x", "/no: ENOENT (No such file or directory)"),
        ("put --force big /boot/sub/data", "/boot/sub/data needs 2308 blocks, and "),
        ("rm /boot", "/boot: ENOTEMPTY (Directory not empty)"),
        ("ls /boot/no", "/boot/no: ENOENT (No such file or directory)"),
    ],
)
def test_the_whole_path_is_named(folder: Path, words: str, said: str) -> None:
    verb, *rest = words.split()
    options = [word for word in rest if word.startswith("--")]
    assert complaint("xip", verb, *options, "fs.ext2", *rest[len(options) :], cwd=folder).startswith(f"fs.ext2: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("/boot/sub",), "fs.ext2: /boot/sub: EISDIR (Is a directory)"),
        (("--map", "/boot/sub@0x60000000", "/boot/hello.elf"), "fs.ext2: /boot/sub: EISDIR (Is a directory)"),
        (("--map", "/boot/sub/data@0x60000000",), "there is nothing to run"),
    ],
)  # fmt: skip
def test_guests_and_maps_are_named_whole(folder: Path, words: tuple[str, ...], said: str) -> None:
    assert complaint("run", "--image", "fs.ext2", *words, cwd=folder).startswith(said)


@pytest.mark.parametrize("command", ["run", "storm"])
def test_there_is_one_image(folder: Path, command: str) -> None:
    said = complaint(command, "--image", "fs.ext2", "--image", "fs.ext2,snapshot=on", "/boot/hello.elf", cwd=folder)
    assert "--image" in said
    assert "there can be one only, and 2 are given" in said


@pytest.mark.parametrize("image", ["fs.ext2,readonly=on", "fs.ext2,readonly=on,snapshot=on"])
def test_a_file_of_an_image_that_is_only_read_cannot_be_shared(folder: Path, image: str) -> None:
    said = complaint(
        "run", "--image", image, "--map", "/boot/sub/data@0x60000000,shared=on", "/boot/hello.elf", cwd=folder
    )
    assert said.startswith("/boot/sub/data cannot have shared=on: fs.ext2 is not written with readonly=on; ")
    assert "snapshot=on" in said
    private = ("--map", "/boot/sub/data@0x60000000", "/boot/hello.elf")
    assert inside("run", "--quiet", "--image", image, *private, cwd=folder).status == 0


@pytest.mark.skipif(shutil.which("genromfs") is None, reason="needs genromfs: apt-get install genromfs")
def test_nor_can_one_of_a_romfs(folder: Path) -> None:
    tree = folder / "tree"
    subprocess.run(["genromfs", "-a", "4096", "-d", str(tree), "-f", "fs.romfs"], cwd=folder, check=True)
    options = ("--image", "fs.romfs", "--map", "/boot/sub/data@0x60000000,shared=on", "/boot/hello.elf")
    said = "/boot/sub/data cannot have shared=on: fs.romfs is romfs, which is never written; map it without"
    assert complaint("run", *options, cwd=folder) == said
    assert complaint("xip", "cat", "fs.romfs", "/", cwd=folder) == "fs.romfs: /: EISDIR (Is a directory)"
    for verb, *words in (
        ("truncate", "fs.romfs", "/boot/sub/data", "0"),
        ("rm", "fs.romfs", "/boot/sub/data"),
        ("mkdir", "fs.romfs", "/boot/new"),
        ("put", "fs.romfs", "big", "/boot/new"),
    ):
        path = next(word for word in words if word.startswith("/"))
        never = f"fs.romfs: {path}: romfs is never written: EROFS (Read-only file system)"
        assert complaint("xip", verb, *words, cwd=folder) == never


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_what_helps_where_an_image_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    opened = os.open

    def refusing(path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(error, os.strerror(error))
        return opened(path, flags)

    monkeypatch.setattr("xipvm.image_file.os.open", refusing)
    said = f"fs.ext2: {os.strerror(error)}; 'ls', 'cat' and 'map' only read it"
    assert complaint("xip", "put", "fs.ext2", "big", "/new", cwd=folder) == said


def test_what_helps_where_somebody_else_has_the_image(folder: Path) -> None:
    with (folder / "fs.ext2").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        said = "fs.ext2: in use by another run; it can be changed when that has ended"
        assert complaint("xip", "rm", "fs.ext2", "/boot/sub/data", cwd=folder) == said
        assert inside("xip", "ls", "fs.ext2", cwd=folder).status == 0
        shared = ("--map", "/boot/sub/data@0x60000000,shared=on", "/boot/hello.elf")
        assert "snapshot=on" in complaint("run", "--image", "fs.ext2", *shared, cwd=folder)


def test_a_source_that_cannot_be_read_is_named_and_leaves_nothing(folder: Path, fsck: Callable[[Path], str]) -> None:
    said = complaint("xip", "put", "fs.ext2", "/proc/self/mem", "/boot/new", cwd=folder)
    assert said == "/proc/self/mem: Input/output error"
    assert complaint("xip", "ls", "fs.ext2", "/boot/new", cwd=folder).endswith("ENOENT (No such file or directory)")
    assert fsck(folder / "fs.ext2") == ""


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_pipe_is_a_source_also_where_it_is_looked_at_twice(folder: Path, name: str) -> None:
    words = [*XIPVM, "xip", "put", "--force", "fs.ext2", name, "/boot/sub/data"]
    data = b"piped" * 5000
    subprocess.run(words, input=data, cwd=folder, env=environment(), check=True, capture_output=True, timeout=DEADLINE)
    assert inside("xip", "cat", "fs.ext2", "/boot/sub/data", cwd=folder).out.encode() == data


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/boot/sub/data", "/boot/sub/data exists; --force replaces it"),
        ("/no/x", "/no: ENOENT (No such file or directory)"),
        ("/boot/hello.elf/x", "/boot/hello.elf/x: ENOTDIR (Not a directory)"),
        ("/boot", "/boot is a directory, and standard input has no name to have in it"),
        ("", "the PATH in it is empty"),
    ],
)
def test_nobody_writes_to_a_pipe_for_nothing(folder: Path, path: str, said: str) -> None:
    """The complaint comes while the other end is open, and nothing was written to it."""
    words = [*XIPVM, "xip", "put", "fs.ext2", "-", path]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=folder, env=environment(), stdin=pipe, stderr=pipe) as child:
        assert child.wait(DEADLINE) == 2
        assert child.stderr is not None
        assert child.stderr.read().decode() == f"xipvm: fs.ext2: {said}\n"


def test_where_a_pipe_is_kept_is_named_when_it_is_full(
    folder: Path, fsck: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    monkeypatch.setattr("tempfile.tempdir", "/some/where")
    writer = threading.Thread(target=(folder / "pipe").write_bytes, args=(b"x",))
    writer.start()
    said = complaint("xip", "put", "fs.ext2", "pipe", "/new", cwd=folder)
    writer.join()
    kept = "pipe is kept in /some/where (TMPDIR) until it is whole, and does not fit"
    assert said == f"{kept}: No space left on device"
    assert fsck(folder / "fs.ext2") == ""


def test_the_state_of_an_image_is_told_once(folder: Path) -> None:
    subprocess.run(["debugfs", "-w", "-R", "ssv state 0", "fs.ext2"], cwd=folder, check=True, capture_output=True)
    words = [*XIPVM, "xip", "put", "fs.ext2", "-", "/new"]
    done = subprocess.run(words, input=b"x", cwd=folder, env=environment(), check=True, capture_output=True)
    assert done.stderr.decode().count("was not put away properly") == 1


def test_an_empty_path_is_one_of_no_file(folder: Path) -> None:
    assert complaint("xip", "put", "fs.ext2", "big", "", cwd=folder) == "fs.ext2: the PATH in it is empty"
