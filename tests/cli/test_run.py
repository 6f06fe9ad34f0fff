"""xipvm run: options, endings, what is said afterwards."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xipvm.devices.flash.files import ImageOption
from xipvm.errors import TraceFileError
from xipvm.result import RunResult, Summary
from xipvm.trace.reader import TraceReader

GUESTS = Path(__file__).parents[2] / "guests" / "bin"
HELLO = GUESTS / "arm64" / "hello-arm64.elf"
ISAS = ["arm64", "riscv64"]
SUMMARY = Summary(2_000_000, 0.5, 1, 2, 3, 4, 5)

Call = Callable[..., Any]


def guest(name: str, isa: str) -> Path:
    return GUESTS / isa / f"{name}-{isa}.elf"


class FakeMachine:
    """Takes what a Machine takes and ends as it is told; ``work`` is done by ``run``."""

    result = RunResult(0, "exit", SUMMARY)
    work: Callable[[FakeMachine], None] | None = None
    made: list[FakeMachine] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.placement = None
        self.limits: dict[str, Any] = {}
        self.exit: tuple[str, int] | None = None
        self.made.append(self)

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *error: object) -> None:
        self.options["trace"].emit("mm_exit", mm="mm0")

    def request_exit(self, reason: str, status: int) -> None:
        self.exit = (reason, status)

    def run(self, **limits: Any) -> RunResult:
        self.limits = limits
        if self.work is not None:
            self.work()
        return self.result


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeMachine]]:
    class Fresh(FakeMachine):
        made: list[FakeMachine] = []

    monkeypatch.setattr("xipvm.cli.run.Machine", Fresh)
    return Fresh


def test_options_reach_the_machine(xipvm: Call, machine: type[FakeMachine], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"version\n")
    outcome = xipvm(
        "run", "guest.elf", "--board", "virt-arm64", "--memory", "64M", "--smp", 2, "--flash", "a.img,snapshot=on",
        "--flash", "b.img,bank=1", "--clock", "host", "--timeout", "2.5",
        "--input", script, "--until", "=> ", "--dtb", "x.dtb", "--ram-alias", "2000000000", "--quiet",
    )  # fmt: skip
    assert outcome == (0, "", "")
    (made,) = machine.made
    console = made.options.pop("console")
    assert [console.read() for _ in range(9)] == [*b"version\n", None]
    assert made.options.pop("trace").on  # the history for a crash report listens
    assert made.options == {
        "guest": "guest.elf", "board": "virt-arm64", "memory": 64 << 20, "smp": 2, "clock": "host", "secondary": "kvm",
        "flash": [ImageOption("a.img", snapshot=True), ImageOption("b.img", bank=1)], "dtb": "x.dtb",
        "ram_alias": 128 << 30, "pin_sptes": False, "hugetlb": False, "thp": "madvise", "protocol": "modern",
        "host_memory": None, "swap": None, "storm": None, "devices": (), "image": None, "map_files": (),
    }  # fmt: skip
    assert made.limits == {"timeout": 2.5, "max_instructions": None, "until": "=> "}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ((), "there is nothing to run: name a GUEST, or a flash image with --flash"),
        (("--flash", "x"), "without a GUEST the board has to be named: --board, see 'xipvm boards'"),
        (("x", "--until", ""), "--until needs a text to wait for"),
        (("x", "--input", "/nothing"), "/nothing: No such file or directory"),
        (("x", "--input", "/dev/zero"), "/dev/zero: more than 64 MiB of console input; pipe it in instead"),
        (("x", "--timeout", "nan"), "'nan' is no positive number of seconds"),
        (("x", "--timeout", "-1"), "'-1' is no positive number of seconds"),
        (("x", "--max-instructions", "0"), "0 is not in the range x>=1"),
        (("x", "--clock", "wall"), "'wall' is not one of 'instructions', 'host'"),
        (("/nothing",), "/nothing: No such file or directory"),
        (("/nothing", "--trace", "/x"), "/nothing: No such file or directory"),
        ((HELLO, "--trace", "/nothing/t"), "/nothing/t: No such file or directory"),
        ((HELLO, "--trace", "/dev/null"), "/dev/null: a trace is recorded into a regular file, and this is none"),
        ((HELLO, "--flash", "/nothing"), "/nothing: No such file or directory"),
        ((HELLO, "--dtb", "/nothing"), "/nothing: No such file or directory"),
        ((HELLO, "--memory", "1"), "virt-arm64 takes up to 64 GiB of RAM in units of 4 KiB, not 1 B"),
        ((HELLO, "--smp", "99"), "virt-arm64 has 1 to 8 CPUs, not 99"),
        ((HELLO, "--board", "virt-riscv64"), f"{HELLO}: is for AArch64; virt-riscv64 runs RISC-V"),
        ((HELLO, "--clock", "host", "--max-instructions", "1"), "an instruction limit needs the instructions clock"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(xipvm: Call, argv: tuple[object, ...], line: str) -> None:
    status, out, err = xipvm("run", "--input", "/dev/null", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("xipvm: ")
    assert err.count("\n") == 1
    assert line in err


def test_summary(xipvm: Call, machine: type[FakeMachine]) -> None:
    machine.result = RunResult(3, "exit", SUMMARY)
    assert xipvm("run", "x", "--input", "/dev/null") == (
        3,
        "",
        "xipvm: the guest ended, status 3\n"
        "xipvm: 2000000 instructions in 0.500 s (4.0 MIPS)\n"
        "xipvm: 1 guest fault, 2 invalidations, 3 TLB flushes, 4 flash programs, 5 flash erases\n",
    )
    machine.result = RunResult(124, "timeout", Summary(None, 0.5, 0, 0, 0, 0, 0))
    assert xipvm("run", "x", "--input", "/dev/null").err.splitlines()[:2] == [
        "xipvm: the time limit was reached, status 124",
        "xipvm: 0.500 s",
    ]


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (255, 255), (256, 1), (257, 1), (-1, 255), (0x1F00, 1)])
def test_a_status_that_does_not_fit_is_not_success(
    xipvm: Call, machine: type[FakeMachine], status: int, expected: int
) -> None:
    machine.result = RunResult(status, "exit", SUMMARY)
    assert xipvm("run", "x", "--input", "/dev/null", "--quiet").status == expected


def test_a_trace_that_cannot_grow_ends_the_run_with_one_line(
    xipvm: Call, machine: type[FakeMachine], tmp_path: Path
) -> None:
    def work(fake: FakeMachine) -> None:
        while fake.exit is None:
            fake.options["trace"].emit("page_alloc", pfn=1)

    machine.work = work
    machine.result = RunResult(2, "trace", SUMMARY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        status, _, err = xipvm("run", HELLO, "--input", "/dev/null", "--trace", tmp_path / "t", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert machine.made[0].exit == ("trace", 2)
    assert status == 2
    assert err.startswith(f"xipvm: {tmp_path / 't'}: File too large; it holds the run's first ")
    assert err.count("\n") == 1


def test_a_trace_is_finished_when_the_machine_fails(xipvm: Call, machine: type[FakeMachine], tmp_path: Path) -> None:
    def work(fake: FakeMachine) -> None:
        fake.options["trace"].emit("page_alloc", pfn=1)
        raise KeyboardInterrupt

    machine.work = work
    outcome = xipvm("run", HELLO, "--input", "/dev/null", "--trace", tmp_path / "t")
    assert (outcome.status, outcome.err.lstrip()) == (130, "xipvm: interrupted\n")
    with TraceReader(tmp_path / "t") as reader:
        assert [event.kind for event in reader] == ["page_alloc", "mm_exit"]
        assert reader.closed


@pytest.mark.parametrize("isa", ISAS)
def test_hello(xipvm: Call, isa: str) -> None:
    status, out, err = xipvm("run", guest("hello", isa), "--input", "/dev/null")
    assert status == 0
    assert "ello" in out
    assert err.startswith("xipvm: the guest ended, status 0\n")
    assert xipvm("run", guest("hello", isa), "--input", "/dev/null", "--quiet") == (0, out, "")


@pytest.mark.parametrize("isa", ISAS)
def test_equal_runs_give_equal_traces_and_tracing_changes_nothing(xipvm: Call, isa: str, tmp_path: Path) -> None:
    plain = xipvm("run", guest("hello", isa), "--input", "/dev/null")
    for name in ("a", "b"):
        traced = xipvm("run", guest("hello", isa), "--input", "/dev/null", "--trace", tmp_path / name)
        assert traced[:2] == plain[:2]
        assert traced.err.splitlines()[0] == plain.err.splitlines()[0]
        assert traced.err.split()[5:7] == plain.err.split()[5:7]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with TraceReader(tmp_path / "a") as reader:
        kinds = [event.kind for event in reader]
        assert reader.closed
        assert reader.machine["guest"] == f"hello-{isa}.elf"
    assert "kvm_page_fault" in kinds
    assert kinds[-1] == "machine_end"


def test_an_instruction_limit(xipvm: Call) -> None:
    status, _, err = xipvm("run", HELLO, "--input", "/dev/null", "--max-instructions", 100)
    assert status == 124
    assert err.splitlines()[:2] == ["xipvm: the instruction limit was reached, status 124", err.splitlines()[1]]
    assert "xipvm: 1" in err.splitlines()[1]


def test_until_ends_the_run(xipvm: Call) -> None:
    status, out, err = xipvm("run", HELLO, "--input", "/dev/null", "--until", "ello")
    assert (status, out[-4:]) == (0, "ello")
    assert err.startswith("xipvm: the awaited text came, status 0\n")


def test_the_summary_begins_a_line_of_its_own_on_a_terminal() -> None:
    parent, terminal = os.openpty()
    with open(parent, "rb", buffering=0) as screen:
        argv = [sys.executable, "-m", "xipvm", "run", str(HELLO), "--input", "/dev/null", "--until", "ello"]
        assert subprocess.run(argv, stdout=terminal, stderr=terminal, check=False).returncode == 0
        os.close(terminal)
        assert b"ello\r\nxipvm: the awaited text came" in screen.read(4096)


@pytest.mark.parametrize("isa", ISAS)
def test_a_crash_is_explained(xipvm: Call, isa: str) -> None:
    status, _, err = xipvm("run", guest("crash", isa), "--input", "/dev/null")
    assert status == 1
    assert "Traceback" not in err
    assert "guest crashed: " in err
    assert " pc 0x" in err


def test_ctrl_c(tmp_path: Path) -> None:
    endless = tmp_path / "endless.elf"
    program = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0, 4, 4, 4)  # PT_LOAD, r-x, at 0
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 183, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    endless.write_bytes(header + program + struct.pack("<I", 0x1400_0000))  # b .
    trace = tmp_path / "t"
    child = subprocess.Popen(
        [sys.executable, "-m", "xipvm", "run", str(endless), "--input", "/dev/null", "--trace", str(trace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not _running(trace):
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert (child.returncode, err.splitlines()[0]) == (130, b"xipvm: interrupted, status 130")
    with TraceReader(trace) as reader:
        assert [event.kind for event in reader][-1] == "machine_end"
        assert reader.closed


def _running(trace: Path) -> bool:
    """Whether the guest of the run that records ``trace`` has begun to execute."""
    try:
        with TraceReader(trace) as reader:
            return any(event.kind == "kvm_page_fault" for event in reader)
    except TraceFileError:
        return False


def test_output_into_a_closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-m", "xipvm", "run", str(HELLO), "--input", "/dev/null", "--quiet"],
        stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (child.returncode, child.stderr) == (141, b"")


def test_a_run_imports_only_what_it_needs() -> None:
    code = (
        "import sys; from xipvm.cli import main\n"
        "try: main(['run', sys.argv[1], '--input', '/dev/null', '--quiet'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(HELLO)], capture_output=True, text=True, check=True)
    imported = set(child.stdout.splitlines()[-1].split())
    assert "click" in imported
    assert not imported & {"rich", "numpy", "capstone", "elftools", "unittest", "importlib_metadata", "json"}
