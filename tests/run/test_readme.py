"""What README.md and the pages in docs/ show as a Python example is what it does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.run.command import DEADLINE, ROOT, environment

PAGES = (
    "README.md",
    "docs/hugetlb.md",
    "docs/thp.md",
    "docs/userfaultfd.md",
    "docs/xpmem.md",
    "docs/odp.md",
    "docs/dmirror.md",
    pytest.param(
        "docs/xip.md",
        marks=pytest.mark.skipif(not shutil.which("mke2fs"), reason="needs mke2fs: apt-get install e2fsprogs"),
    ),
)


class Block(NamedTuple):
    """A fenced block: its language, and its text."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_example_prints_what_follows_it(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    place = next(number for number, block in enumerate(found) if block.language == "python")
    shown = found[place + 1]
    assert shown.language in ("", "text", "console"), "the block behind the example is what it prints"
    # It names files as they lie in the repository; what it makes must not end up there.
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".gitignore"):
            (tmp_path / entry.name).symlink_to(entry)
    child = subprocess.run(
        [sys.executable, "-c", found[place].text],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert (child.returncode, child.stderr) == (0, "")
    assert [line.rstrip() for line in child.stdout.splitlines()] == shown.text.splitlines()
