"""A machine's vCPUs as actors: they are switched wherever a schedule point is passed, inside their fault handlers too.

::

    scheduler = Scheduler(choose, trace=machine.trace)
    run = VcpuActors(machine, scheduler)
    scheduler.spawn("host", ...)                # whoever else acts
    scheduler.run()
    run.exit                                    # (status, reason), None when the guest did not end

A vCPU that is neither in a fault nor waiting gives way after a quantum of instructions, so that one that spins on what
another one writes does not do so for ever. Virtual time goes on with the instructions of whoever runs, as in
``Machine.run``. There are no limits, and signals are not looked at: the guest has to end by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm.actors import Actor, give_way, wait
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.secondary.base import RETRY_WALK

if TYPE_CHECKING:
    from xipvm.cpu.vcpu import Vcpu
    from xipvm.machine import Machine
    from xipvm.scheduler import Scheduler

SLICE: Final = 2_000
"""Instructions between two schedule points of a vCPU that faults nowhere."""


class VcpuActors:
    """Spawns an actor for each vCPU of ``machine``, which uses the instructions clock and is not running."""

    def __init__(self, machine: Machine, scheduler: Scheduler) -> None:
        self._machine = machine
        self.exit: tuple[int, str] | None = None
        """Exit status and reason of the guest, once it has ended."""
        self.actors = [self._spawn(scheduler, vcpu) for vcpu in machine.vcpus]

    def _spawn(self, scheduler: Scheduler, vcpu: Vcpu) -> Actor:
        vcpu.record(self._machine.trace.on)
        vcpu.engine.on_miss = self._missing(vcpu)
        actor = scheduler.spawn(vcpu.name, self._run, vcpu)
        actor.on_enter = self._entering(vcpu)
        actor.on_leave = self._machine.loop.settle
        return actor

    def _entering(self, vcpu: Vcpu) -> Callable[[], None]:
        loop = self._machine.loop

        def enter() -> None:
            loop.running = vcpu
            loop.virtual.enter(vcpu.engine)

        return enter

    def _missing(self, vcpu: Vcpu) -> Callable[[int, int], int]:
        """A miss that leaves nothing to go on with will not be luckier before somebody else has done something."""
        miss, secondary = vcpu._miss, vcpu.secondary

        def on_miss(gpa: int, access: int) -> int:
            result = miss(gpa, access)
            if result == RETRY_WALK and secondary.translate(gpa >> PAGE_SHIFT) is None:
                give_way("vcpu.retry")
            return result

        return on_miss

    def _run(self, vcpu: Vcpu) -> None:
        machine, loop = self._machine, self._machine.loop
        enter = self._entering(vcpu)
        while self.exit is None:
            loop.settle()
            self._idle()
            machine.clock.run_due()
            enter()
            if not self._runnable(vcpu):
                wait(f"something to do for {vcpu.name}", lambda: self.exit is not None or self._runnable(vcpu))
                continue
            due = machine.clock.next_deadline()
            length = SLICE if due is None else min(SLICE, max(due - loop.virtual.base, 1))
            vcpu.stop_at = loop.virtual.start + length
            vcpu.run_slice(loop.wanted)
            if loop.exit is not None:
                self.exit, loop.exit = loop.exit, None
                for other in machine.vcpus:
                    other.interrupt()  # it leaves the guest when it goes on
            else:
                give_way("vcpu.slice")

    def _idle(self) -> None:
        """When every vCPU waits for an interrupt, it is time for the next event."""
        machine, virtual = self._machine, self._machine.loop.virtual
        due = machine.clock.next_deadline()
        if due is not None and not any(map(self._runnable, machine.vcpus)):
            virtual.base = max(virtual.base, due)

    @staticmethod
    def _runnable(vcpu: Vcpu) -> bool:
        return vcpu.on and (not vcpu.idle or vcpu.isa.interrupt_pending())
