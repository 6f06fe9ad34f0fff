"""Limits and signals end every run, whatever the guest is doing or not doing, and say so."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.asm import a64, rv64, words
from tests.loader.conftest import write_elf
from tests.run.command import DEADLINE, ISAS, Outcome, read_until, start, wait_for, xipvm
from xipvm import TraceReader, boards
from xipvm.errors import TraceFileError

BASE = {isa: boards.get(f"virt-{isa}").flash[0].base for isa in ISAS}
MACHINE = {"arm64": 183, "riscv64": 243}
UART = {"arm64": 0x0900_0000, "riscv64": 0x1000_0000}
MTVEC = 0x305
SOON = 1.0
"""Seconds within which a signal ends a run."""


def lui(register: int, value: int) -> int:
    return value & 0xFFFFF000 | register << 7 | 0x37


def busy(isa: str) -> bytes:
    """A branch to itself."""
    return words(a64.b(0)) if isa == "arm64" else words(rv64.jal(0, 0))


def exceptions(isa: str) -> bytes:
    """A system call whose handler is a system call, on AArch64 itself and nothing ever retires.

    A RISC-V trap handler that traps at once is taken for a crash; there the handler jumps to the system call.
    """
    if isa == "arm64":
        start = [*a64.mov(0, BASE[isa] + 0x800), a64.msr(a64.VBAR_EL1, 0), a64.ISB, a64.svc()]
        return words(*start).ljust(0xA00, b"\0") + words(a64.svc())
    handler = BASE[isa] + 0x800
    start = [lui(5, handler + 0x800), rv64.addi(5, 5, -0x800), rv64.csrrw(0, MTVEC, 5), rv64.ECALL]
    return words(*start).ljust(0x800, b"\0") + words(rv64.jal(0, 8), 0, rv64.ECALL)


def waits(isa: str) -> bytes:
    """Waits for an interrupt that nobody sends."""
    return words(a64.WFI, a64.b(-4)) if isa == "arm64" else words(rv64.WFI, rv64.jal(0, -4))


def prints(isa: str) -> bytes:
    """Prints x and a line feed for ever."""
    if isa == "arm64":
        letters = [a64.movz(1, ord("x")), a64.movz(2, 10)]
        return words(*a64.mov(0, UART[isa]), *letters, a64.str(1, 0, 0, 4), a64.str(2, 0, 0, 4), a64.b(-8))
    letters = [rv64.addi(6, 0, ord("x")), rv64.addi(7, 0, 10)]
    return words(lui(5, UART[isa]), *letters, rv64.sb(6, 5, 0), rv64.sb(7, 5, 0), rv64.jal(0, -8))


GUESTS = {"busy": busy, "exceptions": exceptions, "waits": waits, "prints": prints}


def elf(directory: Path, name: str, isa: str) -> Path:
    """The ELF of a guest of GUESTS."""
    path = directory / f"{name}.elf"
    data = write_elf({"paddr": BASE[isa], "data": GUESTS[name](isa)}, entry=BASE[isa], machine=MACHINE[isa])
    path.write_bytes(data)
    return path


def said(outcome: Outcome) -> str:
    """The first line of the summary, which is whole."""
    lines = outcome.err.splitlines()
    assert len(lines) == 3, outcome
    assert all(line.startswith("xipvm: ") for line in lines)
    assert "guest fault" in lines[2]
    return lines[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["busy", "exceptions", "prints"])
@pytest.mark.parametrize("smp", [1, 2])
def test_a_number_of_instructions(name: str, smp: int, isa: str, tmp_path: Path) -> None:
    """Also where nothing retires."""
    path = elf(tmp_path, name, isa)
    outcome = xipvm("run", path, "--input", "/dev/null", "--max-instructions", 5000, "--smp", smp)
    assert outcome.status == 124
    assert said(outcome) == "xipvm: the instruction limit was reached, status 124"
    assert set(outcome.out) <= {"x", "\n"}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("clock", ["instructions", "host"])
def test_a_time(name: str, clock: str, isa: str, tmp_path: Path) -> None:
    """Also where nothing retires, and where every vCPU waits for a person who might type."""
    path = elf(tmp_path, name, isa)
    with start("run", path, "--timeout", 0.1, "--clock", clock) as child:
        out, err = communicate(child)
    outcome = Outcome(child.returncode, out.decode(), err.decode())
    assert outcome.status == 124
    assert said(outcome) == "xipvm: the time limit was reached, status 124"
    assert 0.1 <= float(outcome.err.splitlines()[1].partition(" s")[0].split()[-1]) < DEADLINE


def communicate(child: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What the child says until it ends. Its standard input stays open meanwhile, unlike in Popen.communicate."""
    assert child.stdout is not None
    assert child.stderr is not None
    found: dict[int, bytes] = {child.stdout.fileno(): b"", child.stderr.fileno(): b""}
    unread = list(found)
    while unread:
        poller = select.poll()
        for fd in unread:
            poller.register(fd, select.POLLIN)
        ready = poller.poll(DEADLINE * 1000)
        assert ready, "neither says anything nor ends"
        for fd, _ in ready:
            piece = os.read(fd, 65536)
            found[fd] += piece
            if not piece:
                unread.remove(fd)
    child.wait(DEADLINE)
    out, err = found.values()
    return out, err


def begun(trace: Path) -> bool:
    """Whether the guest of the run that records ``trace`` executes."""
    try:
        with TraceReader(trace) as reader:
            return any(event.kind == "tlb_insert" for event in reader)
    except TraceFileError:
        return False


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["busy", "exceptions", "waits"])
@pytest.mark.parametrize("clock", ["instructions", "host"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal(number: signal.Signals, clock: str, name: str, isa: str, tmp_path: Path) -> None:
    trace = tmp_path / "t"
    with start("run", elf(tmp_path, name, isa), "--clock", clock, "--trace", trace) as child:
        wait_for(lambda: begun(trace), child)
        child.send_signal(number)
        sent = time.monotonic()
        out, err = communicate(child)
        took = time.monotonic() - sent
    outcome = Outcome(child.returncode, out.decode(), err.decode())
    assert outcome.status == 128 + number
    assert said(outcome) == f"xipvm: interrupted, status {128 + number}"
    assert took < SOON
    with TraceReader(trace) as reader:
        last = list(reader)[-1]
        assert reader.closed
    assert (last.kind, last.fields) == ("machine_end", {"reason": "interrupted", "status": 128 + number})


@pytest.mark.parametrize("isa", ISAS)
def test_a_guest_that_nobody_listens_to_any_more(isa: str, tmp_path: Path) -> None:
    """As in ``xipvm run ... | head -1``."""
    with start("run", elf(tmp_path, "prints", isa), "--timeout", DEADLINE) as child:
        read_until(child, b"x\n")
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.wait(DEADLINE) == 141
        assert child.stderr.read() == b""


@pytest.mark.parametrize("isa", ISAS)
def test_a_full_disk_under_the_output(isa: str, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        outcome = xipvm("run", elf(tmp_path, "prints", isa), "--input", "/dev/null", "--timeout", 20, stdout=full)
    assert outcome.status == 2
    assert outcome.err == "xipvm: standard output: No space left on device\n"


@pytest.mark.parametrize("isa", ISAS)
def test_all_wait_and_nothing_can_come(isa: str, tmp_path: Path) -> None:
    """No limit is needed then: it is a dead end, and reported as one."""
    outcome = xipvm("run", elf(tmp_path, "waits", isa), "--input", "/dev/null", "--smp", 2)
    assert outcome.status == 1
    assert "every vCPU waits for an interrupt and nothing is left that could send one" in outcome.err
