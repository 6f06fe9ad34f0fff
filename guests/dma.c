/*
 * dma: has the DMA engine copy, fill and add in memory that the host moves about meanwhile, and checks every byte.
 *
 * Needs a machine with the engine: xipvm run --device odp. Without one it ends with status 2.
 */
#include "guest.h"

#define DMA_BASE 0x0b100000ul
#define DMA_ID 0x4d444150u

enum {
    ID = 0x00,
    STATUS = 0x04,
    ERROR = 0x08,
    ADDRESS = 0x10,
    LENGTH = 0x18,
    ACCESS = 0x20,
    COMMAND = 0x24,
    KEY = 0x28,
    SOURCE = 0x30,
    SOURCE_KEY = 0x38,
    TARGET = 0x40,
    TARGET_KEY = 0x48,
    SIZE = 0x4c,
    VALUE = 0x50,
    DOORBELL = 0x54,
    RESULT = 0x58,
    BYTES = 0x60,
};

enum { BUSY = 1, DONE = 2, FAILED = 4 };
enum { REGISTER = 1, FORGET = 2 };
enum { COPY = 1, FILL = 2, ADD = 3 };
enum { EPERM = 1, EFAULT = 14, EINVAL = 22 };

#define PAGES 24u
#define BYTES_OF_ALL (PAGES * PAGE_SIZE)
#define ROUNDS 12u

static u8 *source, *target;
static unsigned wrong;
static bool missing; /* see absent() */

static u32 reg(u32 offset) { return read32(DMA_BASE + offset); }
static void set(u32 offset, u32 value) { write32(DMA_BASE + offset, value); }

static void set_address(u32 offset, const void *address)
{
    set(offset, (u32)(uintptr_t)address);
    set(offset + 4, (u32)((u64)(uintptr_t)address >> 32));
}

static u32 register_region(const void *start, u64 length, bool write)
{
    set_address(ADDRESS, start);
    set(LENGTH, (u32)length);
    set(LENGTH + 4, (u32)(length >> 32));
    set(ACCESS, write);
    set(COMMAND, REGISTER);
    return reg(ERROR) ? 0 : reg(KEY);
}

/* Starts a transfer. */
static void begin(u32 operation, const void *from, u32 from_key, void *to, u32 to_key, u32 size)
{
    set_address(SOURCE, from);
    set(SOURCE_KEY, from_key);
    set_address(TARGET, to);
    set(TARGET_KEY, to_key);
    set(SIZE, size);
    set(DOORBELL, operation);
}

/* Waits for the end of the transfer; its error. */
static u32 finish(void)
{
    u32 status;

    do
        status = reg(STATUS);
    while (status & BUSY);
    set(STATUS, status);
    return status & FAILED ? reg(ERROR) : 0;
}

static void expect(bool right, const char *what, u64 where)
{
    if (right)
        return;
    if (wrong++ < 8)
        print("dma: WRONG: %s, at %x\n", what, where);
}

static u64 random_state = 0x9e3779b97f4a7c15;

static u32 random(u32 below)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((random_state >> 33) % below);
}

static u8 pattern(u32 round, u32 at) { return (u8)(at * 7 + (at >> 8) * 13 + round * 31 + 1); }

/* The CPU writes, the engine copies, the CPU checks; while the engine is at it the CPU writes elsewhere. */
static void copies(u32 source_key, u32 target_key)
{
    static u64 busy[PAGES];

    for (u32 round = 0; round < ROUNDS; round++) {
        u32 from = random(PAGE_SIZE), to = random(PAGE_SIZE);
        u32 size = BYTES_OF_ALL - PAGE_SIZE - random(PAGE_SIZE);

        for (u32 at = 0; at < size; at++)
            source[from + at] = pattern(round, at);
        for (u32 at = 0; at < BYTES_OF_ALL; at += 512)
            target[at] = 0xee;
        begin(COPY, source + from, source_key, target + to, target_key, size);
        for (u32 step = 0; step < 4 * PAGES; step++)
            busy[step % PAGES] += step + round;
        expect(finish() == 0, "a copy failed", round);
        expect(reg(BYTES) == size, "a copy has another length", round);
        for (u32 at = 0; at < size; at++)
            expect(target[to + at] == pattern(round, at), "a copied byte", (u64)(uintptr_t)(target + to + at));
    }
    u64 sum = 0;
    for (u32 page = 0; page < PAGES; page++)
        sum += busy[page];
    expect(sum == 4 * PAGES * (4 * PAGES - 1) / 2 * ROUNDS + 4 * PAGES * (ROUNDS * (ROUNDS - 1) / 2), "a sum", sum);
}

