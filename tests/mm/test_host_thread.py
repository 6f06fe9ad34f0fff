"""Host threads: their TLBs keep old translations until the flush, and the old page is still there till then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import ACCESSED, DIRTY, WRITE
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.events import Event

R, RW, NONE = 1, 3, 0
PAGE = 4096


@pytest.fixture
def thread(mm: Mm) -> HostThread:
    return HostThread(mm, "thread0")


@pytest.fixture
def start(mm: Mm, thread: HostThread) -> int:
    """Four pages, written and in the thread's TLB."""
    start = mm.mmap(4 * PAGE, RW)
    for page in range(4):
        thread.store(start + page * PAGE, b"old" + bytes([page]))
    return start


class OnEnd(MmuNotifier):
    """Calls back when a range ends."""

    def __init__(self, call) -> None:  # type: ignore[no-untyped-def]
        self.call = call

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        self.call()


def test_loads_and_stores_cross_pages(thread: HostThread, mm: Mm) -> None:
    start = mm.mmap(2 * PAGE, RW)
    thread.store(start + PAGE - 2, b"four")
    assert thread.load(start + PAGE - 3, 6) == b"\0four\0"
    assert mm.read(start + PAGE - 2, 4) == b"four"


def test_accesses_set_the_bits_of_the_entry(thread: HostThread, mm: Mm) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    page = start >> 12
    mm.pgd.clear_bits(page, page + 1, ACCESSED | DIRTY)
    thread.load(start, 1)
    assert mm.pgd.get(page) & (ACCESSED | DIRTY) == ACCESSED
    thread.store(start, b"y")
    assert mm.pgd.get(page) & DIRTY


@pytest.mark.parametrize("operation", ["munmap", "dontneed"])
def test_until_the_flush_the_old_page_is_read_and_written(
    mm: Mm, thread: HostThread, start: int, host: HostMemory, operation: str
) -> None:
    pfn = mm.get_user_pages(start, write=False).pfn
    seen: list[bytes] = []

    def between_end_and_flush() -> None:
        assert mm.pgd.get(start >> 12) == 0
        seen.append(thread.load(start, 4))
        thread.store(start, b"late")
        assert host.refcount(pfn) == 1

    mm.notifiers.register(OnEnd(between_end_and_flush))
    if operation == "munmap":
        mm.munmap(start, PAGE)
    else:
        mm.madvise(start, PAGE, MADV_DONTNEED)
    assert seen == [b"old\0"]
    assert host.refcount(pfn) == 0
    assert host.read(pfn, 0, 4) == b"\x6b" * 4
    if operation == "munmap":
        with pytest.raises(HostAccessError):
            thread.load(start, 1)
    else:
        assert thread.load(start, 4) == bytes(4)


def test_a_thread_that_is_never_flushed_reads_the_next_owner(mm: Mm, thread: HostThread, start: int) -> None:
    mm.threads.remove(thread)  # the defect: a CPU that the flush forgets
    mm.madvise(start, PAGE, MADV_DONTNEED)
    assert thread.load(start, 4) == b"\x6b" * 4
    other = mm.mmap(PAGE, RW)
    mm.write(other, b"secret")
    assert thread.load(start, 6) == b"secret"
    thread.store(start, b"broken")
    assert mm.read(other, 6) == b"broken"


def test_after_fork_a_stale_store_is_seen_by_the_child_only_before_the_flush(
    mm: Mm, thread: HostThread, start: int
) -> None:
    children: list[Mm] = []

    def at(label: str) -> None:
        if label == "mm.fork.unflushed":
            thread.store(start, b"late")

    with on_point(at):
        children.append(mm.fork())
    assert children[0].read(start, 4) == b"late"
    thread.store(start, b"mine")
    assert children[0].read(start, 4) == b"late"


def test_mprotect_takes_the_right_at_the_flush(mm: Mm, thread: HostThread, start: int) -> None:
    def at(label: str) -> None:
        if label == "mm.mprotect.unflushed":
            thread.store(start, b"late")

    with on_point(at):
        mm.mprotect(start, PAGE, R)
    assert thread.load(start, 4) == b"late"
    with pytest.raises(HostAccessError) as raised:
        thread.store(start, b"x")
    assert raised.value.signal == "SIGSEGV"


def test_raising_a_right_needs_no_flush(mm: Mm, thread: HostThread, events: list[Event]) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    mm.fork().exit()
    thread.load(start, 1)
    events.clear()
    thread.store(start, b"y")
    assert "primary_tlb_flush" not in [event.kind for event in events]
    assert thread.tlb[start >> 12] & WRITE


def test_copy_on_write_flushes_before_the_new_page_can_be_written(mm: Mm, start: int) -> None:
    reader, writer = HostThread(mm, "reader"), HostThread(mm, "writer")
    mm.fork()
    reader.load(start, 4)
    labels: list[str] = []

    def at(label: str) -> None:
        labels.append(label)
        if label in ("mm.cow.copied", "notifier.range_start.done"):
            assert reader.load(start, 4) == b"old\0"
            assert start >> 12 in reader.tlb

    with on_point(at):
        writer.store(start, b"new!")
    assert {"mm.cow.copied", "notifier.range_start.done"} <= set(labels)
    assert reader.load(start, 4) == b"new!"


def test_only_the_range_is_flushed(mm: Mm, thread: HostThread, start: int) -> None:
    mm.madvise(start + PAGE, PAGE, MADV_DONTNEED)
    assert sorted(page - (start >> 12) for page in thread.tlb) == [0, 2, 3]


@pytest.mark.parametrize(("prot", "write"), [(NONE, False), (R, True)])
def test_signals(mm: Mm, thread: HostThread, prot: int, write: bool) -> None:
    start = mm.mmap(PAGE, prot)
    with pytest.raises(HostAccessError) as raised:
        thread.store(start, b"x") if write else thread.load(start, 1)
    assert raised.value.signal == "SIGSEGV"
    assert thread.tlb == {}


def test_a_store_that_runs_into_a_hole_keeps_what_it_wrote(mm: Mm, thread: HostThread, start: int) -> None:
    mm.munmap(start + PAGE, PAGE)
    with pytest.raises(HostAccessError):
        thread.store(start + PAGE - 2, b"four")
    assert thread.load(start + PAGE - 2, 2) == b"fo"


def test_threads_end_with_the_mm(mm: Mm, thread: HostThread, start: int) -> None:
    mm.exit()
    assert mm.threads == []
    with pytest.raises(MmError):
        thread.load(start, 1)
    with pytest.raises(MmError):
        HostThread(mm)


def test_a_thread_ends(mm: Mm, thread: HostThread, start: int) -> None:
    thread.exit()
    thread.exit()
    assert mm.threads == []
    assert thread.tlb == {}


def test_accesses_are_traced(mm: Mm, thread: HostThread, start: int, events: list[Event]) -> None:
    thread.load(start, 1)
    thread.store(start + PAGE, b"x")
    assert [event.fields for event in events] == [
        {"mm": "mm0", "hva": start, "access": "read", "thread": "thread0"},
        {"mm": "mm0", "hva": start + PAGE, "access": "write", "thread": "thread0"},
    ]


@pytest.fixture(autouse=True)
def _nothing_left_over(mm: Mm) -> Iterator[None]:
    yield
    assert mm.notifiers.open_ranges == ()
