"""The secondary MMUs that a guest can run behind, by name. To add one is a line of ``_MAKERS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm.errors import BadInput
from xipvm.mmu.secondary.kvm_2008 import kvm_of

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.guest import GuestMmu
    from xipvm.trace.funnel import Trace

Maker = Callable[["Mm", "Trace", "HostMemory"], "GuestMmu"]
"""Makes one that speaks the protocol of the mm, and registers it."""


def _gru(mm: Mm, trace: Trace, host: HostMemory) -> GuestMmu:
    from xipvm.mmu.secondary.gru_2008 import gru_of

    return gru_of(mm, trace, host)


def _kvm_shadow(mm: Mm, trace: Trace, host: HostMemory) -> GuestMmu:
    from xipvm.mmu.secondary.shadow import kvm_shadow_of

    return kvm_shadow_of(mm, trace, host)


_MAKERS: Final[dict[str, Maker]] = {
    "kvm": kvm_of,
    "kvm-shadow": _kvm_shadow,
    "gru": _gru,
}
SECONDARIES: Final = tuple(_MAKERS)
"""``kvm``: shadow entries by guest frame, and TLBs. ``kvm-shadow``: by guest virtual address, too.
``gru``: TLBs only, every miss of which is a fault."""
PINNING: Final = "kvm"
"""The one that can do without notifiers."""


def check_secondary(name: str, *, pin_sptes: bool = False) -> None:
    """Raises BadInput when no secondary MMU is called ``name``, or it cannot pin what it maps and shall."""
    if name not in _MAKERS:
        raise BadInput(f"no secondary MMU is called {name!r}; known are {', '.join(SECONDARIES)}")
    if pin_sptes and name != PINNING:
        raise BadInput(f"the secondary MMU {name} cannot do without notifiers: pinned sptes are for {PINNING} only")


def make_secondary(name: str, mm: Mm, trace: Trace, host: HostMemory, *, pin_sptes: bool = False) -> GuestMmu:
    """The secondary MMU ``name`` on ``mm``. Raises BadInput as :func:`check_secondary`."""
    check_secondary(name, pin_sptes=pin_sptes)
    if pin_sptes:
        return kvm_of(mm, trace, host, pin_sptes=True)
    return _MAKERS[name](mm, trace, host)
