"""Damaged ext2 images: whatever is wrong in one, there is an error of one kind, soon, and no harm to the process.

    python -m tests.xip.fuzz_images --count 100000

Each image is a good one, small and with everything in it (directories, links, a file with all depths of indirect
blocks), in which some bytes of the metadata were changed: at random, to interesting numbers, or to other block numbers
of the image; or it is cut. Then everything is listed, read, written, cut and removed.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import struct
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from xipvm.errors import MmError, XipImageError
from xipvm.mmu.frames import HostMemory
from xipvm.trace.funnel import Trace
from xipvm.xip.inode import XipInode
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import Volume, open_volume

ALLOWED = {
    errno.EUCLEAN, errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENOSPC,
    errno.EFBIG, errno.EEXIST, errno.ENOTEMPTY, errno.EMLINK, errno.ENODATA, errno.EROFS,
}  # fmt: skip
"""What may be said of a bad image."""
_INTERESTING = (0, 1, 2, 3, 5, 11, 12, 127, 255, 1 << 12, 1 << 15, (1 << 16) - 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 1)
_MOST_READ = 64 << 10
_MOST_NAMES = 2000
BLOCKS = 96


def make_good(path: Path) -> bytes:
    """The image that all others are made of."""
    tree = path.parent / "tree"
    (tree / "dir" / "below").mkdir(parents=True)
    (tree / "dir" / "below" / "file").write_bytes(b"deep down" * 1000)
    (tree / "plain").write_bytes(b"plain" * 3000)
    with (tree / "sparse").open("wb") as file:
        for page in (0, 11, 12, 1035, 1036, 12 + 1024 + 1024 * 1024):
            file.seek(page << 12)
            file.write(b"block")
    (tree / "link").symlink_to("dir/below/file")
    (tree / "around").symlink_to("around")
    command = ["mke2fs", "-q", "-t", "ext2", "-b", "4096", "-N", "64", "-d", str(tree), str(path), f"{BLOCKS * 4}K"]
    subprocess.run(command, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    return path.read_bytes()


def used_blocks(good: bytes) -> list[int]:
    """Blocks of the good image that are not all zeros: there the metadata is, among others."""
    return [n for n in range(len(good) // 4096) if any(good[n * 4096 : n * 4096 + 4096])]


def damage(good: bytes, used: list[int], seed: int) -> bytes:
    """The image of a seed."""
    choose = random.Random(seed)
    image = bytearray(good)
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        kind = choose.randrange(8)
        if kind == 0:
            at = choose.randrange(1024, 1024 + 264)  # the superblock
        elif kind == 1:
            at = 4096 + choose.randrange(32)  # the group descriptor
        else:
            at = choose.choice(used) * 4096 + choose.randrange(4096 if choose.random() < 0.3 else 256)
        size = choose.choice((1, 2, 4, 4))
        at -= at % size
        number = choose.choice((choose.choice(_INTERESTING), choose.choice(used), choose.getrandbits(32)))
        image[at : at + size] = struct.pack("<I", number)[:size]
    if choose.random() < 0.03:
        del image[choose.randrange(len(image)) :]
    return bytes(image)


def exercise(path: Path) -> Counter[str]:
    """Does everything to an image; what was said, counted. Raises whatever is not a proper error."""
    said: Counter[str] = Counter()
    host = HostMemory(64 << 10)
    try:
        volume = open_volume(host, str(path))
    except XipImageError as error:
        said["refused" if str(error).isprintable() else "unprintable"] += 1
        host.close()
        return said
    try:
        _all(host, volume, said)
    finally:
        volume.close()
        host.close()
    return said


def _all(host: HostMemory, volume: Volume, said: Counter[str]) -> None:
    trace = Trace()
    seen: set[int] = set()
    todo = ["/"]
    files: list[str] = []
    names = 0
    while todo and names < _MOST_NAMES:
        directory = todo.pop()
        try:
            inode = volume.lookup(directory)
            if id(inode) in seen:
                continue
            seen.add(id(inode))
            for name, member in volume.names(inode):
                names += 1
                path = f"{directory.rstrip('/')}/{name}"
                (todo if volume.status(member).letter == "d" else files).append(path)
                if names > _MOST_NAMES:
                    break
        except MmError as error:
            _note(error, said)
    for path in ["/link", "/around", "/dir/below/file", *files[:20]]:
        _try(lambda path=path: _use(host, trace, volume, volume.lookup(path)), said)
    _try(lambda: volume.mkdir("/made"), said)
    _try(lambda: OpenFile(volume.file(host, trace, volume.create("/made/new"))).put(bytes(9000)), said)
    for path in ["/made/new", "/made", *files[:20]]:
        _try(lambda path=path: volume.unlink(path), said)


def _use(host: HostMemory, trace: Trace, volume: Volume, inode: XipInode) -> None:
    for _ in zip(volume.extents(inode), range(1000), strict=False):
        pass
    file = OpenFile(volume.file(host, trace, inode))
    file.get(min(file.file.size, _MOST_READ))
    file.lseek(40000)
    file.put(b"written")
    file.file.truncate(5000)
    file.file.truncate(0)


def _try(call: object, said: Counter[str]) -> None:
    assert callable(call)
    try:
        call()
        said["done"] += 1
    except MmError as error:
        _note(error, said)


def _note(error: MmError, said: Counter[str]) -> None:
    if error.errno not in ALLOWED:
        raise error
    said[errno.errorcode[error.errno]] += 1


def main() -> None:
    """Runs so many images, and says what was said of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    said: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        path = Path(directory) / "image"
        good = make_good(path)
        used = used_blocks(good)
        for seed in range(options.first, options.first + options.count):
            path.write_bytes(damage(good, used, seed))
            began = time.perf_counter()
            try:
                said += exercise(path)
            except BaseException:
                print(f"seed {seed}:")
                raise
            slowest = max(slowest, time.perf_counter() - began)
    print(f"{options.count} images, the slowest {slowest * 1000:.0f} ms: {dict(said.most_common())}")


if __name__ == "__main__":
    main()
