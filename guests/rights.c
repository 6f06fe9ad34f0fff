/*
 * rights: every entry that a page table can have, tried by every kind of access.
 *
 * For all combinations of an entry's bits, on each level and with what else decides (the tables above, mode bits), memory
 * is read, written and executed with and without privileges. What came of it (the syndrome, the address, the entry as it
 * is afterwards) goes into a hash, one a group. QEMU 7.2 prints the same, but for RISC-V's "tables out of reach": it reports
 * page faults there, and the architecture wants access faults. With VERBOSE defined, every case is printed.
 */
#include "guest.h"

#define GIB 0x40000000ul
#define BLOCK 0x200000ul
#define WINDOW_BASE (RAM_BASE + 2 * GIB)
#define HUGE_BASE (RAM_BASE + 3 * GIB)
#define DATA 64 /* in the page; at its start is code */
#define HASH_BEGIN 0xcbf29ce484222325ul

enum access { READ_IT, WRITE_IT, FETCH_IT, READ_AS_USER, WRITE_AS_USER };

static u64 root[512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));
static u64 middle[512] __attribute__((aligned(PAGE_SIZE)));
static u64 pages[512] __attribute__((aligned(PAGE_SIZE)));
static u8 frame[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static u8 stubs[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE))); /* what runs without privileges */

static u64 sum, cases;
static volatile u64 seen_cause, seen_address;
extern char run_return[];
u64 kernel_stack;

static u64 mix(u64 so_far, u64 value) { return (so_far ^ value) * 0x100000001b3ul; }

static void note(u64 value, u64 address, u64 expected, u64 entry)
{
    cases++;
    sum = mix(mix(mix(sum, value), address == expected), entry);
#ifdef VERBOSE
    print("    %x %d %x\n", value, (u64)(address == expected), entry);
#endif
}

static void group(const char *what, u64 level, u64 how)
{
    print("  %s, level %u, %02x: %x\n", what, level, how, sum);
    sum = HASH_BEGIN;
}

#if defined(__aarch64__)

#define TABLE 3ul
#define ACCESSED (1ul << 10)
#define READ_ONLY (2ul << 6)
#define USER (1ul << 6)
#define DEVICE (2ul << 2 | 3ul << 53)
#define MAIR_VALUE 0x0044fful
#define TCR_VALUE (25ul | 1ul << 23 | 1ul << 32)
#define SCTLR_M 1ul
#define SCTLR_WXN (1ul << 19)

#define READ_REG(name) ({ u64 value_; __asm__ volatile("mrs %0, " name : "=r"(value_) : : "memory"); value_; })
#define WRITE_REG(name, value) __asm__ volatile("msr " name ", %0\n\tisb" : : "r"((u64)(value)) : "memory")

static void flush(void) { __asm__ volatile("dsb ishst\n\ttlbi vmalle1\n\tdsb ish\n\tisb" : : : "memory"); }

void run_user(u64 entry, u64 argument);
__asm__(".pushsection .text.run_user, \"ax\"\n"
        "run_user:\n"
        "    stp     x29, x30, [sp, #-0x60]!\n"
        "    stp     x19, x20, [sp, #0x10]\n"
        "    stp     x21, x22, [sp, #0x20]\n"
        "    stp     x23, x24, [sp, #0x30]\n"
        "    stp     x25, x26, [sp, #0x40]\n"
        "    stp     x27, x28, [sp, #0x50]\n"
        "    msr     elr_el1, x0\n"
        "    mov     x2, #0x3c0\n"
        "    msr     spsr_el1, x2\n"
        "    mov     x0, x1\n"
        "    eret\n"
        "run_return:\n"
        "    ldp     x19, x20, [sp, #0x10]\n"
        "    ldp     x21, x22, [sp, #0x20]\n"
        "    ldp     x23, x24, [sp, #0x30]\n"
        "    ldp     x25, x26, [sp, #0x40]\n"
        "    ldp     x27, x28, [sp, #0x50]\n"
        "    ldp     x29, x30, [sp], #0x60\n"
        "    ret\n"
        ".popsection\n");

