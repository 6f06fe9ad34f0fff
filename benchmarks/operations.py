"""Operations of the mm on memory that a guest has mapped: ns a page, what they scale with, and what a page costs."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import flashcode, peers
from benchmarks.harness import Bench, Figure, Target, compare, value
from benchmarks.machines import timed
from benchmarks.peers import NotAllowedError
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.machine import Machine
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_PAGEOUT
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import RETRY_WALK, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.tables import PageTable
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace

_NS = 1e9
_SMALL, _LARGE = 64 << 20, 1 << 30
_ROUNDS_LARGE = 2
_SPARE = 64 << 20
_RW = PROT_READ | PROT_WRITE
_SPARSE = 1 << 40
_SPARSE_BASE = 0x1000_0000_0000
_CLUSTER = 256


@dataclass(frozen=True)
class Operation:
    """``run`` is timed, on an mm whose pages ``[hva, hva + size)`` are mapped. ``kernel``: the host's own, in s."""

    name: str
    run: Callable[[Mm, int, int], object]
    kernel: Callable[[int], float]
    swap: bool = False


def _fork(mm: Mm, hva: int, size: int) -> None:
    mm.fork("child")


def _compact(mm: Mm, hva: int, size: int) -> None:
    compact_memory(mm.host, mm.trace)


OPERATIONS = (
    Operation("munmap", lambda mm, hva, size: mm.munmap(hva, size), peers.kernel_munmap),
    Operation("DONTNEED", lambda mm, hva, size: mm.madvise(hva, size, MADV_DONTNEED), peers.kernel_dontneed),
    Operation("mprotect", lambda mm, hva, size: mm.mprotect(hva, size, PROT_READ), peers.kernel_mprotect),
    Operation("fork", _fork, peers.kernel_fork),
    Operation("swap-out", lambda mm, hva, size: mm.madvise(hva, size, MADV_PAGEOUT), peers.kernel_pageout, swap=True),
    Operation("migrate", _compact, peers.kernel_move_pages),
)


def operations(bench: Bench) -> Iterator[Figure]:
    """munmap, DONTNEED, mprotect, fork, swap-out, migrate of 64 MiB and 1 GiB that a guest has written, ns a page."""
    for size, name in ((_SMALL, "64 MiB"), (_LARGE, "1 GiB")):
        rounds = bench if size == _SMALL else replace(bench, repeat=min(bench.repeat, _ROUNDS_LARGE))
        pages = size // PAGE_SIZE
        elf = flashcode.touch(bench.folder / f"touch-{size}.elf", pages=pages)
        for operation in OPERATIONS:
            runs: dict[str, Callable[[], float]] = {"ours": partial(_under_a_guest, operation, elf, size)}
            try:
                operation.kernel(1 << 20)
                runs["kernel"] = partial(operation.kernel, size)
                peer = "host kernel, no guest"
            except NotAllowedError as error:
                peer = f"host kernel: {error}"
            times = rounds.rounds(**runs)
            each = {who: [seconds / pages * _NS for seconds in samples] for who, samples in times.items()}
            what = f"{operation.name}, {name}"
            if "kernel" in each:
                yield compare(f"{what} / host kernel", each["ours"], peer, each["kernel"], unit="ns")
            else:
                yield replace(value(what, each["ours"], unit="ns"), peer=peer)


