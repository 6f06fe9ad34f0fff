"""MMU notifiers: how the primary MMU tells secondary MMUs to drop what they cached.

:class:`MmuNotifiers` is what an mm has, :class:`MmuNotifier` what registers with it, :class:`MmuNotifierRange` what is
announced.
"""

from xipvm.notifier.notifier import MmuNotifier
from xipvm.notifier.range import MmuNotifierRange, RangeEvent
from xipvm.notifier.registry import Invalidation, MmuNotifiers, NotifiedMm

__all__ = ["Invalidation", "MmuNotifier", "MmuNotifierRange", "MmuNotifiers", "NotifiedMm", "RangeEvent"]
