"""What a short run does not wait for: modules that only some runs need are imported by those."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.command import environment

HELLO = Path(__file__).parents[2] / "guests" / "bin" / "arm64" / "hello-arm64.elf"
LISTING = """
import atexit, json, sys
before = set(sys.modules)
atexit.register(lambda: print('\\n' + json.dumps(sorted(set(sys.modules) - before))))
from xipvm.cli import main
main(sys.argv[1:])
"""

HEAVY = {"capstone", "distributed", "elftools", "numpy", "rich", "unicorn"}
PLAIN = {"bz2", "lzma", "pathlib", "random", "shlex", "shutil", "tempfile", "urllib.parse"}
"""Of Python's own, each some milliseconds, with what they import."""
SOME = {
    "xipvm.check", "xipvm.dirty_log", "xipvm.explore", "xipvm.export", "xipvm.image_memory", "xipvm.mmu.pagemap",
    "xipvm.mmu.swap_file", "xipvm.oom_report", "xipvm.report", "xipvm.storm", "xipvm.trace.recorder", "xipvm.xip",
}  # fmt: skip
"""Of xipvm, for runs with options, and those that go wrong."""


def imported(*argv: object) -> set[str]:
    """The modules that ``xipvm argv`` has imported when it ends, beside those of Python's own start."""
    command = [sys.executable, "-c", LISTING, *map(str, argv)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_plain_run_imports_what_it_needs() -> None:
    modules = imported("run", HELLO)
    assert {"xipvm.machine", "xipvm.mmu.mm"} <= modules
    assert not modules & (HEAVY | PLAIN | SOME)


@pytest.mark.parametrize(
    ("options", "module"), [(("--swap", "1M"), "xipvm.mmu.swap_file"), (("--dirty-log",), "xipvm.dirty_log")]
)
def test_a_run_with_options_imports_what_they_are(options: tuple[str, ...], module: str) -> None:
    """That is, the list above has names that there are."""
    assert module in imported("run", *options, HELLO)


def test_help_imports_no_machine() -> None:
    modules = imported("--help")
    assert {name for name in modules if name.startswith("xipvm")} == {
        "xipvm", "xipvm.address", "xipvm.cli", "xipvm.cli.commands", "xipvm.cli.xip", "xipvm.errors",
    }  # fmt: skip
    assert not modules & HEAVY
