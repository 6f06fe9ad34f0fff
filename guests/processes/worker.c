/* worker.c: does one thing that it may not. */
#include "user.h"

static const u64 constant = 1;
static u32 code[2];

u64 program(u64 argument)
{
    switch (argument) {
    case 0:
        return read32(0);
    case 1: /* its own code */
        *(volatile u64 *)&constant = 2;
        return 0;
    case 2: /* its own data */
        write_return(code, 1);
        sync_code(code, sizeof(code));
        return ((u32(*)(void))code)();
    case 3: /* the kernel's */
        return read32(0xffffffc000000000ul + RAM_BASE + 0x200000);
    case 4:
#if defined(__aarch64__)
        __asm__ volatile("msr vbar_el1, xzr");
#else
        __asm__ volatile("csrw satp, zero");
#endif
        return 0;
    case 5: /* below its stack */
        write32(0x3ffffef000ul - 8, 1);
        return 0;
    default: /* what the program before it had mapped */
        return read32(0x100001000ul);
    }
}
