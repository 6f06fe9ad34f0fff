"""``--host-memory`` and ``--swap``: what is refused, in one line; and what the summary says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HELLO = Path(__file__).parents[2] / "guests" / "bin" / "arm64" / "hello-arm64.elf"

Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--host-memory", "8K"), "host memory of 8 KiB: give 1 MiB or more, whole pages of 4 KiB"),
        (("--host-memory", "1025K"), "host memory of 1025 KiB: give 1 MiB or more, whole pages of 4 KiB"),
        (("--host-memory", "1048577"), "host memory of 1048577 B: give 1 MiB or more, whole pages of 4 KiB"),
        (("--host-memory", "0"), "host memory of 0 B: give 1 MiB or more, whole pages of 4 KiB"),
        (("--host-memory", "1000T"), "1000 TiB of host memory: the host has"),
        (("--host-memory", "much"), "'much' is not a size"),
        (("--swap", ""), "no swap is named; write SIZE or FILE[,size=SIZE]"),
        (("--swap", "0"), "0: swap of 0 B: give 8 KiB to 1 TiB, whole pages of 4 KiB"),
        (("--swap", "10000"), "10000: swap of 10000 B: give 8 KiB to 1 TiB"),
        (("--swap", "none.img"), "none.img: there is no such swap file; none.img,size=128M makes one, of that size"),
        (("--swap", "no/dir,size=1M"), "no/dir: No such file or directory"),
        (("--swap", "letter"), "letter: is not a swap file, and has content"),
        (("--swap", "letter,size=1M"), "letter: is not a swap file, and has content"),
        (("--swap", "x,size=big"), "x: 'big' is not a size"),
        (("--swap", "x,pages=5"), "x: 'pages=5' is no setting of a swap file; there is size=SIZE"),
        (("--swap", "."), ".: "),
    ],
)
def test_what_is_refused(
    xipvm: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letter").write_text("dear " * 3000)
    outcome = xipvm("run", "--input", os.devnull, *options, HELLO)
    assert (outcome.status, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert complaint in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter"]


def test_a_guest_that_fits_says_nothing_of_swap(xipvm: Call) -> None:
    outcome = xipvm("run", "--input", os.devnull, "--host-memory", "2M", "--swap", "1M", HELLO)
    assert outcome.status == 0
    assert len(outcome.err.splitlines()) == 3
    assert "swap" not in outcome.err


def test_an_image_that_the_host_cannot_hold(xipvm: Call, tmp_path: Path) -> None:
    """It is loaded into RAM before the guest runs: that is bad input, not a killed guest."""
    from tests.loader.conftest import write_elf

    path = tmp_path / "large.elf"
    path.write_bytes(write_elf({"paddr": 0x4020_0000, "data": b"\x01" * (3 << 20)}, entry=0x4020_0000, machine=183))
    refused = xipvm("run", "--input", os.devnull, "--host-memory", "1M", path)
    assert (refused.status, refused.err) == (2, "xipvm: 1 MiB of host memory cannot hold the guest's image\n")
    taken = xipvm("run", "--input", os.devnull, "--host-memory", "1M", "--swap", "8M", "--max-instructions", "10", path)
    assert taken.status in (1, 124)
    assert "swap-out" in taken.err


def test_a_size_with_a_zero_in_front_is_decimal(xipvm: Call) -> None:
    assert xipvm("run", "--quiet", "--input", os.devnull, "--memory", "016M", HELLO).status == 0
