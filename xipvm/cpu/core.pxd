from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from xipvm.cpu.unicorn cimport uc_arm64_cp_reg, uc_context, uc_engine, uc_hook, uc_mem_type, uc_tlb_entry
from xipvm.mmu.frames cimport FrameMeta, HostMemory
from xipvm.mmu.tables cimport PageTable

cdef struct BlockLength:            # how many instructions a block has, where the length in bytes does not say it
    uint64_t pc
    uint32_t size
    uint32_t count
    uint64_t generation             # shifted left by one; bit 0: translated by the guest's tables
    uint8_t *code                   # its bytes, in host memory
    uint32_t returns                # ends with SRET or MRET

cdef struct Scanned:                # a page that was searched for instructions that need a hook
    uint64_t gfn
    uint64_t pfn
    uint64_t generation

cdef struct Dropin:             # an entry that is good for the miss in progress
    uint64_t gfn
    uint64_t entry

cdef struct Hot:                    # what the block hook touches, away from the Python object
    uc_engine *uc
    uint64_t ticks                  # virtual time, ns: instructions retired (the running block counted whole) and time skipped
    uint64_t stop_at                # leave at the first block start with ticks >= stop_at
    uint32_t kick                   # KICK_* of core.pyx
    uint32_t stopped                # the block hook asked to leave before this block
    uint64_t block_pc
    uint32_t block_size
    uint32_t block_count
                                    # up to here: one cache line, all that a block costs when it is counted
    uint64_t skipped                # how much of it the guest only waited for
    uint64_t looked                 # ticks at which the guest last read a clock
    uint64_t looks                  # how often it has done so in a row with little else between
    uint32_t watched                # the block that a watched run sets out from is behind
    uint64_t pending                # interrupts that wait, for KICK_WATCH
    uint64_t privilege              # in which they were masked
    uint32_t fixed                  # every instruction has 4 bytes
    uint32_t running
    uint32_t counted
    uint32_t polled                 # a block hook looks at `kick`; else the engine is stopped
    uint8_t *block_code             # where every instruction has a length of its own
    uint8_t *code                   # what count_block looked at last
    uint32_t paged                  # the code that runs is translated by the guest's tables
    uint64_t tag                    # of counts that are still good: generation and `paged`; 0: not known
    uint64_t generation             # of translated code: counts and scans made before are void
    void *engine

cdef class EngineGroup:
    """The engines of one machine: the state of a frame (writable xor executable) is kept over all of them."""
    cdef HostMemory host
    cdef list engines
    cdef object __weakref__
    cdef void revoke_exec(self, FrameMeta *meta, uint64_t pfn) noexcept
    cdef void revoke_write(self, FrameMeta *meta) noexcept

cdef class Engine:
    cdef uc_engine *uc
    cdef Hot hot
    cdef uc_context *pristine
    cdef readonly int isa
    cdef readonly bint counted
    cdef bint layout_known
    cdef readonly uint32_t bit
    cdef HostMemory host
    cdef PageTable sptes
    cdef dict roots                 # shadow paging: (entries, guest frames) by role; None without
    cdef EngineGroup group
    cdef PageTable handed           # (flush generation, rights) by gfn: what tlb_insert was recorded for
    cdef public uint64_t flushes
    cdef bint keep                  # entries stay in `sptes`
    cdef Dropin dropins[32]         # where they do not: those of the miss in progress
    cdef int nr_dropins
    cdef dict fetched               # gfn and pfn by (page, paged) as last handed out for execution, where `sptes` do not say
    cdef uint64_t[4] regime         # SCTLR, TTBR0, TTBR1, TCR; or satp
    cdef uint64_t bytes_generation  # of what frames hold: pages scanned before may have changed
    cdef bint regime_stale          # one of them was written
    cdef bint translating           # the guest has turned its tables on (RISC-V: for S and U mode)
    cdef int physical_bits
    cdef object probe               # reads guest memory for a walk that must not fault anything in
    cdef object probe_error
    cdef uint64_t flush_generation
    cdef uint64_t fills, grow_at    # since the last flush, and how many of them make the TLB grow
    cdef public int64_t time_offset # virtual time of the machine minus ticks
    cdef bint fetching              # Python handles the miss of a fetch: a block may be in the middle of its translation
    cdef bint stale                 # translations went away meanwhile, so the block must not run
    cdef list dropped               # frames whose code was dropped meanwhile
    cdef uint8_t *block_copy        # the block that runs, once the bytes of its frame have gone
    cdef uint64_t scratch_pfn
    cdef bint scratch_on
    cdef BlockLength *lengths
    cdef Scanned *scanned
    cdef uc_hook poll_hook
    cdef dict hooks                 # address of a hooked instruction -> hook handle
    cdef list maps
    cdef readonly bint faulted
    cdef readonly uint64_t fault_address
    cdef readonly int fault_access
    cdef readonly int fault_kind
    cdef readonly int fault_level
    cdef readonly uint64_t fault_gpa
    cdef readonly int64_t interrupt
    cdef readonly bint invalid_insn
    cdef public object error        # exception raised in a callback
    cdef public object on_shadow_miss, on_guest_flush
    cdef public object on_miss, on_read, on_write, on_insert, on_flush, on_drop, on_sysreg, on_insn
    cdef int _add_hook(self, int kind, void *callback, void *user) except -1
    cdef int _add_insn_hook(self, void *callback, int insn) except -1
    cdef int _map(self, list wanted) except -1
    cdef int _unmap(self) except -1
    cdef void stop_at_blocks(self, bint on) noexcept
    cdef void poll(self) noexcept
    cdef void grow(self) noexcept
    cdef void flush(self) noexcept
    cpdef uint64_t ticks_at(self, uint64_t pc)
    cdef uint64_t look(self, uint64_t pc) noexcept
    cdef void drop(self, uint64_t pfn) noexcept
    cdef void drop_stale(self) noexcept
    cdef uint64_t entry_of(self, uint64_t gfn) noexcept
    cdef bint hand_out(self, uint64_t vaddr, uint64_t entry, uint64_t gfn, int access, int allowed, uc_tlb_entry *result) noexcept
    cdef bint no_entry(self, uint64_t vaddr, int access, int kind, int level) noexcept
    cdef void forget_gva(self) noexcept
    cdef void guest_flushed(self) noexcept
    cdef bint fill(self, uint64_t vaddr, int access, uc_tlb_entry *result) noexcept
    cdef int fill_shadow(self, uint64_t vaddr, int access, int privilege, uint64_t status, uc_tlb_entry *result) noexcept
    cdef uint32_t count_block(self, uint64_t pc, uint32_t size) noexcept
    cdef uint32_t measure_block(self, BlockLength *slot, uint64_t pc, uint32_t size) noexcept
    cdef uint8_t *code_at(self, uint64_t gva) noexcept
    cdef void scan(self, uint64_t gva, uint64_t pfn) noexcept
    cdef int check_open(self) except -1
    cdef bint mixed                 # has had a frame that is writable and executable: code changes without notice
    cdef void mix(self, FrameMeta *meta, uint64_t pfn) noexcept
    cdef bint knows_less(self, uint64_t gfn) noexcept
    cdef void note(self, uint64_t gfn, uint64_t pfn, int perms) noexcept
    cdef void fail(self) noexcept
