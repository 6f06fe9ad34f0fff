"""romfs images made by genromfs: read, executed in place where files begin on pages, and refused where damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.errors import MmError, XipImageError
from xipvm.mmu.frames import HostMemory
from xipvm.trace.funnel import Trace
from xipvm.xip.romfs import RomfsVolume

_GENROMFS = shutil.which("genromfs", path="/usr/bin:/usr/sbin:/bin:/sbin")
GUESTS = Path(__file__).parents[2] / "guests" / "bin"

MakeImage = Callable[..., Path]


@pytest.fixture
def make_romfs(tmp_path: Path) -> MakeImage:
    """``make_romfs(*options)``: an image with a guest, some data, a directory and links."""
    if _GENROMFS is None:
        pytest.skip("needs genromfs: apt-get install genromfs")
    tree = tmp_path / "tree"
    (tree / "boot").mkdir(parents=True)
    shutil.copy(GUESTS / "arm64" / "hello-arm64.elf", tree / "boot" / "hello.elf")
    (tree / "data").write_bytes(bytes(range(256)) * 100)
    (tree / "link").symlink_to("boot/hello.elf")
    (tree / "around").symlink_to("around")

    def make(*options: str) -> Path:
        image = tmp_path / "fs.romfs"
        subprocess.run([str(_GENROMFS), *options, "-f", str(image), "-d", str(tree)], check=True)
        return image

    return make


def xipvm(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "xipvm", *map(str, words)], capture_output=True, timeout=60)


def test_a_guest_runs_in_place_and_the_trace_says_who_maps_what(make_romfs: MakeImage, tmp_path: Path) -> None:
    image, trace = make_romfs("-a", "4096"), tmp_path / "run.trace"
    done = xipvm("run", "--image", image, "--check", "--trace", trace, "--map", "/data@0x60000000", "/link")
    assert done.returncode == 0, done.stderr
    assert b"Hello from NOR flash" in done.stdout
    shown = json.loads(xipvm("xip", "map", image, "/boot/hello.elf", "--trace", trace, "--json").stdout)
    assert all(run["block"] is not None for run in shown)


def test_files_are_read_wherever_they_begin(make_romfs: MakeImage) -> None:
    image = make_romfs()
    assert xipvm("xip", "cat", image, "/data").stdout == bytes(range(256)) * 100
    names = {entry["name"] for entry in json.loads(xipvm("xip", "ls", image, "--json").stdout)}
    assert names == {"boot", "data", "link -> boot/hello.elf", "around -> around"}
    refused = xipvm("run", "--image", image, "/boot/hello.elf")
    assert refused.returncode == 2
    assert b"genromfs -a 4096" in refused.stderr


@pytest.mark.parametrize("words", [("put", "-", "/new"), ("rm", "/data"), ("mkdir", "/d"), ("truncate", "/data", "1")])
def test_nothing_can_be_changed(make_romfs: MakeImage, words: tuple[str, ...]) -> None:
    image = make_romfs("-a", "4096")
    before = image.read_bytes()
    done = xipvm("xip", words[0], image, *words[1:])
    assert done.returncode == 2
    assert image.read_bytes() == before


@pytest.mark.slow
def test_damaged_images_give_proper_errors(make_romfs: MakeImage, tmp_path: Path) -> None:
    good = make_romfs().read_bytes()
    path = tmp_path / "bad.romfs"
    refused = wrong = 0
    for seed in range(600):
        choose = random.Random(seed)
        image = bytearray(good)
        for _ in range(choose.choice((1, 3))):
            at = choose.randrange(16, 512) & ~3
            image[at : at + 4] = choose.choice((choose.randbytes(4), choose.randrange(len(good)).to_bytes(4, "big")))
        if seed % 10:  # the checksum is right all the same
            image[12:16] = bytes(4)
            total = sum(int.from_bytes(image[n : n + 4], "big") for n in range(0, 512, 4))
            image[12:16] = (-total & 0xFFFF_FFFF).to_bytes(4, "big")
        path.write_bytes(image)
        host = HostMemory(64 << 10)
        try:
            volume = RomfsVolume(host, str(path))
        except XipImageError:
            refused += 1
            host.close()
            continue
        try:
            for name, member in list(volume.names(volume.lookup("/"))):
                volume.status(member)
                if volume.status(volume.lookup(f"/{name}", follow=False)).letter == "-":
                    list(volume.read_whole(host, Trace(), member))
        except MmError:
            wrong += 1
        volume.close()
        host.close()
    assert refused > 30
    assert wrong > 40
