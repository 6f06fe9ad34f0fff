"""Whole processes: from the shell's exec to the guest's end or its prompt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Bench, Figure, MissingPeerError, Target, compare, value
from benchmarks.machines import guest
from benchmarks.peers import Qemu, qemu_firmware

_UBOOT = Path("/usr/lib/u-boot/qemu_arm64")
_PROMPT = b"=>"
_PATIENCE = 60.0
_MS = 1e3
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)")
_WORTH_A_LINE = 20.0


def _xipvm(*arguments: str) -> list[str]:
    """The command line as the console script starts it."""
    return [sys.executable, "-c", "from xipvm.cli import main; main()", *arguments]


def _environment(bench: Bench) -> dict[str, str]:
    """Ours, with compiled modules kept, as after an installation; whoever runs first compiles them."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(bench.folder / "pycache")}


def _timed(command: Sequence[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=_PATIENCE,
    )
    return time.perf_counter() - start


def hello(bench: Bench) -> Iterator[Figure]:
    """`xipvm run` of the smallest guest: the process, against a bare Python and QEMU."""
    elf = guest("hello")
    ours = _xipvm("run", str(elf), "--quiet")
    environment = _environment(bench)
    _timed(ours, environment)
    runs = {
        "python": lambda: _timed([sys.executable, "-c", "pass"], environment),
        "xipvm": lambda: _timed(ours, environment),
    }
    try:
        runs["qemu"] = Qemu(elf, bench.folder).timed
    except MissingPeerError as missing:
        bench.say(str(missing))
    times = bench.rounds(**runs)
    yield compare(
        "whole process / bare Python",
        times["xipvm"],
        "python -c pass",
        times["python"],
        target=Target(0.4, of_value=True),
    )
    if "qemu" in times:
        yield compare("whole process / QEMU", times["xipvm"], "QEMU", times["qemu"])
    for module, spent in _imports(bench, ours, environment).items():
        yield value(f"of it: import {module}", spent, unit="ms", note="with -X importtime, which slows it down")


def _imports(bench: Bench, command: list[str], environment: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of each import, with all it imports, that takes over 20 of them."""
    reports: list[dict[str, float]] = []
    for _ in range(bench.repeat):
        told = subprocess.run(
            [command[0], "-X", "importtime", *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE,
        ).stderr
        reports.append({found[4]: int(found[2]) / 1e3 for found in _IMPORT.finditer(told)})
    slow = [name for name, spent in reports[0].items() if spent >= _WORTH_A_LINE]
    return {name: [report.get(name, 0.0) for report in reports] for name in slow}


def uboot(bench: Bench) -> Iterator[Figure]:
    """Debian's unmodified U-Boot for qemu_arm64, from exec to its prompt, against QEMU."""
    for file in ("uboot.elf", "u-boot.bin"):
        if not (_UBOOT / file).exists():
            raise MissingPeerError(f"{_UBOOT / file} is not installed (Debian: u-boot-qemu)")
    ours = _xipvm("run", str(_UBOOT / "uboot.elf"), "--quiet", "--until", _PROMPT.decode())
    theirs = qemu_firmware(_UBOOT / "u-boot.bin")
    environment = _environment(bench)
    _prompt(ours, environment)
    times = bench.rounds(qemu=lambda: _prompt(theirs, environment), xipvm=lambda: _prompt(ours, environment))
    yield compare("whole process to the prompt / QEMU", times["xipvm"], "QEMU", times["qemu"], target=Target(2))


def _prompt(command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds until the prompt comes out of ``command``, which is then ended. A key stops the autoboot."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b" ")
            said = b""
            while _PROMPT not in said:
                if time.perf_counter() - start > _PATIENCE:
                    raise RuntimeError(f"{command[0]}: no prompt in {_PATIENCE:.0f} s")
                piece = process.stdout.read(4096)
                if not piece:
                    raise RuntimeError(f"{command[0]} ended without a prompt; its last words: {said[-200:]!r}")
                said += piece
            return time.perf_counter() - start
        finally:
            process.kill()
