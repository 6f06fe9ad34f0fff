"""The test finisher ends and restarts machines."""

from __future__ import annotations

import pytest

from xipvm.devices.finisher import Finisher


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, 0x5555, [("finisher pass", 0)]),
        (0, 0x7_3333, [("finisher fail", 7)]),
        (0, 0x3333, [("finisher fail", 1)]),
        (0, 0x7777, ["reset"]),
        (0, 0x1234, []),
        (4, 0x5555, []),
    ],
)
def test_what_a_word_does(offset: int, value: int, expected: list[object]) -> None:
    done: list[object] = []
    finisher = Finisher(lambda reason, status: done.append((reason, status)), lambda: done.append("reset"))
    finisher.write(offset, 4, value)
    assert done == expected
    assert finisher.read(0, 4) == 0
