"""userfaultfd on huge pages of the pool: MISSING and MINOR, a huge page at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from xipvm.conform.guest import Vcpu
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE as H
from xipvm.mmu.hugetlb import WP_MARKER
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import ANON, HUGE, WRITE, pte_pfn
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.uffd_message import (
    UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    UffdMsg,
)
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    Userfaultfd,
)
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
from xipvm.trace.funnel import Trace

RW = PROT_READ | PROT_WRITE
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_FIXED
PLACE = 1 << 32


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(7 * H)
    host.reserve_huge_pages(4)
    yield host
    verify(host)


@pytest.fixture
def file(host: HostMemory, trace: Trace) -> HugetlbFile:
    return HugetlbFile(host, trace, "huge", 2 * H)


class Monitor:
    """Answers each message by ``answer`` and remembers it."""

    def __init__(self, answer: Callable[[Userfaultfd, int], object]) -> None:
        self.answer = answer
        self.told: list[tuple[int, int]] = []

    def __call__(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        self.told.append((message.address - PLACE, message.flags))
        self.answer(uffd, message.address)


def page(value: bytes) -> bytes:
    return value.ljust(H, b"\0")


def fails(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(MmError) as caught:
        call()
    assert caught.value.errno == number, caught.value


def test_a_missing_page_is_copied_as_a_whole(host: HostMemory, mm: Mm, steps: Callable[[], list[str]]) -> None:
    mm.mmap(2 * H, RW, PRIVATE, addr=PLACE)
    monitor = Monitor(lambda uffd, address: uffd.copy(address, page(b"content")))
    mm.userfaultfd(monitor).register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_MISSING)
    steps()
    assert mm.read(PLACE + 4096, 2) == bytes(2)
    assert steps() == ["alloc", "set"]
    mm.write(PLACE + H + 5, b"!")
    assert monitor.told == [(0, 0), (H, UFFD_PAGEFAULT_FLAG_WRITE)]
    assert mm.read(PLACE, 7) == b"content"
    assert mm.read(PLACE + H, 7) == b"conte!t"
    assert mm.pgd.get(PLACE >> 12) & (HUGE | ANON | WRITE) == HUGE | ANON | WRITE
    assert (host.free_huge_pages, host.reserved_huge_pages) == (2, 0)
    mm.madvise(PLACE, H, MADV_DONTNEED)
    assert mm.read(PLACE, 7) == b"content"
    assert len(monitor.told) == 3


def test_a_guest_is_served(host: HostMemory, trace: Trace, mm: Mm) -> None:
    mm.mmap(2 * H, RW, PRIVATE, addr=PLACE)
    monitor = Monitor(lambda uffd, address: uffd.copy(address, page(b"\x07")))
    mm.userfaultfd(monitor).register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_MISSING)
    kvm = Kvm(mm, trace, host)
    kvm.set_memslot(0, 0, 1024, PLACE, 0)
    vcpu = Vcpu(kvm, host)
    kvm.vcpus.append(vcpu)
    assert vcpu.load(512).value == 7
    assert vcpu.load(0x3FF).value == 0
    assert monitor.told == [(H, 0)]
    kvm.destroy()


def test_shared_pages_go_into_the_file(file: HugetlbFile, mm: Mm) -> None:
    mm.mmap(2 * H, RW, MAP_SHARED | MAP_FIXED, addr=PLACE, file=file)
    uffd = mm.userfaultfd(Monitor(lambda uffd, address: uffd.copy(address, page(b"shared"))))
    uffd.register(PLACE, H, UFFDIO_REGISTER_MODE_MISSING)
    assert mm.read(PLACE, 6) == b"shared"
    assert file.pread(0, 6) == b"shared"
    assert mm.pgd.get(PLACE >> 12) & WRITE
    fails(errno.EEXIST, lambda: uffd.copy(PLACE, page(b"")))
    other = mm.mmap(H, RW, MAP_SHARED, file=file)
    assert mm.read(other, 6) == b"shared"
    file.close()


def test_a_minor_fault_maps_what_the_file_has(file: HugetlbFile, mm: Mm) -> None:
    file.fallocate(0, H)
    mm.mmap(2 * H, RW, MAP_SHARED | MAP_FIXED, addr=PLACE, file=file)
    monitor = Monitor(lambda uffd, address: uffd.continue_(address & -H, H))
    uffd = mm.userfaultfd(monitor, UFFD_FEATURE_EXACT_ADDRESS)
    uffd.register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_MINOR)
    mm.write(PLACE + 4097, b"x")
    assert monitor.told == [(4097, UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_MINOR)]
    assert file.pread(4097, 1) == b"x"
    fails(errno.EEXIST, lambda: uffd.continue_(PLACE, H))
    fails(errno.EFAULT, lambda: uffd.continue_(PLACE + H, H))
    mm.write(PLACE + H, b"y")  # the file has no page: nobody is told
    assert len(monitor.told) == 1
    file.close()


def test_behind_the_end_of_the_file_nobody_is_told(file: HugetlbFile, mm: Mm) -> None:
    mm.mmap(2 * H, PROT_READ, MAP_SHARED | MAP_FIXED, addr=PLACE, file=file)
    monitor = Monitor(lambda uffd, address: uffd.copy(address, page(b"x")))
    uffd = mm.userfaultfd(monitor)
    uffd.register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_MISSING)
    file.truncate(H)
    fails(errno.EFAULT, lambda: mm.read(PLACE + H, 1))
    fails(errno.EFAULT, lambda: uffd.copy(PLACE + H, page(b"x")))
    assert monitor.told == []
    assert mm.read(PLACE, 1) == b"x"
    assert not mm.pgd.get(PLACE >> 12) & WRITE
    file.close()


def test_without_a_page_the_copy_fails(host: HostMemory, mm: Mm) -> None:
    mm.mmap(4 * H, RW, PRIVATE | MAP_NORESERVE, addr=PLACE)
    uffd = mm.userfaultfd(None)
    uffd.register(PLACE, 4 * H, UFFDIO_REGISTER_MODE_MISSING)
    mm.mmap(3 * H, RW, PRIVATE, addr=PLACE + 8 * H)
    assert uffd.copy(PLACE, page(b"a") + page(b"b")) == H  # one page is not promised to others
    fails(errno.ENOMEM, lambda: uffd.copy(PLACE + H, page(b"b")))
    assert (host.free_huge_pages, host.reserved_huge_pages) == (3, 3)


def lift(uffd: Userfaultfd, address: int) -> None:
    uffd.writeprotect(address & -H, H, 0)


def test_a_protected_page_is_told_of_and_written_in_place(
    host: HostMemory, mm: Mm, steps: Callable[[], list[str]]
) -> None:
    mm.mmap(2 * H, RW, PRIVATE, addr=PLACE)
    mm.write(PLACE, b"a")
    monitor = Monitor(lift)
    uffd = mm.userfaultfd(monitor)
    uffd.register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_WP)
    steps()
    uffd.writeprotect(PLACE, 2 * H)
    assert steps() == ["S PROTECTION_VMA 0-1024", "protect", "tlb", "E"]
    verify(host)
    assert mm.read(PLACE + H, 1) == b"\0"  # what was not there comes protected
    assert monitor.told == []
    mm.write(PLACE + 8192, b"b")
    mm.write(PLACE + H, b"c")
    mm.write(PLACE + 1, b"d")
    flags = UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP
    assert monitor.told == [(0, flags), (H, flags)]
    assert mm.read(PLACE, 2) == b"ad"
    fails(errno.EINVAL, lambda: uffd.writeprotect(PLACE, 4096))
    uffd.writeprotect(PLACE, H)
    uffd.unregister(PLACE, 2 * H)
    mm.write(PLACE, b"x")
    assert len(monitor.told) == 2


def test_protection_outlives_the_page(host: HostMemory, trace: Trace, file: HugetlbFile, mm: Mm) -> None:
    mm.mmap(2 * H, RW, MAP_SHARED | MAP_FIXED, addr=PLACE, file=file)
    mm.write(PLACE, b"1")
    mm.write(PLACE + H, b"2")
    monitor = Monitor(lift)
    uffd = mm.userfaultfd(monitor)
    uffd.register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_WP)
    uffd.writeprotect(PLACE, 2 * H)
    mm.madvise(PLACE, H, MADV_DONTNEED)
    migrate_page(host, trace, pte_pfn(mm.pgd.get(PLACE + H >> 12)))
    assert mm.pgd.get(PLACE >> 12) == mm.pgd.get(PLACE + H >> 12) == WP_MARKER
    verify(host)
    mm.mprotect(PLACE, 2 * H, PROT_READ)
    mm.mprotect(PLACE, 2 * H, RW)
    assert mm.read(PLACE, 1) == b"1"
    mm.write(PLACE, b"3")
    mm.write(PLACE + H, b"4")
    assert [offset for offset, _ in monitor.told] == [0, H]
    uffd.writeprotect(PLACE, 2 * H)
    child = mm.fork("child")
    child.write(PLACE, b"c")  # it has no monitor
    file.truncate(0)
    assert not mm.pgd.present
    file.truncate(H)
    mm.write(PLACE, b"5")
    assert len(monitor.told) == 2
    child.exit()
    file.close()


def test_a_protected_page_of_a_parent_is_copied_behind_the_monitor_s_word(mm: Mm) -> None:
    mm.mmap(H, RW, PRIVATE, addr=PLACE)
    mm.write(PLACE, b"a")
    monitor = Monitor(lift)
    uffd = mm.userfaultfd(monitor)
    uffd.register(PLACE, H, UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING)
    uffd.writeprotect(PLACE, H)
    child = mm.fork("child")
    child.write(PLACE, b"c")
    mm.write(PLACE, b"p")
    assert len(monitor.told) == 1
    assert (mm.read(PLACE, 1), child.read(PLACE, 1)) == (b"p", b"c")
    child.exit()
    mm.munmap(PLACE, H)


def test_a_copy_can_come_protected(mm: Mm) -> None:
    mm.mmap(H, RW, PRIVATE, addr=PLACE)
    monitor = Monitor(lift)
    uffd = mm.userfaultfd(monitor)
    uffd.register(PLACE, H, UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING)
    uffd.copy(PLACE, page(b"x"), UFFDIO_COPY_MODE_WP)
    mm.write(PLACE + 1, b"y")
    assert len(monitor.told) == 1
    assert mm.read(PLACE, 2) == b"xy"


def test_what_is_refused(mm: Mm) -> None:
    mm.mmap(2 * H, RW, PRIVATE, addr=PLACE)
    uffd = mm.userfaultfd(None)
    for call in (
        lambda: uffd.register(PLACE, 4096, UFFDIO_REGISTER_MODE_MISSING),
        lambda: uffd.register(PLACE + 4096, H, UFFDIO_REGISTER_MODE_MISSING),
        lambda: mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC).register(PLACE, H, UFFDIO_REGISTER_MODE_WP),
    ):
        fails(errno.EINVAL, call)
    assert len(mm.vmas) == 1
    assert mm.vmas[0].uffd is None
    uffd.register(PLACE, 2 * H, UFFDIO_REGISTER_MODE_MISSING)
    for call in (
        lambda: uffd.copy(PLACE, bytes(4096)),
        lambda: uffd.copy(PLACE + 4096, bytes(H)),
        lambda: uffd.zeropage(PLACE, H),
        lambda: uffd.poison(PLACE, H),
        lambda: uffd.move(PLACE, PLACE + H, H),
        lambda: uffd.unregister(PLACE, 4096),
    ):
        fails(errno.EINVAL, call)
    assert not mm.pgd.present
    uffd.unregister(PLACE, H)
    assert [area.uffd for area in mm.vmas] == [None, uffd]
    assert mm.read(PLACE, 1) == b"\0"
