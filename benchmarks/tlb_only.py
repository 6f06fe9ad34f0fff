"""Secondary MMUs that have TLBs only, beside KVM: what a fault costs, what an invalidation, what a flush of much."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.harness import Bench, Figure, compare
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import READ, WRITE
from xipvm.mmu.secondary.gru_2008 import gru_of
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.secondary.sva import Sva
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.notifier import RangeEvent
from xipvm.trace.funnel import Trace

_PAGES = 16384
_US, _NS = 1e6, 1e9


@dataclass
class _Times:
    """µs a fault, µs an invalidation of one page, ns a page of all in one range."""

    fault: float
    one: float
    all: float


def _measured(make: Callable[[Mm, int], tuple[Callable[[int], object], Callable[[int, int], object]]]) -> _Times:
    """``make`` gives what brings a page in, and what announces that bytes ``[start, end)`` change."""
    host = HostMemory((_PAGES + 64) * PAGE_SIZE)
    try:
        mm = Mm(host, Trace())
        hva = mm.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE)
        for page in range(_PAGES):
            mm.get_user_pages(hva + page * PAGE_SIZE, write=True)
        bring, announce = make(mm, hva)
        gc.collect()

        def timed(run: Callable[[], object]) -> float:
            start = time.process_time()
            run()
            return (time.process_time() - start) / _PAGES

        def faults() -> None:
            for page in range(_PAGES):
                bring(page)

        def ones() -> None:
            for at in range(hva, hva + _PAGES * PAGE_SIZE, PAGE_SIZE):
                announce(at, at + PAGE_SIZE)

        fault, one = timed(faults), timed(ones)
        faults()
        whole = timed(lambda: announce(hva, hva + _PAGES * PAGE_SIZE))
        mm.exit()
        return _Times(fault * _US, one * _US, whole * _NS)
    finally:
        host.close()


def _guest(mm: Mm, hva: int, mmu: GuestMmu) -> tuple[Callable[[int], object], Callable[[int, int], object]]:
    mmu.set_memslot(0, 0, _PAGES, hva)
    port = mmu.port(0)

    def announce(start: int, end: int) -> None:
        with mm.notifiers.invalidate_range(start, end, RangeEvent.CLEAR):
            pass

    return lambda page: port.fault(page, WRITE), announce


def _sva(mm: Mm, hva: int) -> tuple[Callable[[int], object], Callable[[int, int], object]]:
    device, first = Sva(mm), hva >> PAGE_SHIFT
    return lambda page: device._walk(first + page, READ), mm.notifiers.arch_invalidate_secondary_tlbs


def tlbs(bench: Bench) -> Iterator[Figure]:
    """GRU and SVA beside KVM: a fault of a page that the host has, an invalidation of it, a flush of 64 MiB."""
    found: dict[str, list[_Times]] = {"kvm": [], "gru": [], "sva": []}

    def run(
        name: str, make: Callable[[Mm, int], tuple[Callable[[int], object], Callable[[int, int], object]]]
    ) -> float:
        found[name].append(_measured(make))
        return 0.0

    bench.rounds(
        kvm=lambda: run("kvm", lambda mm, hva: _guest(mm, hva, kvm_of(mm, mm.trace, mm.host))),
        gru=lambda: run("gru", lambda mm, hva: _guest(mm, hva, gru_of(mm, mm.trace, mm.host))),
        sva=lambda: run("sva", _sva),
    )
    what = {
        "fault": ("fault of a page that the host has", "µs"),
        "one": ("invalidation of one page", "µs"),
        "all": ("invalidation of 64 MiB, a page", "ns"),
    }
    for name in ("gru", "sva"):
        for each, (words, unit) in what.items():
            ours = [getattr(times, each) for times in found[name]]
            theirs = [getattr(times, each) for times in found["kvm"]]
            yield compare(f"{name}: {words} / kvm", ours, "kvm", theirs, unit=unit)
