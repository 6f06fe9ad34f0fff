"""The guest's own page tables: gva -> gpa, and what the guest may do there.

RISC-V Sv39, Sv48 and Sv57 (Privileged Architecture 10.3 to 10.6) with accessed and dirty bits that the hardware sets, as
QEMU's do; AArch64 VMSAv8-64 stage 1, 4 KiB granule (DDI 0487, D8.2 to D8.5), whose access flag is the guest's to set.

Tables are guest memory, so they are read by way of the shadow entries like everything else. One that is not there goes
to the handler, after which **the whole walk starts over**: nothing that was read before it is believed. Between the
last read and the entry that is made of it there is no schedule point, nor between an entry and its accessed bits.
"""

# What became of a walk.
cdef enum:
    WALK_DONE = 0
    WALK_MISS = 1               # `gpa` has to be made accessible by `access` first
    WALK_FAULT = 2              # the guest's fault: `fault` and `level`

# Why an access faulted; `Engine.fault_kind`.
cdef enum:
    C_ABSENT = 0                # nothing answers at the physical address
    C_TRANSLATION = 1
    C_ACCESS_FLAG = 2
    C_PERMISSION = 3
    C_ADDRESS_SIZE = 4
    C_WALK = 5                  # nothing answers where a table should be
    C_GRANULE = 6               # tables of a kind that is not walked
FAULT_ABSENT = C_ABSENT
FAULT_TRANSLATION = C_TRANSLATION
FAULT_ACCESS_FLAG = C_ACCESS_FLAG
FAULT_PERMISSION = C_PERMISSION
FAULT_ADDRESS_SIZE = C_ADDRESS_SIZE
FAULT_WALK = C_WALK
FAULT_GRANULE = C_GRANULE

cdef enum:
    PTE_V = 1
    PTE_R = 2
    PTE_W = 4
    PTE_X = 8
    PTE_U = 16
    PTE_A = 64
    PTE_D = 128
    USER = 0
    SUPERVISOR = 1
    MACHINE = 3
    STATUS_MPRV = 1 << 17
    STATUS_SUM = 1 << 18
    STATUS_MXR = 1 << 19
    MXR_UNKNOWN = 1             # U mode cannot read the register; bit 0 of it means nothing
    SCTLR_M = 1
    SCTLR_WXN = 1 << 19
    DESCRIPTOR_AF = 1 << 10
    SCTLR = 0                   # of `Engine.regime`
    TTBR0 = 1
    TTBR1 = 2
    TCR = 3
    SATP = 0

cdef uint64_t ADDRESS_48 = 0x0000fffffffff000
cdef uint64_t PPN_44 = (<uint64_t>1 << 44) - 1
cdef int[8] PHYSICAL_BITS = [32, 36, 40, 42, 44, 48, 48, 48]

cdef struct Walk:
    int access                  # C_READ, C_WRITE, C_FETCH
    int privilege               # USER or SUPERVISOR (EL0 or EL1)
    uint64_t status             # RISC-V: SUM and MXR as in mstatus
    bint probe                  # change nothing
    # what was found
    uint64_t gpa                # page
    int allowed                 # UC_PROT_* by the guest's tables; no write before the dirty bit is set
    int fault
    int level
    uint64_t leaf               # the last entry that was read


cdef uint64_t _csr_as_m(Engine engine, int regid) noexcept:
    """A CSR whatever the current privilege. Going through M mode makes an LR lose its reservation."""
    cdef uint64_t privilege = 0, machine = MACHINE, value = 0
    api.reg_read(engine.uc, UC_RISCV_REG_PRIV, &privilege)
    if privilege != MACHINE:
        api.reg_write(engine.uc, UC_RISCV_REG_PRIV, &machine)
    api.reg_read(engine.uc, regid, &value)
    if privilege != MACHINE:
        api.reg_write(engine.uc, UC_RISCV_REG_PRIV, &privilege)
    return value


cdef uint64_t _cp_reg(Engine engine, int op0, int op1, int crn, int crm, int op2) noexcept:
    cdef uc_arm64_cp_reg cp
    memset(&cp, 0, sizeof(cp))
    cp.op0, cp.op1, cp.crn, cp.crm, cp.op2 = op0, op1, crn, crm, op2
    api.reg_read(engine.uc, UC_ARM64_REG_CP_REG, &cp)
    return cp.val


