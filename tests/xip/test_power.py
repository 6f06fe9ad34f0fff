"""The process that uses an ext2 image dies in the middle: e2fsck finds lost blocks and wrong counts, nothing else."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MakeImage = Callable[..., Path]

#: What e2fsck may say of an image that was not put away: blocks and inodes that are marked, and nobody's; counts.
LOSSES = re.compile(
    r"""
      e2fsck\ .* | Pass\ \d.* | .*was\ not\ cleanly\ unmounted.* | .*\ check\ forced.*
    | Block\ bitmap\ differences:\s+(-(\d+|\(\d+--\d+\))\s*)+ | Inode\ bitmap\ differences:\s+(-(\d+|\(\d+--\d+\))\s*)+
    | Free\ (blocks|inodes)\ count\ wrong.* | Directories\ count\ wrong.* | Fix\?\ no | \s*
    | Inode\ \d+,\ i_blocks\ is\ \d+,\ should\ be\ \d+\..* | Unattached\ (zero-length\ )?inode\ \d+.*
    | (Deleted\ inode|Inode)\ \d+\ (was\ part\ of|has\ zero\ dtime).*
    | Inode\ \d+\ ref\ count\ is\ \d+,\ should\ be\ \d+.*
    | Inode\ \d+,\ i_size\ is\ \d+,\ should\ be\ \d+\..*  # as in Linux: the size is written first
    | Connect\ to\ /lost\+found\?\ no | Unconnected\ directory\ inode\ .*
    | '\.\.'\ in\ .*\(\d+\)\ is\ .*  # of a directory that nobody has named yet
    | .*\*+\ WARNING.* | .*:\ \d+/\d+\ files.*
    """,
    re.VERBOSE,
)

_WORKER = """
import random, sys
from xipvm.mmu.frames import HostMemory
from xipvm.trace.funnel import Trace
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import open_volume
import os, signal
from xipvm.xip.ext2.volume import Ext2Image

image, seed, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stores = 0

def counted(method):
    def store(self, at, value):
        global stores
        stores += 1
        if stores == last:
            os.kill(os.getpid(), signal.SIGKILL)
        method(self, at, value)
    return store

Ext2Image._put16 = counted(Ext2Image._put16)
Ext2Image._put32 = counted(Ext2Image._put32)
host, trace, choose = HostMemory(1 << 20), Trace(), random.Random(seed)
with open_volume(host, image) as volume:
    for number in range(6):
        name = f"/file{number}"
        file = OpenFile(volume.file(host, trace, volume.create(name)))
        for _ in range(4):
            file.lseek(choose.choice((0, 40000, 60000, 5000000)))
            file.put(choose.randbytes(choose.choice((10, 9000))))
        if number % 3 == 1:
            file.file.truncate(choose.choice((0, 50000)))
        if number % 3 == 2:
            volume.unlink(name)
        if number == 4:
            volume.mkdir("/dir")
            volume.unlink("/dir")
"""


@pytest.mark.slow
def test_a_kill_at_any_store_loses_no_more_than_ext2_may(make_image: MakeImage) -> None:
    image = make_image({"/kept": b"kept" * 5000})
    good = image.read_bytes()
    choose = random.Random(5)
    cut = 0
    for last in sorted(choose.sample(range(1, 430), 16)):
        image.write_bytes(good)
        words = [sys.executable, "-c", _WORKER, str(image), "3", str(last)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        cut += done.returncode != 0
        path = "/usr/sbin:/sbin:" + os.environ["PATH"]
        checked = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, env={"PATH": path})
        wrong = [line for line in checked.stdout.splitlines() if not LOSSES.fullmatch(line)]
        assert wrong == [], f"killed at store {last}"
        repaired = subprocess.run(["e2fsck", "-fy", str(image)], capture_output=True, text=True, env={"PATH": path})
        assert repaired.returncode in (0, 1), repaired.stdout
        shown = subprocess.run(
            [sys.executable, "-m", "xipvm", "xip", "cat", str(image), "/kept"], capture_output=True, timeout=60
        )
        assert shown.stdout == b"kept" * 5000
    assert cut == 16
