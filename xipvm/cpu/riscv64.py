"""RV64: traps into M and S mode, counters from virtual time, semihosting calls.

The engine reports traps by number and never enters the guest's handlers; this module does, after the RISC-V
Privileged Architecture (3.1.6 to 3.1.16). CSRs can only be written while the engine's current privilege
allows it, silently, so every trap entry starts by raising the privilege to M.

Counters and the interrupt-pending registers are answered here: the walker hooks the single instructions
that name them when it hands a page out for execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xipvm.cpu import core
from xipvm.cpu.effective import fault_address, riscv64_address, riscv64_is_store
from xipvm.cpu.services import FAULTS, OFFSET_MASK, CpuServices, read_code
from xipvm.cpu.vcpu import ACCESS_NAMES, Leave
from xipvm.errors import GuestError

if TYPE_CHECKING:
    from xipvm.cpu.vcpu import Vcpu

U, S, M = 0, 1, 3

# mcause of exceptions
FETCH_MISALIGNED, FETCH_ACCESS, ILLEGAL, BREAKPOINT = 0, 1, 2, 3
LOAD_MISALIGNED, LOAD_ACCESS, STORE_MISALIGNED, STORE_ACCESS = 4, 5, 6, 7
ECALL_U = 8
FETCH_PAGE, LOAD_PAGE, STORE_PAGE = 12, 13, 15

INTERRUPT = 1 << 63
#: Interrupts by falling priority: MEI, MSI, MTI, SEI, SSI, STI.
PRIORITY = (11, 3, 7, 9, 1, 5)

MSTATUS_SIE, MSTATUS_MIE, MSTATUS_SPIE, MSTATUS_MPIE, MSTATUS_SPP = 1 << 1, 1 << 3, 1 << 5, 1 << 7, 1 << 8
MSTATUS_MPP = 3 << 11

CSR_SATP, CSR_MIP, CSR_SIP = 0x180, 0x344, 0x144
CSR_CYCLE, CSR_TIME, CSR_INSTRET, CSR_MCYCLE, CSR_MINSTRET = 0xC00, 0xC01, 0xC02, 0xB00, 0xB02
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
MIP_SSIP, MIP_STIP, MIP_SEIP = 1 << 1, 1 << 5, 1 << 9

WFI, SFENCE_VMA = 0x10500073, 0x12000073
EBREAK, C_EBREAK = 0x00100073, 0x9002
# Semihosting marks its ebreak by two instructions that do nothing.
SEMIHOST_BEFORE, SEMIHOST_AFTER = 0x01F01013, 0x40705013

_TRAP_CSRS = (
    ("mstatus", core.RISCV_MSTATUS),
    ("mtvec", core.RISCV_MTVEC),
    ("mepc", core.RISCV_MEPC),
    ("mcause", core.RISCV_MCAUSE),
    ("mtval", core.RISCV_MTVAL),
    ("satp", core.RISCV_SATP),
)


class Riscv64:
    """The RV64 side of a vCPU. Starts in M mode with interrupts off."""

    def __init__(self, vcpu: Vcpu, services: CpuServices) -> None:
        self.vcpu = vcpu
        self.engine = vcpu.engine
        self.services = services
        self._lines = self._written = 0  # bits of mip that devices drive, and that the guest wrote
        self._offsets = {CSR_MCYCLE: 0, CSR_MINSTRET: 0}
        self.engine.on_insn = self._insn_hook

    def reset(self, pc: int, arg: int) -> None:
        """Registers as after power-on; a0 holds the hart's number and a1 ``arg`` (the device tree)."""
        engine = self.engine
        engine.reset_cpu()
        engine.set_reg(core.RISCV_PRIV, M)
        engine.set_reg(core.RISCV_MHARTID, self.vcpu.index)
        self.set_x(10, self.vcpu.index)
        self.set_x(11, arg)
        engine.set_reg(core.RISCV_PC, pc)
        self._written = 0
        self._offsets = {CSR_MCYCLE: 0, CSR_MINSTRET: 0}

    def pc(self) -> int:
        """The program counter."""
        return int(self.engine.reg(core.RISCV_PC))

    def x(self, n: int) -> int:
        """Integer register ``n`` (0..31)."""
        return int(self.engine.reg(core.RISCV_X0 + n)) if n else 0

    def set_x(self, n: int, value: int) -> None:
        """Set integer register ``n``; x0 stays 0."""
        if n:
            self.engine.set_reg(core.RISCV_X0 + n, value & MASK64)

    # Traps

    def memory_fault(self, gva: int, access: int, pc: int) -> None:
        """An access fault or a page fault of a fetch, load or store."""
        kind = self.engine.fault_kind
        page_fault = kind not in (core.FAULT_ABSENT, core.FAULT_WALK)
        why = FAULTS[kind]
        if access == core.FETCH:
            # An instruction may begin in one page and end in the next: the trap is at its start, mtval where it failed.
            tval = self.vcpu.fault_address = fault_address(gva, pc)
            if kind == core.FAULT_ABSENT:
                self.services.check_fetch(self.vcpu, self.engine.fault_gpa | tval & OFFSET_MASK)
            self._enter(FETCH_PAGE if page_fault else FETCH_ACCESS, pc, tval, f"fetch from {tval:#x}, {why}")
            return
        insn = self._insn(pc)
        tval = self.vcpu.fault_address = fault_address(gva, riscv64_address(insn, self.x))
        # The load half of an atomic memory operation traps as a store.
        store = access == core.WRITE or riscv64_is_store(insn)
        cause = STORE_ACCESS if store else LOAD_ACCESS
        if page_fault:
            cause = STORE_PAGE if store else LOAD_PAGE
        self._enter(cause, pc, tval, f"{ACCESS_NAMES[access]} at {tval:#x}, {why}")

    def exception(self, number: int, pc: int) -> None:
        """Environment calls, illegal instructions, misaligned accesses."""
        if number == ECALL_U:
            self.engine.uncount(pc - 4)  # does not retire, nor does what traps
            self._enter(ECALL_U + self._privilege(), pc - 4, 0, "ecall")
        elif number == ILLEGAL:
            self.illegal(pc - 4)
        elif number == BREAKPOINT:
            self._break(pc)
        elif number in (LOAD_MISALIGNED, STORE_MISALIGNED):
            pc -= 4  # the engine is past it; only atomics, which have 4 bytes, must be aligned
            self.engine.uncount(pc)
            insn = self._insn(pc)
            tval = riscv64_address(insn, self.x) or 0
            cause = STORE_MISALIGNED if riscv64_is_store(insn) else LOAD_MISALIGNED
            self._enter(cause, pc, tval, f"misaligned access at {tval:#x}")
        elif number == FETCH_MISALIGNED:
            self._enter(number, pc, pc, f"misaligned program counter {pc:#x}")
        else:
            raise GuestError(f"trap {number} of the engine at {pc:#x} has no counterpart")

    def illegal(self, pc: int) -> None:
        """An illegal instruction, unless it reads the time or is a breakpoint."""
        insn = self._insn(pc)
        if insn == EBREAK or insn & 0xFFFF == C_EBREAK:
            self._break(pc)
        elif insn & 0x7F == 0x73 and insn >> 20 == CSR_TIME and insn >> 12 & 3 == 2 and insn >> 15 & 31 == 0:
            self.set_x(insn >> 7 & 31, self.services.read_timer(self.vcpu, "time", self.engine.looked(pc)))
            self.engine.set_reg(core.RISCV_PC, pc + 4)
        else:
            self.engine.uncount(pc)
            size = 4 if insn & 3 == 3 else 2
            shown = insn if size == 4 else insn & 0xFFFF
            self._enter(ILLEGAL, pc, shown, f"illegal instruction {shown:#x} at {pc:#x}")

    def _break(self, pc: int) -> None:
        around = read_code(self.engine, self.services, pc - 4, 12)
        words = [int.from_bytes(around[n : n + 4], "little") for n in (0, 4, 8)]
        if words == [SEMIHOST_BEFORE, EBREAK, SEMIHOST_AFTER]:
            self.engine.set_reg(core.RISCV_PC, pc + 4)
            self.set_x(10, self.services.semihosting_call(self.vcpu, self.x(10) & 0xFFFF_FFFF, self.x(11)))
        else:
            self._enter(BREAKPOINT, pc, pc, f"breakpoint at {pc:#x}")

    def _privilege(self) -> int:
        return int(self.engine.reg(core.RISCV_PRIV)) & 3

    def _enter(self, cause: int, epc: int, tval: int, what: str) -> None:
        """Take a trap; ``cause`` has the interrupt bit set for an interrupt."""
        engine = self.engine
        privilege = self._privilege()
        engine.set_reg(core.RISCV_PRIV, M)
        delegated = int(engine.reg(core.RISCV_MIDELEG if cause & INTERRUPT else core.RISCV_MEDELEG))
        to_s = privilege <= S and delegated >> (cause & 63) & 1
        tvec = int(engine.reg(core.RISCV_STVEC if to_s else core.RISCV_MTVEC))
        handler = tvec & ~3
        if tvec & 3 == 1 and cause & INTERRUPT:
            handler += 4 * (cause & 63)
        if handler == 0:
            engine.set_reg(core.RISCV_PRIV, privilege)
            raise GuestError(f"{what}; no trap handler is set ({'stvec' if to_s else 'mtvec'} is 0)")
        if handler == epc and not cause & INTERRUPT:
            engine.set_reg(core.RISCV_PRIV, privilege)
            raise GuestError(f"{what}; that is the trap handler itself")
        status = int(engine.reg(core.RISCV_MSTATUS))
        if to_s:
            status = (status & ~(MSTATUS_SPIE | MSTATUS_SPP)) | (MSTATUS_SPIE if status & MSTATUS_SIE else 0)
            status = (status & ~MSTATUS_SIE) | (MSTATUS_SPP if privilege == S else 0)
            engine.set_reg(core.RISCV_SEPC, epc)
            engine.set_reg(core.RISCV_SCAUSE, cause)
            engine.set_reg(core.RISCV_STVAL, tval)
        else:
            status = (status & ~(MSTATUS_MPIE | MSTATUS_MPP)) | (MSTATUS_MPIE if status & MSTATUS_MIE else 0)
            status = (status & ~MSTATUS_MIE) | privilege << 11
            engine.set_reg(core.RISCV_MEPC, epc)
            engine.set_reg(core.RISCV_MCAUSE, cause)
            engine.set_reg(core.RISCV_MTVAL, tval)
        engine.set_reg(core.RISCV_MSTATUS, status)
        engine.set_reg(core.RISCV_PRIV, S if to_s else M)
        engine.set_reg(core.RISCV_PC, handler)
        if cause & INTERRUPT:
            self.services.note_interrupt(self.vcpu)
        else:
            self.vcpu.last_exception = (what, epc)
            self.services.note_exception(self.vcpu, handler, epc, cause, tval)

    # Interrupts

    def set_pending(self, number: int, level: bool) -> None:
        """Drive bit ``number`` of mip: 3 and 7 from the CLINT, 9 and 11 from the PLIC."""
        if level:
            self._lines |= 1 << number
            self.vcpu.interrupt()
        else:
            self._lines &= ~(1 << number)

    @property
    def mip(self) -> int:
        """The interrupts that wait. SEIP is both a line and a bit that M mode may set (3.1.9)."""
        return self._lines | self._written

    def interrupt_pending(self) -> bool:
        """Whether an interrupt waits that mie lets through."""
        return bool(self.mip) and bool(self.mip & self._csr(core.RISCV_MIE))

    def interrupt_waits(self) -> int:
        """mip."""
        return self.mip

    def take_interrupt(self) -> bool:
        """Enter the handler of the first interrupt by priority, unless mstatus masks it."""
        waiting = self.mip & self._csr(core.RISCV_MIE)
        privilege = self._privilege()
        status = self._csr(core.RISCV_MSTATUS)
        delegated = self._csr(core.RISCV_MIDELEG)
        if not (privilege < M or status & MSTATUS_MIE):
            to_m = 0
        else:
            to_m = waiting & ~delegated
        to_s = waiting & delegated if privilege < S or (privilege == S and status & MSTATUS_SIE) else 0
        for chosen in (to_m, to_s):
            for number in PRIORITY:
                if chosen >> number & 1:
                    self._enter(INTERRUPT | number, self.pc(), 0, "interrupt")
                    return True
        return False

    def _csr(self, regid: int) -> int:
        """Read a machine-level CSR whatever the current privilege is."""
        engine = self.engine
        privilege = self._privilege()
        if privilege == M:
            return int(engine.reg(regid))
        engine.set_reg(core.RISCV_PRIV, M)
        value = int(engine.reg(regid))
        engine.set_reg(core.RISCV_PRIV, privilege)
        return value

    def waits(self, pc: int) -> Leave:
        """WFI idles."""
        return Leave.IDLE if self._insn(pc - 4) == WFI else Leave.YIELD

    # Counters and pending bits

    def _insn_hook(self, pc: int, size: int) -> None:
        """An instruction that the walker hooked is about to run at ``pc``: one that names a CSR.

        At the end of a page it may be any SYSTEM instruction; elsewhere SFENCE.VMA and satp do not come here.
        """
        insn = self._insn(pc)
        if insn & 0xFE00_7FFF == SFENCE_VMA:
            self.engine.guest_flush()
            return
        csr = insn >> 20
        funct = insn >> 12 & 7
        if insn & 0x7F != 0x73 or funct & 3 == 0:
            return
        source = insn >> 15 & 31
        operand = source if funct & 4 else self.x(source)
        writes = funct & 3 == 1 or source != 0
        if csr == CSR_SATP:
            self.engine.guest_flush()
            return
        old = self._read_counter(csr, pc)
        if old is None:
            return
        if writes:
            if csr >> 10 & 3 == 3:
                return  # read-only: the engine raises the illegal instruction
            # What a line drives is read, but never written back.
            kept = self._written if csr in (CSR_MIP, CSR_SIP) else old
            new = {1: operand, 2: kept | operand, 3: kept & ~operand}[funct & 3]
            self._write_counter(csr, new & MASK64, pc)
        self.set_x(insn >> 7 & 31, old)
        self.engine.set_reg(core.RISCV_PC, pc + 4)

    def _count(self, csr: int, pc: int) -> int:
        engine = self.engine
        if csr == CSR_MINSTRET and engine.counted:
            return int(engine.retired(pc))
        return self.services.cycles(self.vcpu, engine.ticks_at(pc))

    def _read_counter(self, csr: int, pc: int) -> int | None:
        if csr in (CSR_CYCLE, CSR_MCYCLE, CSR_INSTRET, CSR_MINSTRET):
            if csr >> 8 == 0xB and self._privilege() != M:
                return None
            machine = CSR_MCYCLE if csr & 0xF == 0 else CSR_MINSTRET
            return (self._count(machine, pc) + self._offsets[machine]) & MASK64
        if csr == CSR_TIME:
            return self.services.read_timer(self.vcpu, "time", self.engine.looked(pc))
        if csr == CSR_MIP and self._privilege() == M:
            return self.mip
        if csr == CSR_SIP and self._privilege() >= S:
            return self.mip & self._csr(core.RISCV_MIDELEG)
        return None

    def _write_counter(self, csr: int, value: int, pc: int) -> None:
        if csr in self._offsets:
            self._offsets[csr] = value - self._count(csr, pc)
        elif csr in (CSR_MIP, CSR_SIP):
            if csr == CSR_MIP:
                writable = MIP_SSIP | MIP_STIP | MIP_SEIP
            else:
                writable = MIP_SSIP & self._csr(core.RISCV_MIDELEG)
            self._written = (self._written & ~writable) | (value & writable)
            if self._written:
                self.vcpu.interrupt()

    # Reports

    def registers(self) -> list[tuple[str, int]]:
        """Integer registers by ABI name, PC, privilege and the trap CSRs."""
        names = ["zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"]
        names += [f"a{n}" for n in range(8)] + [f"s{n}" for n in range(2, 12)] + [f"t{n}" for n in range(3, 7)]
        rows = [(name, self.x(n)) for n, name in enumerate(names)]
        rows += [("pc", self.pc()), ("priv", self._privilege())]
        rows += [(name, self._csr(regid)) for name, regid in _TRAP_CSRS]
        return rows

    def _insn(self, pc: int) -> int:
        return int.from_bytes(read_code(self.engine, self.services, pc, 4), "little")
