"""mlock, munlock and brk."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_COLD, MADV_DONTNEED, MADV_FREE, MADV_GUARD_INSTALL, MADV_REMOVE
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, TASK_SIZE, VM_LOCKED
from xipvm.trace.funnel import Trace

PAGE = 4096
NONE, R, RW = 0, 1, 3
Steps = Callable[[], list[str]]


def locked(mm: Mm) -> list[bool]:
    return [bool(area.flags & VM_LOCKED) for area in mm.vmas]


def test_locking_what_is_there_tells_nobody(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    mm.write(start, bytes(16 * PAGE))
    steps()
    mm.mlock(start + 4 * PAGE + 1, 3 * PAGE)
    assert steps() == []
    assert [(area.start - start) // PAGE for area in mm.vmas] == [0, 4, 8]
    assert locked(mm) == [False, True, False]
    mm.munlock(start + 4 * PAGE, 4 * PAGE)
    assert steps() == []
    assert locked(mm) == [False]


def test_locking_faults_in(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, RW)
    mm.read(start, 1)
    steps()
    mm.mlock(start, 2 * PAGE)
    assert steps() == ["alloc", "S CLEAR 0-1", "clear 1", "tlb", "set", "E", "alloc", "set"]
    file = ShmemFile(host, trace, "file", 4 * PAGE)
    for flags, writable in ((MAP_SHARED, True), (MAP_PRIVATE, True)):
        start = mm.mmap(2 * PAGE, RW, flags, file=file)
        mm.mlock(start, 2 * PAGE)
        assert mm.get_user_pages(start, write=False).writable == writable
    start = mm.mmap(PAGE, R, MAP_PRIVATE, file=file)
    mm.mlock(start, PAGE)
    assert mm.pgd.get(start >> 12)
    verify(host)


@pytest.mark.parametrize("advice", [MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_GUARD_INSTALL, MADV_REMOVE])
def test_locked_pages_cannot_be_advised_away(mm: Mm, advice: int) -> None:
    start = mm.mmap(PAGE, RW)
    mm.mlock(start, PAGE)
    with pytest.raises(MmError) as raised:
        mm.madvise(start, PAGE, advice)
    assert raised.value.errno == errno.EINVAL


def test_a_child_has_nothing_locked(mm: Mm) -> None:
    mm.mlock(mm.mmap(PAGE, RW), PAGE)
    assert (locked(mm), locked(mm.fork())) == ([True], [False])


def test_a_locked_area_that_grows_or_moves(mm: Mm) -> None:
    start = mm.mmap(PAGE, RW)
    mm.mlock(start, PAGE)
    mm.mremap(start, PAGE, 3 * PAGE)
    assert mm.pgd.present == 3
    new = mm.mremap(start, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, start + 64 * PAGE)
    assert locked(mm) == [False, True]
    assert mm.read(new, 1) == b"\0"


def test_errors(mm: Mm, host: HostMemory, trace: Trace) -> None:
    start = mm.mmap(2 * PAGE, RW)
    file = ShmemFile(host, trace, "file", PAGE)
    short = mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    none = mm.mmap(PAGE, NONE)

    def error(call: Callable[[int, int], None], addr: int, length: int) -> int:
        with pytest.raises(MmError) as raised:
            call(addr, length)
        return raised.value.errno

    assert error(mm.mlock, start, 64 * PAGE) == errno.ENOMEM
    assert error(mm.munlock, start, 64 * PAGE) == errno.ENOMEM
    assert locked(mm) == [False] * 3
    assert error(mm.mlock, -PAGE, PAGE) == errno.EINVAL
    assert error(mm.mlock, short, 2 * PAGE) == errno.ENOMEM
    assert error(mm.mlock, none, PAGE) == errno.ENOMEM
    mm.mlock(start, 0)
    for _ in range(host.free_frames):
        host.alloc()
    assert error(mm.mlock, start, 2 * PAGE) == errno.EAGAIN
    for pfn in range(2, host.nr_frames):
        host.put(pfn)


def test_brk(mm: Mm, steps: Steps) -> None:
    base = mm.brk()
    assert mm.brk(base + 3 * PAGE - 5) == base + 3 * PAGE - 5
    mm.write(base, b"x" * 3 * PAGE)
    assert mm.brk(base + 5 * PAGE) == mm.brk() == base + 5 * PAGE
    assert [(area.start, area.end) for area in mm.vmas] == [(base, base + 5 * PAGE)]
    steps()
    mm.brk(base + PAGE + 1)
    assert steps() == ["S UNMAP 2-5", "clear 1", "E", "tlb", "free 1"]
    child = mm.fork()
    assert child.brk() == base + PAGE + 1
    child.brk(base + 8 * PAGE)
    assert mm.brk() == base + PAGE + 1
    assert mm.brk(base) == base
    assert mm.vmas == []


def test_brk_that_cannot_be_moved_stays(mm: Mm) -> None:
    base = mm.brk()
    mm.mmap(PAGE, RW, addr=base + 4 * PAGE)
    for addr in (base + 5 * PAGE, base - 1, TASK_SIZE + PAGE):
        assert mm.brk(addr) == base
    assert mm.brk(base + 4 * PAGE) == base + 4 * PAGE
