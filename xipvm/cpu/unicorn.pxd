"""What of the engine's C interface the core uses: types and constants; the functions are looked up at run time."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "unicorn/unicorn.h" nogil:
    ctypedef struct uc_engine:
        pass
    ctypedef struct uc_context:
        pass
    ctypedef size_t uc_hook
    ctypedef int uc_err
    enum:
        UC_ERR_OK
        UC_ERR_EXCEPTION
        UC_ERR_INSN_INVALID
        UC_ERR_FETCH_PROT
    enum:
        UC_ARCH_ARM64
        UC_ARCH_RISCV
        UC_MODE_ARM
        UC_MODE_RISCV64
    enum:
        UC_HOOK_INTR
        UC_HOOK_INSN
        UC_HOOK_CODE
        UC_HOOK_BLOCK
        UC_HOOK_INSN_INVALID
        UC_HOOK_TLB_FILL
    enum:
        UC_PROT_NONE
        UC_PROT_READ
        UC_PROT_WRITE
        UC_PROT_EXEC
        UC_PROT_ALL
    enum:
        UC_TLB_VIRTUAL
    ctypedef enum uc_mem_type:
        UC_MEM_READ
        UC_MEM_WRITE
        UC_MEM_FETCH
    ctypedef struct uc_tlb_entry:
        uint64_t paddr
        int perms
    int UC_CTL_WRITE(int kind, int nr)
    int UC_CTL_READ(int kind, int nr)
    enum:
        UC_CTL_UC_PAGE_SIZE
        UC_CTL_UC_USE_EXITS
        UC_CTL_CPU_MODEL
        UC_CTL_TB_REMOVE_CACHE
        UC_CTL_TB_FLUSH
        UC_CTL_TLB_FLUSH
        UC_CTL_TLB_TYPE
        UC_CTL_TCG_BUFFER_SIZE

cdef extern from "unicorn/arm64.h" nogil:
    ctypedef struct uc_arm64_cp_reg:
        uint32_t crn
        uint32_t crm
        uint32_t op0
        uint32_t op1
        uint32_t op2
        uint64_t val
    enum:
        UC_CPU_ARM64_A57
        UC_ARM64_REG_CP_REG
        UC_ARM64_REG_PC
        UC_ARM64_REG_SP
        UC_ARM64_REG_X0
        UC_ARM64_REG_X29
        UC_ARM64_REG_X30
        UC_ARM64_REG_PSTATE
        UC_ARM64_INS_MRS
        UC_ARM64_INS_MSR
        UC_ARM64_INS_SYS

cdef extern from "unicorn/riscv.h" nogil:
    enum:
        UC_CPU_RISCV64_ANY
        UC_RISCV_REG_PC
        UC_RISCV_REG_X0
        UC_RISCV_REG_PRIV
        UC_RISCV_REG_MSTATUS
        UC_RISCV_REG_MTVEC
        UC_RISCV_REG_MEPC
        UC_RISCV_REG_MCAUSE
        UC_RISCV_REG_MTVAL
        UC_RISCV_REG_MIE
        UC_RISCV_REG_MEDELEG
        UC_RISCV_REG_MIDELEG
        UC_RISCV_REG_MHARTID
        UC_RISCV_REG_SSTATUS
        UC_RISCV_REG_SIE
        UC_RISCV_REG_STVEC
        UC_RISCV_REG_SEPC
        UC_RISCV_REG_SCAUSE
        UC_RISCV_REG_STVAL
        UC_RISCV_REG_SATP

ctypedef uc_err (*uc_open_t)(int arch, int mode, uc_engine **uc) noexcept
ctypedef uc_err (*uc_close_t)(uc_engine *uc) noexcept
ctypedef uc_err (*uc_ctl_t)(uc_engine *uc, int control, ...) noexcept
ctypedef uc_err (*uc_emu_start_t)(uc_engine *uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count) noexcept
ctypedef uc_err (*uc_emu_stop_t)(uc_engine *uc) noexcept nogil
ctypedef uc_err (*uc_hook_add_t)(uc_engine *uc, uc_hook *hh, int kind, void *callback, void *user,
                                 uint64_t begin, uint64_t end, ...) noexcept
ctypedef uc_err (*uc_hook_del_t)(uc_engine *uc, uc_hook hh) noexcept
ctypedef uc_err (*uc_reg_t)(uc_engine *uc, int regid, void *value) noexcept
ctypedef uc_err (*uc_mem_map_ptr_t)(uc_engine *uc, uint64_t address, uint64_t size, uint32_t perms, void *ptr) noexcept
ctypedef uc_err (*uc_mem_unmap_t)(uc_engine *uc, uint64_t address, uint64_t size) noexcept
ctypedef uc_err (*uc_mmio_map_t)(uc_engine *uc, uint64_t address, uint64_t size, void *read, void *user_read,
                                 void *write, void *user_write) noexcept
ctypedef const char *(*uc_strerror_t)(uc_err code) noexcept
ctypedef unsigned (*uc_version_t)(unsigned *major, unsigned *minor) noexcept
ctypedef uc_err (*uc_context_alloc_t)(uc_engine *uc, uc_context **context) noexcept
ctypedef uc_err (*uc_context_t)(uc_engine *uc, uc_context *context) noexcept
ctypedef uc_err (*uc_context_free_t)(uc_context *context) noexcept

cdef struct Api:
    uc_open_t open
    uc_close_t close
    uc_ctl_t ctl
    uc_emu_start_t emu_start
    uc_emu_stop_t emu_stop
    uc_hook_add_t hook_add
    uc_hook_del_t hook_del
    uc_reg_t reg_read
    uc_reg_t reg_write
    uc_mem_map_ptr_t mem_map_ptr
    uc_mem_unmap_t mem_unmap
    uc_mmio_map_t mmio_map
    uc_strerror_t strerror
    uc_version_t version
    uc_context_alloc_t context_alloc
    uc_context_t context_save
    uc_context_t context_restore
    uc_context_free_t context_free
