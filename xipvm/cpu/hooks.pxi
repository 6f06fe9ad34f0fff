"""What the engine calls: blocks, misses, MMIO, exceptions, system registers."""

cdef inline void _back_in(Engine engine) noexcept:
    """The guest goes on after Python code, which may have run other engines, nested or as other greenlets."""
    global current
    if engine.hot.running:
        current = &engine.hot


cdef bint _tlb_fill(uc_engine *uc, uint64_t vaddr, uc_mem_type kind, uc_tlb_entry *result, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    cdef bint found
    result.paddr = 0
    result.perms = UC_PROT_NONE
    engine.fills += 1
    if engine.fills >= engine.grow_at:
        engine.grow()
    found = engine.fill(vaddr, C_FETCH if kind == UC_MEM_FETCH else (C_WRITE if kind == UC_MEM_WRITE else C_READ), result)
    engine.nr_dropins = 0
    return found


cdef bint _stays(Hot *hot) noexcept:
    """Whether the guest goes on although ``kick`` is set: it is only watched, and still masks what waits for it."""
    cdef uint64_t value = 0, enabled = 0, delegated = 0
    if hot.kick != C_KICK_WATCH or hot.ticks >= hot.stop_at:
        return False
    if not hot.watched:                 # the block from which the caller set out
        hot.watched = 1
        return True
    if hot.fixed:
        api.reg_read(hot.uc, UC_ARM64_REG_PSTATE, &value)
        return value & PSTATE_I != 0
    api.reg_read(hot.uc, UC_RISCV_REG_PRIV, &value)
    if value != hot.privilege:          # a return from a trap: what was masked above may not be here
        return False
    if value == 3:
        api.reg_read(hot.uc, UC_RISCV_REG_MSTATUS, &value)
        api.reg_read(hot.uc, UC_RISCV_REG_MIE, &enabled)
        api.reg_read(hot.uc, UC_RISCV_REG_MIDELEG, &delegated)
        return not (value & MSTATUS_MIE and enabled & ~delegated & hot.pending)
    if value == 1:
        api.reg_read(hot.uc, UC_RISCV_REG_SSTATUS, &value)
        api.reg_read(hot.uc, UC_RISCV_REG_SIE, &enabled)
        return not (value & MSTATUS_SIE and enabled & hot.pending)
    return True                         # in U mode nothing changes without a trap


cdef void _block(uc_engine *uc, uint64_t address, uint32_t size, void *user) noexcept:
    cdef Hot *hot = <Hot *>user
    if (hot.kick or hot.ticks >= hot.stop_at) and not _stays(hot):
        hot.stopped = 1
        api.emu_stop(uc)
        return
    if not hot.counted:
        return
    hot.block_pc = address
    hot.block_size = size
    hot.block_count = (<Engine><PyObject *>hot.engine).count_block(address, size)
    hot.block_code = hot.code
    hot.ticks += hot.block_count


cdef void _block_fixed(uc_engine *uc, uint64_t address, uint32_t size, void *user) noexcept:
    """The same where every instruction has 4 bytes, counted. Half of what counting costs a tight loop is spent here."""
    cdef Hot *hot = <Hot *>user
    cdef uint64_t ticks = hot.ticks
    if ticks >= hot.stop_at or hot.kick:
        _rarely(hot, address, size)
        return
    hot.block_pc = address
    hot.block_size = size
    size >>= 2
    hot.block_count = size
    hot.ticks = ticks + size


cdef void _attend_fixed(Hot *hot, uint64_t address, uint32_t size) noexcept:
    """``_block_fixed`` when there is something to look at."""
    if not _stays(hot):
        hot.stopped = 1
        api.emu_stop(hot.uc)
        return
    hot.block_pc = address
    hot.block_size = size
    hot.block_count = size >> 2
    hot.ticks += size >> 2


# Called by way of a variable, or the compiler would save registers for it in every block.
cdef void (*_rarely)(Hot *hot, uint64_t address, uint32_t size) noexcept
_rarely = _attend_fixed


cdef uint64_t _mmio_read(uc_engine *uc, uint64_t offset, unsigned size, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    cdef uint64_t value = 0
    try:
        value = engine.on_read(offset, size)
    except BaseException:
        engine.fail()
    _back_in(engine)
    return value


cdef void _mmio_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    try:
        engine.on_write(offset, size, value)
    except BaseException:
        engine.fail()
    _back_in(engine)


cdef void _interrupt(uc_engine *uc, uint32_t number, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    engine.interrupt = number
    api.emu_stop(uc)


cdef bint _invalid(uc_engine *uc, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    engine.invalid_insn = True
    return False


cdef uint32_t _sysreg(Engine engine, int regid, const uc_arm64_cp_reg *cp, bint is_write) noexcept:
    """Runs the Python side of a system register access; 1 when it did the instruction's work."""
    cdef uint64_t value
    cdef uint32_t done = 0
    try:
        answer = engine.on_sysreg(cp.op0, cp.op1, cp.crn, cp.crm, cp.op2, cp.val if is_write else None)
        if answer is not None:
            done = 1
            if not is_write:
                value = answer
                api.reg_write(engine.uc, regid, &value)
    except BaseException:
        engine.fail()
        done = 1
    _back_in(engine)
    return done


cdef uint32_t _mrs(uc_engine *uc, int regid, const uc_arm64_cp_reg *cp, void *user) noexcept:
    # Timers (CRn 14) and the performance monitors (op1 3, CRn 9) show the host's time unless answered here; MPIDR_EL1 is
    # that of CPU 0 in every engine.
    if cp.crn != 14 and not (cp.crn == 9 and cp.op1 == 3) and not (
        cp.crn == 0 and cp.crm == 0 and cp.op1 == 0 and cp.op2 == 5
    ):
        return 0
    cdef Engine engine = <Engine><PyObject *>user
    cdef uint64_t value = 0
    if engine.counted and cp.crn == 14 and cp.crm == 0 and (cp.op2 == 1 or cp.op2 == 2) and cp.op1 == 3:
        # CNTPCT_EL0, CNTVCT_EL0: guests wait by reading them over and over.
        api.reg_read(uc, UC_ARM64_REG_PC, &value)
        value = <uint64_t>(<int64_t>engine.look(value) + engine.time_offset) // NS_PER_COUNT
        api.reg_write(uc, regid, &value)
        return 1
    return _sysreg(engine, regid, cp, False)


cdef uint32_t _msr(uc_engine *uc, int regid, const uc_arm64_cp_reg *cp, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    # CRn 1 and 2: SCTLR, TTBR0/1, TCR, which the engine itself writes after this.
    if cp.crn == 2 or (cp.crn == 1 and cp.crm == 0 and cp.op2 == 0):
        engine.guest_flushed()
        return 0
    if cp.crn != 14 and not (cp.crn == 9 and cp.op1 == 3):
        return 0
    return _sysreg(engine, regid, cp, True)


cdef uint32_t _sys(uc_engine *uc, int regid, const uc_arm64_cp_reg *cp, void *user) noexcept:
    cdef Engine engine = <Engine><PyObject *>user
    cdef Engine other
    if cp.crn == 8:                     # TLB maintenance; of an entry of a block, which is many of ours
        engine.guest_flushed()
        if cp.crm == 3:                 # inner shareable: every CPU's
            for other in engine.group.engines:
                if other is not engine:
                    other.forget_gva()
                    _kick(&other.hot, C_KICK_FLUSH)
        return 0
    if cp.crn == 7 and cp.crm == 8:     # AT
        return _sysreg(engine, regid, cp, True)
    return 0


cdef void _translation_insn(uc_engine *uc, uint64_t address, uint32_t size, void *user) noexcept:
    """SFENCE.VMA, or a CSR instruction that names satp, is about to run."""
    (<Engine><PyObject *>user).guest_flushed()


cdef void _one_insn(uc_engine *uc, uint64_t address, uint32_t size, void *user) noexcept:
    """A hooked instruction is about to run; the Python side may do its work and set another PC."""
    cdef Engine engine = <Engine><PyObject *>user
    try:
        engine.on_insn(address, size)
    except BaseException:
        engine.fail()
    _back_in(engine)
