"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from xipvm.locks import checking

pytest_plugins = ["pytester"]  # tests/plugin runs pytest


@pytest.fixture
def checked_locks() -> Iterator[None]:
    """The rules of locking are checked during the test."""
    with checking():
        yield


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With XIPVM_FORBID_SKIPS set, a skipped test fails the run: there, every tool is installed."""
    if not os.environ.get("XIPVM_FORBID_SKIPS") or exitstatus != 0:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped:
        for report in skipped:
            reporter.write_line(f"skipped, and may not be: {report.nodeid}: {report.longrepr}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
