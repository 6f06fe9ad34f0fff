"""What is said about a guest that crashed: where, what it executed, what it touched and how that was mapped.

A report is data (``CrashReport``); ``render`` makes the text that ``xipvm run`` prints on stderr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xipvm.address import PAGE_SHIFT
from xipvm.cpu import core
from xipvm.cpu.services import read_virtual
from xipvm.cpu.vcpu import ACCESS_NAMES
from xipvm.errors import GuestError

if TYPE_CHECKING:
    from xipvm.cpu.vcpu import Vcpu
    from xipvm.machine import Machine

#: Bytes of code shown before and after PC.
BEFORE, AFTER = 16, 16


@dataclass
class CrashReport:
    """A crash of vCPU ``vcpu`` at ``pc``; ``code`` rows are (address, bytes, text)."""

    message: str
    vcpu: int
    pc: int
    where: str | None
    registers: list[tuple[str, int]]
    code: list[tuple[int, bytes, str]]
    before: str | None = None
    """The exception whose handler the guest was in or on its way to, if it had one."""
    block: int | None = None
    """Where the last block began that the guest entered, for a jump that went wrong."""
    block_where: str | None = None
    access: str | None = None
    address: int | None = None
    translation: list[tuple[str, str]] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    def render(self) -> str:
        """The report as text, without a final newline."""
        at = f"{self.pc:#x}" + (f" <{self.where}>" if self.where else "")
        lines = [f"guest crashed: {self.message}", f"  vcpu{self.vcpu} at pc {at}"]
        if self.before:
            lines.append(f"  last exception before: {self.before}")
        lines += ["", "code:"]
        for address, raw, text in self.code:
            mark = "=>" if address == self.pc else "  "
            lines.append(f"  {mark} {address:#012x}  {raw.hex():<8}  {text}")
        if not self.code:
            lines.append("  (no code is mapped there)")
        if self.block is not None and not self.code:
            at = f"{self.block:#x}" + (f" <{self.block_where}>" if self.block_where else "")
            lines.append(f"  the last block that ran began at {at}")
        if self.translation:
            lines += ["", f"access: {self.access} at {self.address:#x}" if self.address is not None else "access:"]
            lines += [f"  {what:<7} {text}" for what, text in self.translation]
        lines += ["", "registers:"]
        for n in range(0, len(self.registers), 4):
            lines.append("  " + "  ".join(f"{name:>9} {value:016x}" for name, value in self.registers[n : n + 4]))
        if self.history:
            lines += ["", "last events that touched the page:"]
            lines += [f"  {line}" for line in self.history]
        return "\n".join(lines)


def crash_report(machine: Machine, vcpu: Vcpu, error: GuestError) -> CrashReport:
    """The report of ``error``, which ended the run of ``vcpu``."""
    engine = vcpu.engine
    pc = vcpu.isa.pc()
    report = CrashReport(
        message=str(error),
        vcpu=vcpu.index,
        pc=pc,
        where=_symbol(machine, pc),
        registers=vcpu.isa.registers(),
        code=_disassemble(machine, vcpu, pc),
    )
    if vcpu.last_exception is not None:
        what, origin = vcpu.last_exception
        symbol = _symbol(machine, origin)
        report.before = f"{what}, from pc {origin:#x}" + (f" <{symbol}>" if symbol else "")
    report.block = engine.last_block
    if report.block is not None:
        report.block_where = _symbol(machine, report.block)
    if engine.faulted:
        address = int(engine.fault_address)
        if vcpu.fault_address is not None and vcpu.fault_address >> PAGE_SHIFT == address >> PAGE_SHIFT:
            address = vcpu.fault_address
        report.access = ACCESS_NAMES[engine.fault_access]
        report.address = address
        gpa, fault, level, entry = engine.translate(address, core.READ, machine.read_physical)
        if entry:
            report.translation.append(("guest", f"entry {entry:#x} of level {level}"))
        if fault < 0:
            report.translation += _translation(machine, gpa)
            report.history = _history(machine, gpa)
    return report


def _symbol(machine: Machine, address: int) -> str | None:
    return None if machine.image is None else machine.image.describe(address)


def _disassemble(machine: Machine, vcpu: Vcpu, pc: int) -> list[tuple[int, bytes, str]]:
    import capstone

    if machine.board.isa == "arm64":
        engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_LITTLE_ENDIAN)
    else:
        engine = capstone.Cs(capstone.CS_ARCH_RISCV, capstone.CS_MODE_RISCV64 | capstone.CS_MODE_RISCVC)
    start = max(pc - BEFORE, 0)
    raw = _code(machine, vcpu, start, pc - start + AFTER)
    if raw is None:
        start, raw = pc, _code(machine, vcpu, pc, 4)
    if raw is None:
        return []
    engine.skipdata = True
    rows = _decode(engine, raw, start)
    if all(address != pc for address, _, _ in rows):
        # The bytes before were not the start of an instruction.
        rows = _decode(engine, raw[pc - start :], pc)
    return rows


def _code(machine: Machine, vcpu: Vcpu, gva: int, size: int) -> bytes | None:
    """What is at ``gva``, be it only to be read: that it cannot be executed may be what is reported."""
    for access in (core.FETCH, core.READ):
        raw = read_virtual(vcpu.engine, machine.read_physical, gva, size, access)
        if raw is not None:
            return raw
    return None


def _decode(engine: object, raw: bytes, start: int) -> list[tuple[int, bytes, str]]:
    return [
        (insn.address, bytes(insn.bytes), f"{insn.mnemonic} {insn.op_str}".rstrip())
        for insn in engine.disasm(raw, start)  # type: ignore[attr-defined]
    ]


def _translation(machine: Machine, address: int) -> list[tuple[str, str]]:
    """How ``address`` is mapped on every level, outside in."""
    gfn = address >> PAGE_SHIFT
    info = machine.secondary.describe(gfn)
    rows = [("gpa", f"{address:#x} (gfn {gfn:#x})"), ("spte", str(info))]
    for memory in machine.flash:
        if memory.contains(address):
            rows.append(("flash", f"{memory.device.name}+{address - memory.bank.base:#x}: {memory.device.describe()}"))
    found = machine.bus.find(address)
    if found is not None:
        device, offset = found
        rows.append(("device", f"{device.name}+{offset:#x}"))
    if info.hva is not None:
        vma = machine.mm.find_vma(info.hva)
        rows.append(("vma", "none" if vma is None else str(vma)))
        pte = machine.mm.pgd.get(info.hva >> PAGE_SHIFT)
        rows.append(("pte", f"{pte:#x} at hva {info.hva:#x}"))
    if machine.secondary.last_error:
        rows.append(("why", machine.secondary.last_error))
    return rows


def _history(machine: Machine, address: int) -> list[str]:
    history = machine.history
    if history is None:
        return []
    from xipvm.trace.show import format_event

    gfn = address >> PAGE_SHIFT
    hva = machine.secondary.describe(gfn).hva
    translated = machine.secondary.translate(gfn)
    events = history.touching(gfn=gfn, hva=hva, pfn=None if translated is None else translated[0])
    return [format_event(event) for event in events]