static void fills_and_adds(u32 target_key)
{
    u64 *number = (u64 *)(target + 3 * PAGE_SIZE);

    for (u32 round = 0; round < ROUNDS; round++) {
        set(VALUE, 0x01010101u * (round + 1));
        begin(FILL, 0, 0, target, target_key, BYTES_OF_ALL);
        expect(finish() == 0, "a fill failed", round);
        for (u32 at = 0; at < BYTES_OF_ALL; at += 61)
            expect(target[at] == (u8)(round + 1), "a filled byte", (u64)(uintptr_t)(target + at));
        *number = 1000;
        for (u32 step = 0; step < 8; step++) {
            set(VALUE, 5);
            begin(ADD, 0, 0, number, target_key, 8);
            expect(finish() == 0, "an addition failed", round);
            expect(reg(RESULT) == 1000 + 12 * step, "what an addition returns", step);
            *(volatile u64 *)number += 7;
        }
        expect(*(volatile u64 *)number == 1000 + 8 * 12, "a sum of both", *number);
    }
}

/* Code that the engine writes is what is executed from then on. */
static void code(u32 source_key, u32 target_key)
{
    u32 *made = (u32 *)source, *called = (u32 *)target;

    for (u32 round = 0; round < ROUNDS; round++) {
        write_return(made, 100 + round);
        begin(COPY, made, source_key, called, target_key, 8);
        expect(finish() == 0, "a copy of code failed", round);
        sync_code(called, 8);
        expect(((u64(*)(void))(uintptr_t)called)() == 100 + round, "code is not what was written", round);
    }
}

static void errors(u32 source_key, u32 target_key)
{
    begin(COPY, target, target_key, source, source_key, 64);
    expect(finish() == EPERM, "a write to what is only read", 0);
    begin(COPY, source, source_key, target, target_key + 99, 64);
    expect(finish() == EINVAL, "an unknown key", 0);
    begin(COPY, source, source_key, target + BYTES_OF_ALL - 32, target_key, 64);
    expect(finish() == EFAULT && reg(BYTES) == 32, "a copy beyond the region", reg(BYTES));
    begin(99, source, source_key, target, target_key, 64);
    expect(finish() == EINVAL, "an unknown operation", 0);
    expect(register_region((void *)UART_BASE, PAGE_SIZE, true) == 0 && reg(ERROR) == EFAULT, "a region of devices", 0);
    set(KEY, source_key);
    set(COMMAND, FORGET);
    expect(reg(ERROR) == 0, "a region is not forgotten", 0);
    begin(COPY, source, source_key, target, target_key, 64);
    expect(finish() == EINVAL, "a key that is forgotten", 0);
}

/* The access to the engine's registers failed. */
static bool absent(struct trap *trap)
{
    missing = true;
    trap_skip(trap);
    return true;
}

int main(void)
{
    on_exception = absent;
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that the next read may call it */
    u32 id = reg(ID);
    __asm__ volatile("" ::: "memory");
    on_exception = 0;
    if (missing || id != DMA_ID) {
        print("dma: no engine: run it with --device odp\n");
        return 2;
    }
    source = (u8 *)__ram_free;
    target = source + BYTES_OF_ALL + PAGE_SIZE;
    u32 source_key = register_region(source, BYTES_OF_ALL, false);
    u32 target_key = register_region(target, BYTES_OF_ALL, true);
    expect(source_key && target_key && source_key != target_key, "the keys", source_key);
    copies(source_key, target_key);
    fills_and_adds(target_key);
    code(source_key, target_key);
    errors(source_key, target_key);
    print("dma: %u wrong, %s\n", (u64)wrong, wrong ? "FAILED" : "ok");
    return wrong ? 1 : 0;
}
