"""Secondary MMUs: what a fault, an invalidation and a flush cost each kind of them; and what a dirty log costs."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks import mirrors, shadow, sva, xpmem
from benchmarks.harness import Bench, Figure, Spread, Target, value
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.machine import Machine
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import READ, RETRY_WALK, WRITE, SecondaryMmu
from xipvm.mmu.secondary.choose import SECONDARIES, make_secondary
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.notifier import MmuNotifiers, RangeEvent
from xipvm.trace.funnel import Trace

_NS, _US = 1e9, 1e6
_RW = PROT_READ | PROT_WRITE
_LOGGED = 256 << 20
_PAGES = 4096
_ROUNDS = 2000
_VCPUS = 4


@dataclass(frozen=True)
class Kind:
    """A secondary MMU to be measured: ``make`` one on an mm, whose pages from 0 on are the bytes from ``hva`` on."""

    make: Callable[[Mm, HostMemory, int, int], SecondaryMmu]
    machine: str = ""
    """The name of the machine that flushes TLBs of it; empty for one that no guest runs behind."""
    follows: bool = False
    """It is told of the host's TLB flushes, and of no ranges."""


def _of_a_guest(name: str) -> Kind:
    def make(mm: Mm, host: HostMemory, hva: int, pages: int) -> SecondaryMmu:
        mmu = make_secondary(name, mm, mm.trace, host)
        mmu.set_memslot(0, 0, pages, hva)
        return mmu.port(0)

    return Kind(make, machine=name)


KINDS: dict[str, Kind] = {name: _of_a_guest(name) for name in SECONDARIES} | {
    "kvm-shadow": Kind(shadow.make, machine="kvm-shadow"),
    "xpmem": Kind(xpmem.make),
    "odp": Kind(mirrors.make_odp),
    "dmirror": Kind(mirrors.make_dmirror),
    "sva": Kind(sva.make, follows=True),
}
"""By name. Those of devices are a line each."""


@contextmanager
def _mapped(kind: Kind, pages: int) -> Iterator[tuple[Mm, SecondaryMmu, int]]:
    """An mm with ``pages`` pages at the returned address, which the secondary MMU shows."""
    host = HostMemory((pages + 64) * PAGE_SIZE)
    mm = Mm(host, Trace())
    try:
        hva = mm.mmap(pages * PAGE_SIZE, _RW)
        yield mm, kind.make(mm, host, hva, pages), hva
    finally:
        mm.exit()
        host.close()


def _all_faults(mmu: SecondaryMmu, access: int, pages: int) -> float:
    """CPU seconds of a fault on every page."""
    fault = mmu.fault
    gc.collect()
    start = time.process_time()
    for page in range(pages):
        if fault(page, access) != RETRY_WALK:
            raise RuntimeError(f"fault at page {page:#x}: {mmu.last_error}")
    return time.process_time() - start


def secondaries(bench: Bench) -> Iterator[Figure]:
    """Fault, invalidation and flush of each kind of secondary MMU."""
    for name, kind in KINDS.items():
        runs: dict[str, Callable[[], float]] = {
            "cold": lambda kind=kind: _fault(kind, cold=True),  # type: ignore[misc]
            "warm": lambda kind=kind: _fault(kind, cold=False),  # type: ignore[misc]
            "many": lambda kind=kind: _dontneed(kind),  # type: ignore[misc]
            "one": lambda kind=kind: _ranges(kind),  # type: ignore[misc]
        }
        if kind.machine:
            runs["flush"] = lambda kind=kind: _flushes(kind)  # type: ignore[misc]
        times = bench.rounds(**runs)
        yield value(f"{name}: a fault, of a page that nobody has touched", times["cold"], unit="µs")
        yield value(f"{name}: a fault, of a page that the host has", times["warm"], unit="µs")
        yield value(f"{name}: MADV_DONTNEED of {_PAGES} pages, each", times["many"], unit="ns")
        what = "a flush of one page that it is told of" if kind.follows else "a range of one page, start to end"
        yield value(f"{name}: {what}", times["one"], unit="µs")
        if kind.machine:
            yield value(f"{name}: all TLBs of {_VCPUS} vCPUs flushed, each", times["flush"], unit="µs")


def _fault(kind: Kind, *, cold: bool) -> float:
    with _mapped(kind, _PAGES) as (mm, mmu, hva):
        if not cold:
            for page in range(_PAGES):
                mm.write(hva + page * PAGE_SIZE, b"x")
        return _all_faults(mmu, WRITE, _PAGES) / _PAGES * _US


def _dontneed(kind: Kind) -> float:
    with _mapped(kind, _PAGES) as (mm, mmu, hva):
        for page in range(_PAGES):
            mm.write(hva + page * PAGE_SIZE, b"x")
        _all_faults(mmu, WRITE, _PAGES)
        start = time.process_time()
        mm.madvise(hva, _PAGES * PAGE_SIZE, MADV_DONTNEED)
        return (time.process_time() - start) / _PAGES * _NS


def _ranges(kind: Kind) -> float:
    """Ranges of one page each that has an entry; the primary entries stay."""
    with _mapped(kind, _ROUNDS) as (mm, mmu, hva):
        _all_faults(mmu, READ, _ROUNDS)
        notifiers = mm.notifiers
        assert isinstance(notifiers, MmuNotifiers)
        start = time.process_time()
        for at in range(hva, hva + _ROUNDS * PAGE_SIZE, PAGE_SIZE):
            if kind.follows:
                notifiers.arch_invalidate_secondary_tlbs(at, at + PAGE_SIZE)
                continue
            with notifiers.invalidate_range(at, at + PAGE_SIZE, RangeEvent.CLEAR):
                pass
        return (time.process_time() - start) / _ROUNDS * _US


