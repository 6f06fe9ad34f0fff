"""The run of a machine: whose turn it is, until when, what time that makes it, and why it ends.

vCPUs take turns by instruction quantum. A turn is one slice of a vCPU, which never passes the first of the clock's
events; those that fall due are run between slices, as is whatever looks after the machine from outside (services, the
console, signals, the time limit). On the ``host`` clock the host's timer ends slices; on the other it only has the host
looked after, and the slice goes on.

Virtual time is ``virtual``'s: what the running vCPU has ticked is in it only once the slice is settled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xipvm.clock import EventClock
from xipvm.cpu import core
from xipvm.cpu.vcpu import Leave, Vcpu
from xipvm.errors import GuestError, MmError
from xipvm.result import RunResult
from xipvm.trace.emit import VirtualTime

if TYPE_CHECKING:
    from xipvm.machine import Machine
    from xipvm.storm import Storm

#: Instructions that a vCPU runs before the next one has its turn.
QUANTUM = 20_000
#: How often the host looks at signals, input and the time limit, in seconds.
TICK = 0.02
#: An idle machine with a person at its console sleeps at most this long at a time, in seconds.
IDLE_NAP = 0.05
#: And one that others ask for its memory at most this long.
SERVICE_NAP = 0.005

TIMEOUT_STATUS = 124


class RunLoop:
    """That of ``machine``, whose vCPUs, mm and console it uses. ``restart``: what the guest's reset does.

    ``counted``: time is retired instructions; else the host's.
    """

    def __init__(
        self, machine: Machine, restart: Callable[[], None], *, counted: bool, storm: Storm | None = None
    ) -> None:
        self.machine = machine
        self.counted = counted
        self.storm = storm
        self.clock = EventClock(self.now)
        self.clock.on_earlier = self._earlier
        self.clock.on_look = self._look
        self.virtual = VirtualTime()
        self.running: Vcpu | None = None
        """Who is in a slice."""
        self.exit: tuple[int, str] | None = None
        """Status and reason, once somebody has asked for the end."""
        self.reset = False
        """Somebody has asked for a restart."""
        self.services: list[Callable[[], object]] = []
        """Called again and again between slices."""
        self.began = 0.0
        """When the run in progress began, by the host's monotonic clock; 0 without one."""
        self._restart = restart
        self._first = 0
        """Number of the vCPU that has the next turn."""
        self._quantum_end: int | None = None
        """When the quantum ends whose slice an instruction limit has cut short."""
        self._seen: set[int] = set()

    # ---- time

    def host_time(self) -> int:
        """Time on the ``host`` clock."""
        return self.virtual.base + (int((time.monotonic() - self.began) * 1e9) if self.began else 0)

    def now(self) -> int:
        """Virtual time, for devices."""
        if not self.counted:
            return self.host_time()
        # A fault takes the rest of its block back: time stands still until it is made up for. Who is no part of the
        # machine asks ``virtual`` itself: that it was asked must not be seen.
        self.virtual.floor = now = self.virtual()
        return now

    def now_at(self, ticks: int) -> int:
        """Virtual time at which the running vCPU's engine stands at ``ticks``."""
        if not self.counted or self.running is None:
            return self.now()
        return max(self.virtual.base + ticks - self.virtual.start, self.virtual.floor)

    def instructions(self) -> int:
        """Retired by all vCPUs so far."""
        return sum(vcpu.engine.insns for vcpu in self.machine.vcpus)

    def _earlier(self, ns: int) -> None:
        """An event was made that comes before all others: the slice in progress must not pass it."""
        vcpu = self.running
        if vcpu is None:
            return
        if self.counted:
            vcpu.shorten(max(self.virtual.start + ns - self.virtual.base, self.virtual.start + 1))
        else:
            core.tick_in(max(ns - self.now(), 0) / 1e9)

    def _look(self) -> None:
        """The guest reads a clock that is a device."""
        if self.running is not None:
            self.running.engine.looked(0)

    # ---- asked from within

    def request_exit(self, reason: str, status: int) -> None:
        """See :meth:`Machine.request_exit`."""
        if self.exit is None:
            status = (status + (1 << 63)) % (1 << 64) - (1 << 63)  # guests have registers, which know no sign
            self.exit = (status, reason if reason in ("until", "quit", "trace", "check") else "exit")
        self._attend()

    def request_reset(self) -> None:
        """See :meth:`Machine.request_reset`."""
        self.reset = True
        self._attend()

    def _attend(self) -> None:
        if self.running is not None:
            self.running.interrupt()

    def wanted(self) -> bool:
        """The running slice has to end: somebody wants the machine to."""
        return self.exit is not None or self.reset

    # ---- the run

    def run(self, timeout: float | None, limit: int | None) -> RunResult:
        """Until the end, or a limit: seconds, and instructions, from now on."""
        deadline = None if timeout is None else self.began + timeout
        end = None if limit is None else self.instructions() + limit
        core.take_signals()
        with core.SignalGuard(TICK), contextlib.nullcontext() if self.storm is None else self.storm.raging():
            result = self._loop(deadline, end)
        return result  # noqa: RET504, a context may swallow what is raised, for all that mypy knows

    def _loop(self, deadline: float | None, limit: int | None) -> RunResult:
        machine = self.machine
        while True:
            if self.exit is not None:
                (status, reason), self.exit = self.exit, None
                return RunResult(status, reason, machine.summary())
            if machine.mm.oom is not None:
                return self._killed()
            if self.reset:
                self.reset = False
                try:
                    self._restart()
                except MmError:
                    if machine.mm.oom is None:
                        raise
                    continue
            self.clock.run_due()
            for serve in tuple(self.services):
                serve()
            if limit is not None and self.instructions() >= limit:
                return RunResult(TIMEOUT_STATUS, "limit", machine.summary())
            vcpu = self._next(self._first)
            if vcpu is None:
                waited = self._idle(deadline)
                if waited is not None:
                    return waited
                continue
            self._first = vcpu.index + 1
            try:
                self._turn(vcpu, limit, deadline)
            except (GuestError, MmError) as error:
                self.settle()
                if machine.mm.oom is not None:
                    return self._killed()
                if isinstance(error, MmError):
                    raise
                return self._crashed(vcpu, error)
            interrupted = self._signals(deadline)
            if interrupted is not None:
                return interrupted

    def _killed(self) -> RunResult:
        """The host's OOM killer took the machine's process."""
        from xipvm.oom_report import OOM_STATUS, oom_report

        return RunResult(OOM_STATUS, "oom", self.machine.summary(), report=oom_report(self.machine))

    def _crashed(self, vcpu: Vcpu, error: GuestError) -> RunResult:
        from xipvm.report import crash_report

        return RunResult(1, "crash", self.machine.summary(), report=crash_report(self.machine, vcpu, error))

    def _next(self, turn: int) -> Vcpu | None:
        """The vCPU whose turn it is, from number ``turn`` on, None when all are idle or off."""
        vcpus = self.machine.vcpus
        for n in range(turn, turn + len(vcpus)):
            vcpu = vcpus[n % len(vcpus)]
            if vcpu.on and (not vcpu.idle or vcpu.isa.interrupt_pending()):
                return vcpu
        return None

    def _turn(self, vcpu: Vcpu, limit: int | None, deadline: float | None) -> None:
        """One slice: up to the next event, the vCPU's quantum or the limit; signals do not end it."""
        virtual = self.virtual
        self.running = vcpu
        virtual.enter(vcpu.engine)
        due = self.clock.next_deadline()
        if self.counted:
            ends = [] if limit is None else [virtual.base + limit - self.instructions()]
            if due is not None:
                ends.append(due)
            if len(self.machine.vcpus) > 1:
                if self._quantum_end is None:
                    self._quantum_end = virtual.base + QUANTUM
                ends.append(self._quantum_end)
            vcpu.stop_at = virtual.start + max(min(ends) - virtual.base, 1) if ends else None
            if self.storm is not None:
                vcpu.pause_at = max(virtual.start + self.storm.next - virtual.base, 0)  # it may be long due
        elif due is not None and due - self.now() < TICK * 1e9:
            core.tick_in(max(due - self.now(), 0) / 1e9)
        leave = Leave.KICK
        try:
            while leave is Leave.KICK:
                leave = vcpu.run_slice(self.wanted, self._signalled)
                if self.wanted() or not self.counted or (leave is Leave.KICK and self._poll_host(deadline)):
                    break
        finally:
            self.settle()
        if leave is Leave.BUDGET and self._cut_short(limit):
            self._first = vcpu.index
        else:
            self._quantum_end = None

    def pause(self) -> int:
        """The storm's turn in the middle of a slice. Returns at which of the running vCPU's ticks it wants another."""
        assert self.storm is not None
        assert self.running is not None
        self.storm.run_due(self.virtual.base + self.running.engine.ticks - self.virtual.start)
        return self.virtual.start + self.storm.next - self.virtual.base

    def _cut_short(self, limit: int | None) -> bool:
        """Whether only the instruction limit ended the slice: the next run goes on as this one would have."""
        if limit is None or self._quantum_end is None or self.instructions() < limit:
            return False
        due = self.clock.next_deadline()
        return self.virtual.base < self._quantum_end and (due is None or self.virtual.base < due)

    def settle(self) -> None:
        """Account the slice in progress to the machine's time."""
        vcpu, self.running = self.running, None
        if vcpu is not None:
            self.virtual.leave(self.counted)

    def _signalled(self) -> bool:
        self._seen |= core.take_signals()
        return bool(self._seen)

    def _poll_host(self, deadline: float | None) -> bool:
        """Between two ticks of the host: input, signals, time limit. True when the run has to end."""
        self.machine.console.poll()
        for serve in tuple(self.services):
            serve()
        self._seen |= core.take_signals()
        self._seen.discard(core.SIGALRM_NUMBER)
        return bool(self._seen) or (deadline is not None and time.monotonic() >= deadline)

    def _signals(self, deadline: float | None) -> RunResult | None:
        seen, self._seen = self._seen | core.take_signals(), set()
        if not self.counted:
            self.machine.console.poll()
        for number in sorted(seen - {core.SIGALRM_NUMBER}):
            return RunResult(128 + number, "interrupted", self.machine.summary())
        if deadline is not None and time.monotonic() >= deadline:
            return RunResult(TIMEOUT_STATUS, "timeout", self.machine.summary())
        return None

    def _idle(self, deadline: float | None) -> RunResult | None:
        """Nobody can run: go on to the next event, or wait for input."""
        machine, virtual, console = self.machine, self.virtual, self.machine.console
        due = self.clock.next_deadline()
        if due is not None and self.counted and not console.live:
            virtual.base = max(virtual.base, due)
            return self._signals(deadline)
        if due is None and not console.live:
            error = GuestError("every vCPU waits for an interrupt and nothing is left that could send one")
            return self._crashed(machine.vcpus[0], error)
        nap = IDLE_NAP if due is None else min(max(due - self.now(), 0) / 1e9, IDLE_NAP)
        if self.services:
            nap = min(nap, SERVICE_NAP)
        if not console.wait(nap):
            time.sleep(nap)
        console.poll()
        if due is not None and self.counted:
            virtual.base = min(max(virtual.base, due), virtual.base + int(nap * 1e9))
        return self._signals(deadline)
