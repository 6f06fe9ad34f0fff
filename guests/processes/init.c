/* init.c: the first process. Forks what there is to be seen, and adds it up. */
#include "user.h"

#define SHARED_AT 0x100000000ul
#define ALIAS_AT 0x110000000ul
#define CODE_AT 0x111000000ul
#define BLOCK_AT 0x140000000ul
#define SPARSE_AT 0x200000000ul
#define SPARSE_STEP 0x8001000ul /* another table every time */
#define SPARSE_PAGES 24
#define ROUNDS 24

static u64 sum = HASH_BEGIN;
static bool good = true;
static u64 written[3 * PAGE_SIZE / 8] = {1, 2, 3};

static void report(const char *what, u64 value, bool right)
{
    sum = hash(sum, value);
    good &= right;
    print("  %s: %x %s\n", what, value, right ? "ok" : "FAILED");
}

static u64 run(const char *name, u64 argument)
{
    u64 pid = call(CALL_FORK, 0, 0, 0);

    if (pid == 0) {
        call(CALL_EXEC, (u64)name, argument, 0);
        call(CALL_EXIT, 99, 0, 0);
    }
    return pid;
}

static u64 wait(u64 pid) { return call(CALL_WAIT, pid, 0, 0); }

/* Parent and child write the same pages; each sees its own. */
static void copy_on_write(void)
{
    u64 seen = HASH_BEGIN;

    for (u64 n = 0; n < ARRAY_SIZE(written); n++)
        written[n] = n;
    u64 pid = call(CALL_FORK, 0, 0, 0);
    for (u64 n = 0; n < ARRAY_SIZE(written); n += 3)
        written[n] += pid ? 1000 : 2000;
    for (u64 n = 0; n < ARRAY_SIZE(written); n++)
        seen = hash(seen, written[n]);
    if (pid == 0)
        call(CALL_EXIT, seen & 0x7f, 0, 0);
    u64 status = wait(pid);
    report("copy on write", (seen & 0xffff) << 8 | status, status < 0x80 && written[3] == 1003 && written[4] == 4);
}

/* Processes that do what they may not. */
static void killed(void)
{
    static const u8 expected[] = {KILLED_READ, KILLED_WRITE, KILLED_FETCH, KILLED_READ, KILLED_UNDEFINED, KILLED_WRITE};
    u64 all = 0;
    bool right = true;

    for (u64 n = 0; n < ARRAY_SIZE(expected); n++) {
        u64 pid = run("worker", n);
        u64 status = wait(pid);
        right &= status == expected[n];
        all = all << 8 | status;
    }
    report("killed", all, right);
}

/* A line of processes: this one writes, two change what passes through, the last adds it up. */
static void pipes(void)
{
    u32 first[2], second[2];
    u8 bytes[100];

    call(CALL_PIPE, (u64)first, 0, 0);
    call(CALL_PIPE, (u64)second, 0, 0);
    u64 upper = run("upper", first[0] | (u64)second[1] << 8 | (u64)first[1] << 16 | (u64)second[0] << 24);
    u64 writer = call(CALL_FORK, 0, 0, 0);
    if (writer == 0) {
        call(CALL_CLOSE, first[0], 0, 0);
        call(CALL_CLOSE, second[0], 0, 0);
        call(CALL_CLOSE, second[1], 0, 0);
        for (u64 n = 0; n < 60; n++) {
            for (u64 at = 0; at < sizeof(bytes); at++)
                bytes[at] = (u8)('a' + (n * 7 + at) % 26);
            for (u64 at = 0; at < sizeof(bytes);)
                at += call(CALL_WRITE, first[1], (u64)&bytes[at], sizeof(bytes) - at);
        }
        call(CALL_EXIT, 0, 0, 0);
    }
    call(CALL_CLOSE, first[0], 0, 0);
    call(CALL_CLOSE, first[1], 0, 0);
    call(CALL_CLOSE, second[1], 0, 0);
    u64 total = 0, seen = HASH_BEGIN, got;
    while ((got = call(CALL_READ, second[0], (u64)bytes, sizeof(bytes))) != 0 && got != FAILED) {
        for (u64 n = 0; n < got; n++)
            seen = hash(seen, bytes[n]);
        total += got;
    }
    call(CALL_CLOSE, second[0], 0, 0);
    u64 statuses = wait(upper) + wait(writer);
    report("pipes", (seen & 0xffffffff) << 16 | total, total == 6000 && statuses == 0);
}

static void demand_paging(void)
{
    u64 before = call(CALL_FRAMES, 0, 0, 0), seen = 0;

    for (u64 n = 0; n < SPARSE_PAGES; n++) {
        u64 at = SPARSE_AT + n * SPARSE_STEP;
        if (n % 8 == 0)
            call(CALL_MAP, at & -(u64)PAGE_SIZE, 8 * SPARSE_STEP, MAP_ZERO);
        seen += *(volatile u64 *)at;
        *(volatile u64 *)(at + 8) = n;
    }
    for (u64 n = 0; n < SPARSE_PAGES; n++)
        seen += *(volatile u64 *)(SPARSE_AT + n * SPARSE_STEP + 8);
    u64 used = before - call(CALL_FRAMES, 0, 0, 0);
    report("demand paging", used << 16 | seen, seen == SPARSE_PAGES * (SPARSE_PAGES - 1) / 2 && used >= 2 * SPARSE_PAGES);
}

