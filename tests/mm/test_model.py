"""Random operations of several processes against a naive model: a dict of pages for each process.

After every operation: the same errno; every mapped page shows what the model says; no TLB and no secondary MMU holds
what the page table does not; reference counts, mapcounts and the reverse map agree with a full scan.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_POPULATE_WRITE,
)
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import GUARD, PRESENT, WRITE, pte_pfn
from xipvm.mmu.tables import GupPage
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.funnel import Trace

PAGE = 4096
BASE = 0x20_0000_0000 - 5 * PAGE  # the pages lie on both sides of a table's end
PAGES = 12
FILE_PAGES = 10
ADVICE = (MADV_FREE, MADV_COLD, MADV_POPULATE_WRITE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE)
PROTS = (0, 1, 3, 3, 3, 7)


Value = tuple[int, int]
"""What a page holds: a word at its start and one in its middle."""
OFFSETS = (0, PAGE // 2)


def replaced(value: Value, slot: int, word: int) -> Value:
    return (value[0], word) if slot else (word, value[1])


@dataclass
class Backing:
    """A file, or shared anonymous memory: what its pages hold, zeros where nothing was written."""

    pages: int
    values: dict[int, Value] = field(default_factory=dict)


@dataclass
class Mapped:
    """One page of a process."""

    prot: int
    backing: Backing | None = None
    pgoff: int = 0
    shared: bool = False
    private: Value | None = None
    guard: bool = False
    locked: bool = False
    dirty: bool = True
    """Was written since soft-dirty bits were cleared, and its entry has not gone since."""

    @property
    def no_page(self) -> bool:
        """Every access is a signal."""
        behind_the_end = self.backing is not None and self.private is None and self.pgoff >= self.backing.pages
        return self.guard or behind_the_end

    @property
    def value(self) -> Value:
        if self.private is not None:
            return self.private
        return self.backing.values.get(self.pgoff, (0, 0)) if self.backing else (0, 0)

    def drop(self) -> None:
        """Its entry goes, with a private copy."""
        self.private, self.dirty = None, False

    def write(self, slot: int, word: int) -> None:
        self.dirty = True
        if self.shared:
            assert self.backing is not None
            self.backing.values[self.pgoff] = replaced(self.value, slot, word)
        else:
            self.private = replaced(self.value, slot, word)


class Shadow(MmuNotifier):
    """A secondary MMU: keeps what get_user_pages gave it until it is told to drop it."""

    def __init__(self) -> None:
        self.entries: dict[int, GupPage] = {}

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        for page in [page for page in self.entries if range.start < (page + 1) * PAGE and page * PAGE < range.end]:
            del self.entries[page]
        return 0

    def release(self, mm: object) -> None:
        self.entries.clear()


class Process:
    def __init__(self, mm: Mm, pages: dict[int, Mapped]) -> None:
        self.mm = mm
        self.pages = pages
        self.thread = HostThread(mm, f"thread of {mm.name}")
        self.shadow = Shadow()
        mm.notifiers.register(self.shadow)


class World:
    def __init__(self) -> None:
        self.host = HostMemory(512 * PAGE, poison="frame")
        self.trace = Trace()
        self.trace.attach(lambda event: None)
        self.file = ShmemFile(self.host, self.trace, "file", FILE_PAGES * PAGE)
        self.backing = Backing(FILE_PAGES)
        self.processes = [Process(Mm(self.host, self.trace), {})]
        self.written = 0

    def run(self, op: tuple[str, int, int, int, int]) -> None:
        verb, who, first, count, choice = op
        process = self.processes[who % len(self.processes)]
        getattr(self, verb)(process, first, min(first + count, PAGES), choice)
        self.check()

    def expect(self, error: int, call, *arguments, **keywords) -> None:  # type: ignore[no-untyped-def]
        """``call`` fails with ``error``; 0: it does not fail."""
        got = 0
        try:
            call(*arguments, **keywords)
        except MmError as raised:
            got = raised.errno
        assert got == error

    # ---- operations: on the real thing and on the model

    def mmap(self, process: Process, first: int, end: int, choice: int) -> None:
        prot, kind = PROTS[choice % len(PROTS)], choice // len(PROTS) % 4
        hva, length = BASE + first * PAGE, (end - first) * PAGE
        backing, pgoff, shared = None, 0, bool(kind & 1)
        if kind >= 2:
            backing, pgoff = self.backing, choice % 5
            flags = (MAP_SHARED if shared else MAP_PRIVATE) | MAP_FIXED
            self.expect(0, process.mm.mmap, length, prot, flags, addr=hva, file=self.file, pgoff=pgoff)
        else:
            flags = (MAP_SHARED if shared else MAP_PRIVATE) | MAP_ANONYMOUS | MAP_FIXED
            self.expect(0, process.mm.mmap, length, prot, flags, addr=hva)
            if shared:
                backing = Backing(end - first)
        for page in range(first, end):
            process.pages[page] = Mapped(prot, backing, pgoff + page - first, shared)

    def munmap(self, process: Process, first: int, end: int, choice: int) -> None:
        self.expect(0, process.mm.munmap, BASE + first * PAGE, (end - first) * PAGE)
        for page in range(first, end):
            process.pages.pop(page, None)

    def mremap(self, process: Process, first: int, end: int, choice: int) -> None:
        """Moves inside the range that the model knows; sometimes onto other pages, sometimes leaving an area behind."""
        mm, count, to = process.mm, end - first, choice // 2 % PAGES
        keep, to = choice & 1, min(to, PAGES - count)
        area = mm.find_vma(BASE + first * PAGE)
        error = 0
        if area is None:
            error = errno.EFAULT
        elif first < to + count and to < end:
            error = errno.EINVAL
        elif area.end < BASE + end * PAGE:
            error = errno.EFAULT
        if area is not None and not error:
            low = area.start if to >= end else max(area.start, BASE + (to + count) * PAGE)
            high = min(area.end, BASE + to * PAGE) if to >= end else area.end
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep else 0)
        arguments = BASE + first * PAGE, count * PAGE, count * PAGE, flags, BASE + to * PAGE
        self.expect(error, mm.mremap, *arguments)
        if error:
            return
        for page in range(count):
            process.pages[to + page] = moved = process.pages.pop(first + page)
            if keep:
                process.pages[first + page] = Mapped(moved.prot, moved.backing, moved.pgoff, moved.shared, dirty=False)
        for page in range(PAGES) if keep else ():  # Linux unlocks all of the area that stays
            if low <= BASE + page * PAGE < high and page not in range(to, to + count):
                process.pages[page].locked = False

    def mprotect(self, process: Process, first: int, end: int, choice: int) -> None:
        prot = PROTS[choice % len(PROTS)]
        hole = any(page not in process.pages for page in range(first, end))
        self.expect(errno.ENOMEM if hole else 0, process.mm.mprotect, BASE + first * PAGE, (end - first) * PAGE, prot)
        if not hole:
            for page in range(first, end):
                process.pages[page].prot = prot

    def dontneed(self, process: Process, first: int, end: int, choice: int) -> None:
        mapped = [process.pages.get(page) for page in range(first, end)]
        present = [page for page in mapped if page is not None]
        error = errno.EINVAL if any(page.locked for page in present) else errno.ENOMEM if None in mapped else 0
        self.expect(error, process.mm.madvise, BASE + first * PAGE, (end - first) * PAGE, MADV_DONTNEED)
        for page in present if not error else ():
            page.drop()

    def advise(self, process: Process, first: int, end: int, choice: int) -> None:
        """Advice that keeps what pages hold, and guards, which do not."""
        advice = ADVICE[choice % len(ADVICE)]
        mapped = [process.pages.get(page) for page in range(first, end)]
        present = [page for page in mapped if page is not None]
        not_anonymous = advice == MADV_FREE and any(page.backing is not None for page in present)
        takes_pages = advice in (MADV_FREE, MADV_COLD, MADV_GUARD_INSTALL)
        error = 0
        if not_anonymous or (takes_pages and any(page.locked for page in present)):
            error = errno.EINVAL
        elif None in mapped:
            error = errno.ENOMEM
        elif advice == MADV_POPULATE_WRITE and not all(page.prot & 2 for page in present):
            error = errno.EINVAL
        elif advice == MADV_POPULATE_WRITE and any(page.no_page for page in present):
            error = errno.EFAULT
        self.expect(error, process.mm.madvise, BASE + first * PAGE, (end - first) * PAGE, advice)
        for page in present:
            if not error and advice in (MADV_GUARD_INSTALL, MADV_GUARD_REMOVE):
                page.guard = advice == MADV_GUARD_INSTALL
                if page.guard:
                    page.drop()
            elif advice == MADV_POPULATE_WRITE and error in (0, errno.EFAULT):
                if page.no_page:
                    break
                if not page.shared:
                    page.private = page.value

    def mlock(self, process: Process, first: int, end: int, choice: int) -> None:
        on = bool(choice % 3)
        mapped = [process.pages.get(page) for page in range(first, end)]
        present = [page for page in mapped if page is not None]
        hole = None in mapped
        fails = hole or (on and any(page.no_page or not page.prot for page in present))
        call = process.mm.mlock if on else process.mm.munlock
        self.expect(errno.ENOMEM if fails else 0, call, BASE + first * PAGE + choice, (end - first) * PAGE - choice)
        for page in present if not hole else ():
            page.locked = on
        for page in present if on and not hole else ():
            if page.no_page or not page.prot:
                break
            if page.prot & 2 and not page.shared:
                page.private = page.value

    def clear_refs(self, process: Process, first: int, end: int, choice: int) -> None:
        mode = (1, 2, 3, 4, 4, 4)[choice % 6]
        self.expect(0, process.mm.clear_refs, mode)
        for page in process.pages.values() if mode == 4 else ():
            page.dirty = False

    def force(self, process: Process, first: int, end: int, choice: int) -> None:
        """Writes through /proc/pid/mem, a page at a time."""
        slot = choice & 1
        for page in range(first, end):
            mapped = process.pages.get(page)
            allowed = mapped is not None and not mapped.no_page and (mapped.prot & 2 or not mapped.shared)
            self.written += 1
            hva, word = BASE + page * PAGE + OFFSETS[slot], self.written.to_bytes(8, "little")
            self.expect(0 if allowed else errno.EIO, process.mm.access_remote_vm, hva, word)
            if allowed and mapped is not None:
                mapped.write(slot, self.written)
            self.check_contents(process)

    def fork(self, process: Process, first: int, end: int, choice: int) -> None:
        if len(self.processes) < 4:
            pages = {
                page: Mapped(**{**vars(mapped), "locked": False, "dirty": False})
                for page, mapped in process.pages.items()
            }
            self.processes.append(Process(process.mm.fork(), pages))

    def exit(self, process: Process, first: int, end: int, choice: int) -> None:
        if len(self.processes) > 1:
            process.mm.exit()
            self.processes.remove(process)

    def access(self, process: Process, first: int, end: int, choice: int) -> None:
        """Loads or stores in each page, by a thread, by the kernel, or by the secondary MMU."""
        write, slot, how = bool(choice & 1), choice // 2 % 2, choice // 4 % 3
        for page in range(first, end):
            mapped = process.pages.get(page)
            allowed = mapped is not None and mapped.prot != 0 and (mapped.prot & 2 or not write)
            error = 0 if allowed and mapped is not None and not mapped.no_page else errno.EFAULT
            hva = BASE + page * PAGE + OFFSETS[slot]
            self.written += 1
            word = self.written.to_bytes(8, "little")
            if how == 2:
                self.expect(error, self.map_secondary, process, page, write)
                if write and not error:
                    self.host.write(process.shadow.entries[self.page(page)].pfn, OFFSETS[slot], word)
            elif write:
                self.expect(error, process.thread.store if how else process.mm.write, hva, word)
            else:
                load = process.thread.load if how else process.mm.read
                self.expect(error, load, hva, 8)
                if not error and mapped is not None:
                    assert int.from_bytes(load(hva, 8), "little") == mapped.value[slot]
            if write and not error and mapped is not None:
                mapped.write(slot, self.written)
            self.check_contents(process)

    def page(self, page: int) -> int:
        return (BASE >> 12) + page

    def map_secondary(self, process: Process, page: int, write: bool) -> None:
        found = process.mm.get_user_pages(BASE + page * PAGE, write=write)
        process.shadow.entries[self.page(page)] = found

    def pwrite(self, process: Process, first: int, end: int, choice: int) -> None:
        self.written += 1
        pgoff = first % FILE_PAGES
        self.file.pwrite(pgoff * PAGE, self.written.to_bytes(8, "little"))
        self.backing.values[pgoff] = replaced(self.backing.values.get(pgoff, (0, 0)), 0, self.written)
        if pgoff >= self.backing.pages:
            self.backing.pages = pgoff + 1
            self.file.truncate(self.backing.pages * PAGE)

    def punch(self, process: Process, first: int, end: int, choice: int) -> None:
        self.file.punch_hole(first, end - first)
        for pgoff in range(first, end):
            self.backing.values.pop(pgoff, None)
        for mapped in self.mapped():
            if mapped.private is None and first <= mapped.pgoff < end:
                mapped.dirty = False

    def truncate(self, process: Process, first: int, end: int, choice: int) -> None:
        size = choice % (FILE_PAGES + 1)
        self.file.truncate(size * PAGE)
        if size < self.backing.pages:
            self.backing.values = {pgoff: value for pgoff, value in self.backing.values.items() if pgoff < size}
            for mapped in self.mapped():
                if mapped.pgoff >= size:
                    mapped.drop()
        self.backing.pages = size

    def mapped(self) -> list[Mapped]:
        """Every page that maps the file, in any process."""
        return [page for other in self.processes for page in other.pages.values() if page.backing is self.backing]

    # ---- what holds after every operation

    def check(self) -> None:
        verify(self.host)
        for process in self.processes:
            self.check_contents(process)
            pgd = process.mm.pgd
            seen = process.mm.soft_dirty(BASE, BASE + PAGES * PAGE)
            for page, mapped in process.pages.items():
                hva = BASE + page * PAGE
                assert not mapped.dirty or any(lo <= hva < hi for lo, hi in seen), f"page {page} is not soft-dirty"
            for page, entry in process.thread.tlb.items():
                now = pgd.get(page)
                assert now & PRESENT
                assert pte_pfn(now) == pte_pfn(entry)
                assert now & WRITE or not entry & WRITE
            for page, found in process.shadow.entries.items():
                now = pgd.get(page)
                assert now & PRESENT
                assert pte_pfn(now) == found.pfn
                assert now & WRITE or not found.writable

    def check_contents(self, process: Process) -> None:
        entries = {page - (BASE >> 12): entry for page, entry in process.mm.pgd.entries(0, 1 << 36)}
        for page, entry in entries.items():
            if entry == GUARD:
                assert process.pages[page].guard
                continue
            mapped, pfn = process.pages[page], pte_pfn(entry)
            value = tuple(int.from_bytes(self.host.read(pfn, offset, 8), "little") for offset in OFFSETS)
            assert value == mapped.value, f"page {page} of {process.mm.name}"
            assert not entry & WRITE or mapped.prot & 2
        for page, mapped in process.pages.items():
            assert mapped.private is None or page in entries, f"page {page} of {process.mm.name} is lost"


VERBS = (
    ["access"] * 12
    + [
        "mmap",
        "mmap",
        "munmap",
        "mremap",
        "mremap",
        "mprotect",
        "mprotect",
        "mprotect",
        "dontneed",
        "dontneed",
        "advise",
        "advise",
        "advise",
    ]
    + ["mlock", "clear_refs", "clear_refs", "force", "force"]
    + ["fork", "fork", "exit", "pwrite", "punch", "truncate"]
)
operations = st.lists(
    st.tuples(
        st.sampled_from(VERBS),
        st.integers(0, 3),
        st.integers(0, PAGES - 1),
        st.integers(1, PAGES),
        st.integers(0, 119),
    ),
    min_size=20,
    max_size=60,
)
first_mapping = st.integers(0, 119)


def check_against_the_model(choice: int, sequence: list[tuple[str, int, int, int, int]]) -> None:
    world = World()
    world.run(("mmap", 0, 0, PAGES, choice))
    for op in sequence:
        world.run(op)
    for process in world.processes:
        process.mm.exit()
    world.file.close()
    assert world.host.free_frames == world.host.nr_frames - 1
    verify(world.host)


@given(first_mapping, operations)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_against_the_model(choice: int, sequence: list[tuple[str, int, int, int, int]]) -> None:
    check_against_the_model(choice, sequence)


@pytest.mark.slow
@given(first_mapping, operations)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_against_the_model_at_length(choice: int, sequence: list[tuple[str, int, int, int, int]]) -> None:
    check_against_the_model(choice, sequence)
