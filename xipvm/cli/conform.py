"""``xipvm conform``: replaying recorded scenarios of Linux and KVM."""

from __future__ import annotations

import sys

from xipvm.cli.output import print_json
from xipvm.conform.report import DIFFERS, UNSUPPORTED, lines, replay, to_json
from xipvm.conform.scenario import find, load


def conform(paths: list[str], *, detail: bool, skip_unsupported: bool, as_json: bool) -> int:
    """Replay every scenario of ``paths`` and print what differs. The exit status; raises BadInput before the first."""
    scenarios = [load(path) for path in find(paths)]
    reports = [replay(scenario, detail=detail) for scenario in scenarios]
    if as_json:
        print_json(to_json(reports))
    else:
        for line in lines(reports):
            sys.stdout.write(f"{line}\n")
    failing = {DIFFERS} if skip_unsupported else {DIFFERS, UNSUPPORTED}
    return int(any(report.verdict in failing for report in reports))