def _under_a_guest(operation: Operation, elf: Path, size: int) -> float:
    with Machine(guest=elf, memory=2 * size + _SPARE) as machine:
        timed(machine)
        hva = machine.ram + flashcode.TOUCHED - machine.board.ram_base
        return _timed(operation, machine.mm, machine.secondary.sptes, hva, size, size // PAGE_SIZE)


def _timed(operation: Operation, mm: Mm, sptes: PageTable, hva: int, size: int, pages: int) -> float:
    """CPU seconds of ``operation``, which must take ``pages`` pages from the guest."""
    if operation.swap:
        mm.swapon(2 * pages)
    gc.collect()
    before = sptes.present
    start = time.process_time()
    operation.run(mm, hva, size)
    seconds = time.process_time() - start
    if before - sptes.present < pages:
        raise RuntimeError(f"{operation.name} took {before - sptes.present} of {pages} pages from the guest")
    return seconds


# ---- what it scales with


@contextmanager
def _mapped(length: int, clusters: int, pages: int) -> Iterator[tuple[Mm, Kvm, int]]:
    """A mapping of ``length`` bytes of which a guest has written ``pages`` pages in ``clusters`` runs; mm, VM, hva."""
    host = HostMemory(4 * pages * PAGE_SIZE)
    trace = Trace()
    mm = Mm(host, trace)
    try:
        hva = mm.mmap(length, _RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=_SPARSE_BASE)
        kvm = Kvm(mm, trace, host)
        seen = min(length, 1 << 38) >> PAGE_SHIFT  # what a guest of 39 bits can see beside anything else
        kvm.set_memslot(0, 0, seen, hva)
        run = pages // clusters
        for cluster in range(clusters):
            first = cluster * (seen // clusters)
            for gfn in range(first, first + run):
                if kvm.fault(gfn, WRITE) != RETRY_WALK:
                    raise RuntimeError(f"fault at guest frame {gfn:#x}: {kvm.last_error}")
                mapped = kvm.translate(gfn)
                assert mapped is not None
                host.write(mapped[0], 0, b"written")
        yield mm, kvm, hva
    finally:
        mm.exit()
        host.close()


def sparse(bench: Bench) -> Iterator[Figure]:
    """The same 16384 pages in a mapping of 64 MiB, and scattered over one of 1 TiB: the whole mapping, ns a page."""
    runs = _SMALL // PAGE_SIZE // _CLUSTER
    for operation in OPERATIONS:
        times = bench.rounds(
            dense=partial(_scattered, operation, _SMALL, 1), sparse=partial(_scattered, operation, _SPARSE, runs)
        )
        yield compare(
            f"{operation.name}, 1 TiB / 64 MiB",
            times["sparse"],
            "64 MiB",
            times["dense"],
            unit="ns",
            target=Target(1.5),
            note=f"in runs of {_CLUSTER} pages, each with a page table of its own, which it half fills",
        )


def _scattered(operation: Operation, length: int, clusters: int) -> float:
    pages = _SMALL // PAGE_SIZE
    with _mapped(length, clusters, pages) as (mm, kvm, hva):
        return _timed(operation, mm, kvm.sptes, hva, length, pages) / pages * _NS


# ---- what a page costs


def metadata(bench: Bench) -> Iterator[Figure]:
    """Bytes that are kept for a frame, for an entry of the secondary MMU, and for a page of a guest in all."""
    pages = _LARGE // PAGE_SIZE
    frame: list[float] = []
    entry: list[float] = []
    primary: list[float] = []

    def whole() -> float:
        gc.collect()
        before = _resident()
        with _mapped(_LARGE, 1, pages) as (mm, kvm, _):
            gc.collect()
            frame.append(mm.host.meta_view().dtype.itemsize)
            entry.append(kvm.sptes.tables * PAGE_SIZE / kvm.sptes.present)
            primary.append(mm.pgd.tables * PAGE_SIZE / mm.pgd.present)
            return (_resident() - before) / pages - PAGE_SIZE

    with _mapped(PAGE_SIZE, 1, 1) as (mm, _, _):
        mm.host.meta_view()  # imports numpy
    alone = bench if bench.repeat == 1 else replace(bench, repeat=_ROUNDS_LARGE)
    times = alone.rounds(whole=whole)
    yield value("a frame: its record", frame, unit="B", target=Target(64, of_value=True))
    yield value("an spte, its share of the tables included", entry, unit="B", target=Target(8.1, of_value=True))
    yield value("a primary entry, likewise", primary, unit="B", target=Target(8.1, of_value=True))
    yield value(
        "resident memory of the process, a page of 1 GiB, less the page",
        times["whole"],
        unit="B",
        target=Target(96, of_value=True),
        note="records of frames that are free are not resident before they are used",
    )


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
