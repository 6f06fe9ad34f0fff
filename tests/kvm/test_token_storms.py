"""Several vCPUs pass tokens through memory while the host storms: right, and the same for a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.asm import a64
from tests.kvm.running import CTRL, PAGE, REGION, Code, running, start_others
from tests.run.command import ISAS, guest, inside
from xipvm.storm import Storm
from xipvm.trace import Event


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("smp", [2, 4])
def test_the_token_guest_under_storm(isa: str, smp: int, tmp_path: Path) -> None:
    """Two runs of a seed print the same and write the same trace; the guest has counted right in all of them."""
    elf = guest("token", isa)
    traces = []
    for name in ("one", "two"):
        outcome = inside("run", elf, "--smp", smp, "--storm", 11, "--trace", name, cwd=tmp_path)
        assert outcome.status == 0, outcome
        passes = 100 * smp
        assert f"token: {smp} cpus, {passes} passes, sum {passes * (passes - 1) // 2} ok" in outcome.out
        traces.append((tmp_path / name).read_bytes())
    assert traces[0] == traces[1]
    other = inside("run", elf, "--smp", smp, "--storm", 12, "--trace", "three", cwd=tmp_path)
    assert other.status == 0
    assert (tmp_path / "three").read_bytes() != traces[0]


def passing(cpus: int, rounds: int) -> Code:
    """CPU n waits until the token in CTRL is n modulo ``cpus``, adds 1 to each page of REGION, and passes it on."""
    code = start_others(Code(), cpus, "entry")
    code.add(a64.movz(0, 0)).label("entry")
    code.add(a64.mov(21, CTRL), a64.mov(12, PAGE), a64.add(8, 0, 0), a64.mov(9, rounds))
    code.label("wait").add(a64.ldr(1, 21), a64.eor_reg(2, 1, 8)).to(a64.cbnz, 2, "wait")
    code.add(a64.mov(20, REGION), a64.mov(22, 8))
    code.label("page").add(a64.ldr(2, 20), a64.add(2, 2, 1), a64.str(2, 20), a64.add_reg(20, 20, 12))
    code.add(a64.subs(22, 22, 1)).to(a64.cbnz, 22, "page")
    code.add(0xD5033BBF, a64.add(1, 1, 1), a64.str(1, 21))  # dmb ish
    code.add(a64.add(8, 8, cpus), a64.subs(9, 9, 1)).to(a64.cbnz, 9, "wait")
    code.to(a64.cbz, 0, "check").label("rest").to(a64.b, "rest")
    code.label("check").add(a64.ldr(1, 21), a64.mov(2, cpus * rounds), a64.eor_reg(3, 1, 2)).to(a64.cbnz, 3, "check")
    code.add(a64.mov(20, REGION), a64.mov(22, 8))
    code.label("sum").add(a64.ldr(1, 20)).fail_unless(1, 2)
    return code.add(a64.add_reg(20, 20, 12), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "sum").off()


@pytest.mark.parametrize("cpus", [2, 4])
def test_a_token_that_protects_pages_of_a_slot(cpus: int) -> None:
    """A slot of its own beside RAM, which storms delete, move and log, too; equal events for a seed."""
    runs = []
    for _ in range(2):
        with running(passing(cpus, 5), smp=cpus, storm=Storm(5, rate=300)) as world:
            world.slot(8)
            events: list[tuple[str, str, tuple[object, ...]]] = []

            def sink(event: Event, events: list[tuple[str, str, tuple[object, ...]]] = events) -> None:
                events.append((event.actor, event.kind, tuple(map(str, event.fields.values()))))

            world.machine.trace.attach(sink)
            world.finish()
            assert world.kvm.invalidations > 10
            runs.append(events)
    assert len(runs[0]) > 1_000
    assert runs[0] == runs[1]
