"""Random sequences on pages that are anywhere: in memory, in swap, in a device's memory, a device's alone, shared.

Whoever looks, a CPU or a device, has to see what was written last; and after every step a full scan has to agree.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.hmm.world import RW, World
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.collapse import khugepaged_scan
from xipvm.mmu.madvise import MADV_COLD, MADV_DONTNEED, MADV_FREE, MADV_MERGEABLE, MADV_PAGEOUT, MADV_WILLNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE

PAGES = 6
_ZEROS = bytes(8)


class Process:
    """An mm, its mirrors, and what each of its pages has to hold; None where nothing can be said."""

    def __init__(self, mm: Mm, mirrors: list[Dmirror], pages: list[bytes | None], prot: list[int]) -> None:
        self.mm, self.mirrors, self.pages, self.prot = mm, mirrors, pages, prot


class Random:
    """One sequence. ``world.coherent`` says what memory the second device has; the first has private memory."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.world = World()
        self.first = self.world.device(pages=8)
        self.world.coherent = True
        self.second = self.world.device(pages=8)
        self.hva = self.world.map(PAGES)
        self.world.mm.swapon(64)
        self.processes = [Process(self.world.mm, [self.first, self.second], [_ZEROS] * PAGES, [RW] * PAGES)]
        self.names = 0

    def run(self, steps: int) -> None:
        operations: list[Callable[[], None]] = [
            *[self.cpu_read] * 3, *[self.cpu_write] * 4, *[self.device_read] * 3, *[self.device_write] * 4,
            *[self.to_device] * 5, self.to_system, *[self.exclusive] * 3, *[self.update] * 2, self.fork, self.exit,
            self.protect, self.advise, self.advise, self.free, self.remap, self.move,
            self.compact, self.ksm, self.evict,
        ]  # fmt: skip
        for _ in range(steps):
            self.dice.choice(operations)()
            verify(self.world.host)
            assert self.world.oracle.violations == []
        for process in self.processes:
            for page in range(PAGES):
                self.look(process, page)

    def end(self) -> None:
        for process in self.processes:  # mirrors of children go before their mms, and the first devices last
            if process.mm is not self.world.mm:
                for mirror in process.mirrors:
                    mirror.destroy()
        self.world.end()

    # ---- who, where, what

    def pick(self) -> tuple[Process, int, int]:
        page = self.dice.randrange(PAGES)
        return self.dice.choice(self.processes), page, self.hva + page * PAGE_SIZE

    def some(self, page: int) -> int:
        return self.dice.randint(1, PAGES - page)

    def word(self) -> bytes:
        return self.dice.randrange(1, 1 << 60).to_bytes(8, "little")

    def look(self, process: Process, page: int) -> None:
        wanted = process.pages[page]
        if process.prot[page] & PROT_READ:
            seen = process.mm.read(self.hva + page * PAGE_SIZE, 8)
            if wanted is None:
                process.pages[page] = seen
            else:
                assert seen == wanted

    def settle(self, process: Process, page: int, count: int = 1) -> None:
        """What MADV_FREE has left open is seen now."""
        for at in range(page, page + count):
            self.look(process, at)

    # ---- operations

    def cpu_read(self) -> None:
        process, page, _ = self.pick()
        self.look(process, page)

    def cpu_write(self) -> None:
        process, page, hva = self.pick()
        data = self.word()
        if process.prot[page] == RW:
            process.mm.write(hva, data)
            process.pages[page] = data
        else:
            with pytest.raises(MmError):
                process.mm.write(hva, data)

    def device_read(self) -> None:
        process, page, hva = self.pick()
        mirror = self.dice.choice(process.mirrors)
        if not process.prot[page]:
            with pytest.raises(MmError, match="EFAULT"):
                mirror.read(hva, 8)
            return
        seen, _ = mirror.read(hva, 8)
        if process.pages[page] is None:
            process.pages[page] = seen
        assert seen == process.pages[page]

    def device_write(self) -> None:
        process, page, hva = self.pick()
        data = self.word()
        mirror = self.dice.choice(process.mirrors)
        if process.prot[page] == RW:
            mirror.write(hva, data)
            process.pages[page] = data
        else:
            with pytest.raises(MmError, match=r"EPERM|EFAULT"):
                mirror.write(hva, data)

    def to_device(self) -> None:
        process, page, hva = self.pick()
        count = self.some(page)
        try:
            self.dice.choice(process.mirrors).migrate_to_dev(hva, count)
        except MmError as error:
            assert error.errno in (errno.ENOENT, errno.EINVAL)  # noqa: PT017 (either is right)

    def to_system(self) -> None:
        process, page, hva = self.pick()
        with suppress(MmError):
            self.dice.choice(process.mirrors).migrate_to_sys(hva, self.some(page))

    def exclusive(self) -> None:
        process, page, hva = self.pick()
        count = self.some(page)
        if all(prot == RW for prot in process.prot[page : page + count]):
            self.settle(process, page, count)
            try:
                data, _ = self.dice.choice(process.mirrors).exclusive(hva, count)
            except MmError as error:
                assert error.errno == errno.EBUSY  # noqa: PT017
                return
            for at in range(count):
                assert data[at * PAGE_SIZE : at * PAGE_SIZE + 8] == process.pages[page + at]

    def update(self) -> None:
        process, page, hva = self.pick()
        if process.prot[page] == RW:
            self.settle(process, page)
            old = self.dice.choice(process.mirrors).update(hva, 3)
            assert old.to_bytes(8, "little") == process.pages[page]
            process.pages[page] = ((old + 3) % (1 << 64)).to_bytes(8, "little")

    def fork(self) -> None:
        if len(self.processes) > 3:
            return
        parent = self.dice.choice(self.processes)
        self.settle(parent, 0, PAGES)
        child = parent.mm.fork()
        self.world.children.append(child)
        mirrors = []
        for of in (self.first, self.second):
            self.names += 1
            mirrors.append(Dmirror(child, of=of, name=f"mirror{self.names}"))
        self.processes.append(Process(child, mirrors, list(parent.pages), list(parent.prot)))

    def exit(self) -> None:
        if len(self.processes) == 1:
            return
        process = self.processes.pop(self.dice.randrange(1, len(self.processes)))
        if self.dice.random() < 0.5:
            for mirror in process.mirrors:
                mirror.destroy()
        process.mm.exit()
        for mirror in process.mirrors:
            mirror.destroy()

    def protect(self) -> None:
        process, page, hva = self.pick()
        count, prot = self.some(page), self.dice.choice((PROT_NONE, PROT_READ, RW, RW))
        process.mm.mprotect(hva, count * PAGE_SIZE, prot)
        process.prot[page : page + count] = [prot] * count

    def advise(self) -> None:
        process, page, hva = self.pick()
        count = self.some(page)
        advice = self.dice.choice((MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_MERGEABLE))
        process.mm.madvise(hva, count * PAGE_SIZE, advice)
        if advice == MADV_DONTNEED:
            process.pages[page : page + count] = [_ZEROS] * count

    def free(self) -> None:
        process, page, hva = self.pick()
        count = self.some(page)
        process.mm.madvise(hva, count * PAGE_SIZE, MADV_FREE)
        process.pages[page : page + count] = [None] * count

    def remap(self) -> None:
        process, page, hva = self.pick()
        count = self.some(page)
        process.mm.mmap(count * PAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=hva)
        process.pages[page : page + count] = [_ZEROS] * count
        process.prot[page : page + count] = [RW] * count

    def move(self) -> None:
        """Away and back."""
        process, _, hva = self.pick()
        away = process.mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        process.mm.mremap(hva, PAGE_SIZE, PAGE_SIZE, flags, away)
        process.mm.mremap(away, PAGE_SIZE, PAGE_SIZE, flags, hva)

    def compact(self) -> None:
        compact_memory(self.world.host, self.world.trace)
        khugepaged_scan(self.world.host)

    def ksm(self) -> None:
        self.world.mm.ksm_scan()

    def evict(self) -> None:
        self.dice.choice((self.first, self.second)).evict()


@pytest.mark.parametrize("seed", range(20))
def test_a_random_sequence(seed: int) -> None:
    sequence = Random(seed)
    sequence.run(150)
    sequence.end()
