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
#define LSR_DR (1u << 0)
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

int uart_getc(void)
{
    return read8(UART_LSR) & LSR_DR ? read8(UART_THR) : -1;
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

static void memory_barrier(void) { __asm__ volatile("fence iorw, iorw" : : : "memory"); }

static void (*cpu_entry[MAX_CPUS])(unsigned cpu);
static volatile bool cpu_started[MAX_CPUS];

/* All harts come out of reset; those but 0 sleep in start-riscv64.S until a software interrupt. The msip of a hart
 * that is not there stays 0; that of one that is becomes 0 again only after cpu_started has been set. */
bool cpu_start(unsigned cpu, void (*entry)(unsigned cpu))
{
    if (cpu == 0 || cpu >= MAX_CPUS)
        return false;
    cpu_entry[cpu] = entry;
    cpu_started[cpu] = false;
    memory_barrier();
    write32(CLINT_MSIP(cpu), 1);
    while (read32(CLINT_MSIP(cpu)) & 1)
        cpu_relax();
    memory_barrier();
    return cpu_started[cpu];
}

/* Called by the woken hart from start-riscv64.S, which parks it again afterwards. */
void secondary_main(unsigned cpu)
{
    cpu_started[cpu] = true;
    memory_barrier();
    write32(CLINT_MSIP(cpu), 0);
    cpu_entry[cpu](cpu);
}

void cpu_relax(void) { __asm__ volatile(".insn 0x0100000f"); } /* pause */

/* --- Interrupts ----------------------------------------------------------------------------------------------- */

#define MSTATUS_MIE 8

void interrupts_on(void) { __asm__ volatile("csrsi mstatus, %0" : : "i"(MSTATUS_MIE) : "memory"); }
void interrupts_off(void) { __asm__ volatile("csrci mstatus, %0" : : "i"(MSTATUS_MIE) : "memory"); }
void wait_for_interrupt(void) { __asm__ volatile("wfi" : : : "memory"); }

/* --- Fresh instructions --------------------------------------------------------------------------------------- */

void sync_code(void *start, size_t size)
{
    (void)start; /* fence.i knows no ranges */
    (void)size;
    __asm__ volatile("fence rw, rw\n\t.insn 0x0000100f" : : : "memory");
}

void sync_fetch(void) { __asm__ volatile(".insn 0x0000100f" : : : "memory"); } /* fence.i */

void write_return(u32 code[2], u32 value)
{
    code[0] = value << 20 | 0x00000513u; /* li a0, value */
    code[1] = 0x00008067u;               /* ret */
}

/* --- Traps ---------------------------------------------------------------------------------------------------- */

/* Exceptions in mcause. */
#define FETCH_MISALIGNED 0
#define FETCH_FAULT 1
#define ILLEGAL_INSTRUCTION 2
#define BREAKPOINT 3
#define LOAD_MISALIGNED 4
#define LOAD_FAULT 5
#define STORE_MISALIGNED 6
#define STORE_FAULT 7
#define ECALL_FROM_U 8
#define ECALL_FROM_S 9
#define ECALL_FROM_M 11
#define FETCH_PAGE_FAULT 12
#define LOAD_PAGE_FAULT 13
#define STORE_PAGE_FAULT 15
#define LINK 1

enum trap_kind trap_kind(const struct trap *trap)
{
    switch (trap->cause) {
    case FETCH_FAULT:
    case FETCH_PAGE_FAULT:
        return TRAP_FETCH;
    case LOAD_FAULT:
    case LOAD_PAGE_FAULT:
        return TRAP_READ;
    case STORE_FAULT:
    case STORE_PAGE_FAULT:
        return TRAP_WRITE;
    case FETCH_MISALIGNED:
    case LOAD_MISALIGNED:
    case STORE_MISALIGNED:
        return TRAP_MISALIGNED;
    case ILLEGAL_INSTRUCTION:
        return TRAP_UNDEFINED;
    case BREAKPOINT:
        return TRAP_BREAKPOINT;
    case ECALL_FROM_U:
    case ECALL_FROM_S:
    case ECALL_FROM_M:
        return TRAP_CALL;
    default:
        return TRAP_OTHER;
    }
}

void trap_skip(struct trap *trap)
{
    if (trap_kind(trap) == TRAP_FETCH)
        trap->pc = trap->regs[LINK];
    else
        trap->pc += (*(u16 *)trap->pc & 3) == 3 ? 4 : 2; /* low bits 11: not a compressed instruction */
}
