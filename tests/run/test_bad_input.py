"""Whatever is wrong with what the user hands in: one line, status 2, and nothing has changed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.loader.conftest import R, W, X, write_elf
from tests.run.command import ISAS, Outcome, guest, inside, xipvm
from xipvm import boards

ARM, RISCV = (boards.get(f"virt-{isa}") for isa in ISAS)
HELLO, HELLO_RISCV = (guest("hello", isa) for isa in ISAS)
ENDLESS = struct.pack("<I", 0x1400_0000)
"""b ."""
RAM = ARM.ram_base
MIB = 1 << 20


def refused(directory: Path, *argv: object) -> str:
    """The one line that ``xipvm argv`` says, run in ``directory``; nothing may have changed there."""
    before = files(directory)
    outcome = inside(*argv, cwd=directory)
    one_line(outcome)
    assert outcome.out == ""
    assert files(directory) == before, "something was created or changed"
    return outcome.err.removeprefix("xipvm: ").rstrip("\n")


def one_line(outcome: Outcome) -> None:
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("xipvm: "), outcome
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome


def files(directory: Path) -> dict[str, bytes | int]:
    """What is in a directory: sizes, and the bytes of what is small."""
    return {
        str(path): path.read_bytes() if path.stat().st_size < MIB else path.stat().st_size
        for path in directory.rglob("*")
        if path.is_file()
    }


def text(*parts: dict[str, object], **header: int) -> bytes:
    """An ELF with these segments."""
    return write_elf(*parts, **header)  # type: ignore[arg-type]


def code(paddr: int, size: int = 4, **more: object) -> dict[str, object]:
    return {"paddr": paddr, "data": ENDLESS + bytes(size - 4), **more}


GUESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"#!/bin/sh\nexit 0\n", "is not an ELF file"),
    "magic": (lambda: b"\x7fELF", "is cut short"),
    "header": (lambda: HELLO.read_bytes()[:63], "is cut short"),
    "table": (lambda: HELLO.read_bytes()[:100], "is cut short"),
    "segments": (lambda: HELLO.read_bytes()[:400], "is cut short"),
    "x86-64": (lambda: text(code(0), machine=62), "is for x86-64, which no board runs"),
    "32-bit": (lambda: text(code(0), machine=40, bits=32), "is for 32-bit ARM, which no board runs"),
    "object": (lambda: text(code(0), type=1), "is an unlinked object file"),
    "core": (lambda: text(code(0), type=4), "is a core dump"),
    "overlap": (lambda: text(code(0, 64), code(0x20, 64)), "segments 0 and 1 overlap at "),
    "overlap-ram": (
        lambda: text(code(0), code(RAM, 64, vaddr=RAM, flags=R | W), code(RAM + 32, 64, vaddr=RAM + 0x1000)),
        "segments 1 and 2 overlap at physical address",
    ),
    "nowhere": (lambda: text(code(0x3000_0000)), "lies in no memory of virt-arm64"),
    "device": (lambda: text(code(0), code(0x0900_0000)), "lies in no memory of virt-arm64"),
    "end-of-space": (lambda: text(code(2**64 - 4, 8)), "reaches beyond the address space"),
    "behind-ram": (
        lambda: text(code(RAM + ARM.default_memory - 4096, 8192)),
        "reaches beyond the 128 MiB of RAM at 0x40000000",
    ),
    "behind-flash": (lambda: text(code(ARM.flash[0].end - 4, 8)), "reaches beyond the end of flash bank flash0"),
    "bss-in-flash": (
        lambda: text(code(0, memsz=4096, flags=R | W | X)),
        "zero-initialised data in flash bank flash0, which cannot be written",
    ),
    "file-beyond-memory": (lambda: text(code(0, 8, memsz=4)), "is larger in the file (0x8) than in memory (0x4)"),
    "entry-nowhere": (lambda: text(code(0), entry=0x3000_0000), "starts at 0x30000000, which is in none of its"),
    "entry-in-data": (
        lambda: text(code(0), code(RAM, flags=R | W), entry=RAM),
        "starts at 0x40000000, which is in none of its",
    ),
    "entry-in-device": (lambda: text(code(0), entry=0x0900_0000), "starts at 0x9000000, which is in none of its"),
    "nothing": (lambda: text({"paddr": 0, "memsz": 0}), "has no loadable segment"),
    "bss-only": (lambda: text({"paddr": 0, "vaddr": RAM, "memsz": 4096, "flags": R | W}), "has nothing to load"),
    "dynamic": (lambda: text(code(0), {"paddr": 0, "data": b"/ld.so\0", "type": 3}), "is dynamically linked"),
}


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_that_cannot_be_run(name: str, tmp_path: Path) -> None:
    make, line = GUESTS[name]
    (tmp_path / "guest.elf").write_bytes(make())
    assert refused(tmp_path, "run", "guest.elf", "--trace", "t").startswith("guest.elf: ")
    assert line in refused(tmp_path, "inspect", "guest.elf")


@pytest.mark.parametrize("argv", [("run", "text"), ("run", HELLO, "--flash", "text"), ("trace", "show", "text")])
def test_a_process_that_was_told_nonsense(argv: tuple[object, ...], tmp_path: Path) -> None:
    """The other tests call the command line in their own process."""
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n")
    outcome = xipvm(*argv, cwd=tmp_path)
    one_line(outcome)
    assert outcome == inside(*argv, cwd=tmp_path)


def test_a_guest_for_another_board(tmp_path: Path) -> None:
    assert "is for AArch64; virt-riscv64 runs RISC-V" in refused(tmp_path, "run", HELLO, "--board", "virt-riscv64")
    assert "is for RISC-V; virt-arm64 runs AArch64" in refused(tmp_path, "run", HELLO_RISCV, "--board", "virt-arm64")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("run", "missing.elf"), "missing.elf: No such file or directory"),
        (("run", "."), ".: Is a directory"),
        (("run", "/dev/zero"), "/dev/zero: is not a regular file"),
        (("run", "/proc/self/mem"), "/proc/self/mem: Input/output error"),
        (("run", "x" * 300), "File name too long"),
        (("run", HELLO, "more"), "unexpected extra argument"),
        (("run", HELLO, "--board", "toaster"), "no board is called 'toaster'; known are virt-arm64, virt-riscv64"),
        (("run", HELLO, "--bord", "virt-arm64"), "No such option '--bord'"),
        (("run", HELLO, "--board"), "Option '--board' requires an argument"),
        (("run", HELLO, "--secondary", "npt"), "no secondary MMU is called 'npt'; known are kvm, kvm-shadow, gru"),
        (("run", HELLO, "--clock", "sun"), "'sun' is not one of 'instructions', 'host'"),
        (("run", HELLO, "--memory", "64T"), "virt-arm64 takes up to 64 GiB of RAM in units of 4 KiB, not 64 TiB"),
        (("run", HELLO, "--memory", "16777216T"), "virt-arm64 takes up to 64 GiB of RAM"),
        (("run", HELLO, "--memory", "0"), "RAM in units of 4 KiB, not 0 B"),
        (("run", HELLO, "--memory", "1"), "RAM in units of 4 KiB, not 1 B"),
        (("run", HELLO, "--memory", "4097"), "RAM in units of 4 KiB, not 4097 B"),
        (("run", HELLO, "--ram-alias", "47fff000"), "RAM cannot appear at 0x47fff000: ram is at 0x40000000"),
        (("run", HELLO, "--ram-alias", "1001"), "an alias begins on a page"),
        (("run", HELLO, "--ram-alias", "7ff8001000"), "an alias begins on a page and ends below 0x8000000000"),
        (("run", HELLO, "--memory", "-1"), "'-1' is not a size; write it as 4096, 64K, 128M or 1G"),
        (("run", HELLO, "--memory", "abc"), "'abc' is not a size"),
        (("run", HELLO, "--memory", ""), "'' is not a size"),
        (("run", HELLO, "--memory", "1.5G"), "'1.5G' is not a size"),
        (("run", HELLO, "--memory", "4K"), "lies in no memory of virt-arm64"),
        (("run", HELLO, "--smp", "0"), "virt-arm64 has 1 to 8 CPUs, not 0"),
        (("run", HELLO, "--smp", "99"), "virt-arm64 has 1 to 8 CPUs, not 99"),
        (("run", HELLO, "--smp", "-1"), "virt-arm64 has 1 to 8 CPUs, not -1"),
        (("run", HELLO, "--smp", "two"), "'two' is not a valid integer"),
        (("run", HELLO, "--smp", "9" * 30), "virt-arm64 has 1 to 8 CPUs, not 999"),
        (("run", HELLO, "--timeout", "soon"), "'soon' is no positive number of seconds"),
        (("run", HELLO, "--timeout", "0"), "'0' is no positive number of seconds"),
        (("run", HELLO, "--timeout", "-0.5"), "'-0.5' is no positive number of seconds"),
        (("run", HELLO, "--timeout", "nan"), "'nan' is no positive number of seconds"),
        (("run", HELLO, "--timeout", ""), "'' is no positive number of seconds"),
        (("run", HELLO, "--max-instructions", "0"), "0 is not in the range x>=1"),
        (("run", HELLO, "--max-instructions", "many"), "'many' is not a valid integer"),
        (("run", HELLO, "--max-instructions", "5", "--clock", "host"), "an instruction limit needs the instructions"),
        (("run", HELLO, "--input", "missing"), "missing: No such file or directory"),
        (("run", HELLO, "--input", "."), ".: Is a directory"),
        (("run", HELLO, "--input", "/proc/self/mem"), "/proc/self/mem: Input/output error"),
        (("run", HELLO, "--until", ""), "--until needs a text to wait for"),
        (("run", HELLO, "--dtb", "missing"), "missing: No such file or directory"),
        (("run", HELLO, "--dtb", "."), ".: Is a directory"),
        (("run", HELLO, "--dtb", HELLO), "is not a device tree (DTB)"),
        (("run", HELLO, "--dtb", "/dev/null"), "/dev/null: is not a device tree (DTB)"),
        (("run", HELLO, "--trace", "."), ".: Is a directory"),
        (("run", HELLO, "--trace", "missing/t"), "missing/t: No such file or directory"),
        (("run", HELLO, "--trace", ""), "No such file or directory"),
        (("run", HELLO, "--flash", ""), "no file is named"),
        (("run", HELLO, "--flash", "missing"), "missing: No such file or directory"),
        (("run", HELLO, "--flash", "."), ".: Is a directory"),
        (("run", HELLO, "--flash", "/dev/zero"), "/dev/zero: is no"),
        (("run", HELLO, "--flash", "missing,bank=2"), "bank=2: the board has 2 banks of 64 MiB"),
        (("run", HELLO, "--flash", "x,bank=one"), "'bank=one' is no setting of a flash image"),
        (("run", HELLO, "--flash", "x,snapshot"), "'snapshot' is no setting of a flash image"),
        (("run", HELLO, "--flash", "x,cache=none"), "'cache=none' is no setting of a flash image"),
        (("run",), "there is nothing to run"),
        (("run", "--flash", "x"), "without a GUEST the board has to be named"),
        (("run", "--board", "virt-arm64"), "there is nothing to run"),
        (("run", "--board", "virt-arm64", "--flash", "missing"), "missing: No such file or directory"),
        (("trace", "show", "missing"), "missing: No such file or directory"),
        (("trace", "show", "."), "Is a directory"),
        (("trace", "show", "/dev/null"), "/dev/null: not an xipvm trace"),
        (("trace", "show", HELLO), "not an xipvm trace"),
        (("flash", "create", "missing/x", "--board", "virt-arm64"), "No such file or directory"),
        (("flash", "create", ".", "--board", "virt-arm64"), ".: Is a directory"),
        (("flash", "create", "x", "--board", "toaster"), "no board is called 'toaster'"),
        (("flash", "pad", "missing", "--board", "virt-arm64"), "missing: No such file or directory"),
    ],
    ids=lambda value: " ".join(str(word)[-20:] for word in value) if isinstance(value, tuple) else "",
)
def test_one_line_and_nothing_else(argv: tuple[object, ...], line: str, tmp_path: Path) -> None:
    said = refused(tmp_path, *argv)
    assert line in said
    assert len(said) < 400


@pytest.mark.parametrize("length", [0, 1, 4096, 64 * MIB - 1, 64 * MIB + 1, 128 * MIB - 1])
def test_a_flash_file_of_the_wrong_size(length: int, tmp_path: Path) -> None:
    image = tmp_path / "my flash.img"
    with image.open("wb") as file:
        file.truncate(length)
    said = refused(tmp_path, "run", HELLO, "--flash", "my flash.img", "--trace", "t")
    assert said.startswith(f"my flash.img: has {length} bytes; bank 0 of virt-arm64 has {64 * MIB}")
    assert said.endswith(": xipvm flash pad 'my flash.img' --board virt-arm64")
    said = refused(tmp_path, "run", HELLO, "--flash", "my flash.img,bank=1")
    if length < 64 * MIB:
        assert said.endswith(": xipvm flash pad 'my flash.img' --board virt-arm64 --bank 1")
    else:
        assert "too many: bank 1 has 64 MiB" in said


def test_a_flash_file_that_is_too_long(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(128 * MIB + 1)
    assert "too many: the board has 2 banks of 64 MiB" in refused(tmp_path, "run", HELLO, "--flash", "f")


def test_what_the_message_says_helps(tmp_path: Path) -> None:
    """The command that it names is one that makes the file fit."""
    (tmp_path / "my flash.img").write_bytes(b"")
    said = refused(tmp_path, "run", HELLO_RISCV, "--flash", "my flash.img,bank=1")
    command = said.rpartition(": xipvm ")[2].replace("'my flash.img'", "my_flash.img").split()
    padded = xipvm(*[word.replace("my_flash", "my flash") for word in command], cwd=tmp_path)
    assert padded.status == 0
    assert xipvm("run", HELLO_RISCV, "--flash", "my flash.img,bank=1", cwd=tmp_path).status == 0
    (tmp_path / "my flash.img").unlink()


def test_two_files_for_one_bank(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 * MIB)
    options = ("--flash", "a,readonly=on", "--flash", "b,readonly=on")
    assert "bank 0 has an image already; say bank=N" in refused(tmp_path, "run", HELLO, *options)


@pytest.fixture
def trace(tmp_path: Path) -> bytes:
    """The bytes of a good trace."""
    path = tmp_path / "good"
    assert xipvm("run", HELLO, "--trace", path).status == 0
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_trace_that_is_cut_short(trace: bytes, tmp_path: Path) -> None:
    whole = None
    for length in (0, 1, 7, 8, 15, 100, 2000, len(trace) - 200, len(trace) - 1):
        (tmp_path / "t").write_bytes(trace[:length])
        outcome = xipvm("trace", "show", "t", cwd=tmp_path)
        one_line(outcome)
        if length >= len(trace) - 200:
            assert outcome.err.startswith("xipvm: t: cut short at offset ")
            assert outcome.lines, "what is sound is shown"
        whole = outcome
    (tmp_path / "t").write_bytes(trace)
    outcome = xipvm("trace", "show", "t", cwd=tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    assert whole is not None
    assert outcome.lines[: len(whole.lines)] == whole.lines


@pytest.mark.parametrize("content", [b"a letter\n", b"X", b"XIPVMTR", b"\0" * 4096], ids=["text", "X", "cut", "zeros"])
def test_what_is_no_trace_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    assert "exists and is no trace" in refused(tmp_path, "run", HELLO, "--trace", "t")


def test_a_run_that_does_not_begin_leaves_an_old_trace_alone(trace: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(trace)
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n")
    for wrong in (
        ("text",),
        (HELLO, "--memory", "64T"),
        (HELLO, "--smp", "99"),
        (HELLO, "--flash", "missing"),
        (HELLO, "--dtb", "text"),
        (HELLO, "--input", "missing"),
        (HELLO, "--clock", "host", "--max-instructions", "5"),
    ):
        refused(tmp_path, "run", *wrong, "--trace", "t")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--memory", "64T"),
        ("--memory", "4096"),
        ("--smp", "99"),
        ("--flash", "missing"),
        ("--dtb", "text"),
        ("--input", "missing"),
        ("--clock", "host", "--max-instructions", "5"),
    ],
    ids=lambda wrong: wrong[0],
)
def test_a_run_that_does_not_begin_leaves_no_trace(wrong: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n")
    refused(tmp_path, "run", HELLO, *wrong, "--trace", "t")


def dtb(total: int, *, magic: int = 0xD00DFEED, size: int = 64) -> bytes:
    """A header that says ``total``, in a file of ``size`` bytes."""
    return struct.pack(">10I", magic, total, 56, 56, 40, 17, 16, 0, 0, 8).ljust(size, b"\0")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xd0", b"\xd0\x0d\xfe\xed", b"/dts-v1/;\n", dtb(64, magic=0xEDFE0DD0), dtb(65), dtb(2**31)],
    ids=["empty", "byte", "magic", "source", "swapped", "cut", "huge"],
)
def test_a_device_tree_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.dtb").write_bytes(data)
    assert refused(tmp_path, "run", HELLO, "--dtb", "x.dtb", "--max-instructions", "10").startswith("x.dtb: ")
