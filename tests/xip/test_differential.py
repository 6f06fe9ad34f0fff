"""A slice of the comparison with an ordinary file; differential.py by itself runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.xip.differential import CONFIGS, Different, Pair
from xipvm.xip.filemap import XipFile


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_bytes_sizes_and_errors(tmp_path: Path, config: str) -> None:
    pair = Pair(tmp_path, config)
    counts = sum((pair.run(seed, 24) for seed in range(150)), start=pair.run(1000, 24))
    pair.close()
    assert min(counts[what] for what in ("read", "write", "append", "truncate", "punch", "load", "store")) > 20
    assert min(counts["limit"], counts["EFBIG"]) > 20
    assert counts["EFAULT"] > 5


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("_zero_tail", lambda self: None), ("_largest", lambda self, limit: self.inode.max_bytes)],
)
def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, wrong: object) -> None:
    pair = Pair(tmp_path, "ext2 modern")
    monkeypatch.setattr(XipFile, method, wrong)

    def run() -> None:
        for seed in range(300):
            pair.run(seed, 24)

    with pytest.raises(Different, match="seed"):
        run()
    pair.close()