#define STUB_READ 0
#define STUB_WRITE 16
#define STUB_FETCH 32

static void build(void)
{
    static const u32 code[] = {0x39400001, 0xd4000001, 0, 0,  /* ldrb w1, [x0]; svc #0 */
                               0x3900001f, 0xd4000001, 0, 0,  /* strb wzr, [x0]; svc #0 */
                               0xd63f0000, 0xd4000001};       /* blr x0; svc #0 */

    for (u64 n = 0; n < ARRAY_SIZE(code); n++)
        ((u32 *)stubs)[n] = code[n];
    for (u64 n = 0; n < ARRAY_SIZE(low); n++)
        low[n] = n * BLOCK | ACCESSED | 1 | (n * BLOCK < 2 * FLASH_BANK1 ? READ_ONLY : DEVICE);
    root[0] = (u64)low | TABLE;
    root[RAM_BASE / GIB] = RAM_BASE | ACCESSED | 1 | 3ul << 53;
    root[WINDOW_BASE / GIB] = (u64)middle | TABLE;
    middle[0] = (u64)pages | TABLE;
    pages[1] = (u64)stubs | ACCESSED | TABLE | USER | READ_ONLY | 1ul << 53;
    sync_code(stubs, sizeof(code));
}

static bool on_trap(struct trap *trap)
{
    seen_cause = trap->cause;
    seen_address = trap->cause >> 26 == 0x15 ? 0 : trap->address;
    if (trap->status & 0xf) {
        trap_skip(trap);
    } else {
        trap->pc = (u64)run_return;
        trap->status = 0x3c5;
    }
    return true;
}

static void attempt(enum access access, bool user, u64 at)
{
    u64 page = at & -(u64)PAGE_SIZE, address = access == FETCH_IT ? page : page + DATA;

    seen_cause = seen_address = 0;
    if (user)
        run_user(WINDOW_BASE + PAGE_SIZE + 16 * access, address);
    else if (access == READ_IT)
        (void)read8(address);
    else if (access == WRITE_IT)
        write8(address, 1);
    else if (access == FETCH_IT)
        ((u32 (*)(void))address)();
    else if (access == READ_AS_USER)
        __asm__ volatile("ldtrb w1, [%0]" : : "r"(address) : "x1", "memory");
    else
        __asm__ volatile("sttrb wzr, [%0]" : : "r"(address) : "memory");
    u64 expected = seen_cause >> 26 == 0x15 ? 0 : seen_cause ? address : 0;
    note(seen_cause, seen_address, expected, 0);
}

#define AT(operation, address) \
    ({ __asm__ volatile("at " operation ", %0\n\tisb" : : "r"((u64)(address)) : "memory"); READ_REG("par_el1"); })

static void ask(u64 at)
{
    note(AT("s1e1r", at), 0, 0, 0);
    note(AT("s1e1w", at), 0, 0, 0);
    note(AT("s1e0r", at), 0, 0, 0);
    note(AT("s1e0w", at), 0, 0, 0);
}

static void all_entries(u64 *entry, u64 target, u64 level, u64 at)
{
    for (u64 bits = 0; bits < 128; bits++) {
        *entry = target | (bits & 3) | (bits >> 2 & 1) << 10 | (bits >> 3 & 3) << 6 | (bits >> 5 & 3) << 53;
        if (level < 3 && (bits & 3) == 3) /* a table: the page is none */
            continue;
        flush();
        for (enum access access = READ_IT; access <= WRITE_AS_USER; access++)
            attempt(access, false, at);
        for (enum access access = READ_IT; access <= FETCH_IT; access++)
            attempt(access, true, at);
        ask(at);
    }
    *entry = 0;
    flush();
}

