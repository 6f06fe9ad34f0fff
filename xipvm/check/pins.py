"""Secondary MMUs that hold references to their pages, and drop them when a range ends: XPMEM.

A page that is pinned (``page_pin``) cannot be freed or reused, so an entry of it may outlive the start of a range, and
the change: what it translates to is the old page, as it was. The end, however, has not returned before it is gone; the
oracle keeps a list of what every range is owed (``Range.owed``). Two things remain to be seen to:

* a pin that is given back (``page_unpin``) while the entry is still there protects nothing any more: from then on an
  entry that is not the host's is broken, as I3;
* where nobody may wait (``xpmem_recall`` with ``wait=no``, in a range that may not block) the entry may stay longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT
from xipvm.trace.events import Event

if TYPE_CHECKING:
    from xipvm.check.oracle import Oracle
    from xipvm.check.rules import Fields


class Pins:
    """What is pinned, for one oracle."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        oracle.on("page_pin", self._pinned)
        oracle.on("page_unpin", self._unpinned)
        oracle.on("xpmem_recall", self._recalled)

    def _pinned(self, event: Event, fields: Fields) -> None:
        self._oracle.world.vm(fields["vm"]).pins[fields["gfn"]] = fields["pfn"]

    def _unpinned(self, event: Event, fields: Fields) -> None:
        world = self._oracle.world
        vm, gfn, pfn = world.vm(fields["vm"]), fields["gfn"], fields["pfn"]
        vm.pins.pop(gfn, None)
        spte, page = vm.sptes.get(gfn), vm.page(gfn)
        self._oracle.checks["I3"] += 1
        if spte is None or spte.pfn != pfn or page is None or vm.mm is None:
            return
        entry = world.mm(vm.mm).entries.get(page)
        if entry is None or entry[0] != pfn:
            what = f"{vm.name} lets go of frame {pfn:#x}, which {page << PAGE_SHIFT:#x} is not any more"
            self._oracle.broken("I3", f"{what}, but guest frame {gfn:#x} still translates to it", event, pfn=pfn)

    def _recalled(self, event: Event, fields: Fields) -> None:
        if fields["wait"]:
            return
        for opened in self._oracle.returning:
            opened.owed = [
                (vm, gfn, entry)
                for vm, gfn, entry in opened.owed
                if vm.name != fields["vm"] or not fields["start"] <= gfn < fields["end"]
            ]
