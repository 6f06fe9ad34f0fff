/* riscv64.c: the virt-riscv64 board in M-mode: NS16550A, CLINT, test finisher, mcause. */
#include "guest.h"

const char isa_name[] = "riscv64";

/* --- UART: NS16550A ------------------------------------------------------------------------------------------- */

#define UART_THR (UART_BASE + 0)
#define UART_FCR (UART_BASE + 2)
#define UART_LCR (UART_BASE + 3)
#define UART_LSR (UART_BASE + 5)
#define LCR_8N1 0x03u
#define FCR_ENABLE 0x01u
#define LSR_THRE (1u << 5)

void uart_init(void)
{
    write8(UART_LCR, LCR_8N1);
    write8(UART_FCR, FCR_ENABLE);
}

void uart_putc(char c)
{
    while (!(read8(UART_LSR) & LSR_THRE))
        ;
    write8(UART_THR, (u8)c);
}

/* --- The way out ---------------------------------------------------------------------------------------------- */

#define FINISHER_PASS 0x5555u
#define FINISHER_FAIL 0x3333u

_Noreturn void guest_exit(unsigned status)
{
    write32(FINISHER_BASE, status == 0 ? FINISHER_PASS : status << 16 | FINISHER_FAIL);
    for (;;)
        __asm__ volatile("wfi");
}

/* --- Further CPUs --------------------------------------------------------------------------------------------- */

#define CLINT_MSIP(hart) (CLINT_BASE + 4 * (hart))
#define CLINT_MTIME (CLINT_BASE + 0xbff8)
#define START_TIMEOUT 1000000ul /* 100 ms of mtime */

static void (*cpu_entry[MAX_CPUS])(unsigned cpu);
static volatile bool cpu_started[MAX_CPUS];

/* All harts come out of reset; those but 0 sleep in start-riscv64.S until a software interrupt. A hart that is not
 * there can only be told by its silence. */
bool cpu_start(unsigned cpu, void (*entry)(unsigned cpu))
{
    volatile u64 *mtime = (volatile u64 *)CLINT_MTIME;

    if (cpu == 0 || cpu >= MAX_CPUS)
        return false;
    cpu_entry[cpu] = entry;
    __asm__ volatile("fence rw, rw" : : : "memory");
    write32(CLINT_MSIP(cpu), 1);
    for (u64 deadline = *mtime + START_TIMEOUT; !cpu_started[cpu]; cpu_relax())
        if (*mtime > deadline)
            return false;
    return true;
}

/* Called by the woken hart from start-riscv64.S, which parks it again afterwards. */
void secondary_main(unsigned cpu)
{
    write32(CLINT_MSIP(cpu), 0);
    cpu_started[cpu] = true;
    __asm__ volatile("fence rw, rw" : : : "memory");
    cpu_entry[cpu](cpu);
}

void cpu_relax(void) { __asm__ volatile(".insn 0x0100000f"); } /* pause */

/* --- Fresh instructions --------------------------------------------------------------------------------------- */

void sync_code(void *start, size_t size)
{
    (void)start; /* fence.i knows no ranges */
    (void)size;
    __asm__ volatile("fence rw, rw\n\t.insn 0x0000100f" : : : "memory");
}

void sync_fetch(void) { __asm__ volatile(".insn 0x0000100f" : : : "memory"); } /* fence.i */

/* --- Traps ---------------------------------------------------------------------------------------------------- */

#define FETCH_MISALIGNED 0
#define FETCH_FAULT 1
#define LINK 1

const char *trap_name(const struct trap *trap)
{
    static const char *const names[] = {
        "misaligned fetch", "fetch access fault", "illegal instruction", "breakpoint", "misaligned load",
        "load access fault", "misaligned store", "store access fault", "ecall from U-mode", "ecall from S-mode",
        "exception", "ecall from M-mode", "fetch page fault", "load page fault", "exception", "store page fault",
    };

    return trap->cause < ARRAY_SIZE(names) ? names[trap->cause] : "exception";
}

void trap_skip(struct trap *trap)
{
    if (trap->cause == FETCH_MISALIGNED || trap->cause == FETCH_FAULT)
        trap->pc = trap->regs[LINK];
    else
        trap->pc += (*(u16 *)trap->pc & 3) == 3 ? 4 : 2; /* low bits 11: not a compressed instruction */
}
