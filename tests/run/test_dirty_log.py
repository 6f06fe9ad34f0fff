"""``xipvm run --dirty-log`` and ``--dirty-ring``: the same guest, and how many pages it wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.run.command import ISAS, guest, inside
from xipvm import BadInput, Machine
from xipvm.storm import Storm


def written(*options: object, cwd: Path, isa: str) -> int:
    outcome = inside("run", *options, guest("pages", isa), cwd=cwd)
    assert outcome.status == 0, outcome
    assert "pages: 0 wrong" in outcome.out
    found = re.search(r"dirty log: (\d+) pages of RAM written", outcome.err)
    assert found is not None, outcome.err
    return int(found[1])


@pytest.mark.parametrize("isa", ISAS)
def test_bitmaps_and_rings_agree(isa: str, tmp_path: Path) -> None:
    pages = written("--dirty-log", cwd=tmp_path, isa=isa)
    assert 4096 < pages < 4120  # those that it is about, its data and its stack
    assert written("--dirty-ring", 1024, cwd=tmp_path, isa=isa) == pages


def test_several_vcpus_with_rings(tmp_path: Path) -> None:
    outcome = inside("run", "--dirty-ring", 128, "--smp", 4, guest("token", "arm64"), cwd=tmp_path)
    assert outcome.status == 0, outcome
    assert "token: 4 cpus" in outcome.out
    assert "pages of RAM written" in outcome.err


def test_nothing_is_said_without(tmp_path: Path) -> None:
    assert "dirty log" not in inside("run", guest("hello", "arm64"), cwd=tmp_path).err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--dirty-ring", 100), "a power of 2 and above 64"),
        (("--dirty-ring", 1 << 20), "65536 is the most"),
        (("--dirty-log", "--secondary", "gru"), "only the secondary MMU kvm keeps a dirty log"),
        (("--dirty-log", "--storm", 1), "a storm turns dirty logs on and off"),
    ],
)
def test_bad_input(options: tuple[object, ...], why: str, tmp_path: Path) -> None:
    outcome = inside("run", *options, guest("hello", "arm64"), cwd=tmp_path)
    assert outcome.status == 2
    assert why in outcome.err


def test_in_python() -> None:
    with Machine(guest("hello", "arm64"), dirty_log=0) as machine:
        machine.run()
        assert machine.summary().dirty_pages == len(machine.dirty_log.pages) > 0  # type: ignore[union-attr]
    with pytest.raises(BadInput):
        Machine(guest("hello", "arm64"), dirty_log=0, storm=Storm(1))
