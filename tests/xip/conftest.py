"""Images for tests of XIP files, made by mke2fs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_MKE2FS = shutil.which("mke2fs", path=_PATH)
_E2FSCK = shutil.which("e2fsck", path=_PATH)

MakeImage = Callable[..., Path]


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """``make_image(files, size="8M", *options)``: an ext2 image with ``files``, a dict of contents by path."""
    if _MKE2FS is None or _E2FSCK is None:
        pytest.skip("needs mke2fs and e2fsck: apt-get install e2fsprogs")

    def make(files: dict[str, bytes] | None = None, size: str = "8M", *options: str) -> Path:
        tree = tmp_path / "tree"
        for path, data in (files or {}).items():
            target = tree / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        tree.mkdir(exist_ok=True)
        image = tmp_path / "fs.ext2"
        image.unlink(missing_ok=True)
        command = [str(_MKE2FS), "-q", "-t", "ext2", "-b", "4096", *options, "-d", str(tree), str(image), size]
        subprocess.run(command, check=True, capture_output=True)
        return image

    return make


@pytest.fixture
def fsck() -> Callable[[Path], str]:
    """``fsck(image)``: what ``e2fsck -fn`` complains about, empty for a clean image."""

    def check(image: Path) -> str:
        done = subprocess.run([str(_E2FSCK), "-fn", str(image)], capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stdout

    return check
