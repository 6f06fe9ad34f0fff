# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The native core of a vCPU: one emulation engine and the walker that fills its TLB.

The engine runs with a virtual TLB: every miss comes to ``fill``, which is the only way a guest gets a
translation: by its own tables from a virtual to a guest physical address, where it has turned them on (``paging.pxi``),
and by the shadow entries from there to a frame. **Walk, handle, walk again**: a miss that the tables cannot answer goes to the Python handler,
after which the walk starts over; between the last read of the tables and the return there is no schedule
point, so no entry is installed behind a flush.

Engine-physical addresses are ``pfn << 12``: the arena at 0, device frames above, and one MMIO window at
``MMIO_BASE`` in which the guest physical address is the offset. These regions are mapped once and stay.

**Writable xor executable is a state of the frame**, not of an entry: a frame is handed out for writing only
after the code translated from it was dropped on every engine and its executable entries revoked, and for
execution only after every writable entry is gone. Data entries are never executable and code entries never
writable, which also keeps the engine's stores on their fast path. A frame that goes back and forth all the time, because
code and data share it, becomes both for one engine alone (``mix``), which then watches every store to it.

Leaving the guest happens at block starts only, through the ``kick`` word that the block hook reads. An
uncounted engine (host clock) has no block hook: it is stopped, and leaves at the next block start, too
(``stop_at_blocks``). Dropping code would not do: a block that jumps to itself runs on.

All callbacks run with the GIL held: it is never given up while the guest runs.

