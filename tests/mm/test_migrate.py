"""Page migration: what is announced, who waits, what does not move, and where the content is afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import PG_DIRTY, HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_GUARD_INSTALL
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import EXCLUSIVE, MAPPED, MIGRATION, WRITE, pte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
Steps = Callable[[], list[str]]


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """4 pages of private anonymous memory, all written: page n begins with the byte n."""
    start = mm.mmap(4 * PAGE, RW)
    for page in range(4):
        mm.write(start + page * PAGE, bytes([page]) * 8)
    steps()
    return start


def frame(mm: Mm, hva: int) -> int:
    entry = mm.pgd.get(hva >> 12)
    assert entry & MAPPED
    return pte_pfn(entry)


def during(label: str, action: Callable[[], object]) -> Callable[[str], None]:
    """A hook that does ``action`` at the first schedule point ``label``."""
    done: list[str] = []

    def hook(at: str) -> None:
        if at == label and not done:
            done.append(at)
            action()

    return hook


def test_the_order(mm: Mm, trace: Trace, host: HostMemory, area: int, steps: Steps) -> None:
    old = frame(mm, area + PAGE)
    new = migrate_page(host, trace, old)
    assert steps() == ["alloc", "S CLEAR 1-2", "clear 1", "tlb", "nonpresent", "E", "set", "free 1"]
    assert new != old
    assert frame(mm, area + PAGE) == new
    assert host.refcount(old) == 0
    assert mm.read(area + PAGE, 8) == b"\1" * 8
    assert steps() == []
    mm.write(area + PAGE, b"new")  # the right to write has come along
    assert steps() == []


def test_a_page_of_several_processes(mm: Mm, trace: Trace, host: HostMemory, area: int, steps: Steps) -> None:
    child = mm.fork()
    grandchild = child.fork()
    old = frame(mm, area)
    steps()
    new = migrate_page(host, trace, old)
    assert [frame(each, area) for each in (mm, child, grandchild)] == [new] * 3
    assert (host.refcount(new), host.mapcount(new)) == (3, 3)
    verify(host)
    child.write(area, b"child")
    assert (mm.read(area, 5), child.read(area, 5)) == (b"\0" * 5, b"child")


def test_every_announcement_comes_before_anything_is_lost(mm: Mm, trace: Trace, host: HostMemory, area: int) -> None:
    class Listener(MmuNotifier):
        seen: list[tuple[int, int]] = []

        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            self.seen.append((range.start, mm.pgd.get(area >> 12) & MAPPED))
            return 0

    mm.notifiers.register(listener := Listener())
    migrate_page(host, trace, frame(mm, area))
    assert listener.seen == [(area, 1)]


def test_host_threads_lose_the_old_frame(mm: Mm, trace: Trace, host: HostMemory, area: int) -> None:
    thread = HostThread(mm)
    thread.store(area, b"before")
    migrate_page(host, trace, frame(mm, area))
    assert not thread.tlb
    assert thread.load(area, 6) == b"before"


@pytest.mark.parametrize("share", [MAP_SHARED, MAP_PRIVATE])
def test_a_page_of_the_page_cache(mm: Mm, trace: Trace, host: HostMemory, share: int) -> None:
    file = ShmemFile(host, trace, "file", 4 * PAGE)
    file.pwrite(2 * PAGE, b"cached")
    start = mm.mmap(4 * PAGE, RW, share, file=file)
    assert mm.read(start + 2 * PAGE, 6) == b"cached"
    new = migrate_page(host, trace, frame(mm, start + 2 * PAGE))
    assert file.pages[2] == new
    verify(host)
    mm.write(start + 2 * PAGE, b"stored")
    assert file.pread(2 * PAGE, 6) == (b"stored" if share == MAP_SHARED else b"cached")
    mm.exit()
    file.close()


def test_a_cached_page_that_nobody_maps(trace: Trace, host: HostMemory, mm: Mm) -> None:
    file = ShmemFile(host, trace, "file", PAGE)
    file.pwrite(0, b"cached")
    assert file.pages[0] == file.pages[0]
    new = migrate_page(host, trace, file.pages[0])
    assert file.pages[0] == new
    assert file.pread(0, 6) == b"cached"
    file.close()


def test_what_was_written_is_still_to_be_written(trace: Trace, host: HostMemory, mm: Mm, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"." * PAGE)
    file = HostFile(host, trace, str(path), writable=True)
    start = mm.mmap(PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"dirty")
    assert host.flags(migrate_page(host, trace, frame(mm, start))) & PG_DIRTY
    mm.msync(start, PAGE)
    assert path.read_bytes()[:6] == b"dirty."
    mm.exit()
    file.close()


def test_a_page_that_moves_while_it_is_written_back(trace: Trace, host: HostMemory, mm: Mm, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"." * PAGE)
    file = HostFile(host, trace, str(path), writable=True)
    start = mm.mmap(PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"dirty")
    old = frame(mm, start)
    failed: list[int] = []

    def move() -> None:
        with pytest.raises(MmError) as error:
            migrate_page(host, trace, old)
        failed.append(error.value.errno)

    mm.notifiers.register(MmuNotifier())
    with on_point(during("notifier.range_end.done", move)):
        mm.msync(start, PAGE)
    assert failed == [errno.EAGAIN]
    assert path.read_bytes()[:6] == b"dirty."
    mm.exit()
    file.close()


def test_a_held_page_stays(mm: Mm, trace: Trace, host: HostMemory, area: int, events: list[Event]) -> None:
    old, entry = frame(mm, area), mm.pgd.get(area >> 12)
    host.get(old)
    events.clear()
    with pytest.raises(MmError) as error:
        migrate_page(host, trace, old)
    assert error.value.errno == errno.EAGAIN
    assert mm.pgd.get(area >> 12) == entry
    assert entry & WRITE
    assert entry & EXCLUSIVE
    (event,) = [event for event in events if event.kind == "page_migrate"]
    assert event.fields["moved"] is False
    verify(host, held={old: 1})
    host.put(old)


def test_the_zero_page_stays(mm: Mm, trace: Trace, host: HostMemory) -> None:
    start = mm.mmap(PAGE, RW)
    mm.read(start, 1)
    with pytest.raises(MmError) as error:
        migrate_page(host, trace, 0)
    assert error.value.errno == errno.EBUSY


def test_a_fault_waits_for_the_migration(mm: Mm, trace: Trace, host: HostMemory, area: int) -> None:
    """Whoever waits is further up the stack here, so it is told that it waits for ever."""
    errors: list[int] = []

    def access() -> None:
        assert mm.pgd.get(area >> 12) & MIGRATION
        for write in (False, True):
            with pytest.raises(MmError) as error:
                mm.get_user_pages(area, write=write)
            errors.append(error.value.errno)

    with on_point(during("mm.migrate.unmapped", access)):
        new = migrate_page(host, trace, frame(mm, area))
    assert errors == [errno.EDEADLK] * 2
    assert mm.get_user_pages(area, write=True).pfn == new


def test_a_waiting_fault_goes_on(mm: Mm, area: int, events: list[Event]) -> None:
    entry, page = mm.pgd.get(area >> 12), area >> 12
    mm.pgd.set(page, MIGRATION | entry & ~MAPPED)
    events.clear()
    with on_point(during("mm.migration_entry_wait", lambda: mm.pgd.set(page, entry))):
        assert mm.read(area, 1) == b"\0"
    assert [event.fields["result"] for event in events if event.kind == "mm_fault"] == ["migration"]


@pytest.mark.parametrize(
    "change",
    [
        lambda mm, area: mm.munmap(area, PAGE),
        lambda mm, area: mm.madvise(area, PAGE, MADV_DONTNEED),
        lambda mm, area: mm.madvise(area, PAGE, MADV_GUARD_INSTALL),
        lambda mm, area: mm.exit(),
    ],
)
def test_a_page_that_goes_away_meanwhile(
    mm: Mm, trace: Trace, host: HostMemory, area: int, change: Callable[[Mm, int], None]
) -> None:
    old = frame(mm, area)
    with on_point(during("mm.migrate.unmapped", lambda: change(mm, area))):
        new = migrate_page(host, trace, old)
    assert (host.refcount(old), host.refcount(new)) == (0, 0)


def test_a_fork_meanwhile(mm: Mm, trace: Trace, host: HostMemory, area: int) -> None:
    children: list[Mm] = []
    with on_point(during("mm.migrate.unmapped", lambda: children.append(mm.fork()))):
        new = migrate_page(host, trace, frame(mm, area))
    assert [frame(each, area) for each in (mm, *children)] == [new] * 2
    verify(host)
    mm.write(area, b"parent")
    assert children[0].read(area, 6) == b"\0" * 6


@pytest.mark.parametrize("prot", [0, R])
def test_mprotect_meanwhile(mm: Mm, trace: Trace, host: HostMemory, area: int, prot: int) -> None:
    with on_point(during("mm.migrate.unmapped", lambda: mm.mprotect(area, PAGE, prot))):
        migrate_page(host, trace, frame(mm, area))
    verify(host)
    with pytest.raises(MmError):
        mm.write(area, b"x")
    mm.mprotect(area, PAGE, RW)
    mm.write(area, b"x")


def test_truncation_meanwhile(mm: Mm, trace: Trace, host: HostMemory) -> None:
    file = ShmemFile(host, trace, "file", PAGE)
    start = mm.mmap(PAGE, RW, MAP_SHARED, file=file)
    mm.write(start, b"x")
    with on_point(during("mm.migrate.unmapped", lambda: file.truncate(0))):
        migrate_page(host, trace, frame(mm, start))
    assert not file.pages
    mm.exit()
    file.close()


def test_compact_memory_moves_all_but_held_pages(mm: Mm, trace: Trace, host: HostMemory, area: int) -> None:
    held = frame(mm, area + PAGE)
    host.get(held)
    before = [frame(mm, area + page * PAGE) for page in range(4)]
    assert compact_memory(host, trace) == 3
    after = [frame(mm, area + page * PAGE) for page in range(4)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False, False]
    assert [mm.read(area + page * PAGE, 1)[0] for page in range(4)] == [0, 1, 2, 3]
    host.put(held)


def test_move_pages_and_mbind_to_the_node_where_everything_is(mm: Mm, area: int, steps: Steps) -> None:
    mm.madvise(area + PAGE, PAGE, MADV_DONTNEED)
    mm.munmap(area + 3 * PAGE, PAGE)
    steps()
    assert mm.move_pages(area, 4 * PAGE, 0) == [0, -errno.ENOENT, 0, -errno.EFAULT]
    mm.mbind(area, 3 * PAGE, 0)
    assert steps() == []
    for call, error in (
        (lambda: mm.move_pages(area, PAGE, 1), errno.ENODEV),
        (lambda: mm.mbind(area, PAGE, 1), errno.EINVAL),
        (lambda: mm.mbind(area, 4 * PAGE, 0), errno.EFAULT),
    ):
        with pytest.raises(MmError) as raised:
            call()
        assert raised.value.errno == error
