"""``xipvm xip map --trace``: who maps a file's pages at the end of a recorded run, and what cannot be said of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import Oracle
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import WRITE
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.trace.recorder import Recorder
from xipvm.xip.filemap import XipFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import open_volume

MakeImage = Callable[..., Path]

RW = PROT_READ | PROT_WRITE
HVA = 0x2000_0000_0000
GUEST = Path(__file__).parents[2] / "guests" / "bin" / "riscv64" / "hello-riscv64.elf"
DATA = bytes(range(256)) * 100
"""Seven pages."""


def xipvm(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xipvm", "xip", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def shown(image: Path, path: str, trace: Path) -> tuple[list[str], str]:
    """The lines of the table below its columns, with single spaces; and what is complained about."""
    done = xipvm("map", image, path, "--trace", trace)
    assert done.returncode == 0, done.stderr
    return [" ".join(line.split()) for line in done.stdout.splitlines()[1:]], done.stderr


class Run:
    """A recorded run: a process that maps files of an image, and a guest in it."""

    def __init__(self, image: Path, trace: Path, protocol: str = "modern") -> None:
        self.protocol = protocol
        self.host, self.trace, self.oracle = HostMemory(16 << 20), Trace(), Oracle()
        self.recorder = Recorder(trace)
        self.trace.attach(self.recorder)
        self.trace.attach(self.oracle)
        self.volume = open_volume(self.host, str(image))
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.mms = [self.mm]
        self.kvm = kvm_of(self.mm, self.trace, self.host, name="vm0")

    def file(self, path: str) -> XipFile:
        return self.volume.file(self.host, self.trace, self.volume.lookup(path), self.protocol)

    def map(self, path: str, flags: int = MAP_SHARED, prot: int = RW, *, pages: int = 7, addr: int = HVA) -> None:
        self.mm.mmap(pages * PAGE_SIZE, prot, flags, addr=addr, file=self.file(path))

    def read(self, pages: int, addr: int = HVA) -> None:
        for page in range(pages):
            self.mm.read(addr + page * PAGE_SIZE, 1)

    def guest(self, pages: int) -> ScriptedVcpu:
        self.kvm.set_memslot(0, 0, pages, HVA)
        vcpu = ScriptedVcpu(self.kvm.port(0), self.host, self.trace, 0)
        self.kvm.vcpus.append(vcpu)
        return vcpu

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.trace.detach(self.recorder)
        self.recorder.close()
        self.kvm.destroy()
        for mm in self.mms:
            mm.exit()
        self.volume.close()
        self.host.close()
        assert not self.oracle.violations


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "run.trace"


# ---- which file it is


def test_files_of_one_name_are_not_taken_for_each_other(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA, "/a/w": DATA})
    with Run(image, trace) as run:
        run.map("/a/w")
        run.read(7)
    (row,), said = shown(image, "/a/w", trace)
    assert row.startswith("0x0 7 0x")
    assert row.endswith(f"mm0 at {HVA:#x} r--")
    assert not said
    (row,), said = shown(image, "/w", trace)
    assert row.endswith(" ?")
    assert f"does not map /w (inode {inode(image, '/w')} of {image})" in said
    assert f"it does map 'w' (inode {inode(image, '/a/w')} of {image})" in said


def test_a_hard_link_is_the_same_file(make_image: MakeImage, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "one").write_bytes(DATA)
    (tmp_path / "tree" / "two").hardlink_to(tmp_path / "tree" / "one")
    image = make_image()
    with Run(image, trace) as run:
        run.map("/one")
        run.read(7)
    assert shown(image, "/two", trace) == shown(image, "/one", trace)
    assert f"mm0 at {HVA:#x} r--" in shown(image, "/two", trace)[0][0]


def test_an_image_is_the_file_wherever_one_stands(make_image: MakeImage, trace: Path, tmp_path: Path) -> None:
    image = make_image({"/w": DATA})
    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copy(image, tmp_path / "copy"))
    with Run(image, trace) as run:
        run.map("/w")
        run.read(7)
    near = xipvm("map", image.name, "/w", "--trace", trace, cwd=image.parent)
    assert f"mm0 at {HVA:#x}" in near.stdout
    assert shown(copy, "/w", trace)[0][0].endswith(" ?")
    moved = image.rename(tmp_path / "moved.ext2")
    assert f"mm0 at {HVA:#x}" in shown(moved, "/w", trace)[0][0]
    other = make_image({"/w": DATA})  # at the same path, with the same files
    (row,), said = shown(other, "/w", trace)
    assert row.endswith(" ?")
    assert "but another file that was that inode" in said


def test_a_file_that_is_put_anew_is_another(make_image: MakeImage, trace: Path, tmp_path: Path) -> None:
    image = make_image({"/w": DATA})
    (tmp_path / "source").write_bytes(DATA)
    with Run(image, trace) as run:
        run.map("/w")
        run.read(7)
    before = inode(image, "/w")
    assert xipvm("rm", image, "/w").returncode == 0
    assert xipvm("put", image, tmp_path / "source", "/w").returncode == 0
    assert inode(image, "/w") == before
    (row,), said = shown(image, "/w", trace)
    assert row.endswith(" ?")
    assert "but another file that was that inode" in said


def test_in_one_run_too(make_image: MakeImage, trace: Path) -> None:
    """The oracle would take holes of the second file for filled ones of the first."""
    image = make_image()
    with Run(image, trace) as run:
        run.volume.create("/w")
        OpenFile(run.file("/w")).put(DATA)
        first = run.file("/w").label
        run.volume.unlink("/w")
        run.volume.create("/w")
        run.file("/w").truncate(7 * PAGE_SIZE)
        assert run.file("/w").label != first
        run.map("/w", prot=PROT_READ)
        run.read(7)
    (row,), said = shown(image, "/w", trace)
    assert row == f"0x0 7 hole mm0 at {HVA:#x} r--"
    assert not said


def test_what_has_changed_since_is_not_nobodys(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    with Run(image, trace) as run:
        run.map("/w")
        run.read(7)
    assert xipvm("truncate", image, "/w", "4096").returncode == 0
    assert xipvm("truncate", image, "/w", "28K").returncode == 0
    rows, said = shown(image, "/w", trace)
    assert rows[0].endswith(f"mm0 at {HVA:#x} r--")
    assert rows[1:] == ["0x1 6 hole ?"]
    assert "page 0x1 of /w is block 0x" in said
    assert "so are 5 others" in said
    as_json = json.loads(xipvm("map", image, "/w", "--trace", trace, "--json").stdout)
    assert [row["mapped"] for row in as_json] == [[f"mm0 at {HVA:#x} r--"], None]


def test_a_trace_without_files_says_nothing_of_one(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    with Run(image, trace):
        pass
    (row,), said = shown(image, "/w", trace)
    assert row.endswith(" ?")
    assert said == f"xipvm: {trace}: does not map /w (inode {inode(image, '/w')} of {image})\n"


def test_a_trace_that_does_not_say_which_files_it_maps(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    said, recorder = Trace(), Recorder(trace)
    said.attach(recorder)
    said.emit("xip_map", file="w", mm="mm0", start=HVA, end=HVA + 7 * PAGE_SIZE, pgoff=0)
    recorder.close()
    (row,), complaint = shown(image, "/w", trace)
    assert row.endswith(" ?")
    assert "does not say which files it maps" in complaint


# ---- what an entry shows


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_a_private_copy_is_no_page_of_the_file(make_image: MakeImage, trace: Path, protocol: str) -> None:
    image = make_image({"/w": DATA})
    with Run(image, trace, protocol) as run:
        run.map("/w", MAP_PRIVATE)
        run.read(5)
        run.mm.write(HVA + 2 * PAGE_SIZE, b"own")  # has a page of the file: a copy on write
        run.mm.write(HVA + 5 * PAGE_SIZE, b"own")  # has none
    rows, said = shown(image, "/w", trace)
    assert [row.split()[0] for row in rows] == ["0x0", "0x2", "0x3", "0x5"]
    assert [" ".join(row.split()[3:]) for row in rows] == [
        f"mm0 at {HVA:#x} r--",
        "",
        f"mm0 at {HVA + 3 * PAGE_SIZE:#x} r--",
        "",
    ]
    assert not said


def test_nor_does_a_guest_map_what_it_has_copied(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    with Run(image, trace) as run:
        run.map("/w", MAP_PRIVATE)
        vcpu = run.guest(7)
        for page in range(7):
            vcpu.load(page)
        vcpu.store(2, b"own")
    rows, said = shown(image, "/w", trace)
    assert [" ".join(row.split()[3:]) for row in rows] == [
        f"mm0 at {HVA:#x} r--, vm0 at 0x0 rx",
        "",
        f"mm0 at {HVA + 3 * PAGE_SIZE:#x} r--, vm0 at 0x3000 rx",
    ]
    assert not said


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_a_hole_is_mapped_with_the_rights_of_its_entries(make_image: MakeImage, trace: Path, protocol: str) -> None:
    image = make_image({"/w": b""})
    with Run(image, trace, protocol) as run:
        run.file("/w").truncate(4 * PAGE_SIZE)
        run.map("/w", MAP_PRIVATE, pages=4)
        run.read(3)
        run.mm.mprotect(HVA + PAGE_SIZE, PAGE_SIZE, PROT_NONE)
        run.mm.write(HVA + 2 * PAGE_SIZE, b"own")
    rows, said = shown(image, "/w", trace)
    assert rows == [
        f"0x0 1 hole mm0 at {HVA:#x} r--",
        f"0x1 1 hole mm0 at {HVA + PAGE_SIZE:#x} ---",
        "0x2 2 hole",
    ]
    assert not said


def test_rights_are_those_of_the_end(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    with Run(image, trace) as run:
        run.map("/w")
        run.mm.write(HVA, bytes(7 * PAGE_SIZE))
        run.file("/w").fsync(0, 2)
        child = run.mm.fork("child")
        run.mms.append(child)
        child.read(HVA + 6 * PAGE_SIZE, 1)
        assert child.pgd.pte((HVA >> PAGE_SHIFT) + 6) & WRITE
        run.mm.munmap(HVA + 4 * PAGE_SIZE, 3 * PAGE_SIZE)
        child.munmap(HVA, 6 * PAGE_SIZE)
    rows, _ = shown(image, "/w", trace)
    assert [row.split(" ", 3)[0] for row in rows] == ["0x0", "0x2", "0x4", "0x6"]
    assert [row.split()[3:] for row in rows] == [
        f"mm0 at {HVA:#x} r--".split(),
        f"mm0 at {HVA + 2 * PAGE_SIZE:#x} rw-".split(),
        [],
        f"child at {HVA + 6 * PAGE_SIZE:#x} rw-".split(),
    ]


def test_huge_entries_are_told_from_small_ones(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": b""}, "16M")
    elsewhere = 0x3000_0000_0000
    with Run(image, trace) as run:
        run.file("/w").truncate(HUGE_PAGES * PAGE_SIZE)
        run.map("/w", prot=PROT_READ, pages=HUGE_PAGES)
        run.read(1)
        vcpu = run.guest(HUGE_PAGES)
        vcpu.load(3)
        run.map("/w", MAP_PRIVATE, pages=2, addr=elsewhere + PAGE_SIZE)  # the file's page 0 is not at 2 MiB there
    rows, said = shown(image, "/w", trace)
    assert len(rows) == 1
    assert rows[0].startswith(f"0x0 512 hole mm0 at {HVA:#x} r-- 2 MiB, vm0 at 0x0 r")
    assert rows[0].count("2 MiB") == 1 + rows[0].count("x 2 MiB")
    assert not said
    every = json.loads(xipvm("map", image, "/w", "--trace", trace, "--json").stdout)
    assert len(every) == HUGE_PAGES
    assert every[7]["mapped"][0] == f"mm0 at {HVA + 7 * PAGE_SIZE:#x} r-- 2 MiB"


def test_a_guest_out_of_an_image_in_few_rows(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/hello.elf": GUEST.read_bytes(), "/boot/hello.elf": GUEST.read_bytes()})
    command = [sys.executable, "-m", "xipvm", "run", "--quiet", "--image", str(image), "--trace", str(trace)]
    subprocess.run([*command, "/hello.elf"], check=True, capture_output=True, timeout=60)
    rows, said = shown(image, "/hello.elf", trace)
    assert any(" mm0 at 0x" in row and ", vm0 at 0x" in row and int(row.split()[1]) > 1 for row in rows)
    assert not said
    assert "does not map /boot/hello.elf" in shown(image, "/boot/hello.elf", trace)[1]


def test_a_guest_that_has_tlbs_and_no_entries(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/hello.elf": GUEST.read_bytes()})
    command = [sys.executable, "-m", "xipvm", "run", "--quiet", "--secondary", "gru", "--image", str(image)]
    subprocess.run([*command, "--trace", str(trace), "/hello.elf"], check=True, capture_output=True, timeout=60)
    rows, _ = shown(image, "/hello.elf", trace)
    assert any(" mm0 at 0x" in row and ", gru-mm0 chiplet 0 at 0x" in row for row in rows)


def test_a_very_long_hole_takes_no_time(make_image: MakeImage, trace: Path) -> None:
    image = make_image({"/w": DATA})
    assert xipvm("truncate", image, "/w", "1T").returncode == 0
    with Run(image, trace) as run:
        run.map("/w", pages=9)
        run.read(9)
    rows, said = shown(image, "/w", trace)
    assert [row.split(" ", 3)[:2] for row in rows] == [["0x0", "7"], ["0x7", "2"], ["0x9", str((1 << 28) - 9)]]
    assert rows[1] == f"0x7 2 hole mm0 at {HVA + 7 * PAGE_SIZE:#x} r--"
    assert not said


def inode(image: Path, path: str) -> int:
    """The number of a file."""
    host = HostMemory(1 << 20)
    with open_volume(host, os.fspath(image), read_only=True) as volume:
        identity = volume.lookup(path).identity
        assert identity is not None
        number = identity.inode
    host.close()
    return number
