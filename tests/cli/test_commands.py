"""Every command but run: what is printed, and that what is wrong is one line and status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xipvm import boards
from xipvm.trace import Trace
from xipvm.trace.reader import TraceReader
from xipvm.trace.recorder import Recorder

GUESTS = Path(__file__).parents[2] / "guests" / "bin"
HELLO = GUESTS / "arm64" / "hello-arm64.elf"

Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ((), "Missing command. (see xipvm --help)"),
        (("nonsense",), "No such command 'nonsense'. (see xipvm --help)"),
        (("boards", "--nonsense"), "No such option '--nonsense'. (see xipvm boards --help)"),
        (("inspect",), "Missing argument 'GUEST'. (see xipvm inspect --help)"),
        (("inspect", "/nothing"), "/nothing: No such file or directory"),
        (("inspect", "/dev/null"), "/dev/null: is not a regular file"),
        (("inspect", __file__), f"{__file__}: is not an ELF file"),
        (
            ("inspect", HELLO, "--board", "virt-riscv64"),
            f"{HELLO}: is for AArch64; virt-riscv64 runs RISC-V",
        ),
        (
            ("inspect", HELLO, "--board", "toaster"),
            "no board is called 'toaster'; known are virt-arm64, virt-riscv64",
        ),
        (
            ("inspect", HELLO, "--memory", "5Q"),
            "Invalid value for '--memory': '5Q' is not a size; write it as 4096, 64K, 128M or 1G "
            "(see xipvm inspect --help)",
        ),
        (("flash", "create", "x"), "Missing option '--board'. (see xipvm flash create --help)"),
        (
            ("flash", "create", "x", "--board", "virt-arm64", "--bank", "2"),
            "x: bank=2: the board has 2 banks of 64 MiB",
        ),
        (("flash", "pad", "/nothing", "--board", "virt-arm64"), "/nothing: No such file or directory"),
        (("trace", "show", "/nothing"), "/nothing: No such file or directory"),
        (("trace", "show", HELLO), f"{HELLO}: not an xipvm trace"),
        (
            ("trace", "show", "x", "--page", "zz"),
            "Invalid value for '--page': 'zz' is not a hexadecimal number (see xipvm trace show --help)",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(xipvm: Call, argv: tuple[object, ...], line: str) -> None:
    assert xipvm(*argv) == (2, "", f"xipvm: {line}\n")


def test_help_and_version(xipvm: Call) -> None:
    assert xipvm("--help").status == 0
    assert "inspect" in xipvm("--help").out
    assert xipvm("--version").out.startswith("xipvm")


def test_boards(xipvm: Call) -> None:
    status, out, err = xipvm("boards")
    assert (status, err) == (0, "")
    for name in boards.names():
        assert f"{name}: " in out
    assert "0x40000000  0x48000000  128 MiB  ram" in out


def test_boards_as_json(xipvm: Call) -> None:
    listed = json.loads(xipvm("boards", "--json").out)
    assert [board["name"] for board in listed] == list(boards.names())
    assert {"base": 0x4000_0000, "end": 0x4800_0000, "what": "ram"} in listed[0]["memory_map"]


def test_inspect(xipvm: Call) -> None:
    status, out, err = xipvm("inspect", HELLO)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"{HELLO}: AArch64 on virt-arm64"
    assert "entry 0x0 (_start)" in out
    assert [line.split()[:3] for line in out.splitlines()[3:6]] == [
        ["segment", "where", "from"],
        ["0", "flash0", "0x0"],
        ["1", "flash0", out.splitlines()[4].split()[3]],
    ]


def test_inspect_draws_a_table_on_a_terminal() -> None:
    parent, terminal = os.openpty()
    with open(parent, "rb", buffering=0) as screen:
        argv = [sys.executable, "-m", "xipvm", "inspect", str(HELLO)]
        environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
        assert subprocess.run(argv, stdout=terminal, env=environment, check=False).returncode == 0
        os.close(terminal)
        drawn = screen.read(8192).decode()
    assert "┃" in drawn
    assert "flash0" in drawn


def test_inspect_as_json(xipvm: Call) -> None:
    found = json.loads(xipvm("inspect", HELLO, "--json").out)
    assert (found["board"], found["entry"], found["entry_symbol"], found["notes"]) == ("virt-arm64", 0, "_start", [])
    assert [(piece["where"], piece["flags"]) for piece in found["pieces"]] == [
        ("flash0", "r-x"),
        ("flash0", "rw-"),
        ("ram", "rw-"),
    ]


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\n.elf"
    Path(os.fsdecode(name)).write_bytes(HELLO.read_bytes())
    child = subprocess.run([sys.executable, "-m", "xipvm", "inspect", name], capture_output=True, check=False)
    assert child.stdout.startswith(name + b": AArch64")
    assert (child.returncode, child.stderr) == (0, b"")
    child = subprocess.run([sys.executable, "-m", "xipvm", "inspect", name + b"2"], capture_output=True, check=False)
    assert (child.returncode, child.stdout, child.stderr.count(b"\n")) == (2, b"", 1)


def test_closed_standard_streams() -> None:
    for closed in ("1", "2"):
        command = f'exec {closed}>&-; exec "$@"'
        child = subprocess.run(
            ["sh", "-c", command, "sh", sys.executable, "-m", "xipvm", "boards"], capture_output=True, check=False
        )
        assert (child.returncode, child.stderr) == (0, b"")
        assert (child.stdout == b"") == (closed == "1")


def test_flash_create_and_pad(xipvm: Call, tmp_path: Path) -> None:
    size = boards.get("virt-riscv64").flash[0].size
    image = tmp_path / "flash.img"
    assert xipvm("flash", "create", image, "--board", "virt-riscv64") == (0, f"{image}: 64 MiB, erased\n", "")
    assert image.stat().st_size == 2 * size
    one = tmp_path / "one.img"
    assert xipvm("flash", "create", one, "--board", "virt-riscv64", "--bank", 1) == (0, f"{one}: 32 MiB, erased\n", "")
    assert one.stat().st_size == size
    again = xipvm("flash", "create", image, "--board", "virt-riscv64")
    assert (again.status, again.out) == (2, "")
    assert xipvm("flash", "create", image, "--board", "virt-riscv64", "--force").status == 0
    image.write_bytes(b"code")
    padded = xipvm("flash", "pad", image, "--board", "virt-riscv64")
    assert padded == (0, f"{image}: 32 MiB, {size - 4} B of them added\n", "")
    with image.open("rb") as file:
        assert file.read(6) == b"code\xff\xff"
    assert image.stat().st_size == size


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = Trace()
    with Recorder(tmp_path / "t") as recorder:
        trace.attach(recorder)
        for number in range(5000):
            trace.emit("page_alloc", pfn=number)
    return tmp_path / "t"


def test_trace_show(xipvm: Call, trace_file: Path) -> None:
    assert len(xipvm("trace", "show", trace_file).out.splitlines()) == 5000
    status, out, err = xipvm("trace", "show", trace_file, "--from", 3, "--to", 4, "--kind", "page_*", "--actor", "host")
    assert (status, err) == (0, "")
    assert out == (
        "           0      #3 host   page_alloc pfn=0x2\n"
        "           0      #4 host   page_alloc pfn=0x3\n"
    )  # fmt: skip
    lines = xipvm("trace", "show", trace_file, "--page", "0x10", "--json").out.splitlines()
    assert [json.loads(line)["fields"] for line in lines] == [{"pfn": 16}]
    assert "no event kind 'page'" in xipvm("trace", "show", trace_file, "--kind", "page").err


def test_trace_show_of_a_damaged_file_shows_what_is_sound(xipvm: Call, trace_file: Path) -> None:
    trace_file.write_bytes(trace_file.read_bytes()[:-100])
    with TraceReader(trace_file) as reader:
        sound = sum(1 for _ in zip(range(4990), reader, strict=False))
        offset = reader.offset
    status, out, err = xipvm("trace", "show", trace_file)
    assert (status, sound) == (2, 4990)
    assert 4990 < len(out.splitlines()) < 5000
    assert err.startswith(f"xipvm: {trace_file}: cut short at offset ")
    assert int(err.split()[-1]) > offset


def test_trace_show_says_when_the_run_died(xipvm: Call, trace_file: Path) -> None:
    data = trace_file.read_bytes()
    trace_file.write_bytes(data[:-15] + bytes(4096))  # zeros instead of the end record
    status, out, err = xipvm("trace", "show", trace_file)
    assert (status, len(out.splitlines())) == (0, 5000)
    assert err == f"xipvm: note: {trace_file}: its run died; what it had recorded is complete\n"


def test_trace_show_into_head(trace_file: Path) -> None:
    show = subprocess.Popen(
        [sys.executable, "-m", "xipvm", "trace", "show", str(trace_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert show.stdout is not None
    first = show.stdout.readline()
    show.stdout.close()
    assert show.stderr is not None
    with show.stderr:
        assert show.stderr.read() == b""
    assert show.wait() == 141
    assert first.endswith(b"page_alloc pfn=0x0\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [("boards",), ("trace", "show")])
def test_full_output_is_one_line(trace_file: Path, argv: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        child = subprocess.run(
            [sys.executable, "-m", "xipvm", *argv, *([str(trace_file)] if argv[0] == "trace" else [])],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (child.returncode, child.stderr) == (2, b"xipvm: standard output: No space left on device\n")
