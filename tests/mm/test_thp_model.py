"""Random operations that mix huge and small pages, against a dict of pages for every process.

After every operation a full scan (verify) agrees with all counts, every page shows what the dict says to the host and
to a guest, and every shadow entry says what the host's page table does; at schedule points on the way vCPUs fault.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress

import pytest

from xipvm.actors import on_point
from xipvm.check.oracle import Oracle
from xipvm.errors import MmError
from xipvm.mmu import madvise as advice
from xipvm.mmu.frames import HUGE_PAGES, HostMemory
from xipvm.mmu.huge_page import deferred_split_scan, split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import MAPPED, PRESENT, SPECIAL, WRITE, pte_pfn
from xipvm.mmu.secondary.base import READ as GUEST_READ
from xipvm.mmu.secondary.base import WRITE as GUEST_WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_WRITE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from xipvm.trace.funnel import Trace

PAGE = 4096
BASE = 0x40_0000_0000
BLOCKS = 3
PAGES = BLOCKS * HUGE_PAGES
SEEDS = int(os.environ.get("XIPVM_THP_SEEDS", "60"))
EDGES = [block * HUGE_PAGES + offset for block in range(BLOCKS) for offset in (0, 1, 2, 255, 256, 510, 511)]
"""Pages that are looked at, and where ranges begin and end."""

VERBS = (
    ["store"] * 10 + ["load"] * 3 + ["guest_store"] * 6 + ["guest_load"] * 4 + ["dontneed"] * 3 + ["collapse"] * 5
    + ["khugepaged"] * 2 + ["mmap"] * 3 + ["munmap"] * 2 + ["mprotect"] * 3 + ["hugepage"] * 4 + ["fork"] * 2
    + ["exit"] * 2 + ["split"] * 2 + ["migrate"] * 2 + ["compact"] + ["pageout"] * 2 + ["reclaim"] + ["deferred"]
    + ["move"] * 3 + ["cold", "guard", "soft_dirty", "forced", "mlock", "pin", "dirty_log"] + ["punch"] * 2 + ["free"]
)  # fmt: skip


class Process:
    """A process, its VM, and what it should see: content and whether it may be written, by page."""

    def __init__(
        self, world: World, mm: Mm, pages: dict[int, bytes], writable: dict[int, bool], shared: set[int]
    ) -> None:
        self.mm, self.pages, self.writable, self.shared = mm, pages, writable, shared
        self.kvm = Kvm(mm, world.trace, world.host, name=f"vm of {mm.name}")
        self.kvm.set_memslot(0, 0, PAGES, BASE)


class World:
    """Some processes over a small host, and the file that they map."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.host = HostMemory(10 * HPAGE_SIZE, poison="frame")
        self.trace = Trace()
        self.oracle = Oracle()
        if seed % 3 == 0:
            self.trace.attach(self.oracle)
        self.processes: list[Process] = []
        self.file = ShmemFile(self.host, self.trace, "memfd", PAGES * PAGE)
        self.content: dict[int, bytes] = {}
        self.held: dict[int, int] = {}
        self.word = 0
        mm = Mm(self.host, self.trace)
        mm.thp.enabled = self.random.choice(("always", "madvise"))
        mm.swapon(2048)
        mm.mmap(PAGES * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=BASE)
        mm.madvise(BASE, PAGES * PAGE, advice.MADV_HUGEPAGE)
        pages = dict.fromkeys(range(PAGES), bytes(8))
        self.processes.append(Process(self, mm, pages, dict.fromkeys(range(PAGES), True), set()))

    # ---- what there should be

    def expected(self, process: Process, page: int) -> bytes | None:
        """The first word of a page, None where nothing can be read."""
        if page not in process.pages:
            return None
        return self.content.get(page, bytes(8)) if page in process.shared else process.pages[page]

    def put(self, process: Process, page: int, word: bytes) -> None:
        if page in process.shared:
            self.content[page] = word
        else:
            process.pages[page] = word

    def check(self) -> None:
        verify(self.host, held=self.held)
        assert not self.oracle.violations, str(self.oracle.violations[0])
        for process in self.processes:
            for page in EDGES:
                entry = process.mm.pgd.pte((BASE >> 12) + page)
                if entry & PRESENT:
                    pfn = 0 if entry & SPECIAL else pte_pfn(entry)
                    assert self.host.read(pfn, 0, 8) == self.expected(process, page), (process.mm, page)
            self.check_sptes(process)

    def check_sptes(self, process: Process) -> None:
        for gfn in EDGES:
            spte = process.kvm.sptes.get(gfn)
            if spte & SPTE_PRESENT:
                entry = process.mm.pgd.pte((BASE >> 12) + gfn)
                assert entry & PRESENT
                seen = process.kvm.translate(gfn)
                assert seen is None or seen[0] == pte_pfn(entry), (process.mm, gfn)
                assert not spte & SPTE_WRITE or entry & WRITE

    # ---- operations

    def run(self, verb: str) -> None:
        process = self.random.choice(self.processes)
        first, end = sorted(self.random.sample([*EDGES, PAGES], 2))
        page = self.random.choice(EDGES)
        self.word += 1
        with suppress(MmError):
            getattr(self, verb)(process, first, end, page, self.word.to_bytes(8, "little"))

    def store(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        try:
            process.mm.write(BASE + page * PAGE, word)
        except MmError:
            assert not process.writable.get(page)
            return
        self.put(process, page, word)

    def load(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        try:
            found: bytes | None = process.mm.read(BASE + page * PAGE, 8)
        except MmError:
            found = None
        assert found == self.expected(process, page)

    def guest(self, process: Process, page: int, access: int) -> int | None:
        for _ in range(20):
            mapped = process.kvm.translate(page)
            if mapped is not None and (mapped[1] or access != GUEST_WRITE):
                return mapped[0]
            if process.kvm.fault(page, access):
                return None
        raise AssertionError(f"gfn {page:#x} is retried for ever")

    def guest_store(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        pfn = self.guest(process, page, GUEST_WRITE)
        assert (pfn is None) == (not process.writable.get(page))
        if pfn is not None:
            self.host.write(pfn, 0, word)
            self.put(process, page, word)

    def guest_load(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        pfn = self.guest(process, page, GUEST_READ)
        assert (None if pfn is None else self.host.read(pfn, 0, 8)) == self.expected(process, page)

    def _advise(self, process: Process, first: int, end: int, what: int) -> None:
        process.mm.madvise(BASE + first * PAGE, (end - first) * PAGE, what)

    def dontneed(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self._advise(process, first, end, advice.MADV_DONTNEED)
        for each in range(first, end):
            if each in process.pages:
                process.pages[each] = bytes(8)

    def free(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        if all(process.writable.get(each) and each not in process.shared for each in range(first, end)):
            self._advise(process, first, end, advice.MADV_FREE)
            for each in range(first, end):  # it may go at any time, unless it is written
                process.mm.write(BASE + each * PAGE, process.pages[each])

    def collapse(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self._advise(
            process, page // HUGE_PAGES * HUGE_PAGES, (page // HUGE_PAGES + 1) * HUGE_PAGES, advice.MADV_COLLAPSE
        )

    def khugepaged(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.khugepaged_scan()

    def mmap(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        shared = self.random.random() < 0.4
        if self.random.random() < 0.5:
            first, end = page // HUGE_PAGES * HUGE_PAGES, (page // HUGE_PAGES + 1) * HUGE_PAGES
        flags = MAP_FIXED | (MAP_SHARED if shared else MAP_PRIVATE | MAP_ANONYMOUS)
        file, addr = self.file if shared else None, BASE + first * PAGE
        process.mm.mmap((end - first) * PAGE, 3, flags, addr=addr, file=file, pgoff=first if shared else 0)
        for each in range(first, end):
            process.pages[each], process.writable[each] = bytes(8), True
            (process.shared.add if shared else process.shared.discard)(each)

    def munmap(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.munmap(BASE + first * PAGE, (end - first) * PAGE)
        for each in range(first, end):
            process.pages.pop(each, None)
            process.writable.pop(each, None)
            process.shared.discard(each)

    def mprotect(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        writable = self.random.random() < 0.6
        process.mm.mprotect(BASE + first * PAGE, (end - first) * PAGE, 3 if writable else 1)
        process.writable.update(dict.fromkeys(range(first, end), writable))

    def hugepage(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        if self.random.random() < 0.7:
            first, end = 0, PAGES
        self._advise(process, first, end, advice.MADV_HUGEPAGE if word[0] % 4 else advice.MADV_NOHUGEPAGE)

    def fork(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        if len(self.processes) < 3:
            child = process.mm.fork()
            copies = dict(process.pages), dict(process.writable), set(process.shared)
            self.processes.append(Process(self, child, *copies))

    def exit(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        if len(self.processes) > 1:
            self.processes.remove(process)
            process.mm.exit()

    def _frame(self, process: Process, page: int) -> int | None:
        entry = process.mm.pgd.pte((BASE >> 12) + page)
        return pte_pfn(entry) if entry & MAPPED and not entry & SPECIAL else None

    def split(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        pfn = self._frame(process, page)
        if pfn is not None:
            split_if_compound(self.host, pfn)

    def migrate(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        pfn = self._frame(process, page)
        if pfn is not None and self.host.free_frames > HUGE_PAGES:
            migrate_page(self.host, self.trace, pfn)

    def compact(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        compact_memory(self.host, self.trace)

    def pageout(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self._advise(process, page, page + 2, advice.MADV_PAGEOUT)

    def cold(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self._advise(process, first, end, advice.MADV_COLD)

    def reclaim(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.memcg_reclaim()

    def deferred(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        deferred_split_scan(self.host)

    def guard(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self._advise(process, page, page + 1, advice.MADV_GUARD_INSTALL)
        assert self.guest(process, page, GUEST_READ) is None
        self._advise(process, page, page + 1, advice.MADV_GUARD_REMOVE)
        process.pages[page] = bytes(8)

    def soft_dirty(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.clear_refs(4)

    def forced(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.access_remote_vm(BASE + page * PAGE, word)
        self.put(process, page, word)

    def mlock(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        process.mm.mlock(BASE + page * PAGE, PAGE)
        process.mm.munlock(BASE + page * PAGE, PAGE)

    def pin(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        for pfn in self.held:
            self.host.put(pfn)
        self.held.clear()
        found = self._frame(process, page)
        if found is not None and self.random.random() < 0.5:
            self.host.get(found)
            self.held[self.host.compound_head(found)] = 1

    def dirty_log(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        slot = process.kvm.memslots.get(0)
        assert slot is not None
        process.kvm.set_memslot(0, 0, PAGES, BASE, slot.flags ^ 1)

    def punch(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        self.file.punch_hole(first, end - first)
        for each in range(first, end):
            self.content.pop(each, None)

    def move(self, process: Process, first: int, end: int, page: int, word: bytes) -> None:
        """Away and back: by 2 MiB, or not; DONTUNMAP leaves nothing in between."""
        length = (min(end, first + HUGE_PAGES) - first) * PAGE
        away = BASE + PAGES * PAGE + HPAGE_SIZE + (0 if word[0] % 2 else PAGE)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if word[0] % 3 == 0 else 0)
        process.mm.mremap(BASE + first * PAGE, length, length, flags, away)
        process.mm.mremap(away, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, BASE + first * PAGE)


def run(seed: int, length: int = 25) -> None:
    try:
        _run(seed, length)
    except BaseException as error:
        error.add_note(f"seed {seed}, {length} operations")
        raise


def _run(seed: int, length: int) -> None:
    world = World(seed)
    inside = False

    def hook(label: str) -> None:
        nonlocal inside
        if inside or world.random.random() > 0.02:
            return
        inside = True
        trace, process = world.trace, world.random.choice(world.processes)
        before, trace.actor, trace.cause = (trace.actor, trace.cause), "vcpu0", 0
        with suppress(MmError):
            process.kvm.fault(world.random.choice(EDGES), world.random.choice((GUEST_READ, GUEST_WRITE)))
        trace.actor, trace.cause = before
        inside = False

    for _ in range(length):
        verb = world.random.choice(VERBS)
        with on_point(hook):
            world.run(verb)
        world.check()
    for pfn in world.held:
        world.host.put(pfn)
    for process in world.processes:
        process.mm.exit()
    world.file.close()
    verify(world.host)
    assert world.host.free_frames == world.host.nr_frames - 1


@pytest.mark.parametrize("seed", range(8))
def test_huge_and_small(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_many() -> None:
    """XIPVM_THP_SEEDS says how many."""
    for seed in range(8, SEEDS):
        run(seed, 60)
