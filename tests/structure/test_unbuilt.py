"""Sources whose native parts are not built say what to do, whatever of them is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import xipvm

PACKAGE = Path(xipvm.__file__).parent


def copied(target: Path, *, native: bool) -> Path:
    """A checkout, without all that is not needed to import the package itself."""
    (target / "xipvm" / "mmu").mkdir(parents=True)
    shutil.copy(PACKAGE / "__init__.py", target / "xipvm")
    shutil.copy(PACKAGE / "errors.py", target / "xipvm")
    for name in ("__init__.py", "frames.pyx"):
        shutil.copy(PACKAGE / "mmu" / name, target / "xipvm" / "mmu")
    if native:
        (target / "xipvm" / "mmu" / f"frames{EXTENSION_SUFFIXES[0]}").touch()
    return target


def run(where: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where, timeout=60)


@pytest.mark.parametrize("code", ["import xipvm", "from xipvm.mmu.frames import HostMemory", "import xipvm.errors"])
def test_sources_that_are_not_built_say_how_to_build_them(tmp_path: Path, code: str) -> None:
    done = run(copied(tmp_path, native=False), code)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: these are xipvm's sources, and its native parts are not built for this Python")
    assert f"run 'pip install -e .' in {tmp_path}" in last


def test_sources_that_are_built_are_imported(tmp_path: Path) -> None:
    assert run(copied(tmp_path, native=True), "import xipvm.errors").returncode == 0
