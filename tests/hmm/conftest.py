"""Both kinds of devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hmm.world import World


@pytest.fixture(params=[False, True], ids=["private", "coherent"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A host whose devices have memory that the CPU does not reach, or reaches."""
    made = World(request.param)
    yield made
    made.end()
