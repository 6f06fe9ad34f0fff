/* arm64.c: the virt-arm64 board: PL011, PSCI by HVC, AArch64 exception syndromes. */
#include "guest.h"

const char isa_name[] = "arm64";

/* --- UART: PL011 ---------------------------------------------------------------------------------------------- */

#define UART_DR (UART_BASE + 0x00)
#define UART_FR (UART_BASE + 0x18)
#define UART_LCRH (UART_BASE + 0x2c)
#define UART_CR (UART_BASE + 0x30)
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

/* --- Traps ---------------------------------------------------------------------------------------------------- */

#define EC(esr) ((unsigned)((esr) >> 26) & 0x3f)
#define EC_SVC64 0x15
#define EC_HVC64 0x16
#define EC_IABT_SAME_EL 0x21
#define EC_PC_ALIGNMENT 0x22
#define LINK 30

const char *trap_name(const struct trap *trap)
{
    switch (EC(trap->cause)) {
    case 0x00: return "undefined instruction";
    case EC_SVC64: return "supervisor call";
    case 0x18: return "trapped system register";
    case 0x20: case EC_IABT_SAME_EL: return "instruction abort";
    case EC_PC_ALIGNMENT: return "misaligned pc";
    case 0x24: case 0x25:
        if ((trap->cause & 0x3f) == 0x21)
            return "misaligned access";
        return trap->cause & (1u << 6) ? "data abort on write" : "data abort on read";
    case 0x3c: return "breakpoint";
    default: return "exception";
    }
}

void trap_skip(struct trap *trap)
{
    switch (EC(trap->cause)) {
    case EC_SVC64: case EC_HVC64: return; /* ELR already is the next instruction */
    case EC_IABT_SAME_EL: case EC_PC_ALIGNMENT: trap->pc = trap->regs[LINK]; return;
    default: trap->pc += 4;
    }
}
