/*
 * clocks: reads every clock that a guest can see, and takes timer interrupts.
 *
 * No clock may go backwards, and every one must advance over a busy loop. Then every timer of the board wakes the CPU
 * from wfi a few times. On a machine whose time is made of instructions two runs print the same.
 */
#include "guest.h"

#define TICKS 3

struct clock {
    const char *name;
    u64 (*read)(void);
};

/* One timer: how to make it fire `ticks` after the last time or now, how to make it stop, and its counter. */
struct timer {
    const char *name;
    u64 (*count)(void);
    void (*arm)(u64 ticks);
    void (*stop)(void);
};

#if defined(__aarch64__)

#define READER(name, reg)                                                                                             \
    static u64 name(void)                                                                                             \
    {                                                                                                                 \
        u64 value;                                                                                                    \
        __asm__ volatile("isb\n\tmrs %0, " reg : "=r"(value) : : "memory");                                           \
        return value;                                                                                                 \
    }
#define WRITE_REG(reg, value) __asm__ volatile("msr " reg ", %0\n\tisb" : : "r"((u64)(value)) : "memory")

READER(cntfrq, "cntfrq_el0")
READER(cntvct, "cntvct_el0")
READER(cntpct, "cntpct_el0")
READER(pmccntr, "pmccntr_el0")

static const struct clock clocks[] = {
    {"CNTVCT_EL0", cntvct},
    {"CNTPCT_EL0", cntpct},
    {"PMCCNTR_EL0", pmccntr},
};

#define GICD_CTLR (GICD_BASE + 0x000)
#define GICD_ISENABLER0 (GICD_BASE + 0x100)
#define GICC_CTLR (GICC_BASE + 0x000)
#define GICC_PMR (GICC_BASE + 0x004)
#define GICC_IAR (GICC_BASE + 0x00c)
#define GICC_EOIR (GICC_BASE + 0x010)
#define PPI_VIRTUAL_TIMER 27
#define PPI_PHYSICAL_TIMER 30
#define CTL_ENABLE 1

#define PMCR_ENABLE (1u << 0)
#define PMCR_RESET_CYCLES (1u << 2)
#define PMCNTENSET_CYCLES (1u << 31)

static void virtual_arm(u64 ticks) { WRITE_REG("cntv_tval_el0", ticks); WRITE_REG("cntv_ctl_el0", CTL_ENABLE); }
static void virtual_stop(void) { WRITE_REG("cntv_ctl_el0", 0); }
static void physical_arm(u64 ticks) { WRITE_REG("cntp_tval_el0", ticks); WRITE_REG("cntp_ctl_el0", CTL_ENABLE); }
static void physical_stop(void) { WRITE_REG("cntp_ctl_el0", 0); }

static const struct timer timers[] = {
    {"virtual timer", cntvct, virtual_arm, virtual_stop},
    {"physical timer", cntpct, physical_arm, physical_stop},
};

static u64 frequency(void) { return cntfrq(); }

static void setup(void)
{
    WRITE_REG("pmcr_el0", PMCR_ENABLE | PMCR_RESET_CYCLES);
    WRITE_REG("pmcntenset_el0", PMCNTENSET_CYCLES);

    write32(GICD_CTLR, 1);
    write32(GICD_ISENABLER0, 1u << PPI_VIRTUAL_TIMER | 1u << PPI_PHYSICAL_TIMER);
    write32(GICC_PMR, 0xff);
    write32(GICC_CTLR, 1);
}

static u32 acknowledged;
static void interrupt_begin(void) { acknowledged = read32(GICC_IAR); }
static void interrupt_end(void) { write32(GICC_EOIR, acknowledged); }

#else

#define READER(name, csr)                                                                                             \
    static u64 name(void)                                                                                             \
    {                                                                                                                 \
        u64 value;                                                                                                    \
        __asm__ volatile("csrr %0, " csr : "=r"(value) : : "memory");                                                 \
        return value;                                                                                                 \
    }

READER(rdcycle, "cycle")
READER(rdtime, "time")
READER(rdinstret, "instret")
READER(mcycle, "mcycle")
READER(minstret, "minstret")

#define CLINT_MTIMECMP0 (CLINT_BASE + 0x4000)
#define CLINT_MTIME (CLINT_BASE + 0xbff8)
#define MTIME_FREQUENCY 10000000ul /* the device tree's timebase-frequency */
#define MIE_MTIE (1u << 7)

static u64 mtime(void) { return *(volatile u64 *)CLINT_MTIME; }

static const struct clock clocks[] = {
    {"cycle", rdcycle},   {"time", rdtime},         {"instret", rdinstret},
    {"mcycle", mcycle},   {"minstret", minstret},   {"CLINT mtime", mtime},
};

static void set_mtimecmp(u64 value) { *(volatile u64 *)CLINT_MTIMECMP0 = value; }
static void clint_arm(u64 ticks) { set_mtimecmp(mtime() + ticks); }
static void clint_stop(void) { set_mtimecmp(~0ul); }

static const struct timer timers[] = {
    {"CLINT timer", mtime, clint_arm, clint_stop},
};

static u64 frequency(void) { return MTIME_FREQUENCY; }

static void setup(void)
{
    clint_stop();
    __asm__ volatile("csrw mie, %0" : : "r"((u64)MIE_MTIE));
}

static void interrupt_begin(void) {}
static void interrupt_end(void) {}

#endif

/* --- The timer that is being waited for ----------------------------------------------------------------------- */

static const struct timer *timer;
static volatile u64 ticks;
static u64 interval;
static u64 fired_at[TICKS];

static void on_tick(void)
{
    interrupt_begin();
    fired_at[ticks++] = timer->count();
    if (ticks < TICKS)
        timer->arm(interval);
    else
        timer->stop();
    interrupt_end();
}

/* True if every tick came, and none before its time. */
static bool take_ticks(void)
{
    u64 last = timer->count();
    bool good = true;

    ticks = 0;
    timer->arm(interval);
    while (ticks < TICKS) {
        wait_for_interrupt();
        interrupts_on();
        interrupts_off();
    }
    print("  %s, every %u:", timer->name, interval);
    for (u64 i = 0; i < TICKS; i++) {
        print(" %u", fired_at[i]);
        good &= fired_at[i] - last >= interval;
        last = fired_at[i];
    }
    print("%s\n", good ? "" : " TOO EARLY");
    return good;
}

static bool read_clock(const struct clock *clock)
{
    u64 first = clock->read();
    u64 second = clock->read();
    for (volatile int i = 0; i < 2000; i++)
        ;
    u64 third = clock->read();
    bool good = first <= second && second < third;

    print("  %s: %u, %u, and after a loop %u%s\n", clock->name, first, second, third, good ? "" : " WRONG");
    return good;
}

int main(void)
{
    bool good = true;

    on_interrupt = on_tick;
    setup();
    interval = frequency() / 1000;
    print("clocks (%s), %u Hz\n", isa_name, frequency());
    for (u64 i = 0; i < ARRAY_SIZE(clocks); i++)
        good &= read_clock(&clocks[i]);
    for (u64 i = 0; i < ARRAY_SIZE(timers); i++) {
        timer = &timers[i];
        good &= take_ticks();
    }
    print("clocks: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