static void try_everything(void)
{
    static const u64 tables[] = {0, 1, 2, 4, 8, 15};
    u64 data = (u64)frame, sctlr = READ_REG("sctlr_el1");
    u64 in_block = data % BLOCK, in_gib = data % GIB;

    for (u64 wxn = 0; wxn < 2; wxn++) {
        WRITE_REG("sctlr_el1", wxn ? sctlr | SCTLR_WXN : sctlr);
        for (u64 n = 0; n < ARRAY_SIZE(tables); n++) {
            middle[0] = (u64)pages | TABLE | tables[n] << 59;
            pages[1] = (u64)stubs | ACCESSED | TABLE | USER | READ_ONLY | 1ul << 53;
            if (tables[n] & 7) { /* the stubs have to be elsewhere */
                middle[0] = (u64)pages | TABLE;
                middle[1] = (u64)pages | TABLE | tables[n] << 59;
                all_entries(&pages[2], data, 3, WINDOW_BASE + BLOCK + 2 * PAGE_SIZE);
            } else {
                all_entries(&pages[2], data, 3, WINDOW_BASE + 2 * PAGE_SIZE);
            }
            group("pages", 3, wxn << 4 | tables[n]);
        }
        all_entries(&middle[3], data - in_block, 2, WINDOW_BASE + 3 * BLOCK + in_block);
        group("blocks", 2, wxn << 4);
        all_entries(&root[HUGE_BASE / GIB], data - in_gib, 1, HUGE_BASE + in_gib);
        group("blocks", 1, wxn << 4);
    }
    WRITE_REG("sctlr_el1", sctlr);

    static const u64 odd[] = {1ul << 39, 1ul << 47, ~0xffful, 0xffffff8000000000ul, 1ul << 56, 0x5500000000000000ul};
    for (u64 n = 0; n < ARRAY_SIZE(odd); n++) {
        attempt(READ_IT, false, odd[n]);
        attempt(WRITE_IT, true, odd[n]);
        ask(odd[n]);
    }
    group("addresses", 0, 0);
    pages[3] = data | ACCESSED | TABLE | USER | 1ul << 53;
    WRITE_REG("tcr_el1", TCR_VALUE | 1ul << 37); /* TBI0 */
    flush();
    attempt(READ_IT, false, (WINDOW_BASE + 3 * PAGE_SIZE) | 0x5aul << 56);
    attempt(WRITE_IT, true, (WINDOW_BASE + 3 * PAGE_SIZE) | 0x80ul << 56);
    attempt(READ_IT, false, (WINDOW_BASE + 4 * PAGE_SIZE) | 0x5aul << 56);
    group("tags", 3, 0);
    WRITE_REG("tcr_el1", TCR_VALUE | 1ul << 41); /* HPD0 */
    middle[2] = (u64)pages | TABLE | 15ul << 59;
    flush();
    attempt(WRITE_IT, false, WINDOW_BASE + 2 * BLOCK + 3 * PAGE_SIZE);
    attempt(WRITE_IT, true, WINDOW_BASE + 2 * BLOCK + 3 * PAGE_SIZE);
    group("tables that say nothing", 3, 0);
    WRITE_REG("tcr_el1", TCR_VALUE);
    middle[4] = NOWHERE | TABLE; /* a table where nothing is, and one beyond what TCR.IPS allows */
    middle[5] = 1ul << 40 | TABLE;
    middle[6] = 1ul << 40 | ACCESSED | 1;
    flush();
    for (u64 n = 4; n < 7; n++) {
        attempt(READ_IT, false, WINDOW_BASE + n * BLOCK);
        attempt(WRITE_IT, true, WINDOW_BASE + n * BLOCK);
        attempt(FETCH_IT, true, WINDOW_BASE + n * BLOCK);
    }
    group("tables out of reach", 2, 0);
}

