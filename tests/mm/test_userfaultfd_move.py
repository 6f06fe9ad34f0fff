"""UFFDIO_MOVE: frames change their address, and only the source is announced."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.madvise import MADV_GUARD_INSTALL, MADV_HUGEPAGE, MADV_PAGEOUT
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import EXCLUSIVE, HUGE, SWAP, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.uffd_message import UffdMsg
from xipvm.mmu.userfaultfd import (
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    Userfaultfd,
)
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
MISSING, WP = UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
HOLES = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
Steps = Callable[[], list[str]]


@pytest.fixture
def source(mm: Mm, steps: Steps) -> int:
    """16 pages, the lowest of all; page n of the first 8 begins with n + 1."""
    start = mm.mmap(16 * PAGE, RW, addr=0x2000_0000)
    for page in range(8):
        mm.write(start + page * PAGE, bytes([page + 1]))
    steps()
    return start


@pytest.fixture
def target(mm: Mm, source: int) -> int:
    return mm.mmap(16 * PAGE, RW, addr=source + 64 * PAGE)


@pytest.fixture
def uffd(mm: Mm, target: int) -> Userfaultfd:
    uffd = mm.userfaultfd()
    uffd.register(target, 16 * PAGE, MISSING)
    return uffd


def content(mm: Mm, start: int, pages: int) -> list[int]:
    return [mm.read(start + page * PAGE, 1)[0] for page in range(pages)]


def errno_of(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(MmError) as caught:
        call(*arguments)
    return caught.value.errno


def test_the_order(mm: Mm, source: int, target: int, uffd: Userfaultfd, host: HostMemory, steps: Steps) -> None:
    pfns = [pte_pfn(mm.pgd.get((source >> 12) + page)) for page in range(4)]
    assert uffd.move(target, source, 4 * PAGE) == 4 * PAGE
    assert steps() == ["S CLEAR 0-4", "move", "tlb", "E"]
    assert [pte_pfn(mm.pgd.get((target >> 12) + page)) for page in range(4)] == pfns
    assert mm.pgd.get(target >> 12) & (WRITE | EXCLUSIVE) == WRITE | EXCLUSIVE
    assert content(mm, target, 4) == [1, 2, 3, 4]
    assert content(mm, source, 5) == [0, 0, 0, 0, 5]
    verify(host)


def test_runs_are_broken(mm: Mm, source: int, target: int, uffd: Userfaultfd, steps: Steps) -> None:
    """Each step is announced up to the end of the request: pages 6 and 7, then a hole, then the zero page."""
    mm.read(source + 9 * PAGE, 1)
    steps()
    assert uffd.move(target, source + 6 * PAGE, 4 * PAGE, HOLES) == 4 * PAGE
    assert [word for word in steps() if word[0] == "S"] == ["S CLEAR 6-10", "S CLEAR 8-10", "S CLEAR 9-10"]
    assert mm.pgd.get((target >> 12) + 2) == 0
    assert content(mm, target + 3 * PAGE, 1) == [0]


def test_what_stops_a_move(mm: Mm, host: HostMemory, source: int, target: int, uffd: Userfaultfd) -> None:
    uffd.copy(target + PAGE, b"t" * PAGE)
    assert errno_of(uffd.move, target + PAGE, source, PAGE) == errno.EEXIST
    assert uffd.move(target, source, 2 * PAGE) == PAGE
    assert errno_of(uffd.move, target + 4 * PAGE, source + 8 * PAGE, PAGE) == errno.ENOENT
    assert uffd.move(target + 4 * PAGE, source + 7 * PAGE, 2 * PAGE) == PAGE
    child = mm.fork()
    assert errno_of(uffd.move, target + 8 * PAGE, source + PAGE, PAGE) == errno.EBUSY
    child.exit()
    mm.write(source + PAGE, b"\2")
    pfn = mm.get_user_pages(source + PAGE, write=True).pfn
    host.get(pfn)
    assert errno_of(uffd.move, target + 8 * PAGE, source + PAGE, PAGE) == errno.EBUSY
    mm.put_frame(pfn)
    assert uffd.move(target + 8 * PAGE, source + PAGE, PAGE) == PAGE
    mm.madvise(source, PAGE, MADV_GUARD_INSTALL)
    assert errno_of(uffd.move, target + 9 * PAGE, source, PAGE) == errno.EFAULT
    verify(host)


def test_areas_that_do_not_fit(mm: Mm, source: int, target: int, uffd: Userfaultfd) -> None:
    readonly = mm.mmap(4 * PAGE, R, addr=source + 256 * PAGE)
    shared = mm.mmap(4 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, addr=source + 512 * PAGE)
    mm.write(shared, b"s")
    for src in (readonly, shared):
        assert errno_of(uffd.move, target, src, PAGE) == errno.EINVAL
    assert errno_of(uffd.move, source + 8 * PAGE, source, PAGE) == errno.EINVAL  # is not registered
    assert errno_of(uffd.move, target, source + 15 * PAGE, 2 * PAGE) == errno.EINVAL
    assert errno_of(uffd.move, target + 15 * PAGE, source, 2 * PAGE) == errno.EINVAL
    assert errno_of(uffd.move, target, source + 1024 * PAGE, PAGE) == errno.ENOENT
    assert errno_of(uffd.move, source + 1024 * PAGE, source, PAGE) == errno.ENOENT
    assert errno_of(uffd.move, target, source, 0) == errno.EINVAL
    assert errno_of(uffd.move, target, source + 1, PAGE) == errno.EINVAL
    assert errno_of(uffd.move, target, source, PAGE, 4) == errno.EINVAL
    mm.mlock(source, PAGE)
    assert errno_of(uffd.move, target, source, PAGE) == errno.EINVAL
    assert content(mm, source, 8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_swap_entries(mm: Mm, host: HostMemory, source: int, target: int, uffd: Userfaultfd) -> None:
    mm.swapon(64)
    mm.madvise(source, 2 * PAGE, MADV_PAGEOUT)
    mm.read(source + PAGE, 1)  # back, and its slot is kept
    assert uffd.move(target, source, 2 * PAGE) == 2 * PAGE
    assert mm.pgd.get(target >> 12) & SWAP
    verify(host)
    assert content(mm, target, 2) == [1, 2]
    verify(host)


def test_protection_stays_behind(mm: Mm, host: HostMemory, source: int, target: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(source, 16 * PAGE, WP)
    uffd.register(target, 16 * PAGE, WP | MISSING)
    uffd.writeprotect(source, 4 * PAGE)
    uffd.move(target, source, 4 * PAGE)
    assert not any(entry & UFFD_WP for _, entry in mm.pgd.entries(target >> 12, (target >> 12) + 16))
    verify(host)


def test_a_fault_can_be_answered_by_it(mm: Mm, source: int, target: int) -> None:
    """As a garbage collector does: pages are made elsewhere."""

    def answer(uffd: Userfaultfd, message: UffdMsg) -> None:
        uffd.move(message.address, source + message.address - target, PAGE)

    mm.userfaultfd(answer).register(target, 16 * PAGE, MISSING)
    assert content(mm, target, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert content(mm, source, 8) == [0] * 8


@pytest.mark.parametrize("shift", [0, 8])
def test_huge_pages(shift: int) -> None:
    host = HostMemory(4096 * PAGE, poison="frame")
    size = HUGE_PAGES * PAGE
    mm = Mm(host, Trace())
    mm.notifiers.register(MmuNotifier())
    source = mm.mmap(2 * size, RW, addr=64 * size)
    target = mm.mmap(2 * size, RW, addr=128 * size)
    mm.madvise(source, size, MADV_HUGEPAGE)
    mm.write(source, b"a")
    mm.write(source + 9 * PAGE, b"b")
    pfn = pte_pfn(mm.pgd.get(source >> 12))
    uffd = mm.userfaultfd()
    uffd.register(target, 2 * size, MISSING)
    done = 0
    while done < size:
        done += uffd.move(target + shift * PAGE + done, source + done, size - done)
    entry = mm.pgd.get((target >> 12) + shift)
    assert bool(entry & HUGE) == (shift == 0)
    assert pte_pfn(entry) == pfn
    assert mm.read(target + (9 + shift) * PAGE, 1) == b"b"
    verify(host)
    mm.exit()
    verify(host)
