"""Runs of pytest inside of pytest: what a user's project would see."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest

import xipvm.pytest_support  # noqa: F401

# Native modules are loaded once a process, and an inner run forgets what it has loaded: the outer one was first.

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """``run(*options)``: pytest in the directory of ``pytester``, with the plugin as if xipvm was installed."""

    def run(*options: object) -> pytest.RunResult:
        return pytester.runpytest_inprocess("-p", "xipvm.pytest_plugin", "--strict-markers", *map(str, options))

    return run
