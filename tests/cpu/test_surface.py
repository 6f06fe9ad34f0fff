"""The stub of the native core names what the core has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from xipvm.cpu import core

STUB = ast.parse((Path(__file__).parents[2] / "xipvm/cpu/core.pyi").read_text())


def names(body: list[ast.stmt]) -> set[str]:
    """What these statements define, without imports and special methods."""
    found = set()
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found.add(statement.target.id)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.add(statement.name)
    return {name for name in found if not name.startswith("_")}


def public(namespace: object) -> set[str]:
    return {name for name in vars(namespace) if not name.startswith("_")}


def test_the_module_has_what_the_stub_names_and_no_more() -> None:
    modules_and_imports = {"annotations", "importlib", "os", "InternalError"}
    assert public(core) - modules_and_imports == names(STUB.body)


@pytest.mark.parametrize(
    "stub", [node for node in STUB.body if isinstance(node, ast.ClassDef)], ids=lambda node: node.name
)
def test_each_class_has_what_the_stub_names_and_no_more(stub: ast.ClassDef) -> None:
    assert public(getattr(core, stub.name)) - {"report_drop"} == names(stub.body)