cdef void _read_regime(Engine engine) noexcept:
    """Reads the registers that rule translation, some of which were written since."""
    engine.regime_stale = False
    if engine.isa == C_ARM64:
        engine.regime[SCTLR] = _cp_reg(engine, 3, 0, 1, 0, 0)
        engine.translating = engine.hot.paged = engine.regime[SCTLR] & SCTLR_M
        if engine.translating:
            engine.regime[TTBR0] = _cp_reg(engine, 3, 0, 2, 0, 0)
            engine.regime[TTBR1] = _cp_reg(engine, 3, 0, 2, 0, 1)
            engine.regime[TCR] = _cp_reg(engine, 3, 0, 2, 0, 2)
    else:
        engine.regime[SATP] = _csr_as_m(engine, UC_RISCV_REG_SATP)
        engine.translating = engine.regime[SATP] >> 60 != 0
        _see_privilege(engine)


cdef int _see_privilege(Engine engine) noexcept:
    """RISC-V: the mode the hart is in, which also says whether its code is translated."""
    cdef uint64_t privilege = 0
    api.reg_read(engine.uc, UC_RISCV_REG_PRIV, &privilege)
    engine.hot.paged = engine.translating and privilege != MACHINE
    engine.hot.tag = engine.hot.generation << 1 | engine.hot.paged
    return privilege & 3


cdef bint _begin_walk(Engine engine, int access, Walk *walk) noexcept:
    """Who makes the access of ``access`` that missed; False when it is not translated."""
    cdef uint64_t value = 0
    cdef uint8_t *code
    walk.access = access
    walk.probe = False
    walk.status = 0
    if engine.isa == C_ARM64:
        api.reg_read(engine.uc, UC_ARM64_REG_PSTATE, &value)
        walk.privilege = SUPERVISOR if value & 0xc else USER
        if walk.privilege == SUPERVISOR and access != C_FETCH:
            api.reg_read(engine.uc, UC_ARM64_REG_PC, &value)
            code = engine.code_at(value)
            if code != NULL and (<uint32_t *>code)[0] & 0x3b200c00 == 0x38000800:
                walk.privilege = USER           # LDTR, STTR and their like
        return True
    walk.privilege = _see_privilege(engine)
    if walk.privilege == MACHINE:
        if access == C_FETCH:
            return False
        api.reg_read(engine.uc, UC_RISCV_REG_MSTATUS, &walk.status)
        if not walk.status & STATUS_MPRV:
            return False
        walk.privilege = walk.status >> 11 & 3
        return walk.privilege != MACHINE
    if walk.privilege == SUPERVISOR:
        api.reg_read(engine.uc, UC_RISCV_REG_SSTATUS, &walk.status)
        walk.status &= STATUS_SUM | STATUS_MXR
    else:
        walk.status = MXR_UNKNOWN
    return True


cdef int _fault(Walk *walk, int kind, int level) noexcept:
    walk.fault = kind
    walk.level = level
    return WALK_FAULT


cdef int _miss(Walk *walk, uint64_t gpa, int access, int level) noexcept:
    walk.level = level
    walk.gpa = gpa & ~<uint64_t>4095
    walk.access = access
    return WALK_MISS


cdef int _read_entry(Engine engine, uint64_t gpa, int level, Walk *walk) noexcept:
    """The entry of a guest's table at ``gpa`` into ``walk.leaf``."""
    cdef uint64_t entry, pfn
    cdef uint8_t *page
    if engine.probe is not None:
        try:
            raw = engine.probe(gpa, 8)
        except BaseException as error:
            engine.probe_error = error
            raw = None
        if raw is None:
            return _fault(walk, C_WALK, level)
        walk.leaf = int.from_bytes(raw, "little")
        return WALK_DONE
    entry = engine.entry_of(gpa >> 12) if gpa >> 12 < INDEX_LIMIT else 0
    if not (entry & SPTE_PRESENT and entry & SPTE_READ):
        return _miss(walk, gpa, C_READ, level)
    pfn = (entry >> 12) & PFN_MASK
    if entry & SPTE_HUGE:
        pfn += gpa >> 12 & 511
    page = engine.host.bytes_of(pfn)
    if page == NULL:
        return _fault(walk, C_WALK, level)
    walk.leaf = (<uint64_t *>(page + (gpa & 0xff8)))[0]
    return WALK_DONE