static void run(void)
{
    u64 sctlr = READ_REG("sctlr_el1");

    WRITE_REG("mair_el1", MAIR_VALUE);
    WRITE_REG("tcr_el1", TCR_VALUE);
    WRITE_REG("ttbr0_el1", root);
    flush();
    WRITE_REG("sctlr_el1", sctlr | SCTLR_M);
    try_everything();
    __asm__ volatile("dsb sy");
    WRITE_REG("sctlr_el1", sctlr);
}

#else

#define VALID 0x01ul
#define READ 0x02ul
#define WRITE 0x04ul
#define EXECUTE 0x08ul
#define USER 0x10ul
#define ACCESSED_DIRTY 0xc0ul
#define SUM (1ul << 18)
#define MXR (1ul << 19)
#define MPRV (1ul << 17)
#define MPP_SHIFT 11
#define SV39 (8ul << 60)
#define SV48 (9ul << 60)

static void flush(void) { __asm__ volatile("sfence.vma" : : : "memory"); }
static u64 entry_of(u64 physical, u64 bits) { return physical >> 12 << 10 | bits; }

void run_user(u64 entry, u64 argument, u64 status);
__asm__(".pushsection .text.run_user, \"ax\"\n"
        "run_user:\n"
        "    addi    sp, sp, -0x70\n"
        "    sd      ra, 0x00(sp)\n"
        "    sd      s0, 0x08(sp)\n"
        "    sd      s1, 0x10(sp)\n"
        "    sd      s2, 0x18(sp)\n"
        "    sd      s3, 0x20(sp)\n"
        "    sd      s4, 0x28(sp)\n"
        "    sd      s5, 0x30(sp)\n"
        "    sd      s6, 0x38(sp)\n"
        "    sd      s7, 0x40(sp)\n"
        "    sd      s8, 0x48(sp)\n"
        "    sd      s9, 0x50(sp)\n"
        "    sd      s10, 0x58(sp)\n"
        "    sd      s11, 0x60(sp)\n"
        "    csrw    mepc, a0\n"
        "    csrw    mstatus, a2\n"
        "    mv      a0, a1\n"
        "    mret\n"
        "run_return:\n"
        "    ld      ra, 0x00(sp)\n"
        "    ld      s0, 0x08(sp)\n"
        "    ld      s1, 0x10(sp)\n"
        "    ld      s2, 0x18(sp)\n"
        "    ld      s3, 0x20(sp)\n"
        "    ld      s4, 0x28(sp)\n"
        "    ld      s5, 0x30(sp)\n"
        "    ld      s6, 0x38(sp)\n"
        "    ld      s7, 0x40(sp)\n"
        "    ld      s8, 0x48(sp)\n"
        "    ld      s9, 0x50(sp)\n"
        "    ld      s10, 0x58(sp)\n"
        "    ld      s11, 0x60(sp)\n"
        "    addi    sp, sp, 0x70\n"
        "    ret\n"
        ".popsection\n");

#define STUBS_AT(user) (WINDOW_BASE + ((user) ? 1 : 2) * PAGE_SIZE)

static void build(void)
{
    static const u32 code[] = {0x00054583, 0x00000073, 0, 0,  /* lbu a1, (a0); ecall */
                               0x00050023, 0x00000073, 0, 0,  /* sb zero, (a0); ecall */
                               0x000500e7, 0x00000073};       /* jalr a0; ecall */

    for (u64 n = 0; n < ARRAY_SIZE(code); n++)
        ((u32 *)stubs)[n] = code[n];
    root[WINDOW_BASE / GIB] = entry_of((u64)middle, VALID);
    middle[0] = entry_of((u64)pages, VALID);
    pages[1] = entry_of((u64)stubs, VALID | READ | EXECUTE | USER | ACCESSED_DIRTY);
    pages[2] = entry_of((u64)stubs, VALID | READ | EXECUTE | ACCESSED_DIRTY);
    (void)low;
    sync_code(stubs, sizeof(code));
}

static bool on_trap(struct trap *trap)
{
    seen_cause = trap->cause;
    seen_address = trap->address;
    if ((trap->status >> MPP_SHIFT & 3) == 3) {
        trap_skip(trap);
    } else {
        trap->pc = (u64)run_return;
        trap->status = 3ul << MPP_SHIFT;
    }
    return true;
}

