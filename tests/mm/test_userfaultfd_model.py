"""Random operations on memory that monitors serve and watch, against a dict of pages.

Three areas: private memory whose missing pages and first writes are told, a memory file whose first writes are told,
and private memory whose writes are only remembered. After every operation: the messages that the model expects, no
others; what every page holds; and the bookkeeping, by a full scan.
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
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_MERGEABLE, MADV_PAGEOUT, MADV_UNMERGEABLE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pagemap import PAGE_IS_WRITTEN, PM_SCAN_CATEGORIES, PM_SCAN_WP_MATCHING
from xipvm.mmu.pte import EXCLUSIVE, MAPPED, PRESENT, SPECIAL, UFFD_WP, WRITE, pte_pfn
from xipvm.mmu.tables import GupPage
from xipvm.mmu.uffd_message import UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, UffdMsg
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    Userfaultfd,
)
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifierRange
from xipvm.trace.funnel import Trace

PAGE = 4096
PAGES = 6
BASE = 0x20_0000_0000 - 3 * PAGE  # the areas lie on both sides of a table's end
SERVED, FILE, TRACKED = range(3)
RW = 3
WRITE_FLAG, WP_FLAG = UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WP


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


@dataclass
class Page:
    """``value`` None: there is none, and its monitor is asked; for the others that reads as 0."""

    value: int | None = None
    protected: bool = False
    there: bool = False
    """TRACKED: the entry is more than a marker."""


@dataclass
class World:
    told: list[tuple[int, int]] = field(default_factory=list)
    """(page of SERVED or FILE, flags)"""

    def __post_init__(self) -> None:
        self.host = HostMemory(256 * PAGE, poison="frame")
        self.mm = mm = Mm(self.host, Trace())
        mm.swapon(64)
        self.file = ShmemFile(self.host, mm.trace, "file", PAGES * PAGE)
        # A hole between any two, so that none of them is merged.
        self.starts = [BASE + number * (PAGES + 1) * PAGE for number in range(3)]
        mm.mmap(PAGES * PAGE, RW, addr=self.starts[SERVED])
        mm.mmap(PAGES * PAGE, RW, MAP_SHARED, addr=self.starts[FILE], file=self.file)
        mm.mmap(PAGES * PAGE, RW, addr=self.starts[TRACKED])
        self.pages = [[Page() for _ in range(PAGES)] for _ in range(3)]
        self.uffd = mm.userfaultfd(self.answer)
        self.uffd.register(self.starts[SERVED], PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
        self.uffd.register(self.starts[FILE], PAGES * PAGE, UFFDIO_REGISTER_MODE_WP)
        self.tracker = mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC)
        self.tracker.register(self.starts[TRACKED], PAGES * PAGE, UFFDIO_REGISTER_MODE_WP)
        self.thread = HostThread(mm)
        self.shadow = Shadow()
        mm.notifiers.register(self.shadow)
        self.expected: list[tuple[int, int]] = []
        self.values = 0

    def answer(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        page = (message.address - BASE) // PAGE
        self.told.append((page, message.flags))
        if message.flags & WP_FLAG:
            uffd.writeprotect(message.address, PAGE, 0)
        else:
            uffd.copy(message.address, bytes([200 + page]) * PAGE, UFFDIO_COPY_MODE_WP if page & 1 else 0)

    def at(self, kind: int, page: int) -> int:
        return self.starts[kind] + page * PAGE

    def number(self, kind: int, page: int) -> int:
        return kind * (PAGES + 1) + page

    def expect(self, error: int, call, *arguments) -> None:  # type: ignore[no-untyped-def]
        got = 0
        try:
            call(*arguments)
        except MmError as raised:
            got = raised.errno
        assert got == error

    # ---- the model of an access

    def touch(self, kind: int, page: int, write: bool) -> None:
        state, number = self.pages[kind][page], self.number(kind, page)
        if kind == SERVED and state.value is None:
            self.expected.append((number, WRITE_FLAG if write else 0))
            state.value, state.protected = 200 + page, bool(number & 1)
        if write and state.protected:
            state.protected = False
            if kind != TRACKED:
                self.expected.append((number, WRITE_FLAG | WP_FLAG))
        state.there = True

    # ---- operations

    def read(self, kind: int, page: int, end: int, choice: int) -> None:
        self.touch(kind, page, False)
        reader = self.thread.load if choice & 1 else self.mm.read
        assert reader(self.at(kind, page), 1)[0] == (self.pages[kind][page].value or 0)

    def write(self, kind: int, page: int, end: int, choice: int) -> None:
        self.touch(kind, page, True)
        self.values = self.values % 100 + 1
        self.pages[kind][page].value = self.values
        writer = (self.thread.store, self.mm.write, self.mm.access_remote_vm)[choice % 3]
        writer(self.at(kind, page), bytes([self.values]))

    def device(self, kind: int, page: int, end: int, choice: int) -> None:
        """A secondary MMU maps the page."""
        write = bool(choice & 1)
        self.touch(kind, page, write)
        hva = self.at(kind, page)
        self.shadow.entries[hva // PAGE] = self.mm.get_user_pages(hva, write=write)

    def protect(self, kind: int, first: int, end: int, choice: int) -> None:
        on = choice & 1
        uffd = self.tracker if kind == TRACKED else self.uffd
        uffd.writeprotect(self.at(kind, first), (end - first) * PAGE, on)
        for page in self.pages[kind][first:end]:
            if kind != SERVED or page.value is not None:
                page.protected = bool(on)

    def dontneed(self, kind: int, first: int, end: int, choice: int) -> None:
        self.mm.madvise(self.at(kind, first), (end - first) * PAGE, MADV_DONTNEED)
        for page in self.pages[kind][first:end]:
            if kind != FILE:
                page.value, page.protected, page.there = None, False, False

    def punch(self, kind: int, first: int, end: int, choice: int) -> None:
        self.file.punch_hole(first, end - first)
        for page in self.pages[FILE][first:end]:
            page.value = None

    def copy(self, kind: int, page: int, end: int, choice: int) -> None:
        state = self.pages[SERVED][page]
        mode = UFFDIO_COPY_MODE_WP if choice & 1 else 0
        error = errno.EEXIST if state.value is not None else 0
        self.expect(error, self.uffd.copy, self.at(SERVED, page), bytes([150]) * PAGE, mode)
        if not error:
            state.value, state.protected = 150, bool(mode)

    def zeropage(self, kind: int, page: int, end: int, choice: int) -> None:
        state = self.pages[SERVED][page]
        error = errno.EEXIST if state.value is not None else 0
        self.expect(error, self.uffd.zeropage, self.at(SERVED, page), PAGE)
        if not error:
            state.value, state.protected = 0, False

    def move(self, kind: int, page: int, end: int, choice: int) -> None:
        """From the tracked area to the served one, if it is a page by itself there."""
        target = choice % PAGES
        source, state = self.pages[TRACKED][page], self.pages[SERVED][target]
        entry = self.mm.pgd.get(self.at(TRACKED, page) // PAGE)
        error = 0
        if state.value is not None:
            error = errno.EEXIST
        elif not entry:
            error = errno.ENOENT
        elif entry == UFFD_WP:
            error = errno.EFAULT
        elif not entry & (SPECIAL | EXCLUSIVE):  # a fork has shared it, and nobody has written since
            error = errno.EBUSY
        self.expect(error, self.uffd.move, self.at(SERVED, target), self.at(TRACKED, page), PAGE)
        if not error:
            state.value, state.protected = source.value or 0, False
            source.value, source.protected, source.there = None, False, False

    def scan(self, kind: int, first: int, end: int, choice: int) -> None:
        start = self.at(TRACKED, first)
        found = self.mm.pagemap_scan(
            start,
            self.at(TRACKED, end),
            flags=PM_SCAN_WP_MATCHING,
            category_mask=PAGE_IS_WRITTEN,
            return_mask=PM_SCAN_CATEGORIES,
        )
        written = [first + (hva - start) // PAGE for lo, hi, _ in found.regions for hva in range(lo, hi, PAGE)]
        assert written == [
            page for page in range(first, end) if self.pages[TRACKED][page].there and not self.is_protected(page)
        ]
        for page in written:
            self.pages[TRACKED][page].protected = True

    def is_protected(self, page: int) -> bool:
        return self.pages[TRACKED][page].protected

    def pageout(self, kind: int, first: int, end: int, choice: int) -> None:
        self.mm.madvise(self.at(kind, first), (end - first) * PAGE, MADV_PAGEOUT)

    def migrate(self, kind: int, first: int, end: int, choice: int) -> None:
        compact_memory(self.host, self.mm.trace)

    def merge(self, kind: int, first: int, end: int, choice: int) -> None:
        for start in self.starts:
            self.mm.madvise(start, PAGES * PAGE, MADV_MERGEABLE)
        self.mm.ksm_scan()
        for start in self.starts:
            self.mm.madvise(start, PAGES * PAGE, MADV_UNMERGEABLE)

    def fork(self, kind: int, first: int, end: int, choice: int) -> None:
        """A child, which sees the pages that are there, and nobody's monitor."""
        child = self.mm.fork()
        assert not any(entry & UFFD_WP for _, entry in child.pgd.entries(0, 1 << 36))
        for page, state in enumerate(self.pages[SERVED]):
            assert child.read(self.at(SERVED, page), 1)[0] == (state.value or 0)
        child.write(self.at(TRACKED, first), b"c")
        verify(self.host)
        child.exit()

    def remap(self, kind: int, first: int, end: int, choice: int) -> None:
        """Gives the served area up and registers it again: nothing stays protected."""
        self.uffd.unregister(self.starts[SERVED], PAGES * PAGE)
        self.uffd.register(self.starts[SERVED], PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
        for page in self.pages[SERVED]:
            page.protected = False

    # ---- what must be true

    def check(self) -> None:
        assert self.told == self.expected
        mm = self.mm
        for kind in range(3):
            for number, state in enumerate(self.pages[kind]):
                entry = mm.pgd.get(self.at(kind, number) // PAGE)
                assert bool(entry & UFFD_WP) == state.protected, (kind, number)
                if kind == SERVED:
                    assert bool(entry) == (state.value is not None)
                if entry & MAPPED:
                    assert self.host.read(pte_pfn(entry), 0, 1)[0] == (state.value or 0), (kind, number)
        for page, entry in self.thread.tlb.items():
            now = mm.pgd.get(page)
            assert now & PRESENT
            assert pte_pfn(now) == pte_pfn(entry)
            assert not entry & WRITE or now & WRITE
        for page, seen in self.shadow.entries.items():
            now = mm.pgd.get(page)
            assert now & PRESENT
            assert pte_pfn(now) == seen.pfn
            assert not seen.writable or now & WRITE
        verify(self.host)

    def end(self) -> None:
        self.uffd.close()
        self.tracker.close()
        verify(self.host)
        self.mm.exit()
        self.file.close()
        verify(self.host)
        self.host.close()


OPERATIONS = [
    *("read", "read", "write", "write", "write", "device", "device", "protect", "protect", "dontneed", "punch"),
    *("copy", "zeropage", "move", "scan", "scan", "pageout", "migrate", "merge", "fork", "remap"),
]

operation = st.tuples(
    st.sampled_from(OPERATIONS),
    st.integers(0, 2),
    st.integers(0, PAGES - 1),
    st.integers(1, PAGES),
    st.integers(0, 2 * PAGES - 1),
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(operation, max_size=30))
def test_monitors_see_what_they_should(operations: list[tuple[str, int, int, int, int]]) -> None:
    world = World()
    for verb, kind, first, count, choice in operations:
        getattr(world, verb)(kind, first, min(first + count, PAGES), choice)
        world.check()
    world.end()
