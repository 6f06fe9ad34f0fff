"""A slice of the damaged images; fuzz_images.py by itself makes as many as one likes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.xip.fuzz_images import damage, exercise, make_good, used_blocks


@pytest.mark.slow
def test_damaged_images_give_proper_errors(tmp_path: Path) -> None:
    path = tmp_path / "image"
    good = make_good(path)
    used = used_blocks(good)
    said: Counter[str] = Counter()
    for seed in range(400):
        path.write_bytes(damage(good, used, seed))
        said += exercise(path)
    assert not said["unprintable"]
    assert min(said[what] for what in ("done", "refused", "EUCLEAN", "ESTALE")) > 10


def test_the_good_image_itself_is_used_to_the_full(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_good(path)
    assert set(exercise(path)) == {"done", "ELOOP"}
