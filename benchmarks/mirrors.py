"""Devices that watch a range and pin nothing: what mapping costs them, an access, a page's way to a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.harness import Bench, Figure, value
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import SecondaryMmu
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace

_PAGES: Final = 4096
_US: Final = 1e6

Phases = dict[str, Callable[[], object]]
"""What is timed, in this order, by name; each does something for _PAGES pages."""


def make_odp(mm: Mm, host: HostMemory, hva: int, pages: int) -> SecondaryMmu:
    """A region whose pages from 0 on are the bytes from ``hva`` on."""
    return OdpUmem(mm, hva, pages << PAGE_SHIFT)


class _FromZero(Dmirror):
    """Its pages count from ``first``, where a mirror's are those of addresses."""

    first = 0

    def fault(self, page: int, access: int) -> int:
        """See the base."""
        return super().fault(self.first + page, access)


def make_dmirror(mm: Mm, host: HostMemory, hva: int, pages: int) -> SecondaryMmu:
    """A mirror whose pages from 0 on are those."""
    mirror = _FromZero(mm)
    mirror.first = hva >> PAGE_SHIFT
    return mirror


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


def _odp(mm: Mm, hva: int) -> Phases:
    umem = OdpUmem(mm, hva, _PAGES * PAGE_SIZE)

    def accesses() -> None:
        for page in range(_PAGES):
            umem.read(page, 64)

    return {"mapped": lambda: umem.map_dma(0, _PAGES, write=True), "access": accesses}


def _dmirror(mm: Mm, hva: int) -> Phases:
    device = Dmirror(mm, pages=_PAGES)
    return {
        "there": lambda: device.migrate_to_dev(hva, _PAGES),
        "back": lambda: device.migrate_to_sys(hva, _PAGES),
        "exclusive": lambda: device.exclusive(hva, _PAGES),
    }


def mirrors(bench: Bench) -> Iterator[Figure]:
    """An ODP region and dmirror: 16 MiB mapped at once, accesses, pages to a device and back."""
    found: dict[str, list[dict[str, float]]] = {"odp": [], "dmirror": []}

    def run(name: str, make: Callable[[Mm, int], Phases]) -> float:
        found[name].append(_timed(make))
        return 0.0

    bench.rounds(odp=lambda: run("odp", _odp), dmirror=lambda: run("dmirror", _dmirror))
    for name, phase, words in (
        ("odp", "mapped", "4096 pages mapped at once, a page"),
        ("odp", "access", "a read of 64 bytes that is mapped"),
        ("dmirror", "exclusive", "a page for the device alone, and read there"),
        ("dmirror", "there", "a page to the device, and read there"),
        ("dmirror", "back", "and back"),
    ):
        yield value(f"{name}: {words}", [times[phase] for times in found[name]], unit="µs")
