"""One vCPU: an engine, the ISA that gives its exits a meaning, and how it is run in slices.

A vCPU runs until its slice is used up, it waits for an interrupt, or the machine kicks it. Everything the
guest does wrong that its own ISA can report goes into the guest as an exception; what cannot be reported
(no vector, an engine without an answer) is a ``GuestError`` that ends the run.

Ordering: an invalidation flushes and kicks through ``flush_tlb`` and ``kick``; both take effect before the
caller goes on, because only one vCPU runs at a time and one that runs is inside a callback of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from xipvm.cpu import core
from xipvm.devices.bus import Bus, BusError
from xipvm.errors import GuestError, MmError
from xipvm.locks import check
from xipvm.mmu.secondary.base import FAULT, MMIO, RETRY_WALK
from xipvm.trace.funnel import Trace

if TYPE_CHECKING:
    from xipvm.mmu.secondary.base import SecondaryMmu
    from xipvm.mmu.secondary.guest_walk import GuestWalk, ReadEntry, Role

UC_ERR_EXCEPTION = 21
UC_ERR_INSN_INVALID = 10

ACCESS_NAMES = ("read", "write", "fetch")
RIGHTS_NAMES = {1: "r", 3: "rw", 5: "rx", 7: "rwx"}


class Leave(Enum):
    """Why a slice ended."""

    BUDGET = "budget"
    IDLE = "idle"
    YIELD = "yield"
    KICK = "kick"
    OFF = "off"


class Isa(Protocol):
    """What an ISA module gives a vCPU."""

    def reset(self, pc: int, arg: int) -> None:
        """Put the registers into their state at power-on, with ``pc`` and the boot argument."""

    def pc(self) -> int:
        """The program counter."""

    def memory_fault(self, gva: int, access: int, pc: int) -> None:
        """Deliver the fault of an access to the page of ``gva``; the engine says what kind it is."""

    def exception(self, number: int, pc: int) -> None:
        """Handle an exception that the engine reported by number."""

    def illegal(self, pc: int) -> None:
        """Handle an instruction that the engine does not know."""

    def interrupt_pending(self) -> bool:
        """Whether an interrupt waits at this vCPU, masked or not."""

    def set_pending(self, bit: int, level: bool) -> None:
        """Drive a bit of the pending register, where the ISA has one."""

    def interrupt_waits(self) -> int:
        """The interrupts that wait, as bits, whether or not the guest has enabled or unmasked them; 0 for none."""

    def take_interrupt(self) -> bool:
        """Enter the handler of the waiting interrupt; False while it is masked."""

    def waits(self, pc: int) -> Leave:
        """What the instruction before ``pc``, which stopped the engine, asks for."""

    def registers(self) -> list[tuple[str, int]]:
        """Name and value of the registers that a report shows."""


class Vcpu:
    """A vCPU of a machine. ``name`` is its actor name; ``on`` and ``idle`` say whether it has something to run."""

    def __init__(
        self,
        index: int,
        group: core.EngineGroup,
        secondary: SecondaryMmu,
        bus: Bus,
        trace: Trace,
        *,
        isa: int,
        counted: bool,
    ) -> None:
        self.index = index
        self.name = f"vcpu{index}"
        self.secondary = secondary
        self.bus = bus
        self.trace = trace
        self.on = False
        self.idle = False
        self.irq = False
        self.stop_at: int | None = None
        self.fault_address: int | None = None
        """Address of the last faulting access, where the instruction tells it."""
        self._recording = False
        self.last_exception: tuple[str, int] | None = None
        """What the last exception was that entered the guest's handler, and the PC it came from."""
        self.faults = 0
        self.missed = 0
        """The guest frame of the last access that no entry allowed."""
        self.pause_at: int | None = None
        """Ticks at which ``on_pause`` is called in the middle of a slice; it returns when to do so again."""
        self.on_pause: Callable[[], int] | None = None
        self._entered = False
        """It was in the guest since its last flush."""
        self._mmio: set[tuple[int, int]] = set()
        """Pages and accesses that were found to be a device's since the last flush. The engine's TLB forgets them as
        it likes, and asks again; how often must be seen neither in a trace nor in ``faults``."""
        self.isa: Isa
        self.engine = core.take_engine(isa, counted, group)
        self._shadow = secondary.shadow
        roots = None if self._shadow is None else self._shadow.roots
        self.engine.bind(group, secondary.sptes, keep=secondary.keeps_entries, roots=roots)
        self.engine.on_miss = self._miss
        self.engine.on_read = bus.read
        self.engine.on_write = bus.write
        if self._shadow is not None:
            self.engine.on_shadow_miss = self._shadow_miss
            self.engine.on_guest_flush = self._shadow.guest_flush
            self.engine.on_write = self._write

    def attach(self, isa: Isa) -> None:
        """Give the vCPU its ISA; done once, before the first run."""
        self.isa = isa

    def record(self, on: bool) -> None:
        """Whether translations handed out, flushes and dropped code go into the trace."""
        if on == self._recording:
            return
        self._recording = on
        engine = self.engine
        if on and self.faults:
            engine.flush_tlb("record")  # what it holds already would never be told
        engine.record_inserts(on)
        engine.on_insert = self._inserted if on else None
        engine.on_flush = self._flushed if on else None
        engine.on_drop = self._dropped if on else None

    # What the secondary MMU calls

    def flush_tlb(self, reason: str) -> None:
        """Drop every cached translation; done when the call returns.

        The guest is left at its next block, as by :meth:`kick`: chained code would look its page up again only when
        something else happens to stop it, and a trace tells when it does.
        """
        engine = self.engine
        if not self._entered and not engine.in_guest:
            return  # it has used nothing since the last one: two requests that are pending are one
        self._mmio.clear()
        self._entered = engine.in_guest
        engine.flush_tlb(reason)
        if engine.in_guest:
            engine.leave(core.KICK_FLUSH)

    def kick(self, reason: str) -> None:
        """Have the vCPU leave the guest at its next block, so that no chained code runs on."""
        engine = self.engine
        if engine.in_guest:
            engine.leave(core.KICK_FLUSH)
            if self.trace.on:
                self.trace.emit("kvm_kick", vcpu=self.index, reason=reason)

    def set_irq(self, level: bool) -> None:
        """The interrupt controller's line to this vCPU changed."""
        self.irq = level
        if level:
            self.interrupt()

    def set_pending(self, bit: int, level: bool) -> None:
        """A line that drives one bit of the ISA's own pending register changed (RISC-V: mip)."""
        self.isa.set_pending(bit, level)

    def interrupt(self, kick: int = core.KICK_EXIT) -> None:
        """Have the vCPU leave the guest for the machine to look at something."""
        engine = self.engine
        engine.leave(kick)

    # Running

    def shorten(self, stop_at: int) -> None:
        """End the slice in progress no later than when its ticks reach ``stop_at``."""
        if self.stop_at is None or stop_at < self.stop_at:
            self.stop_at = stop_at
            self.engine.stop_at = min(stop_at, self.engine.stop_at)

    def run_slice(self, attention: Callable[[], bool], signalled: Callable[[], bool] = lambda: False) -> Leave:
        """Run until the engine's ticks reach ``stop_at`` (None: no limit) or something else ends the slice.

        ``attention()`` says whether the machine wants control back after an exit, ``signalled()`` whether a signal
        came while no engine ran: none was kicked then. Raises GuestError.
        """
        engine = self.engine
        isa = self.isa
        self.trace.actor = self.name
        try:
            while True:
                if engine.kick & core.KICK_SIGNAL or signalled():
                    # It came while an exception was being delivered, and must not wait for the guest's next block.
                    engine.kick &= ~core.KICK_SIGNAL
                    return Leave.KICK
                # Also when a signal has ended the last call at this very block: to enter the guest is to look it up.
                if self.stop_at is not None and engine.ticks >= self.stop_at:
                    return Leave.BUDGET
                if self.pause_at is not None and self.on_pause is not None and engine.ticks >= self.pause_at:
                    self.pause_at = self.on_pause()
                # An interrupt is taken at the first block at which the guest lets it; where signals stop the engine
                # makes no difference to that.
                waiting = isa.interrupt_waits()
                if waiting:
                    self.idle = False
                    if isa.take_interrupt():
                        waiting = isa.interrupt_waits()
                engine.watch(waiting)
                stop_at = self.stop_at
                if self.pause_at is not None and (stop_at is None or self.pause_at < stop_at):
                    stop_at = self.pause_at
                self.secondary.vcpu_enter(self)
                self._entered = True
                try:
                    code = engine.run(isa.pc(), stop_at)
                except BusError as error:
                    # A device's page that it does not fill. Where the access was is not known any more.
                    raise GuestError(str(error)) from None
                leave = self._exit(code)
                if leave is not None:
                    return leave
                if attention():
                    return Leave.KICK
        finally:
            self.trace.actor = "host"

    def _exit(self, code: int) -> Leave | None:
        """Handle why the engine returned; a Leave ends the slice, None lets the guest go on."""
        engine = self.engine
        isa = self.isa
        pc = isa.pc()
        if code and engine.faulted:
            if engine.fault_access != core.FETCH:  # a block that cannot be fetched was not counted, either
                engine.uncount(pc)
            isa.memory_fault(engine.fault_address, engine.fault_access, pc)
        elif engine.interrupt >= 0:
            engine.uncount(pc)
            isa.exception(engine.interrupt, pc)
        elif code == UC_ERR_INSN_INVALID or engine.invalid_insn:
            engine.uncount(pc)
            isa.illegal(pc)
        elif code:
            raise GuestError(f"the engine stopped with error {code} at {pc:#x}")
        elif engine.stopped or (engine.kick and not engine.counted):
            kick, engine.kick = engine.kick, 0
            if kick & ~(core.KICK_FLUSH | core.KICK_WATCH):
                return Leave.KICK
        else:
            leave = isa.waits(pc)
            if leave is Leave.IDLE:
                if isa.interrupt_pending():
                    return None
                self.idle = True
            return leave
        if not self.on:
            return Leave.OFF
        # A firmware call may have had the vCPU wait.
        self.idle = self.idle and not isa.interrupt_pending()
        return Leave.IDLE if self.idle else None

    # Callbacks of the engine

    def _miss(self, gpa: int, access: int) -> int:
        page = (gpa >> 12, access)
        if page in self._mmio:
            return MMIO
        if not self.secondary.keeps_entries and self.secondary.again(*page):
            return RETRY_WALK  # the engine's TLB is smaller than the one that it stands for
        self.faults += 1
        self.missed = page[0]
        found = self.secondary.fault(page[0], access)
        if check.checker is not None:
            check.nothing_held("in the guest")
        if found == MMIO:
            self._mmio.add(page)
        elif found == FAULT and self.secondary.host_failed:
            raise GuestError(self.secondary.last_error)  # KVM_RUN would fail, with EFAULT
        return found

    def _shadow_miss(self, role: Role, gva: int, access: int) -> int:
        """As :meth:`_miss`, by virtual address."""
        shadow = self._shadow
        assert shadow is not None
        self.faults += 1
        answer = shadow.fault_gva(self, role, gva, access)
        if check.checker is not None:
            check.nothing_held("in the guest")
        kind, gfn = answer & 15, answer >> 12
        if kind == MMIO:
            self._mmio.add((gfn, access))
        elif kind == FAULT:
            self.missed = gfn
            if shadow.host_failed:
                raise GuestError(shadow.last_error)
        return answer

    def walk_guest(self, gva: int, access: int, read: ReadEntry) -> GuestWalk:
        """See GuestWalker."""
        from xipvm.cpu.shadow_walk import walk_guest

        return walk_guest(self.engine, gva, access, read)

    def sends_to_device(self, gfn: int, access: int) -> bool:
        """See GuestWalker."""
        return (gfn, access) in self._mmio

    def _write(self, gpa: int, size: int, value: int) -> None:
        """A store that did not go to memory: to a device, or to a table of the guest's that is watched."""
        shadow = self._shadow
        if shadow is None or not shadow.emulates(gpa):
            self.bus.write(gpa, size, value)
            return
        try:
            shadow.emulate_write(gpa, value.to_bytes(size, "little"))
        except MmError as error:
            raise GuestError(str(error)) from None

    def _inserted(self, gfn: int, pfn: int, perms: int) -> None:
        self.trace.emit("tlb_insert", vcpu=self.index, gfn=gfn, pfn=pfn, rights=RIGHTS_NAMES[perms])

    def _flushed(self, reason: str) -> None:
        self.trace.emit("tlb_flush", vcpu=self.index, reason=reason)

    def _dropped(self, pfn: int) -> None:
        self.trace.emit("code_drop", pfn=pfn, vcpus=1 << self.index)
