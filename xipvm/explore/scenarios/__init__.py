"""The scenarios that come with xipvm, by subject."""

from __future__ import annotations

from typing import Final

from xipvm.errors import BadInput
from xipvm.explore.scenarios import (
    dax,
    device_memory,
    dirty,
    faults,
    files,
    flash,
    gru,
    huge,
    lifetime,
    mirrors,
    pfncaches,
    ranges,
    rights,
    shadow,
    slots,
    sva,
    together,
    xip,
    xpmem,
    youth,
)
from xipvm.explore.scene import Scenario

SCENARIOS: Final[dict[str, Scenario]] = {
    each.name: each
    for module in (
        faults,
        flash,
        ranges,
        files,
        huge,
        slots,
        youth,
        lifetime,
        mirrors,
        xpmem,
        gru,
        sva,
        together,
        dirty,
        rights,
        pfncaches,
        shadow,
        device_memory,
        xip,
        dax,
    )
    for each in vars(module).values()
    if isinstance(each, Scenario)
}
"""By name."""


def get(name: str) -> Scenario:
    """The scenario ``name``. Raises BadInput for an unknown one."""
    try:
        return SCENARIOS[name]
    except KeyError:
        raise BadInput(f"no scenario is called {name!r}; known are {', '.join(SCENARIOS)}") from None
