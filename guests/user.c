/*
 * user: a program without privileges, and the kernel that runs it.
 *
 * main() drops to EL0 or U-mode, where user_program() makes system calls, tries what only the kernel may do, reads
 * from nowhere, and exits. The kernel answers the calls, steps over the rest, and checks that each exception came from
 * user mode and that the program's registers and stack were left alone.
 */
#include "guest.h"

enum { CALL_EXIT, CALL_DOUBLE };

/* Runs `entry` without privileges on its own stack, until an exception of its is answered with run_user_return. */
void run_user(void (*entry)(void), void *stack_top);
extern char run_user_return[];

#if defined(__aarch64__)

#define FROM_USER(trap) (((trap)->status & 0xf) == 0) /* SPSR_EL1.M: EL0t */
#define KERNEL_STATUS 0x3c5ul                         /* EL1h, everything masked */
#define CALL_NUMBER(trap) ((trap)->regs[8])
#define ARGUMENT 0
#define PRIVILEGED "msr vbar_el1, xzr"

static u64 system_call(u64 number, u64 argument)
{
    register u64 x8 __asm__("x8") = number;
    register u64 x0 __asm__("x0") = argument;

    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8) : "memory");
    return x0;
}

static void open_memory_to_users(void) {} /* with the MMU off it is */

__asm__(".pushsection .text.run_user, \"ax\"\n"
        "run_user:\n"
        "    stp     x29, x30, [sp, #-0x60]!\n"
        "    stp     x19, x20, [sp, #0x10]\n"
        "    stp     x21, x22, [sp, #0x20]\n"
        "    stp     x23, x24, [sp, #0x30]\n"
        "    stp     x25, x26, [sp, #0x40]\n"
        "    stp     x27, x28, [sp, #0x50]\n"
        "    msr     sp_el0, x1\n"
        "    msr     elr_el1, x0\n"
        "    mov     x2, #0x3c0\n" /* EL0t */
        "    msr     spsr_el1, x2\n"
        "    eret\n"
        "run_user_return:\n"
        "    ldp     x19, x20, [sp, #0x10]\n"
        "    ldp     x21, x22, [sp, #0x20]\n"
        "    ldp     x23, x24, [sp, #0x30]\n"
        "    ldp     x25, x26, [sp, #0x40]\n"
        "    ldp     x27, x28, [sp, #0x50]\n"
        "    ldp     x29, x30, [sp], #0x60\n"
        "    ret\n"
        ".popsection\n");

#else

#define FROM_USER(trap) (((trap)->status & 0x1800) == 0) /* mstatus.MPP: U */
#define KERNEL_STATUS 0x1800ul                           /* MPP: M */
#define CALL_NUMBER(trap) ((trap)->regs[17])             /* a7 */
#define ARGUMENT 10                                      /* a0 */
#define PRIVILEGED "csrw mtvec, zero"

static u64 system_call(u64 number, u64 argument)
{
    register u64 a7 __asm__("a7") = number;
    register u64 a0 __asm__("a0") = argument;

    __asm__ volatile("ecall" : "+r"(a0) : "r"(a7) : "memory");
    return a0;
}

static void open_memory_to_users(void)
{
    __asm__ volatile("csrw pmpaddr0, %0\n\tcsrw pmpcfg0, %1" : : "r"(~0ul), "r"(0x1ful)); /* NAPOT, RWX */
}

u64 kernel_stack; /* traps stay on the stack that they find; run_user_return goes back to this one */

__asm__(".pushsection .text.run_user, \"ax\"\n"
        "run_user:\n"
        "    addi    sp, sp, -0x70\n"
        "    sd      ra, 0x00(sp)\n"
        "    sd      s0, 0x08(sp)\n"
        "    sd      s1, 0x10(sp)\n"
        "    sd      s2, 0x18(sp)\n"
        "    sd      s3, 0x20(sp)\n"
        "    sd      s4, 0x28(sp)\n"
        "    sd      s5, 0x30(sp)\n"
        "    sd      s6, 0x38(sp)\n"
        "    sd      s7, 0x40(sp)\n"
        "    sd      s8, 0x48(sp)\n"
        "    sd      s9, 0x50(sp)\n"
        "    sd      s10, 0x58(sp)\n"
        "    sd      s11, 0x60(sp)\n"
        "    lla     t0, kernel_stack\n"
        "    sd      sp, 0(t0)\n"
        "    mv      sp, a1\n"
        "    csrw    mepc, a0\n"
        "    li      t0, 0x1800\n" /* MPP: U */
        "    csrc    mstatus, t0\n"
        "    mret\n"
        "run_user_return:\n"
        "    lla     t0, kernel_stack\n"
        "    ld      sp, 0(t0)\n"
        "    ld      ra, 0x00(sp)\n"
        "    ld      s0, 0x08(sp)\n"
        "    ld      s1, 0x10(sp)\n"
        "    ld      s2, 0x18(sp)\n"
        "    ld      s3, 0x20(sp)\n"
        "    ld      s4, 0x28(sp)\n"
        "    ld      s5, 0x30(sp)\n"
        "    ld      s6, 0x38(sp)\n"
        "    ld      s7, 0x40(sp)\n"
        "    ld      s8, 0x48(sp)\n"
        "    ld      s9, 0x50(sp)\n"
        "    ld      s10, 0x58(sp)\n"
        "    ld      s11, 0x60(sp)\n"
        "    addi    sp, sp, 0x70\n"
        "    ret\n"
        ".popsection\n");

#endif

/* --- The program ---------------------------------------------------------------------------------------------- */

#define ROUNDS 16

static u64 user_stack[512] __attribute__((aligned(16)));

static void user_program(void)
{
    volatile u64 sum = 0; /* on the user's stack */

    for (u64 i = 0; i < ROUNDS; i++)
        sum += system_call(CALL_DOUBLE, i);
    __asm__ volatile(PRIVILEGED);
    (void)read32(NOWHERE);
    system_call(CALL_EXIT, sum);
}

/* --- The kernel ----------------------------------------------------------------------------------------------- */

static volatile u64 seen[TRAP_KINDS], not_from_user, result;

static bool kernel(struct trap *trap)
{
    enum trap_kind kind = trap_kind(trap);

    seen[kind]++;
    not_from_user += !FROM_USER(trap);
    trap_skip(trap);
    if (kind != TRAP_CALL) {
        print("  %s at %08x\n", trap_name(kind), trap->pc);
    } else if (CALL_NUMBER(trap) == CALL_DOUBLE) {
        trap->regs[ARGUMENT] *= 2;
    } else {
        result = trap->regs[ARGUMENT];
        trap->pc = (u64)run_user_return;
        trap->status = KERNEL_STATUS;
    }
    return true;
}

int main(void)
{
    print("user (%s)\n", isa_name);
    on_exception = kernel;
    open_memory_to_users();
    run_user(user_program, user_stack + ARRAY_SIZE(user_stack));

    print("  %u calls, result %u, %u exceptions not from user mode\n", seen[TRAP_CALL], result, not_from_user);
    bool good = seen[TRAP_CALL] == ROUNDS + 1 && seen[TRAP_UNDEFINED] == 1 && seen[TRAP_READ] == 1 &&
                result == ROUNDS * (ROUNDS - 1) && not_from_user == 0;
    print("user: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
