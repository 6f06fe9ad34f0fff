/*
 * shootdown: page tables of several CPUs.
 *
 * own     every CPU has a page of its own at an address that all use, by way of a root of its own
 * shared  CPU 0 turns a page that all see from frame to frame and has every TLB forget it: arm64 by maintenance that the
 *         others need not hear of, riscv64 by asking each of them. Then all have to read and run what is there now
 *
 * Any number of CPUs, one included.
 */
#include "paging.h"

#define ROUNDS 48
#define WINDOW_BASE (RAM_BASE + 2 * GIB)
#define OWN WINDOW_BASE
#define SHARED (WINDOW_BASE + 0x200000)

static u64 roots[MAX_CPUS][512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));
static u64 middles[MAX_CPUS][512] __attribute__((aligned(PAGE_SIZE)));
static u64 own_pages[MAX_CPUS][512] __attribute__((aligned(PAGE_SIZE)));
static u64 shared_pages[512] __attribute__((aligned(PAGE_SIZE)));
static u32 frames[MAX_CPUS + 2][PAGE_SIZE / 4] __attribute__((aligned(PAGE_SIZE)));

static unsigned cpus = 1;
static volatile u32 round_wanted, round_done[MAX_CPUS], started[MAX_CPUS];
static volatile u64 wrong[MAX_CPUS];
#if defined(__riscv)
static volatile u32 flush_wanted, flush_done[MAX_CPUS];
#endif

static void barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static u32 call(u64 code) { return ((u32(*)(void))code)(); }

static void tell_all(void)
{
    forget_translation(SHARED);
#if defined(__riscv)
    barrier();
    flush_wanted++;
    for (unsigned cpu = 1; cpu < cpus; cpu++)
        while (flush_done[cpu] != flush_wanted)
            cpu_relax();
    barrier();
#endif
}

static void listen(unsigned cpu)
{
    (void)cpu;
#if defined(__riscv)
    u32 wanted = flush_wanted;
    if (flush_done[cpu] != wanted) {
        forget_translation(SHARED);
        barrier();
        flush_done[cpu] = wanted;
    }
#endif
}

static void look(unsigned cpu, u32 round)
{
    u32 shared = 100 + round % 2;

    sync_fetch();
    wrong[cpu] += call(SHARED) != shared;
    wrong[cpu] += read32(SHARED + 8) != shared;
    wrong[cpu] += call(OWN) != cpu;
    write32(OWN + 64, round);
    wrong[cpu] += frames[cpu][16] != round;
}

static void others(unsigned cpu)
{
    started[cpu] = 1;
    for (u32 round = 1; round <= ROUNDS; round++) {
        while (round_wanted != round) {
            listen(cpu);
            cpu_relax();
        }
        barrier();
        look(cpu, round);
        barrier();
        round_done[cpu] = round;
    }
}

static void first(unsigned cpu)
{
    for (u32 round = 1; round <= ROUNDS; round++) {
        ((volatile u64 *)shared_pages)[0] = page((u64)frames[MAX_CPUS + round % 2], READ_WRITE_EXECUTE);
        tell_all();
        round_wanted = round;
        look(cpu, round);
        for (unsigned other = 1; other < cpus; other++)
            while (round_done[other] != round)
                cpu_relax();
        barrier();
    }
}

static unsigned who(void)
{
    u64 value;

#if defined(__aarch64__)
    __asm__ volatile("mrs %0, mpidr_el1" : "=r"(value));
    return value & 0xff;
#else
    __asm__ volatile("mv %0, tp" : "=r"(value)); /* mhartid is M-mode's */
    return (unsigned)value;
#endif
}

static void translated(void) { who() == 0 ? first(0) : others(who()); }

static void enter(unsigned cpu)
{
#if defined(__riscv)
    __asm__ volatile("mv tp, %0" : : "r"((u64)cpu));
#endif
    run_translated(roots[cpu], translated);
}

#if defined(__riscv)
static bool on_trap(struct trap *trap)
{
    if (trap_kind(trap) != TRAP_CALL)
        return false;
    trap_skip(trap);
    trap->status |= MPP_MASK;
    return true;
}
#else
#define on_trap NULL
#endif

int main(void)
{
    u64 total = 0;

    on_exception = on_trap;
    for (u64 n = 0; n < 512; n++)
        low[n] = low_block(n * (GIB / 512));
    shared_pages[0] = page((u64)frames[MAX_CPUS], READ_WRITE_EXECUTE);
    for (unsigned cpu = 0; cpu < MAX_CPUS; cpu++) {
        roots[cpu][0] = table(low);
        roots[cpu][RAM_BASE / GIB] = ram_block(RAM_BASE);
        roots[cpu][WINDOW_BASE / GIB] = table(middles[cpu]);
        middles[cpu][0] = table(own_pages[cpu]);
        middles[cpu][1] = table(shared_pages);
        own_pages[cpu][0] = page((u64)frames[cpu], READ_WRITE_EXECUTE);
        write_return(frames[cpu], cpu);
    }
    for (u32 n = 0; n < 2; n++) {
        write_return(frames[MAX_CPUS + n], 100 + n);
        frames[MAX_CPUS + n][2] = 100 + n;
    }
    sync_code(frames, sizeof(frames));
    barrier();
    for (unsigned cpu = 1; cpu < MAX_CPUS && cpu_start(cpu, enter); cpu++) {
        while (!started[cpu])
            cpu_relax();
        cpus++;
    }
    barrier();
    enter(0);
    for (unsigned cpu = 0; cpu < cpus; cpu++)
        total += wrong[cpu];
    print("shootdown: %u cpus, %u rounds, %u wrong\n", (u64)cpus, (u64)ROUNDS, total);
    return total ? 1 : 0;
}
