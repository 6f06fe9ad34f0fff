"""Remote nodes that use an owner's memory, while the owner's host changes its mind.

Messages are worked off by actors of their own, on either side, so how long each is underway is the search's choice. In
most of these the node reads and writes while the pages behind what it has attached go away; what it sees is the old
page or the new one, and the new one only from when the operation has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from xipvm.actors import wait
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.scenarios.faults import NEW, OLD, RW
from xipvm.explore.scene import Scene, check_mmu, scenario
from xipvm.explore.shared import Shared
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.xpmem import Xpmem
from xipvm.mmu.vma import MAP_SHARED, PROT_READ
from xipvm.mmu.zap import MmuGather
from xipvm.notifier import RangeEvent
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import NodeAttachment, OwnerGoneError, XpmemNode

PAGES: Final = 2
GONE: Final = bytes(8)


class Partition(Shared[int]):
    """An owner of ``size`` bytes from ``hva`` on, and one node that has attached them; both do their messages.

    ``value`` is how many are at work because of whom there may be messages.
    """

    def __init__(self, scene: Scene, mm: Mm, hva: int, size: int = PAGES * PAGE_SIZE) -> None:
        super().__init__(0)
        self.scene = scene
        self.mm = mm
        self.hva = hva
        self.owner = Xpmem(mm)
        self.owner.register()
        scene.undo(self.owner.destroy)
        self.owner.make("memory", hva, size)
        self.owner_end, self.node_end = ActorLink.pair("owner", "node0")
        self.remote = self.owner.connect(self.owner_end)
        self.node = XpmemNode(self.node_end, "node0", memory=mm)
        self.owner_end.serve = lambda: self.owner.serve(self.remote)
        self.node_end.serve = self.node.serve
        self.node.hello()
        self.permit, _ = self.node.get("memory")
        self.at: NodeAttachment = self.node.attach(self.permit, 0, size, hva=hva)

    def actor(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Somebody because of whom there may be messages."""

        def act() -> None:
            try:
                function(*arguments)
            finally:
                self.value -= 1

        self.value += 1
        self.scene.actor(name, act)

    def run(self, *, answering: bool = True) -> None:
        """Spawns who works off messages, behind all others. Without ``answering`` the node does nothing of it.

        In the end the node leaves, after whatever else was to be done afterwards.
        """
        self.scene.afterwards(self.settle)
        owner, remote = self.owner_end, self.remote
        # Requests may have been taken by somebody who waited for another answer.
        self.scene.actor(
            "xpmemd",
            self._work,
            owner,
            lambda: owner.arrived or bool(remote.requests),
            lambda: self.owner.serve(remote),
        )
        if answering:
            node = self.node_end
            self.scene.actor("node0.recalls", self._work, node, lambda: node.arrived, self.node.serve)

    def _work(self, end: ActorLink, due: Callable[[], bool], serve: Callable[[], object]) -> None:
        while True:
            wait(f"a message from {end.name}", lambda: due() or end.closed or not self.value)
            serve()
            if end.closed or not (self.value or due()):
                return

    def settle(self) -> None:
        """At rest, what the node has is what the mm has; then it leaves."""
        if not self.mm.dead:
            check_mmu(self.owner)
        if not self.node_end.closed:
            self.node.detach(self.at)
            self.node.release(self.permit)
        assert not self.owner.pins(), "pages stay pinned"

    def sees(self, *allowed: bytes, page: int = 0) -> None:
        """The node reads. Raises AssertionError when that is none of ``allowed``."""
        seen = self.node.load(self.at, page * PAGE_SIZE, 8)
        if seen not in allowed:
            raise AssertionError(f"the node reads {seen!r} in page {page}, not one of {allowed}")


def furnish(scene: Scene, *, file: ShmemFile | None = None) -> Partition:
    """An owner of two written pages, the first of which a node has read, and the second written."""
    mm = scene.mm()
    hva = mm.mmap(PAGES * PAGE_SIZE, RW) if file is None else mm.mmap(PAGES * PAGE_SIZE, RW, MAP_SHARED, file=file)
    HostThread(mm).store(hva, OLD)
    partition = Partition(scene, mm, hva)
    partition.sees(OLD)
    partition.node.store(partition.at, PAGE_SIZE, OLD)
    return partition


