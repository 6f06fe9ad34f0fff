from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xpmem.world import World, world


@pytest.fixture
def there() -> Iterator[World]:
    with world() as made:
        yield made
