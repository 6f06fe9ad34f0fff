"""Several processes, each with a thread and a VM, on the mm and on the naive model beside it.

After every operation: the same errno; every page that is mapped shows what the model says, and none is lost; no TLB and
no spte has what the page table does not have; reference counts, mapcounts and the reverse map agree with a full scan.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.mm.naive import EMPTY, OFFSETS, READ, WRITE, NaiveFile, NaiveProcess, Page, Slot, Words, truncate
from xipvm.errors import MmError
from xipvm.mmu import madvise as advice
from xipvm.mmu.frames import HUGE_PAGES, PG_RESERVED, HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import MS_ASYNC, MS_INVALIDATE, MS_SYNC, START_BRK, Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import PageCache, ShmemFile
from xipvm.mmu.pte import GUARD, HUGE, MAPPED, PRESENT, SPECIAL, pte_pfn
from xipvm.mmu.pte import WRITE as PTE_WRITE
from xipvm.mmu.secondary.base import FAULT, MMIO, RETRY_WALK
from xipvm.mmu.secondary.base import READ as GUEST_READ
from xipvm.mmu.secondary.base import WRITE as GUEST_WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_PRESENT, SPTE_WRITE, spte_pfn
from xipvm.mmu.uffd_message import (
    UFFD_EVENT_PAGEFAULT,
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP,
    UffdMsg,
)
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_UNPOPULATED
from xipvm.mmu.userfaultfd import UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, Userfaultfd
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_MINOR as MINOR
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_MISSING as MISSING
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_WP as WP
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MAP_SHARED, VM_LOCKED
from xipvm.trace.funnel import Trace

PAGE = 4096
BASE = 0x20_0000_0000 // PAGE - 5
"""The first page that is used: they lie on both sides of a table's end."""
PAGES = 12
HEAP = START_BRK // PAGE
HEAP_PAGES = 5
FRAMES = 256
FILE_PAGES = 8
MOST_PAGES = 36
"""No process gets more."""
MOST_PROCESSES = 3
PROTS = (3, 3, 3, 1, 0, 7, 5)
FLAGS = {"private": MAP_PRIVATE, "shared": MAP_SHARED}

Operation = tuple[str, int, int, int, int]
"""What, which process, the first page, how many pages, and a number for everything else."""


class Vcpu:
    """Keeps what it was given until it is flushed, as a TLB may."""

    def __init__(self) -> None:
        self.tlb: dict[int, tuple[int, bool]] = {}

    def flush_tlb(self, reason: str) -> None:
        self.tlb.clear()

    def kick(self, reason: str) -> None:
        pass


@contextmanager
def allowed(*errors: int) -> Iterator[None]:
    """What the model cannot say: it fails with one of ``errors``, or does not."""
    try:
        yield
    except MmError as raised:
        if raised.errno not in errors:
            raise


def resolve(uffd: Userfaultfd, message: UffdMsg) -> None:
    """The monitor: nobody sees that it is there."""
    if message.event != UFFD_EVENT_PAGEFAULT:
        return
    if message.flags & UFFD_PAGEFAULT_FLAG_WP:
        uffd.writeprotect(message.address, PAGE, 0)
    elif message.flags & UFFD_PAGEFAULT_FLAG_MINOR:
        uffd.continue_(message.address, PAGE)
    elif message.address & PAGE:
        uffd.copy(message.address, bytes(PAGE))
    else:
        try:
            uffd.zeropage(message.address, PAGE)
        except MmError:  # only a copy goes over a marker
            uffd.copy(message.address, bytes(PAGE))


@dataclass(eq=False)
class File:
    """A file and its model. ``path``: where it is on the disk."""

    real: PageCache
    model: NaiveFile
    path: str = ""


class Process:
    """A process, its thread, its VM with one vCPU, and its model."""

    def __init__(self, world: World, mm: Mm, model: NaiveProcess) -> None:
        self.mm = mm
        self.model = model
        self.thread = HostThread(mm, f"thread of {mm.name}")
        self.vcpu = Vcpu()
        self.uffd: Userfaultfd | None = None
        self.open_vm(world)

    def open_vm(self, world: World) -> None:
        self.kvm = Kvm(self.mm, world.trace, world.host, name=f"vm of {self.mm.name}")
        self.kvm.vcpus.append(self.vcpu)
        self.model.slots = {}
        self.set_slot(0, Slot(0, world.pages, world.base))
        self.set_slot(1, Slot(world.heap_gfn, HEAP_PAGES, HEAP))

    def set_slot(self, number: int, slot: Slot, flags: int = 0) -> None:
        self.kvm.set_memslot(number, slot.gfn, slot.pages, slot.page * PAGE, flags | MEM_READONLY * slot.readonly)
        self.model.slots[number] = slot


