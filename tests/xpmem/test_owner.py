"""The owner: segments, permits, attachments, pins, recalls, and nodes that do not behave."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from tests.xpmem.world import PAGES, RW, World
from xipvm.address import PAGE_SIZE
from xipvm.errors import AtomicSleepError, MmError, ProtocolUnsupported
from xipvm.mmu.frames import PG_DIRTY, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.pageout import pageout
from xipvm.mmu.secondary.base import FAULT, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.xpmem import ATTACHMENT_LIMIT, REQUEST_LIMIT, Xpmem
from xipvm.mmu.vma import PROT_READ
from xipvm.notifier import MmuNotifier, MmuNotifier2008, MmuNotifierRange, NotifiedMm, RangeEvent
from xipvm.trace.funnel import Trace
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import OwnerGoneError, XpmemNode
from xipvm.xpmem.wire import Kind, Message

SIZE = PAGES * PAGE_SIZE


def failing(number: int) -> pytest.RaisesExc[MmError]:
    return pytest.raises(MmError, check=lambda error: error.errno == number)


@pytest.mark.parametrize("shares", [True, False])
def test_a_node_reads_and_writes_what_the_owner_has(there: World, shares: bool) -> None:
    node = there.connect(shares=shares)
    at = node.attach()
    there.mm.write(there.hva + PAGE_SIZE - 3, b"across")
    assert node.node.load(at, PAGE_SIZE - 3, 6) == b"across"
    node.node.store(at, 2 * PAGE_SIZE - 2, b"back")
    assert there.mm.read(there.hva + 2 * PAGE_SIZE - 2, 4) == b"back"
    there.mm.write(there.hva, b"later")
    assert node.node.load(at, 0, 5) == b"later", "translations are kept, not contents"
    there.verify()


def test_each_page_is_pinned_once_for_each_attachment(there: World) -> None:
    node, other = there.connect(), there.connect("node1")
    at, again, third = node.attach(), node.attach(), other.attach()
    for _ in range(2):
        for user, where in ((node, at), (node, again), (other, third)):
            user.node.store(where, 0, b"x")
    (pfn,) = there.owner.pins()
    assert there.owner.pins() == {pfn: 3}
    assert there.host.refcount(pfn) == 4
    node.node.detach(again)
    assert there.host.refcount(pfn) == 3
    other.node.close()
    there.owner.serve(other.remote)
    assert there.host.refcount(pfn) == 2
    there.verify()


def test_the_old_page_until_the_end_and_the_new_one_after(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"old")
    seen: list[bytes] = []

    class Witness(MmuNotifier):
        name = "witness"

        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            seen.append(node.node.load(at, 0, 3))
            return 0

    there.mm.notifiers.register(Witness())
    before = there.mm.get_user_pages(there.hva, write=False).pfn
    with there.mm.notifiers.invalidate_range(there.hva, there.hva + PAGE_SIZE, RangeEvent.CLEAR):
        there.mm.clear_flush(there.hva)
        seen.append(node.node.load(at, 0, 3))
        assert there.owner.pins() == {before: 1}
    assert seen == [b"old", b"old"]
    assert node.node.recalls == 1
    assert there.owner.pins() == {}
    # What stands in for an operation has taken the entry away and not its reference.
    there.host.add_mapcount(before, -1)
    there.mm.put_frame(before)
    assert node.node.load(at, 0, 3) == bytes(3)


def test_the_order_of_a_recall(there: World) -> None:
    node = there.connect()
    node.node.store(node.attach(), 0, b"x")
    there.events.clear()
    there.mm.madvise(there.hva, PAGE_SIZE, MADV_DONTNEED)
    order = [kind for kind in there.kinds() if not kind.startswith(("mm_", "vma", "primary"))]
    assert order == [
        "mmu_notifier_invalidate_range_start",
        "pte_clear",
        "mmu_notifier_invalidate_range_end",
        "xpmem_recall",
        "device_tlb_drop",
        "spte_zap",
        "page_unpin",
        "page_free",
    ]


def test_ranges_are_rounded_out_to_pages(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.load(at, 0, SIZE)
    notifiers = there.mm.notifiers
    with notifiers.invalidate_range(there.hva + PAGE_SIZE + 1, there.hva + PAGE_SIZE + 2, RangeEvent.CLEAR):
        pass
    assert sorted(at.table) == [0, 2, 3]
    with notifiers.invalidate_range(there.hva + 3 * PAGE_SIZE - 1, there.hva + 3 * PAGE_SIZE + 1, RangeEvent.CLEAR):
        pass
    assert sorted(at.table) == [0]
    with notifiers.invalidate_range(0, (1 << 64) - 1, RangeEvent.SOFT_DIRTY):
        pass
    assert at.table == {}


def test_an_attachment_may_begin_and_end_inside_of_a_page(there: World) -> None:
    node = there.connect()
    at = node.attach(PAGE_SIZE - 4, PAGE_SIZE)
    there.mm.write(there.hva + PAGE_SIZE - 4, b"head")
    there.mm.write(there.hva + 2 * PAGE_SIZE - 8, b"tail")
    assert (at.pages, at.lead) == (2, PAGE_SIZE - 4)
    assert node.node.load(at, 0, 4) == b"head"
    assert node.node.load(at, PAGE_SIZE - 4, 4) == b"tail"
    with failing(errno.EINVAL):
        node.node.load(at, PAGE_SIZE - 3, 4)
    there.mm.madvise(there.hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    assert node.node.load(at, PAGE_SIZE - 4, 4) == bytes(4)


def test_what_the_node_writes_is_dirty(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"x")
    (pfn,) = there.owner.pins()
    there.host.clear_flags(pfn, PG_DIRTY)
    node.node.store(at, 8, b"y")
    node.node.detach(at)
    assert there.host.flags(pfn) & PG_DIRTY


def test_a_pinned_page_is_not_reclaimed(there: World) -> None:
    node = there.connect()
    at = node.attach()
    there.mm.swapon(16)
    node.node.store(at, 0, b"x")
    pageout(there.mm, there.hva, there.hva + PAGE_SIZE)
    assert "swap_out" not in there.kinds()
    node.node.detach(at)
    pageout(there.mm, there.hva, there.hva + PAGE_SIZE)
    assert "swap_out" in there.kinds()


def test_errors_are_the_kernel_s(there: World) -> None:
    for name, size, number in (
        ("memory", PAGE_SIZE, errno.EEXIST),
        ("", PAGE_SIZE, errno.EINVAL),
        ("two words", PAGE_SIZE, errno.EINVAL),
        ("n" * 257, PAGE_SIZE, errno.EINVAL),
        ("empty", 0, errno.EINVAL),
        ("large", 1 << 50, errno.EINVAL),
    ):
        with failing(number):
            there.owner.make(name, there.hva, size)
    with failing(errno.ENOENT):
        there.owner.remove("nothing")
    node = there.connect().node
    with failing(errno.ENOENT):
        node.get("nothing")
    permit, size = node.get("memory", write=False)
    assert size == SIZE
    for offset, length in ((0, 0), (0, SIZE + 1), (SIZE, 1), ((1 << 64) - 1, 2)):
        with failing(errno.EINVAL):
            node.attach(permit, offset, length)
    with failing(errno.EINVAL):
        node.attach(permit + 1, 0, 1)
    at = node.attach(permit, 0, SIZE)
    with failing(errno.EACCES):
        node.store(at, 0, b"x")
    node.release(permit)
    with failing(errno.EINVAL):
        node.load(at, 0, 1)
    with failing(errno.EINVAL):
        node.release(permit)
    with failing(errno.EPROTO):
        node.hello()


def test_a_segment_may_be_for_reading_only(there: World) -> None:
    there.owner.make("constants", there.hva, PAGE_SIZE, writable=False)
    node = there.connect().node
    assert node.segments == ["memory", "constants"]
    with failing(errno.EACCES):
        node.get("constants")
    permit, _ = node.get("constants", write=False)
    assert node.load(node.attach(permit, 0, 4), 0, 4) == bytes(4)


def test_memory_that_is_not_there_or_may_not_be_written(there: World) -> None:
    node = there.connect()
    at = node.attach()
    there.mm.mprotect(there.hva, PAGE_SIZE, PROT_READ)
    there.mm.munmap(there.hva + PAGE_SIZE, PAGE_SIZE)
    assert node.node.load(at, 0, 1) == b"\0"
    for access in (lambda: node.node.store(at, 0, b"x"), lambda: node.node.load(at, PAGE_SIZE, 1)):
        with failing(errno.EFAULT):
            access()


def test_a_removed_segment_is_taken_back_first(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"x")
    there.owner.remove("memory")
    assert at.table == {}
    assert there.owner.pins() == {}
    with failing(errno.EINVAL):
        node.node.load(at, 0, 1)
    with failing(errno.ENOENT):
        node.node.get("memory")


def test_who_has_not_said_hello_gets_nothing(there: World) -> None:
    node = there.connect(hello=False)
    with failing(errno.EPROTO):
        node.node.get("memory")


def test_there_is_an_end_to_what_a_node_may_have(there: World) -> None:
    node = there.connect().node
    permit, _ = node.get("memory")
    for _ in range(ATTACHMENT_LIMIT):
        node.attach(permit, 0, 1)
    with failing(errno.EMFILE):
        node.attach(permit, 0, 1)


def test_page_numbers_are_used_again(there: World) -> None:
    node = there.connect()
    first, second = node.attach(), node.attach()
    node.node.detach(first)
    third = node.attach(0, PAGE_SIZE)
    assert third.id == first.id
    node.node.store(third, 0, b"x")
    node.node.store(second, 0, b"y")
    numbers = {event.fields["gfn"] for event in there.events if event.kind == "page_pin"}
    assert numbers == {0, PAGES}


# ---- who does not answer


def test_a_node_that_does_not_answer_is_cut_off(there: World) -> None:
    node, other = there.connect(), there.connect("node1")
    at, beside = node.attach(), other.attach()
    node.node.store(at, 0, b"x")
    other.node.store(beside, 0, b"y")
    fenced: list[str] = []
    there.owner.on_fence = lambda who: fenced.append(f"{who.name}: {who.fenced}")
    node.node_end.serve = None
    there.mm.madvise(there.hva, PAGE_SIZE, MADV_DONTNEED)
    assert fenced == ["node0: it has not answered the recall of 1 page in time"]
    assert there.owner.pins() == {}
    assert "xpmem_fence" in there.kinds()
    with pytest.raises(OwnerGoneError):
        node.node.load(at, 0, 1)
    assert other.node.load(beside, 0, 1) == b"\0", "the others go on"
    there.verify()


def test_a_node_that_dies_is_forgotten(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"x")
    node.node_end.close()  # and says nothing: its translations die with it
    there.mm.madvise(there.hva, PAGE_SIZE, MADV_DONTNEED)
    assert node.remote.fenced == "it has gone without a word"
    assert there.owner.nodes == []
    assert there.owner.pins() == {}


def test_an_answer_to_nothing_is_a_reason(there: World) -> None:
    node = there.connect()
    node.node_end.send(Message(Kind.DROPPED, 7))
    there.owner.serve(node.remote)
    assert node.remote.fenced == "it answers a recall that nobody made"


def test_so_are_requests_without_end(there: World) -> None:
    node = there.connect()
    for _ in range(REQUEST_LIMIT + 1):
        node.node_end.send(Message(Kind.HELLO, 1))
    there.owner.serve(node.remote)
    assert "without waiting for an answer" in node.remote.fenced


def test_a_lie_is_worth_nothing_where_memory_is_messages(there: World) -> None:
    """It says that it has dropped a page and uses what it knows of it."""
    node = there.connect(shares=False)
    at = node.attach()
    node.node.store(at, 0, b"secret")
    frame, _ = at.table[0]
    kept = dict(at.table)
    other = there.mm.mmap(PAGE_SIZE, RW)
    there.mm.munmap(there.hva, PAGE_SIZE)
    assert at.table == {}
    HostThread(there.mm).store(other, b"reused")
    assert there.mm.get_user_pages(other, write=False).pfn == frame
    at.table.update(kept)
    for request in (
        Message(Kind.LOAD, 90, (at.id, 0, frame, 0, 6)),
        Message(Kind.STORE, 91, (at.id, 0, frame, 0), b"broken"),
    ):
        assert there.owner._answer(node.remote, request).kind is Kind.AGAIN
    assert there.mm.read(other, 6) == b"reused"


def test_accesses_outside_of_what_was_granted(there: World) -> None:
    node = there.connect(shares=False)
    at = node.attach(0, PAGE_SIZE, write=False)
    node.node.load(at, 0, 1)
    frame, _ = at.table[0]
    for numbers in ((at.id, 0, frame, 4095, 2), (at.id, 1, frame, 0, 1), (at.id, 0, frame, 1 << 63, 1 << 63)):
        with failing(errno.EFAULT):
            there.owner._answer(node.remote, Message(Kind.LOAD, 1, numbers))
    with failing(errno.EFAULT):
        there.owner._answer(node.remote, Message(Kind.STORE, 1, (at.id, 0, frame, 0), b"x"))
    with failing(errno.EFAULT):
        there.owner._answer(node.remote, Message(Kind.FAULT, 1, (at.id, 1, 0)))


# ---- where nobody may wait


def test_a_range_that_may_not_block_is_recalled_and_not_awaited(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"x")
    notifiers = there.mm.notifiers
    (pfn,) = there.owner.pins()
    range = notifiers.invalidate_range_start(there.hva, there.hva + PAGE_SIZE, RangeEvent.UNMAP, blockable=False)
    there.mm.clear_flush(there.hva)
    notifiers.invalidate_range_end(range)
    there.host.add_mapcount(pfn, -1)
    there.mm.put_frame(pfn)
    assert there.owner.pins() == {pfn: 1}, "it holds the page until the answer comes"
    assert node.node.load(at, 0, 1) == b"x"
    node.node.serve()
    assert there.owner.pins() == {pfn: 1}
    there.owner.serve(node.remote)
    assert there.owner.pins() == {}
    assert node.node.load(at, 0, 1) == b"\0"


def test_a_fault_meanwhile_comes_again(there: World) -> None:
    node = there.connect(shares=False)
    at = node.attach()
    node.node.store(at, 0, b"x")
    notifiers = there.mm.notifiers
    notifiers.invalidate_range_end(
        notifiers.invalidate_range_start(there.hva, there.hva + PAGE_SIZE, RangeEvent.UNMAP, blockable=False)
    )
    answer = there.owner._answer(node.remote, Message(Kind.FAULT, 5, (at.id, 0, 0)))
    assert answer.kind is Kind.AGAIN
    with there.mm.notifiers.invalidate_range(there.hva, there.hva + PAGE_SIZE, RangeEvent.CLEAR):
        pass  # this one waits for the answer to the first recall
    assert there.owner.pins() == {}
    assert [event.fields["wait"] for event in there.events if event.kind == "xpmem_recall"] == [False, True]


def test_the_protocol_of_2008_is_refused() -> None:
    host = HostMemory(1 << 20)
    mm = Mm(host, Trace(), protocol="2008")
    owner = Xpmem(mm)
    with pytest.raises(ProtocolUnsupported, match="sleeps until remote nodes have answered: the 2008"):
        owner.register()
    assert len(mm.notifiers) == 0
    owner.destroy()
    mm.exit()
    host.close()


def test_who_does_it_nevertheless_is_told() -> None:
    host = HostMemory(1 << 20)
    mm = Mm(host, Trace(), protocol="2008")
    hva = mm.mmap(PAGE_SIZE, RW)
    owner = Xpmem(mm)
    owner.make("memory", hva, PAGE_SIZE)

    class Stubborn(MmuNotifier2008):
        name = "stubborn"

        def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
            owner.invalidate_range_end(MmuNotifierRange(mm.name, start, end, RangeEvent.UNMAP))

    mm.notifiers.register(Stubborn())
    owner_end, node_end = ActorLink.pair("owner", "node0")
    remote = owner.connect(owner_end)
    node = XpmemNode(node_end, "node0", memory=mm)
    owner_end.serve, node_end.serve = (lambda: owner.serve(remote)), node.serve
    node.hello()
    node.store(node.attach(node.get("memory")[0], 0, PAGE_SIZE), 0, b"x")
    with pytest.raises(AtomicSleepError, match="xpmem recall may sleep, and was called in mmu_notifier_invalidate_ran"):
        mm.munmap(hva, PAGE_SIZE)
    owner.fence(remote, "enough")
    with suppress(MmError):
        mm.exit()
    host.close()


# ---- the end


def test_the_end_of_the_mm_lets_every_node_go(there: World) -> None:
    node = there.connect()
    at = node.attach()
    node.node.store(at, 0, b"x")
    there.mm.exit()
    assert there.owner.pins() == {}
    with pytest.raises(OwnerGoneError):
        node.node.load(at, 0, 1)
    assert node.node.serve() == 1
    assert node.node.gone == "the owner has ended"
    with failing(errno.ESRCH):
        there.owner.make("more", there.hva, PAGE_SIZE)


def test_it_is_a_secondary_mmu(there: World) -> None:
    node = there.connect()
    node.attach()
    assert there.owner.fault(1, WRITE) == RETRY_WALK
    seen = there.owner.translate(1)
    assert seen is not None
    assert seen[1]
    assert there.owner.translate(2) is None
    assert there.owner.fault(PAGES, READ) == FAULT
    assert there.owner.last_error == "no attachment"
    assert len(list(there.owner.backing())) == PAGES
    assert "rw" in there.owner.describe(1)