@scenario(protocols=("modern",))
def remote_against_dontneed(scene: Scene) -> None:
    """The owner gives up its pages; when that has returned, the node reads what is there then."""
    there = furnish(scene)
    thread = HostThread(there.mm)

    def host() -> None:
        there.mm.madvise(there.hva, PAGES * PAGE_SIZE, MADV_DONTNEED)
        thread.store(there.hva + PAGE_SIZE, NEW)
        there.sees(NEW, page=1)

    there.actor("host", host)
    there.actor("node0", there.sees, OLD, GONE)
    there.run()


@scenario(protocols=("modern",))
def remote_against_munmap(scene: Scene) -> None:
    """The owner unmaps a page that a node uses; its frame is given to somebody else at once."""
    there = furnish(scene)
    other = there.mm.mmap(PAGE_SIZE, RW)
    thread = HostThread(there.mm)

    def host() -> None:
        there.mm.munmap(there.hva + PAGE_SIZE, PAGE_SIZE)
        thread.store(other, b"reused!!")

    there.actor("host", host)
    there.actor("node0", there.node.store, there.at, 0, NEW)
    there.run()


@scenario(protocols=("modern",))
def remote_against_fork(scene: Scene) -> None:
    """fork; owner and node write to the same page, whoever comes first copies it, and both see both."""
    there = furnish(scene)
    thread = HostThread(there.mm)

    def host() -> None:
        child = there.mm.fork("child")
        scene.undo(child.exit)
        thread.store(there.hva + 8, NEW)
        if child.read(there.hva + 8, 8) != GONE:
            raise AssertionError("the child sees what was written after the fork")

    there.actor("host", host)
    there.actor("node0", there.node.store, there.at, 16, NEW)

    def both() -> None:
        there.sees(OLD)
        expected = OLD + NEW + NEW
        assert there.mm.read(there.hva, 24) == expected, "the owner's page lacks a write"
        assert there.node.load(there.at, 0, 24) == expected, "the node's page lacks a write"

    scene.afterwards(both)
    there.run()


@scenario(protocols=("modern",))
def remote_against_mprotect(scene: Scene) -> None:
    """The owner's memory becomes read-only, and writable again, while a node writes."""
    there = furnish(scene)

    def host() -> None:
        there.mm.mprotect(there.hva, PAGES * PAGE_SIZE, PROT_READ)
        there.mm.mprotect(there.hva, PAGES * PAGE_SIZE, RW)

    there.actor("host", host)
    there.actor("node0", there.sees, OLD)
    there.run()


@scenario(protocols=("modern",))
def remote_against_truncate(scene: Scene) -> None:
    """Another process cuts off the file that the owner's memory is."""
    file = ShmemFile(scene.host, scene.trace, "memory", PAGES * PAGE_SIZE)
    scene.undo(file.close)
    there = furnish(scene, file=file)
    there.actor("other", file.truncate, PAGE_SIZE)
    there.actor("node0", there.sees, OLD)
    there.run()


@scenario(protocols=("modern",))
def remote_against_reclaim(scene: Scene) -> None:
    """Reclaim wants pages of which a node has one; the other one goes to swap, and comes back."""
    mm = scene.mm()
    hva = mm.mmap(PAGES * PAGE_SIZE, RW)
    mm.swapon(16)
    thread = HostThread(mm)
    thread.store(hva, OLD)
    thread.store(hva + PAGE_SIZE, OLD)
    there = Partition(scene, mm, hva)
    there.sees(OLD)
    there.actor("kswapd", pageout, mm, hva, hva + PAGES * PAGE_SIZE)
    there.actor("node0", there.sees, OLD)
    there.actor("node1", there.node.store, there.at, PAGE_SIZE, NEW)

    def kept() -> None:
        assert mm.read(hva + PAGE_SIZE, 8) == NEW, "what the node wrote is lost"

    scene.afterwards(kept)
    there.run()


