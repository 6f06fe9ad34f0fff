/*
 * paging: the guest's own page tables, and what a second way to the same memory must not break.
 *
 * alias    all of RAM appears a second time; data and code written through one way is read and run through the other
 * remap    one page of addresses is turned from one frame to another and back; the TLB is told each time
 * rights   reading an unmapped page, writing a read-only one and executing a no-execute one trap, with the address
 *
 * arm64: EL1 with a 39-bit TTBR0 map of 4 KiB granules. riscv64: Sv39 in S-mode; traps go to M-mode, which has no
 * translation and finds everything where it is because the map begins as the identity.
 */
#include "guest.h"

#define ROUNDS 64
#define GIB 0x40000000ul

/* The map: the identity, the alias in the GiB after RAM's, and a window of single pages in the one after that. */
#define ALIAS_BASE (RAM_BASE + GIB)
#define WINDOW_BASE (RAM_BASE + 2 * GIB)

enum rights { READ_WRITE, READ_ONLY, READ_WRITE_EXECUTE };

static u64 root[512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));   /* flash and devices, in 2 MiB blocks */
static u64 middle[512] __attribute__((aligned(PAGE_SIZE))); /* the window's tables */
static u64 pages[512] __attribute__((aligned(PAGE_SIZE)));

#if defined(__aarch64__)

#define DESCRIPTOR_TABLE 3u
#define DESCRIPTOR_BLOCK 1u
#define DESCRIPTOR_PAGE 3u
#define ATTRIBUTE(index) ((index) << 2)
#define NORMAL ATTRIBUTE(0ul)
#define UNCACHED ATTRIBUTE(1ul)
#define DEVICE ATTRIBUTE(2ul)
#define MAIR_VALUE 0x0044fful /* in this order: write-back, non-cacheable, Device-nGnRnE */
#define AP_READ_ONLY (2ul << 6)
#define ACCESSED (1ul << 10)
#define NEVER_EXECUTE (3ul << 53) /* UXN, PXN */
#define TCR_VALUE (25ul | 1ul << 23 | 1ul << 32) /* T0SZ: 39 bits; no TTBR1; 36 bits of physical address */
#define SCTLR_MMU_ON 1ul

static u64 table(const u64 *next) { return (u64)next | DESCRIPTOR_TABLE; }
static u64 ram_block(u64 physical) { return physical | NORMAL | ACCESSED | DESCRIPTOR_BLOCK; }

static u64 low_block(u64 physical)
{
    bool is_flash = physical < FLASH_BANK1 + FLASH_BANK1; /* two banks of the same size */

    return physical | ACCESSED | DESCRIPTOR_BLOCK | (is_flash ? UNCACHED : DEVICE | NEVER_EXECUTE);
}

static u64 page(u64 physical, enum rights rights)
{
    return physical | NORMAL | ACCESSED | DESCRIPTOR_PAGE | (rights == READ_ONLY ? AP_READ_ONLY : 0) |
           (rights == READ_WRITE_EXECUTE ? 0 : NEVER_EXECUTE);
}

static void forget_translation(u64 address)
{
    __asm__ volatile("dsb ishst\n\ttlbi vaae1is, %0\n\tdsb ish\n\tisb" : : "r"(address >> 12) : "memory");
}

static void run_translated(void (*entry)(void))
{
    u64 sctlr;

    __asm__ volatile("msr mair_el1, %0" : : "r"(MAIR_VALUE));
    __asm__ volatile("msr tcr_el1, %0" : : "r"(TCR_VALUE));
    __asm__ volatile("msr ttbr0_el1, %0" : : "r"(root));
    __asm__ volatile("dsb sy\n\ttlbi vmalle1\n\tdsb sy\n\tisb" : : : "memory");
    __asm__ volatile("mrs %0, sctlr_el1" : "=r"(sctlr));
    __asm__ volatile("msr sctlr_el1, %0\n\tisb" : : "r"(sctlr | SCTLR_MMU_ON) : "memory");
    entry();
    __asm__ volatile("dsb sy\n\tmsr sctlr_el1, %0\n\tisb" : : "r"(sctlr) : "memory");
}

#else

#define VALID 0x01ul
#define READ 0x02ul
#define WRITE 0x04ul
#define EXECUTE 0x08ul
#define ACCESSED_DIRTY 0xc0ul
#define SV39 (8ul << 60)
#define MPP_MASK 0x1800ul
#define MPP_S 0x0800ul

static u64 entry_of(u64 physical, u64 flags) { return physical >> 12 << 10 | flags | VALID; }
static u64 table(const u64 *next) { return entry_of((u64)next, 0); }
static u64 ram_block(u64 physical) { return entry_of(physical, READ | WRITE | EXECUTE | ACCESSED_DIRTY); }
static u64 low_block(u64 physical) { return entry_of(physical, READ | WRITE | EXECUTE | ACCESSED_DIRTY); }

static u64 page(u64 physical, enum rights rights)
{
    return entry_of(physical, READ | ACCESSED_DIRTY | (rights == READ_ONLY ? 0 : WRITE) |
                                  (rights == READ_WRITE_EXECUTE ? EXECUTE : 0));
}

static void forget_translation(u64 address) { __asm__ volatile("sfence.vma %0" : : "r"(address) : "memory"); }

/* Goes to S-mode and back in the middle of a function: translation reaches neither this code nor its stack. The
 * ecall that ends it is answered in on_trap(). */
