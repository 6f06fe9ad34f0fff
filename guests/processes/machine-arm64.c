/* machine-arm64.c: VMSAv8-64 with 4 KiB granules, EL0 and EL1, PL011, GICv2, the virtual timer, PSCI. */
#include "kernel.h"

const char isa_name[] = "arm64";

#define READ_REG(name) ({ u64 value_; __asm__ volatile("mrs %0, " name : "=r"(value_) : : "memory"); value_; })
#define WRITE_REG(name, value) __asm__ volatile("msr " name ", %0\n\tisb" : : "r"((u64)(value)) : "memory")

/* --- Devices --------------------------------------------------------------------------------------------------- */

#define REG(address) (*(volatile u32 *)virtual(address))
#define UART_DR REG(UART_BASE + 0x00)
#define UART_FR REG(UART_BASE + 0x18)
#define UART_LCRH REG(UART_BASE + 0x2c)
#define UART_CR REG(UART_BASE + 0x30)

void uart_putc(char c)
{
    while (UART_FR & (1u << 5))
        ;
    UART_DR = (u8)c;
}

/* As in common/arm64.c; that the argument is at a virtual address is the debugger's affair. */
_Noreturn void guest_exit(unsigned status)
{
    u64 block[2] = {0x20026, status};
    register u64 x0 __asm__("x0") = 0x18;
    register u64 x1 __asm__("x1") = (u64)block;

    if (status)
        __asm__ volatile("hlt #0xf000" : "+r"(x0) : "r"(x1) : "memory");
    x0 = 0x84000008;
    __asm__ volatile("hvc #0" : "+r"(x0) : : "memory", "x2", "x3");
    for (;;)
        __asm__ volatile("wfi");
}

#define GICD_CTLR REG(GICD_BASE + 0x000)
#define GICD_ISENABLER0 REG(GICD_BASE + 0x100)
#define GICC_CTLR REG(GICC_BASE + 0x000)
#define GICC_PMR REG(GICC_BASE + 0x004)
#define GICC_IAR REG(GICC_BASE + 0x00c)
#define GICC_EOIR REG(GICC_BASE + 0x010)
#define VIRTUAL_TIMER 27
#define TICK 12500ul /* 0.2 ms */

static void arm_timer(void)
{
    WRITE_REG("cntv_tval_el0", TICK);
    WRITE_REG("cntv_ctl_el0", 1);
}

void timer_start(void)
{
    UART_LCRH = 0x70;
    UART_CR = 0x301;
    GICD_CTLR = 1;
    GICD_ISENABLER0 = 1u << VIRTUAL_TIMER;
    GICC_PMR = 0xff;
    GICC_CTLR = 1;
    arm_timer();
}

void timer_acknowledge(void)
{
    u32 number = GICC_IAR;

    arm_timer();
    GICC_EOIR = number;
}

void wait_for_timer(void) { __asm__ volatile("dsb sy\n\twfi" : : : "memory"); }

/* --- Tables ---------------------------------------------------------------------------------------------------- */

#define VALID 1ul
#define TABLE 2ul /* at the last level: a page */
#define NORMAL (0ul << 2)
#define UNCACHED (1ul << 2)
#define DEVICE (2ul << 2)
#define USER (1ul << 6)
#define READ_ONLY (1ul << 7)
#define SHAREABLE (3ul << 8)
#define ACCESSED (1ul << 10)
#define NOT_GLOBAL (1ul << 11)
#define KERNEL_NEVER (1ul << 53)
#define USER_NEVER (1ul << 54)
#define WRITABLE (1ul << 55) /* for software, as the next two: clean pages are read-only */
#define DIRTY (1ul << 56)
#define SHARED (1ul << 57)
#define ADDRESS 0x0000fffffffff000ul

#define GIB 0x40000000ul

u64 kernel_root[512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));

u64 leaf_entry(u64 address, unsigned flags, int level)
{
    bool user = flags & P_USER, executable = flags & P_EXECUTE;

    return address | VALID | (level == 0 ? TABLE : 0) | SHAREABLE | (flags & P_DEVICE ? DEVICE : NORMAL) |
           (user ? USER | NOT_GLOBAL : 0) | ((flags & (P_WRITE | P_DIRTY)) == (P_WRITE | P_DIRTY) ? 0 : READ_ONLY) |
           (flags & P_ACCESSED ? ACCESSED : 0) | (user || !executable ? KERNEL_NEVER : 0) |
           (!user || !executable ? USER_NEVER : 0) | (flags & P_WRITE ? WRITABLE : 0) |
           (flags & P_DIRTY ? DIRTY : 0) | (flags & P_SHARED ? SHARED : 0);
}

