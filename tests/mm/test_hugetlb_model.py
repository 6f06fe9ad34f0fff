"""Random operations on huge pages, against a model that knows pages as objects and counts nothing.

What is free, and what is set aside, the model finds by looking at everything; the real thing keeps counts. After every
operation the errno, the tables, the contents and the counts have to agree, and ``verify`` has to find nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count as count_up

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.check import Oracle
from xipvm.conform.guest import Vcpu
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.pte import WRITE, pte_pfn
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_WRITE, spte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)
from xipvm.trace.funnel import Trace

H = HPAGE_SIZE
PLACE = 16 << 30
SLOTS = 8
POOL = 5
MIDDLE = 300 * 4096
"""Where in a page the second value is that operations write."""
RW = PROT_READ | PROT_WRITE


class ModelError(Exception):
    """What the operation has to fail with."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number


@dataclass(eq=False)
class Page:
    """Two bytes of 2 MiB: the first, and the one at MIDDLE."""

    data: list[int]
    anon: bool


@dataclass(eq=False)
class File:
    size: int
    open: bool = True
    cache: dict[int, Page] = field(default_factory=dict)
    reserved: set[int] = field(default_factory=set)


births = count_up(1)


@dataclass(eq=False)
class Area:
    """Pages ``[start, end)``; ``consumed`` is None where nothing was set aside."""

    start: int
    end: int
    prot: int
    shared: bool
    file: File
    offset: int
    consumed: set[int] | None
    lost: bool = False
    anon_vma: bool = False
    """It has had a private page: fork copies it."""
    pages: dict[int, Page] = field(default_factory=dict)
    born: int = field(default_factory=births.__next__)
    """Truncation goes through the areas of a file in this order; who gives the last reference up sets a page aside."""

    def at(self, slot: int) -> int:
        return self.offset + slot - self.start


