"""The event trace: one funnel, typed events, recorder and readers.

:class:`Trace` is where a machine's parts emit; :class:`Event` is what sinks and readers see.
"""

from xipvm.trace.events import Event, Runs
from xipvm.trace.funnel import Trace

__all__ = ["Event", "Runs", "Trace"]