static void attempt(enum access access, u64 privilege, u64 mode, u64 at, const volatile u64 *entry)
{
    u64 page = at & -(u64)PAGE_SIZE, address = access == FETCH_IT ? page : page + DATA;

    seen_cause = seen_address = 0;
    run_user(STUBS_AT(privilege == 0) + 16 * access, address, mode | privilege << MPP_SHIFT);
    note(seen_cause, seen_address, seen_cause == 8 || seen_cause == 9 ? 0 : address, entry ? *entry : 0);
}

/* From M-mode, with the rights of another. */
static void attempt_for(enum access access, u64 privilege, u64 mode, u64 at, const volatile u64 *entry)
{
    u64 address = (at & -(u64)PAGE_SIZE) + DATA, off = MPRV | SUM | MXR | 3ul << MPP_SHIFT;
    u64 on = MPRV | mode | privilege << MPP_SHIFT;

    seen_cause = seen_address = 0;
    __asm__ volatile("csrc mstatus, %0" : : "r"(off) : "memory");
    if (access == READ_IT) /* the trap leaves MPRV on, with MPP M: nothing is translated then */
        __asm__ volatile("csrs mstatus, %1\n\tlbu t0, (%0)" : : "r"(address), "r"(on) : "t0", "memory");
    else
        __asm__ volatile("csrs mstatus, %1\n\tsb zero, (%0)" : : "r"(address), "r"(on) : "memory");
    __asm__ volatile("csrc mstatus, %0" : : "r"(off) : "memory");
    note(seen_cause, seen_address, seen_cause ? address : 0, entry ? *entry : 0);
}

static void all_entries(u64 *entry, u64 target, u64 level, u64 at)
{
    for (u64 how = 0; how < 4; how++) {
        u64 mode = (how & 1 ? SUM : 0) | (how & 2 ? MXR : 0);
        for (u64 bits = 0; bits < 128; bits++) {
            u64 value = entry_of(target, (bits & 0x1f) | (bits >> 5) << 6);
            if (level > 0 && !(bits & 0xe)) /* a table */
                continue;
            for (u64 privilege = 0; privilege < 2; privilege++) {
                for (enum access access = READ_IT; access <= FETCH_IT; access++) {
                    *(volatile u64 *)entry = value;
                    flush();
                    attempt(access, privilege, mode, at, entry);
                }
                for (enum access access = READ_IT; access <= WRITE_IT; access++) {
                    *(volatile u64 *)entry = value;
                    flush();
                    attempt_for(access, privilege, mode, at, entry);
                }
            }
        }
        group(level ? "blocks" : "pages", level, how);
    }
    *entry = 0;
    flush();
}

/* A table in flash, whose entries nobody can mark as accessed. */
static const u64 fixed[512] __attribute__((aligned(PAGE_SIZE))) = {
    [1] = RAM_BASE >> 2 | VALID | READ | WRITE,
    [2] = RAM_BASE >> 2 | VALID | READ | WRITE | 0x40,
    [3] = RAM_BASE >> 2 | VALID | READ | WRITE | ACCESSED_DIRTY,
};

