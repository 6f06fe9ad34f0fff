"""What an ISA module needs of the machine around its vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from xipvm.cpu.core import Engine
    from xipvm.cpu.vcpu import Vcpu


class CpuServices(Protocol):
    """Calls out of the CPU: firmware, timers, physical memory, notes for the trace."""

    def firmware_call(self, vcpu: Vcpu, arguments: list[int]) -> int | None:
        """An HVC or SMC (PSCI). The answer for the first register, None when the caller does not go on."""

    def semihosting_call(self, vcpu: Vcpu, operation: int, argument: int) -> int:
        """A semihosting call; the answer for the first register."""

    def read_timer(self, vcpu: Vcpu, name: str, ticks: int) -> int:
        """A register of the vCPU's timer as of ``ticks`` of its engine."""

    def write_timer(self, vcpu: Vcpu, name: str, value: int) -> None:
        """Write a register of the vCPU's timer."""

    def cycles(self, vcpu: Vcpu, ticks: int) -> int:
        """The cycle counter: ``ticks``, and on the host's clock, which does not count, ns of the run."""

    def read_physical(self, gpa: int, size: int) -> bytes | None:
        """Bytes of guest memory, None where there is none."""

    def check_fetch(self, vcpu: Vcpu, gva: int) -> None:
        """Raise GuestError when a fetch from ``gva`` is an error of its own (flash outside read-array mode)."""

    def note_exception(self, vcpu: Vcpu, vector: int, pc: int, cause: int, address: int) -> None:
        """An exception was delivered."""

    def note_interrupt(self, vcpu: Vcpu) -> None:
        """An interrupt was delivered."""


def read_code(engine: Engine, services: CpuServices, pc: int, size: int) -> bytes:
    """``size`` bytes of the code that ran at ``pc``, fewer where there is no memory.

    The secondary MMU may have lost the page since, even in the fault of that very instruction.
    """
    found = engine.read_code(pc, size)
    if len(found) < size:
        found += services.read_physical(pc + len(found), size - len(found)) or b""
    return found
