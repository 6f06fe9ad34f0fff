"""An owner and its nodes in one process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.xpmem import RemoteNode, Xpmem
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import NodeAttachment, XpmemNode

RW = PROT_READ | PROT_WRITE
PAGES = 4


class Node(NamedTuple):
    """Both sides of one node."""

    remote: RemoteNode
    node: XpmemNode
    owner_end: ActorLink
    node_end: ActorLink

    def attach(self, offset: int = 0, size: int = PAGES * PAGE_SIZE, *, write: bool = True) -> NodeAttachment:
        permit, _ = self.node.get("memory", write=write)
        return self.node.attach(permit, offset, size)


class World:
    """Four pages of memory, exported as ``memory``. ``events`` is what was said."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.oracle = Oracle()
        self.events: list[Event] = []
        self.trace.attach(self.oracle)
        self.trace.attach(self.events.append)
        self.host = HostMemory(1 << 20, poison="frame")
        self.mm = Mm(self.host, self.trace)
        self.hva = self.mm.mmap(PAGES * PAGE_SIZE, RW)
        self.owner = Xpmem(self.mm)
        self.owner.register()
        self.owner.make("memory", self.hva, PAGES * PAGE_SIZE)

    def connect(self, name: str = "node0", *, hello: bool = True, shares: bool = True) -> Node:
        owner_end, node_end = ActorLink.pair("owner", name)
        remote = self.owner.connect(owner_end)
        node = XpmemNode(node_end, name, memory=self.mm if shares else None)
        owner_end.serve = lambda: self.owner.serve(remote)
        node_end.serve = node.serve
        if hello:
            node.hello()
        return Node(remote, node, owner_end, node_end)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def broken(self) -> list[str]:
        return [violation.invariant for violation in self.oracle.violations]

    def verify(self) -> None:
        verify(self.host, held=self.owner.pins())


@contextmanager
def world() -> Iterator[World]:
    made = World()
    try:
        yield made
        assert made.broken() == []
    finally:
        made.owner.destroy()
        made.mm.exit()
        made.host.close()