cdef int _set_bits(Engine engine, uint64_t gpa, uint64_t bits, int level, Walk *walk) noexcept:
    """Sets accessed and dirty bits in the entry at ``gpa``, which ``walk`` has just read."""
    cdef uint64_t entry = engine.entry_of(gpa >> 12), pfn
    cdef uint64_t generation = engine.hot.generation
    cdef FrameMeta *meta
    cdef uint8_t *page
    if not (entry & SPTE_PRESENT and entry & SPTE_WRITE):
        return _miss(walk, gpa, C_WRITE, level)
    pfn = (entry >> 12) & PFN_MASK
    if entry & SPTE_HUGE:
        pfn += gpa >> 12 & 511
    meta = engine.host.meta_of(pfn)
    page = engine.host.bytes_of(pfn)
    if meta == NULL or page == NULL:
        return WALK_FAULT
    if meta.x_mask | meta.code_mask:
        engine.fetching = walk.access == C_FETCH
        engine.group.revoke_exec(meta, pfn)
        engine.fetching = False
        if walk.access == C_FETCH and engine.hot.generation != generation:
            engine.stale = True
            _kick(&engine.hot, C_KICK_FLUSH)
    walk.leaf |= bits
    (<uint64_t *>(page + (gpa & 0xff8)))[0] = walk.leaf
    return WALK_DONE


cdef int _walk_riscv(Engine engine, uint64_t gva, Walk *walk) noexcept:
    cdef int mode = engine.regime[SATP] >> 60
    cdef int levels = mode - 5, level, found
    cdef int unused = 52 - 9 * levels           # high bits, all equal to the one below
    cdef uint64_t table = (engine.regime[SATP] & PPN_44) << 12
    cdef uint64_t at, pte, ppn, bits
    cdef int need = UC_PROT_READ if walk.access == C_READ else (UC_PROT_WRITE if walk.access == C_WRITE else UC_PROT_EXEC)
    if not 3 <= levels <= 5 or <uint64_t>(<int64_t>(gva << unused) >> unused) != gva:
        return _fault(walk, C_TRANSLATION, levels - 1)
    level = levels
    while level > 0:
        level -= 1
        at = table + (gva >> (12 + 9 * level) & 511) * 8
        found = _read_entry(engine, at, level, walk)
        if found != WALK_DONE:
            return found
        pte = walk.leaf
        if not pte & PTE_V or pte & (PTE_R | PTE_W) == PTE_W or pte >> 54:
            return _fault(walk, C_TRANSLATION, level)
        ppn = pte >> 10 & PPN_44
        if not pte & (PTE_R | PTE_W | PTE_X):
            if pte & (PTE_A | PTE_D | PTE_U):
                return _fault(walk, C_TRANSLATION, level)
            table = ppn << 12
            continue
        if ppn & ((<uint64_t>1 << 9 * level) - 1):
            return _fault(walk, C_TRANSLATION, level)
        walk.allowed = 0
        if walk.privilege == USER:
            if not pte & PTE_U:
                return _fault(walk, C_PERMISSION, level)
        elif pte & PTE_U and (walk.access == C_FETCH or not walk.status & STATUS_SUM):
            return _fault(walk, C_PERMISSION, level)
        if pte & PTE_R:
            walk.allowed = UC_PROT_READ
        elif pte & PTE_X:
            if walk.status == MXR_UNKNOWN:
                walk.status = _csr_as_m(engine, UC_RISCV_REG_MSTATUS) & STATUS_MXR
            if walk.status & STATUS_MXR:
                walk.allowed = UC_PROT_READ
        if pte & PTE_W:
            walk.allowed |= UC_PROT_WRITE
        if pte & PTE_X and not (pte & PTE_U and walk.privilege == SUPERVISOR):
            walk.allowed |= UC_PROT_EXEC
        if not walk.allowed & need:
            return _fault(walk, C_PERMISSION, level)
        bits = PTE_A | PTE_D if walk.access == C_WRITE else PTE_A
        if bits & ~pte and not walk.probe:
            found = _set_bits(engine, at, bits, level, walk)
            if found == WALK_FAULT:
                return _fault(walk, C_PERMISSION, level)
            if found != WALK_DONE:
                return found
        if not walk.leaf & PTE_D and not walk.probe:
            walk.allowed &= ~UC_PROT_WRITE      # so that the first write comes here
        walk.level = level
        walk.gpa = (ppn << 12 | (gva & ((<uint64_t>4096 << 9 * level) - 1))) & ~<uint64_t>4095
        return WALK_DONE
    return _fault(walk, C_TRANSLATION, 0)       # the last level has no tables


