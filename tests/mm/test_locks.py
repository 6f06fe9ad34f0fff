"""Which operations can come between another one's schedule points, and which have to wait."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError, RecursiveLockError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mapping import merge
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
S_DONE = "notifier.range_start.done"

Operation = Callable[[Mm, int], object]
OPERATIONS: dict[str, Operation] = {
    "mprotect": lambda mm, start: mm.mprotect(start, PAGE, R),
    "munmap": lambda mm, start: mm.munmap(start, PAGE),
    "mmap over": lambda mm, start: mm.mmap(PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=start),
    "mmap": lambda mm, start: mm.mmap(PAGE, RW),
    "fork": lambda mm, start: mm.fork(),
    "exit": lambda mm, start: mm.exit(),
    "dontneed": lambda mm, start: mm.madvise(start, PAGE, MADV_DONTNEED),
    "cow": lambda mm, start: mm.write(start, b"new"),
}
WRITERS = ("mprotect", "munmap", "mmap over", "mmap", "fork", "exit")


def during(mm: Mm, start: int, outer: str, inner: str, label: str = S_DONE) -> list[int]:
    """``inner`` runs once, at the first point ``label`` of ``outer``; the errors it had."""
    errors: list[int] = []
    seen: list[str] = []

    def at(where: str) -> None:
        if where != label or seen:
            return
        seen.append(where)
        try:
            OPERATIONS[inner](mm, start)
        except MmError as error:
            errors.append(error.errno)

    with on_point(at):
        OPERATIONS[outer](mm, start)
    assert seen
    return errors


@pytest.fixture
def start(mm: Mm) -> int:
    """Two pages shared with a child."""
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"old" + bytes(2 * PAGE - 3))
    mm.fork("child")
    return start


@pytest.mark.parametrize("inner", [*WRITERS, "dontneed", "cow"])
@pytest.mark.parametrize("outer", ["mprotect", "mmap over", "fork"])
def test_nobody_comes_between_a_writer_s_points(mm: Mm, host: HostMemory, start: int, outer: str, inner: str) -> None:
    assert during(mm, start, outer, inner) == [errno.EDEADLK]
    assert not mm.dead
    verify(host)


@pytest.mark.parametrize("inner", WRITERS)
@pytest.mark.parametrize("outer", ["dontneed", "cow", "munmap"])
def test_no_writer_comes_between_a_reader_s_points(
    mm: Mm, host: HostMemory, start: int, outer: str, inner: str
) -> None:
    """munmap is a reader by the time it notifies: a new mapping in its place has to wait nevertheless."""
    assert during(mm, start, outer, inner) == [errno.EDEADLK]
    assert not mm.dead
    verify(host)


@pytest.mark.parametrize("inner", ["dontneed", "cow"])
@pytest.mark.parametrize("outer", ["dontneed", "cow"])
def test_readers_do_not_exclude_each_other(mm: Mm, host: HostMemory, start: int, outer: str, inner: str) -> None:
    assert during(mm, start, outer, inner) == []
    verify(host)


def test_a_fault_at_another_place_goes_on_while_munmap_notifies(mm: Mm, host: HostMemory, start: int) -> None:
    other = mm.mmap(PAGE, RW, addr=start + 64 * PAGE)
    stored: list[bool] = []

    def at(label: str) -> None:
        if label == S_DONE and not stored:
            stored.append(True)
            mm.write(other, b"other")

    with on_point(at):
        mm.munmap(start, PAGE)
    assert mm.read(other, 5) == b"other"


def test_to_merge_areas_whose_lock_one_holds_oneself_is_a_defect(mm: Mm, start: int) -> None:
    """Where somebody else has it they are merged another time."""
    mm.mprotect(start, PAGE, R)
    lower, upper = mm.areas_in(start, start + 2 * PAGE)
    upper.set_prot(R)
    with lower.anon_chain[0].rwsem.read, pytest.raises(RecursiveLockError):
        merge(mm, start, start + 2 * PAGE)
    assert len(mm.vmas) == 2
    merge(mm, start, start + 2 * PAGE)
    assert len(mm.vmas) == 1


def test_the_locks_are_free_after_an_operation_that_was_aborted(mm: Mm, start: int) -> None:
    def abort(label: str) -> None:
        if label == S_DONE:
            raise KeyboardInterrupt

    for operation in ("cow", "dontneed", "mprotect"):
        with on_point(abort), pytest.raises(KeyboardInterrupt):
            OPERATIONS[operation](mm, start)
        assert (mm.mmap_lock.readers, mm.mmap_lock.writer) == (0, False)


@pytest.mark.parametrize("meanwhile", ["munmap", "mmap over", "split"])
def test_who_changes_the_areas_of_a_file_waits_for_its_truncation(
    mm: Mm, host: HostMemory, trace: Trace, meanwhile: str
) -> None:
    """The file's side takes no mmap_lock, but holds i_mmap_rwsem while it goes through the areas."""
    file = ShmemFile(host, trace, "file", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x" * 4 * PAGE)
    log: list[str] = []

    def truncate() -> None:
        file.truncate(0)
        log.append("truncated")

    def change() -> None:
        if meanwhile == "munmap":
            mm.munmap(start + PAGE, PAGE)
        elif meanwhile == "split":
            mm.mprotect(start + PAGE, PAGE, R)
        else:
            OPERATIONS["mmap over"](mm, start + PAGE)
            mm.write(start + PAGE, b"new")
        log.append("changed")

    scheduler = Scheduler(lambda n, label: int(label == S_DONE and scheduler.running is first), trace=trace)
    first = scheduler.spawn("truncate", truncate)
    scheduler.spawn("change", change)
    scheduler.run()
    assert log == ["truncated", "changed"]
    if meanwhile == "mmap over":
        assert mm.read(start + PAGE, 3) == b"new"
    assert file.pages == {}
    verify(host)


@pytest.mark.parametrize("meanwhile", ["munmap", "mmap over", "split"])
def test_a_truncation_that_lost_its_race_leaves_new_areas_alone(
    mm: Mm, host: HostMemory, trace: Trace, meanwhile: str
) -> None:
    """Without a scheduler i_mmap_rwsem keeps nobody out."""
    file = ShmemFile(host, trace, "file", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x" * 4 * PAGE)
    done: list[str] = []

    def at(label: str) -> None:
        if label != S_DONE or done:
            return
        done.append(label)
        if meanwhile == "munmap":
            mm.munmap(start + PAGE, PAGE)
        elif meanwhile == "split":
            mm.mprotect(start + PAGE, PAGE, R)
        else:
            OPERATIONS["mmap over"](mm, start + PAGE)
            mm.write(start + PAGE, b"new")

    with on_point(at):
        file.truncate(0)
    if meanwhile == "mmap over":
        assert mm.read(start + PAGE, 3) == b"new"
    assert file.pages == {}
    assert not file.i_mmap.taken
    verify(host)
