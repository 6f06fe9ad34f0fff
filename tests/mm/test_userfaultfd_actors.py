"""Monitors that run beside those who fault, in many orders: nobody waits for ever, and no write is overlooked."""

from __future__ import annotations

import errno
from random import Random

import pytest

from xipvm.actors import wait
from xipvm.errors import DeadlockError, MmError
from xipvm.locks import checking
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_PAGEOUT
from xipvm.mmu.mm import Mm
from xipvm.mmu.pagemap import PAGE_IS_WRITTEN, PM_SCAN_CATEGORIES, PM_SCAN_WP_MATCHING
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_WRITE, spte_pfn
from xipvm.mmu.uffd_message import UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_WP, UffdMsg
from xipvm.mmu.uffd_reach import UFFD_FEATURE_EVENT_REMOVE
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
from xipvm.mmu.verify import verify
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

PAGE = 4096
PAGES = 6
RW = 3


class World:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.host = HostMemory(256 * PAGE, poison="frame")
        self.mm = Mm(self.host, Trace())
        self.mm.swapon(32)
        self.area = int(self.mm.mmap(PAGES * PAGE, RW))
        self.kvm = Kvm(self.mm, self.mm.trace, self.host)
        self.kvm.set_memslot(0, 0, PAGES, self.area)
        self.scheduler = Scheduler(lambda n, label: self.random.randrange(n))
        self.running = 0

    def spawn(self, name: str, work) -> None:  # type: ignore[no-untyped-def]
        self.running += 1

        def body() -> None:
            work()
            self.running -= 1

        self.scheduler.spawn(name, body)

    def guest(self, page: int, value: int | None) -> int:
        """A guest's access, without a TLB; what was loaded or stored."""
        wanted = SPTE_PRESENT | (0 if value is None else SPTE_WRITE)
        while self.kvm.sptes.get(page) & wanted != wanted:
            assert self.kvm.fault(page, 0 if value is None else 1) == 0, self.kvm.last_error
        pfn = spte_pfn(self.kvm.sptes.get(page))
        if value is not None:
            self.host.write(pfn, 0, bytes([value]))
        return self.host.read(pfn, 0, 1)[0]

    def end(self) -> None:
        verify(self.host)
        self.kvm.destroy()
        self.mm.exit()
        verify(self.host)
        self.host.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_monitor_beside_those_who_fault(seed: int) -> None:
    world = World(seed)
    mm, area = world.mm, world.area
    uffd = mm.userfaultfd(None, UFFD_FEATURE_EVENT_REMOVE)
    uffd.register(area, PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
    served: list[int] = []

    def monitor() -> None:
        faults: list[UffdMsg] = []
        while True:
            if not faults:
                wait("a message", lambda: bool(uffd.queue) or not world.running)
            while uffd.queue:  # events first: nothing can be filled while one has not been read
                faults.append(uffd.read())
            faults = [message for message in faults if message.event == UFFD_EVENT_PAGEFAULT]
            if not faults:
                if world.running:
                    continue
                return
            message = faults.pop(0)
            try:
                if message.flags & UFFD_PAGEFAULT_FLAG_WP:
                    uffd.writeprotect(message.address, PAGE, 0)
                else:
                    uffd.copy(message.address, bytes([7]) * PAGE, 2 * (len(served) & 1))
                    served.append(message.address)
            except MmError as error:
                if error.errno == errno.EAGAIN:
                    faults.insert(0, message)
                elif error.errno == errno.EEXIST:  # a fault of somebody else has been answered meanwhile
                    uffd.wake(message.address, PAGE)
                else:
                    raise

    def loads() -> None:
        thread = HostThread(mm, "loads")
        for page in range(PAGES):
            assert thread.load(area + page * PAGE, 1) in (b"\7", b"\1", b"\2")

    def stores() -> None:
        for page in reversed(range(PAGES)):
            mm.write(area + page * PAGE, b"\1")

    def vcpu() -> None:
        for page in (3, 1, 4, 1, 5):
            world.guest(page, 2)
            world.guest(page, None)

    def host() -> None:
        mm.madvise(area, 2 * PAGE, MADV_DONTNEED)
        uffd.writeprotect(area, PAGES * PAGE)
        mm.madvise(area, PAGES * PAGE, MADV_PAGEOUT)
        mm.fork().exit()

    with checking():
        world.scheduler.spawn("monitor", monitor)
        for work in (loads, stores, vcpu, host):
            world.spawn(work.__name__, work)
        world.scheduler.run()
    assert len(served) >= PAGES
    assert not uffd.waiters
    assert not uffd.queue
    world.end()


def test_nobody_who_could_answer() -> None:
    world = World(0)
    world.mm.userfaultfd().register(world.area, PAGE, UFFDIO_REGISTER_MODE_MISSING)
    world.scheduler.spawn("alone", lambda: world.mm.read(world.area, 1))
    with pytest.raises(DeadlockError) as caught:
        world.scheduler.run()
    assert f"{world.area:#x}" in str(caught.value)


@pytest.mark.parametrize("seed", range(60))
def test_no_write_is_overlooked(seed: int) -> None:
    """Whatever was written last to a page is reported by a scan that ended after the write had begun."""
    world = World(seed)
    mm, area = world.mm, world.area
    uffd = mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC)
    uffd.register(area, PAGES * PAGE, UFFDIO_REGISTER_MODE_WP)
    uffd.writeprotect(area, PAGES * PAGE)
    now = 0
    begun: dict[int, int] = {}
    reported: dict[int, int] = {}

    def clock() -> int:
        nonlocal now
        now += 1
        return now

    def scan() -> None:
        found = mm.pagemap_scan(
            area,
            area + PAGES * PAGE,
            flags=PM_SCAN_WP_MATCHING,
            category_mask=PAGE_IS_WRITTEN,
            return_mask=PM_SCAN_CATEGORIES,
        )
        at = clock()
        for lo, hi, _ in found.regions:
            reported.update({(hva - area) // PAGE: at for hva in range(lo, hi, PAGE)})

    def by_thread() -> None:
        thread = HostThread(mm)
        for page in (0, 3, 0, 5, 0, 3):
            begun[page] = clock()
            thread.store(area + page * PAGE, b"t")

    def by_guest() -> None:
        for page in (1, 3, 1, 4, 1, 3, 2):
            begun[page] = clock()
            world.guest(page, 9)

    def host() -> None:
        mm.madvise(area, PAGES * PAGE, MADV_PAGEOUT)
        mm.fork().exit()

    def scans() -> None:
        for _ in range(4):
            scan()

    with checking():
        for work in (by_thread, by_guest, host, scans):
            world.spawn(work.__name__, work)
        world.scheduler.run()
    scan()
    for page, at in begun.items():
        assert reported.get(page, 0) >= at, f"page {page}"
    world.end()
