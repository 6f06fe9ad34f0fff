"""The command line as a process of its own, and the guests that the tests of this directory run."""

from __future__ import annotations

import contextlib
import io
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ISAS = ("arm64", "riscv64")
UBOOT = Path("/usr/lib/u-boot/qemu_arm64/uboot.elf")
needs_uboot = pytest.mark.skipif(not UBOOT.exists(), reason="needs Debian's U-Boot: apt-get install u-boot-qemu")

XIPVM = (sys.executable, "-m", "xipvm")
DEADLINE = 60.0
"""Seconds after which something that should have happened counts as missing; nothing ever waits that long."""


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What a guest printed, without its carriage returns."""
        return self.out.replace("\r\n", "\n").splitlines()


def guest(name: str, isa: str) -> Path:
    """The ELF of a guest of ours."""
    return ROOT / "guests" / "bin" / isa / f"{name}-{isa}.elf"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment in which ``python -m xipvm`` finds the package from any directory."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(extra or {})}


def xipvm(
    *argv: object,
    cwd: Path | None = None,
    extra: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
) -> Outcome:
    """``xipvm argv``, run to its end; ``prefix`` is a command that starts it."""
    child = subprocess.run(
        [*prefix, *XIPVM, *map(str, argv)],
        stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd, env=environment(extra), timeout=DEADLINE,
        check=False,
    )  # fmt: skip
    return Outcome(child.returncode, (child.stdout or b"").decode(), child.stderr.decode())


def inside(*argv: object, cwd: Path) -> Outcome:
    """``xipvm argv`` in this process, with no input: quicker, where it ends before a machine runs."""
    from xipvm.cli import main

    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with open(os.devnull) as nothing, contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in argv])
    out.flush()
    assert isinstance(ended.value.code, int)
    return Outcome(ended.value.code, out.buffer.getvalue().decode(), err.getvalue())


def start(*argv: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """``xipvm argv`` with pipes for all three streams. Use it in a ``with`` statement, and end it there."""
    return subprocess.Popen(
        [*prefix, *XIPVM, *map(str, argv)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip


def read_until(child: subprocess.Popen[bytes], text: bytes) -> bytes:
    """What ``child`` prints up to and with ``text``; fails when it ends or falls silent before."""
    assert child.stdout is not None
    fd = child.stdout.fileno()
    seen = b""
    deadline = time.monotonic() + DEADLINE
    while text not in seen:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        ready = poller.poll(max(deadline - time.monotonic(), 0) * 1000)
        assert ready, f"{text!r} did not come, but {seen!r}"
        piece = os.read(fd, 65536)
        assert piece, f"ended before {text!r}: {seen!r}"
        seen += piece
    return seen


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    """Look at ``condition`` until it holds; fails when ``child`` ends before."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert child.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)
