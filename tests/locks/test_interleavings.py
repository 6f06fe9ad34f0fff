"""A guest's access against an operation of its host, in every order that there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.locks.dfs import depth_first
from xipvm.actors import give_way
from xipvm.errors import DeadlockError, LockOrderError, MmError
from xipvm.locks import checking
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_FREE, MADV_MERGEABLE, MADV_PAGEOUT, MADV_REMOVE
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import PageCache, ShmemFile
from xipvm.mmu.pte import MAPPED, WRITE, pte_pfn
from xipvm.mmu.secondary import base
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_WRITE, spte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

PAGE = 4096
RW = 3
DATA = b"the data that was there"


class Tlb:
    """A vCPU, which remembers what it was given until it is told to forget."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, bool]] = {}

    def flush_tlb(self, reason: str) -> None:
        self.entries.clear()

    def kick(self, reason: str) -> None:
        pass


class World:
    """A VM with two pages of memory, of which the second is never touched; ``kind`` says what they are."""

    def __init__(self, kind: str, path: Path) -> None:
        self.trace = Trace()
        self.host = HostMemory(64 * PAGE, poison="frame")
        self.mm = Mm(self.host, self.trace)
        self.mm.swapon(8, str(path / "swap"))
        self.file: PageCache | None = None
        if kind == "anon":
            self.hva = int(self.mm.mmap(2 * PAGE, RW))
        else:
            if kind == "shmem":
                self.file = ShmemFile(self.host, self.trace, "shmem", 2 * PAGE)
            else:
                (path / "file").write_bytes(DATA + bytes(2 * PAGE - len(DATA)))
                self.file = HostFile(self.host, self.trace, str(path / "file"), writable=True)
            flags = MAP_PRIVATE if kind == "private" else MAP_SHARED
            self.hva = int(self.mm.mmap(2 * PAGE, RW, flags, file=self.file))
        self.kvm = Kvm(self.mm, self.trace, self.host)
        self.kvm.set_memslot(0, 0, 2, self.hva)
        self.vcpus = [Tlb(), Tlb()]
        self.kvm.vcpus = list(self.vcpus)
        self.thread = HostThread(self.mm, "thread")
        if kind != "private":
            self.mm.write(self.hva, DATA)
        self.results: list[object] = []

    def access(self, vcpu: int, access: int) -> None:
        """The guest reads or writes gfn 0, as a walker does it."""
        for _ in range(100):
            found = self.vcpus[vcpu].entries.get(0) or self.kvm.translate(0)
            if found is not None and (found[1] or access != base.WRITE):
                self.vcpus[vcpu].entries[0] = found
                if access == base.WRITE:
                    self.host.write(found[0], 64, b"guest")
                self.results.append(self.host.read(found[0], 0, len(DATA)))
                return
            if self.kvm.fault(0, access) != base.RETRY_WALK:
                self.results.append("fault")
                return
            give_way("vcpu.retry")
        raise AssertionError("retried for ever")

    def frame(self) -> int:
        entry = self.mm.pgd.get(self.hva >> 12)
        return pte_pfn(entry) if entry & MAPPED else 0

    def check(self) -> None:
        """What must hold when everybody is done."""
        verify(self.host)
        assert not self.mm.mmap_lock.taken
        assert not self.mm.ptl.held
        assert not self.mm.rmap.page_lock.held
        assert not self.kvm.mmu_lock.taken
        assert not self.kvm.slots_lock.taken
        assert self.mm.notifiers.open_ranges == ()
        if not self.mm.dead:  # its end may cut a start from its end
            assert (self.kvm.mmu_invalidate_in_progress, self.kvm.mn_active_invalidate_count) == (0, 0)
        spte, entry = self.kvm.sptes.get(0), self.mm.pgd.get(self.hva >> 12)
        if spte & SPTE_PRESENT:
            assert entry & MAPPED
            assert spte_pfn(spte) == pte_pfn(entry)
            assert not spte & SPTE_WRITE or entry & WRITE
        for vcpu in self.vcpus:
            for found in vcpu.entries.values():
                assert spte & SPTE_PRESENT
                assert found[0] == spte_pfn(spte)


def migrate(world: World) -> None:
    pfn = world.frame()
    if pfn and not world.host.flags(pfn) & 1:
        try:
            migrate_page(world.host, world.trace, pfn)
        except MmError as error:
            world.results.append(error.errno)


def merge(world: World) -> None:
    world.mm.madvise(world.hva, 2 * PAGE, MADV_MERGEABLE)
    world.mm.ksm_scan()


def cow(world: World) -> None:
    world.mm.fork("child")
    world.mm.write(world.hva, DATA)


def file_of(world: World) -> Any:
    assert world.file is not None
    return world.file


