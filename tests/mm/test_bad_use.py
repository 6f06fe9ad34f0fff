"""Bad use of the API: the documented error, and nothing has changed: neither areas, entries, frames nor listeners."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xipvm.errors import BadInput, HostMemoryError, InternalError, MmError, OutOfFrames
from xipvm.mmu import madvise as advice
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import MS_ASYNC, MS_SYNC, Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.secondary.base import FAULT
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import GFN_LIMIT, MAX_SLOTS, MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    TASK_SIZE,
    VM_LOCKED,
)
from xipvm.notifier import MmuNotifier, MmuNotifiers
from xipvm.notifier.interval import MmuIntervalNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
BASE = 0x10_0000_0000
R, RW = 1, 3
ANON = MAP_PRIVATE | MAP_ANONYMOUS
WRAPS = (1 << 64) - BASE
"""A length with which an address comes round to 0."""


class World:
    """A process with areas of several kinds, a VM, listeners, another process, and one that has exited."""

    def __init__(self, folder: Path) -> None:
        self.host = HostMemory(256 * PAGE, poison="frame")
        self.trace = Trace()
        self.mm = Mm(self.host, self.trace)
        mm = self.mm
        mm.swapon(16)
        path = folder / "file"
        path.write_bytes(b"x" * 4 * PAGE)
        self.shmem = ShmemFile(self.host, self.trace, "memfd", 4 * PAGE)
        self.read_only = HostFile(self.host, self.trace, str(path))
        self.disk = HostFile(self.host, self.trace, str(path), writable=True)
        mm.mmap(4 * PAGE, RW, ANON | MAP_FIXED, addr=BASE)
        mm.mmap(4 * PAGE, RW, MAP_SHARED | MAP_FIXED, addr=BASE + 4 * PAGE, file=self.shmem)
        mm.mmap(2 * PAGE, R, MAP_SHARED | MAP_FIXED, addr=BASE + 8 * PAGE, file=self.read_only)
        mm.mmap(2 * PAGE, 0, ANON | MAP_FIXED, addr=BASE + 10 * PAGE)
        mm.mmap(2 * PAGE, RW, ANON | MAP_FIXED, addr=BASE + 16 * PAGE)  # behind a hole
        mm.mlock(BASE + 17 * PAGE, PAGE)
        mm.write(BASE, b"a" * 3 * PAGE)
        mm.write(BASE + 4 * PAGE, b"b" * PAGE)
        mm.write(BASE + 7 * PAGE, b"c" * PAGE)
        mm.madvise(BASE + 2 * PAGE, PAGE, advice.MADV_PAGEOUT)
        mm.read(BASE + 8 * PAGE, 1)
        mm.brk(mm.start_brk + 2 * PAGE)
        self.kvm = Kvm(mm, self.trace, self.host)
        self.kvm.set_memslot(0, 0, 4, BASE)
        self.kvm.set_memslot(1, 16, 4, BASE + 4 * PAGE, MEM_READONLY)
        self.kvm.set_memslot(2, 32, 2, BASE, MEM_LOG_DIRTY_PAGES)
        assert self.kvm.fault(0, 1) == 0
        self.listener, self.stranger = MmuNotifier(), MmuNotifier()
        mm.notifiers.register(self.listener)
        self.interval = MmuIntervalNotifier()
        mm.notifiers.insert_interval(self.interval, BASE, 4 * PAGE)
        self.child = mm.fork("child")
        self.gone = mm.fork("gone")
        self.gone.exit()
        self.closed = ShmemFile(self.host, self.trace, "closed", 4 * PAGE)
        self.closed.close()
        self.thread = HostThread(mm)

    def snapshot(self) -> dict[str, Any]:
        """Everything that could have changed."""
        meta = self.host.meta_view()
        frames = {name: meta[name].tolist() for name in ("refcount", "mapcount", "mapping", "index")}
        mms = (self.mm, self.child, self.gone)
        swap = self.mm.rmap.swap
        assert swap is not None
        return {
            "areas": [[(repr(area), area.flags, area.anon_chain) for area in mm.vmas] for mm in mms],
            "entries": [mm.pgd.entries(0, 1 << 36) for mm in mms],
            "frames": frames,
            "free": self.host.free_frames,
            "mms": list(self.mm.rmap.mms),
            "listeners": [list(mm.notifiers) for mm in mms],
            "intervals": len(self.mm.notifiers.intervals or ()),
            "slots": [(repr(slot), slot.dirty_bitmap) for slot in self.kvm.memslots],
            "sptes": self.kvm.sptes.entries(0, GFN_LIMIT),
            "vm": (self.kvm.mn_active_invalidate_count, self.kvm.mmu_invalidate_in_progress),
            "swap": (dict(swap.counts), dict(swap.cache), len(swap.areas)),
            "files": [(file.size, dict(file.pages)) for file in (self.shmem, self.read_only, self.closed)],
            "heap": [(mm.start_brk, mm.end_brk) for mm in mms],
            "threads": [list(mm.threads) for mm in mms],
        }


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    verify(world.host)


Call = Callable[[World], object]
AREAS: list[tuple[str, int, Call]] = [
    # mmap
    ("no length", errno.EINVAL, lambda w: w.mm.mmap(0, RW)),
    ("negative length", errno.EINVAL, lambda w: w.mm.mmap(-PAGE, RW)),
    ("more than there is", errno.ENOMEM, lambda w: w.mm.mmap(1 << 47, RW)),
    ("absurd length", errno.ENOMEM, lambda w: w.mm.mmap(1 << 63, RW)),
    ("unknown protection", errno.EINVAL, lambda w: w.mm.mmap(PAGE, 8)),
    ("unknown flag", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, ANON | 1 << 30)),
    ("private and shared", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, ANON | MAP_SHARED)),
    ("neither private nor shared", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, MAP_ANONYMOUS)),
    ("fixed, but where", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, ANON | MAP_FIXED)),
    ("fixed, unaligned", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, ANON | MAP_FIXED, addr=BASE + 1)),
    ("fixed, negative", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, ANON | MAP_FIXED, addr=-PAGE)),
    ("fixed, too high", errno.ENOMEM, lambda w: w.mm.mmap(2 * PAGE, RW, ANON | MAP_FIXED, addr=TASK_SIZE - PAGE)),
    ("fixed, wraps", errno.ENOMEM, lambda w: w.mm.mmap(WRAPS, RW, ANON | MAP_FIXED, addr=BASE)),
    ("taken", errno.EEXIST, lambda w: w.mm.mmap(4 * PAGE, RW, ANON | MAP_FIXED_NOREPLACE, addr=BASE + 14 * PAGE)),
    ("no file", errno.EBADF, lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED)),
    ("closed file", errno.EBADF, lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED, file=w.closed)),
    ("negative offset", errno.EINVAL, lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED, file=w.shmem, pgoff=-1)),
    ("absurd offset", errno.EOVERFLOW, lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED, file=w.shmem, pgoff=1 << 52)),
    ("a file that is read-only", errno.EACCES, lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED, file=w.read_only)),
    ("over something, read-only file", errno.EACCES,
     lambda w: w.mm.mmap(PAGE, RW, MAP_SHARED | MAP_FIXED, addr=BASE, file=w.read_only)),
    # munmap
    ("unaligned", errno.EINVAL, lambda w: w.mm.munmap(BASE + 1, PAGE)),
    ("nothing", errno.EINVAL, lambda w: w.mm.munmap(BASE, 0)),
    ("negative", errno.EINVAL, lambda w: w.mm.munmap(BASE, -PAGE)),
    ("negative address", errno.EINVAL, lambda w: w.mm.munmap(-PAGE, 4 * PAGE)),
    ("too high", errno.EINVAL, lambda w: w.mm.munmap(TASK_SIZE - PAGE, 2 * PAGE)),
    ("wraps", errno.EINVAL, lambda w: w.mm.munmap(BASE, WRAPS)),
    ("absurd", errno.EINVAL, lambda w: w.mm.munmap(BASE, 1 << 80)),
    # mremap
    ("unaligned", errno.EINVAL, lambda w: w.mm.mremap(BASE + 1, PAGE, PAGE)),
    ("to nothing", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, 0)),
    ("to less than nothing", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, -PAGE)),
    ("negative", errno.EINVAL, lambda w: w.mm.mremap(BASE, -PAGE, PAGE)),
    ("unknown flag", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, PAGE, 64)),
    ("fixed, may not move", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, PAGE, MREMAP_FIXED, BASE + 99 * PAGE)),
    ("DONTUNMAP, may not move", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, PAGE, MREMAP_DONTUNMAP)),
    ("DONTUNMAP, larger", errno.EINVAL,
     lambda w: w.mm.mremap(BASE, PAGE, 2 * PAGE, MREMAP_DONTUNMAP | MREMAP_MAYMOVE)),
    ("fixed, but where", errno.EINVAL, lambda w: w.mm.mremap(BASE, PAGE, PAGE, MREMAP_FIXED | MREMAP_MAYMOVE)),
    ("onto itself", errno.EINVAL,
     lambda w: w.mm.mremap(BASE, 2 * PAGE, 2 * PAGE, MREMAP_FIXED | MREMAP_MAYMOVE, BASE + PAGE)),
    ("too high", errno.EINVAL,
     lambda w: w.mm.mremap(BASE, PAGE, 2 * PAGE, MREMAP_FIXED | MREMAP_MAYMOVE, TASK_SIZE - PAGE)),
    ("nothing there", errno.EFAULT, lambda w: w.mm.mremap(BASE + 13 * PAGE, PAGE, 2 * PAGE)),
    ("two areas", errno.EFAULT, lambda w: w.mm.mremap(BASE + 3 * PAGE, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE)),
    ("no room", errno.ENOMEM, lambda w: w.mm.mremap(BASE, 4 * PAGE, 5 * PAGE)),
    ("no room anywhere", errno.ENOMEM, lambda w: w.mm.mremap(BASE, 4 * PAGE, 1 << 47, MREMAP_MAYMOVE)),
    ("private twice", errno.EINVAL, lambda w: w.mm.mremap(BASE, 0, PAGE, MREMAP_MAYMOVE)),
    # mprotect
    ("unaligned", errno.EINVAL, lambda w: w.mm.mprotect(BASE + 1, PAGE, R)),
    ("negative", errno.EINVAL, lambda w: w.mm.mprotect(BASE, -PAGE, R)),
    ("unknown protection", errno.EINVAL, lambda w: w.mm.mprotect(BASE, PAGE, 16)),
    ("a hole", errno.ENOMEM, lambda w: w.mm.mprotect(BASE + 10 * PAGE, 8 * PAGE, R)),
    ("wraps", errno.ENOMEM, lambda w: w.mm.mprotect(BASE, WRAPS, R)),
    ("a file that is read-only", errno.EACCES, lambda w: w.mm.mprotect(BASE, 10 * PAGE, RW)),
    # madvise
    ("unaligned", errno.EINVAL, lambda w: w.mm.madvise(BASE + 1, PAGE, advice.MADV_DONTNEED)),
    ("negative", errno.EINVAL, lambda w: w.mm.madvise(BASE, -1, advice.MADV_DONTNEED)),
    ("no such advice", errno.EINVAL, lambda w: w.mm.madvise(BASE, PAGE, 1000)),
    ("a hole", errno.ENOMEM, lambda w: w.mm.madvise(BASE + 10 * PAGE, 7 * PAGE, advice.MADV_DONTNEED)),
    ("wraps", errno.EINVAL, lambda w: w.child.madvise(BASE, WRAPS, advice.MADV_DONTNEED)),
    ("absurd", errno.EINVAL, lambda w: w.child.madvise(BASE, 1 << 70, advice.MADV_COLD)),
    ("locked", errno.EINVAL, lambda w: w.mm.madvise(BASE + 16 * PAGE, 2 * PAGE, advice.MADV_DONTNEED)),
    ("locked, to swap", errno.EINVAL, lambda w: w.mm.madvise(BASE + 16 * PAGE, 2 * PAGE, advice.MADV_PAGEOUT)),
    ("FREE of a file", errno.EINVAL, lambda w: w.mm.madvise(BASE + 3 * PAGE, 2 * PAGE, advice.MADV_FREE)),
    ("REMOVE without a file", errno.EINVAL, lambda w: w.mm.madvise(BASE, PAGE, advice.MADV_REMOVE)),
    ("REMOVE, read-only", errno.EACCES, lambda w: w.mm.madvise(BASE + 8 * PAGE, PAGE, advice.MADV_REMOVE)),
    ("POPULATE of nothing to read", errno.EINVAL,
     lambda w: w.mm.madvise(BASE + 9 * PAGE, 2 * PAGE, advice.MADV_POPULATE_READ)),
    ("POPULATE_WRITE, read-only", errno.EINVAL,
     lambda w: w.mm.madvise(BASE + 7 * PAGE, 2 * PAGE, advice.MADV_POPULATE_WRITE)),
    ("GUARD, locked", errno.EINVAL, lambda w: w.mm.madvise(BASE + 17 * PAGE, PAGE, advice.MADV_GUARD_INSTALL)),
    # mlock, msync, clear_refs, NUMA
    ("negative", errno.EINVAL, lambda w: w.mm.mlock(BASE, -PAGE)),
    ("negative address", errno.EINVAL, lambda w: w.mm.munlock(-PAGE, PAGE)),
    ("wraps", errno.EINVAL, lambda w: w.mm.mlock(BASE, WRAPS)),
    ("a hole", errno.ENOMEM, lambda w: w.mm.mlock(BASE + 11 * PAGE, 6 * PAGE)),
    ("a hole", errno.ENOMEM, lambda w: w.mm.munlock(BASE + 12 * PAGE, PAGE)),
    ("unaligned", errno.EINVAL, lambda w: w.mm.msync(BASE + 1, PAGE)),
    ("both", errno.EINVAL, lambda w: w.mm.msync(BASE, PAGE, MS_SYNC | MS_ASYNC)),
    ("unknown flag", errno.EINVAL, lambda w: w.mm.msync(BASE, PAGE, 32)),
    ("a hole", errno.ENOMEM, lambda w: w.mm.msync(BASE + 11 * PAGE, 6 * PAGE)),
    ("wraps", errno.ENOMEM, lambda w: w.mm.msync(BASE, WRAPS)),
    ("no such mode", errno.EINVAL, lambda w: w.mm.clear_refs(0)),
    ("no such node", errno.ENODEV, lambda w: w.mm.move_pages(BASE, PAGE, 1)),
    ("unaligned", errno.EINVAL, lambda w: w.mm.move_pages(BASE + 8, PAGE, 0)),
    ("no such node", errno.EINVAL, lambda w: w.mm.mbind(BASE, PAGE, 7)),
    ("a hole", errno.EFAULT, lambda w: w.mm.mbind(BASE + 11 * PAGE, 2 * PAGE, 0)),
    ("wraps", errno.EINVAL, lambda w: w.mm.mbind(BASE, WRAPS, 0)),
    # accesses
    ("a hole", errno.EFAULT, lambda w: w.mm.read(BASE + 13 * PAGE, 1)),
    ("negative", errno.EFAULT, lambda w: w.mm.read(-1, 1)),
    ("too high", errno.EFAULT, lambda w: w.mm.read(TASK_SIZE, 1)),
    ("beyond what has addresses", errno.EFAULT, lambda w: w.mm.write(1 << 64, b"x")),
    ("negative size", errno.EFAULT, lambda w: w.mm.read(BASE, -1)),
    ("read-only", errno.EFAULT, lambda w: w.mm.write(BASE + 8 * PAGE, b"x")),
    ("PROT_NONE", errno.EFAULT, lambda w: w.mm.read(BASE + 10 * PAGE, 1)),
    ("the second page", errno.EFAULT, lambda w: w.mm.write(BASE + 8 * PAGE - 4, bytes(8))),
    ("negative", errno.EFAULT, lambda w: w.mm.get_user_pages(-PAGE, write=False)),
    ("beyond what has addresses", errno.EFAULT, lambda w: w.mm.get_user_pages(1 << 63, write=False)),
    ("forced into what is shared", errno.EIO, lambda w: w.mm.access_remote_vm(BASE + 8 * PAGE, b"x")),
    ("forced into a hole", errno.EIO, lambda w: w.mm.access_remote_vm(BASE + 13 * PAGE, b"x")),
    ("remote, read-only", errno.EFAULT, lambda w: w.mm.process_vm_writev(BASE + 8 * PAGE, b"x")),
    # the system
    ("no pages", errno.EINVAL, lambda w: w.mm.swapon(0)),
    ("negative pages", errno.EINVAL, lambda w: w.mm.swapon(-1)),
    ("no such folder", errno.ENOENT, lambda w: w.mm.swapon(8, "/nonexistent/swap")),
    ("a folder", errno.EISDIR, lambda w: w.mm.swapon(8, "/")),
    ("the zero page moves", errno.EBUSY, lambda w: migrate_page(w.host, w.trace, 0)),
    ("a free frame moves", errno.EBUSY, lambda w: migrate_page(w.host, w.trace, 200)),
    ("unaligned block", errno.EINVAL, lambda w: w.disk.direct_write(1, bytes(512))),
    ("closed", errno.EBADF, lambda w: w.closed.pwrite(0, b"x")),
    ("closed", errno.EBADF, lambda w: w.closed.pread(0, 1)),
    ("closed", errno.EBADF, lambda w: w.closed.truncate(8 * PAGE)),
    ("negative size", errno.EINVAL, lambda w: w.shmem.truncate(-1)),
    ("negative offset", errno.EINVAL, lambda w: w.shmem.pwrite(-8, b"x")),
    ("negative offset", errno.EINVAL, lambda w: w.shmem.pread(-8, 8)),
    ("negative hole", errno.EINVAL, lambda w: w.shmem.punch_hole(-1, 2)),
    ("no hole", errno.EINVAL, lambda w: w.shmem.punch_hole(0, 0)),
    ("half a block", errno.EINVAL, lambda w: w.disk.direct_write(0, bytes(256))),
    ("negative block", errno.EINVAL, lambda w: w.disk.direct_write(-512, bytes(512))),
    ("read-only", errno.EBADF, lambda w: w.read_only.pwrite(0, b"x")),
    ("read-only", errno.EINVAL, lambda w: w.read_only.truncate(PAGE)),
    ("read-only", errno.EBADF, lambda w: w.read_only.punch_hole(0, 1)),
    ("read-only", errno.EBADF, lambda w: w.read_only.direct_write(0, bytes(512))),
]  # fmt: skip

NOTIFIERS: list[tuple[str, int, Call]] = [
    ("registered twice", errno.EINVAL, lambda w: w.mm.notifiers.register(w.listener)),
    ("registered elsewhere", errno.EINVAL, lambda w: w.child.notifiers.register(w.listener)),
    ("a VM that is registered", errno.EINVAL, lambda w: w.mm.notifiers.register(w.kvm)),
    ("never registered", errno.EINVAL, lambda w: w.mm.notifiers.unregister(w.stranger)),
    ("unregistered elsewhere", errno.EINVAL, lambda w: w.child.notifiers.unregister(w.listener)),
    ("a dead mm", errno.ESRCH, lambda w: w.gone.notifiers.register(w.stranger)),
    ("never registered, dead mm", errno.EINVAL, lambda w: w.gone.notifiers.unregister(w.stranger)),
    ("twice", errno.EINVAL, lambda w: w.mm.notifiers.insert_interval(w.interval, BASE, PAGE)),
    ("elsewhere", errno.EINVAL, lambda w: w.child.notifiers.insert_interval(w.interval, BASE, PAGE)),
    ("nothing", errno.EOVERFLOW, lambda w: w.mm.notifiers.insert_interval(MmuIntervalNotifier(), BASE, 0)),
    ("negative", errno.EOVERFLOW, lambda w: w.mm.notifiers.insert_interval(MmuIntervalNotifier(), BASE, -PAGE)),
    ("wraps", errno.EOVERFLOW, lambda w: w.mm.notifiers.insert_interval(MmuIntervalNotifier(), BASE, 1 << 64)),
    ("never inserted", errno.EINVAL, lambda w: w.mm.notifiers.remove_interval(MmuIntervalNotifier())),
    ("inserted elsewhere", errno.EINVAL, lambda w: w.child.notifiers.remove_interval(w.interval)),
    ("not inserted", errno.EINVAL, lambda w: MmuIntervalNotifier().read_begin()),
    ("a VM on a dead mm", errno.ESRCH, lambda w: Kvm(w.gone, w.trace, w.host)),
]

SLOTS: list[tuple[str, int, Call]] = [
    ("no pages", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 0, BASE)),
    ("negative pages", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, -1, BASE)),
    ("unaligned", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 1, BASE + 1)),
    ("negative address", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 1, -PAGE)),
    ("too high", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 2, TASK_SIZE)),
    ("wraps", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 1 << 60, BASE)),
    ("negative frame", errno.EINVAL, lambda w: w.kvm.set_memslot(5, -1, 1, BASE)),
    ("frame too high", errno.EINVAL, lambda w: w.kvm.set_memslot(5, GFN_LIMIT - 1, 2, BASE)),
    ("no such slot number", errno.EINVAL, lambda w: w.kvm.set_memslot(MAX_SLOTS, 100, 1, BASE)),
    ("negative slot number", errno.EINVAL, lambda w: w.kvm.set_memslot(-1, 100, 1, BASE)),
    ("unknown flag", errno.EINVAL, lambda w: w.kvm.set_memslot(5, 100, 1, BASE, 1 << 30)),
    ("overlaps from below", errno.EEXIST, lambda w: w.kvm.set_memslot(5, 14, 3, BASE)),
    ("overlaps from above", errno.EEXIST, lambda w: w.kvm.set_memslot(5, 19, 3, BASE)),
    ("moved onto another", errno.EEXIST, lambda w: w.kvm.set_memslot(0, 18, 4, BASE)),
    ("another size", errno.EINVAL, lambda w: w.kvm.set_memslot(0, 0, 5, BASE)),
    ("another address", errno.EINVAL, lambda w: w.kvm.set_memslot(0, 0, 4, BASE + PAGE)),
    ("another flag", errno.EINVAL, lambda w: w.kvm.set_memslot(0, 0, 4, BASE, MEM_READONLY)),
    ("deleted twice", errno.EINVAL, lambda w: w.kvm.delete_memslot(9)),
    ("no such log", errno.EINVAL, lambda w: w.kvm.get_dirty_log(9)),
    ("not logged", errno.ENOENT, lambda w: w.kvm.get_dirty_log(0)),
]


def named(calls: list[tuple[str, int, Call]]) -> list[Any]:
    """Called by what is called: the last name but those of constants and of keywords."""
    owners = (Mm, Kvm, MmuNotifiers, MmuIntervalNotifier, HostFile)
    params = []
    for what, error, call in calls:
        names = [
            name for name in call.__code__.co_names if any(callable(getattr(owner, name, None)) for owner in owners)
        ]
        params.append(pytest.param(error, call, id=f"{(names or ['made'])[-1]}: {what}"))
    return params


@pytest.mark.parametrize(("error", "call"), named(AREAS + NOTIFIERS + SLOTS))
def test_the_documented_error_and_no_change(world: World, error: int, call: Call) -> None:
    before = world.snapshot()
    with pytest.raises(MmError) as raised:
        call(world)
    assert errno.errorcode[raised.value.errno] == errno.errorcode[error]
    assert world.snapshot() == before


DEAD: list[Callable[[Mm], object]] = [
    lambda mm: mm.mmap(PAGE, RW),
    lambda mm: mm.mmap(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS),
    lambda mm: mm.munmap(BASE, PAGE),
    lambda mm: mm.mremap(BASE, PAGE, 2 * PAGE, MREMAP_MAYMOVE),
    lambda mm: mm.brk(mm.start_brk + PAGE),
    lambda mm: mm.mprotect(BASE, PAGE, R),
    *[
        (lambda mm, kind=kind: mm.madvise(BASE, PAGE, kind))
        for kind in (
            advice.MADV_DONTNEED,
            advice.MADV_FREE,
            advice.MADV_PAGEOUT,
            advice.MADV_POPULATE_WRITE,
            advice.MADV_REMOVE,
            advice.MADV_WILLNEED,
            advice.MADV_DONTFORK,
            advice.MADV_MERGEABLE,
            advice.MADV_GUARD_INSTALL,
        )
    ],
    lambda mm: mm.mlock(BASE, PAGE),
    lambda mm: mm.munlock(BASE, PAGE),
    lambda mm: mm.msync(BASE, PAGE),
    lambda mm: mm.clear_refs(1),
    lambda mm: mm.clear_refs(4),
    lambda mm: mm.move_pages(BASE, PAGE, 0),
    lambda mm: mm.mbind(BASE, PAGE, 0),
    lambda mm: mm.fork(),
    lambda mm: HostThread(mm),
]
ACCESSES: list[Callable[[Mm], object]] = [
    lambda mm: mm.read(BASE, 1),
    lambda mm: mm.write(BASE, b"x"),
    lambda mm: mm.get_user_pages(BASE, write=False),
    lambda mm: mm.access_remote_vm(BASE, b"x"),
    lambda mm: mm.process_vm_writev(BASE, b"x"),
]


@pytest.mark.parametrize("number", range(len(DEAD + ACCESSES)))
def test_a_dead_mm(world: World, number: int) -> None:
    before = world.snapshot()
    with pytest.raises(MmError) as raised:
        (DEAD + ACCESSES)[number](world.gone)
    assert raised.value.errno == errno.ESRCH
    assert world.snapshot() == before


def test_an_exit_is_an_exit(world: World) -> None:
    before = world.snapshot()
    world.gone.exit()
    assert world.gone.soft_dirty(BASE, BASE + PAGE) == []
    assert world.gone.find_vma(BASE) is None
    assert world.snapshot() == before


@pytest.mark.parametrize("hva", [BASE + 13 * PAGE, TASK_SIZE, 1 << 64, -8])
def test_a_thread_goes_astray(world: World, hva: int) -> None:
    before = world.snapshot()
    with pytest.raises(MmError) as raised:
        world.thread.load(hva, 8)
    assert raised.value.errno == errno.EFAULT
    with pytest.raises(MmError):
        world.thread.store(hva, b"12345678")
    assert world.snapshot() == before


def test_a_thread_says_which_signal(world: World) -> None:
    with pytest.raises(HostAccessError, match="SIGSEGV"):
        world.thread.store(BASE + 8 * PAGE, b"x")
    world.shmem.truncate(0)
    with pytest.raises(HostAccessError, match="SIGBUS"):
        world.thread.load(BASE + 4 * PAGE, 1)


@pytest.mark.parametrize("gfn", [-1, 200, GFN_LIMIT, 1 << 70])
def test_a_guest_frame_that_is_none(world: World, gfn: int) -> None:
    before = world.snapshot()
    assert world.kvm.fault(gfn, 0) == FAULT
    assert world.snapshot() == before


def test_a_vm_that_is_gone(world: World) -> None:
    world.kvm.destroy()
    before = world.snapshot()
    world.kvm.destroy()
    assert world.kvm.fault(0, 0) == FAULT
    with pytest.raises(MmError):
        world.mm.notifiers.unregister(world.kvm)
    assert world.snapshot() == before


def test_swap_that_is_not_there(world: World) -> None:
    world.mm.swapoff()
    before_areas = [repr(area) for area in world.mm.vmas]
    with pytest.raises(MmError) as raised:
        world.mm.swapoff()
    assert raised.value.errno == errno.EINVAL
    assert [repr(area) for area in world.mm.vmas] == before_areas


# ---- frames


@pytest.mark.parametrize("size", [0, -PAGE, PAGE, 3 * PAGE + 1, 1 << 60])
def test_memory_of_an_impossible_size(size: int) -> None:
    with pytest.raises(HostMemoryError):
        HostMemory(size)


FRAMES: list[tuple[type[Exception], Call]] = [
    (IndexError, lambda w: w.host.refcount(1 << 20)),
    (IndexError, lambda w: w.host.read(5000, 0, 1)),
    (IndexError, lambda w: w.host.read(1, PAGE - 1, 2)),
    (IndexError, lambda w: w.host.write(1, -1, b"x")),
    (IndexError, lambda w: w.host.view(1 << 20)),
    (InternalError, lambda w: w.host.write(0, 0, b"x")),
    (InternalError, lambda w: w.host.put(200)),
    (InternalError, lambda w: w.host.get(200)),
    (InternalError, lambda w: w.host.add_mapcount(200, -1)),
    (IndexError, lambda w: w.host.remove_device(1 << 24)),
    (BadInput, lambda w: HostFile(w.host, w.trace, "/nonexistent/file")),
]


@pytest.mark.parametrize("number", range(len(FRAMES)))
def test_frames(world: World, number: int) -> None:
    error, call = FRAMES[number]
    before = world.snapshot()
    with pytest.raises(error):
        call(world)
    assert world.snapshot() == before


def test_no_frame_left(world: World) -> None:
    held = [world.host.alloc() for _ in range(world.host.free_frames)]
    before = world.snapshot()
    with pytest.raises(OutOfFrames):
        world.host.alloc()
    for call in (
        lambda: world.mm.write(BASE + 3 * PAGE, b"x"),
        lambda: world.mm.write(BASE, b"x"),  # a copy
        lambda: world.mm.read(BASE + 2 * PAGE, 1),  # from swap
    ):
        with pytest.raises(MmError) as raised:
            call()
        assert raised.value.errno == errno.ENOMEM
        assert world.snapshot() == before
    for pfn in held:
        world.host.put(pfn)


def test_memory_that_was_closed(tmp_path: Path) -> None:
    world = World(tmp_path)
    areas = [repr(area) for area in world.mm.vmas]
    world.host.close()
    world.host.close()
    with pytest.raises(OutOfFrames):
        world.host.alloc()
    with pytest.raises(IndexError):
        world.host.read(1, 0, 1)
    for call in DEAD:
        with pytest.raises(MmError) as raised:
            call(world.mm)
        assert raised.value.errno == errno.ESRCH
    assert [repr(area) for area in world.mm.vmas] == areas
    with pytest.raises(HostMemoryError):
        Mm(world.host, world.trace)


def test_the_world_is_what_it_says(world: World) -> None:
    """The table above means something only if there is something to change."""
    assert any(area.flags & VM_LOCKED for area in world.mm.vmas)
    assert world.mm.rmap.swap is not None
    assert world.mm.rmap.swap.counts
    before = world.snapshot()
    world.mm.munmap(BASE, PAGE)
    after = world.snapshot()
    assert [name for name in before if before[name] != after[name]] == ["areas", "entries", "frames"]
