/*
 * thrash: loads that go from page to page over more pages than a TLB holds.
 *
 * 2048 pages against the 256 entries with which an engine's TLB begins: nearly every load is a miss, and the time is
 * that of the walk. Pages are written once before, so that no load is a host page fault.
 */
#include "kernel.h"

#ifndef PAGES
#define PAGES 2048
#endif
#ifndef ACCESSES
#define ACCESSES (8u << 20)
#endif

int main(void)
{
    volatile u64 *memory = (volatile u64 *)__ram_free;
    const u64 stride = PAGE_SIZE / sizeof(u64) + 1; /* the next page, one word on */
    u64 sum = 0;

    for (u64 page = 0; page < PAGES; page++)
        memory[page * stride % (PAGES * (PAGE_SIZE / sizeof(u64)))] = page;
    for (u64 round = 0; round < ACCESSES / PAGES; round++)
        for (u64 page = 0; page < PAGES; page++)
            sum += memory[page * stride % (PAGES * (PAGE_SIZE / sizeof(u64)))];
    return kernel_end("thrash", sum, (u64)(ACCESSES / PAGES) * PAGES * (PAGES - 1) / 2);
}