OPERATIONS: dict[str, tuple[str, Callable[[World], object]]] = {
    "munmap": ("anon", lambda world: world.mm.munmap(world.hva, PAGE)),
    "dontneed": ("anon", lambda world: world.mm.madvise(world.hva, PAGE, MADV_DONTNEED)),
    "mprotect": ("anon", lambda world: world.mm.mprotect(world.hva, PAGE, 1)),
    "cow": ("anon", cow),
    "pageout": ("anon", lambda world: world.mm.madvise(world.hva, PAGE, MADV_PAGEOUT)),
    "migrate": ("anon", migrate),
    "swapoff": ("anon", lambda world: world.mm.swapoff()),
    "free": ("anon", lambda world: world.mm.madvise(world.hva, PAGE, MADV_FREE)),
    "ksm": ("anon", merge),
    "exit": ("anon", lambda world: world.mm.exit()),
    "memslot": ("anon", lambda world: world.kvm.delete_memslot(0)),
    "register": ("anon", lambda world: world.mm.notifiers.register(MmuNotifier())),
    "truncate": ("shmem", lambda world: file_of(world).truncate(0)),
    "remove": ("shmem", lambda world: world.mm.madvise(world.hva, PAGE, MADV_REMOVE)),
    "migrate shmem": ("shmem", migrate),
    "pageout shmem": ("shmem", lambda world: world.mm.madvise(world.hva, PAGE, MADV_PAGEOUT)),
    "truncate file": ("file", lambda world: file_of(world).truncate(0)),
    "direct": ("file", lambda world: file_of(world).direct_write(0, DATA.ljust(512, b"\0"))),
    "fsync": ("file", lambda world: file_of(world).fsync()),
    "truncate private": ("private", lambda world: file_of(world).truncate(0)),
}
NEVER_NEW = ("mprotect", "cow", "pageout", "migrate", "ksm", "register", "migrate shmem", "pageout shmem", "fsync")
"""Operations after which the data is what it was."""


def explore(kind: str, path: Path, actors: list[tuple[str, Callable[[World], object]]], limit: int | None) -> int:
    """Runs all schedules; how many there were."""
    runs = 0
    with checking():
        for choose in depth_first(limit):
            world = World(kind, path)
            scheduler = Scheduler(choose, trace=world.trace)
            for name, function in actors:
                scheduler.spawn(name, function, world)
            scheduler.run()
            world.check()
            for result in world.results:
                if isinstance(result, bytes):
                    assert result in (DATA, bytes(len(DATA)))
            if kind != "private" and actors[-1][0] in NEVER_NEW:
                assert bytes(len(DATA)) not in world.results
            runs += 1
    return runs


@pytest.mark.parametrize("access", [base.READ, base.WRITE], ids=["read", "write"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_against_every_operation(name: str, access: int, tmp_path: Path) -> None:
    kind, operation = OPERATIONS[name]
    runs = explore(kind, tmp_path, [("vcpu0", lambda world: world.access(0, access)), (name, operation)], 2)
    assert runs > 3


@pytest.mark.slow
def test_fault_against_munmap_without_a_limit(tmp_path: Path) -> None:
    kind, operation = OPERATIONS["munmap"]
    reader = ("vcpu0", lambda world: world.access(0, base.READ))
    runs = explore(kind, tmp_path, [reader, ("munmap", operation)], None)
    assert runs > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["munmap", "cow", "migrate", "truncate", "memslot"])
def test_two_faults_against_an_operation(name: str, tmp_path: Path) -> None:
    kind, operation = OPERATIONS[name]
    first = ("vcpu0", lambda world: world.access(0, base.READ))
    second = ("vcpu1", lambda world: world.access(1, base.WRITE))
    assert explore(kind, tmp_path, [first, second, (name, operation)], 2) > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("munmap", "migrate"),
        ("munmap", "pageout"),
        ("swapoff", "pageout"),
        ("free", "pageout"),
        ("cow", "migrate"),
        ("cow", "ksm"),
        ("mprotect", "pageout"),
        ("exit", "migrate"),
        ("truncate", "migrate shmem"),
        ("truncate", "pageout shmem"),
        ("truncate file", "fsync"),
        ("direct", "fsync"),
        ("direct", "truncate file"),
        ("register", "truncate"),
        ("register", "migrate"),
    ],
)
def test_two_operations(one: str, other: str, tmp_path: Path) -> None:
    """Of the host, on the same page: neither deadlock nor a wrong order of locks, and all is sound at the end."""
    kind = OPERATIONS[other][0]
    assert (
        explore(kind, tmp_path, [(one, tolerant(OPERATIONS[one][1])), (other, tolerant(OPERATIONS[other][1]))], 3) > 5
    )


def tolerant(operation: Callable[[World], object]) -> Callable[[World], None]:
    """An operation that may come too late."""

    def run(world: World) -> None:
        try:
            operation(world)
        except DeadlockError:
            raise
        except MmError as error:
            world.results.append(error.errno)

    return run


def test_an_operation_with_its_locks_in_the_wrong_order_is_found_in_every_schedule(tmp_path: Path) -> None:
    world = World("shmem", tmp_path)

    def upside_down() -> None:
        with file_of(world).i_mmap.read:
            world.mm.mprotect(world.hva, PAGE, 1)

    scheduler = Scheduler()
    scheduler.spawn("upside down", upside_down)
    with checking(), pytest.raises(LockOrderError, match="mmap_lock comes before i_mmap_rwsem") as caught:
        scheduler.run()
    assert "upside_down" in caught.value.first
    assert "mprotect" in caught.value.second
    world.check()
