"""``xipvm check``: the ordering oracle over recorded runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from xipvm.check import INVARIANTS, Oracle
from xipvm.trace.reader import TraceReader


def check_traces(paths: Sequence[str], invariants: Sequence[str], *, as_json: bool) -> int:
    """Judge the traces ``paths``; 0 when nothing is broken, 1 when something is. Raises BadInput."""
    broken = False
    for path in paths:
        oracle = Oracle(invariants or tuple(INVARIANTS))
        with TraceReader(path) as reader:
            for event in reader:
                oracle(event)
            if reader.closed:  # what never ended cannot be held against a run that was cut off
                oracle.finish()
        violations = oracle.violations
        broken = broken or bool(violations)
        if as_json:
            found = [
                {"invariant": each.invariant, "message": each.message, "seq": each.event.seq} for each in violations
            ]
            checks = {name: oracle.checks[name] for name in INVARIANTS if name in oracle.invariants}
            print(json.dumps({"trace": path, "events": oracle.events, "checks": checks, "violations": found}))
            continue
        for violation in violations:
            print(violation.render())
        asked = sum(oracle.checks[name] for name in oracle.invariants)
        print(f"{path}: {oracle.events} events, {asked} checks, {len(violations)} violations")
    sys.stdout.flush()
    return 1 if broken else 0
