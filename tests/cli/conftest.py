from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from xipvm.cli import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def xipvm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``xipvm(*argv)``: run the command line in this process; its status and what it printed."""

    def call(*argv: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in argv])
        out, err = capfd.readouterr()
        return Outcome(ended.value.code, out, err)

    return call