class Model:
    def __init__(self) -> None:
        self.file = File(4)
        self.files = [self.file]
        self.processes: dict[str, list[Area]] = {"p": []}

    # ---- looking

    def areas(self) -> Iterator[Area]:
        for areas in self.processes.values():
            yield from areas

    def free(self) -> int:
        alive = {page for area in self.areas() for page in area.pages.values()}
        alive |= {page for file in self.files for page in file.cache.values()}
        return POOL - len(alive)

    def reserved(self) -> int:
        private = sum(
            area.at(slot) not in area.consumed
            for area in self.areas()
            if area.consumed is not None
            for slot in range(area.start, area.end)
        )
        return private + sum(len(file.reserved - file.cache.keys()) for file in self.files)

    def find(self, who: str, slot: int) -> Area | None:
        return next((area for area in self.processes[who] if area.start <= slot < area.end), None)

    def mappers(self, page: Page) -> list[tuple[Area, int]]:
        return [(area, slot) for area in self.areas() for slot, other in area.pages.items() if other is page]

    # ---- areas

    def split(self, who: str, slot: int) -> None:
        area = self.find(who, slot)
        if area is not None and area.start < slot:
            upper = replace(area, start=slot, offset=area.at(slot), pages={}, born=next(births))
            upper.pages = {at: area.pages.pop(at) for at in list(area.pages) if at >= slot}
            area.end = slot
            self.processes[who].append(upper)

    def cut(self, who: str, start: int, end: int) -> list[Area]:
        self.split(who, start)
        self.split(who, end)
        return sorted((a for a in self.processes[who] if start <= a.start < end), key=lambda area: area.start)

    def reap(self) -> None:
        for file in self.files:
            if not file.open and not any(area.file is file for area in self.areas()):
                file.cache.clear()
                file.reserved.clear()

    def promise(self, count: int) -> None:
        if count > 0 and self.reserved() + count > self.free():
            raise ModelError(errno.ENOMEM)

    def mmap(self, who: str, slot: int, count: int, shared: bool, noreserve: bool, file: File | None, at: int) -> None:
        if file is None:
            file = File(count, open=False)
        area = Area(slot, slot + count, RW, shared, file, at, None)
        if not noreserve and shared:
            new = set(range(at, at + count)) - file.reserved
            self.promise(len(new))
            file.reserved |= new
        elif not noreserve:
            self.promise(count)
            area.consumed = set()
        if file not in self.files:
            self.files.append(file)
        file.size = max(file.size, at + count)
        old = self.cut(who, slot, slot + count)
        self.processes[who] = [area, *(other for other in self.processes[who] if other not in old)]
        self.reap()

    def munmap(self, who: str, slot: int, count: int) -> None:
        for area in self.cut(who, slot, slot + count):
            self.processes[who].remove(area)
        self.reap()

    def mremap(self, who: str, slot: int, count: int, to: int) -> None:
        area = self.find(who, slot)
        if area is None:
            raise ModelError(errno.EFAULT)
        if slot < to + count and to < slot + count:
            raise ModelError(errno.EINVAL)
        if area.end < slot + count:
            raise ModelError(errno.EFAULT)
        self.munmap(who, to, count)
        (moved,) = self.cut(who, slot, slot + count)
        moved.pages = {at - slot + to: page for at, page in moved.pages.items()}
        moved.start, moved.end, moved.born = to, to + count, next(births)

    def mprotect(self, who: str, slot: int, count: int, prot: int) -> None:
        if any(self.find(who, at) is None for at in range(slot, slot + count)):
            raise ModelError(errno.ENOMEM)
        for area in self.cut(who, slot, slot + count):
            area.prot = prot

    # ---- pages

    def drop(self, area: Area, slot: int) -> None:
        page = area.pages.pop(slot, None)
        if page is not None and page.anon and area.consumed is not None and not self.mappers(page):
            area.consumed.discard(area.at(slot))

    def dontneed(self, who: str, slot: int, count: int) -> None:
        if any(self.find(who, at) is None for at in range(slot, slot + count)):
            raise ModelError(errno.ENOMEM)
        for at in range(slot, slot + count):
            area = self.find(who, at)
            assert area is not None
            self.drop(area, at)

    def remove(self, file: File, first: int, end: int | None) -> None:
        for area in sorted(self.areas(), key=lambda area: area.born):
            for slot in list(area.pages):
                if area.file is file and first <= area.at(slot) and (end is None or area.at(slot) < end):
                    self.drop(area, slot)
        for at in list(file.cache):
            if first <= at and (end is None or at < end):
                del file.cache[at]
                file.reserved.discard(at)
        if end is None:
            file.reserved = {at for at in file.reserved if at < first}

    def take(self, promised: bool, data: list[int], anon: bool) -> Page:
        if not promised and self.free() <= self.reserved():
            raise ModelError(errno.EFAULT)
        return Page(data, anon)

    def private(self, area: Area, slot: int, data: list[int]) -> Page:
        promised = area.consumed is not None and area.at(slot) not in area.consumed
        page = self.take(promised, data, True)
        area.anon_vma = True
        if area.consumed is not None:
            area.consumed.add(area.at(slot))
        return page

    def grab(self, file: File, at: int) -> Page:
        if at not in file.cache:
            page = self.take(at in file.reserved, [0, 0], False)
            file.cache[at] = page
            file.reserved.add(at)
        return file.cache[at]

    def fallocate(self, file: File, first: int, count: int) -> None:
        for at in range(first, first + count):
            try:
                self.grab(file, at)
            except ModelError:
                raise ModelError(errno.ENOSPC) from None
        file.size = max(file.size, first + count)

    def touch(self, who: str, slot: int, write: bool) -> Page:
        area = self.find(who, slot)
        if area is None or not area.prot or (write and not area.prot & PROT_WRITE):
            raise ModelError(errno.EFAULT)
        at = area.at(slot)
        if slot not in area.pages:
            if area.lost or at >= area.file.size:
                raise ModelError(errno.EFAULT)
            if area.shared:
                area.pages[slot] = self.grab(area.file, at)
            elif at in area.file.cache:
                area.pages[slot] = area.file.cache[at]
            else:
                area.pages[slot] = self.private(area, slot, [0, 0])
        page = area.pages[slot]
        if write and not area.shared and not (page.anon and len(self.mappers(page)) == 1):
            self.copy(area, slot, page)
        return area.pages[slot]

    def copy(self, area: Area, slot: int, page: Page) -> None:
        if not page.anon or area.consumed is None:
            area.pages[slot] = self.private(area, slot, list(page.data))
            return
        try:
            area.pages[slot] = self.take(False, list(page.data), True)
        except ModelError:
            for other, place in self.mappers(page):
                if other is not area:
                    del other.pages[place]
                    other.lost = True

    def fork(self, name: str) -> None:
        self.processes[name] = [
            replace(area, consumed=None, lost=False, pages=dict(area.pages) if area.anon_vma else {}, born=next(births))
            for area in self.processes["p"]
        ]

    def exit(self, who: str) -> None:
        del self.processes[who]
        self.reap()


