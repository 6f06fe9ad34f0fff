"""Storms: whatever they do to the host's memory, the guest computes what it computes on a calm day."""

from __future__ import annotations

import io
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.command import ISAS, UBOOT, guest, inside, needs_uboot, start
from xipvm import BadInput, Console, Event, Machine, Recorder, Trace
from xipvm.actors import on_wait
from xipvm.address import PAGE_SIZE
from xipvm.boards import get
from xipvm.errors import DeadlockError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import PROT_READ, PROT_WRITE
from xipvm.storm import Storm, parse_storm
from xipvm.storm.check import Job, difference, run_once, stormy_limit
from xipvm.storm.operations import OPERATIONS

UBOOT_RISCV = UBOOT.parents[1] / "qemu-riscv64" / "uboot.elf"
SESSION = b"\nversion\nflinfo\nsetenv greeting hello\nsaveenv\nmd.b 0x80000000 40\n"


def survives(job: Job, seeds: range, *, rate: int = 10) -> int:
    """The calm run and those of ``seeds`` are equal. How many invalidations the storms made."""
    calm = run_once(job)
    assert calm.reason in ("exit", "until")
    invalidations = 0
    for seed in seeds:
        stormy = run_once(job, Storm(seed, rate=rate), limit=stormy_limit(calm))
        assert not difference(calm, stormy), f"seed {seed}"
        invalidations += stormy.invalidations
    return invalidations


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["hello", "faults", "reprogram", "selfmod", "user", "clocks"])
def test_small_guests(name: str, isa: str) -> None:
    assert survives(Job(str(guest(name, isa))), range(1, 7)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_pages(isa: str) -> None:
    assert survives(Job(str(guest("pages", isa))), range(1, 4)) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "smp"), [("token", 4), ("selfmod-smp", 2)])
def test_several_vcpus(name: str, smp: int, isa: str) -> None:
    assert survives(Job(str(guest(name, isa)), smp=smp), range(1, 5)) > 100


@pytest.mark.slow
@needs_uboot
@pytest.mark.parametrize("elf", [UBOOT, UBOOT_RISCV], ids=ISAS)
def test_uboot(elf: Path) -> None:
    assert survives(Job(str(elf), stdin=SESSION, until="=>"), range(1, 3), rate=2) > 1000


def record(path: Path, seed: int) -> bytes:
    """The trace of a stormy run."""
    trace = Trace()
    with Recorder(str(path), machine={}) as recorder:
        trace.attach(recorder)
        with Machine(
            guest("faults", "arm64"), trace=trace, console=Console(io.BytesIO()), storm=Storm(seed)
        ) as machine:
            machine.run()
        trace.detach(recorder)
    return path.read_bytes()


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    first = record(tmp_path / "1", 5)
    assert record(tmp_path / "2", 5) == first
    assert record(tmp_path / "3", 6) != first


@pytest.mark.slow
def test_the_page_of_a_running_loop_moves_from_frame_to_frame() -> None:
    ram = get("virt-arm64").ram_base >> 12
    frames: dict[int, list[int]] = defaultdict(list)

    def watch(event: Event) -> None:
        if event.kind == "tlb_insert" and "x" in event.fields["rights"] and event.fields["gfn"] >= ram:
            where = frames[event.fields["gfn"]]
            if not where or where[-1] != event.fields["pfn"]:
                where.append(event.fields["pfn"])

    trace = Trace()
    trace.attach(watch)
    storm = Storm(4, rate=200, ops=["migrate", "pageout"])
    output = io.BytesIO()
    # Its flash driver runs in RAM and polls the chips from there.
    with Machine(guest("reprogram", "arm64"), trace=trace, console=Console(output), storm=storm) as machine:
        assert machine.run(max_instructions=10_000_000).status == 0
    assert output.getvalue().endswith(b"reprogram: ok\n") or b"reprogram: ok" in output.getvalue()
    assert max(map(len, frames.values())) > 3, "the code was in several frames, one after the other"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_comes_and_does_not_show(name: str) -> None:
    job = Job(str(guest("reprogram", "riscv64")))
    calm = run_once(job)
    ops = [name, "fork", "pageout", "hold", "collapse", "dirty-log", "mergeable"]
    for seed in range(1, 9):
        storm = Storm(seed, rate=50, ops=ops)
        assert not difference(calm, run_once(job, storm, limit=stormy_limit(calm)))
        if storm.done[name]:
            return
    pytest.fail(f"{name} was never done")