class World:
    """``folder``: where files are made. ``traced``: every event is made, and thrown away."""

    base = BASE
    pages = PAGES
    frames = FRAMES
    file_pages = FILE_PAGES
    most_pages = MOST_PAGES
    most_processes = MOST_PROCESSES
    heap_gfn, alias_gfn = 32, 64

    def __init__(self, folder: str, *, traced: bool = False, swap: int = 0) -> None:
        self.host = HostMemory(self.frames * PAGE, poison="frame")
        self.trace = Trace()
        if traced:
            self.trace.attach(lambda event: None)
        self.processes = [Process(self, Mm(self.host, self.trace), NaiveProcess(START_BRK, START_BRK))]
        self.swaps = 0
        if swap:
            self.processes[0].mm.swapon(swap)
            self.swaps = 1
        self.files = [
            File(ShmemFile(self.host, self.trace, "memfd", self.file_pages * PAGE), NaiveFile(self.file_pages * PAGE)),
            self._host_file(os.path.join(folder, "rw"), True),
            self._host_file(os.path.join(folder, "ro"), False),
        ]
        self.pins: Counter[int] = Counter()
        self.written = 100

    def _host_file(self, path: str, writable: bool) -> File:
        model = NaiveFile((FILE_PAGES - 2) * PAGE, writable, {1: (1, 2, 0), 2: (7, 0, 9), 4: (1, 1, 1)})
        with open(path, "wb") as disk:
            disk.write(model.read(0, model.size))
        return File(HostFile(self.host, self.trace, path, writable=writable), model, path)

    def run(self, op: Operation) -> None:
        verb, who, page, count, choice = op
        process = self.processes[who % len(self.processes)]
        getattr(self, verb)(process, self._pages(process, page, count), choice)
        self.check()

    def _pages(self, process: Process, page: int, count: int) -> range:
        """In the middle, on the heap, or where mremap has put something."""
        if page < PAGES:
            first = self.base + page
        elif page < PAGES + HEAP_PAGES:
            first = HEAP + page - PAGES
        else:
            mapped = sorted(process.model.pages) or [self.base]
            first = mapped[page % len(mapped)]
        return range(first, first + count)

    def target(self, choice: int, count: int) -> int:
        """Where ``count`` pages can be moved to."""
        return self.base + max(min(choice % PAGES, self.pages - count), 0)

    def everybody(self) -> Iterator[Page]:
        for process in self.processes:
            yield from process.model.pages.values()

    def same(self, error: int, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """``call`` fails with ``error``; 0: it does not fail, and its result is the result."""
        got, result = 0, None
        try:
            result = call(*arguments, **keywords)
        except MmError as raised:
            got = raised.errno
        assert got == error, (
            f"{call.__name__}: {errno.errorcode.get(got, got)}, not {errno.errorcode.get(error, error)}"
        )
        return result

    # ---- areas

    def mmap(self, process: Process, pages: range, choice: int) -> None:
        first, count = pages.start, len(pages)
        if first >= self.base:
            count = max(min(count, self.base + self.pages - first), 1)
        kind, sharing = (3, 0, 3, 1, 2, 3)[choice % 6], "shared" if choice // 6 % 2 else "private"
        prot, how = PROTS[choice // 8 % len(PROTS)], (0, 0, 1, 2)[choice // 56 % 4]
        flags, pgoff = FLAGS[sharing] | (0, MAP_FIXED, MAP_FIXED_NOREPLACE)[how or 1], choice // 224 % 4
        file, model = None, None
        if kind < 3:
            chosen = self.files[kind]
            file, model = chosen.real, chosen.model
        else:
            flags, pgoff = flags | MAP_ANONYMOUS, 0
            if sharing == "shared":
                model = NaiveFile(count * PAGE)
        like = Page(prot, model, pgoff, sharing == "shared")
        error = process.model.mmap(first, count, like, noreplace=how == 2)
        got = self.same(
            error, process.mm.mmap, count * PAGE - choice % 3, prot, flags, addr=first * PAGE, file=file, pgoff=pgoff
        )
        assert error or got == first * PAGE

    def mmap_anywhere(self, process: Process, pages: range, choice: int) -> None:
        """A wish that is granted if there is room, and something else that is free otherwise."""
        if len(process.model.pages) + len(pages) > self.most_pages:
            return
        free = not process.model.mapped(pages)
        got = process.mm.mmap(len(pages) * PAGE, 3, addr=pages.start * PAGE) // PAGE
        assert got == pages.start or not free
        assert process.model.mmap(got, len(pages), Page(3), noreplace=True) == 0

    def munmap(self, process: Process, pages: range, choice: int) -> None:
        self.same(process.model.munmap(pages), process.mm.munmap, pages.start * PAGE, len(pages) * PAGE - choice % 5)

    def brk(self, process: Process, pages: range, choice: int) -> None:
        addr = START_BRK + choice % ((HEAP_PAGES + 1) * PAGE) - 100
        if choice % 7 == 0:
            addr = 0
        assert process.mm.brk(addr) == process.model.brk(addr)

    def mprotect(self, process: Process, pages: range, choice: int) -> None:
        prot = PROTS[choice % len(PROTS)]
        error = process.model.mprotect(pages, prot)
        self.same(error, process.mm.mprotect, pages.start * PAGE, len(pages) * PAGE, prot)

    def mremap(self, process: Process, pages: range, choice: int) -> None:
        """To a given place, sometimes larger or smaller, sometimes leaving an area behind."""
        model, mm = process.model, process.mm
        keep, change = choice % 3 == 0, (0, 0, 1, -1)[choice // 3 % 4]
        new_count = len(pages) if keep else max(len(pages) + change, 1)
        to = self.target(choice // 12, new_count)
        target, area = range(to, to + new_count), mm.find_vma(pages.start * PAGE)
        error = 0
        if area is None:
            error = errno.EFAULT
        elif pages.start < target.stop and target.start < pages.stop:
            error = errno.EINVAL
        elif pages.stop * PAGE > area.end:
            error = errno.EFAULT
        stay: range = range(0)
        if area is not None and not error:
            low, high = area.start // PAGE, area.end // PAGE
            stay = range(low, min(high, to)) if to >= pages.stop else range(max(low, target.stop), high)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep else 0)
        sizes = len(pages) * PAGE, new_count * PAGE
        self.same(error, mm.mremap, pages.start * PAGE, *sizes, flags, to * PAGE)
        if not error:
            model.munmap(target)
            kept = pages[:new_count]
            if pages[new_count:]:
                model.munmap(pages[new_count:])
            model.move(kept, to, new_count, keep=keep, unlock=stay if keep else ())

    def resize(self, process: Process, pages: range, choice: int) -> None:
        """mremap without a place: shrinks, grows where it is, or moves, if it may."""
        model, mm, may_move = process.model, process.mm, bool(choice % 2)
        new_count = max(len(pages) + choice // 2 % 7 - 3, 1)
        if len(model.pages) + new_count > self.most_pages:
            return
        area = mm.find_vma(pages.start * PAGE)
        grows = new_count > len(pages)
        more = range(pages.stop, pages.start + new_count)
        error, moves = 0, False
        if area is None or (grows and pages.stop * PAGE > area.end):
            error = errno.EFAULT
        elif grows:
            moves = pages.stop * PAGE != area.end or bool(model.mapped(more))
            error = errno.ENOMEM if moves and not may_move else 0
        sizes, flags = (len(pages) * PAGE, new_count * PAGE), MREMAP_MAYMOVE * may_move
        place = self.same(error, mm.mremap, pages.start * PAGE, *sizes, flags)
        if error:
            return
        if not grows:
            assert place == pages.start * PAGE
            if pages[new_count:]:
                model.munmap(pages[new_count:])
            return
        assert (place != pages.start * PAGE) == moves
        assert not moves or not model.mapped(range(place // PAGE, place // PAGE + new_count))
        model.move(pages, place // PAGE, new_count, keep=False)

    def map_again(self, process: Process, pages: range, choice: int) -> None:
        """mremap with an old length of 0: shared memory appears a second time."""
        model, found = process.model, process.model.at(pages.start)
        if len(model.pages) + len(pages) > self.most_pages:
            return
        error = errno.EFAULT if found is None else 0 if found.shared else errno.EINVAL
        place = self.same(error, process.mm.mremap, pages.start * PAGE, 0, len(pages) * PAGE, MREMAP_MAYMOVE)
        if found is not None and not error:
            like = Page(found.prot, found.file, found.pgoff, True, locked=found.locked, dontfork=found.dontfork)
            assert model.mmap(place // PAGE, len(pages), like, noreplace=True) == 0

    # ---- advice

    def dontneed(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_DONTNEED, process.model.dontneed(pages))

    def free(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_FREE, process.model.free(pages))

    def cold(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_COLD, process.model.cold(pages))

    def pageout(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_PAGEOUT, process.model.cold(pages))
        self._file_entries_go()

    def willneed(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_WILLNEED, process.model.flag(pages))

    def mergeable(self, process: Process, pages: range, choice: int) -> None:
        kind = advice.MADV_MERGEABLE if choice % 3 else advice.MADV_UNMERGEABLE
        self._advise(process, pages, kind, process.model.flag(pages))

    def dontfork(self, process: Process, pages: range, choice: int) -> None:
        on = choice % 2 == 0
        kind = advice.MADV_DONTFORK if on else advice.MADV_DOFORK
        self._advise(process, pages, kind, process.model.dontfork(pages, on))

    def guard(self, process: Process, pages: range, choice: int) -> None:
        on = choice % 2 == 0
        kind = advice.MADV_GUARD_INSTALL if on else advice.MADV_GUARD_REMOVE
        self._advise(process, pages, kind, process.model.guard(pages, on))

    def populate(self, process: Process, pages: range, choice: int) -> None:
        write = choice % 3 > 0
        kind = advice.MADV_POPULATE_WRITE if write else advice.MADV_POPULATE_READ
        self._advise(process, pages, kind, process.model.populate(pages, WRITE if write else READ))

    def remove(self, process: Process, pages: range, choice: int) -> None:
        self._advise(process, pages, advice.MADV_REMOVE, process.model.remove(pages, self.everybody()))
        self._file_entries_go()

    def _advise(self, process: Process, pages: range, kind: int, error: int) -> None:
        self.same(error, process.mm.madvise, pages.start * PAGE, len(pages) * PAGE, kind)

    def _file_entries_go(self) -> None:
        """Entries of file pages may be gone, and with them what they knew of writes."""
        for page in self.everybody():
            page.soft_dirty &= page.own is not None

    def huge(self, process: Process, pages: range, choice: int) -> None:
        kind = advice.MADV_HUGEPAGE if choice % 4 else advice.MADV_NOHUGEPAGE
        self._advise(process, pages, kind, process.model.flag(pages))

    def collapse(self, process: Process, pages: range, choice: int) -> None:
        """Whether there can be huge pages the model does not know; nobody may see whether there are."""
        if choice % 3 == 0:
            process.mm.khugepaged_scan()
        else:
            with allowed(errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY):
                process.mm.madvise(pages.start * PAGE, len(pages) * PAGE, advice.MADV_COLLAPSE)
        self._file_entries_go()

    # ---- userfaultfd: a monitor that gives everybody what would be there without it

    def monitor(self, process: Process, pages: range, choice: int) -> None:
        """Something is registered or let go; or the monitor closes."""
        if choice % 4:
            self._register(process, pages, (MISSING, WP, MISSING | WP, MINOR)[choice // 4 % 4])
        elif process.uffd is not None and choice % 3:
            with allowed(errno.EINVAL, errno.ENOMEM):
                process.uffd.unregister(pages.start * PAGE, len(pages) * PAGE)
        elif process.uffd is not None:
            process.uffd.close()
            process.uffd = None

    def _register(self, process: Process, pages: range, mode: int) -> Userfaultfd:
        if process.uffd is None:
            features = UFFD_FEATURE_WP_UNPOPULATED if mode == WP and len(pages) % 2 else 0
            process.uffd = process.mm.userfaultfd(resolve, features)
        with allowed(errno.EINVAL, errno.ENOMEM, errno.EBUSY, errno.EPERM):
            process.uffd.register(pages.start * PAGE, len(pages) * PAGE, mode)
        return process.uffd

    def write_protect(self, process: Process, pages: range, choice: int) -> None:
        uffd = self._register(process, pages, WP)
        with allowed(errno.ENOENT):
            uffd.writeprotect(pages.start * PAGE, len(pages) * PAGE, int(choice % 4 > 0))

    def uffd_move(self, process: Process, pages: range, choice: int) -> None:
        """UFFDIO_MOVE of one page, to a page that is empty because it was dropped."""
        model, target = process.model, self.target(choice, 1)
        source, place, there = model.at(pages.start), model.at(target), range(target, target + 1)
        if source is None or place is None or source is place or place.locked or place.guard:
            return
        uffd = self._register(process, there, MISSING)
        self._advise(process, there, advice.MADV_DONTNEED, model.dontneed(there))
        done = 0
        with allowed(errno.EINVAL, errno.EBUSY, errno.ENOENT, errno.EEXIST, errno.EFAULT):  # the last: a marker
            done = uffd.move(target * PAGE, pages.start * PAGE, PAGE, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
        if done:
            assert source.file is None
            assert place.file is None
            place.own, place.maybe_zero = source.own, source.maybe_zero
            source.drop()

    def mlock(self, process: Process, pages: range, choice: int) -> None:
        on = choice % 3 > 0
        call = process.mm.mlock if on else process.mm.munlock
        self.same(process.model.mlock(pages, on), call, pages.start * PAGE + 7, len(pages) * PAGE - 9)

    def msync(self, process: Process, pages: range, choice: int) -> None:
        flags = (MS_SYNC, MS_SYNC, MS_ASYNC, MS_SYNC | MS_INVALIDATE)[choice % 4]
        error = process.model.msync(pages, invalidate=bool(flags & MS_INVALIDATE))
        self.same(error, process.mm.msync, pages.start * PAGE, len(pages) * PAGE, flags)
        for page in process.model.mapped(pages) if not error and flags & MS_SYNC else ():
            if page.file is self.files[1].model and page.shared:
                expected = page.file.read(page.pgoff * PAGE, PAGE)
                with open(self.files[1].path, "rb") as disk:
                    disk.seek(page.pgoff * PAGE)
                    assert disk.read(PAGE).ljust(len(expected), b"\0") == expected, "msync has not written"

    def bad_arguments(self, process: Process, pages: range, choice: int) -> None:
        mm, addr, size = process.mm, pages.start * PAGE, len(pages) * PAGE
        call, *arguments = (
            (mm.munmap, addr + 1, size),
            (mm.munmap, addr, 0),
            (mm.mprotect, addr + 8, size, 3),
            (mm.mprotect, addr, size, 64),
            (mm.madvise, addr + 2048, size, advice.MADV_DONTNEED),
            (mm.madvise, addr, size, 77),
            (mm.mremap, addr + 4, size, size, MREMAP_MAYMOVE),
            (mm.mremap, addr, size, 0, 0),
            (mm.mremap, addr, size, size, MREMAP_FIXED, addr + 100 * PAGE),
            (mm.msync, addr, size, MS_SYNC | MS_ASYNC),
            (mm.clear_refs, 9),
        )[choice % 11]
        self.same(errno.EINVAL, call, *arguments)

    # ---- accesses

    def load(self, process: Process, pages: range, choice: int) -> None:
        slot, how = choice % 3, choice // 3 % 2
        for page in pages:
            hva, found = page * PAGE + OFFSETS[slot], process.model.at(page)
            error = process.model.access(page, READ)
            got = self.same(error, process.thread.load if how else process.mm.read, hva, 8)
            if found is not None and not error:
                self._compare(found, slot, got)

    def _compare(self, page: Page, slot: int, got: bytes) -> None:
        word = int.from_bytes(got, "little")
        assert word == page.value[slot] or (page.maybe_zero and not word), f"reads {word}, not {page.value[slot]}"

    def _word(self, choice: int) -> int:
        """Often one of few, so that there is something to merge."""
        self.written += 1
        return choice % 4 if choice // 4 % 3 else self.written

    def store(self, process: Process, pages: range, choice: int) -> None:
        slot, how, word = choice % 3, choice // 3 % 4, self._word(choice // 12)
        for page in pages:
            found = process.model.at(page)
            if found is not None and not found.has_room(slot):
                continue
            error = process.model.access(page, WRITE) if how < 3 else process.model.forced(page)
            mm = process.mm
            call = (process.thread.store, mm.write, mm.process_vm_writev, mm.access_remote_vm)[how]
            if found is not None and not error:
                self.settle(process, page)
            self.same(error, call, page * PAGE + OFFSETS[slot], word.to_bytes(8, "little"))
            if found is not None and not error:
                found.write(slot, word)
            self.check_contents(process)

    def store_across(self, process: Process, pages: range, choice: int) -> None:
        """Two words, on both sides of a page boundary: the kernel stores both or none, a thread what it can."""
        first, second = process.model.at(pages.start), process.model.at(pages.start + 1)
        if any(page is not None and not page.has_room(slot) for page, slot in ((first, 2), (second, 0))):
            return
        word, kernel = self._word(choice // 2), bool(choice % 2)
        errors = [process.model.access(pages.start + at, WRITE) for at in (0, 1)]
        for at in (0, 1):
            if not errors[0] and not errors[at]:
                self.settle(process, pages.start + at)
        call = process.mm.write if kernel else process.thread.store
        self.same(max(errors), call, pages.start * PAGE + OFFSETS[2], word.to_bytes(8, "little") * 2)
        stores = [(page, slot) for page, slot in ((first, 2), (second, 0)) if page is not None]
        for page, _ in stores[: 2 if not max(errors) else 1] if kernel and not errors[0] else ():
            page.fault_in_for_write()  # all pages are there before the first byte is
        for (page, slot), error in zip(stores, errors, strict=False):
            if errors[0] or error or (kernel and max(errors)):
                break
            page.write(slot, word)

    def guest_load(self, process: Process, pages: range, choice: int) -> None:
        for gfn in self._gfns(pages, choice):
            slot = choice % 3
            expected, page = process.model.guest(gfn, READ)
            how, pfn = self._guest(process, gfn, GUEST_READ)
            assert how == expected
            if how == "ok":
                self._compare(process.model.pages[page], slot, self.host.read(pfn, OFFSETS[slot], 8))

    def guest_store(self, process: Process, pages: range, choice: int) -> None:
        slot, word = choice % 3, self._word(choice // 3)
        for gfn in self._gfns(pages, choice):
            expected, page = process.model.guest(gfn, WRITE)
            found = process.model.at(page)
            if found is not None and not found.has_room(slot):
                continue
            if found is not None and expected == "ok":
                self.settle(process, page)
            how, pfn = self._guest(process, gfn, GUEST_WRITE)
            assert how == expected
            if found is not None and how == "ok":
                self.host.write(pfn, OFFSETS[slot], word.to_bytes(8, "little"))
                found.write(slot, word)
            self.check_contents(process)

    def _gfns(self, pages: range, choice: int) -> list[int]:
        for base, count, gfn in ((self.base, self.pages, 0), (HEAP, HEAP_PAGES, self.heap_gfn)):
            if base <= pages.start < base + count:
                alias = self.alias_gfn - count // 2 if base == self.base and choice % 4 == 0 else gfn
                return [page - base + alias for page in pages if page < base + count]
        return []

    def _guest(self, process: Process, gfn: int, access: int) -> tuple[str, int]:
        """How an access ends, and the frame that it reaches: by way of the TLB, as the walker does."""
        kvm, tlb = process.kvm, process.vcpu.tlb
        for _ in range(10):
            found = tlb.get(gfn) or kvm.translate(gfn)
            if found is not None and (found[1] or access == GUEST_READ):
                tlb[gfn] = found
                return "ok", found[0]
            tlb.pop(gfn, None)
            result = kvm.fault(gfn, access)
            if result != RETRY_WALK:
                return {MMIO: "mmio", FAULT: "fault"}[result], -1
        raise AssertionError(f"gfn {gfn:#x} faults for ever")

    def slot(self, process: Process, pages: range, choice: int) -> None:
        """A second memslot over half of the pages: made, deleted, moved, logged."""
        old = process.model.slots.get(2)
        if old is None:
            new = Slot(self.alias_gfn, self.pages // 2, self.base + self.pages // 2, readonly=choice % 2 == 0)
            process.set_slot(2, new, 0 if new.readonly or choice % 3 else MEM_LOG_DIRTY_PAGES)
        elif choice % 2:
            process.kvm.delete_memslot(2)
            del process.model.slots[2]
        else:
            flags = process.kvm.memslots.get(2)
            assert flags is not None
            gfn = 3 * self.alias_gfn - old.gfn
            process.kvm.set_memslot(2, gfn, old.pages, old.page * PAGE, flags.flags)
            process.model.slots[2] = Slot(gfn, old.pages, old.page, old.readonly)

    def reopen_vm(self, process: Process, pages: range, choice: int) -> None:
        process.kvm.destroy()
        process.open_vm(self)

    def pin(self, process: Process, pages: range, choice: int) -> None:
        """Somebody takes a reference to a page, or drops one."""
        if self.pins and (choice % 2 or len(self.pins) > 3):
            self._unpin(sorted(self.pins)[choice % len(self.pins)])
            return
        write = bool(choice // 2 % 2)
        found = process.model.at(pages.start)
        error = process.model.access(pages.start, WRITE if write else READ)
        page = self.same(error, process.mm.get_user_pages, pages.start * PAGE, write=write)
        if found is not None and not error:
            if write and not found.maybe_zero:
                found.fault_in_for_write()
            if not self.host.flags(self.host.compound_head(page.pfn)) & PG_RESERVED:  # nobody counts the zero pages
                self.host.get(page.pfn)
                self.pins[page.pfn] += 1

    def _unpin(self, pfn: int) -> None:
        self.pins -= Counter([pfn])
        self.processes[0].mm.put_frame(pfn)
        swap = self.processes[0].mm.rmap.swap
        if swap is not None:
            swap.forget([pfn])

    # ---- processes

    def fork(self, process: Process, pages: range, choice: int) -> None:
        if len(self.processes) < self.most_processes:
            self.processes.append(Process(self, process.mm.fork(), process.model.fork()))

    def exit(self, process: Process, pages: range, choice: int) -> None:
        if len(self.processes) > 1:
            process.mm.exit()
            self.processes.remove(process)
            assert not process.kvm.sptes.present
            assert self._guest(process, 0, GUEST_READ)[0] == "fault"
            self.same(errno.ESRCH, process.mm.mmap, PAGE, 3)

    # ---- reclaim, migration, KSM, soft-dirty bits

    def reclaim(self, process: Process, pages: range, choice: int) -> None:
        if choice % 11 == 0:
            process.mm.memcg_enter()
        process.mm.memcg_reclaim(1 + choice % 3)
        self._file_entries_go()

    def swap(self, process: Process, pages: range, choice: int) -> None:
        if self.swaps and choice % 2:
            process.mm.swapoff()
            self.swaps -= 1
        elif self.swaps < 2:
            process.mm.swapon((3, 12, 64)[choice // 2 % 3])
            self.swaps += 1
        else:
            self.same(errno.EINVAL, process.mm.swapon, 0)

    def migrate(self, process: Process, pages: range, choice: int) -> None:
        for page in pages:
            entry = process.mm.pgd.pte(page)
            if not entry & MAPPED or entry & SPECIAL:
                continue
            pfn = pte_pfn(entry)
            held = self._pinned(pfn)
            self.same(errno.EAGAIN if held else 0, migrate_page, self.host, self.trace, pfn)
        self._file_entries_go()

    def _pinned(self, pfn: int) -> bool:
        """Somebody holds it, or a page that goes with it."""
        head = self.host.compound_head(pfn)
        return any(self.host.compound_head(pin) == head for pin in self.pins)

    def compact(self, process: Process, pages: range, choice: int) -> None:
        compact_memory(self.host, self.trace)
        self._file_entries_go()

    def move_pages(self, process: Process, pages: range, choice: int) -> None:
        status = process.mm.move_pages(pages.start * PAGE, len(pages) * PAGE, 0)
        for page, got in zip(pages, status, strict=True):
            mapped = page in process.model.pages
            assert got in ((0, -errno.ENOENT, -errno.EFAULT) if mapped else (-errno.EFAULT,))
        error = errno.EFAULT if process.model.hole(pages) else 0
        self.same(error, process.mm.mbind, pages.start * PAGE, len(pages) * PAGE, 0)

    def merge(self, process: Process, pages: range, choice: int) -> None:
        process.mm.ksm_scan(None if choice % 3 else choice % 5)

    def clear_refs(self, process: Process, pages: range, choice: int) -> None:
        mode = (1, 2, 3, 4, 4, 4)[choice % 6]
        process.mm.clear_refs(mode)
        for page in process.model.pages.values() if mode == 4 else ():
            page.soft_dirty = False

    # ---- files

    def _file(self, choice: int) -> File:
        return self.files[choice % 2]

    def pwrite(self, process: Process, pages: range, choice: int) -> None:
        file, pgoff, slot = self._file(choice), choice // 2 % self.file_pages, choice // 16 % 3
        word = self._word(choice // 48)
        file.real.pwrite(pgoff * PAGE + OFFSETS[slot], word.to_bytes(8, "little"))
        file.model.size = max(file.model.size, pgoff * PAGE + OFFSETS[slot] + 8)
        file.model.put(pgoff, slot, word)

    def pread(self, process: Process, pages: range, choice: int) -> None:
        file, offset, size = self.files[choice % 3], choice // 3 % 9 * 2048, choice % 7 * 2000
        assert file.real.pread(offset, size) == file.model.read(offset, size)

    def truncate(self, process: Process, pages: range, choice: int) -> None:
        file, size = self._file(choice), choice // 2 % (2 * self.file_pages + 1) * 2048
        file.real.truncate(size)
        truncate(file.model, size, self.everybody())
        self._file_entries_go()

    def punch(self, process: Process, pages: range, choice: int) -> None:
        file, pgoff, count = self._file(choice), choice // 2 % self.file_pages, len(pages)
        file.real.punch_hole(pgoff, count)
        file.model.punch(pgoff, count)
        self._file_entries_go()

    def fsync(self, process: Process, pages: range, choice: int) -> None:
        file = self.files[1]
        assert isinstance(file.real, HostFile)
        if choice % 3 == 0:
            file.real.fadvise_dontneed()
        else:
            file.real.fsync()
        with open(file.path, "rb") as disk:
            assert disk.read() == file.model.read(0, file.model.size), "fsync has not written"
        self._file_entries_go()

    def direct_write(self, process: Process, pages: range, choice: int) -> None:
        file, pgoff = self.files[1], choice % self.file_pages
        assert isinstance(file.real, HostFile)
        words: Words = (self._word(choice), choice % 3, 0)
        data = b"".join(word.to_bytes(8, "little").ljust(2040 if at else 2048, b"\0") for at, word in enumerate(words))
        file.real.direct_write(pgoff * PAGE, data.ljust(PAGE, b"\0")[:PAGE])
        file.model.size = max(file.model.size, (pgoff + 1) * PAGE)
        file.model.pages[pgoff] = words
        self._file_entries_go()

    # ---- what holds after every operation

    def settle(self, process: Process, page: int) -> None:
        """Looks what has become of a page that was given away."""
        found, entry = process.model.pages[page], process.mm.pgd.pte(page)
        if found.maybe_zero:
            if not entry & MAPPED:
                found.own = found.own if entry else None
            elif self._words(pte_pfn(entry)) != found.own:
                assert self._words(pte_pfn(entry)) == EMPTY, "neither what it was nor zeros"
                found.own = EMPTY
            found.maybe_zero = False

    def _words(self, pfn: int) -> Words:
        read = self.host.read
        words = [int.from_bytes(read(pfn, offset, 8), "little") for offset in OFFSETS]
        return words[0], words[1], words[2]

    def check(self) -> None:
        verify(self.host, held=self.pins)
        for process in self.processes:
            self.check_contents(process)
            self._check_translations(process)
            self._check_soft_dirty(process)

    def _entries(self, mm: Mm) -> dict[int, int]:
        """Page by page, also what one entry maps."""
        entries = {}
        for page, entry in mm.pgd.entries(0, 1 << 36):
            for near in range(page, page + (HUGE_PAGES if entry & HUGE else 1)):
                entries[near] = mm.pgd.pte(near)
        return entries

    def check_contents(self, process: Process) -> None:
        pages, entries = process.model.pages, self._entries(process.mm)
        for page, entry in entries.items():
            mapped = pages[page]
            if entry == GUARD:
                assert mapped.guard
            elif entry & MAPPED:
                words = self._words(pte_pfn(entry))
                if words != mapped.value and mapped.maybe_zero and words == EMPTY:
                    mapped.own, mapped.maybe_zero = EMPTY, False
                assert words == mapped.value, f"page {page:#x} of {process.mm.name}: {words}, not {mapped.value}"
                assert not mapped.guard
                assert not entry & PTE_WRITE or mapped.prot & 2
        for page, mapped in pages.items():
            if mapped.own is not None and page not in entries:
                assert mapped.maybe_zero, f"page {page:#x} of {process.mm.name} is lost"
                mapped.drop()

    def _check_translations(self, process: Process) -> None:
        pgd, slots = process.mm.pgd, process.model.slots.values()
        for gfn, spte in process.kvm.sptes.entries(0, 1 << 20):
            for near in range(gfn, gfn + (HUGE_PAGES if spte & SPTE_HUGE else 1)) if spte & SPTE_PRESENT else ():
                slot = next(slot for slot in slots if slot.gfn <= near < slot.gfn + slot.pages)
                now = pgd.pte(slot.page + near - slot.gfn)
                assert now & PRESENT
                assert pte_pfn(now) == spte_pfn(spte) + near - gfn
                assert not spte & SPTE_WRITE or (now & PTE_WRITE and not slot.readonly)
        for gfn, (pfn, writable) in process.vcpu.tlb.items():
            spte = process.kvm.sptes.pte(gfn)
            assert spte & SPTE_PRESENT
            assert spte_pfn(spte) == pfn
            assert spte & SPTE_WRITE or not writable
        for page, entry in process.thread.tlb.items():
            now = pgd.pte(page)
            assert now & PRESENT
            assert pte_pfn(now) == pte_pfn(entry)
            assert now & PTE_WRITE or not entry & PTE_WRITE

    def _check_soft_dirty(self, process: Process) -> None:
        dirty = [page for page, mapped in process.model.pages.items() if mapped.soft_dirty]
        if dirty:
            seen = process.mm.soft_dirty(min(dirty) * PAGE, (max(dirty) + 1) * PAGE)
            for page in dirty:
                assert any(lo <= page * PAGE < hi for lo, hi in seen), f"page {page:#x} is not soft-dirty"

    def finish(self) -> None:
        """Reads everything, and lets everything go: nothing may be left."""
        for pfn in list(self.pins.elements()):
            self._unpin(pfn)
        for process in self.processes:
            for page, mapped in process.model.pages.items():
                area = process.mm.find_vma(page * PAGE)
                assert area is not None
                assert area.prot == mapped.prot
                assert bool(area.flags & VM_LOCKED) == mapped.locked
                if mapped.allows(READ):
                    for slot in range(len(OFFSETS)):
                        self._compare(mapped, slot, process.mm.read(page * PAGE + OFFSETS[slot], 8))
        for process in self.processes:
            process.mm.exit()
        for file in self.files:
            if file.path:
                with open(file.path, "rb") as disk:
                    assert isinstance(file.real, HostFile)
                    file.real.fsync()
                    assert disk.read() == file.model.read(0, file.model.size)
            file.real.close()
        assert self.host.free_frames == self.host.nr_frames - 1, "frames are lost"
        verify(self.host)
        self.host.close()
