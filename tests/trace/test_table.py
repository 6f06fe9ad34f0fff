"""The table of pages against a dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.trace.table import Table

# Neighbours, multiples of a block's length, and anything: what pages come as.
keys = st.one_of(st.integers(0, 40), st.integers(0, 40).map(lambda n: n * 512), st.integers(0, 2**60))
steps = st.lists(st.tuples(st.booleans(), keys, st.integers(0, 2**64 - 1)), max_size=200)


@settings(deadline=None)
@given(steps, keys, keys)
def test_it_does_what_a_dictionary_does(steps: list[tuple[bool, int, int]], start: int, end: int) -> None:
    table, known = Table(), dict[int, tuple[int, int]]()
    for removes, key, value in steps:
        if removes:
            assert table.pop(key) == known.pop(key, None)
        else:
            table.set(key, value, 1)
            known[key] = value, 1
        assert len(table) == len(known)
    assert list(table) == sorted(known)
    assert {key: table.get(key) for key in known} == known
    assert table.get(2**61) is None
    assert 2**61 not in table
    assert table.keys(start, end) == sorted(key for key in known if start <= key < end)


def test_what_was_large_is_small_again() -> None:
    table = Table()
    for key in range(5000):
        table.set(key, key)
    for key in range(4990):
        table.pop(key)
    assert table.keys(0, 2**60) == list(range(4990, 5000))
    assert [table.get(key) for key in range(4988, 4992)] == [None, None, (4990, 0), (4991, 0)]
