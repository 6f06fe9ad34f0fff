"""The two protocols, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.errors import BadInput
from xipvm.notifier.registry import MmuNotifiers
from xipvm.notifier.registry_2008 import MmuNotifiers2008

if TYPE_CHECKING:
    from xipvm.notifier.mm import NotifiedMm

_REGISTRIES: Final[dict[str, type[MmuNotifiers]]] = {
    registry.protocol: registry for registry in (MmuNotifiers, MmuNotifiers2008)
}
PROTOCOLS: Final = tuple(_REGISTRIES)
"""``modern``: announced before, may sleep, says what changes. ``2008``: how it began."""


def notifiers_of(mm: NotifiedMm, protocol: str) -> MmuNotifiers:
    """The notifiers of a new mm that speaks ``protocol``, one of PROTOCOLS. Raises BadInput."""
    try:
        return _REGISTRIES[protocol](mm)
    except KeyError:
        known = ", ".join(PROTOCOLS)
        raise BadInput(f"no notifier protocol is called {protocol!r}; known are {known}") from None
