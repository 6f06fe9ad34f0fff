"""What an ISA module needs of the machine around its vCPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from xipvm.address import PAGE_SIZE
from xipvm.cpu import core

if TYPE_CHECKING:
    from xipvm.cpu.core import Engine
    from xipvm.cpu.vcpu import Vcpu

OFFSET_MASK = PAGE_SIZE - 1
_LAST = 0xFFFF_FFFF_FFFF_FFFF

#: Why an access faulted, by ``fault_kind`` of the engine, as the end of a sentence.
FAULTS = {
    core.FAULT_ABSENT: "where no memory answers",
    core.FAULT_TRANSLATION: "which the guest's tables do not map",
    core.FAULT_ACCESS_FLAG: "whose access flag is not set",
    core.FAULT_PERMISSION: "which the guest's tables do not allow",
    core.FAULT_ADDRESS_SIZE: "which the guest's tables map beyond all physical addresses",
    core.FAULT_WALK: "and no memory answers where its table should be",
    core.FAULT_GRANULE: "through tables of a granule that is not followed; 4 KiB is",
}


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

    def check_fetch(self, vcpu: Vcpu, gpa: int) -> None:
        """Raise GuestError when a fetch from ``gpa`` is an error of its own (flash outside read-array mode)."""

    def note_exception(self, vcpu: Vcpu, vector: int, pc: int, cause: int, address: int) -> None:
        """An exception was delivered."""

    def note_interrupt(self, vcpu: Vcpu) -> None:
        """An interrupt was delivered."""


def read_code(engine: Engine, services: CpuServices, pc: int, size: int) -> bytes:
    """``size`` bytes of the code that ran at ``pc``, fewer where there is no memory.

    The secondary MMU may have lost the page since, even in the fault of that very instruction.
    """
    pc &= _LAST
    found = engine.read_code(pc, size)
    if len(found) < size:
        found += read_virtual(engine, services.read_physical, pc + len(found), size - len(found), core.FETCH) or b""
    return found


def read_virtual(
    engine: Engine, read: Callable[[int, int], bytes | None], gva: int, size: int, access: int = core.READ
) -> bytes | None:
    """``size`` bytes at ``gva`` as the guest's tables map it now, None where they or memory are missing.

    ``read(gpa, size)`` gives guest memory, or None.
    """
    found = b""
    while size:
        gpa, fault, _, _ = engine.translate(gva, access, read)
        piece = min(size, PAGE_SIZE - gva % PAGE_SIZE)
        data = None if fault >= 0 else read(gpa, piece)
        if data is None:
            return None
        found += data
        gva = gva + piece & _LAST
        size -= piece
    return found