u64 table_entry(u64 address) { return address | VALID | TABLE; }
bool entry_valid(u64 entry) { return entry & VALID; }
bool entry_is_table(u64 entry, int level) { return level > 0 && entry & TABLE; }
u64 entry_address(u64 entry) { return entry & ADDRESS; }

unsigned entry_flags(u64 entry)
{
    return (entry & WRITABLE ? P_WRITE : 0) | (entry & USER_NEVER ? 0 : P_EXECUTE) | (entry & USER ? P_USER : 0) |
           (entry & ACCESSED ? P_ACCESSED : 0) | (entry & DIRTY ? P_DIRTY : 0) | (entry & SHARED ? P_SHARED : 0);
}

/* Runs untranslated. Until leave_boot_tables() the lower half is the same, so that the code that turns translation on
 * goes on. Returns the table. */
u64 boot_tables(void)
{
    for (u64 n = 0; n < 512; n++) {
        u64 address = n * BLOCK_SIZE;
        bool is_flash = address < 2 * FLASH_BANK1;
        low[n] = leaf_entry(address, P_ACCESSED | P_DIRTY | (is_flash ? P_EXECUTE : P_WRITE | P_DEVICE), 1);
    }
    kernel_root[0] = kernel_root[256] = table_entry((u64)low);
    kernel_root[256 + RAM_BASE / GIB] = leaf_entry(RAM_BASE, P_ACCESSED | P_DIRTY | P_WRITE, 2);
    return (u64)kernel_root;
}

void leave_boot_tables(void)
{
    kernel_root[0] = 0;
    __asm__ volatile("dsb ish\n\ttlbi vmalle1is\n\tdsb ish\n\tisb" : : : "memory");
}

void flush_page(u64 address, unsigned asid)
{
    __asm__ volatile("dsb ishst\n\ttlbi vae1is, %0\n\tdsb ish\n\tisb" : : "r"((u64)asid << 48 | address >> 12) : "memory");
}

void flush_asid(unsigned asid)
{
    __asm__ volatile("dsb ishst\n\ttlbi aside1is, %0\n\tdsb ish\n\tisb" : : "r"((u64)asid << 48) : "memory");
}

void use_tables(u64 root, unsigned asid) { WRITE_REG("ttbr0_el1", (u64)asid << 48 | root); }

/* --- Traps ----------------------------------------------------------------------------------------------------- */

#define EC_UNKNOWN 0x00
#define EC_SYSTEM 0x18
#define EC_SVC 0x15
#define EC_FETCH_USER 0x20
#define EC_DATA_USER 0x24
#define EC_DATA_KERNEL 0x25

enum event event_of(const struct trap *trap, bool is_interrupt)
{
    unsigned status = trap->cause & 0x3f;
    bool table = (status >> 2 >= 1 && status >> 2 <= 3); /* translation, access flag, permission */

    if (is_interrupt)
        return EVENT_TIMER;
    switch (trap->cause >> 26) {
    case EC_SVC:
        return EVENT_CALL;
    case EC_UNKNOWN:
    case EC_SYSTEM:
        return EVENT_UNDEFINED;
    case EC_FETCH_USER:
        return table ? EVENT_FETCH : EVENT_OTHER;
    case EC_DATA_USER:
    case EC_DATA_KERNEL:
        return !table ? EVENT_OTHER : trap->cause & 1 << 6 ? EVENT_WRITE : EVENT_READ;
    default:
        return EVENT_OTHER;
    }
}

u64 call_number(const struct trap *trap) { return trap->regs[8]; }
u64 *call_argument(struct trap *trap, unsigned number) { return &trap->regs[number]; }
void call_again(struct trap *trap) { trap->pc -= 4; }
void call_done(struct trap *trap) { (void)trap; }

void user_registers(struct trap *trap, u64 entry, u64 stack, u64 argument)
{
    for (unsigned n = 0; n < 32; n++)
        trap->regs[n] = 0;
    trap->regs[31] = stack;
    trap->regs[0] = argument;
    trap->pc = entry;
    trap->status = 0; /* EL0, interrupts on */
}

/* --- Copies ---------------------------------------------------------------------------------------------------- */

u64 copy_in(void *to, const void *from, size_t size);
u64 copy_out(void *to, const void *from, size_t size);

bool copy_from_user(void *to, u64 from, size_t size) { return copy_in(to, (const void *)from, size); }
bool copy_to_user(u64 to, const void *from, size_t size) { return copy_out((void *)to, from, size); }

/* An unprivileged load of the kernel's own data. */
bool kernel_is_kept_out(u64 address)
{
    u8 byte;

    (void)address;
    return !copy_in(&byte, kernel_root, 1);
}
