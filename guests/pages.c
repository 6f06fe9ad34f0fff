/*
 * pages: touches many pages of RAM in three orders and remembers what each must hold.
 *
 * sequential  every page is written for the first time, one after the other
 * strided     every page is read and changed, in steps of 17 pages
 * random      pages are read and changed in pseudo-random order, four times as many as there are
 */
#include "guest.h"

#ifndef PAGES
#define PAGES 4096
#endif
#define STRIDE 17 /* must have no factor in common with PAGES */

static u64 expected[PAGES];

/* A word of the page, at a different place in each. */
static volatile u64 *word(u64 page)
{
    return (volatile u64 *)(__ram_free + page * PAGE_SIZE + page % (PAGE_SIZE / sizeof(u64)) * sizeof(u64));
}

static void touch(u64 page, u64 step)
{
    *word(page) = *word(page) * 31 + step;
    expected[page] = expected[page] * 31 + step;
}

static u64 checksum(void)
{
    u64 sum = 0;

    for (u64 page = 0; page < PAGES; page++)
        sum = sum * 31 + *word(page);
    return sum;
}

int main(void)
{
    u64 wrong = 0;
    u32 random = 1;

    print("pages: %u pages from %08x\n", (u64)PAGES, (u64)__ram_free);
    for (u64 page = 0; page < PAGES; page++) {
        *word(page) = page;
        expected[page] = page;
    }
    print("  sequential %016x\n", checksum());

    for (u64 step = 0; step < PAGES; step++)
        touch(step * STRIDE % PAGES, step);
    print("  strided    %016x\n", checksum());

    for (u64 step = 0; step < 4 * PAGES; step++) {
        random = random * 1664525u + 1013904223u;
        touch((random >> 8) % PAGES, step);
    }
    print("  random     %016x\n", checksum());

    for (u64 page = 0; page < PAGES; page++)
        wrong += *word(page) != expected[page];
    print("pages: %u wrong\n", wrong);
    return wrong ? 1 : 0;
}
