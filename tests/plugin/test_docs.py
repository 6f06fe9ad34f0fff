"""What docs/testing.md shows is a test file that passes; what the README walks through is what happens."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.conftest import Run
from tests.run.command import DEADLINE, ROOT, environment

PROGRAMS = {"pytest": ("pytest", "-p", "xipvm.pytest_plugin"), "xipvm": ("xipvm",)}
SECTION = re.compile(r"^## Your own secondary MMU\n(.*?)^## ", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_examples_of_the_page_are_a_test_file_that_passes(pytester: pytest.Pytester, run: Run) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    pytester.makepyfile(test_mine="\n".join(blocks))
    run().assert_outcomes(passed=3)


def plain(line: str) -> str:
    """Without numbers, which any change to the model may change, and without what is left out at the end."""
    return re.sub(r"0x[0-9a-f]+|\d+", "0", line.strip().removesuffix("..."))


@pytest.mark.slow
def test_the_readme_s_tutorial(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".xipvm", "__pycache__"))
    found = SECTION.search((ROOT / "README.md").read_text())
    assert found is not None
    text = re.sub(r"^```.*?^```$", "", found.group(1), flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    commands = 0
    said: list[str] = []
    for block in blocks:
        for line in block.splitlines():
            program = line.split()[0]
            if program in PROGRAMS:
                words = shlex.split(line, comments=True)
                commands += 1
                child = subprocess.run(
                    [sys.executable, "-m", *PROGRAMS[program], *words[1:]],
                    capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=DEADLINE, check=False,
                )  # fmt: skip
                said = [plain(each) for each in child.stdout.splitlines()]
                shown = line.partition("#")[2].strip()
                assert not shown or any(plain(shown) in each for each in said), child.stdout
            elif program != "diff":
                assert any(each.startswith(plain(line)) for each in said), f"{line!r} is not in {said}"
    assert commands >= 4
