"""MMU notifiers: how the primary MMU tells secondary MMUs to drop what they cached.

:class:`MmuNotifiers` is what an mm has. With it register a :class:`MmuNotifier`, which is told of every change, and a
:class:`MmuIntervalNotifier`, which watches one range. What is announced is a :class:`MmuNotifierRange`.
"""

from xipvm.locks.check import atomic, might_sleep
from xipvm.notifier.interval import ULONG_MAX, IntervalTree, MmuIntervalNotifier
from xipvm.notifier.mm import NotifiedMm
from xipvm.notifier.notifier import MmuNotifier
from xipvm.notifier.range import MmuNotifierRange, RangeEvent
from xipvm.notifier.registry import Invalidation, MmuNotifiers

__all__ = [
    "ULONG_MAX",
    "IntervalTree",
    "Invalidation",
    "MmuIntervalNotifier",
    "MmuNotifier",
    "MmuNotifierRange",
    "MmuNotifiers",
    "NotifiedMm",
    "RangeEvent",
    "atomic",
    "might_sleep",
]
