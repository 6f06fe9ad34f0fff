"""The public surface: what is listed is there, and nothing is imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import xipvm
import xipvm.testing

INIT = Path(xipvm.__file__)


def test_every_name_is_where_it_is_said_to_be() -> None:
    for name in xipvm.__all__:
        assert getattr(xipvm, name).__name__ == name


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(INIT.read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == xipvm._HOMES
    assert sorted(seen) == sorted(xipvm.__all__)


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, xipvm; print([name for name in sys.modules if name.startswith('xipvm.')])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=INIT.parents[1]).stdout == "[]\n"


def test_what_tests_import_is_there() -> None:
    assert len(set(xipvm.testing.__all__)) == len(xipvm.testing.__all__)
    assert all(hasattr(xipvm.testing, name) for name in xipvm.testing.__all__)
