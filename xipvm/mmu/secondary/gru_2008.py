"""The GRU's driver as it was when MMU notifiers began (Linux 2.6.29 had it, on the protocol of 2.6.27).

Ranges are as they are today. A single page is announced when its entry is gone and the host's CPUs have forgotten it:
``invalidate_page`` flushes it, without counting. A drop-in that has read its fault handle before is discarded by the
hardware; one that reads it afterwards looks the new page up.

``release`` comes when the mm dies, after the notifier was unlinked. It sets ``ms_released``: whoever wants the GRU of
that mm later is refused, and its last user must not unregister it again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Self

from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.secondary.gru import Gru, GruBase
from xipvm.notifier import MmuNotifier2008, MmuNotifiers2008, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.trace.funnel import Trace


class Gru2008(GruBase, MmuNotifier2008):
    """The GRU of an mm of the 2008 protocol. An mm has one; :meth:`of` finds it, :meth:`destroy` gives it back."""

    def __init__(self, mm: Mm) -> None:
        GruBase.__init__(self, mm)
        self.references = 0
        """How many use it."""

    @property
    def ms_released(self) -> bool:
        """The mm is gone."""
        return self.released

    @classmethod
    def of(cls, mm: Mm) -> Self:
        """The GRU of ``mm``, made if there is none. Raises MmError: EINVAL when it was released, as registering does.

        2008 had no ``get``: the driver looks through the list by itself.
        """
        for found in mm.notifiers:
            if type(found) is cls:
                break
        else:
            found = cls(mm)
            try:
                mm.notifiers.register(found)
            except BaseException:
                found._leave()
                raise
        if found.ms_released:
            raise MmError(errno.EINVAL, f"{found.name} was released")
        found.references += 1
        return found

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        """See the module."""
        self.invalidations += 1
        self.flush_range(address, address + PAGE_SIZE)

    def invalidate_range_start(self, mm: NotifiedMm, start: int, end: int) -> None:
        """See gru.py."""
        self.begin_range(start, end)

    def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
        """See gru.py."""
        self.end_range()

    def release(self, mm: NotifiedMm) -> None:
        """Forget everything, for good."""
        self._release()

    def destroy(self) -> None:
        """One user less; with the last one everything is forgotten. More calls than users do nothing."""
        if not self.references:
            return
        self.references -= 1
        if self.references:
            return
        if self.subscribed_to is not None and not self.mm.dead:
            self.subscribed_to.unregister(self)
        self._leave()


def gru_of(mm: Mm, trace: Trace, host: HostMemory) -> GruBase:
    """The GRU that speaks the protocol of ``mm``, which has ``trace`` and ``host``."""
    return Gru2008.of(mm) if mm.protocol == MmuNotifiers2008.protocol else Gru.of(mm)