static void run(void)
{
    u64 data = (u64)frame, in_block = data % BLOCK, in_gib = data % GIB;

    __asm__ volatile("csrw pmpaddr0, %0\n\tcsrw pmpcfg0, %1" : : "r"(~0ul), "r"(0x1ful));
    __asm__ volatile("csrw satp, %0" : : "r"(SV39 | (u64)root >> 12) : "memory");
    flush();
    all_entries(&pages[3], data, 0, WINDOW_BASE + 3 * PAGE_SIZE);
    all_entries(&middle[3], data - in_block, 1, WINDOW_BASE + 3 * BLOCK + in_block);
    all_entries(&root[HUGE_BASE / GIB], data - in_gib, 2, HUGE_BASE + in_gib);

    for (u64 bit = 5; bit < 64; bit++) { /* G, software's, the number, and what is reserved */
        if (bit >= 30 && bit < 54) /* beyond all memory */
            continue;
        pages[3] = entry_of(data, VALID | READ | WRITE | EXECUTE | ACCESSED_DIRTY) ^ 1ul << bit;
        flush();
        if (bit < 10 || bit >= 54)
            attempt(READ_IT, 1, 0, WINDOW_BASE + 3 * PAGE_SIZE, &pages[3]);
        middle[3] = entry_of(data - in_block, VALID | READ | WRITE | EXECUTE | ACCESSED_DIRTY) | 1ul << bit;
        flush();
        if (bit < 19 || bit >= 54)
            attempt(WRITE_IT, 1, 0, WINDOW_BASE + 3 * BLOCK + in_block, &middle[3]);
        middle[4] = entry_of((u64)pages, VALID) | 1ul << bit;
        flush();
        if (bit < 10 || bit >= 54)
            attempt(FETCH_IT, 1, 0, WINDOW_BASE + 4 * BLOCK + 3 * PAGE_SIZE, &middle[4]);
    }
    group("bits", 0, 0);
    pages[3] = entry_of(data, VALID | READ | WRITE | EXECUTE | ACCESSED_DIRTY);
    pages[4] = entry_of(data, VALID); /* a table at the last level */
    middle[4] = entry_of(NOWHERE, VALID);
    middle[5] = entry_of((u64)fixed, VALID);
    flush();
    static const u64 odd[] = {1ul << 38, 1ul << 39, ~0xffful, 1ul << 63, 0xffffffc000000000ul};
    for (u64 n = 0; n < ARRAY_SIZE(odd); n++)
        for (enum access access = READ_IT; access <= FETCH_IT; access++)
            attempt(access, 1, 0, odd[n], NULL);
    attempt(READ_IT, 1, 0, WINDOW_BASE + 4 * PAGE_SIZE, NULL);
    group("addresses", 0, 0);
    for (enum access access = READ_IT; access <= FETCH_IT; access++)
        attempt(access, 1, 0, WINDOW_BASE + 4 * BLOCK, NULL);
    group("tables out of reach", 1, 0);
    for (u64 n = 1; n < 4; n++)
        for (enum access access = READ_IT; access <= WRITE_IT; access++)
            attempt(access, 1, 0, WINDOW_BASE + 5 * BLOCK + n * PAGE_SIZE, NULL);
    group("tables in flash", 0, 0);

    static u64 top[512] __attribute__((aligned(PAGE_SIZE)));
    top[0] = entry_of((u64)root, VALID);
    top[3] = entry_of((u64)root, VALID);
    top[256] = entry_of((u64)root, VALID);
    __asm__ volatile("csrw satp, %0" : : "r"(SV48 | (u64)top >> 12) : "memory");
    flush();
    attempt(WRITE_IT, 1, 0, WINDOW_BASE + 3 * PAGE_SIZE, &pages[3]);
    attempt(READ_IT, 1, 0, (3ul << 39) + WINDOW_BASE + 3 * PAGE_SIZE, NULL);
    attempt(FETCH_IT, 1, 0, 0xffff800000000000ul + WINDOW_BASE + 3 * PAGE_SIZE, NULL);
    attempt(READ_IT, 1, 0, 0x0000800000000000ul + WINDOW_BASE + 3 * PAGE_SIZE, NULL);
    group("Sv48", 3, 0);
    __asm__ volatile("csrw satp, zero" : : : "memory");
    flush();
}

#endif

int main(void)
{
    print("rights (%s)\n", isa_name);
    write_return((u32 *)frame, 7);
    sync_code(frame, 8);
    on_exception = on_trap;
    sum = HASH_BEGIN;
    build();
    run();
    on_exception = NULL;
    print("rights: %u cases\n", cases);
    return 0;
}
