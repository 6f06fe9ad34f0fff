"""Guests, splits, collapses and whatever else happens to huge pages, as actors that a scheduler mixes at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from xipvm.actors import give_way
from xipvm.check import Oracle
from xipvm.errors import DeadlockError, LockOrderError, MmError
from xipvm.locks import checking
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_page import deferred_split_scan, split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE, MADV_DONTNEED, MADV_HUGEPAGE, MADV_PAGEOUT
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import MAPPED, SPECIAL, pte_pfn
from xipvm.mmu.secondary import base
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

PAGE = 4096
KEPT = (0, 5, 300, 511)
"""Pages that nobody gives away: each begins with its number."""
GONE = 100
"""From here on 4 pages are given away again and again."""


class World:
    """2 MiB of a VM, anonymous or of a memory file."""

    def __init__(self, kind: str) -> None:
        self.trace, self.oracle = Trace(), Oracle()
        self.trace.attach(self.oracle)
        self.host = HostMemory(6 * HPAGE_SIZE, poison="frame")
        self.mm = Mm(self.host, self.trace)
        self.mm.swapon(600)
        file = None if kind == "anon" else ShmemFile(self.host, self.trace, "memfd", HPAGE_SIZE)
        flags = MAP_PRIVATE | MAP_ANONYMOUS if file is None else MAP_SHARED
        self.file = file
        self.hva = int(self.mm.mmap(HPAGE_SIZE, 3, flags, file=file))
        self.mm.madvise(self.hva, HPAGE_SIZE, MADV_HUGEPAGE)
        self.kvm = Kvm(self.mm, self.trace, self.host)
        self.kvm.set_memslot(0, 0, HUGE_PAGES, self.hva)
        for page in KEPT:
            self.mm.write(self.hva + page * PAGE, page.to_bytes(2, "little"))
        self.errors: list[str] = []

    def frame(self, page: int) -> int | None:
        entry = self.mm.pgd.pte((self.hva >> 12) + page)
        return pte_pfn(entry) if entry & MAPPED and not entry & SPECIAL else None

    # ---- actors

    def guest(self) -> None:
        for page in (*KEPT, *reversed(KEPT)):
            for _ in range(200):
                found = self.kvm.translate(page)
                if found is not None and found[1]:
                    word = self.host.read(found[0], 0, 2)
                    if word != page.to_bytes(2, "little"):
                        self.errors.append(f"page {page}: {word!r}")
                    self.host.write(found[0], 0, word)
                    break
                if self.kvm.fault(page, base.WRITE) != base.RETRY_WALK:
                    self.errors.append(f"page {page}: {self.kvm.last_error}")
                    break
                give_way("guest.retry")

    def collapse(self) -> None:
        for _ in range(2):
            self.mm.madvise(self.hva, HPAGE_SIZE, MADV_COLLAPSE)

    def split(self) -> None:
        pfn = self.frame(5)
        if pfn is not None:
            split_if_compound(self.host, pfn)

    def drop(self) -> None:
        for _ in range(2):
            self.mm.madvise(self.hva + GONE * PAGE, 4 * PAGE, MADV_DONTNEED)
        deferred_split_scan(self.host)

    def migrate(self) -> None:
        pfn = self.frame(300)
        if pfn is not None:
            migrate_page(self.host, self.trace, pfn)

    def pageout(self) -> None:
        self.mm.madvise(self.hva, 8 * PAGE, MADV_PAGEOUT)

    def fork(self) -> None:
        child = self.mm.fork()
        assert child.read(self.hva + 5 * PAGE, 2) == b"\5\0"
        child.exit()

    def protect(self) -> None:
        self.mm.mprotect(self.hva + 10 * PAGE, 9 * PAGE, 1)
        self.mm.mprotect(self.hva + 10 * PAGE, 9 * PAGE, 3)

    # ----

    def check(self) -> None:
        assert self.errors == []
        assert self.oracle.violations == []
        verify(self.host)
        for page in KEPT:
            assert self.mm.read(self.hva + page * PAGE, 2) == page.to_bytes(2, "little")
        assert not self.mm.mmap_lock.taken
        assert not self.mm.ptl.held
        assert not self.mm.rmap.page_lock.held
        self.mm.exit()
        if self.file is not None:
            self.file.close()
        assert self.host.free_frames == self.host.nr_frames - 1


def gently(work: Callable[[], None]) -> Callable[[], None]:
    """What cannot be done just now is not done."""

    def run() -> None:
        try:
            work()
        except (DeadlockError, LockOrderError):
            raise
        except MmError:
            pass

    return run


def mix(kind: str, seed: int) -> None:
    try:
        _mix(kind, seed)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def _mix(kind: str, seed: int) -> None:
    world, source = World(kind), random.Random(seed)
    deeds = [world.collapse, world.split, world.drop, world.migrate, world.pageout, world.fork, world.protect]
    scheduler = Scheduler(lambda n, label: source.randrange(n), trace=world.trace)
    for number in range(2):
        scheduler.spawn(f"vcpu{number}", world.guest)
    for work in source.sample(deeds, 3):
        scheduler.spawn(work.__name__, gently(work))
    with checking():
        scheduler.run()
    world.check()


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_everything_at_once(kind: str) -> None:
    for seed in range(12):
        mix(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_everything_at_once_at_length(kind: str) -> None:
    for seed in range(12, 160):
        mix(kind, seed)
