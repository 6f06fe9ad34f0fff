/* trap.c: where the vectors of either ISA arrive. */
#include "guest.h"

bool (*on_exception)(struct trap *trap);
void (*on_interrupt)(void);

const char *trap_name(enum trap_kind kind)
{
    static const char *const names[TRAP_KINDS] = {
        [TRAP_OTHER] = "exception",
        [TRAP_FETCH] = "fetch fault",
        [TRAP_READ] = "read fault",
        [TRAP_WRITE] = "write fault",
        [TRAP_MISALIGNED] = "misaligned access",
        [TRAP_UNDEFINED] = "undefined instruction",
        [TRAP_BREAKPOINT] = "breakpoint",
        [TRAP_CALL] = "system call",
    };

    return names[kind];
}

/* Called by the vectors in start-<isa>.S. */
void trap_entry(struct trap *trap, bool is_interrupt)
{
    if (is_interrupt && on_interrupt) {
        on_interrupt();
        return;
    }
    if (!is_interrupt && on_exception && on_exception(trap))
        return;

    on_exception = NULL; /* an exception on the way out ends here, too, and not in a handler that may loop */
    print("\nunhandled %s\n", is_interrupt ? "interrupt" : trap_name(trap_kind(trap)));
    trap_print(trap);
    guest_exit(1);
}

void trap_print(const struct trap *trap)
{
    print("  pc %016x  cause %x  address %x  status %x\n", trap->pc, trap->cause, trap->address, trap->status);
    for (u64 i = 0; i < 32; i++)
        print("%s%2u %016x%s", i % 4 == 0 ? "  r" : "r", i, trap->regs[i], i % 4 == 3 ? "\n" : "  ");
}