static void run_translated(void (*entry)(void))
{
    __asm__ volatile("csrw pmpaddr0, %0\n\tcsrw pmpcfg0, %1" : : "r"(~0ul), "r"(0x1ful)); /* NAPOT, RWX */
    __asm__ volatile("csrw satp, %0\n\tsfence.vma" : : "r"(SV39 | (u64)root >> 12) : "memory");
    __asm__ volatile("csrc mstatus, %0\n\tcsrs mstatus, %1\n\t"
                     "lla t0, 1f\n\tcsrw mepc, t0\n\tmret\n1:"
                     :
                     : "r"(MPP_MASK), "r"(MPP_S)
                     : "t0", "memory");
    entry();
    __asm__ volatile("ecall" : : : "memory");
    __asm__ volatile("csrw satp, zero\n\tsfence.vma" : : : "memory");
}

#endif

static void build_tables(void)
{
    for (u64 i = 0; i < ARRAY_SIZE(low); i++)
        low[i] = low_block(i * (GIB / 512));
    root[0] = table(low);
    root[RAM_BASE / GIB] = ram_block(RAM_BASE);
    root[ALIAS_BASE / GIB] = ram_block(RAM_BASE);
    root[WINDOW_BASE / GIB] = table(middle);
    middle[0] = table(pages);
}

/* Points page `number` of the window at `frame`; 0 for nothing. */
static void map_page(u64 number, u64 frame, enum rights rights)
{
    ((volatile u64 *)pages)[number] = frame ? page(frame, rights) : 0;
    forget_translation(WINDOW_BASE + number * PAGE_SIZE);
}

/* --- What runs translated ------------------------------------------------------------------------------------- */

static u32 frame_a[PAGE_SIZE / sizeof(u32)] __attribute__((aligned(PAGE_SIZE)));
static u32 frame_b[PAGE_SIZE / sizeof(u32)] __attribute__((aligned(PAGE_SIZE)));

static volatile u64 faults, expected_faults;
static volatile enum trap_kind expected_kind; /* volatile: read by the handler, which the compiler does not see called */
static volatile u64 expected_address;

static u32 call(const void *code) { return ((u32 (*)(void))code)(); }

static void *alias_of(void *address) { return (void *)((u64)address - RAM_BASE + ALIAS_BASE); }

static bool on_trap(struct trap *trap)
{
    enum trap_kind kind = trap_kind(trap);

    trap_skip(trap);
#if defined(__riscv)
    if (kind == TRAP_CALL) { /* the end of run_translated() */
        trap->status |= MPP_MASK;
        return true;
    }
#endif
    faults++;
    expected_faults += kind == expected_kind && trap->address == expected_address;
    print("  rights: %s at %09x\n", trap_name(kind), trap->address);
    return true;
}

static bool report(const char *what, u64 wrong)
{
    print("  %s: %s\n", what, wrong ? "FAILED" : "ok");
    return !wrong;
}

/* Written through `to`, read and run through `from`. */
static u64 both_ways(u32 *to, u32 *from)
{
    u64 wrong = 0;

    for (u32 round = 0; round < ROUNDS; round++) {
        write_return(to, round);
        sync_code(to, 2 * sizeof(u32));
        sync_code(from, 2 * sizeof(u32));
        wrong += *(volatile u32 *)from != *(volatile u32 *)to;
        wrong += call(from) != round;
    }
    return wrong;
}

static u64 remap(void)
{
    u64 wrong = 0;

    write_return(frame_a, 0xa);
    write_return(frame_b, 0xb);
    sync_code(frame_a, 2 * sizeof(u32));
    sync_code(frame_b, 2 * sizeof(u32));
    for (u32 round = 0; round < ROUNDS; round++) {
        bool is_a = round % 2 == 0;
        map_page(0, (u64)(is_a ? frame_a : frame_b), READ_WRITE_EXECUTE);
        sync_fetch();
        wrong += read32(WINDOW_BASE) != (is_a ? frame_a : frame_b)[0];
        wrong += call((void *)WINDOW_BASE) != (is_a ? 0xa : 0xb);
        write32(WINDOW_BASE + 64, round);
        wrong += read32((u64)(is_a ? frame_a : frame_b) + 64) != round;
    }
    return wrong;
}

static void expect_fault(enum trap_kind kind, u64 address)
{
    expected_kind = kind;
    expected_address = address;
    if (kind == TRAP_READ)
        (void)read32(address);
    else if (kind == TRAP_WRITE)
        write32(address, 0);
    else
        call((void *)address);
}

static u64 rights(void)
{
    map_page(1, 0, READ_WRITE);
    map_page(2, (u64)frame_a, READ_ONLY);
    map_page(3, (u64)frame_a, READ_WRITE);
    expect_fault(TRAP_READ, WINDOW_BASE + 1 * PAGE_SIZE + 16);
    expect_fault(TRAP_WRITE, WINDOW_BASE + 2 * PAGE_SIZE + 32);
    expect_fault(TRAP_FETCH, WINDOW_BASE + 3 * PAGE_SIZE);
    return (faults != 3) + (expected_faults != 3) + (read32(WINDOW_BASE + 2 * PAGE_SIZE) != frame_a[0]);
}

static bool good = true;

static void translated(void)
{
    good &= report("alias written", both_ways(alias_of(frame_a), frame_a));
    good &= report("alias run", both_ways(frame_a, alias_of(frame_a)));
    good &= report("remap", remap());
    good &= report("rights", rights());
}

int main(void)
{
    print("paging (%s)\n", isa_name);
    on_exception = on_trap;
    build_tables();
    run_translated(translated);
    print("paging: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
