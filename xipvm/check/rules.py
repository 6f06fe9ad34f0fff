"""Rules that live outside of the oracle's own module, one object of each for every oracle.

A module that judges something more appends a factory to ``RULES``::

    class Retries:
        def __init__(self, oracle: Oracle) -> None:
            self._oracle = oracle
            oracle.on("kvm_page_fault", self._began)
            oracle.on("spte_set", self._installed, since_range=True)

    RULES.append(Retries)

and its invariants to ``violation.INVARIANTS``. Handlers are called behind the oracle's own for the same kind; they
count what they ask in ``oracle.checks`` and report by ``oracle.broken``. A handler costs an :class:`Event` and a call
of a Python function at every event of its kind: see :meth:`Oracle.on` for how to be asked less often. A rule that has
a ``finish`` is told when no more events come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from xipvm.trace.events import Event

if TYPE_CHECKING:
    from xipvm.check.oracle import Oracle

Fields = dict[str, Any]
Handler = Callable[[Event, Fields], None]

RULES: Final[list[Callable[[Oracle], object]]] = []
"""Called with every new oracle; what they return is kept as long as that."""
