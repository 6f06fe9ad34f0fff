"""What imports what: the direction of dependence, for all modules, native ones too, and also for types alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = re.compile(r"^ *(?:from (xipvm[\w.]*) c?import \(?([\w, ]*)|c?import (xipvm[\w.]*))", re.MULTILINE)

NEUTRAL = {"actors", "address", "clock", "console", "errors", "file_option", "host_mapping", "image_file", "locks"}
"""What everybody may import; none of it knows of anything else."""

MAY = {
    "trace": set[str](),
    "notifier": {"trace"},
    "check": {"trace"},
    "mmu": {"notifier", "trace", "xpmem"},
    "xip": {"mmu", "notifier", "trace"},
    "devices": {"trace"},
    "boards": {"devices"},
    "loader": {"boards"},
    "cpu": {"devices", "mmu", "trace"},
    "conform": {"mmu", "notifier", "trace"},
}
"""Whom a package may import beside those: the machine and what stands on it nobody of these."""


def imported(folder: str) -> dict[str, set[str]]:
    """By file of ``folder``: the packages and top-level modules of xipvm that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "xipvm" / folder).rglob("*.p*")):
        if path.suffix not in (".py", ".pyi", ".pyx", ".pxd", ".pxi"):
            continue
        names = found.setdefault(str(path.relative_to(ROOT)), set())
        for home, what, plain in IMPORT.findall(path.read_text()):
            module = home or plain
            if module == "xipvm":
                names.update(name.strip() for name in what.split(",") if name.strip())
            else:
                names.add(module.split(".")[1])
    return found


@pytest.mark.parametrize("package", MAY)
def test_a_package_imports_what_is_below_it(package: str) -> None:
    files = imported(package)
    assert files
    allowed = MAY[package] | NEUTRAL | {package}
    wrong = {path: names - allowed for path, names in files.items() if names - allowed}
    assert not wrong


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_neutral_imports_only_its_like(name: str) -> None:
    path = ROOT / "xipvm" / name
    files = (
        imported(name)
        if path.is_dir()
        else {
            name: {
                home.split(".")[1] for home, _, _ in IMPORT.findall(path.with_suffix(".py").read_text()) if "." in home
            }
        }
    )
    assert set().union(*files.values()) <= NEUTRAL


def test_messages_between_nodes_know_no_memory_management() -> None:
    """The owner's side is an MMU and imports them."""
    files = imported("xpmem")
    for name in ("wire", "link", "sockets"):
        assert not files[f"xipvm/xpmem/{name}.py"] & set(MAY) - {"trace"}


def test_every_native_module_is_built() -> None:
    """One that setup.py does not name is missing where it is installed."""
    setup = (ROOT / "setup.py").read_text()
    modules = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in (ROOT / "xipvm").rglob("*.pyx")
    }
    assert modules == set(re.findall(r'"(xipvm\.[\w.]+)"', setup))


def test_every_folder_is_a_package() -> None:
    """One without ``__init__.py`` is missing where it is installed."""
    folders = {path.parent for path in (ROOT / "xipvm").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
