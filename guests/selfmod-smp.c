/*
 * selfmod-smp: code in RAM that one CPU runs and another changes. Needs two CPUs.
 *
 * handed over  CPU 0 writes a function, tells CPU 1, and CPU 1 calls it: the ordinary way of every run-time linker
 * let out      CPU 0 goes round in a loop that has no way out, until CPU 1 overwrites its branch
 */
#include "guest.h"

#define ROUNDS 64

static u32 code[2] __attribute__((aligned(16)));
static volatile u32 written, called; /* the round that CPU 0 has written, and the one that CPU 1 has called */
static volatile u32 wrong;
static volatile bool looping;

/* Never returns by itself: its branch has to become a NOP. The barrier in it makes a CPU see that it has. */
void closed_loop(void);
extern u32 closed_loop_branch;

__asm__(".pushsection .data.closed_loop, \"aw\"\n"
        ".balign 16\n"
        "closed_loop:\n"
#if defined(__aarch64__)
        "1:  isb\n"
        "closed_loop_branch:\n"
        "    b       1b\n"
        "    ret\n"
#define NOP 0xd503201fu
#else
        ".option push\n"
        ".option norvc\n"
        "1:  fence.i\n"
        "closed_loop_branch:\n"
        "    j       1b\n"
        "    ret\n"
        ".option pop\n"
#define NOP 0x00000013u
#endif
        ".popsection\n");

static inline void barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static void other_cpu(unsigned cpu)
{
    (void)cpu;
    for (u32 round = 1; round <= ROUNDS; round++) {
        while (written != round)
            cpu_relax();
        barrier();
        sync_fetch();
        if (((u32 (*)(void))code)() != round)
            wrong++;
        barrier();
        called = round;
    }

    while (!looping)
        cpu_relax();
    for (int i = 0; i < 1000; i++) /* so that CPU 0 is well inside */
        cpu_relax();
    closed_loop_branch = NOP;
    sync_code(&closed_loop_branch, sizeof(closed_loop_branch));
}

int main(void)
{
    print("selfmod-smp (%s)\n", isa_name);
    if (!cpu_start(1, other_cpu)) {
        print("selfmod-smp: needs a second CPU, there is only one (--smp 2)\n");
        return 2;
    }

    for (u32 round = 1; round <= ROUNDS; round++) {
        write_return(code, round);
        sync_code(code, sizeof(code));
        barrier();
        written = round;
        while (called != round)
            cpu_relax();
        barrier();
    }
    print("  handed over: %u of %u calls ran old code\n", (u64)wrong, (u64)ROUNDS);

    looping = true;
    closed_loop();
    print("  let out\n");
    print("selfmod-smp: %s\n", wrong ? "FAILED" : "ok");
    return wrong ? 1 : 0;
}
