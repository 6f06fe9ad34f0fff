/*
 * paging: the guest's own page tables, and what a second way to the same memory must not break.
 *
 * alias    all of RAM appears a second time; data and code written through one way is read and run through the other
 * remap    one page of addresses is turned from one frame to another and back; the TLB is told each time
 * rights   reading an unmapped page, writing a read-only one and executing a no-execute one trap, with the address
 */
#include "paging.h"

#define ROUNDS 64

/* The map: the identity, the alias in the GiB after RAM's, and a window of single pages in the one after that. */
#define ALIAS_BASE (RAM_BASE + GIB)
#define WINDOW_BASE (RAM_BASE + 2 * GIB)

static u64 root[512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));   /* flash and devices, in 2 MiB blocks */
static u64 middle[512] __attribute__((aligned(PAGE_SIZE))); /* the window's tables */
static u64 pages[512] __attribute__((aligned(PAGE_SIZE)));

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
    run_translated(root, translated);
    print("paging: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
