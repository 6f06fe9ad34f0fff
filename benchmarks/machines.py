"""Our side: machines as the command line builds them, and their guests. Seconds are of CPU time, as in peers.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xipvm.machine import Machine
from xipvm.trace.funnel import Trace
from xipvm.trace.recorder import Recorder

_GUESTS = Path(__file__).resolve().parent.parent / "guests" / "bin" / "arm64"


def guest(name: str) -> Path:
    """The ELF of one of the repository's guests."""
    return _GUESTS / f"{name}-arm64.elf"


def timed(machine: Machine) -> float:
    """CPU seconds of one run to the guest's end. Raises RuntimeError unless it ends well."""
    start = time.process_time()
    result = machine.run()
    seconds = time.process_time() - start
    if result.reason != "exit" or result.status != 0:
        report = "" if result.report is None else f"\n{result.report.render()}"
        raise RuntimeError(f"the guest ended by {result.reason}, status {result.status}{report}")
    return seconds


def timed_once(elf: Path, clock: str) -> float:
    """Seconds that a new machine runs ``elf``; building it is not counted."""
    with Machine(guest=elf, clock=clock) as machine:
        return timed(machine)


def timed_recorded(elf: Path, clock: str, file: Path) -> float:
    """The same with everything recorded into ``file``, closing it included."""
    with recorded(file) as trace, Machine(guest=elf, clock=clock, trace=trace) as machine:
        return timed(machine)


@contextmanager
def recorded(file: Path) -> Iterator[Trace]:
    """A trace that goes into ``file``, as ``xipvm run --trace`` makes it."""
    trace = Trace()
    with Recorder(file) as recorder:
        trace.attach(recorder)
        yield trace
