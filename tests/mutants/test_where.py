"""Where mutants are seen: what the documentation says of the bugs of 2008, and what a search that sees none says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.errors import BadInput
from xipvm.explore.find import KNOWN
from xipvm.mutants import MUTANTS, get
from xipvm.mutants.hunt import hunt
from xipvm.mutants.reach import why_nothing

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| (B\d+) \| `([^`]+)` \| [^|]+ \| `([^`]+)` \|$", re.MULTILINE)
TABLE = ROW.findall((DOCS / "xip.md").read_text())
HOLE = "hole-read-while-it-is-filled"


def test_the_table_has_them_all() -> None:
    assert [row[0] for row in TABLE] == [f"B{number}" for number in range(1, 13)]


@pytest.mark.parametrize(("number", "name", "scenario"), TABLE)
def test_a_bug_is_seen_where_the_table_says(number: str, name: str, scenario: str) -> None:
    mutant = MUTANTS[name]
    assert mutant.number == number
    assert "2008" in KNOWN[scenario].protocols
    assert why_nothing(mutant, KNOWN[scenario], "2008").startswith("was not seen here")
    found = hunt(mutant, {scenario: KNOWN[scenario]}, ("pct",), runs=400, enough=1, shrunk=False)
    assert found.caught, scenario


def test_a_number_names_what_has_it_alone() -> None:
    assert get("B3") is MUTANTS["xip-hole-mapped-behind-its-filling"]
    assert get("B1").number == "B1"  # and not B10
    with pytest.raises(BadInput, match=r"^M22 is the number of .*, .*: say which$"):
        get("M22")
    with pytest.raises(BadInput, match="no mutant is called 'B99'"):
        get("B99")


@pytest.mark.parametrize(
    ("mutant", "protocol", "why"),
    [
        ("B1", "modern", f"makes no difference in {HOLE} (modern): nobody calls XipFile._chunk"),
        ("B11", "2008", f"makes no difference in {HOLE} (2008): nobody calls XipFile._counted"),
        (
            "huge-page-moves-unannounced",
            "modern",
            f"makes no difference in {HOLE} (modern): nobody calls migrate.migrate_huge_page",
        ),
        ("B3", "modern", "is a fault of the 2008 protocol: --protocol 2008"),
        ("B8", "2008", "was not seen here, though what it changes is called"),
    ],
)
def test_a_search_that_sees_no_mutant_says_why(mutant: str, protocol: str, why: str, tmp_path: Path) -> None:
    words = ("--mutant", mutant, "--protocol", protocol, "--runs", "8", "--quiet")
    outcome = inside("explore", HOLE, *words, cwd=tmp_path)
    assert outcome.status == 0
    assert outcome.out.endswith("none is wrong\n")
    name = get(mutant).name
    assert outcome.err == f"xipvm: {name} {why}; 'xipvm mutants --run {name}' says where it is found\n"


def test_a_counterexample_has_the_name_of_what_was_named_by_number(tmp_path: Path) -> None:
    outcome = inside("explore", HOLE, "--mutant", "B3", "--protocol", "2008", "--quiet", cwd=tmp_path)
    assert outcome.status == 1
    assert outcome.err == ""
    assert get("B3").name in (tmp_path / f"{HOLE}.xipvm.json").read_text()
