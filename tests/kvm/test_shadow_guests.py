"""Guests behind shadow paging compute what they compute behind two dimensions, calmly and under storms."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from tests.run.command import UBOOT, inside, needs_uboot
from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.machine import Machine
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.secondary.shadow import ShadowPaging
from xipvm.storm import Storm
from xipvm.storm.check import Job, difference, run_once, stormy_limit
from xipvm.trace import Event, Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")
SHADOW: dict[str, Any] = {"secondary": "kvm-shadow"}


def elf(guest: str, isa: str) -> str:
    return str(BIN / isa / f"{guest}-{isa}.elf")


def run(guest: str, isa: str, **options: Any) -> tuple[bytes, list[Event], Machine]:
    """What it prints, what happens, and the machine (closed); under the oracle, and with every view the host's."""
    trace, oracle, out = Trace(), Oracle(), io.BytesIO()
    events: list[Event] = []
    trace.attach(oracle)
    keep = events.append
    trace.attach(keep)
    with Machine(elf(guest, isa), trace=trace, console=Console(out), **(SHADOW | options)) as machine:
        result = machine.run(max_instructions=100_000_000)
        assert (result.status, result.reason) == (0, "exit")
        assert [at_rest.difference(mmu) for mmu in machine.secondaries()] == [""]
        if machine.dirty_log is not None:
            machine.dirty_log.collect()
        trace.detach(oracle)  # closing takes everything away at once
        trace.detach(keep)
    assert oracle.violations == []
    return out.getvalue(), events, machine


@pytest.mark.parametrize("protocol", ["modern", "2008"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "guest",
    [
        "hello",
        "user",
        "paging",
        "faults",
        "selfmod",
        *(pytest.param(guest, marks=pytest.mark.slow) for guest in ("processes", "rights")),
    ],
)
def test_a_guest_computes_the_same(guest: str, isa: str, protocol: str) -> None:
    kvm = run_once(Job(elf(guest, isa), protocol=protocol))
    shadow = run_once(Job(elf(guest, isa), protocol=protocol, **SHADOW))
    assert shadow.reason == "exit"
    assert difference(kvm, shadow) == ""


@pytest.mark.parametrize("isa", ISAS)
def test_what_happens_on_the_way(isa: str) -> None:
    out, events, machine = run("paging", isa)
    assert out.replace(b"\r", b"").endswith(b"paging: ok\n")
    kinds = {event.kind for event in events}
    assert kinds >= {"shadow_set", "shadow_zap", "shadow_unsync", "shadow_sync", "spte_set", "spte_protect"}
    assert isinstance(machine.secondary, ShadowPaging)
    several: dict[int, set[int]] = {}
    for event in events:
        if event.kind == "shadow_set":
            several.setdefault(event.fields["gfn"], set()).add(event.fields["gva"])
    assert any(len(addresses) > 1 for addresses in several.values())


@pytest.mark.parametrize("isa", ISAS)
def test_without_translation_nothing_is_shadowed(isa: str) -> None:
    _, events, machine = run("selfmod", isa)
    assert not {event.kind for event in events if event.kind.startswith("shadow")}
    assert machine.secondary.shadow is not None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("smp", [2, 4])
def test_several_vcpus_with_tables_of_their_own(smp: int, isa: str) -> None:
    assert run("shootdown", isa, smp=smp)[0] == run("shootdown", isa, smp=smp, secondary="kvm")[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_processes_have_roots_of_their_own(isa: str) -> None:
    out, events, _ = run("processes", isa)
    assert out.endswith(b"processes: 3762e5b6 ok\r\n")
    roots = {event.fields["root"] for event in events if event.kind == "shadow_set"}
    gone = {event.fields["root"] for event in events if event.kind == "shadow_root_gone"}
    assert len(roots) > 4
    assert gone < roots


@pytest.mark.parametrize("isa", ISAS)
def test_a_few_roots_will_do(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShadowPaging, "max_shadow_pages", 6)
    out, events, _ = run("shootdown", isa, smp=3)
    assert out == run("shootdown", isa, smp=3, secondary="kvm")[0]
    assert "shadow_root_gone" in {event.kind for event in events}


@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, 256])
@pytest.mark.parametrize("isa", ISAS)
def test_the_dirty_log_sees_what_is_written_by_any_address(isa: str, ring: int) -> None:
    """The walker of two dimensions has the guest's tables mapped, and they count as written: here they are not."""

    def pages(secondary: str) -> set[tuple[int, int]]:
        machine = run("processes", isa, dirty_log=ring, secondary=secondary)[2]
        assert machine.dirty_log is not None
        return machine.dirty_log.pages

    shadow, kvm = pages("kvm-shadow"), pages("kvm")
    assert shadow <= kvm
    assert 2 * len(shadow) > len(kvm)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("guest", "rate"), [("paging", 500), pytest.param("processes", 5, marks=pytest.mark.slow)])
def test_a_storm_does_not_show(guest: str, rate: int, isa: str) -> None:
    job = Job(elf(guest, isa), **SHADOW)
    calm = run_once(job)
    for seed in (1, 2):
        storm = Storm(seed, rate=rate)
        stormy = run_once(job, storm, limit=stormy_limit(calm))
        assert difference(calm, stormy) == ""
        assert storm.done.total() > 20


@pytest.mark.parametrize("isa", ISAS)
def test_the_oracle_over_a_storm(isa: str) -> None:
    _, events, _ = run("shootdown", isa, smp=2, storm=Storm(3, rate=50))
    assert sum(event.kind == "mmu_notifier_invalidate_range_start" for event in events) > 20


def test_a_stormy_run_is_a_function_of_its_inputs() -> None:
    def told() -> list[tuple[str, dict[str, Any]]]:
        return [(event.kind, event.fields) for event in run("paging", "riscv64", storm=Storm(5, rate=400))[1]]

    first = told()
    assert first == told()
    assert any(kind == "shadow_zap" for kind, _ in first)


@pytest.mark.slow
@needs_uboot
def test_a_firmware(tmp_path: Path) -> None:
    options = ["--secondary", "kvm-shadow", "--check", "--until", "=> "]
    assert inside("run", *options, UBOOT, cwd=tmp_path).status == 0
