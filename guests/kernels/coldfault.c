/* coldfault: stores once to each of 8192 pages (32 MiB) that nobody has touched: the time is that of a fault. */
#include "kernel.h"

#ifndef PAGES
#define PAGES 8192
#endif

int main(void)
{
    u64 done = 0;

    for (u64 page = 0; page < PAGES; page++, done++)
        *(volatile u64 *)(__ram_free + page * PAGE_SIZE) = page;
    return kernel_end("coldfault", done, PAGES);
}
