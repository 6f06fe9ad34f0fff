/* hash.c: fills more memory than it is given at first, and forks a child that goes on with it. */
#include "user.h"

static u64 table[12 * PAGE_SIZE / 8];
static u64 seed = 0x9e3779b97f4a7c15ul;

static u64 fill(u64 value)
{
    for (u64 n = 0; n < ARRAY_SIZE(table); n++) {
        value = hash(value, n);
        table[value % ARRAY_SIZE(table)] += value;
    }
    return value;
}

u64 program(u64 argument)
{
    u64 value = fill(seed + argument);
    u64 pid = call(CALL_FORK, 0, 0, 0);

    value = fill(value + (pid == 0));
    for (u64 n = 0; n < ARRAY_SIZE(table); n++)
        value = hash(value, table[n]);
    if (pid)
        value ^= call(CALL_WAIT, pid, 0, 0);
    return value & 0x7f;
}
