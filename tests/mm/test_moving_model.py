"""Random migrating, merging, swapping and ageing among ordinary operations: contents stay those of a dict of pages."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xipvm.mmu.frames import PG_DIRTY, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_COLD, MADV_DONTNEED, MADV_MERGEABLE, MADV_PAGEOUT, MADV_UNMERGEABLE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import PRESENT, WRITE, pte_pfn
from xipvm.mmu.tables import GupPage
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.funnel import Trace

PAGE = 4096
BASE = 0x20_0000_0000 - 4 * PAGE
PAGES = 10
RW = 3


class Shadow(MmuNotifier):
    """A secondary MMU that keeps what it was given until it is told to drop it, and knows what it used."""

    def __init__(self) -> None:
        self.entries: dict[int, GupPage] = {}
        self.young: set[int] = set()

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        for hva in [hva for hva in self.entries if range.overlaps(hva, hva + PAGE)]:
            del self.entries[hva]
        return 0

    def clear_flush_young(self, start: int, end: int) -> bool:
        used = start in self.young
        self.young.discard(start)
        return used

    def release(self, mm: object) -> None:
        self.entries.clear()


class Process:
    def __init__(self, mm: Mm, pages: list[bytes]) -> None:
        self.mm = mm
        self.pages = pages
        self.shadow = Shadow()
        self.thread = HostThread(mm, f"thread of {mm.name}")
        mm.notifiers.register(self.shadow)


class World:
    def __init__(self) -> None:
        self.host = HostMemory(256 * PAGE, poison="frame")
        self.trace = Trace()
        self.trace.attach(lambda event: None)
        mm = Mm(self.host, self.trace)
        mm.mmap(PAGES * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=BASE)
        mm.swapon(24)
        self.processes = [Process(mm, [bytes(4)] * PAGES)]

    def run(self, op: tuple[str, int, int, int, int]) -> None:
        verb, who, first, count, choice = op
        process = self.processes[who % len(self.processes)]
        getattr(self, verb)(process, first, min(first + count, PAGES), choice)
        self.check()

    def advise(self, process: Process, first: int, end: int, advice: int) -> None:
        process.mm.madvise(BASE + first * PAGE, (end - first) * PAGE, advice)

    def write(self, process: Process, first: int, end: int, choice: int) -> None:
        """Few different contents, so that there is something to merge; by the kernel, a thread or the secondary MMU."""
        data = bytes([choice % 3]) * 4
        for page in range(first, end):
            hva = BASE + page * PAGE
            if choice // 3 % 3 == 0:
                process.mm.write(hva, data)
            elif choice // 3 % 3 == 1:
                process.thread.store(hva, data)
            else:
                found = process.shadow.entries.get(hva)
                if found is None or not found.writable:
                    found = self.map_secondary(process, hva, write=True)
                self.host.write(found.pfn, 0, data)
                process.shadow.young.add(hva)
            process.pages[page] = data

    def map_secondary(self, process: Process, hva: int, *, write: bool) -> GupPage:
        found = process.shadow.entries[hva] = process.mm.get_user_pages(hva, write=write)
        if found.writable:
            self.host.set_flags(found.pfn, PG_DIRTY)
        return found

    def read(self, process: Process, first: int, end: int, choice: int) -> None:
        for page in range(first, end):
            hva = BASE + page * PAGE
            if choice & 1:
                assert process.thread.load(hva, 4) == process.pages[page]
            else:
                self.map_secondary(process, hva, write=False)
                process.shadow.young.add(hva)

    def dontneed(self, process: Process, first: int, end: int, choice: int) -> None:
        self.advise(process, first, end, MADV_DONTNEED)
        process.pages[first:end] = [bytes(4)] * (end - first)

    def mprotect(self, process: Process, first: int, end: int, choice: int) -> None:
        for prot in ((0, RW), (1, RW))[choice & 1]:
            process.mm.mprotect(BASE + first * PAGE, (end - first) * PAGE, prot)

    def fork(self, process: Process, first: int, end: int, choice: int) -> None:
        if len(self.processes) < 3:
            self.processes.append(Process(process.mm.fork(), list(process.pages)))

    def exit(self, process: Process, first: int, end: int, choice: int) -> None:
        if len(self.processes) > 1:
            process.mm.exit()
            self.processes.remove(process)

    def pageout(self, process: Process, first: int, end: int, choice: int) -> None:
        self.advise(process, first, end, MADV_PAGEOUT)

    def reclaim(self, process: Process, first: int, end: int, choice: int) -> None:
        self.advise(process, first, end, MADV_COLD)
        process.mm.memcg_reclaim(1 + choice % 2)

    def merge(self, process: Process, first: int, end: int, choice: int) -> None:
        self.advise(process, first, end, MADV_MERGEABLE)
        process.mm.ksm_scan()

    def unmerge(self, process: Process, first: int, end: int, choice: int) -> None:
        self.advise(process, first, end, MADV_UNMERGEABLE)

    def compact(self, process: Process, first: int, end: int, choice: int) -> None:
        compact_memory(self.host, self.trace)

    def swapoff(self, process: Process, first: int, end: int, choice: int) -> None:
        process.mm.swapoff()
        process.mm.swapon(4 + choice % 40)

    # ---- what holds after every operation

    def check(self) -> None:
        verify(self.host)
        for process in self.processes:
            pgd = process.mm.pgd
            held = [(page, pte_pfn(entry), bool(entry & WRITE)) for page, entry in process.thread.tlb.items()]
            held += [(hva >> 12, found.pfn, found.writable) for hva, found in process.shadow.entries.items()]
            for page, pfn, writable in held:
                now = pgd.get(page)
                assert now & PRESENT
                assert pte_pfn(now) == pfn
                assert now & WRITE or not writable
            for page, expected in enumerate(process.pages):
                entry = pgd.get((BASE >> 12) + page)
                if entry & PRESENT:
                    assert self.host.read(pte_pfn(entry), 0, 4) == expected, f"page {page} of {process.mm.name}"

    def finish(self) -> None:
        for process in self.processes:
            for page, expected in enumerate(process.pages):
                assert process.mm.read(BASE + page * PAGE, 4) == expected
        for process in self.processes:
            process.mm.exit()
        assert self.host.free_frames == self.host.nr_frames - 1
        verify(self.host)


VERBS = ["write"] * 6 + ["read"] * 4 + ["pageout", "reclaim", "merge"] * 3
VERBS += ["unmerge", "compact", "compact", "dontneed", "mprotect", "fork", "fork", "exit", "swapoff"]
operations = st.lists(
    st.tuples(
        st.sampled_from(VERBS), st.integers(0, 2), st.integers(0, PAGES - 1), st.integers(1, 6), st.integers(0, 35)
    ),
    max_size=40,
)


def check_against_the_model(sequence: list[tuple[str, int, int, int, int]]) -> None:
    world = World()
    for op in sequence:
        world.run(op)
    world.finish()


@given(operations)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_against_the_model(sequence: list[tuple[str, int, int, int, int]]) -> None:
    check_against_the_model(sequence)


@pytest.mark.slow
@given(operations)
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_against_the_model_at_length(sequence: list[tuple[str, int, int, int, int]]) -> None:
    check_against_the_model(sequence)


def test_a_secondary_mmu_that_hides_its_writes_is_caught() -> None:
    """What keeps the model honest: without PG_DIRTY a clean page of the swap cache is not written again."""
    world = World()
    process = world.processes[0]
    world.run(("write", 0, 0, 1, 1))
    world.run(("pageout", 0, 0, 1, 0))
    world.run(("read", 0, 0, 1, 1))
    found = process.mm.get_user_pages(BASE, write=False)
    world.host.write(found.pfn, 0, b"lost")
    process.mm.madvise(BASE, PAGE, MADV_PAGEOUT)
    assert process.mm.read(BASE, 4) != b"lost"