class Real:
    """The same operations on the real thing."""

    def __init__(self) -> None:
        self.host = HostMemory((POOL + 1) * H, poison="head")
        self.host.reserve_huge_pages(POOL)
        self.trace, self.oracle = Trace(), Oracle()
        self.trace.attach(self.oracle)
        self.mm = Mm(self.host, self.trace)
        self.kvm = Kvm(self.mm, self.trace, self.host)
        self.kvm.set_memslot(0, 0, SLOTS * 512, PLACE, 0)
        self.vcpu = Vcpu(self.kvm, self.host)
        self.kvm.vcpus.append(self.vcpu)
        self.file = HugetlbFile(self.host, self.trace, "huge", 4 * H)
        self.processes = {"p": self.mm}


def place(slot: int) -> int:
    return PLACE + slot * H


def agree(model: Model, real: Real) -> None:
    assert (real.host.free_huge_pages, real.host.reserved_huge_pages) == (model.free(), model.reserved())
    frames: dict[int, Page] = {}
    for who, mm in real.processes.items():
        for slot in range(SLOTS):
            entry, area = mm.pgd.get(place(slot) >> 12), model.find(who, slot)
            page = None if area is None else area.pages.get(slot)
            assert bool(entry) == (page is not None), f"{who} {slot}"
            if page is not None:
                pfn = pte_pfn(entry)
                assert frames.setdefault(pfn, page) is page
                assert [real.host.read(pfn + offset, 0, 1)[0] for offset in (0, 300)] == page.data
                assert area is not None
                assert not entry & WRITE or area.shared or (page.anon and len(model.mappers(page)) == 1)
    for gfn, spte in real.kvm.sptes.entries(0, SLOTS * 512):
        entry = real.mm.pgd.get((PLACE >> 12) + gfn)
        assert spte & SPTE_HUGE
        assert pte_pfn(entry) == spte_pfn(spte)
        assert entry & WRITE or not spte & SPTE_WRITE
    assert real.oracle.violations == []
    verify(real.host)


Step = tuple[str, int, int, int]
OPS = ("mmap", "munmap", "mremap", "mprotect", "dontneed", "fork", "exit", "read", "write", "guest", "file", "child")
STEPS = st.tuples(st.sampled_from(OPS), st.integers(0, SLOTS - 1), st.integers(1, 3), st.integers(0, 7))


