/*
 * faults: every access error that a guest can make, one after the other, each of which it survives.
 *
 * For each the handler prints the syndrome and steps over the culprit. The guest succeeds if every attempt raised one
 * exception, of the kind it should, with the address it should.
 */
#include "guest.h"

static void read_nowhere(void) { (void)read32(NOWHERE); }
static void write_nowhere(void) { write32(NOWHERE + 8, 1); }
static void fetch_nowhere(void) { ((void (*)(void))NOWHERE)(); }

/* Plain misaligned accesses are the machine's business: some trap, some do not. Atomic ones trap everywhere. */
static u64 aligned[2];

#if defined(__aarch64__)

static void misaligned(void)
{
    u64 value;
    __asm__ volatile("ldxr %0, [%1]" : "=r"(value) : "r"((u64)aligned + 1) : "memory");
}

static void undefined(void) { __asm__ volatile("udf #0"); }
static void breakpoint(void) { __asm__ volatile("brk #7"); }
static void call(void) { __asm__ volatile("svc #42"); }

#else

static void misaligned(void)
{
    u64 value;
    __asm__ volatile("amoadd.d %0, zero, (%1)" : "=r"(value) : "r"((u64)aligned + 1) : "memory");
}

static void undefined(void) { __asm__ volatile(".insn 0xc0001073"); } /* unimp: a write to the read-only `cycle` */
static void breakpoint(void) { __asm__ volatile("ebreak"); }
static void call(void) { __asm__ volatile("ecall"); }

#endif

static const struct attempt {
    const char *name;
    void (*run)(void);
    enum trap_kind kind;
    u64 address; /* that the syndrome must give; 0: it need not give one */
} attempts[] = {
    {"read from nowhere", read_nowhere, TRAP_READ, NOWHERE},
    {"write to nowhere", write_nowhere, TRAP_WRITE, NOWHERE + 8},
    {"fetch from nowhere", fetch_nowhere, TRAP_FETCH, NOWHERE},
    {"misaligned atomic", misaligned, TRAP_MISALIGNED, 0},
    {"undefined instruction", undefined, TRAP_UNDEFINED, 0},
    {"breakpoint", breakpoint, TRAP_BREAKPOINT, 0},
    {"system call", call, TRAP_CALL, 0},
};

/* Volatile: the handler reads and writes these, and the compiler does not see that it is called. */
static const struct attempt *volatile current;
static volatile u64 traps, right;

static bool step_over(struct trap *trap)
{
    enum trap_kind kind = trap_kind(trap);

    traps++;
    right += kind == current->kind && (current->address == 0 || trap->address == current->address);
    print("  %s: %s, cause %x, address %x, pc %x\n", current->name, trap_name(kind), trap->cause, trap->address,
          trap->pc);
    trap_skip(trap);
    return true;
}

int main(void)
{
    on_exception = step_over;
    print("faults (%s)\n", isa_name);
    for (u64 i = 0; i < ARRAY_SIZE(attempts); i++) {
        current = &attempts[i];
        current->run();
        if (traps != i + 1)
            print("  %s: %u traps instead of one\n", current->name, traps - i);
    }

    bool good = traps == ARRAY_SIZE(attempts) && right == traps;
    print("faults: %u of %u as expected\n", right, (u64)ARRAY_SIZE(attempts));
    return good ? 0 : 1;
}
