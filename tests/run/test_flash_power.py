"""What is left of a flash image when its run is killed, who may have it at the same time, and a disk that is full."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.run.command import (
    ROOT,
    UBOOT,
    XIPVM,
    Outcome,
    environment,
    guest,
    needs_uboot,
    read_until,
    start,
    wait_for,
    xipvm,
)
from xipvm import TraceReader, boards
from xipvm.errors import TraceFileError

BOARD = boards.get("virt-arm64")
SECTOR = BOARD.flash[1].sector
ENVIRONMENT = 2 * SECTOR
"""Bytes at the start of bank 1 in which U-Boot has its environment."""

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def saving(directory: Path, colour: str) -> Path:
    """A script that saves ``colour`` in the environment."""
    script = directory / f"save-{colour}"
    script.write_text(f"\nsetenv colour {colour}\nsaveenv\n")
    return script


def contents(image: Path) -> Bytes:
    return np.fromfile(image, np.uint8)


def restore(image: Path, before: Bytes) -> None:
    """Put the environment's sectors back; the rest must never have changed."""
    with image.open("r+b") as file:
        file.write(before[:ENVIRONMENT].tobytes())


def boot(image: Path, *commands: str) -> Outcome:
    """A session of U-Boot with ``image`` as bank 1."""
    script = image.parent / "session"
    script.write_text("\n" + "".join(f"{command}\n" for command in commands))
    return xipvm("run", UBOOT, "--flash", f"{image},bank=1", "--input", script, "--until", "=> ")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """Bank 1 with ``colour=red`` saved in it."""
    path = tmp_path / "env.img"
    assert xipvm("flash", "create", path, "--board", BOARD.name, "--bank", 1).status == 0
    saved = boot(path, "setenv colour red", "saveenv")
    assert saved.lines[-2] == "OK", saved
    yield path
    path.unlink()


@pytest.fixture
def after(tmp_path: Path, image: Path) -> Bytes:
    """What the environment's sectors hold once ``colour=blue`` was saved over it."""
    copy = tmp_path / "copy.img"
    copy.write_bytes(image.read_bytes())
    assert boot(copy, "setenv colour blue", "saveenv").lines[-2] == "OK"
    found = contents(copy)[:ENVIRONMENT]
    copy.unlink()
    return found


def check(image: Path, before: Bytes, after: Bytes) -> Outcome:
    """Every byte is the old one, erased, programmed or the AND of both; and U-Boot boots with what there is."""
    found = contents(image)
    assert found.size == before.size
    old, now = before[:ENVIRONMENT], found[:ENVIRONMENT]
    assert bool(np.all((now == old) | (now == 0xFF) | (now == after) | (now == (old & after))))
    assert np.array_equal(found[ENVIRONMENT:], before[ENVIRONMENT:])
    shown = boot(image, "printenv colour")
    assert shown.status == 0, shown
    if np.array_equal(now, old):
        assert "colour=red" in shown.lines
    elif np.array_equal(now, after):
        assert "colour=blue" in shown.lines
    else:
        assert "bad CRC" in shown.out
    return shown


KILLED_AT = """
import os, signal, sys
import xipvm

kind, count = sys.argv[3], int(sys.argv[4])

def sink(event):
    global count
    if event.kind == kind and event.fields["bank"] == 1:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

trace = xipvm.Trace()
trace.attach(sink)
with open(sys.argv[2], "rb") as script:
    stdin = script.read()
xipvm.run(sys.argv[1], flash=[f"{sys.argv[5]},bank=1"], stdin=stdin, trace=trace, until="=> ")
"""


@needs_uboot
@pytest.mark.slow
def test_killed_at_every_stage_of_saveenv(image: Path, after: Bytes, tmp_path: Path) -> None:
    """SIGKILL comes from within, so it strikes where it should: at a mode change, an erase, a program."""
    before = contents(image)
    endings = set()
    script = saving(tmp_path, "blue")
    for kind, count in (
        ("flash_mode", 60),
        ("flash_erase", 1),
        ("flash_erase", 2),
        ("flash_program", 64),
        ("flash_program", 128),
    ):
        restore(image, before)
        argv = [sys.executable, "-c", KILLED_AT, str(UBOOT), str(script), kind, str(count), str(image)]
        child = subprocess.run(argv, env=environment(), check=False)
        assert child.returncode == -signal.SIGKILL
        shown = check(image, before, after)
        endings.add("bad CRC" in shown.out)
    assert endings == {True, False}, "some kills come too early or too late to do harm"


