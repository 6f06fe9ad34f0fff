"""MMU notifiers: how the primary MMU tells secondary MMUs to drop what they cached.

:class:`MmuNotifiers` is what an mm has. With it register a :class:`MmuNotifier`, which is told of every change, and a
:class:`MmuIntervalNotifier`, which watches one range. What is announced is a :class:`MmuNotifierRange`.
"""

from xipvm.locks.check import atomic, might_sleep
from xipvm.notifier.interval import ULONG_MAX, IntervalTree, MmuIntervalNotifier
from xipvm.notifier.invalidation import Invalidation
from xipvm.notifier.mm import NotifiedMm
from xipvm.notifier.notifier import MmuNotifier, Subscriber
from xipvm.notifier.notifier_2008 import MmuNotifier2008
from xipvm.notifier.protocol import PROTOCOLS, notifiers_of
from xipvm.notifier.range import MmuNotifierRange, RangeEvent
from xipvm.notifier.registry import MmuNotifiers
from xipvm.notifier.registry_2008 import MmuNotifiers2008

__all__ = [
    "PROTOCOLS",
    "ULONG_MAX",
    "IntervalTree",
    "Invalidation",
    "MmuIntervalNotifier",
    "MmuNotifier",
    "MmuNotifier2008",
    "MmuNotifierRange",
    "MmuNotifiers",
    "MmuNotifiers2008",
    "NotifiedMm",
    "RangeEvent",
    "Subscriber",
    "atomic",
    "might_sleep",
    "notifiers_of",
]
