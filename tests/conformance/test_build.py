"""The committed conformance programs are what their sources give, and their model is right about the hard cases."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def load_build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conformance = load_build_script()
model = sys.modules["model"]


@pytest.mark.slow
def test_rebuild_is_byte_identical() -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip(f"the guests' compiler is missing: {sys.executable} -m pip install {conformance.guests.ZIGLANG}")
    assert conformance.check() == []


def test_one_elf_for_each_program() -> None:
    names = [name for name, _ in conformance.programs.programs()]
    assert len(names) == len(set(names)) == 87
    assert {path.stem for path in conformance.BIN.glob("*.elf")} == set(names)


@pytest.mark.parametrize(
    ("name", "a", "b", "result"),
    [
        ("div", 7, 0, -1),
        ("div", -(1 << 63), -1, -(1 << 63)),
        ("div", -7, 2, -3),
        ("rem", -7, 2, -1),
        ("rem", 7, 0, 7),
        ("rem", -(1 << 63), -1, 0),
        ("divw", -(1 << 31), -1, -(1 << 31)),
        ("divuw", 1 << 32, 3, 0),
        ("remuw", 0x80000000, 0, -0x80000000),
        ("mulhsu", -1, -1, -1),
        ("mulhu", -1, -1, -2),
        ("mulh", -1, -1, 0),
    ],
)
def test_model_by_the_manual(name: str, a: int, b: int, result: int) -> None:
    mask = model.MASK
    assert model.MULTIPLY[name](a & mask, b & mask) == result & mask
