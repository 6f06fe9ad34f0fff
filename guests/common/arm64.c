/* arm64.c: the virt-arm64 board: PL011, PSCI by HVC, AArch64 exception syndromes. */
#include "guest.h"

const char isa_name[] = "arm64";

/* --- UART: PL011 ---------------------------------------------------------------------------------------------- */

#define UART_DR (UART_BASE + 0x00)
#define UART_FR (UART_BASE + 0x18)
#define UART_LCRH (UART_BASE + 0x2c)
#define UART_CR (UART_BASE + 0x30)
#define FR_RXFE (1u << 4)
#define FR_TXFF (1u << 5)
#define LCRH_8N1_FIFO 0x70u
#define CR_ENABLE_RX_TX 0x301u

void uart_init(void)
{
    write32(UART_CR, 0);
    write32(UART_LCRH, LCRH_8N1_FIFO);
    write32(UART_CR, CR_ENABLE_RX_TX);
}

void uart_putc(char c)
{
    while (read32(UART_FR) & FR_TXFF)
        ;
    write32(UART_DR, (u8)c);
}

int uart_getc(void)
{
    return read32(UART_FR) & FR_RXFE ? -1 : (int)(read32(UART_DR) & 0xff);
}

/* --- PSCI and the way out ------------------------------------------------------------------------------------- */

#define PSCI_SYSTEM_OFF 0x84000008ul
#define PSCI_CPU_ON 0xc4000003ul
#define SYS_EXIT 0x18ul
#define ADP_STOPPED_APPLICATION_EXIT 0x20026ul

static long psci(u64 function, u64 a, u64 b, u64 c)
{
    register u64 x0 __asm__("x0") = function;
    register u64 x1 __asm__("x1") = a;
    register u64 x2 __asm__("x2") = b;
    register u64 x3 __asm__("x3") = c;

    __asm__ volatile("hvc #0" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3) : : "memory");
    return (long)x0;
}

/* PSCI has no way to tell a status, so a failure leaves by the semihosting call that has one. Where nobody answers
 * that call the HLT is undefined, and the second round through here ends with SYSTEM_OFF. */
_Noreturn void guest_exit(unsigned status)
{
    static bool leaving;
    u64 block[2] = {ADP_STOPPED_APPLICATION_EXIT, status};

    if (status != 0 && !leaving) {
        leaving = true;
        register u64 x0 __asm__("x0") = SYS_EXIT;
        register u64 x1 __asm__("x1") = (u64)block;
        __asm__ volatile("hlt #0xf000" : "+r"(x0) : "r"(x1) : "memory");
    }
    psci(PSCI_SYSTEM_OFF, 0, 0, 0);
    for (;;)
        __asm__ volatile("wfi");
}

/* --- Further CPUs --------------------------------------------------------------------------------------------- */

extern char secondary_start[];
static void (*cpu_entry[MAX_CPUS])(unsigned cpu);

bool cpu_start(unsigned cpu, void (*entry)(unsigned cpu))
{
    if (cpu == 0 || cpu >= MAX_CPUS)
        return false;
    cpu_entry[cpu] = entry;
    __asm__ volatile("dsb sy" : : : "memory");
    return psci(PSCI_CPU_ON, cpu, (u64)secondary_start, cpu) == 0;
}

/* Called by secondary_start in start-arm64.S, which parks the CPU afterwards. */
void secondary_main(unsigned cpu) { cpu_entry[cpu](cpu); }

void cpu_relax(void) { __asm__ volatile("yield"); }

/* --- Interrupts ----------------------------------------------------------------------------------------------- */

void interrupts_on(void) { __asm__ volatile("msr daifclr, #2\n\tisb" : : : "memory"); }
void interrupts_off(void) { __asm__ volatile("msr daifset, #2\n\tisb" : : : "memory"); }
void wait_for_interrupt(void) { __asm__ volatile("dsb sy\n\twfi" : : : "memory"); }

/* --- Fresh instructions --------------------------------------------------------------------------------------- */

#define CACHE_LINE 16u /* the least that any implementation has */

void sync_code(void *start, size_t size)
{
    u64 end = (u64)start + size;

    for (u64 line = (u64)start & -(u64)CACHE_LINE; line < end; line += CACHE_LINE)
        __asm__ volatile("dc cvau, %0" : : "r"(line) : "memory");
    __asm__ volatile("dsb ish" : : : "memory");
    for (u64 line = (u64)start & -(u64)CACHE_LINE; line < end; line += CACHE_LINE)
        __asm__ volatile("ic ivau, %0" : : "r"(line) : "memory");
    __asm__ volatile("dsb ish\n\tisb" : : : "memory");
}

void sync_fetch(void) { __asm__ volatile("isb" : : : "memory"); }

void write_return(u32 code[2], u32 value)
{
    code[0] = 0x52800000u | value << 5; /* mov w0, #value */
    code[1] = 0xd65f03c0u;              /* ret */
}

/* --- Traps ---------------------------------------------------------------------------------------------------- */

/* Exception classes and fault status codes of ESR_EL1. */
#define EC(esr) ((unsigned)((esr) >> 26) & 0x3f)
#define EC_UNKNOWN 0x00
#define EC_SVC64 0x15
#define EC_MSR_MRS 0x18
#define EC_IABT_LOWER_EL 0x20
#define EC_IABT_SAME_EL 0x21
#define EC_PC_ALIGNMENT 0x22
#define EC_DABT_LOWER_EL 0x24
#define EC_DABT_SAME_EL 0x25
#define EC_BRK64 0x3c
#define FSC(esr) ((esr) & 0x3f)
#define FSC_ALIGNMENT 0x21
#define WNR(esr) ((esr) >> 6 & 1)
#define LINK 30

enum trap_kind trap_kind(const struct trap *trap)
{
    switch (EC(trap->cause)) {
    case EC_UNKNOWN:
    case EC_MSR_MRS:
        return TRAP_UNDEFINED;
    case EC_SVC64:
        return TRAP_CALL;
    case EC_BRK64:
        return TRAP_BREAKPOINT;
    case EC_PC_ALIGNMENT:
        return TRAP_MISALIGNED;
    case EC_IABT_LOWER_EL:
    case EC_IABT_SAME_EL:
        return TRAP_FETCH;
    case EC_DABT_LOWER_EL:
    case EC_DABT_SAME_EL:
        if (FSC(trap->cause) == FSC_ALIGNMENT)
            return TRAP_MISALIGNED;
        return WNR(trap->cause) ? TRAP_WRITE : TRAP_READ;
    default:
        return TRAP_OTHER;
    }
}

void trap_skip(struct trap *trap)
{
    enum trap_kind kind = trap_kind(trap);

    if (kind == TRAP_FETCH)
        trap->pc = trap->regs[LINK];
    else if (kind != TRAP_CALL) /* of a call ELR is the next instruction already */
        trap->pc += 4;
}