@needs_uboot
@pytest.mark.slow
def test_killed_from_outside(image: Path, after: Bytes, tmp_path: Path) -> None:
    """Where it strikes is up to the host; what may be there is not."""
    before = contents(image)
    script = saving(tmp_path, "blue")
    trace = tmp_path / "t"

    def happened(kind: str, count: int) -> bool:
        try:
            with TraceReader(trace) as reader:
                return sum(event.kind == kind for event in reader) >= count
        except TraceFileError:
            return False

    for kind, count in (("flash_erase", 1), ("flash_program", 30)):
        restore(image, before)
        trace.unlink(missing_ok=True)
        options = ("--flash", f"{image},bank=1", "--input", script, "--trace", trace, "--timeout", 60)
        with start("run", UBOOT, *options) as child:
            assert child.stdin is not None
            child.stdin.close()
            wait_for(lambda kind=kind, count=count: happened(kind, count), child)  # type: ignore[misc]
            child.kill()
        assert child.returncode == -signal.SIGKILL
        check(image, before, after)


@needs_uboot
@pytest.mark.slow
def test_one_machine_at_a_time(image: Path) -> None:
    with start("run", UBOOT, "--flash", f"{image},bank=1") as child:
        try:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            read_until(child, b"\n=> ")
            for option in ("", ",snapshot=on", ",readonly=on"):
                busy = xipvm("run", UBOOT, "--flash", f"{image},bank=1{option}", "--input", "/dev/null")
                assert (busy.status, busy.out, busy.err.count("\n")) == (2, "", 1)
                assert busy.err.startswith(f"xipvm: {image}: in use by another run"), busy.err
            for command in (("create", "--force"), ("pad",)):
                changed = xipvm("flash", *command, image, "--board", BOARD.name, "--bank", 1)
                assert (changed.status, changed.out, changed.err.count("\n")) == (2, "", 1)
                assert f"{image}: in use by another run" in changed.err
        finally:
            child.kill()
    assert "colour=red" in boot(image, "printenv colour").lines, "the lock went with the process"


@needs_uboot
@pytest.mark.slow
def test_any_number_may_look(image: Path) -> None:
    with start("run", UBOOT, "--flash", f"{image},bank=1,snapshot=on") as child:
        try:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            read_until(child, b"\n=> ")
            script = image.parent / "look"
            script.write_text("\nprintenv colour\n")
            for option in ("snapshot=on", "readonly=on"):
                options = ("--flash", f"{image},bank=1,{option}", "--input", script, "--until", "=> ")
                assert "colour=red" in xipvm("run", UBOOT, *options).lines
            writer = xipvm("run", UBOOT, "--flash", f"{image},bank=1", "--input", "/dev/null")
            assert (writer.status, writer.out, writer.err.count("\n")) == (2, "", 1)
        finally:
            child.kill()


def test_a_full_disk_under_the_trace(tmp_path: Path) -> None:
    """A file system of 2 MiB in a namespace of its own; where that is not allowed, a limit on file sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = [*XIPVM, "run", str(guest("coldfault", "arm64")), "--input", "/dev/null", "--quiet", "--trace"]
    keep = '"$@" "$0/t"; s=$?; cp "$0/t" "$0.copy"; exit $s'
    mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=2m none "$0" || exit 77; {keep}', str(disk), *run]
    child = subprocess.run(mounted, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    reason = "No space left on device"
    if child.returncode not in (0, 2):
        limited = ["sh", "-c", f"ulimit -f 4096; {keep}", str(disk), *run]
        child = subprocess.run(limited, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
        reason = "File too large"
    assert child.returncode == 2, child
    assert child.stderr.startswith(f"xipvm: {disk}/t: {reason}; it holds the run's first ")
    assert child.stderr.count("\n") == 1
    copy = disk.with_name("disk.copy")
    shown = xipvm("trace", "show", copy)
    assert len(shown.lines) == int(child.stderr.split("first ")[1].split()[0])
    assert len(shown.lines) > 10_000
    assert shown.err.count("\n") == 1
