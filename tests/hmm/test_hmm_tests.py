"""The cases of Linux's hmm-tests, on our device. One test a case, named as there."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.hmm.world import RW, World, words
from xipvm.actors import on_point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.device_private import PG_COHERENT
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_HUGEPAGE
from xipvm.mmu.migrate_device import pin_longterm
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.secondary.dmirror import Snapshot
from xipvm.mmu.vma import (
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    VM_MIXEDMAP,
    Vma,
)

PAGES = 64
SIZE = PAGES * PAGE_SIZE
WORDS = SIZE // 4
HUGE = 2 << 20
NOTHING = bytes(PAGE_SIZE)


def refused(code: int) -> AbstractContextManager[object]:
    return pytest.raises(MmError, match=errno.errorcode[code])


# ---- mirror


def test_open_close(world: World) -> None:
    one, two = world.device(), world.device()
    for device in (one, two):
        device.destroy()
        device.destroy()
        with refused(errno.EINVAL):
            device.read(world.map(1), 1)


def test_anon_read(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    data = words(0, WORDS)
    world.mm.write(hva + 2 * PAGE_SIZE, data[2 * PAGE_SIZE :])
    assert world.mm.read(hva, PAGE_SIZE) == NOTHING  # the zero page; page 1 stays untouched
    world.mm.mprotect(hva, SIZE, PROT_READ)
    seen, done = device.read(hva, SIZE)
    assert done == (PAGES, 1)
    assert seen == bytes(2 * PAGE_SIZE) + data[2 * PAGE_SIZE :]


def test_anon_read_prot(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    data = words(0, WORDS)
    world.mm.write(hva, data)
    assert device.read(hva, SIZE)[0] == data
    world.mm.mprotect(hva, SIZE, PROT_NONE)
    with refused(errno.EFAULT):
        device.read(hva, SIZE)
    world.mm.mprotect(hva, SIZE, RW)
    assert world.mm.read(hva, SIZE) == data


def test_anon_write(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    data = words(0, WORDS)
    assert device.write(hva, data) == (PAGES, 1)
    assert world.mm.read(hva, SIZE) == data


def test_anon_write_prot(world: World) -> None:
    device, hva = world.device(), world.map(PAGES, PROT_READ)
    assert device.read(hva, PAGE_SIZE) == (NOTHING, (1, 1))
    with refused(errno.EPERM):
        device.write(hva, words(0, WORDS))
    assert world.mm.read(hva, SIZE) == bytes(SIZE)
    world.mm.mprotect(hva, SIZE, RW)
    assert device.write(hva, words(0, WORDS)) == (PAGES, 1)
    assert world.mm.read(hva, SIZE) == words(0, WORDS)


def test_anon_write_child(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    child = world.fork()
    assert child.read(hva, SIZE) == words(0, WORDS)
    of_child = world.device(child, of=device)
    assert of_child.write(hva, words(0, WORDS, -1)).cpages == PAGES
    assert child.read(hva, SIZE) == words(0, WORDS, -1)
    assert world.mm.read(hva, SIZE) == words(0, WORDS)


def test_anon_write_child_shared(world: World) -> None:
    device, hva = world.device(), world.map(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS)
    world.mm.write(hva, words(0, WORDS))
    child = world.fork()
    assert child.read(hva, SIZE) == words(0, WORDS)
    assert world.device(child, of=device).write(hva, words(0, WORDS, -1)).cpages == PAGES
    assert world.mm.read(hva, SIZE) == words(0, WORDS, -1)


def huge_area(world: World) -> int:
    """A transparent huge page that is there."""
    hva = world.map(2 * HUGE >> PAGE_SHIFT)
    hva = -(-hva // HUGE) * HUGE
    world.mm.madvise(hva, HUGE, MADV_HUGEPAGE)
    return hva


def test_anon_write_huge(world: World) -> None:
    device, hva = world.device(), huge_area(world)
    data = words(0, HUGE // 4)
    assert device.write(hva, data) == (HUGE >> PAGE_SHIFT, 1)
    assert world.mm.pgd.huge(hva >> PAGE_SHIFT)
    assert world.mm.read(hva, HUGE) == data


def test_anon_write_hugetlbfs(world: World) -> None:
    world.host.reserve_huge_pages(1)
    hva = world.mm.mmap(HUGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    device = world.device()
    data = words(0, HUGE // 4)
    assert device.write(hva, data) == (HUGE >> PAGE_SHIFT, 1)
    assert world.mm.read(hva, HUGE) == data
    world.mm.munmap(hva, HUGE)


@pytest.fixture
def file(world: World, tmp_path: Path) -> HostFile:
    path = tmp_path / "data"
    path.write_bytes(words(0, WORDS))
    return HostFile(world.host, world.trace, str(path), writable=True)


def test_file_read(world: World, file: HostFile) -> None:
    device, hva = world.device(), world.map(PAGES, PROT_READ, MAP_SHARED, file=file)
    assert device.read(hva, SIZE) == (words(0, WORDS), (PAGES, 1))


def test_file_write(world: World, file: HostFile) -> None:
    device, hva = world.device(), world.map(PAGES, RW, MAP_SHARED, file=file)
    assert device.write(hva, words(7, WORDS)) == (PAGES, 1)
    assert world.mm.read(hva, SIZE) == words(7, WORDS)
    assert file.pread(0, SIZE) == words(7, WORDS)


# ---- migration


def test_migrate(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    seen, done = device.migrate_to_dev(hva, PAGES)
    assert done.cpages == PAGES
    assert seen == words(0, WORDS)
    assert len(device.memory.used()) == PAGES


def test_migrate_file_private(world: World, file: HostFile) -> None:
    device, hva = world.device(), world.map(PAGES, RW, MAP_PRIVATE, file=file)
    world.mm.write(hva, words(1, WORDS))
    seen, done = device.migrate_to_dev(hva, PAGES)
    assert done.cpages == PAGES
    assert seen == words(1, WORDS)
    assert file.pread(0, SIZE) == words(0, WORDS)


def test_migrate_fault(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    data = words(0, WORDS)
    world.mm.write(hva, data)
    assert device.migrate_to_dev(hva, PAGES)[0] == data
    thread = HostThread(world.mm)
    assert thread.load(hva, SIZE // 2) == data[: SIZE // 2]
    assert len(device.memory.used()) == (PAGES if world.coherent else PAGES // 2)
    if world.coherent:
        assert device.migrate_to_sys(hva, PAGES // 2).cpages == PAGES // 2
    assert device.migrate_to_dev(hva, PAGES // 2)[0] == data[: SIZE // 2]
    assert len(device.memory.used()) == PAGES
    thread.exit()


def test_migrate_release(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    assert device.migrate_to_dev(hva, PAGES)[0] == words(0, WORDS)
    device.evict()
    assert device.memory.used() == []
    assert world.mm.read(hva, SIZE // 2) == words(0, WORDS // 2)
    device.migrate_to_dev(hva, PAGES)
    device.destroy()
    assert world.mm.read(hva, SIZE) == words(0, WORDS)


def test_migrate_shared(world: World) -> None:
    device, hva = world.device(), world.map(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS)
    with refused(errno.ENOENT):
        device.migrate_to_dev(hva, PAGES)


def test_migrate_mixed(world: World) -> None:
    device0, device1 = world.device(), world.device()
    hva, mm = world.map(6, PROT_NONE), world.mm
    with refused(errno.EINVAL):
        device1.migrate_to_dev(hva, 6)
    mm.munmap(hva + PAGE_SIZE, PAGE_SIZE)
    with refused(errno.EINVAL):
        device1.migrate_to_dev(hva, 3)
    at = [hva + n * PAGE_SIZE for n in range(6)]
    mm.mprotect(at[2], PAGE_SIZE, PROT_READ)
    assert mm.read(at[2], 4) == bytes(4)
    mm.mprotect(at[3], PAGE_SIZE, RW)
    mm.write(at[3], words(3, 1))
    mm.mprotect(at[3], PAGE_SIZE, PROT_READ)
    mm.mprotect(at[4], 2 * PAGE_SIZE, RW)
    mm.write(at[4], words(4, 1))
    mm.write(at[5], words(5, 1))
    seen, done = device1.migrate_to_dev(at[2], 4)
    assert done.cpages == 4
    assert [seen[n * PAGE_SIZE : n * PAGE_SIZE + 4] for n in range(4)] == [bytes(4), *(words(n, 1) for n in (3, 4, 5))]
    with refused(errno.ENOENT):
        device0.migrate_to_dev(at[5], 1)
    assert mm.read(at[5], 4) == words(5, 1)


@pytest.mark.slow
def test_migrate_multiple(world: World) -> None:
    device, pages = world.device(), 1024
    for round in range(4):
        hva = world.map(pages)
        data = words(round, pages * PAGE_SIZE // 4)
        world.mm.write(hva, data)
        seen, done = device.migrate_to_dev(hva, pages)
        assert done.cpages == pages
        assert seen == data
        if world.coherent:
            assert device.migrate_to_sys(hva, pages).cpages == pages
        assert world.mm.read(hva, pages * PAGE_SIZE) == data
        assert device.memory.used() == []
        world.mm.munmap(hva, pages * PAGE_SIZE)


# ---- races with the CPU


def test_anon_read_multiple(world: World) -> None:
    device, hva = world.device(), None
    for round in range(8):
        hva = world.map(PAGES, addr=hva)
        world.mm.write(hva, words(round, WORDS))
        assert device.read(hva, SIZE) == (words(round, WORDS), (PAGES, 1))
        world.mm.munmap(hva, SIZE)


@pytest.mark.parametrize("when", range(0, 160, 7))
def test_anon_teardown(world: World, when: int) -> None:
    """The half of it is unmapped at some point of the device's way."""
    device, hva = world.device(), world.map(PAGES)
    data = words(0, WORDS)
    world.mm.write(hva, data)
    left = when

    def unmap(label: str) -> None:
        nonlocal left
        left -= 1
        if left == 0 and "mutex" not in label and not device.mutex.taken:
            world.mm.munmap(hva, SIZE // 2)

    seen, failed = data, 0
    with on_point(unmap):
        try:
            seen = device.read(hva, SIZE)[0]
        except MmError as error:
            failed = error.errno
    assert seen == data
    assert failed in (0, errno.EFAULT)


class OfTheDevice(ShmemFile):
    """What the device's driver maps for its own: pages with references in an area that may have others, too."""

    def mmap(self, area: Vma) -> None:
        super().mmap(area)
        area.flags |= VM_MIXEDMAP


def test_mixedmap(world: World) -> None:
    device = world.device()
    file = OfTheDevice(world.host, world.trace, "hmm_dmirror", PAGE_SIZE)
    hva = world.map(1, PROT_READ, MAP_PRIVATE, file=file)
    assert world.mm.read(hva, 1) == b"\0"
    assert device.snapshot(hva, 1) == [Snapshot.READ]
    world.mm.munmap(hva, PAGE_SIZE)
    file.close()


def test_snapshot(world: World) -> None:
    device0, device1 = world.device(), world.device()
    hva, mm = world.map(7, PROT_NONE), world.mm
    at = [hva + n * PAGE_SIZE for n in range(7)]
    mm.munmap(at[1], PAGE_SIZE)
    mm.mprotect(at[2], PAGE_SIZE, PROT_READ)
    assert mm.read(at[2], 1) == b"\0"
    mm.mprotect(at[3], PAGE_SIZE, RW)
    mm.write(at[3], b"x")
    mm.mprotect(at[3], PAGE_SIZE, PROT_READ)
    mm.mprotect(at[4], 3 * PAGE_SIZE, RW)
    for page in at[4:]:
        mm.write(page, b"x")
    device0.migrate_to_dev(at[5], 1)
    device1.migrate_to_dev(at[6], 1)
    local = Snapshot.DEV_COHERENT_LOCAL if world.coherent else Snapshot.DEV_PRIVATE_LOCAL
    remote = Snapshot.DEV_COHERENT_REMOTE | Snapshot.WRITE if world.coherent else Snapshot.NONE
    assert device0.snapshot(hva, 7) == [
        Snapshot.ERROR,
        Snapshot.ERROR,
        Snapshot.ZERO | Snapshot.READ,
        Snapshot.READ,
        Snapshot.WRITE,
        local | Snapshot.WRITE,
        remote,
    ]


def test_compound(world: World) -> None:
    world.host.reserve_huge_pages(1)
    hva = world.mm.mmap(HUGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    device = world.device()
    world.mm.write(hva, words(0, HUGE // 4))
    assert device.snapshot(hva, HUGE >> PAGE_SHIFT) == [Snapshot.WRITE | Snapshot.PMD] * (HUGE >> PAGE_SHIFT)
    world.mm.mprotect(hva, HUGE, PROT_READ)
    assert device.snapshot(hva, HUGE >> PAGE_SHIFT) == [Snapshot.READ | Snapshot.PMD] * (HUGE >> PAGE_SHIFT)
    world.mm.munmap(hva, HUGE)


def test_double_map(world: World) -> None:
    device0, device1 = world.device(), world.device()
    hva = world.map(PAGES)
    data = words(0, WORDS)
    world.mm.write(hva, data)
    world.mm.mprotect(hva, SIZE, PROT_READ)
    assert device0.read(hva, SIZE)[0] == data
    assert device1.read(hva, SIZE)[0] == data
    assert device1.migrate_to_dev(hva, PAGES)[0] == data
    assert device0.read(hva, SIZE)[0] == data


# ---- exclusive access


def test_exclusive(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    seen, done = device.exclusive(hva, PAGES)
    assert seen == words(0, WORDS)
    assert done.cpages == PAGES
    with refused(errno.EPERM):
        device.check_exclusive(hva, PAGES)
    thread = HostThread(world.mm)
    for at in range(0, SIZE, 4):
        value = int.from_bytes(thread.load(hva + at, 4), "little")
        assert value == at // 4
        thread.store(hva + at, (value + 1).to_bytes(4, "little"))
    assert thread.load(hva, SIZE) == words(1, WORDS)
    device.check_exclusive(hva, PAGES)
    thread.exit()


def test_exclusive_mprotect(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    assert device.exclusive(hva, PAGES)[0] == words(0, WORDS)
    world.mm.mprotect(hva, SIZE, PROT_READ)
    with refused(errno.EPERM):
        device.write(hva, words(5, WORDS))
    assert world.mm.read(hva, SIZE) == words(0, WORDS)


def test_exclusive_cow(world: World) -> None:
    device, hva = world.device(), world.map(PAGES)
    world.mm.write(hva, words(0, WORDS))
    assert device.exclusive(hva, PAGES)[0] == words(0, WORDS)
    child = world.fork()
    for mm in (world.mm, child):
        for at in range(0, SIZE, 256):
            value = int.from_bytes(mm.read(hva + at, 4), "little")
            assert value == at // 4
            mm.write(hva + at, (value + 1).to_bytes(4, "little"))
    for mm in (world.mm, child):
        assert all(mm.read(hva + at, 4) == words(at // 4 + 1, 1) for at in range(0, SIZE, 256))
    device.check_exclusive(hva, PAGES)


# ---- get_user_pages, and COW


def test_hmm_gup_test(world: World) -> None:
    """One page each by get_user_pages, its fast way, pinned for long fast, pinned for long."""
    device, hva, mm = world.device(), world.map(4), world.mm
    data = words(0, 4 * PAGE_SIZE // 4)
    mm.write(hva, data)
    assert device.migrate_to_dev(hva, 4)[0] == data
    at = [hva + n * PAGE_SIZE for n in range(4)]
    mm.get_user_pages(at[0], write=False)
    mm.get_user_pages(at[1], write=True)
    pins = [pin_longterm(mm, at[n]) for n in (2, 3)]
    assert not any(world.host.flags(pfn) & PG_COHERENT for pfn in pins)
    local = Snapshot.DEV_COHERENT_LOCAL | Snapshot.WRITE
    here = [local, local] if world.coherent else [Snapshot.WRITE, Snapshot.WRITE]
    assert device.snapshot(hva, 4) == [*here, Snapshot.WRITE, Snapshot.WRITE]
    for pfn in pins:
        mm.put_frame(pfn)
    assert mm.read(hva, 4 * PAGE_SIZE) == data


def test_hmm_cow_in_device(world: World) -> None:
    device, hva, mm = world.device(), world.map(4), world.mm
    data = words(0, 4 * PAGE_SIZE // 4)
    mm.write(hva, data)
    assert device.migrate_to_dev(hva, 4)[0] == data
    child = world.fork()
    for page in range(4):
        mm.write(hva + page * PAGE_SIZE, words(7, 1))
    child.exit()
    assert device.snapshot(hva, 4) == [Snapshot.WRITE] * 4
    assert [mm.read(hva + page * PAGE_SIZE, 4) for page in range(4)] == [words(7, 1)] * 4


# ---- huge pages, which are split for the way to the device


def test_migrate_anon_huge(world: World) -> None:
    device, hva = world.device(), huge_area(world)
    data = words(0, HUGE // 4)
    world.mm.write(hva, data)
    assert world.mm.pgd.huge(hva >> PAGE_SHIFT)
    assert device.migrate_to_dev(hva, HUGE >> PAGE_SHIFT)[0] == data
    assert world.mm.read(hva, HUGE) == data


def test_migrate_anon_huge_empty(world: World) -> None:
    """Nothing is there: the device's pages are zeros."""
    device, hva = world.device(), huge_area(world)
    assert device.migrate_to_dev(hva, HUGE >> PAGE_SHIFT)[0] == bytes(HUGE)
    assert world.mm.read(hva, HUGE) == bytes(HUGE)


def test_migrate_anon_huge_err(world: World) -> None:
    """The device has no room for all of them."""
    device, hva = world.device(pages=100), huge_area(world)
    data = words(0, HUGE // 4)
    world.mm.write(hva, data)
    with refused(errno.ENOENT):
        device.migrate_to_dev(hva, HUGE >> PAGE_SHIFT)
    assert len(device.memory.used()) == 100
    assert device.read(hva, HUGE)[0] == data
    assert world.mm.read(hva, HUGE) == data
