"""Guests behind each secondary MMU: they compute the same, calmly and under storms, and nothing is out of order."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.run.command import UBOOT, inside, needs_uboot
from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.errors import BadInput
from xipvm.machine import Machine
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.secondary.choose import SECONDARIES
from xipvm.mmu.secondary.gru import GruBase
from xipvm.mmu.secondary.sva_dma import SvaSpace
from xipvm.storm import Storm
from xipvm.storm.check import Job, difference, run_once, stormy_limit
from xipvm.trace import Event, Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")


def elf(guest: str, isa: str = "arm64") -> str:
    return str(BIN / isa / f"{guest}-{isa}.elf")


@pytest.mark.parametrize("protocol", ["modern", "2008"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("guest", ["hello", "reprogram", "faults", "user"])
def test_a_guest_computes_the_same_behind_a_gru(guest: str, isa: str, protocol: str) -> None:
    kvm = run_once(Job(elf(guest, isa), protocol=protocol))
    gru = run_once(Job(elf(guest, isa), protocol=protocol, secondary="gru"))
    assert kvm.reason == gru.reason == "exit"
    assert difference(kvm, gru) == ""


@pytest.mark.parametrize("isa", ISAS)
def test_the_oracle_over_a_gru(isa: str) -> None:
    oracle, trace = Oracle(), Trace()
    events: list[Event] = []
    trace.attach(oracle)
    keep = events.append
    trace.attach(keep)
    with Machine(elf("reprogram", isa), secondary="gru", trace=trace, console=Console(io.BytesIO())) as machine:
        assert machine.run().status == 0
        assert isinstance(machine.secondary, GruBase)
        assert machine.secondary.sptes.present == 0
        assert at_rest.difference(machine.secondary) == ""
        trace.detach(oracle)  # closing takes everything away at once
        trace.detach(keep)
    assert oracle.violations == []
    kinds = {event.kind for event in events}
    assert kinds >= {"tlb_miss", "tlb_dropin", "tlb_insert", "tlb_invalidate", "tlb_flush"}
    assert not {kind for kind in kinds if kind.startswith(("spte", "kvm"))}
    misses = sum(event.kind == "tlb_miss" for event in events)
    assert misses == machine.summary().guest_faults


@pytest.mark.parametrize("smp", [2, 4])
def test_a_gru_for_several_vcpus(smp: int) -> None:
    oracle, trace = Oracle(), Trace()
    trace.attach(oracle)
    storm = Storm(5, rate=200)
    with Machine(
        elf("token"), secondary="gru", smp=smp, trace=trace, storm=storm, console=Console(io.BytesIO())
    ) as machine:
        machine.run(max_instructions=400_000)
        assert {context.space.chiplet.number for context in machine.secondary.contexts} == {0, 1}  # type: ignore[attr-defined]
        trace.detach(oracle)
    assert oracle.violations == []
    assert oracle.checks["I2"] > 50


@pytest.mark.parametrize("protocol", ["modern", "2008"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_storm_over_a_gru_does_not_show(isa: str, protocol: str) -> None:
    job = Job(elf("reprogram", isa), protocol=protocol, secondary="gru")
    calm = run_once(job)
    for seed in (1, 2):
        storm = Storm(seed, rate=500)
        stormy = run_once(job, storm, limit=stormy_limit(calm))
        assert difference(calm, stormy) == ""
        assert storm.done.total() > 30


@pytest.mark.parametrize("secondary", SECONDARIES)
@pytest.mark.parametrize(
    ("guest", "devices"), [("reprogram", ()), pytest.param("dma", ("sva",), marks=pytest.mark.slow)]
)
def test_at_every_quiescent_point_every_view_is_the_host_s(
    guest: str, devices: tuple[str, ...], secondary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_due = Storm.run_due
    looked = 0

    def looks(self: Storm, now: int) -> None:
        nonlocal looked
        run_due(self, now)
        looked += 1
        assert [at_rest.difference(mmu) for mmu in machine.secondaries()] == [""] * (1 + len(devices))

    monkeypatch.setattr(Storm, "run_due", looks)
    storm = Storm(11, rate=30 if devices else 1000)
    with Machine(
        elf(guest),
        memory=4 << 20,
        secondary=secondary,
        devices=devices,
        storm=storm,
        console=Console(io.BytesIO()),
    ) as machine:
        assert machine.run().status == 0
    assert looked > 10


def test_a_stormy_run_is_a_function_of_its_inputs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = ["--quiet", "--secondary", "gru", "--storm", "3,rate=300", "--trace", tmp_path / name]
        assert inside("run", *options, elf("faults"), cwd=tmp_path).status == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_a_guest_that_has_no_room_behind_a_gru() -> None:
    swapping = Job(elf("pages"), secondary="gru", host_memory=8 << 20, swap="64M")
    assert difference(run_once(Job(elf("pages"))), run_once(swapping)) == ""


@pytest.mark.slow
@needs_uboot
def test_a_firmware_behind_a_gru(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("\nsetenv greeting hello\nsaveenv\nprintenv greeting\n")
    assert inside("flash", "create", "flash.img", "--board", "virt-arm64", cwd=tmp_path).status == 0
    options = ["--secondary", "gru", "--flash", "flash.img", "--input", script, "--until", "=> "]
    calm = inside("storm", *options, "--seeds", 1, UBOOT, cwd=tmp_path)
    assert calm.status == 0, calm
    outcome = inside("run", "--check", *options, UBOOT, cwd=tmp_path)
    assert outcome.status == 0, outcome
    assert "greeting=hello" in outcome.lines
    assert " 0 violations" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("guest", ["paging", "processes"])
def test_a_guest_with_its_own_page_tables_behind_a_gru(guest: str, isa: str) -> None:
    kvm, job = run_once(Job(elf(guest, isa))), Job(elf(guest, isa), secondary="gru")
    calm = run_once(job)
    assert difference(kvm, calm) == ""
    assert difference(calm, run_once(job, Storm(4, rate=100), limit=stormy_limit(calm))) == ""


# ---- a DMA engine by SVA


@pytest.mark.slow
@pytest.mark.parametrize("secondary", SECONDARIES)
def test_a_guest_s_dma_by_sva(secondary: str) -> None:
    job = Job(elf("dma"), secondary=secondary, devices=("sva",))
    calm = run_once(job)
    assert (calm.reason, calm.status) == ("exit", 0), calm.output
    stormy = run_once(job, Storm(1, rate=40), limit=stormy_limit(calm))
    assert difference(calm, stormy) == ""
    assert stormy.done["second-vm"] > 0, "three secondary MMUs are on the mm at once"


def test_a_view_that_is_not_the_host_s_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_once(Job(elf("hello"), secondary="gru"))
    assert found.reason == "exit"
    monkeypatch.setattr(at_rest, "difference", lambda mmu: f"{mmu.name} is wrong")
    assert run_once(Job(elf("hello"), secondary="gru")).error == "InternalError: gru-mm0 is wrong"


def test_every_view_of_a_machine_is_looked_at() -> None:
    with Machine(elf("dma"), secondary="gru", devices=["sva"], console=Console(io.BytesIO())) as machine:
        machine.run(max_instructions=3_000_000)
        assert isinstance(machine.dma, SvaSpace)
        assert [mmu.name for mmu in machine.secondaries()] == ["gru-mm0", "sva0"]
        assert len(list(machine.dma.sva.backing())) > 10
        assert [at_rest.difference(mmu) for mmu in machine.secondaries()] == ["", ""]


# ---- what does not go together


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--secondary", "gruu"], f"no secondary MMU is called 'gruu'; known are {', '.join(SECONDARIES)}"),
        (["--secondary", "gru", "--pin-sptes"], "the secondary MMU gru cannot do without notifiers"),
        (["--device", "sva", "--protocol", "2008"], "sva cannot work with the 2008 protocol"),
        (["--device", "sva", "--device", "odp"], "there is one DMA engine: odp or sva, not both"),
    ],
)
def test_what_is_refused(options: list[str], what: str, tmp_path: Path) -> None:
    outcome = inside("run", *options, elf("hello"), cwd=tmp_path)
    assert outcome.status == 2
    assert what in outcome.err


def test_a_name_that_is_none() -> None:
    with pytest.raises(BadInput, match="known are kvm, kvm-shadow, gru"):
        Machine(elf("hello"), secondary="mmu")
