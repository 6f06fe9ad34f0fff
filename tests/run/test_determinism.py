"""Equal runs are equal to the byte, and neither being watched nor being disturbed changes one."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.run.command import DEADLINE, ISAS, UBOOT, guest, needs_uboot, start, xipvm
from xipvm import Console, Event, Machine, Trace

GUESTS = [("hello", 1), ("reprogram", 1), ("pages", 1), ("clocks", 1), ("selfmod", 1), ("selfmod-smp", 2), ("token", 2)]
SESSION = b"\nversion\nsetenv colour red\nsaveenv\nmd 40000000 8\nprintenv\n"
MIB = 1 << 20


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "smp"), GUESTS)
def test_two_processes_write_the_same_trace(name: str, smp: int, isa: str, tmp_path: Path) -> None:
    """Different directories, environments and hash seeds: nothing of the host gets in."""
    runs = []
    for seed, directory in ((1, tmp_path / "a"), (2, tmp_path / "a much longer name")):
        directory.mkdir()
        extra = {"PYTHONHASHSEED": str(seed), "PADDING": "x" * 1000 * seed}
        outcome = xipvm("run", guest(name, isa), "--smp", smp, "--trace", "t", "--quiet", cwd=directory, extra=extra)
        assert outcome.status == 0
        runs.append((outcome, (directory / "t").read_bytes()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == runs[1][1]


@needs_uboot
@pytest.mark.slow
@pytest.mark.parametrize("smp", [1, 2])
def test_two_u_boot_sessions_write_the_same_trace(smp: int, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(SESSION)
    runs = []
    for name in ("a", "b"):
        trace = tmp_path / name
        options = ("--input", script, "--until", "=> ", "--smp", smp, "--quiet", "--trace", trace)
        runs.append((xipvm("run", UBOOT, *options), trace.read_bytes()))
    assert runs[0][0].status == 0
    assert "colour=red" in runs[0][0].lines
    assert runs[0] == runs[1]


class Ending(NamedTuple):
    """All that can be seen of a machine that has run."""

    status: int
    reason: str
    output: bytes
    instructions: int | None
    registers: list[list[tuple[str, int]]]
    memory: str


def ending(
    path: Path, smp: int, *, trace: Trace | None = None, stdin: bytes = b"", slices: int | None = None
) -> Ending:
    """Run a guest, in pieces of ``slices`` instructions if that is said, and look at everything."""
    output = io.BytesIO()
    with Machine(guest=path, smp=smp, memory=32 * MIB, trace=trace, console=Console(output, stdin)) as machine:
        until = "=> " if stdin else None
        result = machine.run(until=until, max_instructions=slices)
        while result.reason == "limit":
            result = machine.run(until=until, max_instructions=slices)
        seen = blake2b()
        memories = [(machine.board.ram_base, machine.memory_size)]
        memories += [(bank.base, bank.size) for bank in machine.board.flash]
        for base, size in memories:
            for at in range(base, base + size, MIB):
                data = machine.read_physical(at, MIB)
                assert data is not None
                seen.update(data)
        registers = [vcpu.isa.registers() for vcpu in machine.vcpus]
        instructions = result.summary.instructions
        return Ending(result.status, result.reason, output.getvalue(), instructions, registers, seen.hexdigest())


class Listener:
    """A sink that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event) -> None:
        self.count += 1


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "smp"), [run for run in GUESTS if run[0] != "hello"])
def test_a_trace_changes_nothing(name: str, smp: int, isa: str) -> None:
    listener = Listener()
    trace = Trace()
    trace.attach(listener)
    watched = ending(guest(name, isa), smp, trace=trace)
    assert watched == ending(guest(name, isa), smp)
    assert watched.status == 0
    assert listener.count > 50


@needs_uboot
@pytest.mark.slow
def test_a_trace_changes_nothing_for_u_boot() -> None:
    listener = Listener()
    trace = Trace()
    trace.attach(listener)
    watched = ending(UBOOT, 1, trace=trace, stdin=SESSION)
    assert watched == ending(UBOOT, 1, stdin=SESSION)
    assert (watched.reason, watched.output[-3:]) == ("until", b"=> ")
    assert listener.count > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "smp", "slices"),
    [
        ("reprogram", 1, 97),
        ("selfmod", 1, 61),
        ("clocks", 1, 1009),
        ("pages", 1, 20_011),
        ("token", 2, 600),
        ("token", 3, 331),
        ("selfmod-smp", 2, 211),
    ],
)
def test_a_run_in_pieces_ends_like_a_run_in_one(name: str, smp: int, slices: int, isa: str) -> None:
    assert ending(guest(name, isa), smp, slices=slices) == ending(guest(name, isa), smp)


HAMMER = """
import os, signal, sys, time
pid = os.pidfd_open(int(sys.argv[1]))
numbers = [int(word) for word in sys.argv[2:]]
sent = 0
try:
    while True:
        for number in numbers:
            signal.pidfd_send_signal(pid, number)
            sent += 1
        if sent == len(numbers):
            os.write(1, b"!")
        time.sleep(0.0002)  # without a pause, a process that is stopped all the time gets nowhere
except ProcessLookupError:
    pass
print(sent)
"""
ALARMS = ("14",)
STOPS = ("19", "18", "28")
"""SIGSTOP, SIGCONT, SIGWINCH."""


@contextmanager
def hammered(
    *argv: object, signals: tuple[str, ...]
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """``xipvm argv`` under a storm of signals from another process, which begins before it does."""
    # An alarm would end the process before it has a handler, and after it has given it up.
    wait = ("sh", "-c", 'trap "" ALRM; read go; exec "$@"', "sh")
    with start(*argv, prefix=wait) as child:
        hammer = subprocess.Popen([sys.executable, "-c", HAMMER, str(child.pid), *signals], stdout=subprocess.PIPE)
        with hammer:
            try:
                assert hammer.stdout is not None
                assert hammer.stdout.read(1) == b"!"
                yield child, hammer
            finally:
                child.kill()
                hammer.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "signals"),
    [
        pytest.param(("pages", "arm64"), ALARMS, id="pages-alarms"),
        pytest.param(("clocks", "riscv64"), ALARMS, id="clocks-alarms"),
        pytest.param(("clocks", "arm64"), STOPS, id="clocks-stops"),
        pytest.param(("selfmod-smp", "riscv64"), ALARMS, id="selfmod-smp-alarms"),
        pytest.param(None, ALARMS, id="u-boot-alarms", marks=needs_uboot),
        pytest.param(None, STOPS, id="u-boot-stops", marks=needs_uboot),
    ],
)
def test_a_storm_of_signals_changes_nothing(
    what: tuple[str, str] | None, signals: tuple[str, ...], tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_bytes(SESSION if what is None else b"")
    path = UBOOT if what is None else guest(*what)
    until = ("--until", "=> ") if what is None else ("--smp", 2)
    quiet = xipvm("run", path, "--input", script, *until, "--quiet", "--trace", tmp_path / "quiet")
    assert quiet.status == 0
    options = ("--input", script, *until, "--quiet", "--trace", tmp_path / "storm")
    with hammered("run", path, *options, signals=signals) as (child, hammer):
        out, err = child.communicate(b"\n", timeout=DEADLINE)
        sent, _ = hammer.communicate(timeout=DEADLINE)
    assert (child.returncode, out.decode(), err) == (0, quiet.out, b"")
    assert int(sent) > 100
    assert (tmp_path / "storm").read_bytes() == (tmp_path / "quiet").read_bytes()
