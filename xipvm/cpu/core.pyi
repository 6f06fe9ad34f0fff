"""The native core of a vCPU: emulation engines, and the walker that fills their TLBs. See core.pyx for the invariants.

Addresses are guest addresses in bytes unless they are called gfn or pfn. Exceptions of callbacks come out of
``Engine.run`` unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from xipvm.errors import InternalError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.tables import PageTable

#: Kinds of access.
READ: int
WRITE: int
FETCH: int
#: Kinds of engine.
ARM64: int
RISCV64: int
#: What ``on_miss`` answers: walk again, send the access to the device bus, give up.
RETRY_WALK: int
MMIO: int
FAULT: int
#: Why a vCPU has to leave the guest: a translation went away, the machine asks, a signal came, interrupts are unmasked.
KICK_FLUSH: int
KICK_EXIT: int
KICK_SIGNAL: int
KICK_WATCH: int

#: Why an access faulted: nothing answers at its gpa; the guest's tables have no valid entry, an access flag that is not
#: set, too few rights, too large an address; no memory where a table should be; tables of a granule that is not walked.
FAULT_ABSENT: int
FAULT_TRANSLATION: int
FAULT_ACCESS_FLAG: int
FAULT_PERMISSION: int
FAULT_ADDRESS_SIZE: int
FAULT_WALK: int
FAULT_GRANULE: int

SIGALRM_NUMBER: int
#: The engine-physical address at which the device bus begins.
MMIO_BASE: int

#: Register numbers, for ``reg`` and ``set_reg``; X0 plus n is register n (AArch64: up to X28).
ARM64_PC: int
ARM64_SP: int
ARM64_X0: int
ARM64_X29: int
ARM64_X30: int
ARM64_PSTATE: int
RISCV_PC: int
RISCV_X0: int
RISCV_PRIV: int
RISCV_MSTATUS: int
RISCV_MTVEC: int
RISCV_MEPC: int
RISCV_MCAUSE: int
RISCV_MTVAL: int
RISCV_MIE: int
RISCV_MEDELEG: int
RISCV_MIDELEG: int
RISCV_MHARTID: int
RISCV_SSTATUS: int
RISCV_STVEC: int
RISCV_SEPC: int
RISCV_SCAUSE: int
RISCV_STVAL: int
RISCV_SATP: int

class EngineError(InternalError):
    """The emulation engine refused a call it should accept, or is not the one this was built for."""

def tick_in(seconds: float) -> None:
    """Has the next tick come in ``seconds`` at the latest, where signals are guarded; the ones after as before."""

def take_signals() -> set[int]:
    """The signal numbers that arrived since the last call."""

class SignalGuard:
    """While open, SIGINT, SIGTERM and a SIGALRM every ``interval`` seconds kick the running vCPU.

    Before and after, they are Python's.
    """

    def __init__(self, interval: float) -> None: ...
    def __enter__(self) -> SignalGuard: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool: ...

class EngineGroup:
    """The engines of one machine: which frame is writable or executable is decided over all of them.

    Takes the code hook of ``host``, so that writes by the host drop code, too. One group a host memory.
    """

    def __init__(self, host: HostMemory) -> None: ...
    def close(self) -> None:
        """Releases every engine and lets go of the host memory."""

    def drop_code(self, pfn: int, count: int = 1) -> None:
        """Forgets what was translated from frames ``[pfn, pfn + count)``, whose bytes changed or will change."""

    def executed(self, pfn: int, count: int) -> int:
        """How many of ``count`` frames from ``pfn`` on have translated code."""

def pooled() -> int:
    """How many engines wait in the pool."""

def take_engine(isa: int, counted: bool, group: EngineGroup | None = None) -> Engine:
    """An engine in its reset state, from the pool where one is free. ``counted``: instructions are its clock.

    With the ``group`` that it is to join: one that has that memory mapped already, if there is one.
    """

def drain_pool() -> None:
    """Closes the engines that wait in the pool."""

class Engine:
    """One emulation engine, made by ``take_engine`` and used between ``bind`` and ``release``."""

    isa: int
    counted: bool
    bit: int
    """Its bit in the masks of the frames' metadata."""
    flushes: int
    """TLB flushes since ``bind``."""
    time_offset: int
    """Virtual time of the machine minus ``ticks``, ns: what the guest's counters are answered from."""
    faulted: bool
    """Whether the last run ended with a fault; then ``fault_address`` is its page and ``fault_access`` its access."""
    fault_address: int
    fault_access: int
    fault_kind: int
    """FAULT_*."""
    fault_level: int
    """Of the guest's tables: 0 for the last on RISC-V, for the first on AArch64."""
    fault_gpa: int
    """FAULT_ABSENT: the page of guest physical memory that nothing answers."""
    interrupt: int
    """Number of the exception that ended the last run, -1 for none."""
    invalid_insn: bool
    error: BaseException | None

    on_miss: Callable[[int, int], int] | None
    """(page's gpa, access) -> RETRY_WALK, MMIO or FAULT. The walk starts over after RETRY_WALK."""
    on_read: Callable[[int, int], int] | None
    """(gpa, size of 1, 2 or 4) -> value."""
    on_write: Callable[[int, int, int], None] | None
    """(gpa, size of 1, 2 or 4, value)."""
    on_insert: Callable[[int, int, int], object] | None
    """(gfn, pfn, rights): the first hand-out since a flush. Rights: 1 read, 3 read and write, 5 read and execute."""
    on_flush: Callable[[str], object] | None
    """(reason): ``flush_tlb`` was called."""
    on_drop: Callable[[int], object] | None
    """(pfn): code translated from the frame was dropped."""
    on_sysreg: Callable[[int, int, int, int, int, int | None], int | None] | None
    """AArch64: (op0, op1, CRn, CRm, op2, value or None for a read) -> the work is done (a read: its value), or None."""
    on_insn: Callable[[int, int], object] | None
    """RISC-V: (pc, size): a CSR instruction that the walker hooked is about to run; may do its work and set the PC."""

    on_shadow_miss: Callable[[tuple[int, int, int, int, int], int, int], int] | None
    """(role, gva, access) -> what mmu/secondary/guest_walk.py says; bound with ``roots``."""
    on_guest_flush: Callable[[], object] | None
    """The guest flushes its TLB, or is about to change the root of its tables. May flush, and switch."""

    def bind(
        self,
        group: EngineGroup,
        sptes: PageTable,
        *,
        keep: bool = True,
        roots: dict[tuple[int, int, int, int, int], tuple[PageTable, PageTable]] | None = None,
    ) -> None:
        """Joins a machine and maps its frames. EngineError when 32 engines are in it already.

        Not ``keep``: the walker takes every entry out that it finds in ``sptes``. ``on_miss`` drops its answer in,
        good for the miss in progress and until the TLB is flushed; each engine must have a table of its own.

        ``roots``: shadow paging. What the guest's tables translate is looked up there, by role and virtual page
        (bits 12 to 47): entries, and guest frames (bits 12 and up). ``on_shadow_miss`` puts them there.
        """

    def release(self) -> None:
        """Leaves the machine and goes back to the pool. EngineError while it runs; nothing when it is in none."""

    def close(self) -> None:
        """Closes the engine for good. EngineError unless it was released."""

    def run(self, pc: int, stop_at: int | None = None) -> int:
        """Runs from ``pc`` until something makes the vCPU leave; returns the engine's error code, 0 for none.

        ``stop_at``: leave at the first block start at which ``ticks`` has reached it (counted engines only).
        """

    @property
    def insns(self) -> int:
        """Instructions retired; while the guest runs, the current block is counted whole."""

    @property
    def ticks(self) -> int:
        """Virtual time in ns that this vCPU has run: ``insns``, and what it skipped while it waited for a clock."""

    @property
    def stop_at(self) -> int:
        """Ticks at which the run in progress leaves."""

    @stop_at.setter
    def stop_at(self, value: int) -> None: ...
    @property
    def block(self) -> tuple[int, int, int]:
        """(pc, bytes, instructions) of the block that runs or ran last; bytes 0 if none was entered."""

    @property
    def last_block(self) -> int | None:
        """Address of the last block that the guest entered; None on an uncounted engine, and before the first."""

    @property
    def last_code(self) -> int | None:
        """Guest physical address of ``last_block``, as far as it is known."""

    @property
    def stopped(self) -> bool:
        """Whether the last run was left by the block hook (kick or budget), or not begun for a kick that waited."""

    @property
    def kick(self) -> int:
        """KICK_* bits that wait; set to 0 once they are attended to. To have the guest left, see ``leave``."""

    @kick.setter
    def kick(self, value: int) -> None: ...
    def leave(self, why: int) -> None:
        """Has the guest left at its next block start, for ``why`` (KICK_*). Safe in all callbacks."""

    def watch(self, pending: int) -> None:
        """In the next run, leave at the first block, but the one it sets out from, at which interrupts are unmasked.

        ``pending``: what waits, on RISC-V as bits of mip; 0 ends it.
        """

    def uncount(self, pc: int) -> int:
        """Takes back the instructions of the current block from ``pc`` on, which did not run. Returns how many."""

    def retired(self, pc: int) -> int:
        """Instructions retired before the one at ``pc`` in the block that runs now."""

    def ticks_at(self, pc: int) -> int:
        """``ticks`` before the instruction at ``pc`` in the block that runs now."""

    def looked(self, pc: int) -> int:
        """Tells that the guest reads a clock at ``pc``; ``ticks`` to answer with. Looking over and over takes time."""

    @property
    def in_guest(self) -> bool:
        """Whether ``run`` is on the stack."""

    def read_code(self, gva: int, size: int) -> bytes:
        """Up to ``size`` bytes of code at ``gva``, as far as its pages are mapped executable."""

    def reg(self, regid: int) -> int:
        """Value of a register, as 64 bits."""

    def set_reg(self, regid: int, value: int) -> None:
        """Sets a register."""

    def reg128(self, regid: int) -> int:
        """Value of a vector register, as 128 bits."""

    def cp_reg(self, op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
        """Value of an AArch64 system register by its encoding."""

    def set_cp_reg(self, op0: int, op1: int, crn: int, crm: int, op2: int, value: int) -> None:
        """Sets an AArch64 system register; also makes the engine rebuild the flags it derives from PSTATE."""

    def reset_cpu(self) -> None:
        """Puts the registers back to what they were when the engine was made."""

    def flush_tlb(self, reason: str) -> None:
        """Drops every translation that the engine holds. Safe in all callbacks."""

    def guest_flush(self) -> None:
        """The guest has changed its translation: what was handed out by its tables is dropped. No ``on_flush``."""

    def walk(
        self, gva: int, access: int, read: Callable[[int, int], bytes | None], *, privilege: int | None = None
    ) -> tuple[int, int, int, int, int, bool]:
        """As :meth:`translate`: (page's gpa, fault or -1, level, leaf, rights, mxr).

        Rights are bits 0 to 2. ``mxr``: they depend on a bit of mstatus that the mode of the access cannot read.
        """

    def translate(
        self, gva: int, access: int, read: Callable[[int, int], bytes | None], *, privilege: int | None = None
    ) -> tuple[int, int, int, int]:
        """Where the guest's tables lead: (gpa, -1, level, leaf entry), or (0, FAULT_*, level, entry) for its fault.

        ``read(gpa, size)`` gives its memory, None where there is none. ``privilege``: 0 user, 1 supervisor, None the
        present one. Nothing is changed. Level and leaf are 0 where there is no translation.
        """

    def record_inserts(self, on: bool) -> None:
        """Whether ``on_insert`` is called."""
