"""Which of the two drivers is tested: ``--driver mirror``, as its author wrote it, or ``--driver mirror_fixed``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption("--driver", default="mirror", metavar="MODULE", help="mirror or mirror_fixed")


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> ModuleType:
    """The driver's module."""
    return import_module(request.config.getoption("--driver"))
