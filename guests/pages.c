/*
 * pages: touches many pages of RAM in three orders and remembers what each must hold.
 *
 * sequential  every page is written for the first time, one after the other
 * strided     every page is read and changed, in steps of 17 pages
 * random      pages are read and changed in pseudo-random order, four times as many as there are
 *
 * How many is PAGES, or the number that the console has to say when the guest starts. RAM has to have room for so many
 * and, if they are more than PAGES, for 8 bytes each behind them.
 */
#include "guest.h"

#ifndef PAGES
#define PAGES 4096
#endif
#define STRIDE 17 /* with a factor in common with the number of pages, not all of them are visited */

static u64 few[PAGES];
static u64 *expected = few;
static u64 pages = PAGES;

/* The number at the beginning of the console's input, 0 if there is none. */
static u64 number(void)
{
    u64 value = 0;

    for (int c = uart_getc(); c >= '0' && c <= '9'; c = uart_getc())
        value = value * 10 + (u64)(c - '0');
    return value;
}

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

    for (u64 page = 0; page < pages; page++)
        sum = sum * 31 + *word(page);
    return sum;
}

int main(void)
{
    u64 wrong = 0;
    u64 wanted = number();
    u32 random = 1;

    if (wanted) {
        pages = wanted;
        if (pages > PAGES)
            expected = (u64 *)(__ram_free + pages * PAGE_SIZE);
    }
    print("pages: %u pages from %08x\n", pages, (u64)__ram_free);
    for (u64 page = 0; page < pages; page++) {
        *word(page) = page;
        expected[page] = page;
    }
    print("  sequential %016x\n", checksum());

    for (u64 step = 0; step < pages; step++)
        touch(step * STRIDE % pages, step);
    print("  strided    %016x\n", checksum());

    for (u64 step = 0; step < 4 * pages; step++) {
        random = random * 1664525u + 1013904223u;
        touch((random >> 8) % pages, step);
    }
    print("  random     %016x\n", checksum());

    for (u64 page = 0; page < pages; page++)
        wrong += *word(page) != expected[page];
    print("pages: %u wrong\n", wrong);
    return wrong ? 1 : 0;
}