static void accessed_and_dirty(void)
{
    volatile u64 *page = (volatile u64 *)(SPARSE_AT + PAGE_SIZE);
    u64 at = (u64)page, seen = call(CALL_ENTRY, at, 0, 0);

    (void)*page;
    seen = seen << 8 | (call(CALL_ENTRY, at, 0, 0) & 0xff);
    *page = 1;
    seen = seen << 8 | (call(CALL_ENTRY, at, 0, 0) & 0xff);
    call(CALL_AGE, at, 0, 0);
    seen = seen << 8 | (call(CALL_ENTRY, at, 0, 0) & 0xff);
    (void)*page;
    seen = seen << 8 | (call(CALL_ENTRY, at, 0, 0) & 0xff);
    *page = 2;
    seen = seen << 8 | (call(CALL_ENTRY, at, 0, 0) & 0xff);
    report("accessed and dirty", seen, seen == 0x0919010919);
}

/* One frame at three addresses: written at one, read at the next, executed at the third. */
static void aliases(void)
{
    u32 *code = (u32 *)SHARED_AT;
    volatile u32 *other = (volatile u32 *)ALIAS_AT;
    u64 wrong = 0;

    call(CALL_MAP, SHARED_AT, 2 * PAGE_SIZE, MAP_SHARED);
    wrong += call(CALL_ALIAS, ALIAS_AT, SHARED_AT, 0);
    wrong += call(CALL_ALIAS, CODE_AT, SHARED_AT, 1);
    for (u32 round = 0; round < ROUNDS; round++) {
        write_return(code, round);
        sync_code(code, 8);
        sync_code((void *)CODE_AT, 8);
        wrong += ((u32(*)(void))CODE_AT)() != round;
        wrong += other[0] != code[0];
        other[64] = round;
        wrong += ((volatile u32 *)code)[64] != round;
    }
    report("aliases", wrong, wrong == 0);
}

/* Two processes on one CPU that never give way, each waiting for the other's progress. */
static void preemption(void)
{
    volatile u64 *counters = (volatile u64 *)(SHARED_AT + PAGE_SIZE);
    u64 pids[2];

    counters[0] = counters[1] = 0;
    for (u64 n = 0; n < 2; n++)
        pids[n] = run("worker", 0x100 | n);
    u64 statuses = wait(pids[0]) << 8;
    statuses |= wait(pids[1]);
    report("a program that was replaced has no shared memory", statuses, statuses == (KILLED_READ << 8 | KILLED_READ));
    for (u64 n = 0; n < 2; n++) {
        pids[n] = call(CALL_FORK, 0, 0, 0);
        if (pids[n] == 0) {
            while (counters[n] < 300000 || counters[!n] < 300000)
                counters[n]++;
            call(CALL_EXIT, call(CALL_PREEMPTED, 0, 0, 0) != 0, 0, 0);
        }
    }
    statuses = wait(pids[0]) << 8;
    statuses |= wait(pids[1]);
    report("preemption", statuses, statuses == 0x101 && counters[0] >= 300000);
}

static void blocks(void)
{
    volatile u64 *at = (volatile u64 *)BLOCK_AT;
    u64 wrong = call(CALL_MAP, BLOCK_AT, 0x200000, MAP_BLOCK), entry;

    for (u64 n = 0; n < 512; n += 3)
        at[n * 512 + n] = n;
    for (u64 n = 0; n < 512; n += 3)
        wrong += at[n * 512 + n] != n;
    entry = call(CALL_ENTRY, BLOCK_AT + 0x123456, 0, 0);
    report("block", entry, wrong == 0 && entry & SEEN_BLOCK && entry & SEEN_DIRTY);
    u64 pid = call(CALL_FORK, 0, 0, 0);
    if (pid == 0)
        call(CALL_EXIT, at[0] & 0x7f, 0, 0);
    report("its owner's alone", wait(pid), true);
}

static void bad_pointers(void)
{
    u64 failed = 0;
    u32 *files = (u32 *)0x5000;

    failed += call(CALL_WRITE, 1, 0x5000, 4) == FAILED;
    failed += call(CALL_WRITE, 1, ~0xffful, 4) == FAILED;
    failed += call(CALL_PIPE, (u64)files, 0, 0) == FAILED;
    failed += call(CALL_PIPE, (u64)wait, 0, 0) == FAILED; /* code cannot be written */
    failed += call(CALL_EXEC, (u64) "nothing", 0, 0) == FAILED;
    failed += call(CALL_KEPT_OUT, (u64)&failed, 0, 0);
    report("bad pointers", failed, failed == 6);
}

u64 program(u64 argument)
{
    u64 frames = call(CALL_FRAMES, 0, 0, 0), statuses = 0;

    (void)argument;
    for (u64 n = 0; n < 3; n++) {
        u64 pids[3];
        for (u64 child = 0; child < 3; child++)
            pids[child] = run("hash", n * 3 + child);
        for (u64 child = 0; child < 3; child++)
            statuses = statuses << 7 | wait(pids[child]);
    }
    report("programs", statuses, true);
    report("frames that came back", 0, frames - call(CALL_FRAMES, 0, 0, 0) < 8);
    copy_on_write();
    killed();
    pipes();
    demand_paging();
    accessed_and_dirty();
    aliases();
    preemption();
    blocks();
    bad_pointers();
    call(CALL_SLEEP, 3, 0, 0);
    print("processes: %08x %s\n", sum & 0xffffffff, good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
