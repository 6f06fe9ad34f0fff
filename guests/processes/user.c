/* user.c: the start of a program, its system calls, and output by lines. */
#include "user.h"

#if defined(__aarch64__)
__asm__(".pushsection .text.start, \"ax\"\n.global _start\n_start:\n    bl begin\n.popsection\n");

u64 call(enum call number, u64 a, u64 b, u64 c)
{
    register u64 x8 __asm__("x8") = number;
    register u64 x0 __asm__("x0") = a;
    register u64 x1 __asm__("x1") = b;
    register u64 x2 __asm__("x2") = c;

    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x8) : "memory");
    return x0;
}
#else
__asm__(".pushsection .text.start, \"ax\"\n.global _start\n_start:\n    call begin\n.popsection\n");

u64 call(enum call number, u64 a, u64 b, u64 c)
{
    register u64 a7 __asm__("a7") = number;
    register u64 a0 __asm__("a0") = a;
    register u64 a1 __asm__("a1") = b;
    register u64 a2 __asm__("a2") = c;

    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
    return a0;
}
#endif

/* As in common/<isa>.c, whose devices a program does not have. */
#if defined(__aarch64__)
void sync_code(void *start, size_t size)
{
    u64 end = (u64)start + size;

    for (u64 at = (u64)start & -16ul; at < end; at += 16)
        __asm__ volatile("dc cvau, %0" : : "r"(at) : "memory");
    __asm__ volatile("dsb ish" : : : "memory");
    for (u64 at = (u64)start & -16ul; at < end; at += 16)
        __asm__ volatile("ic ivau, %0" : : "r"(at) : "memory");
    __asm__ volatile("dsb ish\n\tisb" : : : "memory");
}

void write_return(u32 code[2], u32 value)
{
    code[0] = 0x52800000u | value << 5; /* mov w0, #value */
    code[1] = 0xd65f03c0u;              /* ret */
}
#else
void sync_code(void *start, size_t size)
{
    (void)start;
    (void)size;
    __asm__ volatile("fence rw, rw\n\t.insn 0x0000100f" : : : "memory"); /* fence.i */
}

void write_return(u32 code[2], u32 value)
{
    code[0] = value << 20 | 0x00000513u; /* li a0, value */
    code[1] = 0x00008067u;               /* ret */
}
#endif

static char line[128];
static unsigned used;

void flush_output(void)
{
    call(CALL_WRITE, 1, (u64)line, used);
    used = 0;
}

void uart_putc(char c) /* for print() */
{
    line[used++] = c;
    if (c == '\n' || used == sizeof(line))
        flush_output();
}

_Noreturn void begin(u64 argument)
{
    u64 status = program(argument);

    if (used)
        flush_output();
    call(CALL_EXIT, status, 0, 0);
    for (;;)
        ;
}
