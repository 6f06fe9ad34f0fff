"""The oracle over real runs: silent when the machine is right, loud when a part of it is broken on purpose."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.machine import Machine
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.zap import MmuGather
from xipvm.trace.funnel import Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")
PAGE = 0x1000


def elf(guest: str, isa: str) -> Path:
    return BIN / isa / f"{guest}-{isa}.elf"


def judged(guest: str, isa: str, smp: int = 1) -> tuple[Oracle, str]:
    """The oracle of a run, and how the run ended."""
    oracle, trace = Oracle(), Trace()
    trace.attach(oracle)
    with Machine(guest=elf(guest, isa), smp=smp, trace=trace, console=Console(io.BytesIO())) as machine:
        result = machine.run(max_instructions=5_000_000)
        trace.detach(oracle)
    oracle.finish()
    return oracle, result.reason


def found(oracle: Oracle) -> set[str]:
    return {violation.invariant for violation in oracle.violations}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("guest", "smp"), [("hello", 1), ("reprogram", 1), ("selfmod-smp", 2), ("faults", 1)])
def test_a_right_machine_breaks_nothing(guest: str, smp: int, isa: str) -> None:
    oracle, reason = judged(guest, isa, smp)
    assert [violation.render() for violation in oracle.violations] == []
    assert reason == "exit"
    assert oracle.checks["I4"] > 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_flash_bank_that_keeps_its_shadow_entries(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kvm, "_zap", lambda self, start, end: None)
    assert "I3" in found(judged("reprogram", isa)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_a_flash_bank_that_stays_in_the_tlbs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kvm, "_flush_and_kick", lambda self, reason: None)
    assert "I10" in found(judged("reprogram", isa)[0])


def freed_first(gather: MmuGather) -> None:
    """MmuGather.finish in the wrong order."""
    mm = gather._mm
    mm.trace.emit("page_free", pages=gather._frames.free_all(True))
    mm.flush_tlb_range(gather._start, gather._end)


@pytest.mark.parametrize(("finish", "broken"), [(MmuGather.finish, set()), (freed_first, {"I5"})])
def test_frames_freed_before_a_host_thread_s_tlb_is_flushed(
    finish: Callable[[MmuGather], None], broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MmuGather, "finish", finish)
    oracle, trace = Oracle(), Trace()
    trace.attach(oracle)
    with Machine(guest=elf("hello", "arm64"), trace=trace) as machine:
        thread = HostThread(machine.mm)
        hva = machine.mm.mmap(PAGE, 3)
        thread.store(hva, b"x")
        machine.mm.madvise(hva, PAGE, MADV_DONTNEED)
        trace.detach(oracle)
    assert found(oracle) == broken


def test_a_checked_run_says_so(tmp_path: Path) -> None:
    outcome = inside("run", "--check", elf("reprogram", "arm64"), cwd=tmp_path)
    assert outcome.status == 0
    assert outcome.err.rstrip().endswith("events checked, 0 violations")


def test_a_broken_run_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kvm, "_zap", lambda self, start, end: None)
    outcome = inside("run", "--check", elf("reprogram", "riscv64"), cwd=tmp_path)
    assert outcome.status == 1
    first, second, *_ = outcome.err.splitlines()
    assert first.startswith("I3 broken at event #")
    assert second.strip().startswith("I3: once the start has returned")
    assert "the oracle stopped it" in outcome.err


def test_a_recorded_run_is_judged_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tmp_path / "good.xtrace", tmp_path / "bad.xtrace"
    assert inside("run", "--quiet", "--trace", good, elf("reprogram", "arm64"), cwd=tmp_path).status == 0
    monkeypatch.setattr(Kvm, "_zap", lambda self, start, end: None)
    inside("run", "--quiet", "--trace", bad, "--max-instructions", 1_000_000, elf("reprogram", "arm64"), cwd=tmp_path)
    assert inside("check", good, cwd=tmp_path).out.endswith(" 0 violations\n")
    outcome = inside("check", good, bad, cwd=tmp_path)
    assert outcome.status == 1
    assert "\nI3 broken at event #" in outcome.out
    assert inside("check", "--invariant", "I5", bad, cwd=tmp_path).status == 0


def test_only_traces_and_known_invariants(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    assert inside("check", "text", cwd=tmp_path)[:2] == (2, "")
    outcome = inside("check", "--invariant", "I99", "text", cwd=tmp_path)
    assert outcome.status == 2
    assert "no invariant is called 'I99'" in outcome.err
