"""What all tests of notifiers share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _checked_locks(checked_locks: None) -> None:
    """In all tests here."""
