"""Flash: how long a bank takes to leave read-array mode and return to it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import flashcode
from benchmarks.harness import Bench, Figure, MissingPeerError, Target, compare, value
from benchmarks.machines import timed, timed_once
from benchmarks.peers import Qemu
from xipvm.machine import Machine

_PAGES = 256
_ROUNDS = 1500
_READ_STATUS = 0x0070_0070
_READY = 0x0080_0080
_READ_ARRAY = 0x00FF_00FF
_MS = 1e3


def modeswitch(bench: Bench) -> Iterator[Figure]:
    """Read array → status → read array of a 64 MiB bank from which 256 pages were executed, ms."""
    busy = flashcode.switch(bench.folder / "switch.elf", pages=_PAGES, rounds=_ROUNDS, switches=True)
    idle = flashcode.switch(bench.folder / "idle.elf", pages=_PAGES, rounds=_ROUNDS, switches=False)

    def ours() -> float:
        return (timed_once(busy, "instructions") - timed_once(idle, "instructions")) / _ROUNDS * _MS

    def alone() -> float:
        with Machine(guest=idle) as machine:
            timed(machine)
            bus = machine.bus
            if machine.group.executed(machine.flash[0].first, _PAGES + 1) < _PAGES:
                raise RuntimeError("the guest did not execute its flash pages")
            start = time.process_time()
            bus.write(0, 4, _READ_STATUS)
            status = bus.read(0, 4)
            bus.write(0, 4, _READ_ARRAY)
            seconds = time.process_time() - start
        if status != _READY:
            raise RuntimeError(f"the chips' status is {status:#x}")
        return seconds * _MS

    runs = {"alone": alone, "xipvm": ours}
    try:
        with_switches, without = Qemu(busy, bench.folder), Qemu(idle, bench.folder)
        runs["qemu"] = lambda: (with_switches.cpu() - without.cpu()) / _ROUNDS * _MS
    except MissingPeerError as missing:
        bench.say(str(missing))
    times = bench.rounds(**runs)
    yield value("switch alone", times["alone"], unit="ms", target=Target(1, of_value=True))
    what = f"switch by the guest, and its {_PAGES} pages executed again"
    if "qemu" in times:
        yield compare(f"{what} / QEMU", times["xipvm"], "QEMU", times["qemu"], unit="ms")
    else:
        yield value(what, times["xipvm"], unit="ms")