def perform(model: Model, real: Real, step: Step) -> None:
    op, slot, count, choice = step
    count = min(count, SLOTS - slot)
    mm, value = real.mm, slot * 8 + choice + 1
    pair: tuple[Callable[[], object], Callable[[], object]]
    if op == "mmap":
        shared, noreserve, filed = bool(choice & 1), bool(choice & 2), bool(choice & 4)
        flags = MAP_FIXED | (MAP_SHARED if shared else MAP_PRIVATE) | (MAP_NORESERVE if noreserve else 0)
        flags |= 0 if filed else MAP_ANONYMOUS | MAP_HUGETLB
        file, backing, at = (model.file, real.file, slot % 3) if filed else (None, None, 0)
        pair = (
            lambda: model.mmap("p", slot, count, shared, noreserve, file, at),
            lambda: mm.mmap(count * H, RW, flags, addr=place(slot), file=backing, pgoff=at * 512),
        )
    elif op == "munmap":
        pair = lambda: model.munmap("p", slot, count), lambda: mm.munmap(place(slot), count * H)
    elif op == "mremap":
        to = min(choice, SLOTS - count)
        pair = (
            lambda: model.mremap("p", slot, count, to),
            lambda: mm.mremap(place(slot), count * H, count * H, MREMAP_MAYMOVE | MREMAP_FIXED, place(to)),
        )
    elif op == "mprotect":
        prot = (RW, PROT_READ, PROT_NONE, RW)[choice % 4]
        pair = (
            lambda: model.mprotect("p", slot, count, prot),
            lambda: mm.mprotect(place(slot), count * H, prot),
        )
    elif op == "dontneed":
        pair = (
            lambda: model.dontneed("p", slot, count),
            lambda: mm.madvise(place(slot), count * H, MADV_DONTNEED),
        )
    elif op == "fork":
        name = f"c{choice % 2}"
        if name in real.processes:
            return
        real.processes[name] = mm.fork(name)
        model.fork(name)
        return
    elif op == "exit":
        name = f"c{choice % 2}"
        if name in real.processes:
            real.processes.pop(name).exit()
            model.exit(name)
        return
    elif op == "file":
        first, length = slot % 4, count
        if choice == 0:
            model.file.size = first
            pair = lambda: model.remove(model.file, first, None), lambda: real.file.truncate(first * H)
        elif choice < 4:
            pair = (
                lambda: model.remove(model.file, first, first + length),
                lambda: real.file.punch_hole(first * 512, length * 512),
            )
        else:
            pair = (
                lambda: model.fallocate(model.file, first, length),
                lambda: real.file.fallocate(first * H, length * H),
            )
    elif op == "guest":
        gfn = slot * 512 + (300 if choice & 1 else 0)

        def modelled_guest() -> None:
            page = model.touch("p", slot, choice > 3)
            if choice > 3:
                page.data[choice & 1] = value

        def access() -> None:
            done = real.vcpu.store(gfn, value) if choice > 3 else real.vcpu.load(gfn)
            if done.exit == "efault":
                raise MmError(errno.EFAULT, "guest")
            assert done.exit == "ok"

        pair = modelled_guest, access
    else:
        who = "p" if op != "child" or f"c{count % 2}" not in real.processes else f"c{count % 2}"
        write = op == "write" or (op == "child" and choice > 2)

        def modelled() -> None:
            page = model.touch(who, slot, write)
            if write:
                page.data[choice & 1] = value & 0xFF

        hva, process = place(slot) + (MIDDLE if choice & 1 else 0), real.processes[who]
        pair = (
            modelled,
            (lambda: process.write(hva, bytes([value & 0xFF]))) if write else (lambda: process.read(hva, 1)),
        )
    expected, got = 0, 0
    try:
        pair[0]()
    except ModelError as error:
        expected = error.errno
    try:
        pair[1]()
    except MmError as error:
        got = error.errno
    assert got == expected, (
        f"{step}: got {errno.errorcode.get(got, got)}, not {errno.errorcode.get(expected, expected)}"
    )


def play(steps: list[Step]) -> None:
    model, real = Model(), Real()
    for step in steps:
        perform(model, real, step)
        agree(model, real)
    real.kvm.destroy()
    for mm in real.processes.values():
        mm.exit()
    real.oracle.finish()
    assert real.oracle.violations == []
    real.file.close()
    assert (real.host.free_huge_pages, real.host.reserved_huge_pages) == (POOL, 0)
    verify(real.host)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.lists(STEPS, min_size=5, max_size=12))
def test_random_operations_agree_with_the_model(steps: list[Step]) -> None:
    play(steps)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.lists(STEPS, min_size=15, max_size=40))
def test_long_sequences_agree_with_the_model(steps: list[Step]) -> None:
    play(steps)
