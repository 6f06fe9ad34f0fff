"""Guests on the notifiers of 2008, and with pinned pages, do what they do on those of today."""

from __future__ import annotations

import io
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.run.command import ISAS, UBOOT, guest, inside, needs_uboot, xipvm
from tests.run.test_coherence import PAGE, World
from xipvm import Console, Event, Machine, Trace, TraceReader
from xipvm import run as run_guest
from xipvm.errors import BadInput, MmError, OutOfFrames
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import ACCESSED, MAPPED, SPECIAL, pte_pfn
from xipvm.mmu.verify import verify

MIB = 1 << 20
MODES: dict[str, dict[str, Any]] = {"2008": {"protocol": "2008"}, "pins": {"pin_sptes": True}}
PAGE_EVENT = "mmu_notifier_invalidate_page"


class End(NamedTuple):
    """What a run leaves."""

    status: int
    instructions: int | None
    console: bytes
    memory: str


def run(name: str, isa: str, *, smp: int = 1, events: list[Event] | None = None, **mode: Any) -> End:
    output = io.BytesIO()
    trace = Trace()
    if events is not None:
        trace.attach(events.append)
    with Machine(guest(name, isa), memory=8 * MIB, smp=smp, console=Console(output), trace=trace, **mode) as machine:
        result = machine.run(max_instructions=20_000_000)
        assert result.reason == "exit", result.report
        verify(machine.host, held=machine.secondary.pins())
        memory = machine.read_physical(machine.board.ram_base, machine.memory_size)
        assert memory is not None
        instructions = result.summary.instructions
    return End(result.status, instructions, output.getvalue(), sha256(memory).hexdigest())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "smp"),
    [("hello", 1), ("pages", 1), ("faults", 1), ("selfmod", 1), ("reprogram", 1), ("user", 1), ("token", 2)],
)
def test_guests_end_the_same(name: str, smp: int, isa: str, mode: str) -> None:
    assert run(name, isa, smp=smp, **MODES[mode]) == run(name, isa, smp=smp)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_announced_when_flash_leaves_its_array(isa: str) -> None:
    """The same ranges in both protocols; in 2008 nobody says why. With pins nobody says anything."""
    told: dict[str, list[tuple[object, ...]]] = {}
    for mode, options in {"modern": {}, **MODES}.items():
        events: list[Event] = []
        run("reprogram", isa, events=events, **options)
        told[mode] = [
            (event.kind, event.fields["start"], event.fields["end"], event.fields["event"])
            for event in events
            if event.kind.startswith("mmu_notifier_invalidate")
        ]
    assert len(told["modern"]) > 10
    assert told["2008"] == [(*event[:3], None) for event in told["modern"]]
    assert told["pins"] == []