This file has the engine itself, which is one class and therefore long; what stands around it is included: ``api.pxi``
(the library's functions), ``signals.pxi``, ``group.pxi`` (frames over all engines), ``paging.pxi`` (guest tables) and
``hooks.pxi`` (callbacks).
"""

from cpython.object cimport PyObject
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from xipvm.cpu.unicorn cimport *
from xipvm.mmu.frames cimport FrameMeta, HostMemory
from xipvm.mmu.tables cimport PageTable

import importlib.util
import os.path

from xipvm.errors import InternalError

cdef extern from "dlfcn.h" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    char *dlerror()
    enum:
        RTLD_NOW

cdef extern from "signal.h" nogil:
    ctypedef struct sigset_t:
        pass
    struct sigaction_s "sigaction":
        void (*sa_handler)(int) noexcept
        sigset_t sa_mask
        int sa_flags
    int sigaction(int signum, const sigaction_s *act, sigaction_s *old)
    int sigemptyset(sigset_t *mask)
    enum:
        SIGINT
        SIGALRM
        SIGTERM
        SA_RESTART

cdef extern from "sys/time.h" nogil:
    struct timeval:
        long tv_sec
        long tv_usec
    struct itimerval:
        timeval it_interval
        timeval it_value
    int setitimer(int which, const itimerval *new, itimerval *old)
    int getitimer(int which, itimerval *value)
    enum:
        ITIMER_REAL

READ, WRITE, FETCH = range(3)
ARM64, RISCV64 = range(2)
RETRY_WALK, MMIO, FAULT = range(3)

# Why a vCPU has to leave the guest; the bits of `kick`.
KICK_FLUSH = 1      # a translation went away
KICK_EXIT = 2       # the machine has to look at something
KICK_SIGNAL = 4     # a signal came
KICK_WATCH = 8      # stop when the guest unmasks interrupts, see ``Engine.watch``
SIGALRM_NUMBER = SIGALRM

cdef enum:
    C_READ = 0
    C_WRITE = 1
    C_FETCH = 2
    C_RETRY = 0
    C_MMIO = 1
    C_FAULT = 2
    C_GUEST_FAULT = 3           # of shadow paging, see mmu/secondary/guest_walk.py
    C_TABLE_FAULT = 4
    C_NOT_SHADOWED = 5
    C_KICK_FLUSH = 1
    C_KICK_EXIT = 2
    C_KICK_SIGNAL = 4
    C_KICK_WATCH = 8
    PSTATE_I = 1 << 7
    CSR_SATP = 0x180
    MSTATUS_SIE = 1 << 1
    MSTATUS_MIE = 1 << 3
    C_ARM64 = 0
    SPTE_READ = 1
    SPTE_WRITE = 2
    SPTE_EXEC = 4
    SPTE_HUGE = 1 << 7
    SPTE_PRESENT = 1 << 11
    NR_LENGTHS = 8192
    NR_SCANNED = 1024
    MISS_LIMIT = 4096
    MIXED_AFTER = 64            # turns of a frame from executable to writable after which it may be both
    MOST_FETCHED = 4096
    PFN_BITS = 37               # of what `fetched` holds; the guest frame is above
    NR_DROPINS = 32             # entries that one miss may need; a guest's page table has a few levels
    GROW_FIRST = 1024           # fills since a flush after which the TLB is made larger for the first time
    GROW_LAST = 32768
    TCG_BUFFER = 32 << 20
    VERSION = 0x020104ff        # 2.1.4
    NO_EXIT_REQUEST = 2034      # bytes of struct uc_struct of that release, where long has 64 bits
    INIT_DONE = 2035
    POOLED_BYTES = 64 << 20
    POOLED_WITH_MEMORY = 4
    LOOK_GAP = 64               # ticks between two looks at a clock that count as waiting
    LOOKS = 32
    SKIP = 1000                 # ns
    NS_PER_COUNT = 16           # the generic timer counts at 62.5 MHz

cdef uint64_t SPTE_MMIO = (<uint64_t>1) << 62
cdef uint64_t PFN_MASK = (((<uint64_t>1) << 40) - 1)
cdef uint64_t PFN_LOW = (((<uint64_t>1) << PFN_BITS) - 1)
cdef uint64_t MMIO_BASE_C = (<uint64_t>1) << 45
cdef uint64_t MMIO_SIZE = (<uint64_t>1) << 39
cdef uint64_t SCRATCH = 0x4070000000000000      # a VA that no guest can map: not canonical, and no tag makes it so
cdef uint64_t INDEX_LIMIT = (<uint64_t>1) << 27
cdef uint64_t SHADOW_INDEX = ((<uint64_t>1) << 36) - 1
cdef uint64_t NEVER = ~(<uint64_t>0)

MMIO_BASE = MMIO_BASE_C

# Register numbers of the engine, so that nobody has to import its Python package (50 ms).
ARM64_PC = UC_ARM64_REG_PC
ARM64_SP = UC_ARM64_REG_SP
ARM64_X0 = UC_ARM64_REG_X0
ARM64_X29 = UC_ARM64_REG_X29
ARM64_X30 = UC_ARM64_REG_X30
ARM64_PSTATE = UC_ARM64_REG_PSTATE
RISCV_PC = UC_RISCV_REG_PC
RISCV_X0 = UC_RISCV_REG_X0
RISCV_PRIV = UC_RISCV_REG_PRIV
RISCV_MSTATUS = UC_RISCV_REG_MSTATUS
RISCV_MTVEC = UC_RISCV_REG_MTVEC
RISCV_MEPC = UC_RISCV_REG_MEPC
RISCV_MCAUSE = UC_RISCV_REG_MCAUSE
RISCV_MTVAL = UC_RISCV_REG_MTVAL
RISCV_MIE = UC_RISCV_REG_MIE
RISCV_MEDELEG = UC_RISCV_REG_MEDELEG
RISCV_MIDELEG = UC_RISCV_REG_MIDELEG
RISCV_MHARTID = UC_RISCV_REG_MHARTID
RISCV_SSTATUS = UC_RISCV_REG_SSTATUS
RISCV_STVEC = UC_RISCV_REG_STVEC
RISCV_SEPC = UC_RISCV_REG_SEPC
RISCV_SCAUSE = UC_RISCV_REG_SCAUSE
RISCV_STVAL = UC_RISCV_REG_STVAL
RISCV_SATP = UC_RISCV_REG_SATP

cdef Api api
cdef bint api_loaded = False


include "api.pxi"
include "signals.pxi"
include "group.pxi"
include "paging.pxi"
include "hooks.pxi"


_pool = {}          # (isa, counted) -> engines that are free


def pooled():
    """How many engines wait in the pool."""
    return sum(len(free_ones) for free_ones in _pool.values())


def take_engine(int isa, bint counted, EngineGroup group=None):
    """An engine for ``isa`` in its reset state, from the pool where one is free.

    With the ``group`` that it is to join: one that has that memory mapped already, if there is one.
    """
    cdef Engine engine
    wanted = None if group is None else _memory_of(group.host)
    free_ones = _pool.get((isa, counted), ())
    for mapped in (wanted, []):
        for engine in free_ones:
            if engine.maps == mapped:
                free_ones.remove(engine)
                return engine
    return Engine(isa, counted)


cdef list _memory_of(HostMemory host):
    """What an engine maps: address, size and where it is."""
    cdef int n
    maps = [(0, host.nr_frames << 12, <size_t>host.base)]
    for n in range(host.nr_regions):
        if host.regions[n].count:
            maps.append((host.regions[n].first << 12, host.regions[n].count << 12, <size_t>host.regions[n].base))
    return maps


def drain_pool():
    """Closes the engines that wait in the pool."""
    for free_ones in _pool.values():
        while free_ones:
            free_ones.pop().close()


@cython.no_gc_clear             # closing the engine looks addresses up once more
cdef class Engine:
    """One emulation engine. Made by ``take_engine``, used between ``bind`` and ``release``.

    Callables to set before ``run``: ``on_miss(gpa, access) -> RETRY_WALK | MMIO | FAULT``, ``on_read(gpa, size)``,
    ``on_write(gpa, size, value)``, ``on_sysreg(op0, op1, crn, crm, op2, value or None)``, ``on_insn(pc, size)``; with
    shadow paging ``on_shadow_miss(role, gva, access)`` and ``on_guest_flush()``; and for a
    trace ``on_insert(gfn, pfn, perms)``, ``on_flush(reason)``, ``on_drop(pfn)``.
    """

    def __cinit__(self, int isa, bint counted):
        if not api_loaded:
            _load()
        self.isa = isa
        self.counted = counted
        self.hooks = {}
        self.maps = []
        self.lengths = <BlockLength *>calloc(NR_LENGTHS, sizeof(BlockLength))
        self.scanned = <Scanned *>calloc(NR_SCANNED, sizeof(Scanned))
        self.dropped = []
        self.fetched = {}
        self.block_copy = <uint8_t *>calloc(2, 4096)
        if self.lengths == NULL or self.scanned == NULL or self.block_copy == NULL:
            raise MemoryError
        cdef int arch = UC_ARCH_ARM64 if isa == C_ARM64 else UC_ARCH_RISCV
        cdef int mode = UC_MODE_ARM if isa == C_ARM64 else UC_MODE_RISCV64
        _check(api.open(arch, mode, &self.uc), "uc_open")
        cdef bint fresh = not (<uint8_t *>self.uc)[INIT_DONE]
        if isa == C_ARM64:
            _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_UC_PAGE_SIZE, 1), <int>4096), "page size")
            _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_CPU_MODEL, 1), <int>UC_CPU_ARM64_A57), "CPU model")
        _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TCG_BUFFER_SIZE, 1), <int>TCG_BUFFER), "code buffer size")
        _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_TYPE, 1), <int>UC_TLB_VIRTUAL), "TLB mode")
        _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_UC_USE_EXITS, 1), <int>1), "exits")
        self.hot.uc = self.uc
        self.hot.fixed = isa == C_ARM64
        self.hot.counted = self.hot.polled = counted
        self.hot.engine = <void *>self
        self.hot.generation = self.bytes_generation = 1
        self._add_hook(UC_HOOK_TLB_FILL, <void *>_tlb_fill, <void *>self)
        self._add_hook(UC_HOOK_INTR, <void *>_interrupt, <void *>self)
        self._add_hook(UC_HOOK_INSN_INVALID, <void *>_invalid, <void *>self)
        if counted:
            self._add_hook(UC_HOOK_BLOCK, <void *>_block_fixed if isa == C_ARM64 else <void *>_block, <void *>&self.hot)
        if isa == C_ARM64:
            self._add_insn_hook(<void *>_mrs, UC_ARM64_INS_MRS)
            self._add_insn_hook(<void *>_msr, UC_ARM64_INS_MSR)
            self._add_insn_hook(<void *>_sys, UC_ARM64_INS_SYS)
        _check(api.mmio_map(self.uc, MMIO_BASE_C, MMIO_SIZE, <void *>_mmio_read, <void *>self, <void *>_mmio_write, <void *>self),
               "uc_mmio_map")
        _check(api.context_alloc(self.uc, &self.pristine), "uc_context_alloc")
        _check(api.context_save(self.uc, self.pristine), "uc_context_save")
        self.physical_bits = 48
        if isa == C_ARM64:
            self.physical_bits = PHYSICAL_BITS[_cp_reg(self, 3, 0, 0, 7, 0) & 7]
        self.layout_known = fresh and (<uint8_t *>self.uc)[INIT_DONE] == 1 and (<uint8_t *>self.uc)[NO_EXIT_REQUEST] == 0
        self.layout_known = self.layout_known and api.version(NULL, NULL) == VERSION
        if not counted and not self.layout_known:
            raise EngineError("the host clock needs the engine of the unicorn 2.1.4 wheel")
        self.stop_at_blocks(True)

    cdef void stop_at_blocks(self, bint on) noexcept:
        """Whether code translated from now on can be left at block starts only, and not after a memory access.

        By itself the engine asks after every access whether it shall stop, and resumes with the same instruction. A stop
        that is not one of its own callbacks' must not come there: `ldr x0, [x0]` has lost its address by then, and an
        atomic addition adds twice. A byte of the engine's state, made for Thumb's IT blocks, leaves these questions
        out, which also makes loads and stores faster. No call sets it, so its place is known; that the byte behind it,
        "initialised", has become 1 shows that the place is right.
        """
        if self.layout_known:
            (<uint8_t *>self.uc)[NO_EXIT_REQUEST] = on

    cdef void poll(self) noexcept:
        """Has an uncounted engine look for kicks in a block hook from now on, as it may not be stopped any more.

        Code that was translated before has no such hook and goes. ``release`` ends it.
        """
        cdef uint64_t n
        cdef int region
        if api.hook_add(self.uc, &self.poll_hook, UC_HOOK_BLOCK, <void *>_block, <void *>&self.hot,
                        <uint64_t>1, <uint64_t>0) != UC_ERR_OK:
            return
        self.hot.polled = 1
        for n in range(self.host.nr_frames):
            if self.host.meta[n].code_mask & self.bit:
                self.drop(n)
        for region in range(self.host.nr_regions):
            for n in range(self.host.regions[region].count):
                if self.host.regions[region].meta[n].code_mask & self.bit:
                    self.drop(self.host.regions[region].first + n)

    cdef int _add_hook(self, int kind, void *callback, void *user) except -1:
        cdef uc_hook handle
        return _check(api.hook_add(self.uc, &handle, kind, callback, user, <uint64_t>1, <uint64_t>0), "uc_hook_add")

    cdef int _add_insn_hook(self, void *callback, int insn) except -1:
        cdef uc_hook handle
        return _check(api.hook_add(self.uc, &handle, UC_HOOK_INSN, callback, <void *>self, <uint64_t>1, <uint64_t>0, insn),
                      "uc_hook_add")

    def bind(self, EngineGroup group not None, PageTable sptes not None, *, bint keep=True, dict roots=None):
        """Joins a machine and maps its frames. ``release`` undoes it.

        Not ``keep``: ``sptes`` is where the handler of a miss drops its answer in. The walker takes every entry out that
        it finds, and forgets it when that miss is answered or the TLB is flushed, so that the next one asks again.

        ``roots``: what the guest's tables translate is looked up here, by role and virtual address, and not walked.
        """
        used = 0
        for other in group.engines:
            used |= (<Engine>other).bit
        self.bit = 1
        while used & self.bit:
            self.bit <<= 1
        if self.bit == 0:
            raise EngineError("more than 32 engines in one machine")
        self.group = group
        self.host = group.host
        self.sptes = sptes
        self.roots = roots
        self.keep = keep
        self.nr_dropins = 0
        self.fetched.clear()
        self.regime_stale = True
        self.translating = False
        self.hot.paged = 0
        self.probe = None
        group.engines.append(self)
        self._map(_memory_of(self.host))
        self.hot.ticks = self.hot.skipped = self.hot.looked = self.hot.looks = 0
        self.time_offset = 0
        self.hot.kick = 0
        self.flush_generation = 1
        self.flushes = 0
        self.fills = 0
        self.grow_at = GROW_FIRST
        self.mixed = False
        self.stale = self.fetching = False
        self.dropped.clear()

    cdef int _map(self, list wanted) except -1:
        if self.maps == wanted:
            return 0
        self._unmap()
        for address, size, base in wanted:
            _check(api.mem_map_ptr(self.uc, address, size, UC_PROT_ALL, <void *><size_t>base), "uc_mem_map_ptr")
            self.maps.append((address, size, base))
        return 0

    cdef int _unmap(self) except -1:
        sptes, self.sptes = self.sptes, None    # unmapping looks addresses up once more: nothing may be found
        for address, size, _ in self.maps:
            _check(api.mem_unmap(self.uc, address, size), "uc_mem_unmap")
        self.maps.clear()
        self.sptes = sptes
        return 0

    def release(self):
        """Leaves the machine and goes back to the pool, in its reset state.

        Unmapping costs 0.1 us a page, so an engine keeps much memory mapped: a machine that has the same memory at the
        same place takes it as it is. Nobody looks at that memory meanwhile, which may be gone.
        """
        if self.group is None:
            return
        if self.hot.running:
            raise EngineError("release of an engine that runs")
        self.group.engines.remove(self)
        self.sptes = None               # unmapping looks addresses up once more: nothing may be found
        for handle in self.hooks.values():
            api.hook_del(self.uc, handle)
        self.hooks.clear()
        if self.hot.polled and not self.counted:
            api.hook_del(self.uc, self.poll_hook)
            self.hot.polled = 0
        self.stop_at_blocks(True)
        large = sum(size for _, size, _ in self.maps) > POOLED_BYTES
        if not large:
            self._unmap()
        _check(api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TB_FLUSH, 0)), "TB flush")
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))
        _check(api.context_restore(self.uc, self.pristine), "uc_context_restore")
        self.hot.generation += 1
        self.bytes_generation += 1
        self.hot.tag = 0
        self.on_miss = self.on_read = self.on_write = self.on_insert = None
        self.on_flush = self.on_drop = self.on_sysreg = self.on_insn = self.on_shadow_miss = self.on_guest_flush = None
        self.roots = None
        self.error = None
        self.group = None
        self.host = None
        self.handed = None
        free_ones = _pool.setdefault((self.isa, self.counted), [])
        if large:
            mapped = [engine for engine in free_ones if (<Engine>engine).maps]
            if len(mapped) >= POOLED_WITH_MEMORY:
                free_ones.remove(mapped[0])
                mapped[0].close()
        free_ones.append(self)

    def close(self):
        """Closes the engine for good. It must have been released."""
        if self.group is not None:
            raise EngineError("close of an engine in use")
        if self.uc != NULL:
            api.context_free(self.pristine)
            api.close(self.uc)
            self.uc = NULL

    def __dealloc__(self):
        if self.uc != NULL:
            api.context_free(self.pristine)
            api.close(self.uc)
        free(self.lengths)
        free(self.scanned)
        free(self.block_copy)

    # ---- running

    def run(self, uint64_t pc, stop_at=None):
        """Runs from ``pc`` until something makes the vCPU leave; returns the engine's error code (0 = none).

        ``stop_at``: leave at the first block start at which ``ticks`` has reached it (counted engines only).
        Afterwards ``faulted``/``fault_address``/``fault_access``, ``interrupt`` (-1: none), ``invalid_insn``, ``stopped`` and
        ``kick`` say why; an exception of a callback is raised.
        """
        global current
        cdef uc_err code
        if self.group is None:
            raise EngineError("an engine runs only while it is bound to a machine")
        self.hot.stop_at = NEVER if stop_at is None or not self.counted else <uint64_t>stop_at
        self.faulted = False
        self.interrupt = -1
        self.invalid_insn = False
        self.hot.stopped = 0
        self.hot.block_size = 0
        self.hot.block_count = 0
        self.hot.block_code = NULL
        if self.stale:
            self.drop_stale()
        if self.regime_stale:
            _read_regime(self)
        elif self.translating and not self.hot.fixed:
            _see_privilege(self)
        self.hot.kick &= ~<uint32_t>1
        if self.hot.kick and not self.hot.polled:
            self.hot.stopped = 1
            return 0
        self.hot.running = 1
        current = &self.hot
        code = api.emu_start(self.uc, pc, 0, 0, 0)
        self.hot.running = 0
        if current == &self.hot:
            current = NULL
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return code

    @property
    def insns(self):
        """Instructions retired; while the guest runs, the current block is counted whole."""
        return self.hot.ticks - self.hot.skipped

    @property
    def ticks(self):
        """Virtual time in ns that this vCPU has run: ``insns``, and what it skipped while it waited for a clock."""
        return self.hot.ticks

    @property
    def stop_at(self):
        """Instruction count at which the run in progress leaves."""
        return self.hot.stop_at

    @stop_at.setter
    def stop_at(self, uint64_t value):
        if self.counted:
            self.hot.stop_at = value

    @property
    def block(self):
        """(pc, bytes, instructions) of the block that runs or ran last; bytes 0 if none was entered."""
        return self.hot.block_pc, self.hot.block_size, self.hot.block_count

    @property
    def last_block(self):
        """Address of the last block that the guest entered; None on an uncounted engine, and before the first."""
        return self.hot.block_pc if self.counted and self.hot.block_pc else None

    @property
    def last_code(self):
        """Guest physical address of ``last_block``, as far as that is known."""
        cdef uint64_t pc = self.hot.block_pc
        if not self.counted or not pc:
            return None
        if not self.hot.paged:
            return pc
        found = self.fetched.get(pc >> 12 << 1 | 1)
        return None if found is None else found >> PFN_BITS << 12 | (pc & 4095)

    @property
    def stopped(self):
        """Whether the last run was left by the block hook (kick or budget)."""
        return bool(self.hot.stopped)

    def watch(self, uint64_t pending):
        """In the next run, leave at the first block, but the one it sets out from, at which interrupts are unmasked.

        ``pending`` are the bits of mip that wait (RISC-V). 0 ends it. An uncounted engine has a block hook from the
        first time on.
        """
        self.hot.pending = pending
        self.hot.watched = 0
        if not pending:
            self.hot.kick &= ~<uint32_t>C_KICK_WATCH
            return
        if not self.hot.polled:
            self.poll()
        if not self.hot.fixed:
            api.reg_read(self.uc, UC_RISCV_REG_PRIV, &self.hot.privilege)
        self.hot.kick |= C_KICK_WATCH

    @property
    def kick(self):
        """KICK_* bits that wait. Only what the engine is left for: to have it leave, see ``leave``."""
        return self.hot.kick

    @kick.setter
    def kick(self, uint32_t value):
        self.hot.kick = value

    def leave(self, uint32_t why):
        """Has the guest left at its next block start, for ``why`` (KICK_*). Safe in all callbacks."""
        _kick(&self.hot, why)

    def uncount(self, uint64_t pc):
        """Takes back the instructions of the current block from ``pc`` on, which did not run. Returns how many."""
        cdef uint64_t end = self.hot.block_pc + self.hot.block_size
        cdef uint32_t rest
        if not self.counted or self.hot.block_size == 0 or pc < self.hot.block_pc or pc >= end:
            return 0
        rest = (end - pc) >> 2 if self.hot.fixed else self.count_block(pc, <uint32_t>(end - pc))
        if rest > self.hot.block_count:
            rest = self.hot.block_count
        self.hot.ticks -= rest
        self.hot.block_count -= rest
        self.hot.block_size = <uint32_t>(pc - self.hot.block_pc)
        return rest

    def retired(self, uint64_t pc):
        """Instructions retired before the one at ``pc`` in the block that runs now."""
        return self.ticks_at(pc) - self.hot.skipped

    cpdef uint64_t ticks_at(self, uint64_t pc):
        """``ticks`` before the instruction at ``pc`` in the block that runs now."""
        cdef uint64_t end = self.hot.block_pc + self.hot.block_size
        if not self.counted or pc < self.hot.block_pc or pc >= end:
            return self.hot.ticks
        return self.hot.ticks - ((end - pc) >> 2 if self.hot.fixed else self.count_block(pc, <uint32_t>(end - pc)))

    cdef uint64_t look(self, uint64_t pc) noexcept:
        """The guest reads a clock at ``pc``: ticks to answer with.

        A guest that does nothing but look waits for the clock, so from the LOOKS-th time on each look takes SKIP ns.
        """
        cdef uint64_t ticks = self.ticks_at(pc)
        if not self.counted:
            return ticks
        if ticks - self.hot.looked < LOOK_GAP:
            self.hot.looks += 1
            if self.hot.looks > LOOKS:
                self.hot.ticks += SKIP
                self.hot.skipped += SKIP
                ticks += SKIP
        else:
            self.hot.looks = 0
        self.hot.looked = ticks
        return ticks

    def looked(self, uint64_t pc):
        """Tell that the guest reads a clock at ``pc``; returns ``ticks`` to answer with, see ``look``."""
        return self.look(pc)

    @property
    def in_guest(self):
        """Whether ``run`` is on the stack."""
        return bool(self.hot.running)

    def read_code(self, uint64_t gva, int size):
        """Up to ``size`` bytes of code at ``gva``, as far as its pages are mapped executable."""
        cdef uint8_t *code
        cdef int n
        found = bytearray()
        if self.regime_stale:
            _read_regime(self)
        elif self.translating and not self.hot.fixed:
            _see_privilege(self)
        for n in range(size):
            code = self.code_at(gva + n)    # the address space goes round
            if code == NULL:
                break
            found.append(code[0])
        return bytes(found)

    cdef void fail(self) noexcept:
        """Keeps the exception in flight for ``run`` to raise and has the guest left."""
        import sys
        if self.error is None:
            self.error = sys.exc_info()[1]
        _kick(&self.hot, C_KICK_EXIT)

    cdef int check_open(self) except -1:
        if self.uc == NULL:
            raise EngineError("this engine is closed")
        return 0

    # ---- registers

    def reg(self, int regid):
        """Value of a register, as 64 bits."""
        cdef uint64_t value = 0
        self.check_open()
        _check(api.reg_read(self.uc, regid, &value), "uc_reg_read")
        return value

    def set_reg(self, int regid, uint64_t value):
        """Sets a register."""
        self.check_open()
        self.regime_stale |= regid == UC_RISCV_REG_SATP
        _check(api.reg_write(self.uc, regid, &value), "uc_reg_write")

    def reg128(self, int regid):
        """Value of a vector register, as 128 bits."""
        cdef uint64_t[2] value
        value[0] = value[1] = 0
        _check(api.reg_read(self.uc, regid, value), "uc_reg_read")
        return int(value[0]) | int(value[1]) << 64

    def cp_reg(self, int op0, int op1, int crn, int crm, int op2):
        """Value of an AArch64 system register by its encoding."""
        self.check_open()
        cdef uc_arm64_cp_reg cp
        memset(&cp, 0, sizeof(cp))
        cp.op0, cp.op1, cp.crn, cp.crm, cp.op2 = op0, op1, crn, crm, op2
        _check(api.reg_read(self.uc, UC_ARM64_REG_CP_REG, &cp), "uc_reg_read")
        return cp.val

    def set_cp_reg(self, int op0, int op1, int crn, int crm, int op2, uint64_t value):
        """Sets an AArch64 system register; also makes the engine rebuild the flags it derives from PSTATE."""
        self.check_open()
        cdef uc_arm64_cp_reg cp
        memset(&cp, 0, sizeof(cp))
        cp.op0, cp.op1, cp.crn, cp.crm, cp.op2 = op0, op1, crn, crm, op2
        cp.val = value
        self.regime_stale = True
        _check(api.reg_write(self.uc, UC_ARM64_REG_CP_REG, &cp), "uc_reg_write")

    def reset_cpu(self):
        """Puts the registers back to what they were when the engine was made, and turns translation off."""
        if self.group is None:
            raise EngineError("this engine is closed, or in no machine")
        _check(api.context_restore(self.uc, self.pristine), "uc_context_restore")
        self.forget_gva()

    # ---- TLB and translated code

    def flush_tlb(self, str reason):
        """Drops every translation that the engine holds. Safe in all our callbacks."""
        self.flush()
        if self.on_flush is not None:
            self.on_flush(reason)

    cdef void grow(self) noexcept:
        """Has the engine make its TLB larger.

        It begins with 256 entries and looks at its size only when it is flushed, so a guest without invalidations would
        keep on missing. Nobody has to know of this flush: what was handed out counts as held until the next real one.
        """
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))
        self.fills = 0
        self.grow_at = self.grow_at * 2 if self.grow_at < GROW_LAST else NEVER

    cdef void flush(self) noexcept:
        if self.uc == NULL:
            return
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))
        self.fills = 0
        self.grow_at = GROW_FIRST
        self.nr_dropins = 0
        self.flushes += 1
        self.flush_generation += 1
        self.hot.generation += 1
        self.bytes_generation += 1
        self.hot.tag = 0

    def guest_flush(self):
        """The guest has changed its own translation: what was handed out by its tables is no longer good.

        Nobody else has to know: what is recorded of this TLB is which frames it may hold, and that is what it was.
        Shadow entries are another matter: they are made to agree with the guest's tables.
        """
        self.guest_flushed()

    cdef void guest_flushed(self) noexcept:
        self.forget_gva()
        if self.on_guest_flush is not None:
            try:
                self.on_guest_flush()
            except BaseException:
                self.fail()
            _back_in(self)

    cdef void forget_gva(self) noexcept:
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))
        self.fills = 0
        self.hot.generation += 1
        self.hot.tag = 0
        self.regime_stale = True
        if len(self.fetched) > MOST_FETCHED:
            self.fetched.clear()

    def translate(self, uint64_t gva, int access, read, *, privilege=None):
        """Where the guest's tables lead: (gpa, -1, 0, leaf), or (0, ``FAULT_*``, level, leaf) for a fault of the guest.

        ``read(gpa, size)`` gives its memory, None where there is none. ``privilege``: 0 user, 1 supervisor, None the
        present one. Nothing is changed, and rights that want a bit set first count as given.
        """
        gpa, fault, level, leaf, _, _ = self.walk(gva, access, read, privilege=privilege)
        return gpa | (gva & 4095) if fault < 0 else 0, fault, level, leaf

    def walk(self, uint64_t gva, int access, read, *, privilege=None):
        """As ``translate``, and then the rights that the tables give (bits 0 to 2), and whether MXR of a mode that
        cannot read it had a say in them: (page's gpa, fault or -1, level, leaf, rights, mxr)."""
        cdef Walk walk
        cdef int found
        cdef bint user
        if self.regime_stale:
            _read_regime(self)
        memset(&walk, 0, sizeof(walk))
        if not self.translating or not _begin_walk(self, access, &walk):
            return gva & ~<uint64_t>4095, -1, 0, 0, UC_PROT_ALL, False
        user = walk.status == MXR_UNKNOWN
        walk.probe = True
        if privilege is not None:
            walk.privilege = privilege
        self.probe = read
        found = _walk(self, gva, &walk)
        self.probe = None
        error, self.probe_error = self.probe_error, None
        if error is not None:
            raise error
        return walk.gpa, walk.fault if found == WALK_FAULT else -1, walk.level, walk.leaf, walk.allowed, (
            user and walk.status != MXR_UNKNOWN)

    cdef void drop_stale(self) noexcept:
        """Forgets the block that was being translated when translations went away.

        A block whose last instruction reaches into the next page faults there when its first page was looked up already.
        The engine enters it where the flush has cleaned up before, under a frame whose code was dropped before.
        """
        cdef uint64_t pfn
        self.stale = False
        for pfn in self.dropped:
            self.drop(pfn)
        self.dropped.clear()
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))

    cdef void drop(self, uint64_t pfn) noexcept:
        """Forgets the code translated from a frame, by way of a scratch VA that only this call maps."""
        cdef uint8_t *bytes = self.host.bytes_of(pfn)
        if self.fetching:
            self.dropped.append(pfn)
        if self.fetched:
            self.fetched = {page: found for page, found in self.fetched.items() if found & PFN_LOW != pfn}
        if bytes != NULL and bytes <= self.hot.block_code < bytes + 4096 and self.hot.block_size <= 8192:
            # The instructions of the block that runs may still have to be counted, see `count_block`.
            memcpy(self.block_copy, self.hot.block_code, min(self.hot.block_size, bytes + 4096 - self.hot.block_code))
            self.hot.block_code = self.block_copy
        self.scratch_pfn = pfn
        self.scratch_on = True
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TB_REMOVE_CACHE, 2), SCRATCH, SCRATCH + 4096)
        self.scratch_on = False
        # The look-up went through the TLB: without a flush the next drop would find this frame again.
        api.ctl(self.uc, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0))
        self.hot.generation += 1
        self.bytes_generation += 1
        self.hot.tag = 0

    def report_drop(self, uint64_t pfn):
        """Tells the trace; a method so that the C side stays free of exceptions."""
        try:
            self.on_drop(pfn)
        except BaseException:
            self.fail()

    def record_inserts(self, bint on):
        """Whether ``on_insert`` is called for the first hand-out of a translation since the last flush."""
        self.handed = PageTable(3) if on else None

    cdef bint knows_less(self, uint64_t gfn) noexcept:
        """Whether a trace says that this page was handed out since the last flush, but not for writing.

        A read then gets no more than that: otherwise it would depend on what the TLB has evicted whether a write is
        recorded.
        """
        cdef uint64_t known
        if self.handed is None:
            return False
        known = self.handed.load(gfn)
        return known >> 3 == self.flush_generation and known & UC_PROT_WRITE == 0

    cdef void note(self, uint64_t gfn, uint64_t pfn, int perms) noexcept:
        cdef uint64_t *slot
        cdef uint64_t known
        try:
            slot = self.handed.ensure(gfn)
            known = slot[0]
            if known >> 3 == self.flush_generation:
                if (known & 7) | perms == (known & 7):
                    return
                slot[0] = known | perms
            else:
                slot[0] = self.flush_generation << 3 | perms
            self.on_insert(gfn, pfn, perms)
        except BaseException:
            self.fail()

    # ---- the walker

    cdef bint fill(self, uint64_t vaddr, int access, uc_tlb_entry *result) noexcept:
        cdef uint64_t gpa = vaddr & ~<uint64_t>4095
        cdef uint64_t entry, generation
        cdef int tries, answer, wanted = access, allowed = UC_PROT_ALL, found = WALK_DONE
        cdef bint translated = False
        cdef Walk walk
        if self.scratch_on and vaddr == SCRATCH:
            result.paddr = self.scratch_pfn << 12
            result.perms = UC_PROT_READ | UC_PROT_EXEC
            return True
        if self.sptes is None:
            return False
        if self.regime_stale:
            _read_regime(self)
        if self.translating:
            translated = _begin_walk(self, access, &walk)
            if translated and self.roots is not None:
                answer = self.fill_shadow(vaddr, access, walk.privilege, walk.status, result)
                if answer != C_NOT_SHADOWED:
                    return answer
        for tries in range(MISS_LIMIT):
            if translated:
                walk.access = access
                found = _walk(self, vaddr, &walk)
                if found == WALK_FAULT:
                    return self.no_entry(vaddr, access, walk.fault, walk.level)
                gpa = walk.gpa
                wanted = walk.access
                allowed = walk.allowed
            if found == WALK_DONE and gpa >> 12 < INDEX_LIMIT:
                entry = self.entry_of(gpa >> 12)
                if entry & SPTE_PRESENT:
                    if entry & (<uint64_t>1 << access):
                        return self.hand_out(vaddr, entry, gpa >> 12, access, allowed, result)
                elif entry & SPTE_MMIO and access != C_FETCH and (entry >> 39) & 0x7FFFF == self.sptes.mmio_generation:
                    result.paddr = MMIO_BASE_C + gpa
                    result.perms = allowed & (UC_PROT_READ | UC_PROT_WRITE)
                    return True
            if self.on_miss is None:
                return False
            self.fetching = access == C_FETCH
            generation = self.hot.generation
            try:
                answer = self.on_miss(gpa, wanted)
            except BaseException:
                self.fail()
                answer = -1
            _back_in(self)
            if self.fetching:
                self.fetching = False
                if self.hot.generation != generation:
                    self.stale = True
                    _kick(&self.hot, C_KICK_FLUSH)
            if answer == C_RETRY:
                continue
            if found == WALK_MISS:
                # A device is no place for a table. One that cannot be written cannot have its bits set, either.
                return self.no_entry(vaddr, access, C_PERMISSION if answer == C_MMIO and wanted == C_WRITE else C_WALK, walk.level)
            if answer == C_MMIO and access != C_FETCH:
                # good for this access only: the next one of another kind has to ask again
                result.paddr = MMIO_BASE_C + gpa
                result.perms = UC_PROT_WRITE if access == C_WRITE else UC_PROT_READ
                return True
            break
        else:
            try:
                raise InternalError(f"the walk of {vaddr:#x} was retried {MISS_LIMIT} times and never got further")
            except InternalError:
                self.fail()
        self.fault_gpa = gpa
        return self.no_entry(vaddr, access, C_ABSENT, 0)

    cdef int fill_shadow(self, uint64_t vaddr, int access, int privilege, uint64_t status, uc_tlb_entry *result) noexcept:
        """A miss with shadow paging: 1 or 0 as `fill`, C_NOT_SHADOWED where there cannot be an entry.

        Entries are kept by *role*, which is all that they depend on: the root of the tables and what else rules how they
        are read, who makes the access, and the upper bits of the address.
        """
        cdef uint64_t gva = vaddr, root, control = 0, entry, gfn, generation, said
        cdef int tries, kind
        cdef bint upper
        if self.isa == C_ARM64:
            upper = gva >> 55 & 1
            control = self.regime[TCR]
            if control >> (38 if upper else 37) & 1:
                gva = gva | <uint64_t>0xff << 56 if upper else gva & ~(<uint64_t>0xff << 56)
            root = self.regime[TTBR1 if upper else TTBR0]
            status = self.regime[SCTLR] & SCTLR_WXN
        else:
            root = self.regime[SATP]
        role = (root, control, status, privilege, gva >> 48)
        for tries in range(MISS_LIMIT):
            found = self.roots.get(role)
            if found is not None:
                entry = (<PageTable>found[0]).load(gva >> 12 & SHADOW_INDEX)
                if entry & (<uint64_t>1 << access):
                    gfn = (<PageTable>found[1]).load(gva >> 12 & SHADOW_INDEX) >> 12
                    if entry & SPTE_PRESENT:
                        return self.hand_out(vaddr, entry, gfn, access, entry & UC_PROT_ALL, result)
                    if entry & SPTE_MMIO and access != C_FETCH and (entry >> 39) & 0x7FFFF == self.sptes.mmio_generation:
                        result.paddr = MMIO_BASE_C + (gfn << 12)
                        result.perms = entry & (UC_PROT_READ | UC_PROT_WRITE)
                        return True
            if self.on_shadow_miss is None:
                return False
            self.fetching = access == C_FETCH
            generation = self.hot.generation
            try:
                said = self.on_shadow_miss(role, gva, access)
            except BaseException:
                self.fail()
                said = C_FAULT
            _back_in(self)
            if self.fetching:
                self.fetching = False
                if self.hot.generation != generation:
                    self.stale = True
                    _kick(&self.hot, C_KICK_FLUSH)
            kind = said & 15
            if kind == C_RETRY:
                continue
            if kind == C_NOT_SHADOWED:
                return kind
            if kind == C_GUEST_FAULT:
                return self.no_entry(vaddr, access, said >> 4 & 15, said >> 8 & 15)
            if kind == C_TABLE_FAULT:
                return self.no_entry(vaddr, access, C_PERMISSION, said >> 8 & 15)
            if kind == C_MMIO and access != C_FETCH:
                result.paddr = MMIO_BASE_C + (said & ~<uint64_t>4095)
                result.perms = UC_PROT_WRITE if access == C_WRITE else UC_PROT_READ
                return True
            self.fault_gpa = said & ~<uint64_t>4095
            return self.no_entry(vaddr, access, C_ABSENT, 0)
        try:
            raise InternalError(f"the walk of {vaddr:#x} was retried {MISS_LIMIT} times and never got further")
        except InternalError:
            self.fail()
        return self.no_entry(vaddr, access, C_ABSENT, 0)

    cdef bint no_entry(self, uint64_t vaddr, int access, int kind, int level) noexcept:
        self.faulted = True
        self.fault_address = vaddr
        self.fault_access = access
        self.fault_kind = kind
        self.fault_level = level
        return False

    cdef uint64_t entry_of(self, uint64_t gfn) noexcept:
        """The shadow entry of a guest frame, 0 for none."""
        cdef uint64_t entry = self.sptes.load(gfn)
        cdef int n
        if self.keep:
            return entry
        if entry:
            # Nobody else may find it, and no flush leave it behind.
            try:
                self.sptes.store(gfn, 0)
            except BaseException:
                self.fail()
            if self.nr_dropins < NR_DROPINS:
                self.dropins[self.nr_dropins].gfn = gfn
                self.dropins[self.nr_dropins].entry = entry
                self.nr_dropins += 1
            return entry
        for n in range(self.nr_dropins - 1, -1, -1):
            if self.dropins[n].gfn == gfn:
                return self.dropins[n].entry
        return 0

    cdef bint hand_out(self, uint64_t vaddr, uint64_t entry, uint64_t gfn, int access, int allowed,
                       uc_tlb_entry *result) noexcept:
        cdef uint64_t pfn = (entry >> 12) & PFN_MASK
        cdef FrameMeta *meta
        cdef int perms = UC_PROT_READ
        if entry & SPTE_HUGE:
            pfn += gfn & 511
        meta = self.host.meta_of(pfn)
        if meta == NULL:
            self.fault_gpa = gfn << 12
            return self.no_entry(vaddr, access, C_ABSENT, 0)
        if meta.turns >= MIXED_AFTER and entry & SPTE_WRITE and entry & SPTE_EXEC and allowed == UC_PROT_ALL:
            self.mix(meta, pfn)
            perms = UC_PROT_ALL
        elif access == C_FETCH:
            if meta.w_mask:
                self.group.revoke_write(meta)
            meta.x_mask |= self.bit
            meta.code_mask |= self.bit
            perms = UC_PROT_EXEC | (allowed & UC_PROT_READ)
        elif access == C_WRITE:
            if meta.x_mask | meta.code_mask:
                meta.turns += 1
                self.group.revoke_exec(meta, pfn)
            meta.w_mask |= self.bit
            perms = UC_PROT_READ | UC_PROT_WRITE
        elif not (meta.x_mask | meta.code_mask) and entry & SPTE_WRITE and allowed & UC_PROT_WRITE:
            # Never with X: what is executed has to come in as a fetch, which scans the page at this address.
            if not self.knows_less(gfn):
                meta.w_mask |= self.bit
                perms = UC_PROT_READ | UC_PROT_WRITE
        if access == C_FETCH:
            if self.hot.paged or not self.keep:
                self.fetched[vaddr >> 12 << 1 | self.hot.paged] = gfn << PFN_BITS | pfn
            if not self.hot.fixed:
                self.scan(vaddr & ~<uint64_t>4095, pfn)
        result.paddr = pfn << 12
        result.perms = perms
        if self.handed is not None:
            self.note(gfn, pfn, perms | UC_PROT_READ)
        return True

    cdef void mix(self, FrameMeta *meta, uint64_t pfn) noexcept:
        """Makes a frame both writable and executable, for this engine alone.

        Code and data that share a page would take it from one another for ever. With every entry of the frame executable,
        the engine itself looks at each store to it and drops the code that it hits, at any address of the frame.
        """
        if meta.w_mask == self.bit and meta.x_mask == self.bit and meta.code_mask == self.bit:
            return
        self.group.revoke_exec(meta, pfn)
        self.group.revoke_write(meta)
        meta.w_mask = meta.x_mask = meta.code_mask = self.bit
        self.mixed = True

    # ---- code bytes

    cdef uint8_t *code_at(self, uint64_t gva) noexcept:
        """Host address of a code byte, NULL when its page is not mapped executable just now."""
        cdef uint64_t gfn = gva >> 12
        cdef uint64_t entry, pfn
        cdef uint8_t *page
        if self.hot.paged or not self.keep:
            # What was handed out last is what runs, whatever tables say by now.
            found = self.fetched.get(gfn << 1 | self.hot.paged)
            page = NULL if found is None else self.host.bytes_of(<uint64_t>found & PFN_LOW)
            return NULL if page == NULL else page + (gva & 4095)
        if gfn >= INDEX_LIMIT:
            return NULL
        entry = self.sptes.load(gfn)
        if not entry & SPTE_PRESENT or not entry & SPTE_EXEC:
            return NULL
        pfn = (entry >> 12) & PFN_MASK
        if entry & SPTE_HUGE:
            pfn += gfn & 511
        page = self.host.bytes_of(pfn)
        return NULL if page == NULL else page + (gva & 4095)

    cdef uint32_t count_block(self, uint64_t pc, uint32_t size) noexcept:
        """Instructions in ``size`` bytes from ``pc`` on, by their own lengths (RISC-V: 2 or 4 bytes).

        They all begin in one page: a block ends with the instruction that reaches into the next. The page may have been
        taken away since its block began; the bytes that run are still where they were.
        """
        cdef BlockLength *slot = &self.lengths[((pc >> 1) ^ size) & (NR_LENGTHS - 1)]
        if slot.pc == pc and slot.size == size and slot.generation == self.hot.tag and not self.mixed:
            self.hot.code = slot.code
            if slot.returns:
                self.hot.tag = 0
            return slot.count
        return self.measure_block(slot, pc, size)

    cdef uint32_t measure_block(self, BlockLength *slot, uint64_t pc, uint32_t size) noexcept:
        cdef uint32_t at = 0, count = 0, last = 0
        cdef uint8_t *code
        if self.hot.tag == 0:
            _see_privilege(self)
        code = self.code_at(pc)
        if code == NULL:
            if self.hot.block_code == NULL or not self.hot.block_pc <= pc < self.hot.block_pc + self.hot.block_size:
                return size >> 2
            code = self.hot.block_code + (pc - self.hot.block_pc)
        while at < size:
            last = at
            at += 4 if code[at] & 3 == 3 else 2
            count += 1
        # SRET, MRET: the next block runs with another privilege, perhaps untranslated. 0x73 alone: the page ends there.
        slot.returns = self.translating and code[last] == 0x73 and (
            (pc & 4095) + last > 4092 or (<uint32_t *>(code + last))[0] in (0x10200073, 0x30200073))
        slot.pc = pc
        slot.size = size
        slot.count = count
        slot.code = self.hot.code = code
        slot.generation = self.hot.tag
        if slot.returns:
            self.hot.tag = 0
        return count

    cdef void scan(self, uint64_t gva, uint64_t pfn) noexcept:
        """Hooks the instructions of a RISC-V page that would show host time or change the guest's translation."""
        cdef Scanned *slot = &self.scanned[(gva >> 12) & (NR_SCANNED - 1)]
        cdef uint8_t *page
        cdef int n
        cdef uint32_t csr
        cdef uc_hook handle
        cdef void *callback
        if slot.gfn == gva >> 12 and slot.pfn == pfn and slot.generation == self.bytes_generation and not self.mixed:
            return
        slot.gfn = gva >> 12
        slot.pfn = pfn
        slot.generation = self.bytes_generation
        page = self.host.bytes_of(pfn)
        for n in range(0, 4096, 2):
            if page[n] & 0x7f != 0x73:
                continue
            csr = 0
            if n < 4094:                # beyond that, the next page says what it is: on_insn looks at it
                if page[n + 1] & 0x30 == 0:
                    if page[n] != 0x73 or page[n + 1] & 0x7f or page[n + 3] & 0xfe != 0x12:
                        continue        # neither a CSR instruction nor SFENCE.VMA
                    csr = CSR_SATP
                else:
                    csr = page[n + 2] >> 4 | <uint32_t>page[n + 3] << 4
                if not (0xc00 <= csr <= 0xc1f or 0xb00 <= csr <= 0xb1f or csr == CSR_SATP or csr == 0x344 or csr == 0x144):
                    continue
            if gva + n in self.hooks:
                continue
            if csr == CSR_SATP:
                callback = <void *>_translation_insn
            else:
                callback = <void *>_one_insn
                if not self.hot.polled:
                    self.poll()
                self.stop_at_blocks(False)      # the question comes after such a hook, too, where it is needed
            if api.hook_add(self.uc, &handle, UC_HOOK_CODE, callback, <void *>self,
                            <uint64_t>(gva + n), <uint64_t>(gva + n)) == UC_ERR_OK:
                self.hooks[gva + n] = handle
