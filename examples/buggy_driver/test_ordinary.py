"""What the driver's author tests: each thing that it does, and each thing that a process can do to it. All pass."""

from __future__ import annotations

from types import ModuleType

import pytest

from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, PROT_READ, PROT_WRITE, HostThread, Mm, TraceLog

PAGES = 4
RW = PROT_READ | PROT_WRITE


@pytest.fixture
def buffer(mm: Mm) -> int:
    """A buffer of four pages, the first of which is written."""
    hva = mm.mmap(PAGES * PAGE_SIZE, RW)
    mm.write(hva, b"hello   ")
    return hva


@pytest.fixture
def mirror(driver: ModuleType, mm: Mm, buffer: int):
    """The mirror of the buffer."""
    mirror = driver.Mirror(mm, buffer, PAGES)
    yield mirror
    mirror.destroy()


def test_a_queue_reads_what_the_process_wrote(mirror) -> None:
    assert mirror.queue().read(0) == b"hello   "


def test_the_process_reads_what_a_queue_wrote(mirror, mm: Mm, buffer: int) -> None:
    mirror.queue().write(1, b"world   ", offset=8)
    assert mm.read(buffer + PAGE_SIZE + 8, 8) == b"world   "


def test_a_copy(mirror, mm: Mm, buffer: int) -> None:
    mirror.queue().copy(0, 3)
    assert mm.read(buffer + 3 * PAGE_SIZE, 8) == b"hello   "


def test_a_page_is_looked_up_once(mirror, trace: TraceLog) -> None:
    queue = mirror.queue()
    queue.read(0)
    queue.read(0)
    assert trace.count("spte_set") == 1
    assert trace.count("tlb_insert") == 1


def test_what_is_given_back_is_gone(mirror, mm: Mm, buffer: int) -> None:
    queue = mirror.queue()
    queue.write(0, b"x")
    mm.madvise(buffer, PAGE_SIZE, MADV_DONTNEED)
    assert mirror.translate(0) is None
    assert queue.read(0) == bytes(8)


def test_what_is_unmapped_cannot_be_used(mirror, driver: ModuleType, mm: Mm, buffer: int) -> None:
    queue = mirror.queue()
    queue.write(0, b"x")
    mm.munmap(buffer, PAGE_SIZE)
    with pytest.raises(driver.TranslationError, match="page 0x0"):
        queue.read(0)
    assert queue.read(1) == bytes(8)


def test_what_is_protected_cannot_be_written(mirror, driver: ModuleType, mm: Mm, buffer: int) -> None:
    queue = mirror.queue()
    queue.write(0, b"HELLO")
    mm.mprotect(buffer, PAGE_SIZE, PROT_READ)
    with pytest.raises(driver.TranslationError):
        queue.write(0, b"x")
    assert queue.read(0) == b"HELLO   "


def test_a_copy_on_write_is_followed(mirror, mm: Mm, buffer: int) -> None:
    queue = mirror.queue()
    queue.read(0)
    child = mm.fork("child")
    HostThread(mm).store(buffer, b"parent's")
    assert queue.read(0) == b"parent's"
    assert child.read(buffer, 8) == b"hello   "
    child.exit()


def test_dirty_pages(mirror) -> None:
    queue = mirror.queue()
    queue.read(0)
    queue.write(2, b"x")
    assert mirror.collect_dirty() == {2}
    assert mirror.collect_dirty() == set()
    queue.write(2, b"y")
    assert mirror.collect_dirty() == {2}


def test_prefaulting_and_prefetching(mirror, trace: TraceLog) -> None:
    queue = mirror.queue()
    assert not queue.prefetch(1)
    mirror.prefault(0, PAGES)
    assert queue.prefetch(1)
    trace.every("tlb_insert").after("spte_set", same=("gfn", "pfn"))


def test_everything_is_removed_before_it_changes(mirror, mm: Mm, buffer: int, trace: TraceLog) -> None:
    queue = mirror.queue()
    for page in range(PAGES):
        queue.write(page, b"x")
    mm.munmap(buffer, PAGES * PAGE_SIZE)
    trace.every("pte_clear").between("mmu_notifier_invalidate_range", same="hva")
    trace.every("pte_clear").after("spte_zap", same="hva", since="spte_set")
    trace.every("page_free").after("spte_zap", same="pfn", since="spte_set")
    trace.every("page_free").after("tlb_flush", since="tlb_insert")


def test_a_mirror_that_was_closed(mirror, driver: ModuleType, trace: TraceLog) -> None:
    queue = mirror.queue()
    queue.write(0, b"x")
    mirror.destroy()
    with pytest.raises(driver.TranslationError, match="closed"):
        queue.read(0)
    trace.order("tlb_insert", "mmu_notifier_release", "spte_zap", "tlb_flush", "mmu_notifier_unregister")
