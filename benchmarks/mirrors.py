"""Devices that watch a range and pin nothing: what a fault costs, an invalidation, a page's way to the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.harness import Bench, Figure, compare, value
from xipvm.address import PAGE_SIZE
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import WRITE
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.notifier import RangeEvent
from xipvm.trace.funnel import Trace

_PAGES: Final = 4096
_US: Final = 1e6

Phases = dict[str, Callable[[], object]]
"""What is timed, in this order, by name; each does _PAGES times the same."""


def _timed(make: Callable[[Mm, int], Phases]) -> dict[str, float]:
    """µs a page of every phase, on memory that the host has written."""
    host = HostMemory((2 * _PAGES + 64) * PAGE_SIZE)
    try:
        mm = Mm(host, Trace())
        hva = mm.mmap(_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE)
        for page in range(_PAGES):
            mm.get_user_pages(hva + page * PAGE_SIZE, write=True)
        found = {}
        phases = make(mm, hva)
        gc.collect()
        for name, phase in phases.items():
            start = time.process_time()
            phase()
            found[name] = (time.process_time() - start) / _PAGES * _US
        mm.exit()
        return found
    finally:
        host.close()


def _announce(mm: Mm, hva: int, pages: int) -> None:
    for at in range(hva, hva + _PAGES * PAGE_SIZE, pages * PAGE_SIZE):
        with mm.notifiers.invalidate_range(at, at + pages * PAGE_SIZE, RangeEvent.CLEAR):
            pass


def _phases(mm: Mm, hva: int, fault: Callable[[int], object]) -> Phases:
    def faults() -> None:
        for page in range(_PAGES):
            fault(page)

    return {
        "fault": faults,
        "one": lambda: _announce(mm, hva, 1),
        "again": faults,
        "all": lambda: _announce(mm, hva, _PAGES),
    }


def _kvm(mm: Mm, hva: int) -> Phases:
    kvm = Kvm(mm, mm.trace, mm.host)
    kvm.set_memslot(0, 0, _PAGES, hva)
    return _phases(mm, hva, lambda page: kvm.fault(page, WRITE))


def _odp(mm: Mm, hva: int) -> Phases:
    umem = OdpUmem(mm, hva, _PAGES * PAGE_SIZE)

    def accesses() -> None:
        for page in range(_PAGES):
            umem.read(page, 64)

    phases = _phases(mm, hva, lambda page: umem.fault(page, WRITE))
    return {**phases, "mapped": lambda: umem.map_dma(0, _PAGES, write=True), "access": accesses}


def _dmirror(mm: Mm, hva: int) -> Phases:
    device, first = Dmirror(mm, pages=_PAGES), hva // PAGE_SIZE
    phases = _phases(mm, hva, lambda page: device.fault(first + page, WRITE))
    return {
        **phases,
        "there": lambda: device.migrate_to_dev(hva, _PAGES),
        "back": lambda: device.migrate_to_sys(hva, _PAGES),
    }


def mirrors(bench: Bench) -> Iterator[Figure]:
    """An ODP region and dmirror beside KVM: a fault, an invalidation, a range of 16 MiB; and what only they do."""
    found: dict[str, list[dict[str, float]]] = {"kvm": [], "odp": [], "dmirror": []}

    def run(name: str, make: Callable[[Mm, int], Phases]) -> float:
        found[name].append(_timed(make))
        return 0.0

    bench.rounds(kvm=lambda: run("kvm", _kvm), odp=lambda: run("odp", _odp), dmirror=lambda: run("dmirror", _dmirror))
    for name in ("odp", "dmirror"):
        for phase, words in (
            ("fault", "fault of a page that the host has"),
            ("one", "invalidation of one page"),
            ("all", "invalidation of 16 MiB, a page"),
        ):
            ours, theirs = ([times[phase] for times in found[each]] for each in (name, "kvm"))
            yield compare(f"{name}: {words} / kvm", ours, "kvm", theirs, unit="µs")
    for name, phase, words in (
        ("odp", "mapped", "4096 pages mapped at once, a page"),
        ("odp", "access", "a read of 64 bytes that is mapped"),
        ("dmirror", "there", "a page to the device, and read there"),
        ("dmirror", "back", "and back"),
    ):
        yield value(f"{name}: {words}", [times[phase] for times in found[name]], unit="µs")
