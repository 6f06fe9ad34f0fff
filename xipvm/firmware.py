"""What a machine does for its CPUs beyond executing instructions: firmware calls, semihosting, timers.

One object a machine; the ISA modules call it through ``CpuServices``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.cpu.services import read_virtual
from xipvm.devices.semihosting import Semihosting
from xipvm.errors import BadInput, GuestError

if TYPE_CHECKING:
    from xipvm.cpu.vcpu import Vcpu
    from xipvm.machine import Machine


class Firmware:
    """The services of ``machine``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._semihosting = Semihosting(self._read_argument, machine.console, machine.request_exit)
        self._caller: Vcpu

    def firmware_call(self, vcpu: Vcpu, arguments: list[int]) -> int | None:
        """PSCI."""
        psci = self._machine.platform.psci
        assert psci is not None  # every AArch64 board has one
        return psci.call(vcpu.index, arguments)

    def semihosting_call(self, vcpu: Vcpu, operation: int, argument: int) -> int:
        """A call to the debugger."""
        self._caller = vcpu
        return self._semihosting.call(operation, argument)

    def _read_argument(self, gva: int, size: int) -> bytes | None:
        """What the semihosting call that is made points to."""
        return read_virtual(self._caller.engine, self._machine.read_physical, gva, size)

    def read_timer(self, vcpu: Vcpu, name: str, ticks: int) -> int:
        """A timer register; on RISC-V ``time``."""
        machine = self._machine
        now = machine.now_at(ticks)
        if name == "time":
            clint = machine.platform.clint
            assert clint is not None  # every RISC-V board has one
            return clint.time(now)
        return machine.platform.timers[vcpu.index].read_sysreg(name, now)

    def write_timer(self, vcpu: Vcpu, name: str, value: int) -> None:
        """Write a timer register."""
        self._machine.platform.timers[vcpu.index].write_sysreg(name, value)

    def cycles(self, vcpu: Vcpu, ticks: int) -> int:
        """The cycle counter: the vCPU's own ticks where they are counted, else ns of the run."""
        return ticks if self._machine.counted else self._machine.clock.now

    def read_physical(self, gpa: int, size: int) -> bytes | None:
        """Guest memory as page-table walks see it."""
        return self._machine.read_physical(gpa, size)

    def read(self, gpa: int, size: int) -> bytes | None:
        """Guest memory as a device reads it."""
        return self._machine.read_physical(gpa, size)

    def write(self, gpa: int, data: bytes) -> bool:
        """Guest RAM as a device writes it; False outside of it."""
        try:
            self._machine.write_ram(gpa, data)
        except BadInput:
            return False
        return True

    def check_fetch(self, vcpu: Vcpu, gpa: int) -> None:
        """A fetch from flash that is not in read-array mode is an error of its own."""
        for memory in self._machine.flash:
            if memory.contains(gpa) and not memory.device.array_mode:
                raise GuestError(
                    f"fetch from {gpa:#x} in {memory.device.name}, which is not in read-array mode: "
                    f"{memory.device.describe()}"
                )

    def note_exception(self, vcpu: Vcpu, vector: int, pc: int, cause: int, address: int) -> None:
        """Tell the trace."""
        trace = self._machine.trace
        if trace.on:
            trace.emit("guest_exception", vcpu=vcpu.index, vector=vector, pc=pc, cause=cause, address=address)

    def note_interrupt(self, vcpu: Vcpu) -> None:
        """Tell the trace."""
        trace = self._machine.trace
        if trace.on:
            trace.emit("guest_interrupt", vcpu=vcpu.index, irq=self._signalled(vcpu))

    def _signalled(self, vcpu: Vcpu) -> int:
        """The number of the interrupt that a controller signals to the vCPU; a hart's own ones are named by mcause."""
        platform = self._machine.platform
        if platform.gic is not None:
            return platform.gic.signalled(vcpu.index)
        return 0 if platform.plic is None else platform.plic.best(2 * vcpu.index)
