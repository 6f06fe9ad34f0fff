"""The ordering oracle: judges a run by its events, while it runs or from a trace file."""

from xipvm.check.explain import reader_of
from xipvm.check.oracle import Oracle
from xipvm.check.violation import INVARIANTS, Violation

__all__ = ["INVARIANTS", "Oracle", "Violation", "reader_of"]