cdef int _walk_arm64(Engine engine, uint64_t gva, Walk *walk) noexcept:
    cdef uint64_t tcr = engine.regime[TCR], table, descriptor, address, top
    cdef bint upper = gva >> 55 & 1
    cdef int bits, level, shift, index_bits, found, output, granule
    cdef bint read_only = False, no_user = False, user_never = False, never = False, user_writes, writes
    cdef int need = UC_PROT_READ if walk.access == C_READ else (UC_PROT_WRITE if walk.access == C_WRITE else UC_PROT_EXEC)
    if tcr >> (38 if upper else 37) & 1:        # the top byte says nothing
        gva = gva | <uint64_t>0xff << 56 if upper else gva & ~(<uint64_t>0xff << 56)
    bits = 64 - min(max(<int>(tcr >> (16 if upper else 0) & 0x3f), 16), 39)
    top = ~<uint64_t>0 >> bits if upper else 0
    if gva >> bits != top or tcr >> (23 if upper else 7) & 1:
        return _fault(walk, C_TRANSLATION, 0)
    granule = tcr >> (30 if upper else 14) & 3
    if granule == 1 or granule == (3 if upper else 2):     # what is reserved counts as 4 KiB
        return _fault(walk, C_GRANULE, 0)
    output = min(PHYSICAL_BITS[tcr >> 32 & 7], engine.physical_bits)
    level = 4 - (bits - 4) // 9
    shift = 39 - 9 * level
    index_bits = bits - shift
    table = engine.regime[TTBR1 if upper else TTBR0] & 0x0000fffffffffffe & ~((<uint64_t>8 << index_bits) - 1)
    if table >> output:
        return _fault(walk, C_ADDRESS_SIZE, 0)
    while True:
        found = _read_entry(engine, table + (gva >> shift & ((<uint64_t>1 << index_bits) - 1)) * 8, level, walk)
        if found != WALK_DONE:
            return found
        descriptor = walk.leaf
        address = descriptor & ADDRESS_48
        if not descriptor & 1 or (not descriptor & 2 and (level == 0 or level == 3)):
            return _fault(walk, C_TRANSLATION, level)
        if address >> output:
            return _fault(walk, C_ADDRESS_SIZE, level)
        if level == 3 or not descriptor & 2:
            break
        if not tcr >> (42 if upper else 41) & 1:        # HPD: what a table says of all below it
            read_only |= descriptor >> 62 & 1
            no_user |= descriptor >> 61 & 1
            user_never |= descriptor >> 60 & 1
            never |= descriptor >> 59 & 1
        table = address
        level += 1
        shift -= 9
        index_bits = 9
    if not descriptor & DESCRIPTOR_AF:
        return _fault(walk, C_ACCESS_FLAG, level)
    read_only |= descriptor >> 7 & 1
    no_user |= not descriptor >> 6 & 1
    user_writes = not no_user and not read_only
    if walk.privilege == USER:
        writes = user_writes
        never = descriptor >> 54 & 1 or user_never
        walk.allowed = 0 if no_user else UC_PROT_READ
    else:
        writes = not read_only
        never |= descriptor >> 53 & 1 or user_writes    # EL1 executes nothing that EL0 can write
        walk.allowed = UC_PROT_READ
    if writes:
        walk.allowed |= UC_PROT_WRITE
    if not never and not (writes and engine.regime[SCTLR] & SCTLR_WXN):
        walk.allowed |= UC_PROT_EXEC
    if not walk.allowed & need:
        return _fault(walk, C_PERMISSION, level)
    walk.level = level
    top = (<uint64_t>1 << shift) - 1
    walk.gpa = ((address & ~top) | (gva & top)) & ~<uint64_t>4095
    return WALK_DONE


cdef inline int _walk(Engine engine, uint64_t gva, Walk *walk) noexcept:
    return _walk_arm64(engine, gva, walk) if engine.isa == C_ARM64 else _walk_riscv(engine, gva, walk)