@scenario(protocols=("modern",))
def remote_uses_half_a_page(scene: Scene) -> None:
    """A node has attached a part that ends in the middle of a page; that page goes."""
    mm = scene.mm()
    hva = mm.mmap(PAGES * PAGE_SIZE, RW)
    thread = HostThread(mm)
    thread.store(hva + PAGE_SIZE, OLD)
    there = Partition(scene, mm, hva, PAGE_SIZE + 64)
    there.sees(OLD, page=1)

    def host() -> None:
        mm.madvise(hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        thread.store(hva + PAGE_SIZE, NEW)
        there.sees(NEW, page=1)

    there.actor("host", host)
    there.run()


@scenario(protocols=("modern",))
def remote_that_is_silent(scene: Scene) -> None:
    """A node does not answer any more; the owner's patience ends, and it is cut off."""
    there = furnish(scene)
    other = there.mm.mmap(PAGE_SIZE, RW)
    thread = HostThread(there.mm)

    def host() -> None:
        there.mm.munmap(there.hva + PAGE_SIZE, PAGE_SIZE)
        thread.store(other, b"reused!!")

    def remote() -> None:
        with suppress(OwnerGoneError):
            there.sees(OLD, page=1)

    there.actor("host", host)
    there.actor("node0", remote)
    there.actor("patience", there.owner_end.lose_patience)
    scene.afterwards(lambda: check_fenced(there))
    there.run(answering=False)


@scenario(protocols=("modern",))
def remote_that_is_silent_to_the_reaper(scene: Scene) -> None:
    """Nobody waits for a node when the reaper takes a page; later somebody does, in vain, and it is cut off."""
    there = furnish(scene)
    mm, hva = there.mm, there.hva
    there.node_end.serve = None

    def remote() -> None:
        with suppress(OwnerGoneError):
            there.sees(OLD, page=1)
            there.sees(OLD, page=1)

    def host() -> None:
        reap(mm, hva + PAGE_SIZE, hva + 2 * PAGE_SIZE)
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)

    there.actor("host", host)
    there.actor("node0", remote)
    there.actor("patience", there.owner_end.lose_patience)
    scene.afterwards(lambda: check_fenced(there))
    there.run(answering=False)


def reap(mm: Mm, start: int, end: int) -> None:
    """Takes pages away as the OOM reaper does, who may not block."""
    gather = MmuGather(mm)
    range = mm.notifiers.invalidate_range_start(start, end, RangeEvent.UNMAP, blockable=False)
    try:
        gather.zap(start, end)
    finally:
        mm.notifiers.invalidate_range_end(range)
    gather.finish()


def check_fenced(there: Partition) -> None:
    """Raises AssertionError unless the node was cut off."""
    assert there.remote.fenced, "the node was not cut off"
    assert there.node_end.closed, "its link is open"


@scenario(protocols=("modern",))
def remote_that_dies(scene: Scene) -> None:
    """A node goes away without a word while the owner recalls its pages."""
    there = furnish(scene)
    there.actor("host", there.mm.madvise, there.hva, PAGES * PAGE_SIZE, MADV_DONTNEED)
    there.actor("death", there.node.close)
    there.run()


@scenario(protocols=("modern",))
def remote_against_exit(scene: Scene) -> None:
    """The owner's address space ends while a node uses it."""
    there = furnish(scene)

    def remote() -> None:
        with suppress(OwnerGoneError, MmError):  # as soon as it has begun to end
            there.sees(OLD)
            there.node.store(there.at, PAGE_SIZE, NEW)

    there.actor("exit", there.mm.exit)
    there.actor("node0", remote)
    there.run()


@scenario(protocols=("modern",))
def remote_and_a_range_that_may_not_block(scene: Scene) -> None:
    """Somebody who must not wait gives up pages, as the OOM reaper; the node keeps the old ones until it has heard."""
    there = furnish(scene)
    mm, hva = there.mm, there.hva

    there.actor("oom_reaper", reap, mm, hva, hva + PAGE_SIZE)
    there.actor("host", mm.madvise, hva, PAGES * PAGE_SIZE, MADV_DONTNEED)
    there.actor("node0", there.sees, OLD, GONE)
    there.run()
