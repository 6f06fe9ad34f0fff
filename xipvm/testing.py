"""What tests of secondary MMUs import: the parts of a driver, scenes, and assertions over traces.

The fixtures and the marker for pytest come with the plugin (pytest_plugin.py) and need no import. docs/testing.md walks
through both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xipvm.actors import give_way, point, wait
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import INVARIANTS, Oracle, Violation
from xipvm.errors import MmError
from xipvm.explore import Scenario, Scene, Search, explore, replay, scenario, shrink, strategy
from xipvm.explore.choices import Recording
from xipvm.explore.scene import BrokenError
from xipvm.explore.scripted import GuestAccessError, ScriptedVcpu
from xipvm.locks import LockClass, RwLock, atomic, checking, might_sleep
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import FAULT, FETCH, MMIO, READ, RETRY_WALK, WRITE, SecondaryMmu
from xipvm.mmu.secondary.device import DeviceMmu, IntervalMmu
from xipvm.mmu.secondary.table import TableMmu
from xipvm.mmu.vma import PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE
from xipvm.notifier import MmuIntervalNotifier, MmuNotifier, MmuNotifierRange, RangeEvent
from xipvm.trace import Event, Trace
from xipvm.trace.expect import Every, TraceLog
from xipvm.trace.timeline import timeline

__all__ = [
    "FAULT",
    "FETCH",
    "INVARIANTS",
    "MADV_DONTNEED",
    "MADV_FREE",
    "MADV_PAGEOUT",
    "MMIO",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "READ",
    "RETRY_WALK",
    "WRITE",
    "BrokenError",
    "DeviceMmu",
    "Event",
    "Every",
    "GuestAccessError",
    "HostAccessError",
    "HostThread",
    "IntervalMmu",
    "LockClass",
    "Mm",
    "MmError",
    "MmuIntervalNotifier",
    "MmuNotifier",
    "MmuNotifierRange",
    "Oracle",
    "RangeEvent",
    "RwLock",
    "Scenario",
    "Scene",
    "ScriptedVcpu",
    "Search",
    "SecondaryMmu",
    "TableMmu",
    "Trace",
    "TraceLog",
    "Violation",
    "atomic",
    "checking",
    "explore",
    "give_way",
    "might_sleep",
    "open_scene",
    "plain_scene",
    "point",
    "replay",
    "scenario",
    "shrink",
    "strategy",
    "timeline",
    "wait",
]


def plain_scene(**options: Any) -> Scene:
    """A scene in which nothing is left to chance: actors, if there are any, run one after the other.

    For tests that do one thing at a time, such as a state machine of Hypothesis. ``scene.run()`` checks at the end what
    a scene checks; ``scene.close()`` gives everything back. ``options`` are those of :class:`Scene`.
    """
    return Scene(Recording(lambda question: 0), **options)


@contextmanager
def open_scene(**options: Any) -> Iterator[Scene]:
    """A :func:`plain_scene` that is checked at the end of the context, if that ends well, and closed."""
    scene = plain_scene(**options)
    try:
        yield scene
        scene.run()
    finally:
        scene.close()
