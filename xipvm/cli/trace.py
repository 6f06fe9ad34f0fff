"""``xipvm trace``: looking into trace files."""

from __future__ import annotations

import sys

from xipvm.trace.reader import TraceReader
from xipvm.trace.show import Filter, shown


def show_trace(path: str, wanted: Filter, *, as_json: bool) -> None:
    """Print the events of the trace ``path`` that ``wanted`` lets through. Raises BadInput, behind what is sound."""
    with TraceReader(path) as reader:
        try:
            for line in shown(reader, wanted, as_json=as_json):
                sys.stdout.write(f"{line}\n")
        finally:
            # Before the complaint about the file, which goes to stderr.
            sys.stdout.flush()
        if not reader.closed:
            sys.stderr.write(f"xipvm: note: {path}: its run died; what it had recorded is complete\n")
