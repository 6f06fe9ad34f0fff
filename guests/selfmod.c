/*
 * selfmod: code in RAM that is changed and run again.
 *
 * rewritten  a function is written, called, overwritten and called again, many times
 * ahead      code that overwrites the instruction it will come to next
 * alias      as the first, but written through a second window onto RAM, which starts at ALIAS_BASE if that is defined
 */
#include "guest.h"

#define ROUNDS 64

static u32 code[2] __attribute__((aligned(16)));

static u32 call_code(void) { return ((u32 (*)(void))code)(); }

/* Writes `window`, which is `code` or another way to it, and calls `code`. */
static bool rewrite(u32 *window)
{
    for (u32 round = 0; round < ROUNDS; round++) {
        write_return(window, round);
        sync_code(window, sizeof(code));
        sync_code(code, sizeof(code));
        if (call_code() != round)
            return false;
    }
    return true;
}

/* Puts `instruction` in place of the one behind its own barrier, and returns what that one leaves in the result
 * register. It writes to itself, so it is data that happens to be executed. */
u32 patch_ahead(u32 instruction);

__asm__(".pushsection .data.patch_ahead, \"aw\"\n"
        ".balign 4\n"
        "patch_ahead:\n"
#if defined(__aarch64__)
        "    adr     x1, 1f\n"
        "    str     w0, [x1]\n"
        "    dc      cvau, x1\n"
        "    dsb     ish\n"
        "    ic      ivau, x1\n"
        "    dsb     ish\n"
        "    isb\n"
        "1:  mov     w0, #0x7ff\n"
        "    ret\n"
#else
        ".option push\n"
        ".option norvc\n"
        "    lla     t0, 1f\n"
        "    sw      a0, 0(t0)\n"
        "    fence.i\n"
        "1:  li      a0, 0x7ff\n"
        "    ret\n"
        ".option pop\n"
#endif
        ".popsection\n");

static bool patch_ahead_rounds(void)
{
    u32 instructions[2];

    for (u32 round = 0; round < ROUNDS; round++) {
        write_return(instructions, round);
        if (patch_ahead(instructions[0]) != round)
            return false;
    }
    return true;
}

static bool report(const char *what, bool good)
{
    print("  %s %s\n", what, good ? "ok" : "FAILED");
    return good;
}

int main(void)
{
    bool good = true;

    print("selfmod (%s)\n", isa_name);
    good &= report("rewritten", rewrite(code));
    good &= report("ahead    ", patch_ahead_rounds());
#ifdef ALIAS_BASE
    good &= report("alias    ", rewrite((u32 *)(ALIAS_BASE + ((u64)code - RAM_BASE))));
#else
    print("  alias     not in this build: RAM is mapped once\n");
#endif
    print("selfmod: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