def _flushes(kind: Kind) -> float:
    """The engines' flushes: a vCPU that has not been in the guest since the last one is left out of further ones."""
    with Machine(board="virt-arm64", secondary=kind.machine, smp=_VCPUS, memory=4 << 20) as machine:
        start = time.process_time()
        for _ in range(_ROUNDS):
            for vcpu in machine.vcpus:
                vcpu.engine.flush_tlb("benchmark")
        return (time.process_time() - start) / _ROUNDS / _VCPUS * _US


# ---- the dirty log


def dirty(bench: Bench) -> Iterator[Figure]:
    """Dirty logging of 256 MiB: enabled, every page written, harvested; against comparing memory with a copy."""
    pages = _LOGGED >> PAGE_SHIFT
    found: dict[str, list[float]] = {}

    def run() -> float:
        for name, seconds in _logged(pages).items():
            found.setdefault(name, []).append(seconds)
        return 0.0

    bench.rounds(log=run)

    def per_page(name: str) -> list[float]:
        return [seconds / pages * _NS for seconds in found[name]]

    yield value("logging is enabled, a page", per_page("enable"), unit="ns")
    yield value("the first write to a page that is logged (fault and all)", per_page("write"), unit="ns")
    yield value("the same page without logging, at its first write", per_page("first"), unit="ns")
    yield _against("comparing memory / harvest, all pages dirty", found["all"], found["compare"], pages)
    yield _against("comparing memory / harvest, every 16th page dirty", found["few"], found["compare"], pages)
    yield _against("comparing memory / harvest, no page dirty", found["none"], found["compare"], pages)
    yield value("a page of a ring, pushed, harvested and reset", per_page("ring"), unit="ns")


def _against(what: str, harvest: list[float], comparing: list[float], pages: int) -> Figure:
    ratios = [theirs / ours for ours, theirs in zip(harvest, comparing, strict=True)]
    return Figure(
        what,
        "ns",
        Spread.of([seconds / pages * _NS for seconds in harvest]),
        "memcmp, a page",
        Spread.of([seconds / pages * _NS for seconds in comparing]),
        Spread.of(ratios),
        Target(50, at_least=True),
        note="a harvest clears bits, write-protects, and flushes TLBs; a comparison ends with a copy that is as old",
    )


def _logged(pages: int) -> dict[str, float]:
    """CPU seconds of each part."""
    gc.collect()
    host = HostMemory((pages + 64) * PAGE_SIZE)
    mm = Mm(host, Trace())
    times: dict[str, float] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        start = time.process_time()
        function()
        times[name] = time.process_time() - start

    try:
        hva = mm.mmap(pages * PAGE_SIZE, _RW)
        kvm = Kvm(mm, mm.trace, host)
        kvm.set_memslot(0, 0, pages, hva)
        times["first"] = _all_faults(kvm, WRITE, pages)
        timed("enable", lambda: kvm.set_memslot(0, 0, pages, hva, MEM_LOG_DIRTY_PAGES))
        times["write"] = _all_faults(kvm, WRITE, pages)
        logs: list[bytes] = []
        timed("all", lambda: logs.append(kvm.get_dirty_log(0)))
        _write_some(kvm, pages)
        timed("few", lambda: logs.append(kvm.get_dirty_log(0)))
        timed("none", lambda: logs.append(kvm.get_dirty_log(0)))
        if [sum(byte.bit_count() for byte in log) for log in logs] != [pages, pages // 16, 0]:
            raise RuntimeError("the dirty log does not name what was written")
        frames = [mapped[0] for page in range(pages) if (mapped := kvm.translate(page)) is not None]
        first, size = min(frames), len(frames) * PAGE_SIZE
        if len(frames) != pages or max(frames) - first != pages - 1:
            raise RuntimeError("the guest's frames are not in a row")
        there = host.address(first)
        copy = ctypes.create_string_buffer(ctypes.string_at(there, size), size)
        memcmp = ctypes.CDLL(None).memcmp
        memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        timed("compare", lambda: memcmp(there, ctypes.addressof(copy), size))
        times["ring"] = _ring(mm, host, hva, pages)
    finally:
        mm.exit()
        host.close()
    return times


def _write_some(kvm: Kvm, pages: int) -> None:
    for page in range(0, pages, 16):
        kvm.fault(page, WRITE)


class _NoVcpu:
    """A vCPU that has nothing to flush."""

    def flush_tlb(self, reason: str) -> None:
        """See TlbOwner."""

    def kick(self, reason: str) -> None:
        """See TlbOwner."""


def _ring(mm: Mm, host: HostMemory, hva: int, pages: int) -> float:
    """A second VM on the same memory, whose vCPU has a ring that is harvested and reset when it is full."""
    kvm = Kvm(mm, mm.trace, host, name="vm1")
    kvm.enable_dirty_ring(4096)
    vcpu = _NoVcpu()
    kvm.set_memslot(0, 0, pages, hva)
    for page in range(pages):
        kvm.fault(page, WRITE)
    kvm.set_memslot(0, 0, pages, hva, MEM_LOG_DIRTY_PAGES)

    def full(owner: object) -> None:
        kvm.dirty_ring(vcpu).harvest()
        kvm.reset_dirty_rings()

    kvm.on_dirty_ring_full = full
    start = time.process_time()
    for page in range(pages):
        kvm.vcpu_enter(vcpu)
        kvm.fault(page, WRITE)
    seconds = time.process_time() - start
    if kvm.dirty_ring(vcpu).pushed != pages:
        raise RuntimeError("the ring does not have what was written")
    kvm.destroy()
    return seconds