class World2008(World):
    """A guest in the middle of a run on the notifiers of 2008, with what reclaim and migration do besides."""

    def __init__(self, name: str, isa: str, *, smp: int = 1) -> None:
        super().__init__(name, isa, smp=smp, protocol="2008")
        self.mm.swapon(4096)

    def frames(self) -> list[tuple[int, int]]:
        """Address and frame of a few pages of RAM that are in memory."""
        found = [(hva, self.mm.pgd.get(hva >> 12)) for hva in self.some()]
        return [(hva, pte_pfn(entry)) for hva, entry in found if entry & MAPPED and not entry & SPECIAL]

    def migrate(self) -> None:
        """Moves pages to other frames."""
        for _, pfn in self.frames():
            try:
                migrate_page(self.machine.host, self.trace, pfn)
            except (MmError, OutOfFrames):  # a fault of the guest holds it
                continue

    def swap(self) -> None:
        """Takes pages out of memory, whoever has used them."""
        for hva, _ in self.frames():
            self.mm.notifiers.clear_flush_young(hva, hva + PAGE)
            self.mm.pgd.set(hva >> 12, self.mm.pgd.get(hva >> 12) & ~ACCESSED)
        self.mm.memcg_enter()
        self.mm.memcg_reclaim(1)

    OPERATIONS: tuple[Callable[..., None], ...] = (*World.OPERATIONS, migrate, swap, migrate, swap)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "smp", "slice_", "operations", "last"),
    [
        ("pages", 1, 5_003, 60, "pages: 0 wrong"),
        ("selfmod", 1, 61, 100, "selfmod: ok"),
        ("reprogram", 1, 97, 100, "reprogram: ok"),
        ("token", 2, 53, 60, "token: 2 cpus, 200 passes, sum 19900 ok"),
    ],
)
def test_between_slices(name: str, smp: int, slice_: int, operations: int, last: str, isa: str) -> None:
    world = World2008(name, isa, smp=smp)
    try:
        assert world.run(slice_, operations) == 0
        assert world.last_line() == last
        assert world.oracle.freed > 20
        kinds = [event.kind for event in world.oracle.events]
        assert min(kinds.count(kind) for kind in (PAGE_EVENT, "swap_out", "page_migrate", "mm_cow")) > 2
    finally:
        world.close()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "smp", "every", "last"),
    [
        ("pages", 1, 97, "pages: 0 wrong"),
        ("selfmod", 1, 1, "selfmod: ok"),
        ("token", 2, 1, "token: 2 cpus, 200 passes, sum 19900 ok"),
    ],
)
@pytest.mark.parametrize("where", ["kvm.fault.seq_read", "kvm.fault.gup_done"])
def test_in_the_middle_of_the_guest_s_own_faults(
    name: str, smp: int, every: int, last: str, where: str, isa: str
) -> None:
    """The fault that is under way has to start over when its page was taken, or a range is open."""
    world = World2008(name, isa, smp=smp)
    try:
        world.run_meddled(where, every, last)
        assert any(event.kind == "kvm_retry" for event in world.oracle.events)
    finally:
        world.close()


# ---- the command line


@pytest.mark.parametrize(
    ("options", "expected"), [(("--protocol", "2008"), ("2008", False)), (("--pin-sptes",), ("modern", True))]
)
def test_the_trace_names_the_protocol(options: tuple[str, ...], expected: tuple[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "t"
    outcome = xipvm("run", guest("hello", "arm64"), *options, "--trace", path)
    assert (outcome.status, outcome.lines[-1]) == (0, "ok")
    with TraceReader(path) as reader:
        assert (reader.machine["protocol"], reader.machine["pin_sptes"]) == expected


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_the_short_form_takes_a_protocol(protocol: str) -> None:
    trace, told = Trace(), []
    trace.attach(lambda event: told.append(event) if event.kind == "mmu_notifier_register" else None)
    result, _ = run_guest(guest("hello", "arm64"), protocol=protocol, trace=trace)
    assert result.status == 0
    assert [event.fields["protocol"] for event in told] == [protocol]


def test_unknown_protocols(tmp_path: Path) -> None:
    outcome = inside("run", guest("hello", "arm64"), "--protocol", "2012", cwd=tmp_path)
    assert outcome.status == 2
    assert "2012" in outcome.err
    with pytest.raises(BadInput, match="known are modern, 2008"):
        Machine(guest("hello", "arm64"), protocol="2012")


@needs_uboot
@pytest.mark.slow
@pytest.mark.parametrize("options", [("--protocol", "2008"), ("--pin-sptes",)])
def test_uboot(options: tuple[str, ...], tmp_path: Path) -> None:
    """A whole session, with the environment written to flash and read back after a reset."""
    script = tmp_path / "script"
    commands = ("version", "flinfo", "setenv colour red", "saveenv", "md.b 0 40", "reset", "", "printenv colour")
    script.write_text("\n" + "".join(f"{command}\n" for command in commands))
    sessions = [xipvm("run", UBOOT, "--input", script, "--until", "=> ", *each) for each in ((), options)]
    assert sessions[0].out == sessions[1].out
    assert [outcome.status for outcome in sessions] == [0, 0]
    assert "colour=red" in sessions[0].lines
