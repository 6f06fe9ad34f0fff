"""What helps who has mistaken something: help that is whole, complaints before the work, and what to write instead."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xipvm.storm.storm import GROUPS

HELLO = Path(__file__).parents[2] / "guests" / "bin" / "arm64" / "hello-arm64.elf"
SEARCH = ("explore", "fault-against-munmap", "--runs", "1")

Call = Callable[..., Any]


@pytest.mark.parametrize("group", [(), ("xip",), ("flash",), ("trace",)])
def test_no_command_is_described_by_half_a_sentence(
    xipvm: Call, monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = xipvm(*group, "--help").out.partition("Commands:\n")[2].splitlines()
    assert listed
    assert not [line for line in listed if line.endswith("...")]


def test_the_operations_of_a_storm_are_listed(xipvm: Call) -> None:
    """Where there is no documentation but the program itself."""
    assert "'--ops help'" in " ".join(xipvm("storm", "--help").out.split())
    status, out, err = xipvm("storm", "--ops", "help")
    assert (status, err) == (0, "")
    assert out.split() == [word for group, members in GROUPS.items() for word in (group, *members)]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("storm", "--until", "", HELLO), "--until needs a text to wait for"),
        (("storm", "--flash", "x"), "without a GUEST the board has to be named: --board, see 'xipvm boards'"),
        ((*SEARCH, "--save", "no/x"), "no/x: No such file or directory"),
        ((*SEARCH, "--save", "."), ".: Is a directory"),
        ((*SEARCH, "--scheduler", "tcp://x:1"), "--scheduler is for --executor dask"),
        (("explore", ".:x"), ".: Is a directory"),
        (("run", "--input", os.devnull, ""), "'': No such file or directory"),
        (("replay", HELLO), f"{HELLO}: not a counterexample: not a text file"),
        (
            ("trace", "show", "t", "--kind", "page_alok"),
            "the trace knows no event kind 'page_alok'; it knows page_alloc,",
        ),
        (("trace", "show", "t", "--kind", "zzz"), "the trace knows no event kind 'zzz'; a pattern such as 'spte_*'"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    xipvm: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "show" in argv:
        assert xipvm("run", "--quiet", "--input", os.devnull, "--trace", "t", HELLO).status == 0
    before = sorted(tmp_path.iterdir())
    status, out, err = xipvm(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"xipvm: {complaint}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_for_a_counterexample_is_left_as_it_was(
    xipvm: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept").write_text("an older one")
    assert xipvm(*SEARCH, "--save", "kept").status == 0
    assert Path("kept").read_text() == "an older one"
    assert len(list(tmp_path.iterdir())) == 1
