"""Operations on huge pages that come in the middle of others: nothing is lost, counted twice, or told too late.

At schedule points of one operation another one is done, as on another CPU. What has to wait for what it interrupts
gets EDEADLK and is not done. Then bookkeeping, reservations and the order of events have to be right, and the guest
must not have an entry that its host has not.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from tests.mm.test_hugetlb_model import POOL, SLOTS, H, Real, place
from xipvm.actors import on_point
from xipvm.errors import MmError, OutOfFrames
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.pte import MAPPED, WRITE, pte_pfn
from xipvm.mmu.secondary.spte import SPTE_WRITE, spte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
)

RW = PROT_READ | PROT_WRITE
ANONYMOUS = MAP_ANONYMOUS | MAP_HUGETLB
EXPECTED = {
    errno.EDEADLK,
    errno.EFAULT,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EINVAL,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESRCH,
}


class Race:
    """One random run over a :class:`Real`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.real = Real()
        self.depth = 0
        self.done = 0
        self.inside = 0
        for shared in (MAP_SHARED, MAP_PRIVATE):
            self.real.mm.mmap(
                2 * H, RW, shared | MAP_FIXED, addr=place(2 if shared == MAP_SHARED else 0), file=self.real.file
            )

    def mm(self) -> Mm:
        return self.random.choice(list(self.real.processes.values()))

    def slots(self) -> tuple[int, int]:
        slot = self.random.randrange(SLOTS)
        return place(slot), min(self.random.randint(1, 2), SLOTS - slot) * H

    def step(self) -> None:
        """Any operation. What it may fail with is nothing to see."""
        work = self.random.choice(self.WORK)
        try:
            work(self)
            self.done += 1
        except OutOfFrames:
            pass
        except MmError as error:
            if error.errno not in EXPECTED:
                raise

    def hook(self, label: str) -> None:
        if self.depth < 2 and self.random.random() < 0.3:
            self.depth += 1
            self.inside += 1
            trace = self.real.trace
            before, trace.actor, trace.cause = (trace.actor, trace.cause), f"cpu{self.depth}", 0
            try:
                self.step()
            finally:
                self.depth -= 1
                trace.actor, trace.cause = before

    def load(self) -> None:
        self.real.vcpu.load(self.random.randrange(SLOTS) * 512 + 300)

    def store(self) -> None:
        self.real.vcpu.store(self.random.randrange(SLOTS) * 512, self.random.randrange(256))

    def write(self) -> None:
        self.mm().write(self.slots()[0], b"x")

    def read(self) -> None:
        self.mm().read(self.slots()[0], 1)

    def dontneed(self) -> None:
        self.mm().madvise(*self.slots(), MADV_DONTNEED)

    def mprotect(self) -> None:
        self.mm().mprotect(*self.slots(), self.random.choice((RW, RW, PROT_READ)))

    def munmap(self) -> None:
        self.mm().munmap(*self.slots())

    def mmap(self) -> None:
        start, size = self.slots()
        kind = self.random.choice((MAP_SHARED, MAP_PRIVATE)) | self.random.choice((0, 0, MAP_NORESERVE))
        if self.random.random() < 0.5:
            self.mm().mmap(size, RW, kind | ANONYMOUS | MAP_FIXED, addr=start)
        else:
            self.mm().mmap(size, RW, kind | MAP_FIXED, addr=start, file=self.real.file)

    def mremap(self) -> None:
        start, size = self.slots()
        target = place(self.random.randrange(SLOTS - 1))
        self.mm().mremap(start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target)

    def fork(self) -> None:
        if len(self.real.processes) < 3:
            name = f"c{self.done}"
            self.real.processes[name] = self.real.mm.fork(name)

    def exit(self) -> None:
        name = self.random.choice(list(self.real.processes))
        if name != "p":
            self.real.processes[name].exit()
            self.real.processes.pop(name, None)

    def truncate(self) -> None:
        self.real.file.truncate(self.random.randrange(5) * H)

    def punch(self) -> None:
        self.real.file.punch_hole(self.random.randrange(4) * 512, self.random.randint(1, 2) * 512)

    def fallocate(self) -> None:
        self.real.file.fallocate(self.random.randrange(4) * H, H)

    def migrate(self) -> None:
        entries = [entry for _, entry in self.real.mm.pgd.entries(0, 1 << 36) if entry & MAPPED]
        if entries:
            migrate_page(self.real.host, self.real.trace, pte_pfn(self.random.choice(entries)))

    WORK: tuple[Callable[[Race], None], ...] = (
        *(load, store, write, read, load, store, write, mmap, dontneed, mprotect, munmap, mremap),
        *(fork, exit, truncate, punch, fallocate, migrate),
    )

    def check(self) -> None:
        real = self.real
        verify(real.host)
        assert real.oracle.violations == []
        for gfn, spte in real.kvm.sptes.entries(0, SLOTS * 512):
            entry = real.mm.pgd.get((place(0) >> 12) + gfn)
            assert pte_pfn(entry) == spte_pfn(spte)
            assert entry & WRITE or not spte & SPTE_WRITE

    def run(self, steps: int) -> None:
        with on_point(self.hook):
            for _ in range(steps):
                self.step()
                self.check()
        self.real.kvm.destroy()
        for mm in self.real.processes.values():
            mm.exit()
        self.real.file.close()
        host = self.real.host
        assert (host.free_huge_pages, host.reserved_huge_pages) == (POOL, 0)
        self.check()


def test_operations_inside_of_others() -> None:
    race = Race(1)
    race.run(40)
    assert race.inside > 20


def test_an_area_that_became_read_only_while_its_owner_was_served() -> None:
    Race(538).run(60)  # mprotect comes while the page is taken from a child


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_many_operations_inside_of_others(first: int) -> None:
    for seed in range(first, first + 10):
        try:
            Race(seed).run(60)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