def forget_to_flush(patch: pytest.MonkeyPatch) -> None:
    """Entries go, and what vCPUs have cached of them stays."""
    patch.setattr(Kvm, "_flush_and_kick", lambda self, reason: setattr(self, "tlbs_dirty", False))


def forget_to_zap(patch: pytest.MonkeyPatch) -> None:
    """The start of a range leaves the entries as they are."""
    patch.setattr(Kvm, "_zap", lambda self, start, end: None)


def forget_to_retry(patch: pytest.MonkeyPatch) -> None:
    """A fault installs what it found before an invalidation came between."""
    patch.setattr(Kvm, "mmu_invalidate_retry", lambda self, seq, gfn: "")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [forget_to_flush, forget_to_zap, forget_to_retry])
def test_a_storm_finds_what_was_forgotten(mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(guest("pages", "arm64")))
    calm = run_once(job)
    assert callable(mutant)
    mutant(monkeypatch)
    found = (difference(calm, run_once(job, Storm(seed), limit=stormy_limit(calm))) for seed in range(1, 11))
    assert any(found)


@pytest.mark.parametrize("isa", ISAS)
def test_when_the_host_looks_after_things_is_not_to_be_seen(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush without a kick, and what falls due at the block at which a tick stops the guest."""

    def events(tick: float) -> list[Event]:
        monkeypatch.setattr("xipvm.run_loop.TICK", tick)
        found: list[Event] = []
        trace = Trace()
        trace.attach(found.append)
        storm = Storm(1, rate=2000, ops=["flush", "thread", "get-dirty-log", "dirty-log"])
        with Machine(guest("pages", isa), trace=trace, console=Console(io.BytesIO()), storm=storm) as machine:
            machine.run(max_instructions=50_000)
        return found

    assert events(0.0001) == events(0.02)


def test_what_2008_did_not_have_is_not_done() -> None:
    def run(storm: Storm | None) -> tuple[int, str, bytes]:
        output = io.BytesIO()
        elf = guest("faults", "riscv64")
        with Machine(elf, console=Console(output), storm=storm, protocol="2008") as machine:
            result = machine.run()
        return result.status, result.reason, output.getvalue()

    storm = Storm(1)
    assert run(storm) == run(None)
    later = {"cold", "collapse", "khugepaged", "mergeable", "uffd-wp"} & {*OPERATIONS}
    assert not later & {*storm.done}
    assert later & {*storm.refused}
    assert storm.done["migrate"]


def test_what_a_storm_may_be() -> None:
    storm = parse_storm("7,rate=50,ops=migrate+ksm")
    assert (storm.seed, storm.rate) == (7, 50)
    for text in ("", "x", "-1", "1,rate=0", "1,rate=x", "1,ops=", "1,ops=nothing", "1,speed=3", str(1 << 64)):
        with pytest.raises(BadInput):
            parse_storm(text)
    with pytest.raises(BadInput, match="instructions clock"):
        Machine(guest("hello", "arm64"), clock="host", storm=Storm(1))
    with pytest.raises(BadInput, match="pinned"):
        Machine(guest("hello", "arm64"), pin_sptes=True, storm=Storm(1))
    with Machine(guest("hello", "arm64"), storm=storm), pytest.raises(BadInput, match="one machine"):
        Machine(guest("hello", "arm64"), storm=storm)


def test_the_command(tmp_path: Path) -> None:
    elf = guest("faults", "arm64")
    fine = inside("storm", "--seeds", 2, elf, cwd=tmp_path)
    assert (fine.status, fine.err) == (0, "calm: exit, status 0, 13299 instructions\n")
    assert fine.lines[-1].startswith("2 seeds, 0 differ; ")
    assert inside("storm", "--ops", "nothing", elf, cwd=tmp_path).status == 2
    assert inside("storm", cwd=tmp_path).status == 2
    assert inside("run", "--storm", "x", elf, cwd=tmp_path).status == 2
    assert inside("run", "--storm", "3", "--quiet", elf, cwd=tmp_path).status == 0


def test_the_command_says_how_to_see_a_difference_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_to_zap(monkeypatch)
    elf = guest("faults", "arm64")
    found = inside("storm", "--seeds", 2, elf, cwd=tmp_path)
    assert found.status == 1
    assert any(line.startswith("seed ") for line in found.lines)
    assert any(line.startswith("replay: xipvm run --storm ") and line.endswith(str(elf)) for line in found.lines)


def test_the_command_takes_the_host_s_memory_as_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elf = guest("faults", "arm64")
    options = ("--memory", "8M", "--protocol", "2008", "--thp", "never", "--host-memory", "4M", "--swap", "32M")
    made: list[dict[str, object]] = []
    init = Machine.__init__

    def watch(self: Machine, *args: object, **options: object) -> None:
        made.append(options)
        init(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Machine, "__init__", watch)
    assert inside("storm", "--seeds", 1, *options, elf, cwd=tmp_path).status == 0
    wanted = {"memory": 8 << 20, "protocol": "2008", "thp": "never", "host_memory": 4 << 20, "swap": "32M"}
    assert [wanted.items() <= each.items() for each in made] == [True, True]
    refused = inside("storm", "--jobs", 2, "--swap", "file,size=1M", elf, cwd=tmp_path)
    assert (refused.status, "one run's at a time" in refused.err) == (2, True)
    monkeypatch.setattr("xipvm.cli.storm.difference", lambda calm, stormy: "differs")
    replay = inside("storm", "--seeds", 1, *options, elf, cwd=tmp_path).lines[1]
    assert replay == (
        f"replay: xipvm run --storm 1,rate=10 --memory {8 << 20} --input /dev/null --protocol 2008 --thp never "
        f"--host-memory {4 << 20} --swap 32M {elf}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_ends_it(jobs: int) -> None:
    with start("storm", "--seeds", 100000, "--jobs", jobs, "--rate", 1000, guest("pages", "arm64")) as child:
        assert child.stderr is not None
        assert child.stderr.readline().startswith(b"calm: ")
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        while jobs > 1 and len(workers.read_text().split()) < jobs:
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        try:
            assert child.wait(60) == 130
        finally:
            child.kill()
        assert child.stderr.read() == b"xipvm: interrupted after 0 of 100000 seeds\n"


def test_the_command_that_runs_a_storm_again_has_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.cli.storm.difference", lambda calm, stormy: "differs")
    elf = guest("hello", "arm64")
    replay = inside("storm", "--seeds", 1, "--device", "sva", elf, cwd=tmp_path).lines[1]
    assert replay == f"replay: xipvm run --storm 1,rate=10 --input /dev/null --device sva {elf}"


@pytest.mark.parametrize("isa", ISAS)
def test_an_exception_tells_its_address_also_when_its_code_was_unmapped_meanwhile(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a storm: the access was decoded by way of the sptes, and one that had just gone cost its low bits."""
    job = Job(str(guest("faults", isa)))
    calm = run_once(job)
    fault = Kvm.fault

    def unmapped(self: Kvm, gfn: int, access: int) -> int:
        answer = fault(self, gfn, access)
        if self.memslots.find(gfn) is None:
            everything = self.memslots.in_hva_range(0, 1 << 47)
            for start, end in everything:
                self._zap(start, end)
            self._flush_and_kick("test")
        return answer

    monkeypatch.setattr(Kvm, "fault", unmapped)
    assert not difference(calm, run_once(job))


def test_areas_that_cannot_be_merged_now_are_merged_later() -> None:
    """mprotect inside a walk of the reverse map, which holds the root of both areas, does what it should."""
    host = HostMemory(16 << 20)
    mm = Mm(host, Trace())
    start = mm.mmap(2 * PAGE_SIZE, PROT_READ | PROT_WRITE)
    mm.write(start, bytes(2 * PAGE_SIZE))
    mm.mprotect(start, PAGE_SIZE, PROT_READ)
    lower = mm.find_vma(start)
    assert lower is not None

    def refuse(what: str, ready: Callable[[], bool]) -> None:
        raise DeadlockError(what)

    with lower.anon_chain[0].rwsem.read, on_wait(refuse):
        mm.mprotect(start + PAGE_SIZE, PAGE_SIZE, PROT_READ)
    assert [area.prot for area in mm.areas_in(start, start + 2 * PAGE_SIZE)] == [PROT_READ] * 2
    mm.mprotect(start, 2 * PAGE_SIZE, PROT_READ | PROT_WRITE)
    assert [area.prot for area in mm.areas_in(start, start + 2 * PAGE_SIZE)] == [PROT_READ | PROT_WRITE]
    verify(host)
