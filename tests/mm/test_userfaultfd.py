"""userfaultfd: who may register what, what a monitor is told, and how a fault waits for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError, ProtocolUnsupported
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError, HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_PAGEOUT, MADV_POPULATE_WRITE, MADV_REMOVE
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import DIRTY, EXCLUSIVE, PRESENT, UFFD_WP, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.uffd_message import (
    UFFD_EVENT_FORK,
    UFFD_EVENT_PAGEFAULT,
    UFFD_EVENT_REMAP,
    UFFD_EVENT_REMOVE,
    UFFD_EVENT_UNMAP,
    UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_FEATURE_SIGBUS,
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WRITE,
    UffdMsg,
)
from xipvm.mmu.uffd_reach import (
    UFFD_FEATURE_EVENT_FORK,
    UFFD_FEATURE_EVENT_REMAP,
    UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_EVENT_UNMAP,
)
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import (
    UFFDIO_COPY_MODE_DONTWAKE,
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    Userfaultfd,
)
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.trace.funnel import Trace

PAGE = 4096
R, RW = 1, 3
MISSING, WP, MINOR = UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_MINOR
Steps = Callable[[], list[str]]


class Monitor:
    """Notes what it is told and copies a page that says where it belongs."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.told: list[UffdMsg] = []

    def __call__(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        self.told.append(message)
        if message.event == UFFD_EVENT_PAGEFAULT:
            hva = message.address & -PAGE
            if message.flags & UFFD_PAGEFAULT_FLAG_MINOR:
                uffd.continue_(hva, PAGE)
            else:
                uffd.copy(hva, bytes([(hva - self.base) // PAGE + 1]) * PAGE)

    @property
    def faults(self) -> list[tuple[int, int]]:
        """(page, flags)"""
        return [
            ((told.address - self.base) // PAGE, told.flags) for told in self.told if told.event == UFFD_EVENT_PAGEFAULT
        ]


@pytest.fixture
def area(mm: Mm) -> int:
    return mm.mmap(16 * PAGE, RW)


@pytest.fixture
def monitor(area: int) -> Monitor:
    return Monitor(area)


def errno_of(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(MmError) as caught:
        call(*arguments)
    return caught.value.errno


# ---- registration


def test_who_can_be_registered(mm: Mm, host: HostMemory, trace: Trace, area: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * PAGE))
    shmem = ShmemFile(host, trace, "shmem", 4 * PAGE)
    sealed = ShmemFile(host, trace, "sealed", 4 * PAGE, writable=False)
    file = HostFile(host, trace, str(disk))
    memory = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=shmem)
    private = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=shmem)
    fixed = mm.mmap(4 * PAGE, R, MAP_SHARED, file=sealed)
    on_disk = mm.mmap(4 * PAGE, RW, MAP_PRIVATE, file=file)
    uffd, tracker = mm.userfaultfd(), mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC)
    for hva in (memory, private):
        uffd.register(hva, 4 * PAGE, MISSING | MINOR | WP)
    assert errno_of(uffd.register, area, PAGE, MINOR) == errno.EINVAL
    assert errno_of(uffd.register, on_disk, PAGE, WP) == errno.EINVAL
    assert errno_of(uffd.register, on_disk, PAGE, MISSING) == errno.EINVAL
    assert errno_of(tracker.register, on_disk, PAGE, WP | MISSING) == errno.EINVAL
    tracker.register(on_disk, 4 * PAGE, WP)
    assert errno_of(uffd.register, fixed, PAGE, MISSING) == errno.EPERM
    assert errno_of(uffd.register, on_disk, PAGE, MISSING) == errno.EINVAL
    assert errno_of(tracker.register, memory, PAGE, WP) == errno.EBUSY
    assert errno_of(tracker.unregister, memory, PAGE) == errno.EINVAL
    for file_ in (shmem, sealed, file):
        file_.close()
    mm.exit()


@pytest.mark.parametrize(
    ("start", "length", "mode"),
    [
        (0, PAGE, 0),
        (0, PAGE, 8),
        (1, PAGE, MISSING),
        (0, PAGE + 1, MISSING),
        (0, 0, MISSING),
        (0, -PAGE, MISSING),
        (0, 1 << 47, MISSING),
        (64 * PAGE, PAGE, MISSING),
    ],
)
def test_bad_registration(mm: Mm, area: int, start: int, length: int, mode: int) -> None:
    uffd = mm.userfaultfd()
    before = [(vma.start, vma.end, vma.flags) for vma in mm.vmas]
    assert errno_of(uffd.register, area + start, length, mode) == errno.EINVAL
    assert [(vma.start, vma.end, vma.flags) for vma in mm.vmas] == before


def test_what_a_registration_does_to_areas(mm: Mm, area: int, steps: Steps) -> None:
    mm.write(area, b"x")
    steps()
    uffd = mm.userfaultfd()
    uffd.register(area + 4 * PAGE, 4 * PAGE, MISSING)
    uffd.register(area + 8 * PAGE, 4 * PAGE, MISSING)
    assert [(vma.start - area) // PAGE for vma in mm.vmas] == [0, 4, 12]
    other = mm.userfaultfd()
    other.register(area + 12 * PAGE, 4 * PAGE, MISSING)
    assert len(mm.vmas) == 3
    assert errno_of(other.register, area, 16 * PAGE, MISSING) == errno.EBUSY
    other.close()
    uffd.unregister(area, 16 * PAGE)
    assert len(mm.vmas) == 1
    assert steps() == []  # nobody is told of any of it


def test_registering_again(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 16 * PAGE, MISSING | WP)
    uffd.register(area, 4 * PAGE, WP)  # has it already
    assert len(mm.vmas) == 1
    mm.userfaultfd().close()
    uffd.copy(area, b"x" * PAGE, UFFDIO_COPY_MODE_WP)
    uffd.unregister(area + 8 * PAGE, 8 * PAGE)
    uffd.register(area + 8 * PAGE, 8 * PAGE, WP)
    uffd.register(area + 8 * PAGE, 8 * PAGE, MISSING)  # in place of WP
    assert errno_of(uffd.writeprotect, area + 8 * PAGE, PAGE) == errno.ENOENT


def test_unknown_features(mm: Mm) -> None:
    assert errno_of(mm.userfaultfd, None, 1 << 30) == errno.EINVAL
    assert errno_of(mm.userfaultfd, None, 1 << 17) == errno.EINVAL  # none that there is
    assert not mm.uffd_used


def test_in_2008_there_was_none(host: HostMemory, trace: Trace) -> None:
    old = Mm(host, trace, protocol="2008")
    with pytest.raises(ProtocolUnsupported):
        old.userfaultfd()
    with pytest.raises(ProtocolUnsupported):
        old.pagemap_scan(0, PAGE)
    assert not old.uffd_used
    old.exit()


def test_after_the_end(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 16 * PAGE, MISSING)
    gone = mm.userfaultfd()
    gone.close()
    gone.close()
    for call in (gone.register, gone.unregister, gone.zeropage, gone.wake, gone.writeprotect, gone.poison):
        assert errno_of(call, area, PAGE, *((1,) if call == gone.register else ())) == errno.EBADF
    assert errno_of(gone.read) == errno.EBADF
    mm.exit()
    assert errno_of(uffd.zeropage, area, PAGE) == errno.ESRCH
    assert errno_of(uffd.register, area, PAGE, MISSING) == errno.ESRCH
    assert errno_of(mm.userfaultfd) == errno.ESRCH
    uffd.close()


# ---- missing pages


def test_every_access_that_misses_is_told(mm: Mm, area: int, monitor: Monitor) -> None:
    mm.userfaultfd(monitor).register(area, 8 * PAGE, MISSING)
    thread = HostThread(mm)
    assert mm.read(area, 2) == b"\1\1"
    thread.store(area + PAGE, b"z")
    assert thread.load(area + PAGE, 2) == b"z\2"
    assert mm.get_user_pages(area + 2 * PAGE, write=True).writable
    mm.madvise(area + 3 * PAGE, PAGE, MADV_POPULATE_WRITE)
    mm.mlock(area + 4 * PAGE, PAGE)
    assert mm.process_vm_writev(area + 5 * PAGE, b"w") == 1
    assert mm.access_remote_vm(area + 6 * PAGE, b"w") == 1
    write = UFFD_PAGEFAULT_FLAG_WRITE
    assert monitor.faults == [(0, 0), *((page, write) for page in range(1, 7))]
    assert mm.read(area, 8 * PAGE)[::PAGE] == b"\1z\3\4\5ww\10"
    assert mm.read(area + 9 * PAGE, 1) == b"\0"  # is not registered
    assert len(monitor.faults) == 8


def test_filling_tells_nobody(mm: Mm, host: HostMemory, area: int, steps: Steps) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 16 * PAGE, MISSING)
    assert uffd.copy(area, b"ab" * PAGE) == 2 * PAGE
    assert uffd.zeropage(area + 2 * PAGE, 2 * PAGE) == 2 * PAGE
    assert steps() == ["alloc", "set", "alloc", "set", "set", "set"]
    entry = mm.pgd.get(area >> 12)
    assert entry & (PRESENT | WRITE | DIRTY | EXCLUSIVE) == PRESENT | WRITE | DIRTY | EXCLUSIVE
    assert mm.read(area, 4 * PAGE) == b"ab" * PAGE + bytes(2 * PAGE)
    mm.write(area + 2 * PAGE, b"x")
    assert steps()[:3] == ["alloc", "S CLEAR 2-3", "clear 1"]  # the zero page is copied, as ever


def test_what_cannot_be_filled(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    mm.write(area + 8 * PAGE, b"x")
    uffd.copy(area + 2 * PAGE, b"x" * PAGE)
    free = host.free_frames
    page = b"y" * PAGE
    assert errno_of(uffd.copy, area + 2 * PAGE, page) == errno.EEXIST
    assert errno_of(uffd.zeropage, area + 2 * PAGE, PAGE) == errno.EEXIST
    assert errno_of(uffd.poison, area + 2 * PAGE, PAGE) == errno.EEXIST
    assert errno_of(uffd.copy, area + 8 * PAGE, page) == errno.ENOENT
    assert errno_of(uffd.copy, area + 7 * PAGE, page * 2) == errno.ENOENT  # leaves its area
    assert errno_of(uffd.copy, area + 64 * PAGE, page) == errno.ENOENT
    assert errno_of(uffd.copy, area, page, UFFDIO_COPY_MODE_WP) == errno.EINVAL
    assert errno_of(uffd.copy, area, page, 4) == errno.EINVAL
    assert errno_of(uffd.copy, area, b"") == errno.EINVAL
    assert errno_of(uffd.copy, area, b"x") == errno.EINVAL
    assert errno_of(uffd.copy, area + 1, page) == errno.EINVAL
    assert errno_of(uffd.continue_, area, PAGE) == errno.EINVAL
    assert errno_of(uffd.zeropage, area, PAGE, 2) == errno.EINVAL
    assert errno_of(uffd.poison, area, PAGE, 2) == errno.EINVAL
    assert host.free_frames == free
    assert uffd.copy(area, page * 4) == 2 * PAGE  # up to the page that is there
    assert mm.read(area + 2 * PAGE, 1) == b"x"


def test_no_frame_is_enomem(trace: Trace) -> None:
    host = HostMemory(8 * PAGE)
    mm = Mm(host, trace)
    area = mm.mmap(16 * PAGE, RW)
    uffd = mm.userfaultfd()
    uffd.register(area, 16 * PAGE, MISSING)
    done = uffd.copy(area, b"x" * 16 * PAGE)
    assert 0 < done < 16 * PAGE
    assert errno_of(uffd.copy, area + done, b"x" * PAGE) == errno.ENOMEM
    verify(host)
    mm.exit()
    host.close()


def test_poison(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    assert uffd.poison(area, 2 * PAGE) == 2 * PAGE
    with pytest.raises(HostAccessError) as caught:
        HostThread(mm).load(area, 1)
    assert caught.value.signal == "SIGBUS"
    assert errno_of(lambda: mm.get_user_pages(area, write=True)) == errno.EFAULT
    uffd.unregister(area, 8 * PAGE)
    assert errno_of(mm.read, area, 1) == errno.EFAULT
    mm.madvise(area, 2 * PAGE, MADV_DONTNEED)
    assert mm.read(area, 1) == b"\0"


# ---- memory files


@pytest.fixture
def shmem(mm: Mm, host: HostMemory, trace: Trace) -> tuple[ShmemFile, int]:
    """8 pages, of which 0 to 3 exist; mapped shared."""
    file = ShmemFile(host, trace, "shmem", 8 * PAGE)
    file.pwrite(0, b"".join(bytes([0x10 + page]) * PAGE for page in range(4)))
    return file, mm.mmap(8 * PAGE, RW, MAP_SHARED, file=file)


def test_minor_faults(mm: Mm, shmem: tuple[ShmemFile, int]) -> None:
    file, hva = shmem
    monitor = Monitor(hva)
    mm.userfaultfd(monitor).register(hva, 8 * PAGE, MINOR)
    assert mm.read(hva + PAGE, 1) == b"\x11"
    mm.write(hva + 2 * PAGE, b"z")
    mm.write(hva + 5 * PAGE, b"z")  # is missing, which nobody wants to know
    minor = UFFD_PAGEFAULT_FLAG_MINOR
    assert monitor.faults == [(1, minor), (2, minor | UFFD_PAGEFAULT_FLAG_WRITE)]
    assert mm.pgd.get(hva >> 12) == 0  # no page is mapped along
    assert mm.pgd.get((hva >> 12) + 1) & WRITE
    assert file.pread(2 * PAGE, 2) == b"z\x12"
    file.close()
    mm.exit()


def test_missing_pages_of_a_file(mm: Mm, host: HostMemory, shmem: tuple[ShmemFile, int]) -> None:
    file, hva = shmem
    monitor = Monitor(hva)
    uffd = mm.userfaultfd(monitor)
    uffd.register(hva, 8 * PAGE, MISSING)
    assert mm.read(hva + PAGE, 1) == b"\x11"
    assert mm.read(hva + 5 * PAGE, 1) == b"\6"
    assert monitor.faults == [(5, 0)]
    assert file.pread(5 * PAGE, 2) == b"\6\6"
    mm.write(hva + 5 * PAGE, b"z")
    assert file.pread(5 * PAGE, 2) == b"z\6"
    mm.madvise(hva + 5 * PAGE, PAGE, MADV_DONTNEED)
    assert errno_of(uffd.copy, hva + 5 * PAGE, b"y" * PAGE) == errno.EEXIST  # the file has it
    assert uffd.zeropage(hva + 6 * PAGE, PAGE) == PAGE
    assert file.pread(6 * PAGE, PAGE) == bytes(PAGE)
    assert errno_of(uffd.continue_, hva + 7 * PAGE, PAGE) == errno.EFAULT
    file.truncate(7 * PAGE)
    assert errno_of(uffd.copy, hva + 7 * PAGE, b"y" * PAGE) == errno.EFAULT
    assert errno_of(mm.read, hva + 7 * PAGE, 1) == errno.EFAULT  # SIGBUS, without a word
    assert len(monitor.told) == 1
    verify(host)
    file.close()
    mm.exit()


def test_private_mappings_of_a_file(mm: Mm, host: HostMemory, shmem: tuple[ShmemFile, int]) -> None:
    file, _ = shmem
    private = mm.mmap(8 * PAGE, RW, MAP_PRIVATE, file=file)
    monitor = Monitor(private)
    mm.userfaultfd(monitor).register(private, 8 * PAGE, MISSING | MINOR)
    mm.write(private + PAGE, b"z")
    mm.write(private + 5 * PAGE, b"z")
    write = UFFD_PAGEFAULT_FLAG_WRITE
    assert monitor.faults == [(1, UFFD_PAGEFAULT_FLAG_MINOR | write), (5, write)]
    assert mm.read(private, 8 * PAGE)[:: PAGE // 2][:12] == b"\x10\x10z\x11\x12\x12\x13\x13\x05\x05z\x06"
    assert file.pread(0, 8 * PAGE)[::PAGE] == b"\x10\x11\x12\x13\0\0\0\0"
    verify(host)
    file.close()
    mm.exit()


def test_pages_in_swap_are_minor(mm: Mm, shmem: tuple[ShmemFile, int]) -> None:
    file, hva = shmem
    mm.swapon(16)
    mm.read(hva, PAGE)
    mm.madvise(hva, PAGE, MADV_PAGEOUT)
    assert 0 in file.swapped
    monitor = Monitor(hva)
    mm.userfaultfd(monitor).register(hva, 8 * PAGE, MINOR)
    assert mm.read(hva, 1) == b"\x10"
    assert monitor.faults == [(0, UFFD_PAGEFAULT_FLAG_MINOR)]
    file.close()
    mm.exit()


# ---- waiting


def test_who_resolves_nothing(mm: Mm, area: int) -> None:
    seen: list[int] = []
    uffd = mm.userfaultfd(lambda uffd, message: seen.append(message.address))
    uffd.register(area, 8 * PAGE, MISSING)
    assert errno_of(mm.read, area + 5, 1) == errno.EDEADLK
    assert seen == [area]
    assert not uffd.waiters
    assert errno_of(HostThread(mm).load, area, 1) == errno.EDEADLK
    uffd.close()
    assert mm.read(area, 1) == b"\0"


def test_who_wakes_and_resolves_nothing(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd(lambda uffd, message: uffd.wake(message.address, PAGE))
    uffd.register(area, 8 * PAGE, MISSING)
    assert errno_of(mm.read, area, 1) == errno.EDEADLK


def test_what_a_handler_raises_comes_out_of_the_access(mm: Mm, area: int) -> None:
    def fail(uffd: Userfaultfd, message: UffdMsg) -> None:
        raise KeyError(message.address)

    uffd = mm.userfaultfd(fail)
    uffd.register(area, 8 * PAGE, MISSING)
    with pytest.raises(KeyError):
        mm.read(area, 1)
    assert not uffd.waiters


def test_a_guest_whose_page_never_comes(mm: Mm, host: HostMemory, trace: Trace, area: int) -> None:
    kvm = Kvm(mm, trace, host)
    kvm.set_memslot(0, 0, 16, area)
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    assert kvm.fault(3, 0) == 2
    assert "monitor" in kvm.last_error
    assert "does not resolve" in kvm.last_error
    uffd.copy(area + 3 * PAGE, b"x" * PAGE)
    assert kvm.fault(3, 0) == 0
    assert kvm.sptes.get(3)
    kvm.destroy()


def test_another_actor_reads_and_resolves(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    assert errno_of(uffd.read) == errno.EAGAIN
    calls: list[UffdMsg] = []

    def monitor(label: str) -> None:
        if label == "mm.userfault.wait":
            if not calls:
                calls.append(uffd.read())
            elif len(calls) == 1:
                calls.append(calls[0])
                uffd.copy(calls[0].address, b"m" * PAGE, UFFDIO_COPY_MODE_DONTWAKE)
            else:
                uffd.wake(area, 8 * PAGE)

    with on_point(monitor):
        assert mm.read(area + 3 * PAGE + 7, 1) == b"m"
    assert calls[0] == UffdMsg(UFFD_EVENT_PAGEFAULT, area + 3 * PAGE, 0, "host")


def test_a_fault_that_nobody_read_leaves_no_message(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    assert errno_of(mm.read, area, 1) == errno.EDEADLK
    assert errno_of(uffd.read) == errno.EAGAIN


def test_closing_lets_waiters_go(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd()
    uffd.register(area, 8 * PAGE, MISSING)
    with on_point(lambda label: uffd.close() if label == "mm.userfault.wait" else None):
        assert mm.read(area, 1) == b"\0"


def test_sigbus_and_exact_addresses(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd(None, UFFD_FEATURE_SIGBUS)
    uffd.register(area, 8 * PAGE, MISSING)
    with pytest.raises(HostAccessError) as caught:
        HostThread(mm).load(area, 1)
    assert caught.value.signal == "SIGBUS"
    monitor = Monitor(area)
    mm.userfaultfd(monitor, UFFD_FEATURE_EXACT_ADDRESS).register(area + 8 * PAGE, 8 * PAGE, MISSING)
    mm.read(area + 8 * PAGE + 0x123, 1)
    assert monitor.told[0].address == area + 8 * PAGE + 0x123


def test_protection_comes_first(mm: Mm, area: int, monitor: Monitor) -> None:
    mm.userfaultfd(monitor).register(area, 8 * PAGE, MISSING)
    mm.mprotect(area, 8 * PAGE, R)
    assert errno_of(mm.write, area, b"x") == errno.EFAULT
    assert monitor.told == []
    assert mm.read(area, 1) == b"\1"
    assert not mm.pgd.get(area >> 12) & WRITE


def test_a_monitor_may_change_the_address_space(mm: Mm, area: int) -> None:
    """No lock is held while it works."""

    def answer(uffd: Userfaultfd, message: UffdMsg) -> None:
        uffd.unregister(area, 8 * PAGE)
        mm.mmap(PAGE, RW)
        mm.munmap(area + 4 * PAGE, PAGE)

    mm.userfaultfd(answer).register(area, 8 * PAGE, MISSING)
    assert mm.read(area, 1) == b"\0"
    assert errno_of(mm.read, area + 4 * PAGE, 1) == errno.EFAULT


# ---- events


def test_fork(mm: Mm, host: HostMemory, area: int, monitor: Monitor) -> None:
    uffd = mm.userfaultfd(monitor, UFFD_FEATURE_EVENT_FORK)
    uffd.register(area, 8 * PAGE, MISSING | WP)
    uffd.copy(area, b"x" * PAGE, UFFDIO_COPY_MODE_WP)
    child = mm.fork()
    (told,) = monitor.told
    assert told.event == UFFD_EVENT_FORK
    assert told.ufd is not None
    assert told.ufd.mm is child
    assert child.pgd.get(area >> 12) & UFFD_WP
    assert child.read(area + PAGE, 1) == b"\2"
    assert child.vmas[0].uffd is told.ufd
    assert mm.pgd.get((area >> 12) + 1) == 0
    verify(host)
    child.exit()
    mm.exit()


def test_fork_without_the_event(mm: Mm, host: HostMemory, area: int, monitor: Monitor) -> None:
    uffd = mm.userfaultfd(monitor, UFFD_FEATURE_WP_ASYNC)
    uffd.register(area, 8 * PAGE, MISSING | WP)
    uffd.copy(area, b"x" * PAGE, UFFDIO_COPY_MODE_WP)
    uffd.writeprotect(area, 4 * PAGE)
    child = mm.fork()
    assert child.read(area, 1) == b"x"
    assert child.read(area + PAGE, 1) == b"\0"
    assert monitor.told == []
    assert not any(entry & UFFD_WP for _, entry in child.pgd.entries(0, 1 << 36))
    assert mm.pgd.get(area >> 12) & UFFD_WP
    verify(host)
    child.exit()
    mm.exit()


def test_mremap(mm: Mm, host: HostMemory, area: int) -> None:
    for features in (0, UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP):
        start = mm.mmap(8 * PAGE, RW, addr=area + (64 + features) * PAGE)
        monitor = Monitor(start)
        uffd = mm.userfaultfd(monitor, features)
        uffd.register(start, 8 * PAGE, MISSING | WP)
        uffd.copy(start, b"x" * PAGE, UFFDIO_COPY_MODE_WP)
        to = start + 256 * PAGE
        mm.mremap(start, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        assert bool(mm.pgd.get(to >> 12) & UFFD_WP) == bool(features)
        events = [(told.event, told.start, told.end, told.address) for told in monitor.told]
        if features:
            assert events == [
                (UFFD_EVENT_REMAP, start, start + 4 * PAGE, to),
                (UFFD_EVENT_UNMAP, start, start + 4 * PAGE, 0),
            ]
            monitor.base = to
            assert mm.read(to + PAGE, 1) == b"\2"
        else:
            assert events == []
            mm.write(to, b"y")
            assert mm.read(to + PAGE, 1) == b"\0"
        verify(host)


def test_unmap_and_remove(mm: Mm, area: int) -> None:
    order: list[str] = []

    def answer(uffd: Userfaultfd, message: UffdMsg) -> None:
        names = {UFFD_EVENT_REMOVE: "remove", UFFD_EVENT_UNMAP: "unmap"}
        order.append(f"{names[message.event]} {(message.start - area) // PAGE}-{(message.end - area) // PAGE}")
        with pytest.raises(MmError) as caught:
            uffd.zeropage(area + 8 * PAGE, PAGE)  # the layout is changing
        assert caught.value.errno == errno.EAGAIN

    uffd = mm.userfaultfd(answer, UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)
    uffd.register(area, 16 * PAGE, MISSING)

    class Listener(MmuNotifier):
        def invalidate_range_start(self, range: object) -> int:
            order.append("S")
            return 0

    mm.notifiers.register(Listener())
    uffd.copy(area, b"x" * PAGE)
    mm.madvise(area, 2 * PAGE, MADV_DONTNEED)
    assert order == ["remove 0-2", "S"]  # it is told before
    order.clear()
    mm.munmap(area, 2 * PAGE)
    mm.mmap(2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | 0x10, addr=area + 2 * PAGE)
    assert order == ["S", "unmap 0-2", "S", "unmap 2-4"]  # and this behind it
    uffd.zeropage(area + 8 * PAGE, PAGE)


def test_events_of_files(mm: Mm, shmem: tuple[ShmemFile, int]) -> None:
    file, hva = shmem
    monitor = Monitor(hva)
    mm.userfaultfd(monitor, UFFD_FEATURE_EVENT_REMOVE).register(hva, 8 * PAGE, MISSING)
    mm.madvise(hva, PAGE, MADV_REMOVE)
    (told,) = monitor.told
    assert (told.event, told.start, told.end) == (UFFD_EVENT_REMOVE, hva, hva + PAGE)
    assert mm.read(hva, 1) == b"\1"  # there is no page any more
    file.close()
    mm.exit()


def test_events_that_wait_to_be_read(mm: Mm, area: int) -> None:
    uffd = mm.userfaultfd(None, UFFD_FEATURE_EVENT_UNMAP)
    uffd.register(area, 16 * PAGE, MISSING)
    mm.munmap(area, PAGE)
    assert errno_of(uffd.zeropage, area + PAGE, PAGE) == errno.EAGAIN
    assert errno_of(uffd.writeprotect, area + PAGE, PAGE) == errno.EAGAIN
    assert errno_of(uffd.move, area + PAGE, area + 2 * PAGE, PAGE) == errno.EAGAIN
    assert uffd.read() == UffdMsg(UFFD_EVENT_UNMAP, start=area, end=area + PAGE)
    assert uffd.zeropage(area + PAGE, PAGE) == PAGE
