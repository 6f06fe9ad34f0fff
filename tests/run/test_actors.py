"""Real guests whose vCPUs are actors: switched inside their fault handlers, beside operations of the host."""

from __future__ import annotations

import io
from random import Random

import pytest

from tests.run.command import guest
from xipvm.actors import point
from xipvm.console import Console
from xipvm.locks import checking
from xipvm.machine import Machine
from xipvm.machine_actors import VcpuActors
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.verify import verify
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

MIB = 1 << 20


def machine_of(name: str, isa: str, smp: int, output: io.BytesIO) -> Machine:
    return Machine(guest(name, isa), memory=16 * MIB, smp=smp, trace=Trace(), console=Console(output))


def calm(name: str, isa: str, smp: int) -> tuple[int, bytes]:
    output = io.BytesIO()
    with machine_of(name, isa, smp, output) as machine:
        return machine.run().status, output.getvalue()


@pytest.mark.parametrize("name", ["selfmod-smp", "shootdown"])
@pytest.mark.parametrize("isa", ["arm64", "riscv64"])
def test_two_vcpus_switched_inside_their_fault_handlers(isa: str, name: str) -> None:
    """Of ``shootdown`` that is in the middle of walks of its own tables, too, which the host moves."""
    expected = calm(name, isa, 2)
    both = [0]
    actor_names: set[str] = set()

    def host() -> None:
        """Takes every page away again and again, so that both CPUs fault on the same ones."""
        while run.exit is None:
            compact_memory(machine.host, machine.trace)
            point("host.rest")

    random = Random(1)

    def choose(n: int, label: str) -> int:
        both[0] += all(vcpu.engine.in_guest for vcpu in machine.vcpus)
        return random.randrange(n)

    output = io.BytesIO()
    with machine_of(name, isa, 2, output) as machine, checking():
        machine.trace.attach(lambda event: actor_names.add(event.actor))
        scheduler = Scheduler(choose, trace=machine.trace)
        run = VcpuActors(machine, scheduler)
        scheduler.spawn("host", host)
        scheduler.run()
        assert run.exit is not None
        assert (run.exit[0], output.getvalue()) == expected
        verify(machine.host)
    assert both[0] > 10
    assert {"vcpu0", "vcpu1"} <= actor_names


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["arm64", "riscv64"])
def test_the_host_moves_pages_while_the_guest_faults(isa: str) -> None:
    expected = calm("pages", isa, 1)
    moved: list[int] = []
    output = io.BytesIO()
    with machine_of("pages", isa, 1, output) as machine, checking():

        def host() -> None:
            while run.exit is None:
                moved.append(compact_memory(machine.host, machine.trace))
                for _ in range(50):
                    point("host.rest")

        answers = iter(int(n % 3 == 0) for n in range(1 << 30))
        scheduler = Scheduler(lambda n, label: next(answers), trace=machine.trace)
        run = VcpuActors(machine, scheduler)
        scheduler.spawn("host", host)
        scheduler.run()
        assert run.exit is not None
        assert (run.exit[0], output.getvalue()) == expected
        verify(machine.host)
    assert sum(moved) > 100


def test_an_aborted_run_leaves_the_engines_usable() -> None:
    class EnoughError(Exception):
        pass

    expected = calm("pages", "arm64", 1)
    for _ in range(3):
        asked = [0]

        def choose(n: int, label: str, asked: list[int] = asked) -> int:
            asked[0] += 1
            if asked[0] == 40:
                raise EnoughError
            return n - 1

        with machine_of("selfmod-smp", "arm64", 2, io.BytesIO()) as machine:
            scheduler = Scheduler(choose, trace=machine.trace)
            VcpuActors(machine, scheduler)
            with pytest.raises(EnoughError):
                scheduler.run()
            assert not any(vcpu.engine.in_guest for vcpu in machine.vcpus)
            assert not machine.mm.mmap_lock.taken
    assert calm("pages", "arm64", 1) == expected


def test_the_same_choices_give_the_same_run() -> None:
    def once(seed: int) -> tuple[bytes, list[tuple[object, ...]]]:
        events: list[tuple[object, ...]] = []
        random, output = Random(seed), io.BytesIO()
        with machine_of("selfmod-smp", "arm64", 2, output) as machine:
            machine.trace.attach(lambda event: events.append((event.kind, event.actor, event.time, str(event.fields))))
            scheduler = Scheduler(lambda n, label: random.randrange(n), trace=machine.trace)
            VcpuActors(machine, scheduler)
            scheduler.run()
        return output.getvalue(), events

    assert once(1) == once(1)
    assert once(1)[0] == once(2)[0]
    assert once(1)[1] != once(2)[1]
