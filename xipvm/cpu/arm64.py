"""AArch64: exceptions into EL1, system registers that show time, PSCI and semihosting calls.

The engine reports exceptions by number and never enters the guest's vectors; this module does, after the
Arm Architecture Reference Manual (DDI 0487, D1.3 "Exceptions"). The order of the register writes matters
to the engine: SP_EL0 first when the stack pointer changes, then PSTATE, then SP, and last a system
register written by its encoding, which makes the engine rebuild what it derives from PSTATE.

Time: CNTVCT and its relatives, and PMCCNTR, are answered from virtual time; the engine would show the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.cpu import core
from xipvm.cpu.effective import arm64_address, fault_address
from xipvm.cpu.services import FAULTS, OFFSET_MASK, CpuServices, read_code
from xipvm.cpu.vcpu import ACCESS_NAMES, Leave
from xipvm.errors import GuestError

if TYPE_CHECKING:
    from xipvm.cpu.vcpu import Vcpu

# Exception numbers of the engine (QEMU's EXCP_*).
EXCP_UDEF, EXCP_SWI, EXCP_PREFETCH_ABORT, EXCP_DATA_ABORT, EXCP_BKPT = 1, 2, 3, 4, 7
EXCP_HVC, EXCP_SMC, EXCP_SEMIHOST = 11, 13, 16

# ESR_ELx.EC
EC_UNKNOWN, EC_SVC64, EC_IABT, EC_PC_ALIGN, EC_DABT, EC_BRK64 = 0x00, 0x15, 0x20, 0x22, 0x24, 0x3C
IL = 1 << 25
FSC_EXTERNAL = 0x10  # synchronous external abort, not on a table walk
#: Fault status codes that have the level of the walk in their low bits, by ``fault_kind``.
FSC = {
    core.FAULT_ADDRESS_SIZE: 0x00,
    core.FAULT_TRANSLATION: 0x04,
    core.FAULT_ACCESS_FLAG: 0x08,
    core.FAULT_PERMISSION: 0x0C,
    core.FAULT_WALK: 0x14,
}
FSC_ALIGNMENT = 0x21
WNR = 1 << 6

PSTATE_I = 1 << 7
PSTATE_DAIF = 0xF << 6
PSTATE_EL1H = 0b0101

VBAR_EL1 = (3, 0, 12, 0, 0)
ESR_EL1 = (3, 0, 5, 2, 0)
FAR_EL1 = (3, 0, 6, 0, 0)
ELR_EL1 = (3, 0, 4, 0, 1)
SPSR_EL1 = (3, 0, 4, 0, 0)
SP_EL0 = (3, 0, 4, 1, 0)
SP_EL1 = (3, 4, 4, 1, 0)
SCTLR_EL1 = (3, 0, 1, 0, 0)
TTBR0_EL1 = (3, 0, 2, 0, 0)
TTBR1_EL1 = (3, 0, 2, 0, 1)
TCR_EL1 = (3, 0, 2, 0, 2)
PAR_EL1 = (3, 0, 7, 4, 0)
MAIR_EL1 = (3, 0, 10, 2, 0)
PAR_NS, PAR_RES1 = 1 << 9, 1 << 11
MPIDR_EL1 = (3, 0, 0, 0, 5)
PMCCNTR_EL0 = (3, 3, 9, 13, 0)

#: The generic timer's registers by their encoding (op0, op1, CRn, CRm, op2).
TIMER_REGISTERS = {
    (3, 3, 14, 0, 0): "CNTFRQ_EL0",
    (3, 3, 14, 0, 1): "CNTPCT_EL0",
    (3, 3, 14, 0, 2): "CNTVCT_EL0",
    (3, 3, 14, 2, 0): "CNTP_TVAL_EL0",
    (3, 3, 14, 2, 1): "CNTP_CTL_EL0",
    (3, 3, 14, 2, 2): "CNTP_CVAL_EL0",
    (3, 3, 14, 3, 0): "CNTV_TVAL_EL0",
    (3, 3, 14, 3, 1): "CNTV_CTL_EL0",
    (3, 3, 14, 3, 2): "CNTV_CVAL_EL0",
}

WFI, WFE, YIELD, HLT_SEMIHOST = 0xD503207F, 0xD503205F, 0xD503203F, 0xD45E0000
HVC, SMC, CALL_MASK = 0xD4000002, 0xD4000003, 0xFFE0001F

_REPORTED = (
    ("esr_el1", ESR_EL1),
    ("far_el1", FAR_EL1),
    ("elr_el1", ELR_EL1),
    ("vbar_el1", VBAR_EL1),
    ("sctlr_el1", SCTLR_EL1),
    ("tcr_el1", TCR_EL1),
    ("ttbr0_el1", TTBR0_EL1),
    ("ttbr1_el1", TTBR1_EL1),
)

_X = [core.ARM64_X0 + n for n in range(29)] + [core.ARM64_X29, core.ARM64_X30]


class Arm64:
    """The AArch64 side of a vCPU. Starts in EL1 with the MMU off, as QEMU's virt does without EL2 and EL3."""

    def __init__(self, vcpu: Vcpu, services: CpuServices) -> None:
        self.vcpu = vcpu
        self.engine = vcpu.engine
        self.services = services
        self.engine.on_sysreg = self._sysreg

    def reset(self, pc: int, arg: int) -> None:
        """Registers as after power-on; X0 holds ``arg`` (the device tree, or PSCI's context)."""
        engine = self.engine
        engine.reset_cpu()
        engine.set_reg(core.ARM64_PSTATE, PSTATE_DAIF | PSTATE_EL1H)
        engine.set_reg(core.ARM64_X0, arg)
        engine.set_reg(core.ARM64_PC, pc)

    def pc(self) -> int:
        """The program counter."""
        return int(self.engine.reg(core.ARM64_PC))

    def x(self, n: int) -> int:
        """General register ``n`` (0..30)."""
        return int(self.engine.reg(_X[n]))

    def set_x(self, n: int, value: int) -> None:
        """Set general register ``n`` (0..30)."""
        self.engine.set_reg(_X[n], value & 0xFFFF_FFFF_FFFF_FFFF)

    # Exceptions

    def memory_fault(self, gva: int, access: int, pc: int) -> None:
        """An abort, external or of the guest's translation: instruction abort for a fetch, else data abort."""
        kind = self.engine.fault_kind
        why = FAULTS[kind]
        if kind == core.FAULT_GRANULE:
            raise GuestError(f"{ACCESS_NAMES[access]} at {gva:#x}, {why}")
        fsc = self._fault_status(kind, self.engine.fault_level)
        if access == core.FETCH:
            self.vcpu.fault_address = pc
            if kind == core.FAULT_ABSENT:
                self.services.check_fetch(self.vcpu, self.engine.fault_gpa | pc & OFFSET_MASK)
            self._enter(EC_IABT, fsc, pc, pc, f"fetch from {pc:#x}, {why}")
            return
        far = self.vcpu.fault_address = fault_address(gva, self._accessed(pc))
        what = f"{ACCESS_NAMES[access]} at {far:#x}, {why}"
        self._enter(EC_DABT, fsc | (WNR if access == core.WRITE else 0), pc, far, what)

    @staticmethod
    def _fault_status(kind: int, level: int) -> int:
        return FSC_EXTERNAL if kind == core.FAULT_ABSENT else FSC[kind] | level

    def exception(self, number: int, pc: int) -> None:
        """SVC, HVC, SMC, BRK, undefined instructions, alignment faults."""
        if number == EXCP_SWI:
            insn = self._insn(pc - 4)
            self._enter(EC_SVC64, insn >> 5 & 0xFFFF, pc, None, "SVC")
        elif number in (EXCP_HVC, EXCP_SMC):
            self._call(pc)
        elif number == EXCP_BKPT:
            self._enter(EC_BRK64, self._insn(pc) >> 5 & 0xFFFF, pc, None, "BRK")
        elif number == EXCP_SEMIHOST:
            self._semihost(pc)
        elif number == EXCP_UDEF:
            self.illegal(pc)
        elif number == EXCP_PREFETCH_ABORT:
            self._enter(EC_PC_ALIGN, 0, pc, pc, f"misaligned program counter {pc:#x}")
        elif number == EXCP_DATA_ABORT:
            far = self._accessed(pc) or 0
            wnr = 0 if self._insn(pc) >> 22 & 1 else WNR  # bit 22: the exclusive and ordered forms' load bit
            self._enter(EC_DABT, FSC_ALIGNMENT | wnr, pc, far, f"misaligned access at {far:#x}")
        else:
            raise GuestError(f"exception {number} of the engine at {pc:#x} has no counterpart")

    def illegal(self, pc: int) -> None:
        """An undefined instruction, unless it is a call to the firmware or the debugger."""
        insn = self._insn(pc)
        if insn & CALL_MASK in (HVC, SMC):
            self._call(pc + 4)
        elif insn == HLT_SEMIHOST:
            self._semihost(pc)
        else:
            self._enter(EC_UNKNOWN, 0, pc, None, f"undefined instruction {insn:#010x} at {pc:#x}")

    def _call(self, after: int) -> None:
        self.engine.set_reg(core.ARM64_PC, after)
        arguments = [self.x(n) for n in range(4)]
        answer = self.services.firmware_call(self.vcpu, arguments)
        if answer is not None:
            self.set_x(0, answer)

    def _semihost(self, pc: int) -> None:
        self.engine.set_reg(core.ARM64_PC, pc + 4)
        self.set_x(0, self.services.semihosting_call(self.vcpu, self.x(0) & 0xFFFF_FFFF, self.x(1)))

    def _enter(self, ec: int, iss: int, elr: int, far: int | None, what: str) -> None:
        """Take a synchronous exception to EL1 with preferred return address ``elr``."""
        engine = self.engine
        pstate = int(engine.reg(core.ARM64_PSTATE))
        lower = pstate & 0b1100 == 0
        if ec in (EC_IABT, EC_DABT) and not lower:
            ec += 1
        esr = ec << 26 | IL | iss
        vector = self._vector(pstate, 0x000, elr, what)
        if far is not None:
            engine.set_cp_reg(*FAR_EL1, far)
        self._switch(pstate, vector, elr)
        engine.set_cp_reg(*ESR_EL1, esr)
        self.vcpu.last_exception = (what, elr)
        self.services.note_exception(self.vcpu, vector, elr, esr, 0 if far is None else far)

    def _vector(self, pstate: int, kind: int, pc: int, what: str) -> int:
        vbar = int(self.engine.cp_reg(*VBAR_EL1))
        if vbar == 0:  # flash on these boards, and its start is code
            raise GuestError(f"{what}; no exception vectors are set (VBAR_EL1 is 0)")
        if pstate & 0b1100 == 0:
            vector = vbar + 0x400 + kind
        else:
            vector = vbar + (0x200 if pstate & 1 else 0x000) + kind
        if pc == vector and kind == 0:
            raise GuestError(f"{what}; that is the exception vector itself")
        return vector

    def _switch(self, pstate: int, vector: int, elr: int) -> None:
        engine = self.engine
        sp = int(engine.reg(core.ARM64_SP))
        on_sp_el0 = pstate & 0b1101 != PSTATE_EL1H
        if on_sp_el0:
            engine.set_cp_reg(*SP_EL0, sp)
            sp = int(engine.cp_reg(*SP_EL1))
        engine.set_reg(core.ARM64_PSTATE, (pstate & ~0x1F & ~(3 << 20)) | PSTATE_DAIF | PSTATE_EL1H)
        if on_sp_el0:
            engine.set_reg(core.ARM64_SP, sp)
        engine.set_reg(core.ARM64_PC, vector)
        engine.set_cp_reg(*ELR_EL1, elr)
        engine.set_cp_reg(*SPSR_EL1, pstate)

    # Interrupts

    def interrupt_pending(self) -> bool:
        """Whether the interrupt controller signals this vCPU."""
        return self.vcpu.irq

    def interrupt_waits(self) -> int:
        """1 when the interrupt controller signals this vCPU."""
        return int(self.vcpu.irq)

    def set_pending(self, bit: int, level: bool) -> None:
        """AArch64 has one line, which ``Vcpu.set_irq`` drives."""
        self.vcpu.set_irq(level)

    def take_interrupt(self) -> bool:
        """Enter the IRQ vector unless PSTATE.I masks it."""
        pstate = int(self.engine.reg(core.ARM64_PSTATE))
        if pstate & PSTATE_I:
            return False
        pc = self.pc()
        self._switch(pstate, self._vector(pstate, 0x080, -1, "interrupt"), pc)
        self.services.note_interrupt(self.vcpu)
        return True

    def waits(self, pc: int) -> Leave:
        """WFI idles; the engine runs WFE and YIELD as NOPs, so nothing else is known to stop it."""
        return Leave.IDLE if self._insn(pc - 4) == WFI else Leave.YIELD

    # System registers

    def _sysreg(self, op0: int, op1: int, crn: int, crm: int, op2: int, value: int | None) -> int | None:
        """Answer an MRS (``value`` None), or do an MSR or an AT; None leaves it to the engine."""
        key = (op0, op1, crn, crm, op2)
        if crn == 14:
            name = TIMER_REGISTERS.get(key)
            if name is None:
                return None
            if value is None:
                return self.services.read_timer(self.vcpu, name, self.engine.ticks_at(self.pc()))
            self.services.write_timer(self.vcpu, name, value)
            return 0
        if key == PMCCNTR_EL0 and value is None:
            return self.services.cycles(self.vcpu, self.engine.ticks_at(self.pc()))
        if key == MPIDR_EL1 and value is None and self._privileged():
            return 1 << 31 | self.vcpu.index
        if op0 == 1 and op1 == 0 and op2 < 4 and value is not None and self._privileged():
            self._translate(op2, value)
            return 0
        return None

    def _privileged(self) -> bool:
        return int(self.engine.reg(core.ARM64_PSTATE)) & 0xC != 0

    def _translate(self, op2: int, gva: int) -> None:
        """AT S1E1R, S1E1W, S1E0R, S1E0W. The engine would look for the tables in the host's frames."""
        engine = self.engine
        access = core.WRITE if op2 & 1 else core.READ
        gpa, kind, level, leaf = engine.translate(gva, access, self.services.read_physical, privilege=not op2 & 2)
        if kind == core.FAULT_GRANULE:
            raise GuestError(f"translation of {gva:#x} {FAULTS[kind]}")
        if kind >= 0:
            engine.set_cp_reg(*PAR_EL1, PAR_RES1 | self._fault_status(kind, level) << 1 | 1)
            return
        attributes = int(engine.cp_reg(*MAIR_EL1)) >> 8 * (leaf >> 2 & 7) & 0xFF if leaf else 0
        shareable = leaf >> 8 & 3
        engine.set_cp_reg(*PAR_EL1, attributes << 56 | gpa & ~OFFSET_MASK | PAR_RES1 | PAR_NS | shareable << 7)

    # Reports

    def registers(self) -> list[tuple[str, int]]:
        """General registers, SP, PC, PSTATE and the exception registers."""
        engine = self.engine
        rows = [(f"x{n}", self.x(n)) for n in range(31)]
        rows.append(("sp", int(engine.reg(core.ARM64_SP))))
        rows.append(("pc", self.pc()))
        rows.append(("pstate", int(engine.reg(core.ARM64_PSTATE))))
        for name, register in _REPORTED:
            rows.append((name, int(engine.cp_reg(*register))))
        return rows

    def _accessed(self, pc: int) -> int | None:
        """The address that the load or store at ``pc`` accesses."""
        return arm64_address(read_code(self.engine, self.services, pc, 4), pc, self._by_name)

    def _by_name(self, name: str) -> int:
        if name == "sp":
            return int(self.engine.reg(core.ARM64_SP))
        return 0 if name in ("xzr", "wzr") else self.x({"fp": 29, "lr": 30}.get(name) or int(name[1:]))

    def _insn(self, pc: int) -> int:
        return int.from_bytes(read_code(self.engine, self.services, pc, 4), "little")
