"""XPMEM for the benchmark of secondary MMUs: a node in the same program, whose every fault is two messages."""

from __future__ import annotations

from xipvm.address import PAGE_SHIFT
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import RETRY_WALK, WRITE, SecondaryMmu
from xipvm.mmu.secondary.xpmem import Xpmem
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import XpmemNode


class Remote(Xpmem):
    """Faults are those of its node, which has attached ``pages`` pages from ``hva`` on."""

    def __init__(self, mm: Mm, hva: int, pages: int) -> None:
        super().__init__(mm)
        self.register()
        self.make("memory", hva, pages << PAGE_SHIFT)
        ours, theirs = ActorLink.pair("owner", "node0")
        remote = self.connect(ours)
        self._node = node = XpmemNode(theirs, "node0", memory=mm)
        ours.serve, theirs.serve = lambda: self.serve(remote), node.serve
        node.hello()
        permit, size = node.get("memory")
        self._at = node.attach(permit, 0, size)

    def fault(self, page: int, access: int) -> int:
        """The node uses ``page``."""
        if access == WRITE:
            self._node.store(self._at, page << PAGE_SHIFT, b"x")
        else:
            self._node.load(self._at, page << PAGE_SHIFT, 1)
        return RETRY_WALK


def make(mm: Mm, host: HostMemory, hva: int, pages: int) -> SecondaryMmu:
    """An owner whose pages from 0 on are the bytes from ``hva`` on."""
    return Remote(mm, hva, pages)
