"""docs/conformance.md explains every deviation in the detail part, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xipvm.conform.report import replay
from xipvm.conform.scenario import find, load

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "conformance.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (`.+`) \| (.+) \|$", TEXT, re.MULTILINE)
CAUSES = set(re.findall(r"^\| \*([\w -]+)\* \|", TEXT, re.MULTILINE))


def test_the_table_is_what_detail_says() -> None:
    found = {
        (report.scenario.name, difference.field.removeprefix("detail "))
        for report in (replay(load(path), detail=True) for path in find([str(ROOT / "tests" / "golden")]))
        for step in report.steps
        for difference in step.detail
    }
    explained = {(name, field) for name, fields, _ in ROWS for field in re.findall(r"`(\w+)`", fields)}
    assert explained == found


@pytest.mark.parametrize(("name", "causes"), [(name, causes) for name, _, causes in ROWS])
def test_every_cause_is_explained(name: str, causes: str) -> None:
    assert set(causes.split(", ")) <= CAUSES


def test_no_cause_is_left_over() -> None:
    assert {cause for _, _, causes in ROWS for cause in causes.split(", ")} == CAUSES
