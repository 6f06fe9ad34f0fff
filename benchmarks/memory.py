"""Memory: TLB misses, cold faults, and pages taken away under a guest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from benchmarks import flashcode
from benchmarks.harness import Bench, Figure, Target, compare, value
from benchmarks.machines import guest, recorded, timed, timed_once
from benchmarks.peers import RawUnicorn, kernel_dontneed, kernel_supply, raw_once
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.machine import Machine
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.secondary.base import RETRY_WALK, WRITE
from xipvm.trace.funnel import Trace

_THRASH_ACCESSES = 8 << 20
_COLD_PAGES = 8192
_DROPPED = 64 << 20
_NS = 1e9
_US = 1e6


def thrash(bench: Bench) -> Iterator[Figure]:
    """Loads from page to page over 2048 pages, ns an access: nearly all of them miss the TLB."""
    elf = guest("thrash")
    times = bench.rounds(
        raw=partial(raw_once, elf),
        host=partial(timed_once, elf, "host"),
        instructions=partial(timed_once, elf, "instructions"),
    )
    each = {name: [seconds / _THRASH_ACCESSES * _NS for seconds in values] for name, values in times.items()}
    raw = each["raw"]
    yield compare("clock host / raw", each["host"], "raw Unicorn", raw, unit="ns", target=Target(1.5))
    yield compare("clock instructions / raw", each["instructions"], "raw Unicorn", raw, unit="ns", target=Target(1.5))


def coldfault(bench: Bench) -> Iterator[Figure]:
    """A store to a page that nobody has touched, µs: first pass less a second one over the same pages."""
    elf = guest("coldfault")
    fault: list[float] = []
    lookup: list[float] = []

    def ours() -> float:
        with Machine(guest=elf) as machine:
            cold = timed(machine)
            machine.request_reset()
            return (cold - timed(machine)) / _COLD_PAGES * _US

    def theirs() -> float:
        engine = RawUnicorn(elf)
        return (engine.timed() - engine.timed()) / _COLD_PAGES * _US

    def parts() -> float:
        with Machine(guest=elf) as machine:
            secondary, mm = machine.secondary, machine.mm
            base = machine.board.ram_base >> PAGE_SHIFT
            fresh = range(_COLD_PAGES, 2 * _COLD_PAGES)
            start = time.process_time()
            for gfn in range(base + fresh.start, base + fresh.stop):
                if secondary.fault(gfn, WRITE) != RETRY_WALK:
                    raise RuntimeError(f"fault at guest frame {gfn:#x}: {secondary.last_error}")
            fault.append((time.process_time() - start) / len(fresh) * _US)
            fresh = range(2 * _COLD_PAGES, 3 * _COLD_PAGES)
            start = time.process_time()
            for page in fresh:
                mm.get_user_pages(machine.ram + page * PAGE_SIZE, write=True)
            lookup.append((time.process_time() - start) / len(fresh) * _US)
            return fault[-1]

    times = bench.rounds(
        raw=theirs,
        xipvm=ours,
        parts=parts,
        supply=lambda: kernel_supply(_COLD_PAGES * PAGE_SIZE) / _COLD_PAGES * _US,
    )
    yield compare(
        "cold fault / the host's own",
        times["xipvm"],
        "raw Unicorn",
        times["raw"],
        unit="µs",
        target=Target(6, of_value=True),
        note="both contain the host kernel's own fault of anonymous memory",
    )
    supply = times["supply"]
    yield value("of it: the host's kernel supplies the arena's page", supply, unit="µs")
    yield value("of it: get_user_pages (VMA, new frame, entry)", lookup, unit="µs")
    kvm = [whole - part for whole, part in zip(fault, lookup, strict=True)]
    yield value("of it: Kvm.fault around that (memslot, retry check, spte)", kvm, unit="µs")
    rest = [whole - part - host for whole, part, host in zip(times["xipvm"], fault, supply, strict=True)]
    yield value("of it: engine, walker and callback", rest, unit="µs")


def dontneed(bench: Bench) -> Iterator[Figure]:
    """madvise(MADV_DONTNEED) of 64 MiB that the guest has touched, ns a page."""
    pages = _DROPPED // PAGE_SIZE
    elf = flashcode.touch(bench.folder / "touch.elf", pages=pages)

    def ours(file: Path | None) -> float:
        with (
            nullcontext(Trace()) if file is None else recorded(file) as trace,
            Machine(guest=elf, trace=trace) as machine,
        ):
            timed(machine)
            hva = machine.ram + flashcode.TOUCHED - machine.board.ram_base
            before = machine.secondary.sptes.present
            start = time.process_time()
            machine.mm.madvise(hva, _DROPPED, MADV_DONTNEED)
            seconds = time.process_time() - start
            if before - machine.secondary.sptes.present != pages:
                raise RuntimeError("MADV_DONTNEED did not take every page from the guest")
            return seconds / pages * _NS

    times = bench.rounds(
        kernel=lambda: kernel_dontneed(_DROPPED) / pages * _NS,
        untraced=lambda: ours(None),
        traced=lambda: ours(bench.folder / "dontneed.trace"),
    )
    for name in ("untraced", "traced"):
        yield compare(
            f"64 MiB, {name} / host kernel",
            times[name],
            "host kernel, no guest",
            times["kernel"],
            unit="ns",
            target=Target(140, of_value=True),
            note="KVM's shadow pages alone, published: 88 ns (README.md)",
        )
