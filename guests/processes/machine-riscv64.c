/* machine-riscv64.c: Sv39, the traps of S-mode, NS16550A, the test finisher. */
#include "kernel.h"

const char isa_name[] = "riscv64";

/* --- Devices --------------------------------------------------------------------------------------------------- */

#define UART ((volatile u8 *)virtual(UART_BASE))
#define LSR_THRE 0x20

void uart_putc(char c)
{
    while (!(UART[5] & LSR_THRE))
        ;
    UART[0] = (u8)c;
}

_Noreturn void guest_exit(unsigned status)
{
    *(volatile u32 *)virtual(FINISHER_BASE) = status == 0 ? 0x5555 : status << 16 | 0x3333;
    for (;;)
        __asm__ volatile("wfi");
}

#define TICK 2000ul /* 0.2 ms */

void timer_acknowledge(void)
{
    register u64 a0 __asm__("a0") = TICK;

    __asm__ volatile("ecall" : "+r"(a0) : : "memory");
}

void timer_start(void)
{
    __asm__ volatile("csrw sie, %0" : : "r"(0x20ul));
    timer_acknowledge();
}

void wait_for_timer(void)
{
    u64 pending;

    do {
        __asm__ volatile("wfi\n\tcsrr %0, sip" : "=r"(pending) : : "memory");
    } while (!(pending & 0x20));
}

/* --- Tables ---------------------------------------------------------------------------------------------------- */

#define VALID 0x01ul
#define READ 0x02ul
#define WRITE 0x04ul
#define EXECUTE 0x08ul
#define USER 0x10ul
#define GLOBAL 0x20ul
#define ACCESSED 0x40ul
#define DIRTY 0x80ul
#define SHARED 0x100ul /* for software */

#define GIB 0x40000000ul

u64 kernel_root[512] __attribute__((aligned(PAGE_SIZE)));
static u64 low[512] __attribute__((aligned(PAGE_SIZE)));

u64 leaf_entry(u64 address, unsigned flags, int level)
{
    (void)level;
    return address >> 2 | VALID | READ | (flags & P_WRITE ? WRITE : 0) | (flags & P_EXECUTE ? EXECUTE : 0) |
           (flags & P_USER ? USER : GLOBAL) | (flags & P_ACCESSED ? ACCESSED : 0) | (flags & P_DIRTY ? DIRTY : 0) |
           (flags & P_SHARED ? SHARED : 0);
}

u64 table_entry(u64 address) { return address >> 2 | VALID; }
bool entry_valid(u64 entry) { return entry & VALID; }
bool entry_is_table(u64 entry, int level) { return level > 0 && !(entry & (READ | WRITE | EXECUTE)); }
u64 entry_address(u64 entry) { return entry >> 10 << 12; }

unsigned entry_flags(u64 entry)
{
    return (entry & WRITE ? P_WRITE : 0) | (entry & EXECUTE ? P_EXECUTE : 0) | (entry & USER ? P_USER : 0) |
           (entry & ACCESSED ? P_ACCESSED : 0) | (entry & DIRTY ? P_DIRTY : 0) | (entry & SHARED ? P_SHARED : 0);
}

/* Runs untranslated. Returns satp. */
u64 boot_tables(void)
{
    for (u64 n = 0; n < 512; n++) {
        u64 address = n * BLOCK_SIZE;
        bool is_flash = address >= FLASH_BANK0 && address < 2 * FLASH_BANK1 - FLASH_BANK0;
        low[n] = leaf_entry(address, P_ACCESSED | P_DIRTY | (is_flash ? P_EXECUTE : P_WRITE), 1);
    }
    kernel_root[256] = table_entry((u64)low);
    kernel_root[256 + RAM_BASE / GIB] = leaf_entry(RAM_BASE, P_ACCESSED | P_DIRTY | P_WRITE, 2);
    return 8ul << 60 | (u64)kernel_root >> 12;
}

void leave_boot_tables(void) {}

void flush_page(u64 address, unsigned asid) { __asm__ volatile("sfence.vma %0, %1" : : "r"(address), "r"((u64)asid) : "memory"); }
void flush_asid(unsigned asid) { __asm__ volatile("sfence.vma zero, %0" : : "r"((u64)asid) : "memory"); }

void use_tables(u64 root, unsigned asid)
{
    __asm__ volatile("csrw satp, %0" : : "r"(8ul << 60 | (u64)asid << 44 | root >> 12) : "memory");
}

/* --- Traps ----------------------------------------------------------------------------------------------------- */

enum event event_of(const struct trap *trap, bool is_interrupt)
{
    if (is_interrupt)
        return (trap->cause & 0xff) == 5 ? EVENT_TIMER : EVENT_OTHER;
    switch (trap->cause) {
    case 8:
        return EVENT_CALL;
    case 2:
        return EVENT_UNDEFINED;
    case 12:
        return EVENT_FETCH;
    case 13:
        return EVENT_READ;
    case 15:
        return EVENT_WRITE;
    default:
        return EVENT_OTHER;
    }
}

u64 call_number(const struct trap *trap) { return trap->regs[17]; }
u64 *call_argument(struct trap *trap, unsigned number) { return &trap->regs[10 + number]; }
void call_again(struct trap *trap) { (void)trap; }
void call_done(struct trap *trap) { trap->pc += 4; }

void user_registers(struct trap *trap, u64 entry, u64 stack, u64 argument)
{
    for (unsigned n = 0; n < 32; n++)
        trap->regs[n] = 0;
    trap->regs[2] = stack;
    trap->regs[10] = argument;
    trap->pc = entry;
    trap->status = 0x20; /* SPP: U, SPIE */
}

/* --- Copies ---------------------------------------------------------------------------------------------------- */

u64 copy_bytes(void *to, const void *from, size_t size);
u64 read_byte(const void *from);

bool copy_from_user(void *to, u64 from, size_t size)
{
    return from < USER_END && size <= USER_END - from && copy_bytes(to, (const void *)from, size);
}

bool copy_to_user(u64 to, const void *from, size_t size)
{
    return to < USER_END && size <= USER_END - to && copy_bytes((void *)to, from, size);
}

bool kernel_is_kept_out(u64 address) { return !read_byte((const void *)address); }
